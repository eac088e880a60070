r"""How much a run scatters, and how many runs a comparison of two rates needs.

For two rules 1, 2 trained on the same data, with everything per task and kappa_1, kappa_2 the two
roots, let the bar denote the mean over the spectrum and

    R = 1/((B_1 + kappa_1)(B_2 + kappa_2))      beta = b_1 b_2      V = a_1.a_2 (cross-covariance)

The same integral over order parameters as for the mean, now with one copy of the system for each
rule, gives to leading order (negmaml/theory/isotropic.md)

    Cov(G_1, G_2) = 2 t_1 t_2 { m p kappa_1 kappa_2 <V^2 R> + w^T H^{-1} w - q }
    Cov(D_1, D_2) = d/dridge_1 d/dridge_2 Cov(G_1, G_2)

    w  = ( -D2/p r ; m times: p <V beta R>, sigma^2 + p kappa_1 kappa_2 <V R> )
    q  = D2^2/p r^2 g_1 g_2,    r = ridge_1 ridge_2/(t_1 t_2), the ridges in r held fixed
    H  = [ -(m-1)/(p g_1 g_2)   -1              0              ... ]
         [ -1                   -p <R>          -p <beta R>        ]   one such block for
         [  0                   -p <beta R>     n_v - p <beta^2 R> ]   each task

where G is such that its derivative in the ridge is the distance D (for omega_0 = w0 the training
loss with its penalty). The relative variance of D is of order 1/p. Near the threshold the exact
inverse-Wishart variance at alpha_t = 0 exceeds this by a factor gap/(gap - 3), gap = |p - n_v m|:
hence 1/(1 - 3 x s), with x s the pole of the mean.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.arrays import namespace, stop_gradient
from negmaml._core.checks import check_array, check_flag
from negmaml._core.jit import is_concrete, jit_fast_compile, on_host
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, Float, ScalarLike
from negmaml.problem.adapted_loss import rms_filters, scale_by_filter_sq
from negmaml.problem.model import MixedLinearRegression
from negmaml.rules import InnerRule, check_scalar_rule, flat_batch
from negmaml.theory.anisotropic import variance as structured_spread
from negmaml.theory.api import ON_HOST, require_structured
from negmaml.theory.isotropic.filters import View, moments_of, traced_view, view
from negmaml.theory.isotropic.inputs import Setting, checked, setting_of
from negmaml.theory.isotropic.logarithms import squared_unit
from negmaml.theory.isotropic.moments import LARGEST_RIDGED_POLE, leading
from negmaml.theory.isotropic.scaling import Seen, Solved, solved
from negmaml.theory.isotropic.variance import covariance_of_loss
from negmaml.theory.options import named_options

BLOCK = 64  # rules at once in a program


class StandardDeviation(NamedTuple):
    """Of |omega* - w0|^2 (train shape) and of the expected test loss (train + adapt shape)."""

    distance: Float[Array, "..."]
    test_loss: Float[Array, "..."]


@named_options
@own_settings
def standard_deviation(
    problem: MixedLinearRegression,
    train: InnerRule,
    adapt: InnerRule,
    *,
    meta_ridge: ScalarLike = 0.0,
    measure: str = "auto",
) -> StandardDeviation:
    """Standard deviation over runs of what `negmaml.simulate` returns (expected evaluation).

    A run is a training set of m tasks. Arguments as in `theory.test_loss`. Infinite where the
    variance does not exist: without ridge at |n_v m - p| <= 3, and just beyond by this theory.
    Leading order in 1/p with the threshold's factor; the module's head has the equations, that of
    `negmaml.theory.anisotropic.variance` those for covariances.

    >>> from negmaml import GradientDescent
    >>> problem = MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
    >>> spread = standard_deviation(problem, GradientDescent(-0.2), GradientDescent(0.2))
    >>> round(float(spread.distance), 3)
    0.067
    """
    meta_ridge, train, adapt = checked(problem, meta_ridge, train=train, adapt=adapt)
    if not problem.isotropic:
        require_structured("proportional", measure)
        found = structured_spread.variances(problem, train, adapt, meta_ridge)
        return StandardDeviation(*map(jnp.sqrt, found))
    variance, (unit, _), _ = _covariance(problem, (train,), meta_ridge, measure)

    @on_host
    def deviations(variance, unit, adapt):
        xp = namespace(variance, unit, adapt)
        shrink, _, exists = rms_filters(adapt, problem.n_r, problem.p)
        of_distance = squared_unit(_root(variance), unit)
        of_loss = scale_by_filter_sq(of_distance / 2, shrink)
        return StandardDeviation(of_distance, xp.where(exists | (of_loss == 0), of_loss, xp.inf))

    return deviations(variance, unit, adapt)


def _root(variance):
    """The root of a variance, which rounding may put below zero, with a derivative there too."""
    xp = namespace(variance)
    some = variance > 0
    without = xp.where(variance <= 0, 0.0, xp.inf)  # no number is no deviation of zero
    return xp.where(some, xp.sqrt(xp.where(some, variance, 1.0)), without)


@named_options
@own_settings
def required_runs(
    problem: MixedLinearRegression,
    train_a: InnerRule,
    train_b: InnerRule,
    *,
    adapt: InnerRule | None = None,
    meta_ridge: ScalarLike = 0.0,
    measure: str = "auto",
    standard_errors: float = 4.0,
    shared: bool = True,
) -> Float[Array, ""]:
    """Runs of `negmaml.simulate` that tell the test losses after two training rules apart.

    So many that the expected difference of the two mean losses is `standard_errors` times the
    standard error of that difference. The rule at test time scales both alike and drops out, but
    for problems with covariances.

    Arguments:
        train_a, train_b: rules of one family with scalar parameters.
        adapt: the rule at test time, with a scalar parameter; needed with covariances alone.
        shared: whether both rules see the same data in a run, as in one call of `simulate`
            (common random numbers), or independent data.

    Returns a real number; infinity when the two losses are equal. Raises TypeError or ValueError
    for rules that are not scalar or of two families, unless standard_errors is above 0, and for a
    problem with covariances without `adapt`.
    """
    meta_ridge, train_a = checked(problem, meta_ridge, train_a=train_a)
    train_a = check_scalar_rule("train_a", train_a)
    train_b = check_scalar_rule("train_b", train_b)
    if type(train_a) is not type(train_b):
        raise ValueError(
            f"train_b must be of the family of train_a, {train_a!r}, with other numbers, got "
            f"{train_b!r}"
        )
    standard_errors = check_array("standard_errors", standard_errors, "a distance", 0, strict=True)
    shared = check_flag("shared", shared)
    if not problem.isotropic:
        require_structured("proportional", measure)
        if adapt is None:
            raise ValueError(
                "adapt must be given for a problem with covariances, where it matters which "
                "directions scatter: a rule such as GradientDescent(0.2)"
            )
        adapt = check_scalar_rule("adapt", adapt)
        found = structured_spread.difference(problem, train_a, train_b, adapt, meta_ridge)
        a, b, cross, gap = found
        return standard_errors**2 * (a + b - 2 * cross if shared else a + b) / gap**2
    (a, (unit_a, _), mean_a), (b, (unit_b, _), mean_b), (cross, _, _) = (
        _covariance(problem, rules, meta_ridge, measure)
        for rules in ((train_a,), (train_b,), (train_a, train_b))
    )
    difference = jnp.abs(mean_a - mean_b)
    same = difference == 0
    log_difference = jnp.log(jnp.where(same, 1.0, difference))
    size_a, size_b = (jnp.exp(2 * unit - log_difference) for unit in (unit_a, unit_b))
    variance = a * size_a**2 + b * size_b**2
    if shared:
        variance = jnp.maximum(variance - 2 * cross * size_a * size_b, 0.0)
    return jnp.where(same, jnp.inf, standard_errors**2 * variance)


def _covariance(problem: MixedLinearRegression, rules: tuple[InnerRule, ...], meta_ridge, measure):
    """Cov(D_1, D_2) exp(-2 (u_1 + u_2)), (u_1, u_2), E D_1: for two rules of one shape, or one."""
    setting, rules = setting_of(problem, rules, meta_ridge, measure)
    known, count = is_concrete((setting, rules)), math.prod(rules[0].batch_shape)
    if known and count <= ON_HOST:
        return on_host(_of_rules)(setting, rules)
    if not known and count <= BLOCK:
        views = tuple(traced_view(setting, rule) for rule in rules)
        return _traced_of_views(views, setting.ridged)
    return _in_blocks(setting, rules)


@jit_fast_compile
def _in_blocks(setting: Setting, rules: tuple[InnerRule, ...]):
    flat = tuple(flat_batch(rule) for rule in rules)
    results = lax.map(partial(_of_rules, setting), flat, batch_size=BLOCK)
    return jax.tree.map(lambda x: x.reshape(rules[0].batch_shape), results)


def _of_rules(setting: Setting, rules: tuple[InnerRule, ...]):
    return _of_views(tuple(view(setting, rule) for rule in rules), setting.ridged)


def _of_views(views: tuple[View, ...], ridged: bool):
    """What `_covariance` returns, for rules or batches of one shape."""
    found = [solved(one.tasks, ridged) for one in views]
    values = [moments_of(*pair) for pair in zip(views, found, strict=True)]
    factors = [_growth(one, views[0].tasks.ridge > 0) for one in values]
    (one, factor_1), (two, factor_2) = ((found[k], factors[k]) for k in (0, -1))
    (seen_1, size_1), (seen_2, size_2) = (_balanced(each) for each in (one, two))
    mixed = covariance_of_loss([seen_1, seen_2], [one.point, two.point])
    covariance = mixed / (one.point.slope * two.point.slope * size_1**2 * size_2**2)
    xp = namespace(covariance)
    growth = factor_1 * factor_2
    without = xp.isinf(growth) & (covariance != 0)
    grown = xp.where(without, xp.inf, covariance * xp.where(xp.isinf(growth), 1.0, growth))
    units = tuple(
        seen.log_amplitude + xp.log(size) for seen, size in ((seen_1, size_1), (seen_2, size_2))
    )
    return grown, units, values[0].distance


def _balanced(found: Solved) -> tuple[Seen, Any]:
    """With amplitudes between the largest and the distance, so that squares of both are numbers.

    And the root of the distance in these units, for the covariance relative to the distances, one
    where it is zero.
    """
    seen = found.seen
    limit = stop_gradient(leading(seen, found.point)[0])
    xp = namespace(limit)
    unit = xp.sqrt(xp.sqrt(xp.where(limit > 0, limit, 1.0)))
    scaled = seen._replace(
        sigma=seen.sigma / unit,
        offset=seen.offset / unit / unit,
        a=tuple(a / unit[..., None] for a in seen.a),
        log_amplitude=seen.log_amplitude + xp.log(unit),
    )
    return scaled, unit


_traced_of_views = jax.jit(_of_views, static_argnames="ridged")


def _growth(means, ridged):
    """How the standard deviation of finite sizes exceeds that of the limit."""
    xp = namespace(means.pole)
    pole = xp.where(ridged, xp.minimum(means.pole, LARGEST_RIDGED_POLE / 2), means.pole)
    rest = 1 - 3 * pole
    return xp.where(rest > 0, means.growth / xp.sqrt(xp.where(rest > 0, rest, 1.0)), xp.inf)
