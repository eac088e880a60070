"""A sweep into a store: made or checked, extended, gone on with, and read back."""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from negmaml._core.fingerprint import Identity, difference
from negmaml._core.settings import result_settings
from negmaml.sweeps import cluster as clusters
from negmaml.sweeps import store as stores
from negmaml.sweeps.functions import group_text, programs
from negmaml.sweeps.grid import Grid, Region
from negmaml.sweeps.held import Held, held_at
from negmaml.sweeps.lock import Lock
from negmaml.sweeps.lost import found_in, mend
from negmaml.sweeps.manifest import (
    Box,
    Manifest,
    differences,
    extended,
    other_programs,
    other_vectorized_axes,
    part_of,
    with_programs,
)
from negmaml.sweeps.planning import Work, in_words, index_of, planned, regions
from negmaml.sweeps.reading import dataset_of
from negmaml.sweeps.run import Runner
from negmaml.sweeps.storage import StoreError, files_of

MOST_PARTS = 254  # that a byte counts
Block = tuple[Region, np.ndarray]  # and which of its cells are wanted


@dataclass(frozen=True)
class Means:
    """With what a sweep is computed, and whom it tells how far it is."""

    memory: int | None
    block: int | None
    devices: Any
    client: Any
    tell: Callable[[int, int], Any]


@dataclass(frozen=True)
class How:
    """What a sweep may do to a store that is there, and the label of its function."""

    extend: bool
    allow_code_change: bool
    code_version: str | None


class SharedError(StoreError):
    """What is asked changes a store that others share."""


class Programs:
    """What a function computes in groups of static values, each traced once."""

    def __init__(self, work: Work, version: str | None):
        self.work, self.version = work, version
        self.found: dict[str, Identity] = {}

    def __call__(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, Identity]:
        """Their identities, by the group as text."""
        new = [group for group in groups if group_text(group) not in self.found]
        self.found |= programs(self.work.function, self.work.grid, new, self.version)
        return {text: self.found[text] for text in map(group_text, groups)}

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise unless the function still computes in a group what the store records."""
        text = group_text(group)
        if text not in self.found:
            return
        now = programs(self.work.function, self.work.grid, [group], self.version)[text]
        if self.found[text].digest != now.digest:
            raise StoreError(
                f"the function, or a setting of JAX, changed while the sweep ran: at {group} it "
                f"computes something else than was recorded ({difference(self.found[text], now)}); "
                "finished blocks are whole; undo the change, and the same call resumes"
            )


def into_store(work: Work, url: str, lock: Lock, means: Means, how: How):
    """Compute what the store at `url` lacks of a sweep, and return its dataset: see `nm.sweep`."""
    started, asked = time.perf_counter(), work.grid
    known = Programs(work, how.code_version)
    work, store, runner = opened(work, url, lock.left, means, how, known)
    before, last = float(store.attributes.get("wall_seconds", 0.0)), last_part(store, asked)
    wanted = cells_of(store.manifest.grid, asked)
    whole = int((store.completed()[wanted] > last).sum())
    means.tell(whole, asked.cells)
    computed = False
    try:
        for part in range(last + 1):
            for count in _compute(work, store, part, wanted, means, runner, known):
                lock.check()
                computed = True
                whole += count if part in (0, last) else 0
                means.tell(whole, asked.cells)
            runner = None  # it was for a new store, which has one part
    finally:
        if computed:
            # The error of a full disk is told by the block, and who lost the lock writes no more.
            with contextlib.suppress(OSError, StoreError):
                lock.check()
                store.describe({"wall_seconds": before + time.perf_counter() - started})
    return labelled(store, asked, wanted)


def _compute(
    work: Work, store: stores.Store, part: int, asked, means: Means, runner, known: Programs
):
    """Give a part to the cells that lack it, here or on the workers; yields how many, by block."""
    lacking = np.zeros(work.grid.shape, bool)
    lacking[asked] = store.completed()[asked] == part
    todo = [region for region in regions(work.grid, store.manifest.block) if lacking[region].any()]
    if not todo:
        return
    work, block = of_part(work, store, part), store.manifest.block
    if means.client is None:
        runner = runner or work.runner(block, means.memory, means.devices)
        runner.compiler.check = known.check
        runner.expect(todo)
        blocks = ((region, lacking[region]) for region in todo)
        yield from here(runner, blocks, lambda *block: store.write(block[0], part, *block[1:]))
        return
    job = clusters.Job(
        f"negmaml-{uuid.uuid4().hex[:8]}", work.function, work.grid, work.outputs, work.root_seed,
        block, means.memory, result_settings(), store.url, part,
    )  # fmt: skip
    yield from clusters.spread(means.client, job, [(r, lacking[r]) for r in todo])


def of_part(work: Work, store: stores.Store, part: int) -> Work:
    """The sweep of what a part has of the vectorized axes."""
    grid, outputs = part_of(work.grid, work.outputs, store.parts[part])
    return replace(work, grid=grid, outputs=outputs)


def last_part(store: stores.Store, asked: Grid) -> int:
    """The last part that has values of vectorized axes which are asked for."""
    by_names = {axis.names: axis for axis in asked.vectorized}
    at = {a.dim: _positions(a.values, by_names[a.names].values)
          for a in store.manifest.grid.vectorized if a.dim}  # fmt: skip

    def needed(box: Box) -> bool:
        return all(((at[dim] >= a) & (at[dim] < b)).any() for dim, (a, b) in box.items())

    return max(i for i, box in enumerate(store.parts) if needed(box))


def cells_of(held: Grid, asked: Grid) -> tuple[np.ndarray, ...]:
    """Positions of the cells asked for, as an open index over the dims of the store."""
    found = []
    by_names = {axis.names: axis for axis in asked.axes}
    for axis in held.axes:
        if axis.dim:
            found.append(_positions(axis.values, by_names[axis.names].values))
    return np.ix_(*found, _positions(held.seeds, asked.seeds))


def _positions(held: tuple, asked: tuple) -> np.ndarray:
    at = {value: i for i, value in enumerate(held)}
    return np.array([at[value] for value in asked])


def opened(
    work: Work,
    url: str,
    tidy: bool,
    means: Means,
    how: How,
    known: Programs,
    alone: bool = True,
    check: bool = True,
) -> tuple[Work, stores.Store, Runner | None]:
    """The store, made or checked; the work in the order of the store; a runner if one was made.

    alone: whether no other worker computes cells of the store as it is. check: whether to verify
    its chunks.
    """
    asked, store = work.manifest(), stores.open_store(url, tidy)
    if store is None:
        work.check_portable()
        now = known(work.grid.groups())
        _, runner = planned(work, means.memory, means.block, means.devices)
        asked = with_programs(replace(asked, block=runner.block), asked.function, now)
        return work, stores.create(url, asked, work.attributes()), runner
    held = store.manifest
    wrong, more = differences(held, asked)
    wrong += [f"{text}; extend adds it (--extend)" for text in more if not how.extend]
    now, changes = {}, []
    if not wrong:
        now = known(_compared(held, work.grid))
        changes = other_programs(held, now)
    if not how.allow_code_change:
        wrong += [f"{text}; pass allow_code_change=True to resume anyway" for text in changes]
    if wrong:
        listed = "\n  ".join(wrong)
        raise StoreError(f"store {url!r} holds another sweep:\n  {listed}")
    if (more or changes) and not alone:
        raise SharedError(
            f"store {url!r} cannot be changed while workers share it; wait for them:\n  "
            + "\n  ".join([*more, *changes])
        )
    _check_outputs(work, url, held, asked)
    lost = mend(store, check) if alone else []
    store.follow()
    if held.version != asked.version:  # it computes the same, or that was accepted
        changes.append(f"version: {held.version} of negmaml, then {asked.version}")
    noted = with_programs(replace(held, version=asked.version), asked.function, now)
    told = [*changes, *([_lost_in_words(lost)] if lost else [])]
    notes = {"history": [*store.attributes.get("history", []), *told]} if told else {}
    if more:
        merged = extended(noted, asked)
        if len(merged.parts) > MOST_PARTS:
            raise StoreError(
                f"store {url!r}: vectorized axes were extended {MOST_PARTS} times, the maximum; "
                "sweep all values into another store"
            )
        store.extend(merged, in_words(merged.grid) | notes)
    elif told or noted.programs != held.programs:
        store.note(noted, notes)
    held = store.manifest
    return replace(work, grid=held.grid, outputs=held.outputs), store, None


def _lost_in_words(lost: Sequence[str]) -> str:
    return f"computed again, since it was lost: {', '.join(lost[:3])}" + (
        f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    )


def _compared(held: Manifest, asked: Grid) -> list[dict[str, Any]]:
    """The groups asked for, and one that the store has, so that something is compared."""
    groups = asked.groups()
    if any(group_text(group) in held.programs for group in groups):
        return groups
    return [*groups, held.grid.groups()[0]]


def _check_outputs(work: Work, url: str, stored: Manifest, asked: Manifest) -> None:
    """That what is stored stays right when vectorized axes differ, as far as it can be known."""
    other = other_vectorized_axes(stored.grid, asked.grid)
    hidden = [o.name for o in work.outputs if not o.dims and o.name not in work.declared]
    if other and hidden:
        raise StoreError(
            f"store {url!r} has other values of {', '.join(other)} than asked: outputs "
            f"{', '.join(hidden)} may depend on all values at once; if they do not, pass "
            f"output_dims={{{hidden[0]!r}: ()}}, or else sweep all values into another store"
        )


def finished(work: Work, url: str, how: How):
    """The dataset of a store that has all that is asked for, writing nothing; None for others."""
    described = held_at(url, files_of(url))
    if described is None:
        return None
    held, asked = described.manifest, work.manifest()
    wrong, more = differences(held, asked)
    if wrong or more or other_programs(held, Programs(work, how.code_version)(work.grid.groups())):
        return None
    _check_outputs(work, url, held, asked)
    wanted, store = cells_of(held.grid, work.grid), stores.Store(url, described)
    if (found_in(url, described, check=True).done[wanted] <= last_part(store, work.grid)).any():
        return None
    return labelled(store, work.grid, wanted)


def labelled(store: stores.Store, asked: Grid, cells):
    """The dataset of a store, lazily, in the order of the grid that was asked for."""
    dataset = dataset_of(store.url, Held(store.attributes, store.manifest, store.layouts))
    held = store.manifest.grid
    at = {dim: index.ravel() for dim, index in zip(held.dims, cells, strict=True)}
    by_names = {axis.names: axis for axis in asked.vectorized}
    for axis in held.vectorized:
        if axis.dim:
            at[axis.dim] = _positions(axis.values, by_names[axis.names].values)
    sizes = dataset.sizes
    chosen = {d: i for d, i in at.items() if not np.array_equal(i, np.arange(sizes[d]))}
    dataset = dataset.isel(chosen) if chosen else dataset
    return dataset if held.dims == asked.dims else dataset.transpose(*asked.dims, ...)


def here(
    runner: Runner, blocks: Iterable[Block | None], write: Callable[..., Any]
) -> Iterator[int]:
    """Compute blocks here, and write each as write(region, wanted, values); yields their cells.

    A block is written while the next one is computed, so a kill loses two at most. None stands for
    a moment by which all are written.
    """
    with ThreadPoolExecutor(1) as writer:
        pending: list[tuple[int, Future]] = []
        for block in blocks:
            values = None
            if block is not None:
                region, wanted = block
                values = runner.compute(index_of(region, wanted))
            yield from _finished(pending)
            pending = []
            if block is not None:
                written = writer.submit(write, region, wanted, values)
                pending = [(int(wanted.sum()), written)]
        yield from _finished(pending)


def _finished(pending):
    """Wait for a write; an error of it is raised here."""
    for count, written in pending:
        written.result()
        yield count
