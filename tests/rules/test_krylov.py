"""Krylov solvers against dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.internals import minres, truncated_cg

N = 20


def matrix(eigenvalues):
    """A symmetric matrix of these eigenvalues, and a vector."""
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))[0]
    A = (Q * eigenvalues) @ Q.T
    return jnp.asarray((A + A.T) / 2), jnp.asarray(rng.standard_normal(len(eigenvalues)))


def solved(A, b, dtype=float, max_steps=500):
    A, b = A.astype(dtype), b.astype(dtype)
    eps = float(jnp.finfo(dtype).eps)
    apply = lambda v: jnp.matmul(A, v, precision="highest")  # noqa: E731
    return jax.jit(
        lambda b: minres(apply, lambda v: jnp.matmul(A.T, v), b, eps**0.75, 4 * eps, max_steps)
    )(b)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.float64))
@pytest.mark.parametrize("low", (-2.0, 0.01))
def test_definite_and_indefinite_systems_are_solved(low, dtype, x64):
    A, b = matrix(np.linspace(low, 3.1, N))
    found = solved(A, b, dtype)
    assert bool(found.converged)
    np.testing.assert_allclose(
        found.x, np.linalg.solve(A, b), rtol=1e-3 if dtype == jnp.float32 else 1e-9, atol=1e-4
    )


def test_a_singular_or_asymmetric_system_and_too_few_steps_are_flagged(x64):
    A, b = matrix(np.append(np.linspace(-2.0, 3.1, N - 1), 0.0))
    assert not bool(solved(A, b).converged)
    assert bool(solved(A, A @ b).converged)  # in its range
    full, b = matrix(np.linspace(0.01, 3.1, N))
    assert not bool(solved(full, b, max_steps=3).converged)
    assert not bool(solved(full.at[0, 1].add(0.5), b).converged)


def test_a_step_within_the_trust_region_is_newtons(x64):
    A, g = matrix(np.linspace(0.1, 3.0, N))
    step = truncated_cg(lambda v: A @ v, g, 1e6, 1e-12, 100)
    p = -np.linalg.solve(A, g)
    np.testing.assert_allclose(step.step, p, rtol=1e-9, atol=1e-10)
    assert float(step.reduction) == pytest.approx(-float(g @ p + p @ A @ p / 2), rel=1e-10)
    assert not bool(step.outside) and float(step.residual) < 1e-10


@pytest.mark.parametrize("low", (-1.0, 0.1))
def test_a_step_beyond_it_ends_at_its_boundary_and_descends(low, x64):
    A, g = matrix(np.linspace(low, 3.0, N))
    step = truncated_cg(lambda v: A @ v, g, 0.3, 1e-12, 100)
    assert bool(step.outside) and float(jnp.linalg.norm(step.step)) == pytest.approx(0.3)
    fall = -float(g @ step.step + step.step @ A @ step.step / 2)
    assert float(step.reduction) == pytest.approx(fall, rel=1e-10)
    steepest = g @ g / jnp.abs(g @ A @ g)  # the best along -g, which it is at least as good as
    length = jnp.minimum(steepest, 0.3 / jnp.linalg.norm(g))
    assert fall >= float(length * g @ g - length**2 * (g @ A @ g) / 2) * (1 - 1e-12)
