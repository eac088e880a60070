"""Explains errors of JAX in a user's loss: parameters of unfitting shapes, irreversible loops.

JAX raises both far below the user's line. The leaves of `params` that a failed operation received
are among the arguments of JAX's own calls in the traceback, so they can be named.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

JAX = str(Path(jax.__file__).parent)
# The beginning of JAX's message, which has no type of its own.
NO_REVERSE = "Reverse-mode differentiation does not work for lax.while_loop"


class ShapeMismatchError(ValueError):
    """The parameters have shapes that the loss does not take.

    The message names the leaves that the failed operation received, with their shapes.
    """


class WithShapeErrors(NamedTuple):
    """A function of (params, ...) whose errors name the unfitting leaf; hashable if it is.

    name: how the error calls the function.
    """

    function: Callable
    name: str

    def __call__(self, params, *data):
        try:
            return self.function(params, *data)
        except (TypeError, ValueError) as error:  # the types that JAX raises for shapes
            named = isinstance(error, ShapeMismatchError)
            # A product with a tuple, say, is no question of shapes.
            operands = str(error).startswith("unsupported operand type(s)")
            blamed = [] if named or operands else _blamed_leaves(error, params)
            if not blamed:
                raise
            raise ShapeMismatchError(
                f"params must have the shapes that {self.name} takes, got {' and '.join(blamed)}, "
                f"which does not fit what it meets there: {str(error).splitlines()[0]}"
            ) from error


@contextmanager
def explain_while_loops():
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


def _blamed_leaves(error: Exception, params) -> list[str]:
    """Return path and shape of the leaves among the arguments of JAX's calls that failed."""
    names = {
        id(leaf): f"params{jax.tree_util.keystr(path)} of shape {jnp.shape(leaf)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if hasattr(leaf, "shape")
    }
    # Compared by identity: an equal shape would blame leaves that are not involved.
    found = {}
    for frame in _innermost_jax_frames(error):
        for value in frame.f_locals.values():
            for part in value if isinstance(value, list | tuple) else (value,):
                if id(part) in names:
                    found[id(part)] = names[id(part)]
    return list(found.values())


def _innermost_jax_frames(error: Exception) -> Iterator[FrameType]:
    """Yield the frames from where the error was raised outwards, up to the first not of JAX."""
    frames: list[Any] = []
    # A traceback goes from the outermost call to the innermost.
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        # Frames of the user hold all parameters, not only those of the operation that failed.
        if not frame.f_code.co_filename.startswith(JAX):
            return
        yield frame
