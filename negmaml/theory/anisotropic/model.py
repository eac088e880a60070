"""The theory of problems with covariances as a `negmaml.theory.model.TheoryModel`."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import contract
from negmaml.problem import MixedLinearRegression, adapted
from negmaml.rules import InnerRule, check_scalar_rule
from negmaml.theory.anisotropic.inputs import AnisotropicInputs, Prediction, make_inputs, predict
from negmaml.theory.anisotropic.objective import (
    AnisotropicAdaptation,
    AnisotropicObjective,
    adaptation_objective,
    best_adapt_step,
    train_objective,
)
from negmaml.theory.anisotropic.variance import covariances
from negmaml.theory.isotropic.inputs import is_zero
from negmaml.theory.isotropic.variance import Covariance


@dataclasses.dataclass(frozen=True)
class AnisotropicModel:
    """A problem with covariances and a ridge.

    Every mean and variance wanted is one of quadratic forms (omega* - w0)^T H (omega* - w0), with H
    a function of the input covariance that is given by its values on the eigenvalues, (J, p).

    train_train: True for an outer loss on the training points themselves.
    """

    problem: MixedLinearRegression
    meta_ridge: Any = 0.0
    train_train: bool = False

    num_exact_sizes: ClassVar[int] = 0  # every n_t is a real number

    def at_spectrum(self, n_t: int, measure: str) -> "AnisotropicModel":
        """Return the model itself: its spectrum is that of the covariance."""
        del n_t, measure
        return self

    def require_finite_mean(self) -> None:
        """Raise ValueError at rank Sigma = n_v m without ridge, where every mean is infinite."""
        s = self.problem.modes.s
        if isinstance(s, jax.core.Tracer) or not is_zero(self.meta_ridge):
            return
        rank = int(np.sum(np.asarray(s) > 0))
        if rank == self.problem.rows:
            raise ValueError(
                f"n_v m = {rank}, the number of directions with inputs: without meta_ridge every "
                "mean is infinite there; give a meta_ridge, or change m or n_v"
            )

    def moments(self, train: InnerRule, weights) -> Prediction:
        """Return the means of quadratic forms, by their weights (J, p), and the task error."""
        return predict(self.problem, train, self.meta_ridge, weights, self.train_train)

    def weight_error(self, train: InnerRule):
        """Return E|omega* - w0|^2, of the rule's shape."""
        return self.moments(train, np.ones((1, self.problem.p))).forms[..., 0]

    def train_task_error(self, train: InnerRule):
        """Return tau^2, of the rule's shape."""
        return self.moments(train, self.problem.modes.s[None]).task_error

    def test_loss(self, train: InnerRule, adapt: InnerRule):
        """Return the test loss, of train shape + adapt shape."""
        after = adapted(self.problem, adapt)
        return after.test_loss(self.moments(train, after.weights).forms)

    def loss_terms(self, train: InnerRule, adapt: InnerRule) -> tuple[Any, Any, Any]:
        """Return the test loss of w0 itself, of omega*, and of omega* to leading order."""
        after = adapted(self.problem, adapt)
        found = self.moments(train, after.weights)
        return after.floor, after.test_loss(found.forms), after.test_loss(found.limit)

    def deviations(self, train: InnerRule, adapt: InnerRule) -> tuple[Any, Any]:
        """Return the standard deviations of |omega* - w0|^2 and of the expected test loss."""
        after = adapted(self.problem, adapt)
        # The first form is |omega* - w0|^2 itself, the others are those of the loss.
        weights = jnp.concatenate([jnp.ones((1, self.problem.p)), after.weights])
        inputs, train = self.inputs(train, weights)
        found, growth, _ = covariances(inputs, train, None)
        # The loss is coefficients . forms / 2, so its variance is a quadratic form of theirs.
        flat = after.coefficients.reshape(-1, len(after.weights))
        losses = contract("rj,...jk,rk->...r", flat, found[..., 1:, 1:], flat) / 4
        losses = (losses * growth[..., None]).reshape(train.batch_shape + adapt.batch_shape)
        return jnp.sqrt(found[..., 0, 0] * growth), jnp.sqrt(losses)

    def loss_covariance(
        self, train_a: InnerRule, train_b: InnerRule, adapt: InnerRule | None
    ) -> tuple[Covariance, Covariance, Covariance]:
        """Return the covariances of the losses of a, b, and a with b."""
        if adapt is None:
            raise ValueError(
                "adapt must be given for a problem with covariances, where it matters which "
                "directions scatter: a rule such as GradientDescent(0.2)"
            )
        after = adapted(self.problem, check_scalar_rule("adapt", adapt))
        form = contract("j,jk->k", after.coefficients, after.weights)[None] / 2
        inputs, train_a = self.inputs(train_a, form)
        # Both rules see the same inputs; only the rule is converted a second time.
        _, train_b = self.inputs(train_b, form)
        pairs = (train_a, None), (train_b, None), (train_a, train_b)
        a, b, both = (
            Covariance(found[0, 0] * growth, (0.0, 0.0), means[0])
            for found, growth, means in (covariances(inputs, *pair) for pair in pairs)
        )
        return a, b, both

    def best_adapt_step(self, train: InnerRule):
        """Return the rate of the best gradient step at test time, of the training rule's shape."""
        return best_adapt_step(self.problem, train, self.meta_ridge)

    def adaptation_objective(
        self, train: InnerRule, adapt: InnerRule
    ) -> tuple[AnisotropicAdaptation, InnerRule]:
        """Return the test loss as a function of the rule at test time, and that rule."""
        return adaptation_objective(self.problem, train, self.meta_ridge, adapt)

    def train_objective(
        self, train: InnerRule, adapt: InnerRule | None
    ) -> tuple[AnisotropicObjective, InnerRule]:
        """Return the loss after `adapt`, or after the best step, as a function of the rule."""
        return train_objective(self.problem, train, self.meta_ridge, adapt)

    def inputs(self, train: InnerRule, weights) -> tuple[AnisotropicInputs, InnerRule]:
        """Return the numbers of the problem and the rule, all of one dtype."""
        return make_inputs(self.problem, train, self.meta_ridge, weights, self.train_train)
