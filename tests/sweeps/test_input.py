"""Arguments that a sweep accepts, and contexts in which it may be called; see tests/calls, too."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from tests.internals import parse_grid


def function(key, size, scale=1.0):
    return {"value": scale * jax.random.normal(key) + size}


GRID = {"size": [1, 2], "scale": [0.5, 1.0]}


def test_a_sweep_belongs_outside_of_transformations():
    with pytest.raises(TypeError, match="call it outside of jit"):
        jax.jit(lambda x: nm.sweep(function, GRID, 2)["value"].values)(1.0)
    for transform, x in ((jax.vmap, jnp.ones(2)), (jax.grad, jnp.ones(()))):
        with pytest.raises(TypeError, match=r"traced value.*outside of jit, vmap and grad"):
            transform(lambda x: nm.sweep(function, {"size": 1, "scale": x}, 2))(x)


def test_an_error_of_the_function_names_its_line_and_its_point():
    def broken(key, size, scale):
        return {"value": scale * jnp.ones(size) @ jnp.ones(3)}

    line = broken.__code__.co_firstlineno + 1
    for size, point in (2, "size=2, traced scale "), (1.5, "traced scale and size "):
        with pytest.raises(TypeError) as raised:
            nm.sweep(broken, {"size": size, "scale": 1.0}, 2)
        (note,) = (n for n in raised.value.__notes__ if n.startswith("in the function"))
        assert f"line {line} of {__file__}, {point}" in note


def test_right_input_of_many_kinds_is_taken():
    axes = {"a": (0.5, 1), "b": range(3), "c": np.float32(2), "d": [Fraction(1, 4), 2.0],
            "e": jnp.arange(2.0), "f": np.array([1, 2], np.uint8), "g": [True, False]}  # fmt: skip
    grid = parse_grid(axes, np.int64(2))
    assert grid.shape == (2, 3, 2, 2, 2, 2, 2)
    assert grid.axes[3].values == ((0.25,), (2.0,))
    assert grid.static == {"b", "f", "g"}
    assert parse_grid(axes, np.array([3, 1, 2])).seeds == (3, 1, 2)
    with jax.enable_x64(True):
        assert parse_grid({"a": 2**40, "b": [1e300, 0.5]}, 1).static == {"a"}
