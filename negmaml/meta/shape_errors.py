"""Errors of JAX in a user's loss, in the words of this package.

Parameters that do not fit: JAX says which shapes did not, deep below the line of the user. Those
that the operation was handed are among the arguments of JAX's own calls, and have names.

Loops without a derivative in reverse: JAX says so, without what needs it here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

JAX = str(Path(jax.__file__).parent)
NO_REVERSE = "Reverse-mode differentiation does not work for lax.while_loop"


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


@contextmanager
def explained_loops():
    """Raise a ValueError with the remedy where a loop cannot be differentiated in reverse."""
    try:
        yield
    except ValueError as error:
        if NO_REVERSE not in str(error):
            raise
        raise ValueError(
            "the loss must be differentiable in reverse, got one with a lax.while_loop, or a "
            "fori_loop whose bounds are not static, between the parameters and its value (or "
            "inside a derivative rule, for second derivatives); write the loop with lax.scan or "
            "static bounds, or give it a rule that differentiates without the loop, such as "
            "lax.custom_root; where only second derivatives fail, use fomaml or reptile"
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
