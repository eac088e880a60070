"""The store of a sweep: created or checked, extended, prepared for resuming, and read back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from negmaml._core.fingerprint import Identity, difference
from negmaml.sweeps.dataset import dataset_of
from negmaml.sweeps.description import StoreDescription, read_description
from negmaml.sweeps.functions import group_text, identify_programs
from negmaml.sweeps.grid import SweepGrid
from negmaml.sweeps.lost import clear_lost, found_in
from negmaml.sweeps.manifest import (
    Box,
    Manifest,
    differences,
    extended,
    other_programs,
    other_vectorized_axes,
    restricted_to,
    with_programs,
)
from negmaml.sweeps.planning import ValidatedSweep, describe, planned
from negmaml.sweeps.progressions import missing_from, positions
from negmaml.sweeps.reduce import statistics_of
from negmaml.sweeps.runner import Runner
from negmaml.sweeps.selection import Selection, selected
from negmaml.sweeps.storage import StoreError, storage_at
from negmaml.sweeps.store import SweepStore, create, open_store
from negmaml.sweeps.untrusted import MAX_EXTENSIONS


@dataclass(frozen=True)
class ExecutionOptions:
    """The options for executing a sweep: limits, devices and the progress callback.

    memory: bytes of a batch. block: cells of a block. client: a Dask client, or None. report:
    called as report(cells complete, cells in all). workers: the expected number of workers.
    """

    memory: int | None
    block: int | None
    devices: Any
    client: Any
    report: Callable[[int, int], Any]
    workers: int = 1


@dataclass(frozen=True)
class StorePolicy:
    """The permissions of a sweep on an existing store, and the label of its function.

    extend: it may add values and seeds. allow_code_change: its function may have changed.
    """

    extend: bool
    allow_code_change: bool
    code_version: str | None


class SharedError(StoreError):
    """The call would change a store that other workers share."""


class ProgramCache:
    """The identities of a sweep's programs, one for each group of static values.

    Each is traced once; `check` traces again and compares.
    """

    def __init__(self, sweep: ValidatedSweep, code_version: str | None):
        self.sweep, self.code_version = sweep, code_version
        self.found: dict[str, Identity] = {}

    def _traced(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, Identity]:
        function, grid = self.sweep.function, self.sweep.grid
        return identify_programs(function, grid, groups, self.code_version)

    def __call__(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, Identity]:
        """The identities of these groups, by the group as text."""
        self.found |= self._traced([g for g in groups if group_text(g) not in self.found])
        return {text: self.found[text] for text in map(group_text, groups)}

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise StoreError if the program of a group is not the recorded one any more."""
        text = group_text(group)
        if text not in self.found:
            return
        now = self._traced([group])[text]
        # Globals that the function reads may have changed since it was first traced.
        if self.found[text].digest != now.digest:
            raise StoreError(
                f"the function, or a setting of JAX, changed while the sweep ran: at {group} it "
                f"computes something else than was recorded ({difference(self.found[text], now)}); "
                "finished blocks are valid; undo the change, and the same call resumes"
            )


def at_level(sweep: ValidatedSweep, store: SweepStore, level: int) -> ValidatedSweep:
    """The sweep with the values of vectorized axes that a level of the store adds."""
    grid, outputs = restricted_to(sweep.grid, sweep.outputs, store.levels[level])
    return replace(sweep, grid=grid, outputs=outputs)


def last_level(store: SweepStore, requested: SweepGrid) -> int:
    """The last level that adds requested values of vectorized axes."""
    by_names = {axis.names: axis for axis in requested.vectorized}
    at = {a.dim: np.asarray(positions(a.values, by_names[a.names].values))
          for a in store.manifest.grid.vectorized if a.dim}  # fmt: skip

    def needed(box: Box) -> bool:
        return all(((at[dim] >= a) & (at[dim] < b)).any() for dim, (a, b) in box.items())

    # Values that only the store has need no computing.
    return max(i for i, box in enumerate(store.levels) if needed(box))


def open_or_create(
    sweep: ValidatedSweep, url: str, tidy: bool, options: ExecutionOptions, policy: StorePolicy,
    programs: ProgramCache, exclusive: bool = True, check: bool = True,
) -> tuple[ValidatedSweep, SweepStore, Runner | None]:  # fmt: skip
    """Open the store at `url` and check that it holds this sweep, or create it.

    tidy: whether to remove files that interrupted writers left. exclusive: whether no other worker
    computes cells of the store now. check: whether to verify its chunks.

    Returns the sweep in the order of the store, the store, and the runner that planned the blocks
    of a new store. Raises StoreError with all differences if the store holds another sweep.
    """
    requested, store = sweep.manifest(), open_store(url, tidy)
    if store is None:
        # Only for a new store: an existing one has its names already.
        sweep.check_portable()
        now = programs(sweep.grid.groups())
        _, runner = planned(sweep, options.memory, options.block, options.devices, options.workers)
        # The identities are traced before the store exists, so every store has them.
        manifest = with_programs(replace(requested, block=runner.block), requested.function, now)
        return sweep, create(url, manifest, sweep.attributes()), runner
    stored, added, changes, now = _compared_with_store(sweep, url, store, policy, programs)
    if (added or changes) and not exclusive:
        raise SharedError(
            f"store {url!r} cannot be changed while workers share it; wait for them:\n  "
            + "\n  ".join([*added, *changes])
        )
    # Only now, because it needs axes that agree.
    _check_outputs(sweep, url, stored, requested)
    # Flags share chunks: clearing some while a worker sets others could undo its write.
    lost = clear_lost(store, check) if exclusive else []
    # An interrupted extension left old metadata of single arrays.
    store.update_array_metadata()
    if stored.version != requested.version:  # it computes the same, or the change was accepted
        changes.append(f"version: {stored.version} of negmaml, then {requested.version}")
    noted = with_programs(replace(stored, version=requested.version), requested.function, now)
    history = [*changes, *([_describe_lost(lost)] if lost else [])]
    notes = {"history": [*store.attributes.get("history", []), *history]} if history else {}
    if added:
        # The completion counts are bytes, which limits the number of extensions.
        merged = extended(noted, requested)
        if len(merged.extensions) > MAX_EXTENSIONS:
            raise StoreError(
                f"store {url!r}: vectorized axes were extended {MAX_EXTENSIONS} times, the "
                "maximum; sweep all values into another store"
            )
        store.extend(merged, describe(merged) | notes)
    elif history or noted.programs != stored.programs:
        store.note(noted, notes)
    stored = store.manifest
    # In the order of the store, which decides where a cell lies in its chunk.
    held = replace(sweep, grid=stored.grid, outputs=stored.outputs, reduction=stored.reduction)
    return held, store, None


def _compared_with_store(
    sweep: ValidatedSweep, url: str, store: SweepStore, policy: StorePolicy, programs: ProgramCache
) -> tuple[Manifest, list[str], list[str], dict[str, Identity]]:
    """(stored manifest, what the sweep adds, accepted changes of programs, its programs).

    Raises StoreError for differences that the policy does not allow.
    """
    stored = store.manifest
    wrong, added = differences(stored, sweep.manifest())
    if not policy.extend:
        wrong += [f"{text}; extend adds it (--extend)" for text in added]
    now: dict[str, Identity] = {}
    changes: list[str] = []
    if not wrong:
        # Programs are comparable only if axes, outputs and seeds agree.
        now = programs(_groups_to_compare(stored, sweep.grid))
        changes = other_programs(stored, now)
    if not policy.allow_code_change:
        wrong += [f"{text}; pass allow_code_change=True to resume anyway" for text in changes]
    if wrong:
        listed = "\n  ".join(wrong)
        raise StoreError(f"store {url!r} holds another sweep:\n  {listed}")
    return stored, added, changes, now


def _describe_lost(lost: Sequence[str]) -> str:
    """The history line about lost chunks, which names the first three."""
    more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    return f"recomputed because it was lost: {', '.join(lost[:3])}{more}"


def _groups_to_compare(stored: Manifest, requested: SweepGrid) -> list[dict[str, Any]]:
    """The requested groups, and a stored one if they are all new: something has to be compared."""
    groups = requested.groups()
    if any(group_text(group) in stored.programs for group in groups):
        return groups
    return [*groups, stored.grid.groups()[0]]


def _check_outputs(sweep: ValidatedSweep, url: str, stored: Manifest, requested: Manifest) -> None:
    """Raise if stored outputs could depend on all values of a vectorized axis that has changed."""
    other = other_vectorized_axes(stored.grid, requested.grid)
    names = [o.name if sweep.reduction is None else o.name.rpartition("_")[0]
             for o in sweep.outputs if not o.dims]  # fmt: skip
    hidden = [name for name in dict.fromkeys(names) if name not in sweep.declared]
    if other and hidden:
        raise StoreError(
            f"store {url!r} has other values of {', '.join(other)} than requested: outputs "
            f"{', '.join(hidden)} may depend on all values at once; if they do not, pass "
            f"output_dims={{{hidden[0]!r}: ()}}, or else sweep all values into another store"
        )


def read_finished(sweep: ValidatedSweep, url: str, policy: StorePolicy):
    """The dataset of a store that has all requested cells, or None; writes nothing."""
    sweep = in_chunks_of(url, sweep)
    described = read_description(url, storage_at(url))
    if described is None:
        return None
    stored, requested = described.manifest, sweep.manifest()
    wrong, added = differences(stored, requested)
    programs = ProgramCache(sweep, policy.code_version)
    if wrong or added or other_programs(stored, programs(sweep.grid.groups())):
        return None
    _check_outputs(sweep, url, stored, requested)
    cells, store = selected(stored.grid, sweep.grid), SweepStore(url, described)
    # Every chunk is verified: on a read-only disk a lost one cannot be computed again.
    found = found_in(url, described, check=True)
    least = 1 + last_level(store, sweep.grid)
    if found.flags.count(least, cells, found.possible) < cells.size:
        return None
    return to_dataset(store, sweep, cells)


def in_chunks_of(url: str, sweep: ValidatedSweep) -> ValidatedSweep:
    """The sweep with the chunks of seeds that the store at `url` has, and its own seeds besides."""
    if sweep.reduction is None or (held := read_description(url, storage_at(url))) is None:
        return sweep
    stored, seeds = held.manifest.reduction, sweep.reduction.seeds
    # A sweep of fewer seeds keeps its own chunks, which may be some of the store's.
    if stored is None or missing_from(seeds, stored.seeds):
        return sweep
    reduction = stored.with_seeds(seeds)
    return replace(sweep, grid=replace(sweep.grid, seeds=reduction.firsts), reduction=reduction)


def _everything(at: range | np.ndarray, size: int) -> bool:
    """True for all positions in order."""
    return at == range(size) if isinstance(at, range) else np.array_equal(at, np.arange(size))


def to_dataset(store: SweepStore, sweep: ValidatedSweep, cells: Selection):
    """The requested cells of a store as a lazy dataset, in the order of the requested grid.

    Statistics over seeds are computed, not lazy.
    """
    requested = sweep.grid
    dataset = dataset_of(
        store.url, StoreDescription(store.attributes, store.manifest, store.layouts)
    )
    stored = store.manifest.grid
    at = dict(zip(stored.dims, cells.positions, strict=True))
    by_names = {axis.names: axis for axis in requested.vectorized}
    for axis in stored.vectorized:
        if axis.dim:
            at[axis.dim] = positions(axis.values, by_names[axis.names].values)
    sizes = dataset.sizes
    # Selecting all positions in order would make a lazy array slower for nothing.
    chosen = {d: np.asarray(i) for d, i in at.items() if not _everything(i, sizes[d])}
    dataset = dataset.isel(chosen) if chosen else dataset
    if stored.dims != requested.dims:
        dataset = dataset.transpose(*requested.dims, ...)
    return statistics_of(dataset, sweep, sweep.statistics)
