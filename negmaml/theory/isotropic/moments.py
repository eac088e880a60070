r"""Weight error and training-task error for every n_v m / p, rule and meta-ridge.

kappa, g, t and K are those of `negmaml.theory.isotropic.saddle_point`. With
u = sigma^2 + p int mu V kappa/(B + kappa), D2 = |omega_0 - w0|^2, and primes for derivatives in
kappa, the limit for p, n_t and n_v large at fixed ratios is, by (6) and (7) of
negmaml/theory/isotropic.md,

    E|omega* - w0|^2 = { m (t u)' + D2 K^2 (g t' - g' t) } / (t K)'
    tau^2            = n_v/m { m (u K' - u' K) + D2 K^2 (g K)' } / (t K)'

The terms of relative order 1/p after them are in `negmaml.theory.isotropic.hessian`.

**Resummation.** With x the 1/p term of the weight error over its limit, 1/(1 - x) is exact at
alpha_t = 0. A ridge removes the pole, hence 1 + x/(1 - x s), where s = ((t'K - tK')/(t'K + tK'))^2
is one without ridge and falls to zero where the ridge governs (13). The pole belongs to the
threshold p = n_v m, and so it is the same for the task error: limit + first order/(1 - x s), with
the x of the weight error, and x s at most 1/|p - n_v m| (14). Steep filters get a factor of
`negmaml.theory.isotropic.eigenvalue_scatter` as well.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import namespace, stop_gradient
from negmaml._core.settings import own_settings
from negmaml.problem.adapted_loss import means_exist
from negmaml.rules import InnerRule
from negmaml.theory.isotropic.eigenvalue_scatter import log_scatter_factor
from negmaml.theory.isotropic.hessian import first_order
from negmaml.theory.isotropic.inputs import IsotropicInputs
from negmaml.theory.isotropic.logarithms import times_exp_2log
from negmaml.theory.isotropic.saddle_point import ON_NODES, TrainingSet, training_set
from negmaml.theory.isotropic.scaling import (
    SaddleDerivatives,
    SaddlePoint,
    ScaledSystem,
    solve_saddle,
)
from negmaml.theory.resummation import MAX_RIDGED_POLE, pade_resum


class EvaluatedRule(NamedTuple):
    """The numbers that the theory needs of a rule, or of a batch of rules.

    The solver sees only filter values, so one compiled program serves every rule class.

    training: the training set with the values of the filters on the spectrum.
    adapted_exists: True where means over adapted weights exist.
    diverges: True where the weight error is infinite because a filter vanishes within the spectrum
        of a single task without ridge.
    inverse_power: as in `negmaml.theory.isotropic.eigenvalue_scatter`, for the task error.
    """

    training: TrainingSet
    adapted_exists: Any
    diverges: Any
    inverse_power: Any


def evaluate_filters(inputs: IsotropicInputs, rule: InnerRule) -> EvaluatedRule:
    """Return the `EvaluatedRule` of a rule, or of a batch of rules."""
    # The last node is the atom at zero, where b = 1 for every rule.
    inputs = inputs.with_spectrum()
    xp, nodes = namespace(inputs, rule), inputs.spectrum.nodes[:-1]
    single_task = (inputs.m == 1) & (inputs.n_v >= inputs.p) & (inputs.meta_ridge == 0)
    diverges = single_task
    # Rules of the user may be slow to evaluate, and hardly any problem needs their zeros.
    if xp is not np or single_task.any():
        crossing = xp.asarray(rule.spectral().zero_indicator(nodes))
        diverges = single_task & (crossing.min(-1) < 0) & (crossing.max(-1) > 0)
    degree = rule.spectral().degree
    inverse_power = 1 / (2 * degree) if degree else 0.0
    exist = means_exist(rule, nodes, inputs.n_t)
    return EvaluatedRule(training_set(inputs, rule), exist, diverges, inverse_power)


class Moments(NamedTuple):
    """The means of the theory for a rule or a batch of rules.

    weight_error: E|omega* - w0|^2. train_task_error: tau^2, or None.
    limit: the weight error to leading order. pole: x s.
    correction_factor: weight_error/limit.
    """

    weight_error: Any
    train_task_error: Any
    limit: Any
    pole: Any
    correction_factor: Any


def rule_moments(
    inputs: IsotropicInputs, rule: InnerRule, with_task_error: bool = False
) -> Moments:
    """Return the moments for a rule or a batch of rules, of its shape."""
    return solve_moments(evaluate_filters(inputs, rule), inputs.ridged, with_task_error)


def solve_moments(evaluated: EvaluatedRule, ridged: bool, with_task_error: bool = False) -> Moments:
    """Return the moments for an `EvaluatedRule`."""
    return moments_at(evaluated, solve_saddle(evaluated.training, ridged), with_task_error)


def moments_at(
    evaluated: EvaluatedRule, saddle: SaddlePoint, with_task_error: bool = False
) -> Moments:
    """Return the corrected moments, infinite also where the `EvaluatedRule` says so."""
    values = corrected_moments(saddle, with_task_error, evaluated.inverse_power)
    where, inf = namespace(values.limit).where, float("inf")

    def or_infinite(value):
        return where(evaluated.diverges & (value > 0), inf, value)

    error = values.train_task_error
    if with_task_error:
        # Where b(S) has an inverse in nearly every run, b(S) omega* does not depend on b.
        error = where(evaluated.adapted_exists | (error == 0), error, inf)
    return values._replace(
        weight_error=or_infinite(values.weight_error),
        train_task_error=error,
        correction_factor=or_infinite(values.correction_factor),
    )


# In a trace there are two programs: one for each rule class, and one that all rules share.
compiled_filters = jax.jit(evaluate_filters)
_solve_moments = jax.jit(solve_moments, static_argnames=("ridged", "with_task_error"))


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def compiled_mean(evaluated: EvaluatedRule, ridged: bool, name: str):
    """Return one field of `Moments` for an `EvaluatedRule`, in a trace.

    A test loss beyond 1e20 has as large a derivative in the weight error, and taken back through
    all operations float32 would overflow. So the derivatives of the mean itself are computed, which
    are moderate numbers, and multiplied with the tangents.
    """
    return getattr(_solve_moments(evaluated, ridged, name == "train_task_error"), name)


@own_settings
def _along(ridged: bool, name: str, primals, tangents):
    (evaluated,), (moves,) = primals, tangents
    training = evaluated.training
    # Every field is broadcast to the rules, so that one reverse pass has the slopes of all rules.
    shape, nodes = training.log_b.shape[:-1], training.log_b.shape[-1:]

    def for_every_rule(field, leaf):
        return jnp.broadcast_to(leaf, shape + (nodes if field in ON_NODES else ()))

    def mean(parts):
        replaced = evaluated._replace(training=training._replace(**parts))
        return getattr(_solve_moments(replaced, ridged, name == "train_task_error"), name)

    parts = {field: x for field, x in training._asdict().items() if x is not None}
    value, back = jax.vjp(mean, {field: for_every_rule(field, x) for field, x in parts.items()})
    (slopes,) = back(jnp.ones_like(value))
    along = jnp.zeros_like(value)
    for field, slope in slopes.items():
        move = getattr(moves.training, field)
        if not isinstance(move, jax.custom_derivatives.SymbolicZero):
            along += (slope * for_every_rule(field, move)).reshape(*shape, -1).sum(-1)
    return value, along


compiled_mean.defjvp(_along, symbolic_zeros=True)


def corrected_moments(
    saddle: SaddlePoint, with_task_error: bool = True, inverse_power=0.0
) -> Moments:
    """Return the means with finite-size corrections; infinite where they do not exist.

    with_task_error: True to compute the task error, which is None otherwise.
    inverse_power: as in `negmaml.theory.isotropic.eigenvalue_scatter.log_scatter_factor`.
    """
    training, root, system, at = saddle
    limit, error, balance = leading(system, at)
    weight_error_1, error_1 = first_order(system, at, with_task_error)
    ridge = training.ridge > 0
    where, inf = namespace(limit).where, float("inf")
    noisy = (training.sigma > 0) | ((training.task_std > 0) & (training.m > 1))
    # The exact mean of an inverse Wishart matrix is infinite there, unless nothing is noisy.
    at_threshold = (abs(training.p - training.n_v * training.m) <= 1) & ~ridge & noisy
    factor, pole = _resummation(limit, weight_error_1, balance**2, ridge)
    factor = where(at_threshold, inf, factor)
    limit = times_exp_2log(limit, system.log_amplitude)
    weight_error = apply_correction(limit, factor)
    if not with_task_error:
        return Moments(weight_error, None, limit, pole, factor)
    # Equation (14): the pole of the weight error, at most 1/|p - N|.
    x, minimum = _ratio(error_1, error), namespace(limit).minimum
    nearest = 1 / namespace(limit).maximum(abs(training.p - training.n_v * training.m), 1.0)
    error_pole = where(x > 0, minimum(pole, nearest), x)
    error_factor = where(at_threshold, inf, pade_resum(1.0, x, error_pole))
    log_unit = system.log_amplitude + root.log_kappa / 2
    log_unit = log_unit + log_scatter_factor(system, at, error, inverse_power) / 2
    error = apply_correction(times_exp_2log(error, log_unit), error_factor)
    return Moments(weight_error, error, limit, pole, factor)


def limiting_weight_error(training: TrainingSet, ridged: bool):
    """Return the weight error to leading order, without any finite-size correction."""
    _, _, system, at = solve_saddle(training, ridged)
    return times_exp_2log(leading(system, at)[0], system.log_amplitude)


def leading(system: ScaledSystem, at: SaddleDerivatives):
    """Return weight error (6), task error (7) and (t'K - tK')/(tK)' of the limit."""
    n_v, m, D2 = system.n_v, system.m, system.offset
    weight_error = m * (at.t1 * at.u + at.t * at.u1) + D2 * at.K**2 * (at.g * at.t1 + at.l * at.t)
    start = D2 * at.K**2 * at.w  # (g K)' = m w
    fitted = (m - 1) * at.w / at.g**2  # K' - K, so that u K' - u' K needs no difference
    task_error = n_v * (at.left * at.K1 + at.u1 * fitted + start)
    return (
        weight_error / at.slope,
        task_error / at.slope,
        (at.t1 * at.K - at.t * at.K1) / at.slope,
    )


def _resummation(leading, first, ridge_attenuation, ridged):
    """Return 1 + x/(1 - x s) and x s of (13), with x = first/leading and s = ridge_attenuation."""
    xp = namespace(leading)
    x = _ratio(first, leading)
    pole = xp.where(x > 0, x * ridge_attenuation, x)
    pole = xp.where(ridged, xp.minimum(pole, MAX_RIDGED_POLE), pole)
    return pade_resum(1.0, x, pole), pole


def _ratio(first, leading):
    """Return first/leading, zero where `leading` is zero."""
    xp = namespace(leading)
    zero = leading == 0
    # Divided by a constant unit first: the derivative of a quotient has the square of the leading
    # term, which may overflow.
    unit = stop_gradient(xp.where(zero, 1.0, leading))
    return xp.where(zero, 0.0, (first / unit) / xp.where(zero, 1.0, leading / unit))


def apply_correction(value, factor):
    """Return value factor: zero where `value` is zero, and without a slope where it is infinite."""
    xp = namespace(value)
    infinite = xp.isinf(factor)
    corrected = value * xp.where(infinite, 1.0, factor)
    return xp.where(infinite & (value != 0), xp.inf, corrected)
