r"""How much a run scatters, and how many runs a comparison of two rates needs.

For two rules 1, 2 trained on the same data, with everything per task and kappa_1, kappa_2 the two
roots, let the bar denote the mean over the spectrum and

    R = 1/((B_1 + kappa_1)(B_2 + kappa_2))      beta = b_1 b_2      V = a_1.a_2 (cross-covariance)

The same integral over order parameters as for the mean, now with one copy of the system for each
rule, gives to leading order (negmaml/theory/proportional.md)

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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.checks import check_array, check_flag
from negmaml._core.compilation import concrete, on_host, quick_jit
from negmaml._core.numerics import namespace
from negmaml._core.types import Array, Float, ScalarLike
from negmaml.problem.adaptation import filter_sizes, times_filter
from negmaml.problem.model import MixedLinearRegression
from negmaml.rules import Rule, check_scalar_rule, flat_batch
from negmaml.theory import structured_spread
from negmaml.theory.predict import ON_HOST, means, require_structured
from negmaml.theory.proportional import (
    LARGEST_RIDGED_POLE,
    Point,
    Seen,
    around,
    in_units,
    squared_unit,
)
from negmaml.theory.saddle import solve, training_set
from negmaml.theory.series import Series
from negmaml.theory.setting import Setting, checked, setting_of

BLOCK = 64  # rules at once in a program
KEPT = ("", "x", "y", "xy")


class StandardDeviation(NamedTuple):
    """Of |omega* - w0|^2 (train shape) and of the expected test loss (train + adapt shape)."""

    distance: Float[Array, "..."]
    test_loss: Float[Array, "..."]


def standard_deviation(
    problem: MixedLinearRegression,
    train: Rule,
    adapt: Rule,
    *,
    meta_ridge: ScalarLike = 0.0,
    measure: str = "auto",
) -> StandardDeviation:
    """Standard deviation over runs of what `negmaml.simulate` returns (expected evaluation).

    A run is a training set of m tasks. Arguments as in `theory.test_loss`. Infinite where the
    variance does not exist: without ridge at |n_v m - p| <= 3, and just beyond by this theory.
    Leading order in 1/p with the threshold's factor; the module's head has the equations, that of
    `negmaml.theory.structured_spread` those for covariances.

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
    variance, unit, _, _ = _covariance(problem, train, train, meta_ridge, measure)

    @on_host
    def deviations(variance, unit, adapt):
        xp = namespace(variance, unit, adapt)
        shrink, _, exists = filter_sizes(adapt, problem.n_r, problem.p)
        of_distance = squared_unit(_root(variance), unit)
        of_loss = times_filter(of_distance / 2, shrink)
        return StandardDeviation(of_distance, xp.where(exists | (of_loss == 0), of_loss, xp.inf))

    return deviations(variance, unit, adapt)


def _root(variance):
    """The root of a variance, which rounding may put below zero, with a derivative there too."""
    xp = namespace(variance)
    some = variance > 0
    return xp.where(some, xp.sqrt(xp.where(some, variance, 1.0)), 0.0)


def runs_needed(
    problem: MixedLinearRegression,
    train_a: Rule,
    train_b: Rule,
    *,
    adapt: Rule | None = None,
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
    pairs = ((train_a, train_a), (train_b, train_b), (train_a, train_b))
    (a, unit_a, _, mean_a), (b, unit_b, _, mean_b), (cross, _, _, _) = (
        _covariance(problem, *pair, meta_ridge, measure) for pair in pairs
    )
    difference = jnp.abs(mean_a - mean_b)
    same = difference == 0
    log_difference = jnp.log(jnp.where(same, 1.0, difference))
    size_a, size_b = (jnp.exp(2 * unit - log_difference) for unit in (unit_a, unit_b))
    variance = a * size_a**2 + b * size_b**2
    if shared:
        variance = jnp.maximum(variance - 2 * cross * size_a * size_b, 0.0)
    return jnp.where(same, jnp.inf, standard_errors**2 * variance)


def _covariance(problem: MixedLinearRegression, first: Rule, second: Rule, meta_ridge, measure):
    """(Cov(D_1, D_2) exp(-2 (u_1 + u_2)), u_1, u_2, E D_1) for rules of one shape."""
    setting, (first, second) = setting_of(problem, (first, second), meta_ridge, measure)
    if math.prod(first.batch_shape) <= ON_HOST and concrete((setting, first, second)):
        return on_host(_pair)(setting, first, second)
    return _compiled(setting, first, second)


@quick_jit
def _compiled(setting: Setting, first: Rule, second: Rule):
    shape = first.batch_shape
    if math.prod(shape) <= BLOCK:
        return _pair(setting, first, second)
    flat = flat_batch(first), flat_batch(second)
    results = lax.map(lambda rules: _pair(setting, *rules), flat, batch_size=BLOCK)
    return jax.tree.map(lambda x: x.reshape(shape), results)


def _pair(setting: Setting, first: Rule, second: Rule):
    """What `_covariance` returns, for two rules or two batches of one shape."""
    pair = [training_set(setting, rule) for rule in (first, second)]
    roots = [solve(one, setting.ridged) for one in pair]
    seen = [in_units(one, root) for one, root in zip(pair, roots, strict=True)]
    points = [around(one, root) for one, root in zip(seen, roots, strict=True)]
    mixed = _covariance_of_loss(seen, points)["xy"]
    found = [means(setting, rule) for rule in (first, second)]
    factors = [_growth(one, setting.meta_ridge > 0) for one in found]
    covariance = mixed / (points[0].slope * points[1].slope)
    xp = namespace(covariance)
    growth = factors[0] * factors[1]
    without = xp.isinf(growth) & (covariance != 0)
    grown = xp.where(without, xp.inf, covariance * xp.where(xp.isinf(growth), 1.0, growth))
    return grown, seen[0].log_amplitude, seen[1].log_amplitude, found[0].distance


def _growth(means, ridged):
    """How the standard deviation of finite sizes exceeds that of the limit."""
    xp = namespace(means.pole)
    pole = xp.where(ridged, xp.minimum(means.pole, LARGEST_RIDGED_POLE / 2), means.pole)
    rest = 1 - 3 * pole
    return xp.where(rest > 0, means.growth / xp.sqrt(xp.where(rest > 0, rest, 1.0)), xp.inf)


def _covariance_of_loss(pair: list[Seen], points: list[Point]) -> Series:
    """Cov(G_1, G_2) about the roots, with derivatives in kappa_1 (x) and kappa_2 (y)."""
    (one, two), (at_1, at_2) = pair, points
    xp = namespace(at_1.t)
    p, m, n_v, D2 = one.p, one.m, one.n_v, xp.sqrt(one.offset) * xp.sqrt(two.offset)
    r_1, r_2 = one.free, two.free
    beta, V = one.b * two.b, one.a[0] * two.a[0] + one.a[1] * two.a[1]

    def series(**terms):
        return Series({name.strip("_"): x for name, x in terms.items()}, KEPT)

    def mean_R(values):
        """<f R>."""
        f = values * r_1 * r_2
        x, y, xy = one.mean(f * r_1), one.mean(f * r_2), one.mean(f * r_1 * r_2)
        return series(_=one.mean(f), x=-x, y=-y, xy=xy)

    product = series(_=1.0, x=1.0) * series(_=1.0, y=1.0)
    t_1, t_2 = series(_=at_1.t, x=at_1.t1), series(_=at_2.t, y=at_2.t1)
    g_1g_2 = series(_=at_1.g, x=-at_1.l) * series(_=at_2.g, y=-at_2.l)
    w_1 = p * mean_R(V * beta)
    w_2 = series(_=one.sigma * two.sigma) + p * (product * mean_R(V))
    a_11, a_12 = -p * mean_R(1.0), -p * mean_R(beta)
    a_22 = series(_=n_v) - p * mean_R(beta * beta)
    per_det = (a_11 * a_22 - a_12 * a_12).reciprocal()
    # Eliminate the tasks' blocks of H, then the parameter C that couples them.
    inner = m * ((a_22 * w_1 * w_1 - 2.0 * (a_12 * w_1 * w_2) + a_11 * w_2 * w_2) * per_det)
    coupled = m * ((a_22 * w_1 - a_12 * w_2) * per_det)
    per_H_C = (-(m - 1) / p * g_1g_2.reciprocal() - m * (a_22 * per_det)).reciprocal()
    noise = m * p * (product * mean_R(V * V)) + inner + coupled * coupled * per_H_C

    # The start's source is ridge^2 = (t K)^2, held fixed. ridge^2/t is K^2 (2 t_root - t) to first
    # order, which is all that one derivative in each kappa sees, and regular at t = 0.
    start = D2 / p * at_1.K * at_2.K
    mirrored = series(_=at_1.t, x=-at_1.t1) * series(_=at_2.t, y=-at_2.t1)
    cross = -2 * start * at_1.t * at_2.t * (coupled * per_H_C)
    return 2.0 * (t_1 * t_2 * noise + cross + start * start * (mirrored * (per_H_C - p * g_1g_2)))
