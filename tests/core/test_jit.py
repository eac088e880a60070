"""Options of the compiler: only known ones, and only at top level."""

import jax
import jax.numpy as jnp
import pytest

from tests.internals import compiler_options, jit_fast_compile
from tests.internals import jit as compilation


@pytest.mark.parametrize("work", ["heavy", "light"])
def test_options_that_this_version_does_not_know_are_left_out(monkeypatch, shipped_options, work):
    monkeypatch.setitem(compilation._OPTIONS, "xla_cpu_no_such_option", True)
    options = compiler_options("cpu", work)
    assert options["xla_backend_optimization_level"] == 1
    assert "xla_cpu_no_such_option" not in options
    assert jax.jit(jnp.sin).lower(0.5).compile(options)(0.5) == jnp.sin(0.5)


def test_other_platforms_keep_their_own():
    assert compiler_options("gpu", "light") is None


def power(x, n):
    return jnp.sum(x**n)


def test_a_fast_compiled_function_works_at_top_level_and_within_every_transformation():
    quick = jit_fast_compile(power, static_argnames="n")
    x = jnp.array([1.0, -2.0])
    assert quick(x, n=2) == quick(x, 2) == 5
    assert jax.jit(lambda x: quick(x, 2))(x) == 5
    assert jax.jit(lambda: quick(jnp.ones(3), 2))() == 3  # no argument is traced here
    assert jax.eval_shape(lambda: quick(x, 2)).shape == ()
    assert jax.vmap(lambda y: quick(y, 2))(x).tolist() == [1, 4]
    assert jax.grad(lambda x: quick(x, 2))(x).tolist() == [2, -4]
    assert jax.lax.map(lambda y: quick(y, 3), x).tolist() == [1, -8]
    assert jax.jacfwd(jax.jit(jax.grad(lambda x: quick(x, 2))))(x).tolist() == [[2, 0], [0, 2]]


def test_the_gradient_of_a_compiled_function_is_compiled_as_itself():
    square = jit_fast_compile(lambda x: x**2)
    assert float(jit_fast_compile(jax.grad(square))(3.0)) == 6.0
