"""The dataset of a store, lazily: labels from its manifest, and data whose chunks are checked."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from negmaml._core.extras import require
from negmaml.sweeps.guard import guarded
from negmaml.sweeps.held import Held
from negmaml.sweeps.layout import cell_layouts, coordinates


def dataset_of(url: str, held: Held, done: np.ndarray | None = None):
    """The dataset of the store at `url`.

    done: which cells are, to be a variable of it. Without, all cells that will be read are done, so
    that a chunk which is missing is an error.
    """
    xr = require("xarray", "sweep")
    grid = held.manifest.grid
    names = [name for name in cell_layouts(held.manifest) if name != held.manifest.completed]
    arrays = {name: held.layouts[name] for name in names}
    store = guarded(url, arrays, _attributes(held), whole=done is None)
    dataset = xr.open_zarr(store, chunks=None, zarr_format=3, consolidated=True)
    dataset = dataset.assign_coords(coordinates(grid))
    return dataset if done is None else dataset.assign(completed=(grid.dims, done))


def _attributes(held: Held) -> Mapping[str, Any]:
    """Those of the dataset; which names are coordinates is known."""
    return {name: value for name, value in held.attributes.items() if name != "coordinates"}
