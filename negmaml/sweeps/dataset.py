"""The lazy dataset of a store: labels from its manifest, and data whose chunks are checked."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from negmaml._core.extras import require
from negmaml.sweeps.description import StoreDescription
from negmaml.sweeps.guard import guarded
from negmaml.sweeps.layout import cell_layouts, coordinates


def dataset_of(url: str, held: StoreDescription, done: np.ndarray | None = None):
    """The dataset of the store at `url`.

    done: which cells are complete; it becomes the variable `completed`. Without it, all cells that
    will be read count as complete, so a missing chunk is an error.
    """
    xr = require("xarray", "sweep")
    grid = held.manifest.grid
    names = [name for name in cell_layouts(held.manifest) if name != held.manifest.completed]
    arrays = {name: held.layouts[name] for name in names}
    # The checked store compares every chunk with its checksum before zarr decodes it.
    store = guarded(url, arrays, _attributes(held), complete=done is None)
    # `chunks=None` gives xarray's own lazy arrays, which do not need Dask.
    dataset = xr.open_zarr(store, chunks=None, zarr_format=3, consolidated=True)
    # Labels come from the checked manifest, so no chunk of a coordinate has to be trusted.
    dataset = dataset.assign_coords(coordinates(grid))
    return dataset if done is None else dataset.assign(completed=(grid.dims, done))


def _attributes(held: StoreDescription) -> Mapping[str, Any]:
    """The attributes of the dataset, without the list of coordinates, which xarray derives."""
    return {name: value for name, value in held.attributes.items() if name != "coordinates"}
