"""Stores that were made apart, as one."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from negmaml._core.extras import require
from negmaml._core.fingerprint import difference
from negmaml.sweeps.claims import check_alone
from negmaml.sweeps.grid import Axis, Grid, Region
from negmaml.sweeps.guard import guarded, zarr_arrays
from negmaml.sweeps.held import MANIFEST, existing
from negmaml.sweeps.layout import cell_layouts
from negmaml.sweeps.lock import locked
from negmaml.sweeps.lost import found_in, mend
from negmaml.sweeps.manifest import (
    FORMAT,
    Manifest,
    differences,
    extended,
    other_vectorized_axes,
    with_programs,
)
from negmaml.sweeps.planning import LARGEST_BLOCK, in_words, regions
from negmaml.sweeps.progress import Tell, teller
from negmaml.sweeps.reading import dataset_of
from negmaml.sweeps.run import empty
from negmaml.sweeps.storage import StoreError, check_url, check_writable
from negmaml.sweeps.store import Store, create, open_store

OWN = (MANIFEST, "coordinates", "wall_seconds", "merged", "history")  # not taken from a source


@dataclass(frozen=True)
class _Source:
    """A store that is read.

    done: how many parts each cell has, as far as its chunks are there. places: for each dim of the
    merged cells, the position of each value here, or -1; dims: which dim of the cells it is here.
    vectorized: the same for vectorized axes, which have the same values.
    """

    url: str
    manifest: Manifest
    attributes: dict[str, Any]
    arrays: Any
    done: np.ndarray
    places: tuple[np.ndarray, ...] = ()
    dims: tuple[int, ...] = ()
    vectorized: tuple[tuple[str, np.ndarray], ...] = ()

    def fill(self, region: Region, lacking: np.ndarray, block: dict[str, np.ndarray]) -> None:
        """Put the cells of a region that it has into a block, and say that they lack no more."""
        at = [place[part] for place, part in zip(self.places, region, strict=True)]
        there = [np.flatnonzero(place >= 0) for place in at]
        wanted = lacking[np.ix_(*there)]
        if not wanted.any():
            return
        here = [place[found] for place, found in zip(at, there, strict=True)]
        wanted &= self._at(self.done, here) == 1 + len(self.manifest.parts)
        cells = tuple(i[wanted] for i in np.meshgrid(*there, indexing="ij"))
        order = dict(self.vectorized)
        for name in block:
            values = self._read(name, here)
            dims = next((o.dims for o in self.manifest.outputs if o.name == name), ())
            for axis, dim in enumerate(dims, len(here)):
                if dim in order:
                    values = np.take(values, order[dim], axis)
            block[name][cells] = values[wanted]
        lacking[cells] = False

    def _read(self, name: str, here: Sequence[np.ndarray]) -> np.ndarray:
        """An array at positions over the dims of the merged cells."""
        own, array = self._own(here), self.arrays[name]
        values = array.oindex[(*own, *[slice(None)] * (array.ndim - len(own)))]
        return values.transpose(*self.dims, *range(len(here), values.ndim))

    def _at(self, values: np.ndarray, here: Sequence[np.ndarray]) -> np.ndarray:
        """The same of values of each cell."""
        return values[np.ix_(*self._own(here))].transpose(self.dims)

    def _own(self, here: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Positions in the order of the dims of this store."""
        return [here[self.dims.index(i)] for i in range(len(here))]


def merge(
    stores: Sequence[str | os.PathLike[str]],
    store: str | os.PathLike[str],
    *,
    progress: bool | Tell = False,
):
    """Put stores of the same sweep that were made apart into one, as if it had made them.

    Their axes and seeds are joined, and sorted where they grow; a cell that two of them have is the
    first one's. Points that none of them has stay as not done, and `nm.sweep` on the new store
    computes them. They are of one sweep if they agree on everything but values of axes and seeds,
    the program of the function included.

    Arguments:
        stores: paths or URLs of stores, finished or not; they are only read.
        store: where the result goes; the same call resumes a merge that was interrupted. Its
            blocks have along each dim the largest size that any of the stores has.
        progress: whether to show a bar (needs rich: pip install "negmaml[cli]"), or a function
            that is called as progress(cells looked at, cells in all) after every block.

    Returns the dataset, with `completed`, read lazily.

    Raises StoreError for stores of different sweeps, with the differences, for a store that
    holds something else, and for a chunk that is damaged; FileNotFoundError for a missing store.
    """
    require("xarray", "sweep")
    if isinstance(stores, str | bytes) or not isinstance(stores, Sequence) or not stores:
        raise TypeError(f"stores must be a list of paths or URLs, got {stores!r}")
    *given, url = [check_url(one) for one in (*stores, store)]
    sources = [_source(one) for one in given]
    if url in [source.url for source in sources]:
        raise ValueError(f"store {url!r} is among those that are merged; choose another path")
    manifest = sources[0].manifest
    for source in sources:
        manifest = _joined(sources[0].url, manifest, source)
    manifest = replace(manifest, grid=_sorted(manifest.grid, sources[0].manifest.grid))
    manifest = replace(
        manifest, format=FORMAT, block=_block([s.manifest for s in sources], manifest)
    )
    check_writable(url)
    with teller(progress, "merging") as tell, locked(url) as lock:
        left = check_alone(url) or lock.left
        out = open_store(url, left)
        if out is None:
            out = create(url, manifest, _attributes(sources, manifest.grid))
        else:
            _check_same(url, out.manifest, manifest)
            mend(out, check=True)
        _copy(out, [_placed(source, out.manifest.grid) for source in sources], lock.check, tell)
    held = existing(url)
    return dataset_of(url, held, found_in(url, held).done)


def _source(url: str) -> _Source:
    held = existing(url)
    cells = {name: held.layouts[name] for name in cell_layouts(held.manifest)}
    arrays = zarr_arrays(guarded(url, cells))
    return _Source(url, held.manifest, held.attributes, arrays, found_in(url, held).done)


def _block(parts: Sequence[Manifest], merged: Manifest) -> tuple[int, ...]:
    """Cells of a block along each dim: the most that any of the stores has, within a bound.

    Neither depends on the order of the stores, so that the number of files does not.
    """
    sizes = [dict(zip(part.grid.dims, part.block, strict=True)) for part in parts]
    most = {dim: max(size[dim] for size in sizes) for dim in merged.grid.dims}
    bytes_of_cell = max(1, *(output.nbytes for output in merged.outputs))
    bound = max(LARGEST_BLOCK // bytes_of_cell, *(math.prod(part.block) for part in parts))
    while math.prod(most.values()) > bound:
        longest = max(sorted(most), key=most.__getitem__)
        most[longest] = -(-most[longest] // 2)
    return tuple(most[dim] for dim in merged.grid.dims)


def _joined(first: str, manifest: Manifest, source: _Source) -> Manifest:
    """A manifest with what a source adds to it; StoreError if that is of another sweep."""
    other = source.manifest
    wrong, _ = differences(manifest, other)
    if not wrong and (vectorized := other_vectorized_axes(manifest.grid, other.grid)):
        wrong.append(f"axis {', '.join(vectorized)}: values of a vectorized axis differ")
    for group in other.programs.keys() & manifest.programs.keys():
        if manifest.programs[group] != other.programs[group]:
            described = (m.described.get(group) for m in (manifest, other))
            then, now = described
            why = f" ({difference(then, now)})" if then and now else ""
            wrong.append(f"function: at {group} they compute different things{why}")
    if not other.programs.keys() & manifest.programs.keys() and manifest.function != other.function:
        wrong.append(f"function: store has {manifest.function}, asked {other.function}")
    if wrong:
        listed = "\n  ".join(wrong)
        raise StoreError(
            f"store {source.url!r} (asked) is of another sweep than {first!r} (store); a constant "
            f"that should be an axis is given as a list of one value:\n  {listed}"
        )
    joined = extended(replace(manifest, parts=()), other)
    kept = {g: held for g, held in other.described.items() if g not in joined.described}
    joined = with_programs(joined, joined.function, kept)
    return replace(joined, programs={**other.programs, **joined.programs})


def _sorted(joined: Grid, first: Grid) -> Grid:
    """The joined grid with the values in order along axes of numbers that became longer."""

    def in_order(axis: Axis, before: Axis) -> Axis:
        texts = any(isinstance(value, str) for row in axis.values for value in row)
        return (
            axis
            if len(axis) == len(before) or texts
            else replace(axis, values=tuple(sorted(axis.values)))
        )

    axes = tuple(in_order(*pair) for pair in zip(joined.axes, first.axes, strict=True))
    longer = len(joined.seeds) > len(first.seeds)
    return replace(joined, axes=axes, seeds=tuple(sorted(joined.seeds)) if longer else joined.seeds)


def _attributes(sources: Sequence[_Source], grid: Grid) -> dict[str, Any]:
    """How the merged store was made."""
    held = {name: v for name, v in sources[0].attributes.items() if name not in OWN}
    seconds = sum(float(source.attributes.get("wall_seconds", 0.0)) for source in sources)
    history = [line for source in sources for line in source.attributes.get("history", [])]
    noted = {"history": history} if history else {}
    urls = [source.url for source in sources]
    return held | in_words(grid) | {"wall_seconds": seconds, "merged": urls} | noted


def _check_same(url: str, held: Manifest, manifest: Manifest) -> None:
    wrong, more = differences(held, manifest)
    _, less = differences(manifest, held) if not wrong else ([], [])
    if held.programs != manifest.programs and not wrong:
        wrong.append("function: it computes something else")
    if wrong or more or less:
        listed = "\n  ".join([*wrong, *more, *(f"{text} less" for text in less)])
        raise StoreError(f"store {url!r} holds something else than this merge:\n  {listed}")


def _placed(source: _Source, merged: Grid) -> _Source:
    """A source that knows where it has the cells of the merged grid."""
    own = source.manifest.grid
    held = {axis.names: axis for axis in (*own.axes, *own.vectorized)}

    def places(new: Sequence, old: Sequence) -> np.ndarray:
        at = {value: i for i, value in enumerate(old)}
        return np.array([at.get(value, -1) for value in new])

    found = [places(axis.values, held[axis.names].values) for axis in merged.axes if axis.dim]
    vectorized = [
        (a.dim, places(a.values, held[a.names].values)) for a in merged.vectorized if a.dim
    ]
    found.append(places(merged.seeds, own.seeds))
    dims = tuple(own.dims.index(dim) for dim in merged.dims)
    return replace(source, places=tuple(found), dims=dims, vectorized=tuple(vectorized))


def _copy(out: Store, sources: Sequence[_Source], check, tell: Tell) -> None:
    """Fill the blocks of a store from its sources."""
    grid, outputs, looked = out.manifest.grid, out.manifest.outputs, 0
    for region in regions(grid, out.manifest.block):
        done = out.completed(region) > 0
        lacking = ~done
        block = empty(outputs, lacking.shape)
        for source in sources:
            source.fill(region, lacking, block)
        wanted = ~done & ~lacking
        if wanted.any():
            check()
            out.write(region, 0, wanted, {name: values[wanted] for name, values in block.items()})
        looked += wanted.size
        tell(looked, grid.cells)
