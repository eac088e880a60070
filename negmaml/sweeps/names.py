"""Names of axes, outputs and dims, all checked before anything is computed.

A sweep is one dataset, whose coordinates, variables and dims share one namespace. Its store has a
folder for each variable, so names must be valid names of folders, too.
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from negmaml.sweeps.grid import Axis, SweepGrid

POINT = "point"  # the dim of listed points, and of a union of grids
# Names of the dataset and its store; format 3 called the completion counts `done`, and xarray
# cannot take `self` as a keyword.
OWN = ("seed", "finite", "done", "completed", "self")
RESERVED = ("key", *OWN, POINT)
IN_PATHS, NOT_IN_FILES = "/\\", ':*?"<>|'  # separators, and characters invalid on Windows
FILE_OF_GROUP = "zarr.json"
LONGEST = 100  # bytes; file systems allow 255, and temporary files of zarr have longer names


def check_axis_name(name: Any) -> None:
    """Raise unless `name` can be an argument of a function and an array of a store."""
    if not isinstance(name, str) or not name.isidentifier():
        raise TypeError(f"grid: an axis is named by a word or a tuple of words, got {name!r}")
    if name in RESERVED:
        raise ValueError(f"grid: {name!r} is reserved ({', '.join(RESERVED)}); rename the axis")
    if fault := _fault(name):
        raise ValueError(f"grid: the name {name!r} {fault}; rename the axis")


def check_output_name(name: Any) -> None:
    """Raise unless `name` can be a variable of a dataset and an array of a store."""
    if not isinstance(name, str):
        raise TypeError(f"function must return a dict with texts as keys, got the key {name!r}")
    if name in OWN:
        raise ValueError(
            f"function returns {name!r}, a name that the store uses ({', '.join(OWN)}); rename it"
        )
    if fault := _fault(name):
        raise ValueError(f"function returns {name!r}, a name that {fault}; rename it")


def _fault(name: str) -> str:
    """The reason why a name is invalid for an array of a store; empty if it is valid."""
    if not name:
        return "is empty"
    # A lone surrogate can be encoded only this way; the loop below rejects it as unprintable.
    if len(name.encode(errors="surrogatepass")) > LONGEST:
        return f"has more than {LONGEST} bytes"
    for character in name:
        if character in IN_PATHS or not character.isprintable():
            return f"has the character {character!r}, which no array of a store can have"
    if name.strip(" .") != name:
        return "begins or ends with a space or a period"
    if name.startswith("__"):
        return "begins with two underscores, which zarr reserves"
    # On a disk that ignores case it would overwrite the metadata of zarr.
    if name.casefold() == FILE_OF_GROUP:
        return "is that of a file of zarr"
    return ""


def check_grid_names(axes: Sequence[Axis]) -> None:
    """Raise if two names of a grid, or the dim of zipped axes and a name, are equal."""
    names = [name for axis in axes for name in axis.names]
    check_distinct("the names of the grid", names)
    # Python normalises identifiers by NFKC, so such keywords would be the same argument.
    _check_unlike(names, "NFKC")
    dims: dict[str, Axis] = {}
    for axis in axes:
        if axis.dim is None or axis.names == (axis.dim,):
            continue
        zipped = f"grid: the zipped axes {', '.join(axis.names)} have the dim {axis.dim!r}"
        if axis.dim in names or (axis.dim in RESERVED and axis.dim != POINT):
            raise ValueError(f"{zipped}, which is also a name of the grid or the store; rename one")
        if axis.dim in dims:
            other = ", ".join(dims[axis.dim].names)
            raise ValueError(f"{zipped}, and so have {other}; rename one")
        dims[axis.dim] = axis


def check_outputs(dims: Mapping[str, Mapping[str, int]], grid: SweepGrid) -> None:
    """Raise if names of outputs or of their dims clash with each other or with the grid.

    dims: for each output its own dims and their sizes, in order.
    """
    axes = (*grid.axes, *grid.vectorized)
    vectorized = {axis.dim for axis in grid.vectorized if axis.dim}
    taken = {*grid.dims, *vectorized, *(name for axis in axes for name in axis.names)}
    if clash := taken & set(dims):
        raise ValueError(
            f"function returns {sorted(clash)}, names that the grid or the store uses; rename them"
        )
    _check_unlike([*taken, *dims], "NFC")
    sizes: dict[str, tuple[str, int]] = {}
    for output, own in dims.items():
        for dim, size in own.items():
            if (dim in taken and dim not in vectorized) or dim in dims or dim in OWN:
                raise ValueError(
                    f"output {output!r} has the dim {dim!r}, which is also a name of the grid, of "
                    "an output or of the store; name its dims with output_dims"
                )
            first, held = sizes.setdefault(dim, (output, size))
            if held != size:
                raise ValueError(
                    f"the dim {dim!r} has {held} values in output {first!r} and {size} in "
                    f"{output!r}; name their dims with output_dims"
                )


def check_output_dims(dims: Mapping[str, Sequence[str]]) -> None:
    """Raise for dims from `output_dims` that no store could have."""
    for output, own in dims.items():
        if not isinstance(output, str):
            raise TypeError(f"output_dims must have names of outputs as keys, got {output!r}")
        check_distinct(f"output_dims[{output!r}]", own)
        for dim in own:
            if fault := _fault(dim):
                raise ValueError(f"output_dims[{output!r}]: the name {dim!r} {fault}; rename it")


def check_portable(names: Iterable[str]) -> None:
    """Raise for names of a new store that some operating system cannot store or tell apart."""
    for name in names:
        if wrong := sorted(set(name) & set(NOT_IN_FILES)):
            raise ValueError(
                f"the name {name!r} has the character {wrong[0]!r}, which folders cannot have on "
                "every system; rename it to put it into a store"
            )
    # File systems of macOS and Windows take names for one that differ in case or normal form.
    _check_unlike([*names, "seed", "finite", "completed"], "NFC", str.casefold)


def _check_unlike(names: Iterable[str], form: Any, case=str) -> None:
    """Raise for two names that Unicode normalisation, or a disk that ignores case, makes equal."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(case(unicodedata.normalize(form, name)), name)
        if other != name:
            why = "Unicode takes" if case is str else "a disk that ignores case takes"
            raise ValueError(f"{why} the names {other!a} and {name!a} for one; rename one of them")


def check_distinct(what: str, values: Sequence) -> None:
    """Raise for a value that occurs twice."""
    seen: set = set()
    for value in values:
        if value in seen:
            shown = value[0] if isinstance(value, tuple) and len(value) == 1 else value
            raise ValueError(f"{what} must be distinct, got {shown!r} twice")
        seen.add(value)
