"""Small positive definite systems: both ways to solve them against NumPy."""

import jax
import numpy as np
import pytest

from tests.internals import CPU, GPU, cholesky_solve, panel_width, quadratic_form

# Written out at once, by panels (the last one full or not), and by the library.
CASES = [(1, 1), (2, 2), (8, 8), (2, 0), (20, 0), (5, 4), (16, 4), (19, 6), (7, 1)]
solve = jax.jit(cholesky_solve, static_argnums=2)


@pytest.mark.parametrize(
    ("sizes", "few", "widths"),
    [(CPU, False, (1, 8, 0, 0, 0, 0)), (CPU, True, (0, 0, 0, 0, 0, 0)),
     (GPU, False, (1, 8, 12, 5, 6, 0)), (GPU, True, (1, 8, 0, 0, 0, 0))],
)  # fmt: skip
def test_width_of_panels(sizes, few, widths):
    found = [panel_width(k, sizes, few) for k in (1, 8, 12, 20, 32, 33)]
    assert found == list(widths)


def systems(k, batch=7, seed=0):
    generator = np.random.default_rng(seed)
    A = generator.normal(size=(batch, k, k + 3))
    return A @ A.swapaxes(-1, -2), generator.normal(size=(batch, k))


@pytest.mark.parametrize(("k", "panel"), CASES)
def test_solutions_and_pivots_are_those_of_numpy(x64, k, panel):
    G, b = systems(k)
    z, pivots = solve(G, b, panel)
    np.testing.assert_allclose(z, np.linalg.solve(G, b[..., None])[..., 0], rtol=1e-8, atol=1e-11)
    diagonal = np.diagonal(np.linalg.cholesky(G), axis1=-2, axis2=-1)
    np.testing.assert_allclose(pivots, diagonal**2, rtol=1e-9)


@pytest.mark.parametrize(("k", "panel"), [(1, 1), (5, 5), (5, 0), (12, 6)])
def test_the_quadratic_form_is_its_definition(x64, k, panel):
    G, z = systems(k, seed=1)
    expected = np.einsum("rk,rkl,rl->r", z, G, z)
    np.testing.assert_allclose(
        jax.jit(quadratic_form, static_argnums=2)(G, z, panel), expected, rtol=1e-12
    )


@pytest.mark.parametrize(("k", "panel"), [(5, 5), (20, 0), (20, 5)])
def test_single_precision_loses_condition_times_epsilon(k, panel):
    G, b = systems(k, seed=2)
    exact = np.linalg.solve(G, b[..., None])[..., 0]
    z, _ = solve(G.astype(np.float32), b.astype(np.float32), panel)
    error = np.linalg.norm(z - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert np.all(error < 10 * np.linalg.cond(G) * np.finfo(np.float32).eps)


@pytest.mark.parametrize(("k", "panel"), [(3, 3), (12, 0), (12, 5)])
def test_a_matrix_that_is_not_positive_spoils_no_other(x64, k, panel):
    G, b = systems(k)
    spoiled = G.copy()
    spoiled[2] -= 2 * np.trace(G[2]) / k * np.eye(k)
    (z, pivots), (clean, _) = (solve(x, b, panel) for x in (spoiled, G))
    assert not np.asarray(pivots[2] > 0).all()
    kept = np.arange(len(b)) != 2
    np.testing.assert_allclose(z[kept], clean[kept], rtol=1e-14)


@pytest.mark.parametrize(("k", "panel"), [(3, 3), (12, 0), (12, 5)])
def test_derivatives_are_those_of_the_solution(x64, k, panel):
    G, b = systems(k)
    dG = systems(k, seed=3)[0]
    _, dz = jax.jvp(lambda G: solve(G, b, panel)[0], (G,), (dG,))
    z = np.linalg.solve(G, b[..., None])
    expected = -np.linalg.solve(G, dG @ z)[..., 0]
    np.testing.assert_allclose(dz, expected, rtol=1e-7, atol=1e-9)
