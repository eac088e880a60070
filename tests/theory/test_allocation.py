"""How to spend a budget: known optima, budgets kept, brute force over integers, clear errors."""

import dataclasses
from functools import partial

import numpy as np
import pytest

import negmaml as nm
from negmaml.theory import best_allocation
from tests.internals import allocation

PROBLEM = nm.MixedLinearRegression(p=30, m=1, n_t=1, n_v=1, n_r=10, sigma=0.2, nu=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "least", "most"), ((0.5, 16, 20), (0.3, 10, 11)))
def test_points_a_task_do_not_depend_on_the_budget_at_a_fixed_rate_and_even_split(
    rate, least, most, x64
):
    # Found independently for n_t = n_v at p = 30: 16 to 20 at alpha_t = 0.5, 10 at 0.3.
    options = dict(split=0.5, tune=False)
    for budget in (4000, 40_000):
        found = best_allocation(budget, PROBLEM, nm.GradientDescent(rate), **options)
        assert found.n_t == found.n_v
        assert least <= found.n_t + found.n_v <= most
        assert sum(found.real_sizes[1:]) == pytest.approx(found.n_t + found.n_v, abs=1.5)
        assert 0 <= budget - found.cost < found.n_t + found.n_v


@pytest.mark.filterwarnings("ignore:best_:negmaml.ConvergenceWarning")  # some fall to the end
@pytest.mark.parametrize("budget", (16,))
def test_no_integers_the_budget_pays_for_are_better(budget, x64):
    problem = dataclasses.replace(PROBLEM, p=6, omega0=0.2)
    costs = dict(task_cost=2.0, point_cost=1.0)
    found = best_allocation(budget, problem, **costs)
    assert found.cost <= budget
    losses = {}
    for m in range(1, budget // 4 + 1):
        points = int(budget / m - 2)
        for n_t in range(1, points, 2):
            sized = dataclasses.replace(problem, m=m, n_t=n_t, n_v=points - n_t)
            if sized.rows == sized.p:
                continue
            train, adapt = nm.theory.best_rates(sized)
            rules = nm.GradientDescent(float(train)), nm.GradientDescent(float(adapt))
            losses[m, n_t, points - n_t] = float(nm.theory.test_loss(sized, *rules))
    assert losses
    assert found.test_loss <= min(losses.values()) * 1.001


def test_only_the_search_that_wins_warns(monkeypatch, x64):
    """Both searches, without and with a ridge, end at the last of these small rates."""
    axis = np.array([-1e-3, 0.0, 1e-3])
    monkeypatch.setattr(allocation, "_rate_axis", lambda *_: axis)
    with pytest.warns(nm.ConvergenceWarning, match="at the end of its range") as warned:
        best_allocation(16, dataclasses.replace(PROBLEM, p=6, omega0=0.2), meta_ridge=None)
    assert len(warned) == 1


@pytest.mark.slow
def test_costs_of_tasks_favour_fewer_of_them(x64):
    problem = dataclasses.replace(PROBLEM, omega0=0.1)
    free, dear = (best_allocation(2000, problem, task_cost=cost) for cost in (0.0, 50.0))
    assert dear.m < free.m
    assert dear.cost <= 2000
    assert dear.test_loss > free.test_loss


@pytest.mark.slow
def test_a_ridge_that_may_be_chosen_does_no_harm(x64):
    problem = dataclasses.replace(PROBLEM, omega0=0.1)
    plain, ridged = (best_allocation(300, problem, meta_ridge=r) for r in (0.0, None))
    assert ridged.test_loss <= plain.test_loss
    assert ridged.meta_ridge >= 0


def test_the_ridge_of_given_sizes_is_the_best_one(x64):
    problem = dataclasses.replace(PROBLEM, m=6, n_t=8, n_v=4, sigma=0.5, nu=0.5, omega0=0.1)
    rule = nm.GradientDescent(0.3)
    search = allocation.Search(problem, rule, None, None, None, None, tune=False)
    sizes = partial(np.array, (6, 8, 4), float)
    (_, log_ridge), value = search.lowest([], sizes, 8, "auto")
    ridge = problem.rows * np.exp(log_ridge)
    assert ridge == pytest.approx(float(nm.theory.best_meta_ridge(problem, rule)), rel=2e-3)
    distance = nm.theory.weight_error(problem, rule, meta_ridge=ridge)
    assert value == pytest.approx(float(distance), rel=1e-9)


@pytest.mark.slow
def test_rules_that_are_given_are_kept():
    train, adapt = nm.Proximal(1.0), nm.GradientDescent(0.1, steps=2)
    found = best_allocation(100, PROBLEM, train, adapt, tune=False)
    assert (found.train, found.adapt) == (train, adapt)


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    (
        (1, {}, r"budget must pay for one task of one training and one validation point, 2, got 1"),
        (6, dict(task_cost=5.0), "budget must pay .* 7, got 6"),
        (-1, {}, "budget must be at least 0"),
        (float("nan"), {}, "budget must be finite"),
        (9, dict(point_cost=0), "point_cost must be above 0"),
        (9, dict(task_cost=-1), "task_cost must be at least 0"),
        (9, dict(split=1.0), "split must lie between 0 and 1"),
        (9, dict(meta_ridge=-1.0), "meta_ridge must be at least 0"),
        (9, dict(train=nm.GradientDescent(np.zeros(2))), "train must have one scalar parameter"),
    ),
)
def test_what_cannot_be_spent_is_refused_by_name(budget, options, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        best_allocation(budget, PROBLEM, **options)


@pytest.mark.slow
def test_covariances_are_allocated_by_the_theory_for_them(x64):
    identity = dataclasses.replace(PROBLEM, input_covariance=np.ones(30))
    rule, options = nm.GradientDescent(0.3), dict(split=0.5, tune=False)
    plain, given = (best_allocation(3000, p, rule, **options) for p in (PROBLEM, identity))
    assert (given.m, given.n_t, given.n_v) == (plain.m, plain.n_t, plain.n_v)
    assert given.test_loss == pytest.approx(plain.test_loss, rel=1e-3)


def test_a_parameter_at_the_end_of_its_range_warns(monkeypatch, x64):
    monkeypatch.setattr(allocation, "_rate_axis", lambda *_: np.array([-1e-3, 0.0, 1e-3]))
    with pytest.warns(nm.ConvergenceWarning, match="at the end of its range"):
        best_allocation(300, PROBLEM, split=0.5)
