"""Functions of a rule that `negmaml.theory.optima` minimises, for isotropic problems."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from negmaml._core.arrays import canonicalize, namespace
from negmaml._core.jit import on_host
from negmaml._core.pytree import pytree, static
from negmaml.problem.adapted_loss import expected_isotropic_loss
from negmaml.problem.model import MixedLinearRegression
from negmaml.rules import InnerRule
from negmaml.theory.isotropic.inputs import IsotropicInputs
from negmaml.theory.isotropic.moments import (
    EvaluatedRule,
    Moments,
    limiting_weight_error,
    rule_moments,
    solve_moments,
)
from negmaml.theory.isotropic.saddle_point import TrainingSet, training_set

# Numbers of the inputs in which optima are differentiated; sizes and the spectrum are fixed.
VARIABLES = ("sigma", "nu", "offset", "meta_ridge")


@pytree
class IsotropicParts:
    """The arrays that the weight error depends on, whatever the rule.

    training: the training set with the values of the rule's filters.
    ridged: as in `IsotropicInputs`.
    """

    training: TrainingSet
    ridged: bool = static()

    def objective(self):
        """Return the weight error, with JAX or on the host."""
        # Whether a mean exists has no derivative, so the parts do not carry it.
        exists, diverges = np.True_, np.False_
        return _ordered(
            solve_moments(EvaluatedRule(self.training, exists, diverges, 0.0), self.ridged)
        )


@pytree
class IsotropicObjective:
    """The weight error as a function of the training rule.

    The rule at test time multiplies it by a positive number, so its minimum is that of the test
    loss for every such rule.
    """

    inputs: IsotropicInputs
    on_host: ClassVar[bool] = True
    by_parts: ClassVar[bool] = True

    def loss(self, train: InnerRule):
        """Return the weight error, of the rule's shape."""
        return _ordered(rule_moments(self.inputs, train))

    def limit(self, train: InnerRule):
        """Return the weight error to leading order, of the rule's shape."""
        return limiting_weight_error(training_set(self.inputs, train), self.inputs.ridged)

    def losses_over_ridges(self, train: InnerRule, ridges):
        """Return the weight error at each ridge."""
        # Ridges broadcast like a batch of rules, so one evaluation serves all.
        return _ordered(rule_moments(self.inputs.with_ridge(ridges), train))

    def parts(self, train: InnerRule) -> IsotropicParts:
        """Return the arrays that the objective depends on."""
        return IsotropicParts(training_set(self.inputs.with_spectrum(), train), self.inputs.ridged)

    def with_ridge(self, meta_ridge) -> "IsotropicObjective":
        """Return the objective with another ridge, which may be above zero."""
        return IsotropicObjective(self.inputs.with_ridge(meta_ridge))

    def with_sizes(self, m, n_t, n_v, meta_ridge, ridged: bool) -> "IsotropicObjective":
        """Return the objective with other sizes and another ridge."""
        numbers = dict(m=m, n_t=n_t, n_v=n_v, meta_ridge=meta_ridge, ridged=ridged)
        return IsotropicObjective(dataclasses.replace(self.inputs, **numbers))

    def prepared(self) -> "IsotropicObjective":
        """Return the objective with its quadrature computed, for many evaluations."""
        return IsotropicObjective(self.inputs.with_spectrum())

    @property
    def largest_eigenvalue(self):
        """About the largest eigenvalue of S in training."""
        n, p = self.inputs.n_t, self.inputs.p
        return (1 + namespace(n, p).sqrt(p / n)) ** 2

    @property
    def ridge_unit(self):
        """The scale of the ridge: n_v m times the mean eigenvalue, one, of the covariance."""
        return self.inputs.rows

    @property
    def at_threshold(self):
        """True where the mean without ridge is infinite, whatever the rule."""
        return self.inputs.p == self.inputs.rows

    @property
    def starts_off(self) -> bool:
        """True if omega_0 differs from w0; otherwise the largest ridge is known to be best."""
        return bool(np.any(np.asarray(self.inputs.offset) > 0))

    def split(self) -> tuple[Any, "IsotropicObjective"]:
        """Return (the numbers in which optima are differentiated, the objective)."""
        return {name: getattr(self.inputs, name) for name in VARIABLES}, self

    def join(self, variables) -> "IsotropicObjective":
        """Return the objective with other values of the numbers from `split`."""
        return IsotropicObjective(dataclasses.replace(self.inputs, **variables))


def _ordered(moments: Moments):
    """Return the weight error; where finite sizes make it infinite, a number above all others.

    These numbers are in the order of the limit, so that a search can leave the region.
    """
    xp = namespace(moments.weight_error)
    # Large enough to exceed every finite error, and times the limit still a number.
    beyond = float(xp.finfo(moments.limit.dtype).max) ** 0.5
    return xp.where(xp.isfinite(moments.weight_error), moments.weight_error, beyond * moments.limit)


@pytree
class IsotropicAdaptation:
    """The test loss as a function of the rule at test time, at a given weight error.

    sizes: (n_r, p).
    """

    problem: MixedLinearRegression | None
    weight_error: Any
    sizes: tuple[Any, Any]
    on_host: ClassVar[bool] = True
    by_parts: ClassVar[bool] = False

    def loss(self, adapt: InnerRule):
        """Return the test loss, of the rule's shape."""
        assert self.problem is not None
        return expected_isotropic_loss(self.problem, self.weight_error, adapt)

    def prepared(self) -> "IsotropicAdaptation":
        """Return the objective itself."""
        return self

    @property
    def largest_eigenvalue(self):
        """About the largest eigenvalue of S at test time."""
        n_r, p = self.sizes
        return (1 + namespace(n_r, p).sqrt(p / n_r)) ** 2

    def split(self) -> tuple[Any, "IsotropicAdaptation"]:
        """Return (the numbers in which optima are differentiated, the sizes)."""
        fixed = IsotropicAdaptation(None, None, self.sizes)
        return (self.problem, self.weight_error), fixed

    def join(self, variables) -> "IsotropicAdaptation":
        """Return the objective with other values of the numbers from `split`."""
        problem, weight_error = variables
        return IsotropicAdaptation(problem, weight_error, self.sizes)


def adaptation_objective(
    problem: MixedLinearRegression, weight_error, adapt: InnerRule
) -> tuple[IsotropicAdaptation, InnerRule]:
    """Return the objective and the rule, all of the dtype of the weight error."""
    # Sizes as arrays: traced, they do not compile a program for every n_r.
    sizes = canonicalize((problem.n_r, problem.p), weight_error.dtype)
    problem, weight_error, adapt = canonicalize((problem, weight_error, adapt), weight_error.dtype)
    return IsotropicAdaptation(problem, weight_error, sizes), adapt


@on_host
def best_adapt_step(problem: MixedLinearRegression, weight_error):
    """Return the rate of one gradient step at test time at which the loss is lowest.

    With E = nu^2 + E|omega* - w0|^2, E/(E (1 + (p+1)/n_r) + sigma^2 p/n_r).
    """
    p, n_r = problem.p, problem.n_r
    xp = namespace(problem, weight_error)
    total, noise = problem.nu**2 + weight_error, problem.sigma**2 * p / n_r
    # Without signal and noise every rate is best: the limit of no noise is returned, and the same
    # for an infinite weight error.
    nothing, infinite = (total == 0) & (noise == 0), xp.isinf(total)
    total, noise = xp.where(nothing | infinite, 1.0, total), xp.where(infinite, 0.0, noise)
    return total / (total * (1 + (p + 1) / n_r) + noise)
