"""The quadratic forms, the solver and the splits, compared with plain code."""

import jax
import numpy as np
import pytest

import negmaml as nm
from negmaml.linear import Data, meta_system, minimiser
from tests.advice.conftest import grouped_rows
from tests.internals import (
    MAX_VECTORIZED,
    bootstrap,
    cross_validation,
    cv_losses,
    group_rows,
    max_training_groups,
    per_group_ridge,
    quadratic_forms,
    ridge_path,
    statistics,
)
from tests.internals import splits as splits_module

RATES = np.array([-1.5, -0.2, 0.0, 0.4, 2.0])


@pytest.mark.parametrize("p", [1, 3, MAX_VECTORIZED, MAX_VECTORIZED + 3])
@pytest.mark.parametrize("free", [0, 1])
def test_ridge_path_solves_every_system(p, free):
    random = np.random.default_rng(p)
    if p == free:
        return
    a = random.normal(size=(7, 2 * p, p))
    G, b = np.swapaxes(a, 1, 2) @ a, random.normal(size=(7, p, 2))
    ridges = np.array([0.0, 0.3, 5.0])
    out = ridge_path(G, b, ridges, free)
    shrunk = np.eye(p) * (np.arange(p) >= free)
    for i, ridge in enumerate(ridges):
        expected = np.linalg.solve(G + ridge * shrunk, b)
        np.testing.assert_allclose(out[:, i], expected, atol=1e-7 * abs(expected).max())


@pytest.mark.parametrize("p", [6, MAX_VECTORIZED + 4])
def test_a_singular_system_gets_its_solution_of_least_norm(p):
    random = np.random.default_rng(0)
    a = random.normal(size=(3, 4, p))
    b = np.swapaxes(a, 1, 2) @ random.normal(size=(3, 4, 1))
    out = ridge_path(np.swapaxes(a, 1, 2) @ a, b, [0.0], 0)[:, 0]
    expected = np.linalg.pinv(np.swapaxes(a, 1, 2) @ a, rcond=1e-8, hermitian=True) @ b
    np.testing.assert_allclose(out, expected, atol=1e-4 * abs(expected).max())


def one_split(x64, monkeypatch, intercept=False):
    """A split of one draw, and the same rows as tasks of the linear model."""
    monkeypatch.setattr(statistics, "MAX_DRAWS", 1)
    x, y, groups = grouped_rows(groups=12, rows=11, p=3)
    data = group_rows(x, y, groups, intercept=intercept)
    seen = []
    original = statistics._random_rows

    def remember(*arguments):
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(statistics, "_random_rows", remember)
    forms = quadratic_forms(data, 4, 3, 5, np.random.default_rng(1))
    splits = cross_validation(12, 6, 1, 4, np.random.default_rng(2))
    return data, forms, splits, seen[0]


def test_losses_are_those_of_the_linear_model_solved_and_tested_row_by_row(x64, monkeypatch):
    data, forms, splits, order = one_split(x64, monkeypatch)
    ridges = np.array([0.0, 2.0])
    found = cv_losses(forms, splits, RATES, ridges, 0)
    x, y = data.x[order], data.y[order][..., 0]

    @jax.jit
    def solve(tasks, rate, ridge):
        return minimiser(*meta_system(tasks, nm.GradientDescent(rate)), meta_ridge=ridge).omega

    for s in range(2):
        train = np.flatnonzero(splits.train[s].toarray().ravel())
        assert len(train) == 6
        tasks = Data(x[train, :4], y[train, :4], x[train, 4:7], y[train, 4:7])
        for i, rate in enumerate(RATES):
            for j, ridge in enumerate(ridges):
                omega = np.asarray(solve(tasks, rate, ridge))
                for adapt in (-0.3, 0.0, 0.5):
                    c0, c1, c2 = found.meta[s, 1, :, i, j]
                    expected = np.mean([
                        held_out_loss(data, order, g, omega, adapt)
                        for g in np.flatnonzero(splits.weights[s, 1])
                    ])  # fmt: skip
                    value = (c0 - 2 * adapt * c1 + adapt**2 * c2) / 2
                    assert value == pytest.approx(expected, rel=1e-6)


def held_out_loss(data, order, group, omega, adapt):
    """Half the mean squared error of all rows of a group but the first 5 of the order."""
    few = order[group, :5]
    rows = np.arange(data.starts[group], data.starts[group] + data.counts[group])
    rest = np.setdiff1d(rows, few)
    theta = omega - adapt / 5 * data.x[few].T @ (data.x[few] @ omega - data.y[few, 0])
    return np.mean((data.y[rest, 0] - data.x[rest] @ theta) ** 2) / 2


def test_per_group_ridge_is_a_ridge_regression_with_free_intercept(x64, monkeypatch):
    from sklearn.linear_model import Ridge

    data, forms, _, order = one_split(x64, monkeypatch, intercept=True)
    found = per_group_ridge(forms, np.array([0.7]), 1)
    for g in range(3):
        few = order[g, :5]
        rest = np.setdiff1d(np.arange(data.starts[g], data.starts[g] + data.counts[g]), few)
        model = Ridge(alpha=0.7).fit(data.x[few, 1:], data.y[few, 0])
        error = data.y[rest, 0] - model.predict(data.x[rest, 1:])
        assert found[g, 0] == pytest.approx(np.mean(error**2) / 2, rel=1e-6)


def test_groups_that_report_neither_train_nor_choose():
    splits = cross_validation(23, 11, 3, 20, np.random.default_rng(0))
    trained = splits.train.toarray().reshape(20, 23, 3).sum(-1)
    assert np.all(trained.sum(1) == 11)
    assert trained.max() == 1
    for fold in range(5):
        mine = splits.fold == fold
        reports = splits.weights[mine, 1] > 0
        assert np.all(reports == reports[0])
        assert not np.any(trained[mine] * reports)
        assert not np.any((splits.weights[mine, 0] > 0) & reports)
    everyone = splits.weights[:5, 1] > 0
    assert np.all(everyone.sum(0) == 1)
    np.testing.assert_allclose(splits.weights.sum(-1), 1)


@pytest.mark.parametrize("groups", [4, 5, 9, 40])
def test_every_size_that_is_allowed_leaves_a_group_to_choose(groups):
    most = max_training_groups(groups)
    assert most >= 1
    splits = cross_validation(groups, most, 1, 10, np.random.default_rng(0))
    assert np.all(np.isfinite(splits.weights))


def test_bootstrap_never_tests_on_training_groups_and_weighs_all_alike():
    groups, m = 20, 8
    splits = bootstrap(groups, m, 2, 400, 5, np.random.default_rng(0))
    trained = splits.train.toarray().reshape(-1, groups, 2).sum(-1)
    assert np.all(trained.sum(1) == m)
    assert not np.any((trained > 0) & (splits.weights[:, 0] > 0))
    mean = splits.weights[:, 0].mean(0) * groups
    assert abs(mean - 1).max() < 0.15


def test_a_group_weighs_in_a_bootstrap_as_often_as_it_was_drawn(monkeypatch):
    """A group drawn often trains often, and is held out seldom: its weight makes up for that."""
    times = np.array([3] * 4 + [2] * 8 + [1] * 12 + [0] * 16)
    monkeypatch.setattr(splits_module, "_multiplicities", lambda groups, random: times)
    splits = bootstrap(40, 6, 2, 600, 5, np.random.default_rng(0))
    share = splits.weights[:, 0].mean(0) * 40
    for drawn in (0, 1, 2, 3):
        assert share[times == drawn].mean() == pytest.approx(drawn, rel=0.02)


def test_forms_serve_several_targets(rows):
    x, y, groups = rows
    both = np.c_[y, 3 - 2 * y]
    key = jax.random.key(0)
    one = nm.advise(x, y, groups, n_t=5, n_v=5, n_r=5, key=key, splits=10)
    two = nm.advise(x, both, groups, n_t=5, n_v=5, n_r=5, key=key, splits=10)
    np.testing.assert_allclose(two.curves.loss[:, 0], one.curves.loss[:, 0] * 2.5, rtol=1e-6)
