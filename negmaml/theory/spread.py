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

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.compilation import quick_jit
from negmaml._core.types import Array, Float, ScalarLike
from negmaml.problem.adaptation import filter_means
from negmaml.problem.model import MixedLinearRegression
from negmaml.rules import Rule, check_rule, flat_batch
from negmaml.theory.predict import means
from negmaml.theory.proportional import LARGEST_RIDGED_POLE, around, ridge_felt
from negmaml.theory.saddle import TrainingSet, solve, training_set
from negmaml.theory.setting import Setting, setting_of


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
    Leading order in 1/p with the threshold's factor; the module's head has the equations.

    >>> from negmaml import GradientDescent
    >>> problem = MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
    >>> spread = standard_deviation(problem, GradientDescent(-0.2), GradientDescent(0.2))
    >>> round(float(spread.distance), 3)
    0.067
    """
    variance, _ = _covariance(problem, train, train, meta_ridge, measure)
    shrink, _ = filter_means(adapt, problem.n_r, problem.p)
    of_distance = jnp.sqrt(variance)
    return StandardDeviation(of_distance, jnp.multiply.outer(of_distance, shrink / 2))


def runs_needed(
    problem: MixedLinearRegression,
    train_a: Rule,
    train_b: Rule,
    *,
    meta_ridge: ScalarLike = 0.0,
    measure: str = "auto",
    standard_errors: float = 4.0,
    shared: bool = True,
) -> Float[Array, ""]:
    """Runs of `negmaml.simulate` that tell the test losses after two training rules apart.

    So many that the expected difference of the two mean losses is `standard_errors` times the
    standard error of that difference. The rule at test time scales both alike and drops out.

    Arguments:
        train_a, train_b: rules with scalar parameters.
        shared: whether both rules see the same data in a run, as in one call of `simulate`
            (common random numbers), or independent data.

    Returns a real number; infinity when the two losses are equal. Raises ValueError for rules
    that are not scalar.
    """
    for name, rule in (("train_a", train_a), ("train_b", train_b)):
        if check_rule(name, rule).batch_shape != ():
            raise ValueError(f"{name} must have one scalar parameter, got {rule!r}")
    pairs = ((train_a, train_a), (train_b, train_b), (train_a, train_b))
    (a, mean_a), (b, mean_b), (cross, _) = (
        _covariance(problem, *pair, meta_ridge, measure) for pair in pairs
    )
    variance = a + b - 2 * cross if shared else a + b
    return standard_errors**2 * variance / (mean_a - mean_b) ** 2


def _covariance(problem: MixedLinearRegression, first: Rule, second: Rule, meta_ridge, measure):
    """(Cov(D_1, D_2), E D_1) over runs for rules of one shape."""
    setting, (first, second) = setting_of(problem, (first, second), meta_ridge, measure)
    return _evaluate(setting, first, second)


@quick_jit
def _evaluate(setting: Setting, first: Rule, second: Rule):
    flat = flat_batch(first), flat_batch(second)
    results = lax.map(lambda rules: _pair(setting, *rules), flat, batch_size=64)
    return jax.tree.map(lambda x: x.reshape(first.batch_shape), results)


def _pair(setting: Setting, first: Rule, second: Rule):
    """Cov(D_1, D_2) and E D_1 for two scalar rules."""
    ones = [training_set(setting, rule) for rule in (first, second)]
    kappas = [solve(one, setting.ridged) for one in ones]
    slopes = [_ridge_slope(one, kappa) for one, kappa in zip(ones, kappas, strict=True)]

    def covariance_of_loss(*at):
        return _covariance_of_loss(ones, kappas, at)

    mixed = jax.grad(jax.grad(covariance_of_loss, 0), 1)(*kappas)
    found = [means(setting, rule) for rule in (first, second)]
    factors = [_growth(one, setting.meta_ridge > 0) for one in found]
    covariance = mixed / (slopes[0] * slopes[1])
    return covariance * factors[0] * factors[1], found[0].distance


def _ridge_slope(tasks: TrainingSet, kappa):
    """(t K)'."""
    point, velocity = around(tasks, kappa)
    K, dK = ridge_felt(tasks.m, point)
    return velocity.t * K + point.t * dK


def _growth(means, ridged):
    """How the standard deviation of finite sizes exceeds that of the limit."""
    pole = jnp.where(ridged, jnp.minimum(means.pole, LARGEST_RIDGED_POLE / 2), means.pole)
    rest = 1 - 3 * pole
    nothing = means.limit == 0
    growth = jnp.where(nothing, 1, means.distance / jnp.where(nothing, 1, means.limit))
    return jnp.where(rest > 0, growth / jnp.sqrt(jnp.where(rest > 0, rest, 1)), jnp.inf)


def _covariance_of_loss(pair: list[TrainingSet], roots, kappas):
    """Cov(G_1, G_2) at `kappas`; the start's source is that of the `roots`, and does not move."""
    one, two = pair
    p, m, n_v, D2 = one.p, one.m, one.n_v, one.offset
    kappa_1, kappa_2 = kappas
    R = 1 / ((one.B + kappa_1) * (two.B + kappa_2))
    beta, V = one.b * two.b, jnp.sum(one.a * two.a, 0)
    product = kappa_1 * kappa_2
    g_1, g_2 = one.g(kappa_1), two.g(kappa_2)
    w_1, w_2 = p * one.mean(V * beta * R), one.sigma * two.sigma + p * product * one.mean(V * R)
    a_11, a_12 = -p * one.mean(R), -p * one.mean(beta * R)
    a_22 = n_v - p * one.mean(beta**2 * R)
    det = a_11 * a_22 - a_12**2
    # Eliminate the tasks' blocks of H, then the parameter C that couples them.
    inner = m * (a_22 * w_1**2 - 2 * a_12 * w_1 * w_2 + a_11 * w_2**2) / det
    coupled = m * (a_22 * w_1 - a_12 * w_2) / det
    H_C = -(m - 1) / (p * g_1 * g_2) - m * a_22 / det
    noise = m * p * product * one.mean(V**2 * R) + inner + coupled**2 / H_C

    # The start's source is ridge^2 = (t K)^2, held fixed. ridge^2/t is K^2 (2 t_root - t) to first
    # order, which is all that one derivative in each kappa sees, and regular at t = 0.
    t_1, t_2 = one.t(kappa_1), two.t(kappa_2)
    (s_1, K_1), (s_2, K_2) = (
        lax.stop_gradient((x.t(root), x.K(root))) for x, root in zip(pair, roots, strict=True)
    )
    start = D2 / p * K_1 * K_2
    mirrored = (2 * s_1 - t_1) * (2 * s_2 - t_2)
    cross = -2 * start * s_1 * s_2 * coupled / H_C
    return 2 * (t_1 * t_2 * noise + cross + start**2 * mirrored * (1 / H_C - p * g_1 * g_2))
