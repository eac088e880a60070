r"""How to spend a budget of labelled points on tasks, training points and validation points.

The theory is smooth in m, n_t and n_v, so they are real numbers in the search. It evaluates a grid
over points per task, their split, the rate (in units of the spectrum at that n_t) and the ridge,
and refines it about the lowest cell, as `negmaml.theory.search` does in one dimension. Then the
integers around the optimum that the budget pays for are compared, each at its own best rate and
ridge.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import cast
from negmaml._core.checks import check_flag, check_nonnegative, check_optional, check_scalar
from negmaml._core.convergence import warn_unless
from negmaml._core.display import add_fields_repr
from negmaml._core.jit import jit_fast_compile
from negmaml._core.settings import own_settings
from negmaml.problem.model import MixedLinearRegression, check_problem
from negmaml.rules import GradientDescent, InnerRule, check_scalar_rule
from negmaml.theory.api import test_loss
from negmaml.theory.model import theory_model
from negmaml.theory.optima import best_adapt_rate

CELLS = 512  # evaluated by one call of the program
SIZE_POINTS, SPLIT_POINTS, RIDGE_POINTS = 17, 11, 7  # of the first grid
RATE_POINTS = 10  # of each sign
FINE, ROUNDS = 5, 12  # points of an axis afterwards; each round halves the intervals
RIDGES = 1e-4, 1e4  # in units of n_v m


@add_fields_repr
class Allocation(NamedTuple):
    """The best way to spend a budget.

    Attributes:
        m, n_t, n_v: the best integers.
        train, adapt: the rules, at their best where they are tuned.
        meta_ridge: the ridge.
        test_loss: the prediction with all of these.
        cost: the cost of the sizes.
        real_sizes: (m, n_t, n_v) of the optimum over real numbers.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=30, m=1, n_t=1, n_v=1, n_r=10, sigma=0.2, nu=0.2)
    >>> train = nm.GradientDescent(0.3)
    >>> best = nm.theory.best_allocation(3000, problem, train, split=0.5, tune=False)
    >>> best.m, best.n_t, best.n_v, best.cost
    (300, 5, 5, 3000.0)
    """

    m: int
    n_t: int
    n_v: int
    train: InnerRule
    adapt: InnerRule
    meta_ridge: float
    test_loss: float
    cost: float
    real_sizes: tuple[float, float, float]


@own_settings
def best_allocation(
    budget: float,
    problem: MixedLinearRegression,
    train: InnerRule | None = None,
    adapt: InnerRule | None = None,
    *,
    meta_ridge: float | None = 0.0,
    task_cost: float = 0.0,
    point_cost: float = 1.0,
    split: float | None = None,
    tune: bool = True,
) -> Allocation:
    r"""Return the m, n_t, n_v with the lowest predicted test loss that `budget` pays for.

        m (task_cost + point_cost (n_t + n_v)) <= budget

    Arguments:
        budget: an amount; with the default costs, the number of labelled points.
        problem: the distribution of tasks; its m, n_t and n_v are ignored.
        train: a rule of the family wanted in training, one gradient step when omitted.
        adapt: the rule at test time, as it is; one gradient step at its best rate when omitted.
        meta_ridge: a number, or None for the best.
        task_cost, point_cost: of each task, at least 0, and of each of its points, above 0.
        split: n_t / (n_t + n_v), between 0 and 1; the best when omitted. Rounding keeps it as
            closely as integers can.
        tune: whether the parameter of `train` is searched, over both signs, or taken as it is.

    Returns an `Allocation`. Raises ValueError for a budget that does not pay for one task of one
    training and one validation point, costs out of range, and a split outside (0, 1). Issues a
    `ConvergenceWarning` where no loss is finite, and where the training parameter is at the end of
    the range that is searched. It runs on the host: the result has no derivatives. Source: negmaml.

    >>> problem = MixedLinearRegression(p=30, m=1, n_t=1, n_v=1, n_r=10, sigma=0.2, nu=0.2)
    >>> best = best_allocation(3000, problem, GradientDescent(0.3), split=0.5, tune=False)
    >>> best.n_t == best.n_v and best.cost <= 3000
    True
    """
    check_problem(problem)
    train = check_scalar_rule("train", GradientDescent(0.0) if train is None else train)
    adapt = check_optional(check_scalar_rule, "adapt", adapt)
    tune = check_flag("tune", tune)
    _check(budget, task_cost, point_cost, split, meta_ridge)
    amount = Budget(float(budget), float(task_cost), float(point_cost))
    # Zero ridge is a search of its own: it is no point of the logarithmic grid of ridges.
    options = [meta_ridge] if meta_ridge is not None else [0.0, None]
    searches = [Search(problem, train, adapt, amount, split, ridge, tune) for ridge in options]
    # One weight error, or one loss, orders them all.
    lowest = [search.lowest_integers() for search in searches]
    winner = min(range(len(searches)), key=lambda i: lowest[i].value)
    best = _allocation(searches[winner], lowest[winner])
    warn_unless(math.isfinite(best.test_loss), "best_allocation found no finite test loss")
    return best


class Budget(NamedTuple):
    """A budget and the costs of a task and of a point."""

    amount: float
    task_cost: float
    point_cost: float

    def tasks(self, points):
        """Return the m that the budget pays for with n_t + n_v = points."""
        return self.amount / (self.task_cost + self.point_cost * points)

    def points(self, m):
        """Return the n_t + n_v that the budget pays for with m tasks."""
        return (self.amount / m - self.task_cost) / self.point_cost

    def cost(self, m, n_t, n_v):
        """Return the cost of these sizes."""
        return m * (self.task_cost + self.point_cost * (n_t + n_v))

    def integers(self, m, n_t, n_v, split, small_n_t: int | None) -> set[tuple[int, int, int]]:
        """Return sizes near real ones that the budget pays for, as close to the split as possible.

        small_n_t: the n_t of a region where it is fixed, or None.
        """
        found = set()
        # The rounded sizes that cost about the same: m, and with it the points that each task can
        # have.
        share = n_t / (n_t + n_v)
        counts = {max(1, math.floor(m) - 1), max(1, math.floor(m)), math.ceil(m)}
        for total in {max(2, math.floor(n_t + n_v)), max(2, math.ceil(n_t + n_v))}:
            counts.add(max(1, math.floor(self.tasks(total) + 1e-9)))
        for count in counts:
            most = math.floor(self.points(count) + 1e-9)
            if small_n_t is not None:
                firsts = [(small_n_t, most - small_n_t)]
            elif split is None:
                middle = round(most * share)
                firsts = [(k, most - k) for k in range(middle - 1, middle + 2)]
            else:  # of the two largest totals the one that keeps the split better
                halves = [(min(max(round(k * share), 1), k - 1), k) for k in (most, most - 1)]
                k, total = min(halves, key=lambda half: abs(half[0] / max(half[1], 1) - share))
                firsts = [(k, total - k)]
            found |= {(count, a, b) for a, b in firsts if a >= 1 and b >= 1}
        return found


class Candidate(NamedTuple):
    """Integer sizes (m, n_t, n_v) with their best rate and ridge, in the units of the search.

    value: the minimised function there. real: the real sizes that were rounded.
    """

    value: float
    sizes: tuple[int, int, int]
    unit: float
    log_ridge: float
    real: tuple[float, float, float]


class Search(NamedTuple):
    """The arguments of `best_allocation`; meta_ridge is None if it is searched."""

    problem: MixedLinearRegression
    train: InnerRule
    adapt: InnerRule | None
    budget: Budget
    split: float | None
    meta_ridge: float | None
    tune: bool

    def regions(self) -> Iterator[tuple[int | None, list[np.ndarray], Callable]]:
        """Yield (n_t if it is fixed, axes, sizes at their coordinates) of regions of real sizes.

        For isotropic inputs the spectrum at the smallest n_t is exact and known for integers only,
        so each of these n_t is a region.
        """
        budget, split = self.budget, self.split
        most = budget.points(1)
        # Below, the sizes of an exact spectrum are regions of their own, with fixed n_t.
        least = self.num_exact_sizes + 2.0 if split is None else max(1 / split, 1 / (1 - split))

        def by_split(points, odds):
            points, share = np.exp(points), 1 / (1 + np.exp(-odds))
            return budget.tasks(points), points * share, points * (1 - share)

        if split is not None:
            sizes = _logarithms(min(least, most), most, SIZE_POINTS)
            yield None, [sizes, np.log([split / (1 - split)])], by_split
            return
        if most >= least:
            # The split is searched in log odds, which treats n_t and n_v alike.
            widest = np.log(most - 1)
            odds = np.linspace(-widest, widest, SPLIT_POINTS)
            yield None, [_logarithms(least, most, SIZE_POINTS), odds], by_split
        for n_t in range(1, self.num_exact_sizes + 1):
            if most >= n_t + 1:
                axis = _logarithms(1, most - n_t, SIZE_POINTS)
                yield n_t, [axis], partial(self._at_fixed_n_t, n_t)

    @property
    def num_exact_sizes(self) -> int:
        """The largest n_t whose spectrum is known for integers only."""
        return theory_model(self.problem).num_exact_sizes

    def _at_fixed_n_t(self, n_t, n_v):
        n_v = np.exp(n_v)
        return self.budget.tasks(n_t + n_v), np.full_like(n_v, n_t), n_v

    def lowest(self, axes, sizes: Callable, small_n_t: int | None, measure: str):
        """Return (coordinates, value) of the lowest cell over axes, the rate and the ridge."""
        # With real n_t the spectrum follows the cell, so that the n_t given here has no effect.
        losses = self._losses(1 if small_n_t is None else small_n_t, measure)
        least_n_t = self.num_exact_sizes + 1 if small_n_t is None and self.split is None else 1
        # Directions without inputs do not count: the threshold is at n_v m = rank Sigma.
        rank = int(np.sum(np.asarray(self.problem.modes.s) > 0))

        def evaluate(columns):
            log_ridge = columns[-1]
            m, n_t, n_v, unit, _ = np.broadcast_arrays(*sizes(*columns[:-2]), *columns[-2:])
            given = self.meta_ridge is not None
            ridge = np.full_like(unit, self.meta_ridge) if given else m * n_v * np.exp(log_ridge)
            allowed = (m > 1 - 1e-9) & (n_t > least_n_t - 1e-9) & (n_v > 1 - 1e-9)
            # Without ridge the mean is infinite at the threshold.
            allowed &= (m * n_v != rank) | (ridge > 0)
            # Cells that are not allowed are evaluated at sizes of at least one and discarded.
            rounded = (np.maximum(size, 1) for size in (m, n_t, n_v))
            cells = np.stack([*rounded, unit, ridge], -1)
            # Every call has the same shape, so that one compiled program serves all rounds and
            # regions.
            padded = np.resize(cells, (-(-len(cells) // CELLS) * CELLS, 5))
            found = [np.asarray(losses(chunk)) for chunk in padded.reshape(-1, CELLS, 5)]
            return np.where(allowed, np.concatenate(found)[: len(cells)], np.inf)

        rest = _rate_axis(self.train, self.tune), _ridge_axis(self.meta_ridge)
        return refine_grid(evaluate, [*axes, *rest])

    def lowest_integers(self) -> Candidate:
        """Return the integers with the lowest value that the budget pays for."""
        real: dict[tuple[int, int, int], tuple[float, float, float]] = {}
        for small_n_t, axes, sizes in self.regions():
            # Real n_t need the law of large sizes; at the smallest integers the exact spectrum is
            # better.
            measure = "marchenko-pastur" if small_n_t is None else "exact"
            where, _ = self.lowest(axes, sizes, small_n_t, measure)
            m, n_t, n_v = (float(size) for size in sizes(*where[:-2]))
            for integers in self.budget.integers(m, n_t, n_v, self.split, small_n_t):
                real[integers] = m, n_t, n_v
        found = []
        # Each is compared at its own best rate and ridge, by the spectrum of its integers.
        for integers in sorted(real):
            where, value = self.lowest([], partial(np.array, integers, float), integers[1], "auto")
            found.append(Candidate(value, integers, where[0], where[1], real[integers]))
        return min(found)

    def _losses(self, n_t: int, measure: str) -> Callable:
        """Return the function to minimise, of cells (m, n_t, n_v, rate in its unit, ridge)."""
        s = self.problem.modes.s
        model = theory_model(self.problem).at_spectrum(n_t, measure)
        objective, train = model.train_objective(self.train, self.adapt)
        known = cast((objective, train, jnp.max(s), jnp.sum(s)), jnp.result_type(s, float))
        return partial(_losses, *known, tune=self.tune, ridged=self.meta_ridge != 0)


def _allocation(search: Search, best: Candidate) -> Allocation:
    """Return the allocation of the best candidate of a search."""
    m, n_t, n_v = best.sizes
    sized = dataclasses.replace(search.problem, m=m, n_t=n_t, n_v=n_v)
    train, adapt, ridge = search.train, search.adapt, search.meta_ridge
    # From the unit of the search back to a rate, by the spectrum at the best n_t.
    if search.tune:
        # At an end of the axis the loss may fall further beyond it.
        inside = abs(best.unit) < (1 - 1e-6) * _rate_axis(train, True)[-1]
        warn_unless(inside, "best_allocation: the training parameter is at the end of its range")
        s = sized.modes.s
        scale = _rate_unit(train, n_t, jnp.max(s), jnp.sum(s))
        train = train.with_tunable(float(best.unit * scale))
    ridge = float(sized.rows * np.exp(best.log_ridge)) if ridge is None else float(ridge)
    if adapt is None:
        # The search needs no rule at test time or has its best step; the result names it.
        adapt = GradientDescent(float(best_adapt_rate(sized, train, meta_ridge=ridge)))
    loss = float(test_loss(sized, train, adapt, meta_ridge=ridge))
    cost = search.budget.cost(m, n_t, n_v)
    return Allocation(m, n_t, n_v, train, adapt, ridge, loss, cost, best.real)


def _logarithms(least, most, points: int) -> np.ndarray:
    return np.linspace(np.log(least), np.log(max(least, most)), points)


def _rate_axis(train: InnerRule, tune: bool) -> np.ndarray:
    """Return the grid of the tuned parameter in units of `_rate_unit`; one value unless tuned."""
    if not tune:
        return np.zeros(1)
    # For a largest eigenvalue of one: `_rate_unit` has the rest.
    smallest, largest = (float(end) for end in train.search_range(jnp.ones(())))
    positive = np.geomspace(smallest, largest, RATE_POINTS)
    return np.concatenate([-positive[::-1], [0.0], positive])


def _rate_unit(train: InnerRule, n_t, top, total):
    """Return the unit of the tuned parameter: its range over that for a largest eigenvalue of one.

    top, total: largest eigenvalue and trace of Sigma.
    """
    largest = top * (1 + jnp.sqrt(total / (top * n_t))) ** 2
    here, there = (train.search_range(x)[1] for x in (largest, jnp.ones(())))
    return here / there


def _ridge_axis(meta_ridge) -> np.ndarray:
    """Return the grid of logarithms of the ridge over n_v m."""
    smallest, largest = RIDGES
    return np.log(np.geomspace(smallest, largest, RIDGE_POINTS if meta_ridge is None else 1))


def refine_grid(evaluate: Callable, axes: list) -> tuple[tuple[float, ...], float]:
    """Return the lowest point on a grid that is refined about it, and the value there.

    evaluate: a function of columns of coordinates, one for each axis.
    """
    best: tuple = (math.inf, tuple(axis[0] for axis in axes))
    for _ in range(ROUNDS):
        mesh = [x.ravel() for x in np.meshgrid(*axes, indexing="ij")]
        values = evaluate(mesh)
        i = int(np.argmin(np.where(np.isfinite(values), values, np.inf)))
        point = tuple(float(x[i]) for x in mesh)
        best = min(best, (float(values[i]), point)) if np.isfinite(values[i]) else best
        # Each axis with more than one point shrinks to the two intervals around the lowest.
        for k, index in enumerate(np.unravel_index(i, [len(axis) for axis in axes])):
            if len(axes[k]) > 1:
                low, high = axes[k][max(index - 1, 0)], axes[k][min(index + 1, len(axes[k]) - 1)]
                axes[k] = np.linspace(low, high, FINE)
    return best[1], best[0]


@partial(jit_fast_compile, static_argnames=("tune", "ridged"))
def _losses(objective, train: InnerRule, top, total, cells, tune: bool, ridged: bool):
    """Return the objective in every cell."""

    def one(cell):
        m, n_t, n_v, unit, ridge = cell
        # The rate is given relative to its range at this n_t, so that one grid suits every n_t.
        rule = train.with_tunable(unit * _rate_unit(train, n_t, top, total)) if tune else train
        return objective.with_sizes(m, n_t, n_v, ridge, ridged).loss(rule)

    return jax.vmap(one)(cells.astype(top.dtype))


def _check(budget, task_cost, point_cost, split, meta_ridge) -> None:
    for name, value in (("budget", budget), ("task_cost", task_cost), ("point_cost", point_cost)):
        check_nonnegative(name, value, "what points and tasks cost")
    if point_cost == 0:
        raise ValueError("point_cost must be above 0, else any number of points is free, got 0")
    if split is not None and not 0 < check_scalar("split", split, "a share") < 1:
        raise ValueError(f"split must lie between 0 and 1 (n_t / (n_t + n_v)), got {split!r}")
    if meta_ridge is not None:
        check_nonnegative("meta_ridge", meta_ridge, "a ridge strength")
    least = task_cost + 2 * point_cost
    if budget < least:
        raise ValueError(
            f"budget must pay for one task of one training and one validation point, {least:g}, "
            f"got {budget!r}"
        )
