r"""Functions of a rule that `negmaml.theory.optima` minimises, for problems with covariances.

The rule at test time matters here in training. After one gradient step at test time the loss is a
quadratic in its rate: with A_j the sums tr(Sigma^j Omega) nu^2/p + E (omega* - w0)^T Sigma^j
(omega* - w0),

    2 L = sigma^2 + A_1 - 2 alpha_r A_2
          + alpha_r^2 ( (n_r+1)/n_r A_3 + tr(Sigma^2)/n_r (A_1 + sigma^2) ),

so the best alpha_r is known for every training rule, and the best of both rates is the minimum of a
function of the training rate only.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import canonicalize, contract, namespace, working_dtype
from negmaml._core.pytree import pytree, static
from negmaml.problem import MixedLinearRegression, adapted
from negmaml.rules import InnerRule, check_rule, flat_batch
from negmaml.theory.anisotropic.equations import PencilSystem
from negmaml.theory.anisotropic.inputs import (
    AnisotropicInputs,
    finite_size_means,
    largest_eigenvalue,
    make_inputs,
    predict,
    predict_traced,
)
from negmaml.theory.anisotropic.moments import limiting_means


class BestStepLoss(NamedTuple):
    """The loss at the best rate of one gradient step at test time: the equation of this module.

    n_r: rows. tasks: the sums tr Sigma^j Omega nu^2/p. square: tr Sigma^2.
    """

    n_r: Any
    tasks: Any
    square: Any

    def quadratic(self, sigma, forms):
        """Return (curvature, slope, constant) of 2 L = curvature r^2 - 2 slope r + constant."""
        A, power = self.tasks + forms, self.square / self.n_r
        noisy = A[..., 0] + sigma**2
        return (self.n_r + 1) / self.n_r * A[..., 2] + power * noisy, A[..., 1], noisy

    def best_rate(self, sigma, forms):
        """Return the rate at which the loss is lowest; 0 where it does not depend on the rate."""
        curvature, slope, _ = self.quadratic(sigma, forms)
        xp = namespace(curvature)
        return xp.where(curvature > 0, slope / xp.where(curvature > 0, curvature, 1), 0)

    def lowest(self, sigma, forms):
        """Return 2 L at the best rate."""
        _, slope, constant = self.quadratic(sigma, forms)
        return constant - slope * self.best_rate(sigma, forms)


class FixedAdaptLoss(NamedTuple):
    """The loss of a given rule at test time: floor + coefficients . forms / 2."""

    floor: Any
    coefficients: Any

    def lowest(self, sigma, forms):
        """Return the loss."""
        del sigma
        return self.floor + contract("...j,j->...", forms, self.coefficients) / 2


@pytree
class PencilParts:
    """The arrays that a loss depends on, for every rule; names as in `AnisotropicInputs`.

    goal: a `BestStepLoss` or `FixedAdaptLoss`. Functions over a namespace take it, so that JAX and
    the host have derivatives of the loss in these arrays.
    """

    system: PencilSystem
    null_space_forms: Any
    sigma: Any
    goal: Any
    ridged: bool = static()

    def objective(self):
        """Return the loss, by JAX or on the host."""
        found = finite_size_means(self.system, self.ridged)
        forms, limit = found.forms + self.null_space_forms, found.limit + self.null_space_forms
        return _ordered(forms, limit, self.goal, self.sigma)


class AllVariable(NamedTuple):
    """The fixed part of an objective that is differentiated in all of its numbers."""

    def join(self, variables):
        """Return the objective itself."""
        return variables


class WholeObjective:
    """An objective that is differentiated in all of its numbers, and that needs no preparation."""

    on_host: ClassVar[bool] = False
    by_parts: ClassVar[bool] = True

    def prepared(self):
        """Return the objective itself."""
        return self

    def split(self) -> tuple[Any, AllVariable]:
        """Return (the numbers in which optima are differentiated, the others)."""
        return self, AllVariable()


@pytree
class AnisotropicObjective(WholeObjective):
    """The test loss as a function of the training rule.

    inputs: with the forms that `goal` needs. goal: a `BestStepLoss` or `FixedAdaptLoss`.
    """

    inputs: AnisotropicInputs
    goal: Any

    def loss(self, train: InnerRule):
        """Return the loss, of the rule's shape."""
        found = predict_traced(self.inputs, train)
        return _ordered(found.forms, found.limit, self.goal, self.inputs.sigma)

    def limit(self, train: InnerRule):
        """Return the prediction error E (omega* - w0)^T Sigma (omega* - w0) to leading order."""
        at = self.inputs

        def one(rule):
            # The leading order is finite at the threshold by rounding only.
            infinite = (at.m * at.n_v == jnp.sum(at.spectrum.count)) & (at.meta_ridge == 0)
            error = limiting_means(at.system(rule), at.ridged)[0]
            return jnp.where(infinite, jnp.inf, error)

        return jax.vmap(one)(flat_batch(train))

    def losses_over_ridges(self, train: InnerRule, ridges):
        """Return the loss at each ridge."""
        # Rules are batched already, ridges are not: the solver takes one ridge at a time.
        return jax.vmap(lambda ridge: self.with_ridge(ridge).loss(train))(ridges)

    def parts(self, train: InnerRule) -> PencilParts:
        """Return the arrays that the objective depends on."""
        at = self.inputs
        return PencilParts(at.system(train), at.null_space_forms, at.sigma, self.goal, at.ridged)

    def with_ridge(self, meta_ridge) -> "AnisotropicObjective":
        """Return the objective with another ridge, which may be above zero."""
        inputs = dataclasses.replace(self.inputs, meta_ridge=meta_ridge, ridged=True)
        return AnisotropicObjective(inputs, self.goal)

    def with_sizes(self, m, n_t, n_v, meta_ridge, ridged: bool) -> "AnisotropicObjective":
        """Return the objective with other sizes and another ridge."""
        numbers = dict(m=m, n_t=n_t, n_v=n_v, meta_ridge=meta_ridge, ridged=ridged)
        return AnisotropicObjective(dataclasses.replace(self.inputs, **numbers), self.goal)

    @property
    def largest_eigenvalue(self):
        """About the largest eigenvalue of S in training."""
        return largest_eigenvalue(self.inputs.spectrum, self.inputs.n_t)

    @property
    def ridge_unit(self):
        """The scale of the ridge: n_v m times the mean eigenvalue of the covariance."""
        at, xp = self.inputs, namespace(self.inputs.spectrum)
        s, count = at.spectrum.s, at.spectrum.count
        return at.m * at.n_v * xp.sum(count * s) / xp.sum(count)

    @property
    def at_threshold(self):
        """True where the mean without ridge is infinite; such a loss is above all others here."""
        return np.False_

    @property
    def starts_off(self) -> bool:
        """True if omega_0 differs from w0; otherwise the largest ridge is known to be best."""
        return bool(np.any(np.asarray(self.inputs.spectrum.d) > 0))


def train_objective(
    problem: MixedLinearRegression, train: InnerRule, meta_ridge, adapt: InnerRule | None
) -> tuple[AnisotropicObjective, InnerRule]:
    """Return the loss after `adapt` or, if None, the best step, and the rule, of one dtype."""
    weights, goal = _goal(problem, adapt)
    inputs, train = make_inputs(problem, train, meta_ridge, weights)
    return AnisotropicObjective(inputs, canonicalize(goal, inputs.m.dtype)), train


def best_adapt_step(problem: MixedLinearRegression, train: InnerRule, meta_ridge):
    """Return the rate of the best gradient step at test time, of the training rule's shape."""
    weights, step = _goal(problem, None)
    found = predict(problem, train, meta_ridge, weights)
    return step.best_rate(problem.sigma, found.forms)


@pytree
class AnisotropicAdaptation(WholeObjective):
    """The test loss as a function of the rule at test time."""

    problem: MixedLinearRegression
    train: InnerRule
    meta_ridge: Any

    def loss(self, adapt: InnerRule):
        """Return the loss; one prediction of its forms serves all values of the parameter."""
        after = adapted(self.problem, adapt)
        found = predict(self.problem, self.train, self.meta_ridge, after.weights)
        return after.test_loss(found.forms)

    def parts(self, adapt: InnerRule) -> PencilParts:
        """Return the arrays that the objective depends on."""
        after = adapted(self.problem, adapt)
        at, train = make_inputs(self.problem, self.train, self.meta_ridge, after.weights)
        goal = FixedAdaptLoss(after.floor, after.coefficients)
        return AnisotropicObjective(at, goal).parts(train)

    @property
    def largest_eigenvalue(self):
        """About the largest eigenvalue of S at test time."""
        s = self.problem.modes.s
        top = jnp.max(s)
        return top * (1 + jnp.sqrt(jnp.sum(s) / (top * self.problem.n_r))) ** 2


def adaptation_objective(
    problem: MixedLinearRegression, train: InnerRule, meta_ridge, adapt: InnerRule
) -> tuple[AnisotropicAdaptation, InnerRule]:
    """Return the loss as a function of the rule at test time, and the rule, of one dtype."""
    # All numbers are differentiated, so all of them need one real type.
    dtype = working_dtype(problem, train, adapt, meta_ridge)
    problem, train, adapt, meta_ridge = canonicalize((problem, train, adapt, meta_ridge), dtype)
    return AnisotropicAdaptation(problem, train, meta_ridge), adapt


def _goal(problem: MixedLinearRegression, adapt: InnerRule | None):
    """Return (weights of the forms, the loss as a function of the forms)."""
    if adapt is None:
        s, o, _, _ = problem.modes
        weights = s ** np.arange(1, 4)[:, None]
        square = contract("k,k->", s, s)
        return weights, BestStepLoss(problem.n_r, contract("jk,k->j", weights, o), square)
    after = adapted(problem, check_rule("adapt", adapt))
    if adapt.batch_shape != ():
        raise ValueError(f"adapt must have one scalar parameter, got {adapt!r}")
    # The floor does not depend on the training rule: without it no digits of the rest are lost.
    return after.weights, FixedAdaptLoss(0.0, after.coefficients)


def _ordered(forms, limit, goal, sigma):
    """Return the loss, with values that keep an order where finite sizes make it infinite."""
    xp = namespace(forms)
    # In the order of the limit, and far above every finite loss: a search can leave the region.
    finite = xp.isfinite(forms).all(-1, keepdims=True)
    return goal.lowest(sigma, xp.where(finite, forms, 1e6 * limit))
