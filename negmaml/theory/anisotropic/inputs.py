r"""Predictions for problems with covariances: weight error, task error and test loss.

The theory gives the mean of every quadratic form (omega* - w0)^T H (omega* - w0) with H a function
of the input covariance, to leading order and to the next in 1/p (`moments`). The test loss is
linear in a few of them (`negmaml.problem.adapted`).

**Resummation near the threshold.** With x the next order over the leading one for H = Sigma, every
form is limit + first/(1 - x s) by (A21), and x s is at most one over |n_v m - rank Sigma|: the part
of the next order that is due to the threshold has its pole there, and the rest is not resummed. One
x for all forms keeps the means linear in H, as they must be, and the test loss a quadratic in the
rate of one step at test time.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import canonicalize, namespace, working_dtype
from negmaml._core.batching import batched_custom_vmap, in_blocks
from negmaml._core.checks import check_nonnegative
from negmaml._core.jit import is_concrete, jit_fast_compile
from negmaml._core.platform import DeviceSizes, with_plan
from negmaml._core.pytree import pytree, static
from negmaml._core.settings import own_settings
from negmaml.problem import MixedLinearRegression
from negmaml.rules import InnerRule, flat_batch
from negmaml.theory.anisotropic.compression import Eigenvalues, compress
from negmaml.theory.anisotropic.equations import FourthMoments, PencilSystem
from negmaml.theory.anisotropic.moments import expand, solve_and_linearize
from negmaml.theory.anisotropic.outliers import outlier_correction
from negmaml.theory.isotropic.inputs import check_spectral, is_zero
from negmaml.theory.resummation import MAX_RIDGED_POLE, pade_resum

# Relative error allowed of a polynomial in place of a filter without a pencil.
MAX_PENCIL_ERROR = 0.01


@pytree
class AnisotropicInputs:
    """A problem with covariances and a ridge, along the eigenvectors of the input covariance.

    spectrum: s, o, d of `problem.modes`, and the values of the forms after those of Sigma itself,
        compressed.
    null_space_forms: the forms in directions without input, where training moves nothing, (J,).
    m, n_t, n_v, sigma, meta_ridge: traced scalars.
    covariance: of `FourthMoments`, or None.
    ridged: whether the ridge may be above zero, static.
    train_train: whether the outer loss is on the training points themselves, static; n_v is n_t
        then.
    """

    spectrum: Eigenvalues
    null_space_forms: Any
    m: Any
    n_t: Any
    n_v: Any
    sigma: Any
    meta_ridge: Any
    covariance: Any = None
    ridged: bool = static(default=False)
    train_train: bool = static(default=False)

    def system(self, rule: InnerRule) -> PencilSystem:
        """Return the equations' system with a rule of scalar parameters."""
        pencil = rule.spectral().pencil(largest_eigenvalue(self.spectrum, self.n_t))
        if self.train_train:
            pencil = dataclasses.replace(pencil, coupling=pencil.coupling * self._rule_matters())
            pencil = pencil.for_train_train()
        # `PencilSystem` has the fields of `Eigenvalues` first, but for the bins.
        numbers = self.m, self.n_t, self.n_v, self.sigma, self.meta_ridge
        bins = self.spectrum.bin_weights
        fourth_moments = None if bins is None else FourthMoments(bins, self.covariance)
        return PencilSystem(*self.spectrum[:-1], *numbers, pencil, fourth_moments)

    def _rule_matters(self):
        """Return 0 if a train-train loss does not depend on the rule, else 1.

        Without ridge and with fewer points than directions omega* fits the labels themselves for
        every rule: rows and labels are both multiplied by b(K), which has an inverse. The equations
        have spurious roots there if b vanishes within the spectrum.
        """
        rows = self.m * self.n_v
        # With a rate of zero in place of the rule's.
        matters = (rows >= jnp.sum(self.spectrum.count)) | (self.meta_ridge > 0)
        return jnp.where(matters, 1.0, 0.0).astype(self.spectrum.s.dtype)


class Prediction(NamedTuple):
    """Means after a rule, with the rule's shape in front of an axis of forms, (..., J).

    forms, limit: at finite size, and to leading order. task_error: (...). converged: whether the
    equations were solved; the numbers are NaN where they were not.
    """

    forms: jax.Array
    task_error: jax.Array
    limit: jax.Array
    converged: jax.Array


def inputs_from_spectrum(
    s, o, d, weights, *numbers: Any, ridged: bool, fourth_moments=None
) -> AnisotropicInputs:
    """Return the inputs with given eigenvalues, forms (J, p), and (m, n_t, n_v, sigma, ridge)."""
    xp = namespace(s, o, d, weights)
    # omega* stays at omega_0 where inputs have no variance.
    null_space_forms = xp.sum(xp.where(s > 0, 0, weights * d), -1)
    bins, covariance = (None, None) if fourth_moments is None else fourth_moments
    # The first form, of Sigma, is the reference of the resummation.
    spectrum = compress(s, o, d, xp.concatenate([s[None], weights]), bins)
    m, n_t, n_v, sigma, meta_ridge = numbers
    return AnisotropicInputs(
        spectrum, null_space_forms, m, n_t, n_v, sigma, meta_ridge, covariance, ridged
    )


def make_inputs(
    problem: MixedLinearRegression,
    train: InnerRule,
    meta_ridge,
    weights,
    train_train: bool = False,
    fourth_moments: FourthMoments | None = None,
) -> tuple[AnisotropicInputs, InnerRule]:
    """Return (the inputs, the rule) of one dtype; raise unless the theory covers both."""
    check_nonnegative("meta_ridge", meta_ridge, "a ridge strength")
    check_spectral("train", train)
    # Known spectra are compressed on the host in float64, whatever the precision of the rest.
    s, o, d, _ = problem.modes
    dtype = working_dtype(train, s, o, d, weights, problem.sigma, meta_ridge)
    n_v = problem.n_t if train_train else problem.n_v
    numbers = problem.m, problem.n_t, n_v, problem.sigma, meta_ridge
    *spectrum, fourth_moments = canonicalize((s, o, d, weights, fourth_moments), np.float64)
    inputs = inputs_from_spectrum(
        *spectrum, *numbers, ridged=not is_zero(meta_ridge), fourth_moments=fourth_moments
    )
    inputs = dataclasses.replace(inputs, train_train=train_train)
    if is_concrete((inputs, train)):
        _check_pencil(inputs, canonicalize(train, dtype))
    return canonicalize((inputs, train), dtype)


def _check_pencil(at: AnisotropicInputs, train: InnerRule) -> None:
    """Raise if the polynomial in place of a filter without a pencil is too far off."""
    if train.spectral().exact_pencil:
        return
    largest = largest_eigenvalue(at.spectrum, at.n_t)
    # One by one and in NumPy: a program would take longer to compile than this takes.
    flat = jax.tree.map(np.asarray, flat_batch(train))
    for i in range(math.prod(train.batch_shape)):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], flat)
        error = one.spectral().pencil_error(largest)
        if error > MAX_PENCIL_ERROR:
            raise ValueError(
                f"train must be closer to a polynomial for a problem with covariances, got {one!r}:"
                f" the polynomial in its place is off by {float(error):.1%} on eigenvalues of S up "
                f"to {float(largest):.3g}; give a smaller {one.tunable}, several gradient steps, "
                "or use simulate"
            )


def largest_eigenvalue(spectrum: Eigenvalues, n):
    """Return the approximate largest eigenvalue of S from n rows."""
    xp = namespace(spectrum, n)
    # The edge of the Marchenko-Pastur law if all eigenvalues were like the largest, with tr Sigma.
    top = xp.max(spectrum.s)
    return top * (1 + xp.sqrt(xp.sum(spectrum.count * spectrum.s) / (top * n))) ** 2


def with_identity_covariance(problem: MixedLinearRegression) -> MixedLinearRegression:
    """Return the problem with the identity as an explicit covariance if it has none."""
    if not problem.isotropic:
        return problem
    return dataclasses.replace(problem, input_covariance=np.ones(problem.p))


def predict(
    problem: MixedLinearRegression,
    train: InnerRule,
    meta_ridge,
    weights,
    train_train: bool = False,
    fourth_moments: FourthMoments | None = None,
) -> Prediction:
    """Return the means of forms with `weights` (J, p) on the eigenvalues of Sigma.

    train_train: for an outer loss on the training points themselves; without the task error.
    fourth_moments: of inputs that are not Gaussian, on the eigenvalues of Sigma.
    """
    return predict_traced(
        *make_inputs(problem, train, meta_ridge, weights, train_train, fourth_moments)
    )


def predict_traced(at: AnisotropicInputs, rule: InnerRule) -> Prediction:
    """Return `predict` of made inputs; sizes are traced, so that problems share programs."""
    # Known single rules have a program of their own, which compiles in a fraction of the time.
    single = math.prod(rule.batch_shape) == 1 and is_concrete((at, rule))
    return (_predict_single if single else _predict_batch)(at, rule)


@partial(jit_fast_compile, profile="trivial")
def _predict_single(at: AnisotropicInputs, rule: InnerRule) -> Prediction:
    """Predict one rule, without the batching of `_predict_batch`, which takes time to trace."""
    found = _predict(at, jax.tree.map(lambda x: x[0], flat_batch(rule)))
    return _assemble(at, rule, jax.tree.map(lambda x: x[None], found))


@jit_fast_compile
def _predict_batch(at: AnisotropicInputs, rule: InnerRule) -> Prediction:
    return _assemble(at, rule, jax.vmap(_predict_rule, (None, 0))(at, flat_batch(rule)))


def _assemble(at: AnisotropicInputs, rule: InnerRule, found: Prediction) -> Prediction:
    """Return a flat prediction in the rule's shape, with the forms of the null space added."""
    found = jax.tree.map(lambda x: x.reshape(*rule.batch_shape, *x.shape[1:]), found)
    both = found.forms + at.null_space_forms, found.limit + at.null_space_forms
    return found._replace(forms=both[0], limit=both[1])


# A function in blocks has no derivative under `vmap`: that of the plain one replaces it.
@jax.custom_jvp
def _predict_rule(at: AnisotropicInputs, rule: InnerRule) -> Prediction:
    """Predict a rule of scalar parameters; under `vmap` in blocks of rules."""
    return _predict_in_blocks(at, rule)


@_predict_rule.defjvp
@own_settings
def _predict_rule_jvp(primals, tangents):
    return jax.jvp(_predict, primals, tangents)


def _predict(at: AnisotropicInputs, rule: InnerRule) -> Prediction:
    found = finite_size_means(at.system(rule), at.ridged)
    error = rule.spectral().pencil_error(largest_eigenvalue(at.spectrum, at.n_t))
    if isinstance(error, float):  # a rule with a pencil
        return found
    # Inside a program no error can be raised: NaN takes its place.
    close = error <= MAX_PENCIL_ERROR
    found = jax.tree.map(lambda x: jnp.where(close, x, jnp.nan), found)
    return found._replace(converged=found.converged == 1)


def _in_blocks(each, stacks, one):
    """Predict many rules, as many at once as suit the platform."""
    at, rule = one
    pencil = jax.eval_shape(lambda at, rule: at.system(rule).pencil.constant, at, rule)
    count, numbers = len(stacks[0]), pencil.size * at.spectrum.s.size

    def size(sizes: DeviceSizes) -> int:
        return min(count, sizes.pencils_at_once(sizes.pencils, numbers))

    return with_plan(size, lambda size: in_blocks(each, stacks, size))


_predict_in_blocks = batched_custom_vmap(_in_blocks)(_predict)


def finite_size_means(system: PencilSystem, ridged: bool) -> Prediction:
    """Return the resummed means; infinite where they do not exist, NaN where no root was found."""
    xp = namespace(system)
    at = solve_and_linearize(system, ridged)
    limit, first, attenuation, converged = expand(system, *at)
    no_ridge = ~(system.ridge > 0)
    of_outliers, exact = outlier_correction(system, *at)
    rest = first[:-1] - of_outliers
    # (A19) for the forms, and (A21) with the nearer of two poles for the task error.
    pole = pade_pole(system, limit[0], rest[0], attenuation)
    means = pade_resum(limit[:-1], rest, pole) + exact
    of_error = pade_pole(system, limit[-1], first[-1], attenuation)
    nearest = xp.where(of_error > 0, xp.minimum(of_error, pole), of_error)
    error = pade_resum(limit[-1], first[-1], nearest)
    rows, rank = system.m * system.n_v, xp.sum(system.count)
    infinite = (rows == rank) & no_ridge
    # A single task whose filter vanishes within the spectrum: the equations have no regular root.
    infinite |= ~converged & (system.m == 1) & (rows > rank) & no_ridge

    def valid(x):
        return xp.where(infinite, xp.inf, xp.where(converged, x, xp.nan))

    limit = xp.where(converged, limit[1:-1], xp.nan)
    return Prediction(valid(means[1:]), valid(error), limit, converged)


def pade_pole(system: PencilSystem, limit, first, attenuation):
    """Return x s of (A21), at most one over the distance from the threshold."""
    xp = namespace(first)
    x = xp.where(limit == 0, 0, first / xp.where(limit == 0, 1, limit))
    # A negative x has no pole, and needs no bound.
    gap = xp.abs(system.m * system.n_v - xp.sum(system.count))
    pole = xp.where(x > 0, xp.minimum(x * attenuation, 1 / xp.maximum(gap, 1)), x)
    return xp.where(system.ridge > 0, xp.minimum(pole, MAX_RIDGED_POLE), pole)
