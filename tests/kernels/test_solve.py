"""Systems by a tridiagonal matrix, and by eigenvalues where that would be wrong."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml.kernels import leave_one_task_out, meta_train
from tests.helpers import assert_no_call_waits, mostly_slow
from tests.internals import kernels_solve as module

decompose, solve = jax.jit(module.decompose), jax.jit(module.solve)
RIDGES = jnp.array([1e-3, 1.0])


def gram(n, rank, key=0):
    x = jax.random.normal(jax.random.key(key), (n, rank))
    return x @ x.T


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("rank", "ridges", "clear"),
    [
        pytest.param(60, RIDGES, True, marks=pytest.mark.slow),
        (9, RIDGES, True),
        (9, jnp.array([0.0, 1.0]), False),
    ],
)
def test_both_decompositions_solve(rank, ridges, clear):
    G, right = gram(30, rank), jax.random.normal(jax.random.key(1), (30, 2))
    found = decompose(G, ridges)
    T = (
        jnp.diag(found.diagonal)
        + jnp.diag(found.off_diagonal, 1)
        + jnp.diag(found.off_diagonal, -1)
    )
    np.testing.assert_allclose(found.V @ T @ found.V.T, G, atol=1e-12)
    assert found.nonsingular == clear
    assert clear or not found.off_diagonal.any()  # eigenvalues
    solution, well_conditioned = solve(G, right, ridges)
    expected = [jnp.linalg.pinv(G + ridge * jnp.eye(30), rtol=1e-12) @ right for ridge in ridges]
    np.testing.assert_allclose(solution, jnp.stack(expected), rtol=1e-8)
    assert well_conditioned.all()


@pytest.mark.parametrize(("times", "clear"), [(0.5, False), (2.0, True)])
def test_the_smallest_eigenvalue_decides(times, clear):
    n, cut = 20, 20 * np.finfo("f").eps * 2
    x = np.linspace(1, 2, n)
    x[3] = times * cut
    V = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))[0]
    G = jnp.asarray((V * x) @ V.T, jnp.float32)
    assert decompose(G, jnp.zeros(2)).nonsingular == clear
    assert decompose(G, jnp.full(2, 2 * cut)).nonsingular


@pytest.mark.parametrize(("times", "clear"), [(0.87, False), (1.15, True)])
def test_small_eigenvalues_are_compared_with_the_largest_row_sum(times, clear):
    n, eps = 20, np.finfo("f").eps
    middle = 2 * np.cos(np.pi / (n + 1))  # with 1 beside it, of smallest eigenvalue 0
    smallest = times * n * eps * (middle + 2)
    diagonal, beside = jnp.full(n, middle + smallest, "f"), jnp.ones(n - 1, "f")
    for positive in (module._positive_by_recurrence, module._positive_by_reduction):
        assert module._is_nonsingular(positive, diagonal, beside, jnp.zeros(1, "f")) == clear


@pytest.mark.parametrize("n", mostly_slow([1, 2, 7, 8], 0, 2))
def test_pivots_in_both_orders_have_the_sign_of_the_smallest_eigenvalue(n):
    entries, beside = jax.random.normal(jax.random.key(n), (2, n))
    T = jnp.diag(entries) + jnp.diag(beside[1:], 1) + jnp.diag(beside[1:], -1)
    smallest = jnp.linalg.eigvalsh(T)[0]
    a = jnp.append(beside[1:], 0)
    for shift, positive in ((0.01, True), (-0.01, False)):
        d = jnp.stack([entries + 9, entries - smallest + shift])
        assert module._positive_by_recurrence(d, a) == positive
        assert module._positive_by_reduction(d, a) == positive


@pytest.mark.parametrize(
    ("smallest", "kept", "well_conditioned"),
    [(1e-3, 10, True), (2e-7, 10, True), (1e-15, 9, True)],
)
def test_a_rank_is_clear_where_no_eigenvalue_is_kept_near_the_cut(
    smallest, kept, well_conditioned, x64
):
    x = jnp.asarray(np.append(smallest, np.linspace(1, 2, 9)))
    found = module.invert(x, 0.0)
    assert (int(found.kept.sum()), bool(found.well_conditioned)) == (kept, well_conditioned)
    inverse = np.where(found.kept, 1 / np.where(found.kept, x, 1), 0)
    np.testing.assert_allclose(found.inverse, inverse)
    np.testing.assert_allclose(module.invert(x[1:], 0.5).inverse, 1 / (x[1:] + 0.5))


@pytest.mark.parametrize(("second", "well_conditioned"), [(1e-7, True), (1e-9, False)])
def test_a_rank_is_clear_above_half_the_digits(second, well_conditioned, x64):
    x = jnp.asarray(np.append([0.0, second], np.linspace(0.5, 1, 8)))
    assert (
        module.invert(x, 0.0).well_conditioned == well_conditioned
    )  # the root of epsilon is 1.5e-8


@pytest.mark.parametrize("n", [1, 3])
def test_small_systems(n):
    G = gram(n, 5)
    solution, _ = solve(G, jnp.ones((n, 1)), RIDGES)
    expected = jnp.linalg.solve(G + jnp.eye(n), jnp.ones((n, 1)))
    np.testing.assert_allclose(solution[1], expected, rtol=1e-5)


def test_platforms_without_the_routine_have_eigenvalues():
    lowered = solve.trace(gram(5, 9), jnp.ones((5, 1)), RIDGES)
    text = lowered.lower(lowering_platforms=("tpu",)).as_text().lower()
    assert "sytrd" not in text


def test_an_accelerator_reduces_the_matrices_of_several_rates_in_one_call():
    tasks = nm.tasks.Quadratic(p=3, m=4, n_t=5, n_v=2, sigma=0.3, nu=1.0)(jax.random.key(0))
    rates = nm.GradientDescent(jnp.linspace(-0.5, 0.5, 6))
    train = jax.jit(lambda tasks: meta_train(lambda a, b: a @ b.T, tasks, rates, meta_ridge=0.1))
    text = train.trace(tasks).lower(lowering_platforms=("cuda",)).as_text()
    assert re.search(r"sytrd.*tensor<6x8x8xf32>", text)
    # One branch for all of them: `vmap` would have made a selection of both.
    assert not jax.vmap(module._agreed, out_axes=None)(jnp.array([True, False]))


@pytest.mark.parametrize("batch", [(), (30,)], ids=["one", "in a vmap"])
def test_no_batch_of_factorisations_waits_for_another(batch):
    tasks = nm.tasks.Quadratic(p=3, m=4, n_t=25, n_v=12, sigma=0.3, nu=1.0)(jax.random.key(0))
    tasks = jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, *x.shape)), tasks)
    rule = nm.Proximal(jnp.array([0.5, 1.0]))

    def both(tasks):
        options = dict(meta_ridge=RIDGES)
        model = meta_train(lambda a, b: a @ b.T, tasks, rule, **options)
        left = leave_one_task_out(lambda a, b: a @ b.T, tasks, rule, **options)
        return model.loss(tasks, rule), left.losses(rule)

    assert_no_call_waits(jax.vmap(both) if batch else both, tasks)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_single_precision_stays_while_double_is_enabled():
    """An identity of the default dtype would promote one side of the system only."""
    tasks = nm.tasks.Quadratic(3, 3, 3, 2, 0.3, 1.0)(jax.random.key(0))
    tasks = jax.tree.map(lambda x: np.asarray(x, np.float32), tasks)

    def total(rate):
        rule = nm.GradientDescent(rate)
        left = leave_one_task_out(lambda a, b: rate * a @ b.T, tasks, rule, meta_ridge=0.1)
        return left.losses(nm.GradientDescent(np.float32(0.1))).sum()

    value, slope = jax.value_and_grad(total)(jnp.float32(0.3))
    assert value.dtype == slope.dtype == jnp.float32 and np.isfinite(slope)
