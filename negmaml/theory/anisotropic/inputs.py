r"""Predictions for problems with covariances: `test_loss`, `weight_error`, `train_task_error`.

The theory gives the mean of any quadratic form (omega* - w0)^T H (omega* - w0) with H a function of
the input covariance, to leading order and to the next in 1/p (`moments`). The test loss
is linear in a few of them (`negmaml.problem.adapted`).

**Resummation near the threshold.** With x the next order over the leading one for H = Sigma, every
form is limit + first/(1 - x s), s as in `negmaml.theory.isotropic.moments`, and x s at most one
over
|n_v m - rank Sigma|: what of the next order is due to the threshold has its pole there, and the
rest is not to be continued. One x for all keeps the means linear in H, as they must be, and the
test loss a quadratic in the rate of one step at test time.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import namespace, settled, working_dtype
from negmaml._core.batching import in_blocks, mapped_by
from negmaml._core.checks import check_nonnegative
from negmaml._core.jit import concrete, quick_jit
from negmaml._core.pytree import pytree, static
from negmaml._core.settings import own_settings
from negmaml.problem import MixedLinearRegression, adapted
from negmaml.rules import Rule, flat_batch
from negmaml.theory.anisotropic.compression import Eigenvalues, compress
from negmaml.theory.anisotropic.equations import FourthMoments, PencilSystem
from negmaml.theory.anisotropic.moments import expand, solve_and_linearize
from negmaml.theory.anisotropic.outliers import largest_directions
from negmaml.theory.isotropic.inputs import check_spectral, is_zero

# As in `negmaml.theory.isotropic.moments`: beyond it the ridge alone keeps the mean finite.
LARGEST_RIDGED_POLE = 0.5
# Of a polynomial in place of a filter.
LARGEST_PENCIL_ERROR = 0.01
# Rules evaluated at once.
BLOCK = 64


@pytree
class AnisotropicInputs:
    """A problem with covariances and a ridge, along the eigenvectors of the input covariance.

    spectrum: s, o, d of `problem.modes` and the forms wanted after that of Sigma itself, condensed.
    still: those forms in directions without any input, in which nothing moves, (J,). The rest are
    scalars, all traced.
    covariance: of `FourthMoments`, or None.
    ridged: whether the ridge may be above zero, static.
    train_train: whether the outer loss is on the
        training points themselves, static; n_v is n_t then.
    """

    spectrum: Eigenvalues
    still: Any
    m: Any
    n_t: Any
    n_v: Any
    sigma: Any
    meta_ridge: Any
    covariance: Any = None
    ridged: bool = static(default=False)
    train_train: bool = static(default=False)

    def system(self, rule: Rule) -> PencilSystem:
        """With a rule of scalar parameters."""
        pencil = rule.pencil_on(largest_eigenvalue(self.spectrum, self.n_t))
        if self.train_train:
            pencil = dataclasses.replace(pencil, coupling=pencil.coupling * self._felt())
            pencil = pencil.for_train_train()
        numbers = self.m, self.n_t, self.n_v, self.sigma, self.meta_ridge
        ranges = self.spectrum.ranges
        fourth_moments = None if ranges is None else FourthMoments(ranges, self.covariance)
        return PencilSystem(*self.spectrum[:-1], *numbers, pencil, fourth_moments)

    def _felt(self):
        """Zero where an outer loss on the training points does not see the rule, else one.

        Without ridge and with fewer points than directions omega* fits the labels themselves,
        whatever the rule: rows and labels are both multiplied by b(K), which has an inverse. The
        equations have spurious roots there if b vanishes within the spectrum.
        """
        seen = (self.m * self.n_v >= jnp.sum(self.spectrum.count)) | (self.meta_ridge > 0)
        return jnp.where(seen, 1.0, 0.0).astype(self.spectrum.s.dtype)


class Prediction(NamedTuple):
    """Of the rule's shape: forms and their limits with a last axis of forms, (..., J).

    converged: whether the equations were solved; where not, the numbers are NaN.
    """

    forms: jax.Array
    task_error: jax.Array
    limit: jax.Array
    converged: jax.Array


def inputs_from_spectrum(
    s, o, d, weights, *numbers: Any, ridged: bool, fourth_moments=None
) -> AnisotropicInputs:
    """The situation of eigenvalues and weights of forms, (J, p), and the other numbers in order."""
    xp = namespace(s, o, d, weights)
    still = xp.sum(xp.where(s > 0, 0, weights * d), -1)
    ranges, covariance = (None, None) if fourth_moments is None else fourth_moments
    # The first form is the reference of the resummation.
    spectrum = compress(s, o, d, xp.concatenate([s[None], weights]), ranges)
    m, n_t, n_v, sigma, meta_ridge = numbers
    return AnisotropicInputs(spectrum, still, m, n_t, n_v, sigma, meta_ridge, covariance, ridged)


def make_inputs(
    problem: MixedLinearRegression,
    train: Rule,
    meta_ridge,
    weights,
    train_train: bool = False,
    fourth_moments: FourthMoments | None = None,
):
    """(the situation, the rule), all of one dtype; or a clear error."""
    check_nonnegative("meta_ridge", meta_ridge, "a ridge strength")
    check_spectral("train", train)
    s, o, d, _ = problem.modes
    dtype = working_dtype(train, s, o, d, weights, problem.sigma, meta_ridge)
    n_v = problem.n_t if train_train else problem.n_v
    numbers = problem.m, problem.n_t, n_v, problem.sigma, meta_ridge
    *spectrum, fourth_moments = settled((s, o, d, weights, fourth_moments), np.float64)
    ridged = not is_zero(meta_ridge)
    situation = inputs_from_spectrum(
        *spectrum, *numbers, ridged=ridged, fourth_moments=fourth_moments
    )
    situation = dataclasses.replace(situation, train_train=train_train)
    if concrete((situation, train)):
        _check_pencil(situation, settled(train, dtype))
    return settled((situation, train), dtype)


def _check_pencil(at: AnisotropicInputs, train: Rule) -> None:
    """Raise where a rule has a pencil only nearly, and not nearly enough."""
    if type(train).pencil_error is Rule.pencil_error:  # none
        return
    largest = largest_eigenvalue(at.spectrum, at.n_t)
    flat = jax.tree.map(np.asarray, flat_batch(train))
    for i in range(math.prod(train.batch_shape)):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], flat)
        error = one.pencil_error(largest)
        if error > LARGEST_PENCIL_ERROR:
            raise ValueError(
                f"train must be closer to a polynomial for a problem with covariances, got {one!r}:"
                f" the polynomial in its place is off by {float(error):.1%} on eigenvalues of S up "
                f"to {float(largest):.3g}; give a smaller {one.tuned}, several gradient steps, or "
                "use simulate"
            )


def largest_eigenvalue(spectrum: Eigenvalues, n):
    """About the largest eigenvalue of S from n rows."""
    xp = namespace(spectrum, n)
    top = xp.max(spectrum.s)
    return top * (1 + xp.sqrt(xp.sum(spectrum.count * spectrum.s) / (top * n))) ** 2


def with_identity_covariance(problem: MixedLinearRegression) -> MixedLinearRegression:
    """The problem with the identity as a covariance where it has none."""
    if not problem.isotropic:
        return problem
    return dataclasses.replace(problem, input_covariance=np.ones(problem.p))


def predict(
    problem: MixedLinearRegression,
    train: Rule,
    meta_ridge,
    weights,
    train_train: bool = False,
    fourth_moments: FourthMoments | None = None,
) -> Prediction:
    """Means of forms with `weights` (J, p) on the eigenvalues of Sigma, and the task error.

    train_train: for an outer loss on the training points themselves; without the task error.
    fourth_moments: fourth moments of inputs that are not Gaussian, on the eigenvalues of Sigma.
    """
    return predict_traced(
        *make_inputs(problem, train, meta_ridge, weights, train_train, fourth_moments)
    )


def predict_traced(at: AnisotropicInputs, rule: Rule) -> Prediction:
    """Sizes are traced, so that one compilation serves every problem of about one p."""
    single = math.prod(rule.batch_shape) == 1 and concrete((at, rule))
    return (_alone if single else _all)(at, rule)


@partial(quick_jit, work="trivial")
def _alone(at: AnisotropicInputs, rule: Rule) -> Prediction:
    """Of a rule of one parameter: `_all` without what batches need, which takes time to trace."""
    found = _of_each(at, jax.tree.map(lambda x: x[0], flat_batch(rule)))
    return _moved(at, rule, jax.tree.map(lambda x: x[None], found))


@quick_jit
def _all(at: AnisotropicInputs, rule: Rule) -> Prediction:
    return _moved(at, rule, jax.vmap(_of_one, (None, 0))(at, flat_batch(rule)))


def _moved(at: AnisotropicInputs, rule: Rule, found: Prediction) -> Prediction:
    """In the rule's shape, with what stays where it was."""
    found = jax.tree.map(lambda x: x.reshape(*rule.batch_shape, *x.shape[1:]), found)
    return found._replace(forms=found.forms + at.still, limit=found.limit + at.still)


@jax.custom_jvp
def _of_one(at: AnisotropicInputs, rule: Rule) -> Prediction:
    """Of a rule of scalar parameters."""
    return _of_many(at, rule)


@_of_one.defjvp
@own_settings
def _of_one_jvp(primals, tangents):
    return jax.jvp(_of_each, primals, tangents)


def _of_each(at: AnisotropicInputs, rule: Rule) -> Prediction:
    found = resummed(at.system(rule), at.ridged)
    error = rule.pencil_error(largest_eigenvalue(at.spectrum, at.n_t))
    if isinstance(error, float):
        return found
    reached = error <= LARGEST_PENCIL_ERROR
    found = jax.tree.map(lambda x: jnp.where(reached, x, jnp.nan), found)
    return found._replace(converged=found.converged == 1)


_of_many = mapped_by(lambda each, stacks, _: in_blocks(each, stacks, BLOCK))(_of_each)


def resummed(system: PencilSystem, ridged: bool) -> Prediction:
    """The means at finite size; infinite where they do not exist, NaN where no root was found."""
    xp = namespace(system)
    at = solve_and_linearize(system, ridged)
    limit, first, fade, converged = expand(system, *at)
    ridge_felt = system.ridge > 0
    own, exact = largest_directions(system, *at)
    rest = first[:-1] - own
    pole = pole_of(system, limit[0], rest[0], fade)
    means = continued(limit[:-1], rest, pole) + exact
    of_error = pole_of(system, limit[-1], first[-1], fade)
    nearest = xp.where(of_error > 0, xp.minimum(of_error, pole), of_error)
    error = continued(limit[-1], first[-1], nearest)
    rows, rank = system.m * system.n_v, xp.sum(system.count)
    unbounded = (rows == rank) & ~ridge_felt
    # A single task whose filter vanishes within the spectrum: the equations have no regular root.
    unbounded |= ~converged & (system.m == 1) & (rows > rank) & ~ridge_felt

    def shown(x):
        return xp.where(unbounded, xp.inf, xp.where(converged, x, xp.nan))

    return Prediction(
        shown(means[1:]), shown(error), xp.where(converged, limit[1:-1], xp.nan), converged
    )


def pole_of(system: PencilSystem, limit, first, fade):
    """x s of this module's head, at most what the distance from the threshold allows."""
    xp = namespace(first)
    x = xp.where(limit == 0, 0, first / xp.where(limit == 0, 1, limit))
    gap = xp.abs(system.m * system.n_v - xp.sum(system.count))
    pole = xp.where(x > 0, xp.minimum(x * fade, 1 / xp.maximum(gap, 1)), x)
    return xp.where(system.ridge > 0, xp.minimum(pole, LARGEST_RIDGED_POLE), pole)


def continued(limit, first, pole):
    """limit + first/(1 - pole)."""
    xp = namespace(first)
    beyond = pole >= 1
    found = limit + first / (1 - xp.where(beyond, 0, pole))
    return xp.where(beyond, xp.where(limit == 0, limit, xp.inf), found)


def weight_error(
    problem: MixedLinearRegression, train: Rule, meta_ridge, train_train: bool = False
):
    """E |omega* - w0|^2, of the rule's shape."""
    return predict(problem, train, meta_ridge, np.ones((1, problem.p)), train_train).forms[..., 0]


def train_task_error(problem: MixedLinearRegression, train: Rule, meta_ridge):
    """The mean squared error on fresh query rows of a training task, of the rule's shape."""
    return predict(problem, train, meta_ridge, problem.modes.s[None]).task_error


def test_loss(
    problem: MixedLinearRegression, train: Rule, adapt: Rule, meta_ridge, train_train: bool = False
):
    """The test loss, of shape train shape + adapt shape."""
    after = adapted(problem, adapt)
    return after.test_loss(predict(problem, train, meta_ridge, after.weights, train_train).forms)
