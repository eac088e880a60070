"""Factorisations of the linear road on CPU: no call is large enough to wait for another."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml._core.factorisations import SAFE_WORK, in_small_batches


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
    text = jax.jit(program).lower(jax.random.key(0)).as_text()
    calls = [line for line in text.splitlines() if re.search("@(lapack|blas)", line)]
    assert calls
    for call in calls:
        shape = [int(n) for n in re.search(r": \(tensor<([\dx]+)xf32>", call).group(1).split("x")]
        work = math.prod(shape) if "trsm" in call else math.prod(shape) * shape[-1] / 3
        work *= 60 if "syevd" in call else 1
        assert math.prod(shape[:-2]) == 1 or work <= SAFE_WORK, call


@pytest.mark.parametrize("count", [1, 5, 16, 37])
def test_small_batches_are_the_whole(count):
    """Nested, with arrays that all share, and with batches that do not go into the count."""
    double = in_small_batches(lambda n, k: SAFE_WORK / 5)(lambda A, b: A @ b)
    A, b = np.arange(count * 12.0).reshape(count, 1, 4, 3), np.arange(6.0).reshape(2, 3)
    nested = jax.vmap(jax.vmap(double, (None, 0)), (0, None))
    np.testing.assert_allclose(nested(A[:, 0], b), np.einsum("xij,yj->xyi", A[:, 0], b))
