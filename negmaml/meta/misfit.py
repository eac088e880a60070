"""Which leaf of the parameters an operation of JAX refused, where a loss does not take them.

JAX says which shapes did not fit, deep below the user's line. The parameters that the operation was
handed are among the arguments of JAX's own calls on the way there, and have names.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

JAX = str(Path(jax.__file__).parent)


class MisfitError(ValueError):
    """Parameters of other shapes than a loss takes."""


class Explained(NamedTuple):
    """A function of (params, ...) that says which leaf an operation refused; hashable as it is."""

    function: Callable
    name: str

    def __call__(self, params, *data):
        try:
            return self.function(params, *data)
        except (TypeError, ValueError) as error:
            refused = [] if isinstance(error, MisfitError) else list(_refused(error, params))
            if not refused:
                raise
            raise MisfitError(
                f"params must have the shapes that {self.name} takes, got {' and '.join(refused)}, "
                f"which does not fit what it meets there: {str(error).splitlines()[0]}"
            ) from error


def _refused(error: Exception, params) -> Iterator[str]:
    """The leaves among the arguments of the calls of JAX that ended in the error, with shapes."""
    names = {
        id(leaf): f"params{jax.tree_util.keystr(path)} of shape {jnp.shape(leaf)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if hasattr(leaf, "shape")
    }
    found = {}
    for frame in _calls_of_jax(error):
        for value in frame.f_locals.values():
            for part in value if isinstance(value, list | tuple) else (value,):
                if id(part) in names:
                    found[id(part)] = names[id(part)]
    return iter(found.values())


def _calls_of_jax(error: Exception) -> Iterator[FrameType]:
    """Its frames, from the last one out to the user's."""
    frames: list[Any] = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        if not frame.f_code.co_filename.startswith(JAX):
            return
        yield frame
