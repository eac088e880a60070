"""The warning of solvers that did not converge: once a call, from wherever it is issued."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import negmaml as nm
from tests.internals import warn_unless


def flagged(x):
    """Twice x, with a warning where x is below zero; of its derivative none."""
    warn_unless(jax.lax.stop_gradient(x) >= 0, "not solved")
    return 2 * x


def count(function, *arguments):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        jax.block_until_ready(function(*arguments))
        jax.effects_barrier()
    assert all(issubclass(w.category, nm.ConvergenceWarning) for w in seen)
    return len(seen)


GOOD, BAD = jnp.arange(3.0), jnp.arange(3.0) - 1


@pytest.mark.parametrize(
    ("form", "calls"),
    {
        "plain": (lambda x: flagged(x[0]), 1),
        "jit": (jax.jit(lambda x: flagged(x[0])), 1),
        "vmap": (jax.vmap(flagged), 1),
        "jit of vmap": (jax.jit(jax.vmap(flagged)), 1),
        "vmaps": (jax.jit(lambda x: jax.vmap(jax.vmap(flagged))(jnp.stack([x, x]))), 1),
        "gradient": (jax.jit(jax.grad(lambda x: jnp.sum(jax.vmap(flagged)(x)))), 1),
        "vmap of gradient": (jax.jit(jax.vmap(jax.grad(flagged))), 1),
        "forward": (jax.jit(lambda x: jax.jvp(jax.vmap(flagged), (x,), (x,))), 1),
        "scan": (jax.jit(partial(jax.lax.map, flagged)), 1),  # one of three is bad
        "checkpoint": (jax.jit(jax.checkpoint(jax.vmap(flagged))), 1),
    }.values(),
)
def test_it_is_issued_once_where_anything_failed_and_never_otherwise(form, calls):
    assert count(form, BAD) == calls
    assert count(form, GOOD) == 0


def test_a_rule_without_solver_costs_nothing():
    jaxpr = jax.make_jaxpr(lambda x: (warn_unless(True, "no"), x)[1])(1.0)
    assert not jaxpr.eqns and not jaxpr.effects


def test_filters_of_python_make_it_an_error_or_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error", nm.ConvergenceWarning)
        with pytest.raises(nm.ConvergenceWarning, match="not solved"):
            flagged(BAD[0])
        with pytest.raises(jax.errors.JaxRuntimeError, match="not solved"):
            jax.block_until_ready(jax.jit(jax.vmap(flagged))(BAD))
            jax.effects_barrier()
        warnings.simplefilter("ignore", nm.ConvergenceWarning)
        jax.block_until_ready(jax.jit(jax.vmap(flagged))(BAD))
        jax.effects_barrier()
