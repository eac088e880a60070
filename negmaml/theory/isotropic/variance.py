r"""Two systems on the same data: the covariance of their losses and its derivatives in both kappas.

Equation (23) of negmaml/theory/isotropic.md, with the symbols of (21) and (22). The scatter of the
weight error is a derivative in both ridges of that of the loss. With many rows (kappa far above B)
it is smaller by (p/N)^2, and float32 would lose it in a difference. So all derivatives are moments
over the spectrum weighted by R = r_1 r_2,

    rho f = <f R>/<R>,     d (rho f)/dkappa_1 = -Cov(f, r_1)     d^2 (rho f) = K_3(f, r_1, r_2)

with r_i = 1/(B_i + kappa_i), s_i = B_i r_i and K_3 the third joint cumulant: deviations from means,
in which nothing cancels.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax

from negmaml._core.arrays import namespace, stop_gradient
from negmaml._core.jit import is_concrete, jit_fast_compile, on_host
from negmaml._core.platform import with_plan
from negmaml._core.taylor import Taylor
from negmaml.rules import InnerRule, flat_batch
from negmaml.theory.isotropic.inputs import IsotropicInputs
from negmaml.theory.isotropic.moments import (
    EvaluatedRule,
    apply_correction,
    compiled_filters,
    evaluate_filters,
    leading,
    moments_at,
)
from negmaml.theory.isotropic.scaling import (
    SaddleDerivatives,
    SaddlePoint,
    ScaledSystem,
    solve_saddle,
)
from negmaml.theory.resummation import deviation_growth

KEPT = ("", "x", "y", "xy")  # derivatives in kappa_1 (x) and kappa_2 (y)
FEW_RULES = 64  # up to which a trace holds them in its own program
# Rules up to which NumPy is done before a program would be compiled.
ON_HOST = 4096


def covariance_of_loss(pair: list[ScaledSystem], points: list[SaddleDerivatives]):
    """Return d^2 Cov(G_1, G_2) / dkappa_1 dkappa_2 at the two roots, both in units of kappa.

    Every name is a symbol of (22); `free` is 1 - m J, and `coupling` is P/(1 - m J).
    """
    (one, two), (at_1, at_2) = pair, points
    xp, p, m, sigmas = namespace(at_1.t), one.p, one.m, one.sigma * two.sigma
    V = one.a[0] * two.a[0] + one.a[1] * two.a[1]
    moments = WeightedMoments(one, two, at_1, at_2)
    A, b, v = moments.total, moments.mean(moments.beta), moments.mean(V * moments.beta)
    w_1, w_2 = v * A, series(_=sigmas) + p * moments.with_kappas(V)
    X, E = moments.leftover_rows, moments.schur_complement(b)
    per_E = E.reciprocal()
    # g' = -l for each system in its own kappa.
    P = p * (series(_=at_1.g, x=-at_1.l) * series(_=at_2.g, y=-at_2.l))
    J = moments.correlation() + P * (b * b) * per_E
    free = series(_=1.0) - m * J
    # 1 - m J is the determinant of the coupled blocks, in units of the uncoupled ones.
    eps = xp.finfo(p.dtype).eps  # at p = n_v m without ridge nothing is free
    free = Taylor(free.terms | {"": xp.maximum(free[""], eps)}, KEPT)
    coupling = P * free.reciprocal()
    j = m * ((v * X + b * w_2) * per_E)

    t_1, t_2 = series(_=at_1.t, x=at_1.t1), series(_=at_2.t, y=at_2.t1)
    # Equation (23): the noise within each task and between tasks, and the terms of the start.
    within_task = (
        p * moments.with_kappas(V * V) + (w_2 * w_2 - w_1 * (2.0 * (b * w_2) + v * X)) * per_E
    )
    # The source of the start is ridge^2 = (t K)^2, held fixed. To first order ridge^2/t is
    # K^2 (2 t_root - t): one derivative in each kappa needs no more, and it is regular at t = 0.
    start = xp.sqrt(one.offset) * xp.sqrt(two.offset) / p * at_1.K * at_2.K
    reflected = series(_=at_1.t, x=-at_1.t1) * series(_=at_2.t, y=-at_2.t1)
    noise = m * within_task + j * j * coupling
    mixed_term = 2 * start * at_1.t * at_2.t * (j * coupling)
    init_term = start * start * m * (reflected * (J * coupling))
    return 2.0 * (t_1 * t_2 * noise + mixed_term + init_term)["xy"]


def series(**terms) -> Taylor:
    """Return a series in the two kappas; the value is `_`."""
    return Taylor({name.strip("_"): x for name, x in terms.items()}, KEPT)


class WeightedMoments:
    """Means over the spectrum weighted by R = r_1 r_2, as series in both kappas about one.

    Every derivative is a covariance or a joint cumulant under these weights, equation (21): values
    of the functions with their means taken off, so that no digits cancel.
    """

    def __init__(
        self, one: ScaledSystem, two: ScaledSystem, at_1: SaddleDerivatives, at_2: SaddleDerivatives
    ):
        self.one, self.two, self.points = one, two, (at_1, at_2)
        self.beta, self.R = one.b * two.b, one.free * two.free
        self.over = one.mean(self.R)
        # 1/(B + kappa) and B/(B + kappa) differ from their means by opposite amounts.
        # Deviations from the plain mean, and from the mean weighted by R.
        self.plain = [_deviation(x.mean, x.free, x.fitted) for x in (one, two)]
        self.r_1, self.r_2 = (d - self.of(d)[..., None] for d in self.plain)

    def of(self, values):
        """Return the weighted mean at kappa_1 = kappa_2 = 1."""
        return self.one.mean(values * self.R) / self.over

    @property
    def total(self) -> Taylor:
        """A = p <R>."""
        p, mean, r_1, r_2 = self.one.p, self.one.mean, self.one.free, self.two.free
        first, second = mean(self.R * r_1), mean(self.R * r_2)
        return p * series(_=self.over, x=-first, y=-second, xy=mean(self.R * self.R))

    def mean(self, values) -> Taylor:
        """Return the weighted mean of values that do not depend on kappa."""
        found = self.of(values)
        rest = values - found[..., None]
        x, y, xy = (self.of(rest * d) for d in (self.r_1, self.r_2, self.r_1 * self.r_2))
        return series(_=found, x=-x, y=-y, xy=xy)

    def with_kappas(self, values) -> Taylor:
        """Return kappa_1 kappa_2 <f R>; a factor kappa r has the derivative r s."""
        mean, f, s_1, s_2 = self.one.mean, values * self.R, self.one.fitted, self.two.fitted
        return series(_=mean(f), x=mean(f * s_1), y=mean(f * s_2), xy=mean(f * s_1 * s_2))

    @property
    def leftover_rows(self) -> Taylor:
        """X: rows of a task that neither fit uses up, with beta^2 R = s_1 s_2."""
        p, mean, s_1, s_2 = self.one.p, self.one.mean, self.one.fitted, self.two.fitted
        x, y, xy = (mean(s_1 * s_2 * part) for part in (self.one.free, self.two.free, self.R))
        value = self.points[0].t + p * mean(s_1 * self.two.free)
        return series(_=value, x=p * x, y=p * y, xy=-p * xy)

    def schur_complement(self, b: Taylor) -> Taylor:
        """Return E = X + A b^2; its derivatives are those of -A Var(beta)."""
        rest = self.beta - b[""][..., None]
        square = rest * rest
        value, both = self.of(square), self.of(self.r_1 * self.r_2)
        xy = self.of(square * self.r_1 * self.r_2) - value * both - 2 * b["x"] * b["y"]
        variance = series(
            _=value, x=-self.of(square * self.r_1), y=-self.of(square * self.r_2), xy=xy
        )
        slopes = -1.0 * (self.total * variance)
        value = self.leftover_rows[""] + self.total[""] * b[""] * b[""]
        return Taylor(slopes.terms | {"": value}, KEPT)

    def correlation(self) -> Taylor:
        """Return Cov(r_1, r_2)/<R> = 1 - g_1 g_2/<R>, with the covariance over the spectrum."""
        mean, (d_1, d_2), (at_1, at_2) = self.one.mean, self.plain, self.points
        rest = at_1.g * at_2.g / self.over

        def drift(r, g):
            """Return the mean of r weighted by R, minus that weighted by r."""
            return (mean(r * d_1 * d_2) - mean(r * d_1) * mean(r * d_2) / g) / self.over

        x, y = drift(self.one.free, at_1.g), drift(self.two.free, at_2.g)
        xy = x * y - self.of(self.r_1 * self.r_2)
        return series(_=mean(d_1 * d_2) / self.over, x=-rest * x, y=-rest * y, xy=-rest * xy)


def _deviation(mean, r, s):
    """Return r minus its mean over the spectrum, for r + s = 1.

    r - <r> is <s> - s; the smaller of r and s loses no digits.
    """
    fitted = mean(s)[..., None]
    return namespace(r).where(fitted < 0.5, fitted - s, r - mean(r)[..., None])


class Covariance(NamedTuple):
    """The covariance of two losses, in units in which its digits are kept.

    values: Cov(L_1, L_2) exp(-2 (u_1 + u_2)).
    log_units: (u_1, u_2).
    mean: E L_1.
    """

    values: Any
    log_units: tuple[Any, Any]
    mean: Any


def covariance(inputs: IsotropicInputs, rules: tuple[InnerRule, ...]) -> Covariance:
    """Return the covariance of the weight errors of one rule, or of two rules of one shape."""
    # NumPy for few known rules, one program for traced ones, and blocks for long batches.
    known, count = is_concrete((inputs, rules)), math.prod(rules[0].batch_shape)
    if known and count <= ON_HOST:
        return on_host(_of_rules)(inputs, rules)
    if not known and count <= FEW_RULES:
        evaluated = tuple(compiled_filters(inputs, rule) for rule in rules)
        return _traced(evaluated, inputs.ridged)
    return _in_blocks(inputs, rules)


@jit_fast_compile
def _in_blocks(inputs: IsotropicInputs, rules: tuple[InnerRule, ...]) -> Covariance:
    flat = tuple(flat_batch(rule) for rule in rules)
    count = math.prod(rules[0].batch_shape)
    results = with_plan(
        lambda sizes: min(sizes.variances, count),
        lambda size: lax.map(partial(_of_rules, inputs), flat, batch_size=size),
    )
    return jax.tree.map(lambda x: x.reshape(rules[0].batch_shape), results)


def _of_rules(inputs: IsotropicInputs, rules: tuple[InnerRule, ...]) -> Covariance:
    return _of_filters(tuple(evaluate_filters(inputs, rule) for rule in rules), inputs.ridged)


def _of_filters(evaluated: tuple[EvaluatedRule, ...], ridged: bool) -> Covariance:
    """Return the `Covariance` of one evaluated rule with itself, or of two."""
    saddles = [solve_saddle(one.training, ridged) for one in evaluated]
    values = [moments_at(*pair) for pair in zip(evaluated, saddles, strict=True)]
    has_ridge = evaluated[0].training.ridge > 0
    factors = [deviation_growth(x.correction_factor, x.pole, has_ridge) for x in values]
    # One rule with itself is the pair of its first and last.
    (one, factor_1), (two, factor_2) = ((saddles[k], factors[k]) for k in (0, -1))
    (system_1, size_1), (system_2, size_2) = (_balanced(each) for each in (one, two))
    mixed = covariance_of_loss([system_1, system_2], [one.at, two.at])
    # d/dridge is d/dkappa over the slope (t K)' of the ridge.
    limit = mixed / (one.at.slope * two.at.slope * size_1**2 * size_2**2)
    corrected = apply_correction(limit, factor_1 * factor_2)
    log, pairs = namespace(limit).log, ((system_1, size_1), (system_2, size_2))
    log_units = tuple(system.log_amplitude + log(size) for system, size in pairs)
    return Covariance(corrected, log_units, values[0].weight_error)


_traced = jax.jit(_of_filters, static_argnames="ridged")


def _balanced(saddle: SaddlePoint) -> tuple[ScaledSystem, Any]:
    """Return the system with smaller amplitudes, and the root of the weight error in their units.

    The unit lies between the largest amplitude and the root of the weight error, so that squares of
    both are numbers. The covariance is then taken relative to the weight errors; the root is one
    where the weight error is zero.
    """
    system = saddle.system
    limit = stop_gradient(leading(system, saddle.at)[0])
    xp = namespace(limit)
    unit = xp.sqrt(xp.sqrt(xp.where(limit > 0, limit, 1.0)))
    scaled = system._replace(
        sigma=system.sigma / unit,
        offset=system.offset / unit / unit,
        a=tuple(a / unit[..., None] for a in system.a),
        log_amplitude=system.log_amplitude + xp.log(unit),
    )
    return scaled, unit


def deviation(variance):
    """Return the root of a variance that rounding may have put below zero, with a derivative."""
    xp = namespace(variance)
    some = variance > 0
    other = xp.where(variance <= 0, 0.0, xp.inf)  # a variance that is NaN has no finite deviation
    return xp.where(some, xp.sqrt(xp.where(some, variance, 1.0)), other)
