"""Merging stores of the same sweep into one."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from negmaml._core.calls import explain_calls
from negmaml._core.extras import require
from negmaml._core.fingerprint import difference
from negmaml.sweeps.dataset import dataset_of
from negmaml.sweeps.description import MANIFEST, description_of
from negmaml.sweeps.grid import Axis, Region, SweepGrid
from negmaml.sweeps.guard import guarded, zarr_arrays
from negmaml.sweeps.layout import cell_layouts
from negmaml.sweeps.lease import locked
from negmaml.sweeps.lost import clear_lost, found_in
from negmaml.sweeps.manifest import (
    FORMAT,
    Manifest,
    differences,
    extended,
    other_vectorized_axes,
    with_programs,
)
from negmaml.sweeps.members import require_exclusive
from negmaml.sweeps.planning import MAX_BLOCK_BYTES, describe, regions
from negmaml.sweeps.progress import ProgressCallback, progress_reporter
from negmaml.sweeps.progressions import Values, compact, positions
from negmaml.sweeps.reduce import statistics_of
from negmaml.sweeps.runner import empty
from negmaml.sweeps.storage import StoreError, check_url, check_writable
from negmaml.sweeps.store import SweepStore, create, open_store

if TYPE_CHECKING:
    import xarray

OWN = (MANIFEST, "coordinates", "wall_seconds", "merged", "history")  # not taken from a source


@dataclass(frozen=True)
class _Source:
    """A store that is read.

    levels: the levels that each cell has. places: for each dim of the merged cells, the position of
    each value in this store, or -1. dims: the number of that dim in this store. vectorized: the
    positions for vectorized axes, which have the same values in all stores.
    """

    url: str
    manifest: Manifest
    attributes: dict[str, Any]
    arrays: Any
    levels: np.ndarray
    places: tuple[np.ndarray, ...] = ()
    dims: tuple[int, ...] = ()
    vectorized: tuple[tuple[str, np.ndarray], ...] = ()

    def fill(self, region: Region, missing: np.ndarray, block: dict[str, np.ndarray]) -> None:
        """Copy this source's cells in `region` into `block` and unmark them in `missing`."""
        # Positions in this source of the block's cells; -1 for cells that it does not have.
        at = [place[part] for place, part in zip(self.places, region, strict=True)]
        there = [np.flatnonzero(place >= 0) for place in at]
        wanted = missing[np.ix_(*there)]
        if not wanted.any():
            return
        here = [place[found] for place, found in zip(at, there, strict=True)]
        # A cell without all levels would bring fill values into the merged store.
        wanted &= self._at(self.levels, here) == self.manifest.num_levels
        cells = tuple(i[wanted] for i in np.meshgrid(*there, indexing="ij"))
        # Vectorized axes have the same values in all sources, but maybe in another order.
        order = dict(self.vectorized)
        for name in block:
            values = self._read(name, here)
            dims = next((o.dims for o in self.manifest.outputs if o.name == name), ())
            for axis, dim in enumerate(dims, len(here)):
                if dim in order:
                    values = np.take(values, order[dim], axis)
            block[name][cells] = values[wanted]
        missing[cells] = False

    def _read(self, name: str, here: Sequence[np.ndarray]) -> np.ndarray:
        """An array at positions over the dims of the merged cells."""
        own, array = self._own(here), self.arrays[name]
        # Orthogonal indexing: plain index arrays would be paired instead of crossed.
        values = array.oindex[(*own, *[slice(None)] * (array.ndim - len(own)))]
        return values.transpose(*self.dims, *range(len(here), values.ndim))

    def _at(self, values: np.ndarray, here: Sequence[np.ndarray]) -> np.ndarray:
        """Values over the cells at positions over the dims of the merged cells."""
        return values[np.ix_(*self._own(here))].transpose(self.dims)

    def _own(self, here: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The positions in the order of the dims of this store."""
        return [here[self.dims.index(i)] for i in range(len(here))]


@explain_calls
def merge(
    stores: Sequence[str | os.PathLike[str]],
    store: str | os.PathLike[str],
    *,
    progress: bool | ProgressCallback = False,
) -> "xarray.Dataset":
    """Merge stores of the same sweep into one.

    The values of their axes and their seeds are joined, and sorted along axes that grow. The first
    store that has a cell provides it. Missing cells stay incomplete; run `nm.sweep` on the
    new store afterwards to compute them. Stores hold the same sweep if they agree on everything but
    the values of axes and the seeds, including the program of the function.

    Arguments:
        stores: paths or URLs of stores, finished or not; they are only read.
        store: path or URL of the result; the same call resumes an interrupted merge. Its blocks
            have along each dim the largest size of any of the stores.
        progress: True shows a bar on a terminal, or lines in a log; a function is called as
            progress(cells visited, cells in all) after every block.

    Returns the dataset, with `completed`, read lazily.

    Raises StoreError that lists the differences for stores of different sweeps, and StoreError if
    `store` holds another sweep or a chunk is damaged; FileNotFoundError for a missing store.

    >>> import jax, negmaml as nm
    >>> from tempfile import TemporaryDirectory
    >>> function = lambda key, x: {"y": x * jax.random.normal(key)}
    >>> with TemporaryDirectory() as folder:
    ...     for name, seeds in {"a": [0, 1], "b": [2, 3]}.items():
    ...         _ = nm.sweep(function, {"x": [1.0, 2.0]}, seeds, f"{folder}/{name}")
    ...     merged = nm.sweeps.merge([f"{folder}/a", f"{folder}/b"], f"{folder}/all").load()
    >>> dict(merged.sizes), bool(merged.completed.all())
    ({'x': 2, 'seed': 4}, True)
    """
    require("xarray", "sweep")
    if isinstance(stores, str | bytes) or not isinstance(stores, Sequence) or not stores:
        raise TypeError(f"stores must be a list of paths or URLs, got {stores!r}")
    *given, url = [check_url(one) for one in (*stores, store)]
    sources = [_source(one) for one in given]
    # Addresses are canonical, so that another spelling of a source is found as well.
    if url in [source.url for source in sources]:
        raise ValueError(f"store {url!r} is among those that are merged; choose another path")
    manifest = sources[0].manifest
    for source in sources:
        manifest = _joined(sources[0].url, manifest, source)
    manifest = replace(manifest, grid=_sorted(manifest, sources[0].manifest.grid))
    manifest = replace(
        manifest, format=FORMAT, block=_block([s.manifest for s in sources], manifest)
    )
    check_writable(url)
    with progress_reporter(progress, "merge") as tell, locked(url) as lock:
        crashed = require_exclusive(url) or lock.previous_owner_crashed
        out = open_store(url, crashed)
        # The same call after an interruption finds the store that it created.
        if out is None:
            out = create(url, manifest, _attributes(sources, manifest))
        else:
            _check_same(url, out.manifest, manifest)
            clear_lost(out, check=True)
        _copy(out, [_placed(source, out.manifest.grid) for source in sources], lock.check, tell)
    held = description_of(url)
    return statistics_of(dataset_of(url, held, found_in(url, held).levels()), held.manifest)


def _source(url: str) -> _Source:
    held = description_of(url)
    cells = {name: held.layouts[name] for name in cell_layouts(held.manifest)}
    arrays = zarr_arrays(guarded(url, cells))
    return _Source(url, held.manifest, held.attributes, arrays, found_in(url, held).levels())


def _block(parts: Sequence[Manifest], merged: Manifest) -> tuple[int, ...]:
    """Cells of a block along each dim: the most that any of the stores has, within a bound.

    The result does not depend on the order of the stores, and so neither does the number of files.
    """
    sizes = [dict(zip(part.grid.dims, part.block, strict=True)) for part in parts]
    most = {dim: max(size[dim] for size in sizes) for dim in merged.grid.dims}
    bytes_of_cell = max(1, *(output.nbytes for output in merged.outputs))
    bound = max(MAX_BLOCK_BYTES // bytes_of_cell, *(math.prod(part.block) for part in parts))
    # Largest sizes along different dims can multiply to a huge block: halve the longest.
    while math.prod(most.values()) > bound:
        longest = max(sorted(most), key=most.__getitem__)
        most[longest] = -(-most[longest] // 2)
    return tuple(most[dim] for dim in merged.grid.dims)


def _joined(first: str, manifest: Manifest, source: _Source) -> Manifest:
    """The manifest with the additions of a source; StoreError if it is of another sweep."""
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
    # Sources without a common group cannot be compared by program; the name has to do.
    if not other.programs.keys() & manifest.programs.keys() and manifest.function != other.function:
        wrong.append(f"function: store has {manifest.function}, asked {other.function}")
    if wrong:
        listed = "\n  ".join(wrong)
        raise StoreError(
            f"store {source.url!r} (asked) is of another sweep than {first!r} (store); a constant "
            f"that should be an axis is given as a list of one value:\n  {listed}"
        )
    # The merged store is new, so its cells have one level and no extensions.
    joined = extended(replace(manifest, extensions=()), other)
    # Full identities of programs that only this source has.
    kept = {g: held for g, held in other.described.items() if g not in joined.described}
    joined = with_programs(joined, joined.function, kept)
    return replace(joined, programs={**other.programs, **joined.programs})


def _sorted(merged: Manifest, first: SweepGrid) -> SweepGrid:
    """The joined grid, sorted along axes of numbers that became longer."""
    joined = merged.grid

    def in_order(axis: Axis, before: Axis) -> Axis:
        # Strings have no natural order, so they stay in order of appearance.
        texts = any(isinstance(value, str) for row in axis.values for value in row)
        return (
            axis
            if len(axis) == len(before) or texts
            else replace(axis, values=tuple(sorted(axis.values)))
        )

    axes = tuple(in_order(*pair) for pair in zip(joined.axes, first.axes, strict=True))
    # Chunks of seeds stay in the order of their moments.
    longer = len(joined.seeds) > len(first.seeds) and merged.reduction is None
    seeds = compact(sorted(joined.seeds)) if longer else joined.seeds
    return replace(joined, axes=axes, seeds=seeds)


def _attributes(sources: Sequence[_Source], manifest: Manifest) -> dict[str, Any]:
    """The attributes of the merged store."""
    held = {name: v for name, v in sources[0].attributes.items() if name not in OWN}
    seconds = sum(float(source.attributes.get("wall_seconds", 0.0)) for source in sources)
    history = [line for source in sources for line in source.attributes.get("history", [])]
    noted = {"history": history} if history else {}
    urls = [source.url for source in sources]
    return held | describe(manifest) | {"wall_seconds": seconds, "merged": urls} | noted


def _check_same(url: str, held: Manifest, manifest: Manifest) -> None:
    wrong, more = differences(held, manifest)
    _, less = differences(manifest, held) if not wrong else ([], [])
    if held.programs != manifest.programs and not wrong:
        wrong.append("function: it computes something else")
    if wrong or more or less:
        listed = "\n  ".join([*wrong, *more, *(f"{text} less" for text in less)])
        raise StoreError(f"store {url!r} holds something else than this merge:\n  {listed}")


def _placed(source: _Source, merged: SweepGrid) -> _Source:
    """The source with the positions of its cells in the merged grid."""
    own = source.manifest.grid
    held = {axis.names: axis for axis in (*own.axes, *own.vectorized)}

    def places(new: Values, old: Values) -> np.ndarray:
        return np.asarray(positions(old, new))

    found = [places(axis.values, held[axis.names].values) for axis in merged.axes if axis.dim]
    vectorized = [
        (a.dim, places(a.values, held[a.names].values)) for a in merged.vectorized if a.dim
    ]
    found.append(places(merged.seeds, own.seeds))
    dims = tuple(own.dims.index(dim) for dim in merged.dims)
    return replace(source, places=tuple(found), dims=dims, vectorized=tuple(vectorized))


def _copy(out: SweepStore, sources: Sequence[_Source], check, tell: ProgressCallback) -> None:
    """Fill the blocks of a store from its sources."""
    grid, outputs, looked = out.manifest.grid, out.manifest.outputs, 0
    for region in regions(grid, out.manifest.block):
        complete = out.completed(region) > 0
        # Cells of an interrupted merge are complete already and are not copied again.
        missing = ~complete
        block = empty(outputs, missing.shape)
        for source in sources:
            source.fill(region, missing, block)
        wanted = ~complete & ~missing
        if wanted.any():
            # Checked before each write, because another process may have taken the store over.
            check()
            out.write(region, 0, wanted, {name: values[wanted] for name, values in block.items()})
        looked += wanted.size
        tell(looked, grid.cells)
