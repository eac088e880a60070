"""Factorizations on CPU: no call is large enough to wait for another."""

import jax
import jax.numpy as jnp
import pytest

import negmaml as nm
from tests.helpers import assert_no_call_waits


def simulated(sizes, rule):
    problem = nm.MixedLinearRegression(n_t=6, n_r=5, sigma=1.0, nu=0.5, **sizes)
    return lambda key: nm.simulate(key, problem, rule, nm.GradientDescent(0.2), runs=40)


def minimised(key):
    Phi = jax.random.normal(key, (3, 40, 30, 20))
    return jax.vmap(nm.linear.minimiser)(Phi, Phi[..., 0])


RATES = jnp.linspace(-0.5, 0.5, 5)
PROGRAMS = {
    "minimiser": minimised,
    "one step": simulated(dict(p=60, m=5, n_v=6), nm.GradientDescent(RATES)),
    "steps": simulated(dict(p=30, m=5, n_v=5), nm.GradientDescent(RATES, 3)),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_no_call_of_many_matrices_is_large(program):
    """Large ones share their work out, and can wait for ever for each other's parts."""
    assert_no_call_waits(program, jax.random.key(0))
