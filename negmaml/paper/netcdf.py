"""Writes classic netCDF files without xarray, which can open them.

Importing xarray (and pandas) and writing with it would take longer than the simulation.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write(path: Path, variables: Mapping, coordinates: Mapping, attributes: Mapping) -> None:
    """Write the contents of `xarray.Dataset(variables, coordinates, attributes)`.

    variables: (dims, values) or (dims, values, attributes) by name. coordinates: the values along
    each dim of that name, numbers or texts. attributes: texts.
    """
    from scipy.io import netcdf_file

    own = {name: ((name,), values) for name, values in coordinates.items()}
    with netcdf_file(path, "w", version=2) as file:  # version 2 allows files above 2 GB
        for name, text in attributes.items():
            setattr(file, name, text.encode())
        for name, (dims, values, *notes) in {**own, **variables}.items():
            _write_one(file, name, dims, np.asarray(values), notes[0] if notes else {})


def _write_one(file, name: str, dims, values: np.ndarray, notes: Mapping[str, Any]) -> None:
    if values.dtype.kind == "U":  # texts are arrays of characters, with an axis of their own
        values = np.char.encode(values, "utf-8")
        width = values.dtype.itemsize
        values = values.view("S1").reshape(*values.shape, width)
        # xarray joins the characters along the last axis into texts, decoded by `_Encoding`.
        dims, notes = (*dims, f"string{width}"), {**notes, "_Encoding": "utf-8"}
    for dim, size in zip(dims, values.shape, strict=True):
        if dim not in file.dimensions:
            file.createDimension(dim, size)
    variable = file.createVariable(name, values.dtype, dims)
    variable[:] = values
    for note, text in notes.items():
        setattr(variable, note, text.encode())
