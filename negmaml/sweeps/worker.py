"""A sweep that several processes share: each computes the blocks that it claims in one store.

They need no word of each other. A worker opens the store for a moment, makes it if there is none,
and then claims one block after another: first those of its own share, so that it compiles few
programs, then what others have left. It ends when nothing is lacking, so that the blocks of a
worker that is gone are computed as long as one is there; whoever comes later goes on.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from negmaml.sweeps import lock as locks
from negmaml.sweeps.claims import Claims, LostError, Part, living, sharing, watch_of
from negmaml.sweeps.grid import Region
from negmaml.sweeps.planning import Work, regions
from negmaml.sweeps.run import Runner
from negmaml.sweeps.session import (
    Block,
    How,
    Means,
    Programs,
    SharedError,
    cells_of,
    here,
    labelled,
    last_part,
    of_part,
    opened,
)
from negmaml.sweeps.storage import StoreError
from negmaml.sweeps.store import Store, open_store


def into_shared_store(work: Work, url: str, part: Part, means: Means, how: How):
    """`into_store` with others, as worker `part`; returns when all that is asked for is there."""
    known = Programs(work, how.code_version)
    known(work.grid.groups())  # traced before anybody has to wait for it
    watch = watch_of(url)
    while True:
        try:
            return _share(work, url, part, means, how, known, watch)
        except LostError:  # it was silent for long, as a process that is suspended
            continue
        except SharedError:  # perhaps by workers that are gone
            if living(watch):
                raise


@dataclass(frozen=True)
class _Sharing:
    """A worker in mid-sweep. lacking: the cells asked for that are not yet complete."""

    work: Work
    store: Store
    claims: Claims
    means: Means
    asked: tuple[np.ndarray, ...]
    lacking: np.ndarray
    known: Programs

    def tell(self) -> None:
        """Say how much is complete."""
        cells = math.prod(part.size for part in self.asked)
        self.means.tell(cells - int(self.lacking.sum()), cells)


def _share(work: Work, url: str, part: Part, means: Means, how: How, known: Programs, watch):
    started, grid = time.perf_counter(), work.grid
    with sharing(url, part, watch) as claims:
        with locks.locked(url, opening=True) as lock:
            alone = not claims.others()
            work, store, runner = opened(
                work, url, lock.left and alone, means, how, known, alone, check=False
            )
            claims.join()
        try:
            asked, last = cells_of(store.manifest.grid, grid), last_part(store, grid)
            lacking = np.zeros(work.grid.shape, bool)
            lacking[asked] = store.completed()[asked] <= last
            at_work = _Sharing(work, store, claims, means, asked, lacking, known)
            at_work.tell()
            for level in range(last + 1):
                _compute(at_work, level, level in (0, last), runner)
                runner = None  # it was for a new store, which has one part
        finally:
            _leave(url, claims, time.perf_counter() - started)
        return labelled(store, grid, asked)


def _compute(at_work: _Sharing, level: int, completes: bool, runner: Runner | None) -> None:
    """Give a part to the cells that lack it, with the others.

    completes: whether cells have everything that is asked for with it.
    """
    store, claims, means = at_work.store, at_work.claims, at_work.means
    lacking = np.zeros(at_work.work.grid.shape, bool)
    lacking[at_work.asked] = store.completed()[at_work.asked] == level
    block = store.manifest.block
    todo = [r for r in regions(at_work.work.grid, block) if lacking[r].any()]
    if not todo:
        return
    todo = in_order(todo, claims.part)
    if runner is None:
        runner = of_part(at_work.work, store, level).runner(block, means.memory, means.devices)
    runner.compiler.check = at_work.known.check
    runner.expect(todo)

    def write(region: Region, wanted: np.ndarray, values) -> None:
        if claims.holds(name := _name(level, region, block)):
            store.write(region, level, wanted, values)
        claims.release(name)

    def seen(region: Region) -> np.ndarray:
        """The cells of a block that lack the part."""
        wanted = lacking[region] & (store.completed(region) == level)
        if not wanted.any() and completes:
            at_work.lacking[region] &= ~lacking[region]
            at_work.tell()
        return wanted

    for _ in here(runner, _claimed(claims, todo, seen, lambda r: _name(level, r, block)), write):
        claims.check()


def _claimed(claims: Claims, todo: Sequence[Region], seen, name) -> Iterator[Block | None]:
    """Blocks that this worker claims, until all of them are complete."""
    while todo:
        left, busy = [], True
        for region in todo:
            if not seen(region).any():
                continue
            left.append(region)
            if claims.claim(name(region)):
                wanted = seen(region)  # it may have been completed before it was claimed
                if wanted.any():
                    busy = False
                    yield region, wanted
                else:
                    claims.release(name(region), done=False)
        yield None
        claims.check()
        if left and busy:
            time.sleep(locks.BEAT / 5)
        todo = left


def in_order(blocks: Sequence[Region], part: Part) -> list[Region]:
    """The share of a worker, and then those of the others, the next one's first.

    What others have is taken from the end, since they come to it last.
    """
    number, count = part
    cuts = [len(blocks) * k // count for k in range(count + 1)]
    shares = [list(blocks[start:stop]) for start, stop in pairwise(cuts)]
    own, *others = shares[number - 1 :] + shares[: number - 1]
    return own + [region for share in others for region in reversed(share)]


def _name(level: int, region: Region, block: Sequence[int]) -> str:
    """A block of a part, as chunks are named."""
    corner = [part.start // size for part, size in zip(region, block, strict=True)]
    return ".".join(map(str, [level, *corner]))


def _leave(url: str, claims: Claims, seconds: float) -> None:
    """Go, and note the time it took; the last one removes what those left that are gone."""
    with contextlib.suppress(OSError, StoreError):
        claims.check()
        with locks.locked(url, opening=True):
            alone = not claims.others()
            store = open_store(url, tidy=alone, listed=False)
            if alone:
                claims.bury()
            if store is not None:
                before = float(store.attributes.get("wall_seconds", 0.0))
                store.describe({"wall_seconds": before + seconds})
            claims.leave()
    claims.leave()  # also where the time could not be noted: nobody is to wait for this one
