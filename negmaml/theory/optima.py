"""Which rate, time, strength and ridge to use: optima in training and at test time.

Adaptation multiplies the distance of the trained weights by a positive number, so what is best in
training does not depend on the rule at test time, and the joint optimum is one after the other.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.arrays import canonicalize, namespace
from negmaml._core.checks import check_choice, check_count, check_optional
from negmaml._core.jit import is_concrete, on_host
from negmaml._core.pytree import pytree, static
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, Float, ScalarLike
from negmaml.problem.adapted_loss import expected_isotropic_loss
from negmaml.problem.model import MixedLinearRegression, check_problem
from negmaml.rules import GradientDescent, InnerRule, check_filters, check_scalar_rule
from negmaml.theory import theorems as expansions
from negmaml.theory.anisotropic import optima as structured_optima
from negmaml.theory.api import METHODS, require_no_ridge, require_structured, weight_error
from negmaml.theory.isotropic.filters import View, means, means_at
from negmaml.theory.isotropic.inputs import (
    Setting,
    checked,
    is_zero,
    setting_of,
    with_ridge,
    with_spectrum,
)
from negmaml.theory.isotropic.moments import Moments
from negmaml.theory.isotropic.saddle_point import TrainingSet, training_set
from negmaml.theory.isotropic.spectral_density import MEASURES
from negmaml.theory.options import named_options
from negmaml.theory.search import Optimum, minimise, parameter_grid, reported

MOVING = ("sigma", "nu", "offset", "meta_ridge")  # of a setting, what optima are differentiated in


def stationary_train_rates(p: int, n_t: int) -> tuple[float, float]:
    r"""(alpha_t^-, alpha_t^+): where Theorem 1's loss is stationary in the training rate.

        alpha_t^{+-} = -(n_t+1)/(2p) +- sqrt( ((n_t+1)/(2p))^2 + n_t/p )

    The negative one is the minimum, the positive one the maximum, whatever the variances and
    the adaptation rate. Raises TypeError or ValueError for sizes below 1. Source: Bernacchia
    2021, below Theorem 1.

    >>> [round(rate, 4) for rate in stationary_train_rates(p=60, n_t=30)]
    [-1.0112, 0.4945]
    """
    p, n_t = check_count("p", p), check_count("n_t", n_t)
    half = (n_t + 1) / (2 * p)
    negative = -half - (half**2 + n_t / p) ** 0.5
    return negative, -n_t / p / negative  # their product is -n_t/p: no cancellation


@named_options
@own_settings
def best_adapt_rate(
    problem: MixedLinearRegression,
    train: InnerRule,
    adapt: InnerRule | None = None,
    *,
    method: str = "proportional",
    meta_ridge: ScalarLike = 0.0,
    measure: str = "auto",
) -> Float[Array, "*train"]:
    r"""The parameter of `adapt` that minimises the test loss after `train`.

    For one gradient step (the default) the loss is a quadratic in alpha_r: with
    E = nu^2 + E|omega* - w0|^2,

        alpha_r = E / ( E (1 + (p+1)/n_r) + sigma^2 p/n_r ),

    between 0 (noise alone) and 1/(1 + (p+1)/n_r) (no noise). For other rules, the lowest minimum
    over both signs, found on a grid, which ends as in `best_train_rate`.

    Arguments:
        train: rule of meta-training; other rules than one step in `adapt` need it scalar.
        adapt: a rule of the family wanted; its tuned parameter (rate, time, strength) is ignored,
            all else is kept.
        method, meta_ridge, measure: as in `theory.test_loss`.

    Returns an array of the shape of the training rule; when E = sigma = 0 every rate is optimal
    and the noiseless value is returned. Raises ValueError where the distance is infinite at
    p = n_v m. Source: Bernacchia 2021, section 4; negmaml.
    """
    adapt = GradientDescent(0.0) if adapt is None else adapt
    meta_ridge, train, adapt = checked(problem, meta_ridge, train=train, adapt=adapt)
    one_step = adapt.spectral().gradient_rate is not None
    train = train if one_step else check_scalar_rule("train", train)
    if not problem.isotropic:
        require_structured(method, measure)
        return structured_optima.best_adapt_rate(problem, train, adapt, meta_ridge)
    _require_finite(problem, meta_ridge)
    found = weight_error(problem, train, method=method, meta_ridge=meta_ridge, measure=measure)
    if one_step:
        return _best_step(problem, found)
    numbers = canonicalize((problem, found, adapt), found.dtype)
    sizes = canonicalize((problem.n_r, problem.p), found.dtype)
    return reported(
        "best_adapt_rate", _best_adaptation(numbers, sizes), parameter_grid(adapt, *sizes),
        lambda values: _adapted_loss(values, numbers, sizes),
    )  # fmt: skip


@on_host
def _best_step(problem: MixedLinearRegression, distance):
    p, n_r = problem.p, problem.n_r
    xp = namespace(problem, distance)
    spread, noise = problem.nu**2 + distance, problem.sigma**2 * p / n_r
    nothing, infinite = (spread == 0) & (noise == 0), xp.isinf(spread)
    spread, noise = xp.where(nothing | infinite, 1.0, spread), xp.where(infinite, 0.0, noise)
    return spread / (spread * (1 + (p + 1) / n_r) + noise)


def _adapted_loss(value, numbers, _):
    problem, found, adapt = numbers
    return expected_isotropic_loss(problem, found, adapt.with_tunable(value))


def _search_adaptation(numbers, sizes):
    grid = parameter_grid(numbers[-1], *sizes)
    return minimise(lambda values: _adapted_loss(values, numbers, sizes), grid)


_best_adaptation = Optimum(_adapted_loss, _search_adaptation)


@named_options
@own_settings
def best_train_rate(
    problem: MixedLinearRegression,
    train: InnerRule | None = None,
    *,
    adapt: InnerRule | None = None,
    method: str = "proportional",
    meta_ridge: ScalarLike = 0.0,
    measure: str = "auto",
) -> Float[Array, ""]:
    r"""The parameter of `train` (a rate, time or strength) that minimises the test loss, globally.

    The rule at test time multiplies the distance E|omega* - w0|^2 by a positive number, so the
    optimum is the same for every one of them. The lowest minimum over both
    signs is found on a grid and closed in on; its derivatives are those of the stationarity
    condition. The grid ends at 1e4 (rates), 30 (times) over, and 1e3 (strengths) times, the largest
    eigenvalue; where the distance falls on to infinity, the best is that end, with a
    `ConvergenceWarning` outside jit. NaN where no equation was solved.

    Arguments:
        train: a rule of the family wanted, one gradient step when left out; its tuned parameter
            (rate, time, strength) is ignored, all else is kept.
        adapt: the rule at test time, which matters for a problem with covariances alone; when left
            out there, the best gradient step after each training rule.
        method, meta_ridge, measure: as in `theory.test_loss`. By "expansion", one gradient step
            without ridge: alpha_t^- of `stationary_train_rates` when p > n_v m, the minimum of
            Theorem 2 when p < n_v m.

    Returns a scalar. Raises ValueError at p = n_v m without ridge, where every mean is infinite,
    for an unknown method, and by "expansion" for another rule. Source: Bernacchia 2021, section 4;
    negmaml.
    """
    train = GradientDescent(0.0) if train is None else train
    meta_ridge, train = checked(problem, meta_ridge, train=train)
    adapt = check_optional(check_scalar_rule, "adapt", adapt)
    check_choice("method", method, METHODS)
    check_choice("measure", measure, MEASURES)
    if not problem.isotropic:
        require_structured(method, measure)
        return structured_optima.best_train_rate(problem, train, adapt, meta_ridge)
    _require_finite(problem, meta_ridge)
    if method == "expansion":
        require_no_ridge(meta_ridge)
        return _best_by_expansion(problem, train)
    setting, (train,) = setting_of(problem, (train,), meta_ridge, measure)
    numbers, setting = _parts(setting, train)
    return reported(
        "best_train_rate", _best_parameter(numbers, setting),
        parameter_grid(train, setting.n_t, setting.p),
        lambda values: _distance_at(values, numbers, with_spectrum(setting)),
    )  # fmt: skip


def _parts(setting: Setting, train: InnerRule):
    """(numbers, fixed) of an `Optimum`: what of a setting and a rule is differentiated, and all."""
    return ({name: getattr(setting, name) for name in MOVING}, train), setting


@pytree
class Parts:
    """The arrays that an objective depends on, whatever the rule."""

    tasks: TrainingSet
    ridged: bool = static()

    def objective(self):
        """The distance, for JAX or the host."""
        seen = View(self.tasks, adapted=np.True_, endless=np.False_, bend=0.0)
        return _ordered(means_at(seen, self.ridged))


def _parts_at(setting: Setting, train: InnerRule) -> Parts:
    return Parts(training_set(with_spectrum(setting), train), setting.ridged)


def _finite_distance(setting: Setting, train: InnerRule):
    return _ordered(means(setting, train))


def _ordered(found: Moments):
    """The distance; where finite sizes make it infinite, above all others in order of its limit."""
    xp = namespace(found.distance)
    beyond = float(xp.finfo(found.limit.dtype).max) ** 0.5
    return xp.where(xp.isfinite(found.distance), found.distance, beyond * found.limit)


def _distance_at(value, numbers, setting: Setting):
    moving, train = numbers
    return _finite_distance(dataclasses.replace(setting, **moving), train.with_tunable(value))


def _search_parameter(numbers, setting: Setting):
    setting = with_spectrum(setting)
    grid = parameter_grid(numbers[1], setting.n_t, setting.p)
    return minimise(lambda values: _distance_at(values, numbers, setting), grid)


def _parts_of_parameter(value, numbers, setting: Setting):
    moving, train = numbers
    return _parts_at(dataclasses.replace(setting, **moving), train.with_tunable(value))


_best_parameter = Optimum(
    _distance_at, _search_parameter, by_parts=(Parts.objective, _parts_of_parameter)
)


@named_options
@own_settings
def best_rates(
    problem: MixedLinearRegression,
    train: InnerRule | None = None,
    adapt: InnerRule | None = None,
    *,
    method: str = "proportional",
    meta_ridge: ScalarLike = 0.0,
    measure: str = "auto",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(best parameter in training, best parameter at test time), jointly.

    What is best in training does not depend on `adapt`, so the joint optimum is
    `best_train_rate` and then `best_adapt_rate` after it. Arguments and errors as there.
    """
    train = GradientDescent(0.0) if train is None else check_filters("train", train)
    adapt = check_optional(check_filters, "adapt", adapt)
    options: dict[str, Any] = {"method": method, "meta_ridge": meta_ridge, "measure": measure}
    best = best_train_rate(problem, train, **options)  # for the best step, where it matters
    return best, best_adapt_rate(problem, train.with_tunable(best), adapt, **options)


@named_options
@own_settings
def best_meta_ridge(
    problem: MixedLinearRegression,
    train: InnerRule,
    *,
    adapt: InnerRule | None = None,
    measure: str = "auto",
) -> Float[Array, ""]:
    r"""The meta_ridge >= 0 that minimises the test loss after `train`, a rule with one parameter.

    The lowest minimum on a grid from 1e-6 to 1e6 times n_v m, or 0 where that is lower still. At
    omega_0 = w0 the best is the largest: there meta-training should stay where it starts. Where it
    is the largest elsewhere, a `ConvergenceWarning` is issued outside jit. With
    covariances it depends on `adapt`, the best gradient step after each ridge when left out.
    Returns a scalar with the derivatives of the stationarity condition (none at 0).
    """
    check_problem(problem)
    train = check_scalar_rule("train", train)
    adapt = check_optional(check_scalar_rule, "adapt", adapt)
    if not problem.isotropic:
        require_structured("proportional", measure)
        return structured_optima.best_meta_ridge(problem, train, adapt)
    setting, (train,) = setting_of(problem, (train,), 0.0, measure)
    numbers, setting = _parts(with_ridge(setting, setting.meta_ridge), train)
    best = _best_log_ridge(numbers, setting)
    if is_concrete(numbers) and np.any(numbers[0]["offset"] > 0):
        reported(
            "best_meta_ridge", best, _log_ridges(setting),
            lambda values: _distance_at_ridge(values, numbers, with_spectrum(setting)),
        )  # fmt: skip
    return jnp.exp(best)


def _log_ridges(setting: Setting):
    """The grid of logarithms of ridges that are tried."""
    steps = np.linspace(-1, 1, 61, dtype=setting.p.dtype)
    return namespace(setting).log(setting.rows) + math.log(1e6) * steps


def _distance_at_ridge(logarithm, numbers, setting: Setting):
    moving, train = numbers
    ridge = namespace(logarithm).exp(logarithm)
    return _finite_distance(dataclasses.replace(setting, **moving | {"meta_ridge": ridge}), train)


def _search_log_ridge(numbers, setting: Setting):
    """The logarithm of the best ridge, minus infinity where none is better still."""
    xp, setting = namespace(numbers, setting), with_spectrum(setting)
    grid = _log_ridges(setting)
    found = minimise(lambda values: _distance_at_ridge(values, numbers, setting), grid)
    ends = xp.stack([found, xp.full_like(found, -xp.inf)])
    some, none = _distance_at_ridge(ends, numbers, setting)
    square = setting.p == setting.rows  # where the mean is infinite without ridge
    return xp.where(square | (some < none), found, -xp.inf)


def _parts_of_ridge(logarithm, numbers, setting: Setting):
    moving, train = numbers
    moving = moving | {"meta_ridge": jnp.exp(logarithm)}
    return _parts_at(dataclasses.replace(setting, **moving), train)


_best_log_ridge = Optimum(
    _distance_at_ridge, _search_log_ridge, by_parts=(Parts.objective, _parts_of_ridge)
)


def _require_finite(problem: MixedLinearRegression, meta_ridge) -> None:
    if problem.p == problem.rows and is_zero(meta_ridge):
        raise ValueError(
            f"p = n_v m = {problem.p}: without meta_ridge every mean is infinite there; give a "
            "meta_ridge, or change p, m or n_v"
        )


def _best_by_expansion(problem: MixedLinearRegression, train: InnerRule):
    expansions.weight_error(problem, train)  # of a rule that has an expansion, or a clear error
    dtype = jnp.result_type(float, problem.sigma, problem.nu)
    if problem.overparameterized:
        return jnp.asarray(stationary_train_rates(problem.p, problem.n_t)[0], dtype)

    return _best_expanded(canonicalize(problem, dtype), ())


def _distance_by_expansion(rate, problem: MixedLinearRegression, _):
    return expansions.weight_error(problem, GradientDescent(rate))


def _search_expansion(problem: MixedLinearRegression, _):
    """Minima lie near zero without noise and near -n_t/(n_v + 1 + p) when noise dominates, so

    rates 1% apart from far below the scale of the spectrum to n_t leave none out, and start
    Newton where the curvature is positive.
    """
    smallest, largest = 1e-6 * problem.n_t / (problem.n_t + problem.p), 10 * problem.n_t
    count = round(math.log(largest / smallest) / 0.01)
    dtype = problem.sigma.dtype
    rates = np.geomspace(smallest, largest, count).astype(dtype)
    grid = jnp.asarray(np.concatenate([-rates, np.zeros(1, dtype), rates]))

    def objective(rate):
        return _distance_by_expansion(rate, problem, ())

    slope = jax.grad(objective)
    curvature = jax.grad(slope)

    def polish(_, rate):
        bend = curvature(rate)
        return jnp.where(bend > 0, rate - slope(rate) / jnp.where(bend > 0, bend, 1.0), rate)

    return lax.fori_loop(0, 6, polish, grid[jnp.argmin(objective(grid))])


_best_expanded = Optimum(_distance_by_expansion, _search_expansion, host=False)
