"""Best rates, times, strengths and ridges, in training and at test time.

For isotropic problems adaptation multiplies the weight error by a positive number. So the best
training rule does not depend on the rule at test time, and the joint optimum is one after the
other. With covariances it does, and the best gradient step at test time is found along with it.
"""

import math
from functools import cache
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import grad, lax

from negmaml._core.arrays import canonicalize, namespace
from negmaml._core.calls import explain_calls
from negmaml._core.checks import check_count, check_optional
from negmaml._core.display import add_fields_repr
from negmaml._core.jit import is_concrete
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, Float, ScalarLike
from negmaml.problem.model import MixedLinearRegression, check_problem
from negmaml.rules import GradientDescent, InnerRule, check_filters, check_scalar_rule
from negmaml.theory import theorems
from negmaml.theory.api import warn_if_unsolved
from negmaml.theory.isotropic.inputs import check_arguments
from negmaml.theory.model import TheoryModel, mean_model, theory_model
from negmaml.theory.options import named_options
from negmaml.theory.search import ImplicitArgmin, minimise, signed_grid, warn_unless_minimum

# Ridges tried: this factor either way of their unit, in as many points.
RIDGE_RANGE, RIDGE_POINTS = 1e6, 61


@explain_calls
def stationary_train_rates(p: int, n_t: int) -> tuple[float, float]:
    r"""Return (alpha_t^-, alpha_t^+), where Theorem 1's loss is stationary in the training rate.

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
    r"""Return the parameter of `adapt` that minimises the test loss after `train`.

    For one gradient step (the default) the loss is a quadratic in alpha_r: with
    E = nu^2 + E|omega* - w0|^2,

        alpha_r = E / ( E (1 + (p+1)/n_r) + sigma^2 p/n_r ),

    between 0 (only noise) and 1/(1 + (p+1)/n_r) (no noise). For other rules, the lowest minimum
    over both signs, found on a grid, which ends as in `best_train_rate`.

    Arguments:
        train: rule of meta-training; other rules than one step in `adapt` need it scalar.
        adapt: a rule of the family wanted; its tuned parameter (rate, time, strength) is ignored,
            everything else is kept.
        method, meta_ridge, measure: as in `theory.test_loss`.

    Returns an array of the shape of the training rule; when E = sigma = 0 every rate is optimal
    and the noiseless value is returned. Raises ValueError where the weight error is infinite at
    p = n_v m. Source: Bernacchia 2021, section 4; negmaml.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
    >>> round(float(nm.theory.best_adapt_rate(problem, nm.GradientDescent(-0.2))), 3)
    0.08
    """
    adapt = GradientDescent(0.0) if adapt is None else adapt
    meta_ridge, train, adapt = check_arguments(problem, meta_ridge, train=train, adapt=adapt)
    # One gradient step has a closed form, and only that serves whole batches of training rules.
    one_step = adapt.spectral().gradient_rate is not None
    train = train if one_step else check_scalar_rule("train", train)
    model = mean_model(problem, meta_ridge, method, measure, "train-validation")
    model.require_finite_mean()
    if one_step:
        return warn_if_unsolved(model.best_adapt_step(train))
    return _best_parameter("best_adapt_rate", *model.adaptation_objective(train, adapt))


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
    r"""Return the parameter of `train` (rate, time or strength) that minimises the test loss.

    The rule at test time multiplies the weight error E|omega* - w0|^2 by a positive number, so the
    optimum is the same for every one of them. The lowest minimum over both signs is found on a grid
    that is refined about it; its derivatives are those of the stationarity condition. The grid ends
    at 1e4 (rates), 30 (times) over, and 1e3 (strengths) times, the largest eigenvalue. Where the
    weight error falls all the way to an end, that end is returned, with a `ConvergenceWarning`
    outside jit. NaN where no equation was solved.

    Arguments:
        train: a rule of the family wanted, one gradient step when omitted; its tuned parameter
            (rate, time, strength) is ignored, everything else is kept.
        adapt: the rule at test time, which matters only for a problem with covariances; when
            omitted there, the best gradient step after each training rule.
        method, meta_ridge, measure: as in `theory.test_loss`. By "expansion", one gradient step
            without ridge: alpha_t^- of `stationary_train_rates` when p > n_v m, the minimum of
            Theorem 2 when p < n_v m.

    Returns a scalar. Raises ValueError at p = n_v m without ridge, where every mean is infinite,
    for an unknown method, and by "expansion" for another rule. Source: Bernacchia 2021, section 4;
    negmaml.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
    >>> round(float(nm.theory.best_train_rate(problem)), 2)
    -1.06
    >>> round(float(nm.theory.best_train_rate(problem, method="expansion")), 2)
    -1.01
    """
    train = GradientDescent(0.0) if train is None else train
    meta_ridge, train = check_arguments(problem, meta_ridge, train=train)
    adapt = check_optional(check_scalar_rule, "adapt", adapt)
    # All options are checked before any work, whichever branch follows.
    model = mean_model(problem, meta_ridge, method, measure, "train-validation")
    model.require_finite_mean()
    if method == "expansion":
        return _best_by_expansion(problem, train)
    objective = cast(TheoryModel, model).train_objective(train, adapt)
    return _best_parameter("best_train_rate", *objective)


@add_fields_repr
class RatePair(NamedTuple):
    """The best parameters of both rules, from `best_rates`; unpacks as a pair.

    Attributes:
        train: the best parameter of the rule of meta-training.
        adapt: the best parameter of the rule at test time.

    >>> problem = MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
    >>> train, adapt = best_rates(problem)
    >>> bool(train < 0 < adapt)
    True
    """

    train: Float[Array, ""]
    adapt: Float[Array, ""]


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
) -> RatePair:
    """Return the best parameters in training and at test time, jointly.

    The best training rule does not depend on `adapt`, so the joint optimum is `best_train_rate`
    and then `best_adapt_rate` after it. Arguments and errors as there.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
    >>> train, adapt = nm.theory.best_rates(problem)
    >>> round(float(train), 2), round(float(adapt), 2)
    (-1.06, 0.08)
    """
    train = GradientDescent(0.0) if train is None else check_filters("train", train)
    adapt = check_optional(check_filters, "adapt", adapt)
    options: dict[str, Any] = {"method": method, "meta_ridge": meta_ridge, "measure": measure}
    best = best_train_rate(problem, train, **options)  # with covariances, for the best step
    return RatePair(best, best_adapt_rate(problem, train.with_tunable(best), adapt, **options))


@named_options
@own_settings
def best_meta_ridge(
    problem: MixedLinearRegression,
    train: InnerRule,
    *,
    adapt: InnerRule | None = None,
    measure: str = "auto",
) -> Float[Array, ""]:
    r"""Return the meta_ridge >= 0 that minimises the test loss after `train`, a scalar rule.

    The lowest minimum on a grid from 1e-6 to 1e6 times n_v m, or 0 if that is lower still. At
    omega_0 = w0 the largest ridge is best: there meta-training should stay where it starts. Where
    it is the largest elsewhere, a `ConvergenceWarning` is issued outside jit. With covariances it
    depends on `adapt`, the best gradient step after each ridge when omitted. Returns a scalar with
    the derivatives of the stationarity condition (zero at 0).

    >>> import negmaml as nm
    >>> sizes = {"p": 60, "m": 3, "n_t": 30, "n_v": 2, "n_r": 20}
    >>> problem = nm.MixedLinearRegression(**sizes, sigma=1.0, nu=0.5, w0=0.1)
    >>> ridge = nm.theory.best_meta_ridge(problem, nm.GradientDescent(-0.2))
    >>> print(f"{float(ridge):.2g}")
    1.5e+02
    """
    check_problem(problem)
    train = check_scalar_rule("train", train)
    adapt = check_optional(check_scalar_rule, "adapt", adapt)
    objective, train = theory_model(problem, measure=measure).train_objective(train, adapt)
    # Ridged from the start: one program then serves every ridge that is tried.
    variables, fixed = objective.with_ridge(objective.inputs.meta_ridge).split()
    best = _argmin(objective.on_host, True, over_ridges=True)((variables, train), fixed)
    # At omega_0 = w0 the largest ridge is known to be best, and its end of the grid is no failure.
    if is_concrete((variables, train)) and objective.starts_off:
        warn_unless_minimum(
            "best_meta_ridge", best, _log_ridges(objective),
            lambda values: _loss_at_ridge(values, (variables, train), fixed),
        )  # fmt: skip
    return jnp.exp(best)


@runtime_checkable
class Objective(Protocol):
    """A function of a rule to minimise; isotropic and anisotropic problems have theirs.

    on_host: True if it is written over a namespace, so that NumPy computes it without a program.
    by_parts: True if it has `parts`.
    """

    on_host: bool
    by_parts: bool

    @property
    def largest_eigenvalue(self) -> Any:
        """About the largest eigenvalue of S, the scale of the grid."""

    def loss(self, rule: InnerRule) -> Any:
        """Return the values to minimise, of the rule's shape."""

    def parts(self, rule: InnerRule) -> Any:
        """Return the arrays the loss depends on, a pytree with a method `objective`."""

    def prepared(self) -> Any:
        """Return the objective for many evaluations."""

    def split(self) -> tuple[Any, Any]:
        """Return (variables, fixed): fixed.join(variables) is the objective."""


def _best_parameter(name: str, objective: Objective, rule: InnerRule):
    """Return the tuned parameter of `rule` that minimises the objective."""
    variables, fixed = objective.split()
    best = _argmin(objective.on_host, objective.by_parts)((variables, rule), fixed)
    warn_unless_minimum(
        name, best, signed_grid(rule, objective.largest_eigenvalue),
        lambda values: objective.prepared().loss(rule.with_tunable(values)),
    )  # fmt: skip
    return best


@cache
def _argmin(on_host: bool, by_parts: bool, over_ridges: bool = False) -> ImplicitArgmin:
    """Return the argmin over a rule's parameter, or over the logarithm of the ridge."""
    loss, search, parts = (
        (_loss_at_ridge, _search_log_ridge, _parts_at_ridge)
        if over_ridges
        else (_loss_at, _search, _parts_at)
    )
    # Without `parts` the loss is short enough for nested transformations.
    pair = (_objective_of, parts) if by_parts else None
    return ImplicitArgmin(loss if on_host else None, search, on_host, pair)


def _objective_of(parts):
    return parts.objective()


def _loss_at(value, numbers, fixed):
    variables, rule = numbers
    return fixed.join(variables).loss(rule.with_tunable(value))


def _parts_at(value, numbers, fixed):
    variables, rule = numbers
    return fixed.join(variables).parts(rule.with_tunable(value))


def _search(numbers, fixed):
    variables, rule = numbers
    objective = fixed.join(variables).prepared()
    grid = signed_grid(rule, objective.largest_eigenvalue)
    return minimise(lambda values: objective.loss(rule.with_tunable(values)), grid)


def _log_ridges(objective):
    """Return the grid of logarithms of ridges that are tried."""
    # The ridge enters next to the eigenvalues of Phi^T Phi, which are of this order.
    unit = objective.ridge_unit
    xp = namespace(unit)
    return xp.log(unit) + math.log(RIDGE_RANGE) * np.linspace(-1, 1, RIDGE_POINTS, dtype=unit.dtype)


def _loss_at_ridge(logarithm, numbers, fixed):
    variables, rule = numbers
    ridge = namespace(logarithm).exp(logarithm)
    return fixed.join(variables).losses_over_ridges(rule, ridge)


def _parts_at_ridge(logarithm, numbers, fixed):
    variables, rule = numbers
    return fixed.join(variables).with_ridge(jnp.exp(logarithm)).parts(rule)


def _search_log_ridge(numbers, fixed):
    """Return the logarithm of the best ridge, minus infinity if no ridge is better still."""
    variables, rule = numbers
    objective = fixed.join(variables).prepared()
    grid = _log_ridges(objective)
    xp = namespace(grid)

    def losses(values):
        return objective.losses_over_ridges(rule, namespace(values).exp(values))

    # Zero ridge is no point of a logarithmic grid, so it is compared with the best of all others.
    found = minimise(losses, grid)
    some, none = losses(xp.stack([found, xp.full_like(found, -xp.inf)]))
    return xp.where(objective.at_threshold | (some < none), found, -xp.inf)


def _best_by_expansion(problem: MixedLinearRegression, train: InnerRule):
    theorems.weight_error(problem, train)  # raises for a rule without an expansion
    dtype = jnp.result_type(float, problem.sigma, problem.nu)
    # Theorem 1 has its minimum in closed form; Theorem 2 is searched.
    if problem.overparameterized:
        return jnp.asarray(stationary_train_rates(problem.p, problem.n_t)[0], dtype)
    return _best_expanded(canonicalize(problem, dtype), ())


def _error_by_expansion(rate, problem: MixedLinearRegression, _):
    return theorems.weight_error(problem, GradientDescent(rate))


def _search_expansion(problem: MixedLinearRegression, _):
    """Return the minimum of Theorem 2's weight error over the rate.

    Minima lie near zero without noise and near -n_t/(n_v + 1 + p) when noise dominates. Rates 1%
    apart, from far below the scale of the spectrum to n_t, miss none of them. Newton's method then
    starts where the curvature is positive.
    """
    smallest, largest = 1e-6 * problem.n_t / (problem.n_t + problem.p), 10 * problem.n_t
    count = round(math.log(largest / smallest) / 0.01)
    dtype = problem.sigma.dtype
    rates = np.geomspace(smallest, largest, count).astype(dtype)
    candidates = jnp.asarray(np.concatenate([-rates, np.zeros(1, dtype), rates]))

    def objective(rate):
        return _error_by_expansion(rate, problem, ())

    slope = grad(objective)
    curvature = grad(slope)

    def polish(_, rate):
        second = curvature(rate)
        return jnp.where(second > 0, rate - slope(rate) / jnp.where(second > 0, second, 1.0), rate)

    return lax.fori_loop(0, 6, polish, candidates[jnp.argmin(objective(candidates))])


_best_expanded = ImplicitArgmin(_error_by_expansion, _search_expansion, on_host=False)

# Made at import, so that the table of compiled programs is complete from then on.
_argmin(False, True)
_argmin(False, True, over_ridges=True)
