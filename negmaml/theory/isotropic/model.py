"""The theory of isotropic problems as a `negmaml.theory.model.TheoryModel`."""

import dataclasses
import math
from abc import ABC, abstractmethod
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.arrays import namespace
from negmaml._core.jit import is_concrete, jit_fast_compile, on_host
from negmaml._core.platform import with_plan
from negmaml.problem.adapted_loss import (
    expected_isotropic_loss,
    rms_filters,
    scale_by_filter_sq,
)
from negmaml.problem.model import MixedLinearRegression
from negmaml.rules import InnerRule, flat_batch
from negmaml.theory.isotropic.inputs import IsotropicInputs, is_zero, isotropic_inputs
from negmaml.theory.isotropic.logarithms import times_exp_2log
from negmaml.theory.isotropic.moments import (
    Moments,
    compiled_filters,
    compiled_mean,
    rule_moments,
)
from negmaml.theory.isotropic.objective import (
    IsotropicAdaptation,
    IsotropicObjective,
    adaptation_objective,
    best_adapt_step,
)
from negmaml.theory.isotropic.spectral_density import EXACT_UP_TO
from negmaml.theory.isotropic.variance import ON_HOST, Covariance, covariance, deviation

# Rates up to which a trace holds them in its own program.
FEW_RATES = 256


@dataclasses.dataclass(frozen=True)
class IsotropicMeans(ABC):
    """An isotropic problem with a ridge, and all means that follow from its weight error.

    By rotational symmetry every quadratic form of omega* - w0 is a multiple of |omega* - w0|^2, so
    one mean serves every rule at test time.
    """

    problem: MixedLinearRegression
    meta_ridge: Any = 0.0

    @abstractmethod
    def weight_error(self, train: InnerRule):
        """Return E|omega* - w0|^2, of the rule's shape."""

    def require_finite_mean(self) -> None:
        """Raise ValueError at p = n_v m without ridge, where every mean is infinite."""
        if self.problem.p == self.problem.rows and is_zero(self.meta_ridge):
            raise ValueError(
                f"p = n_v m = {self.problem.p}: without meta_ridge every mean is infinite there; "
                "give a meta_ridge, or change p, m or n_v"
            )

    def test_loss(self, train: InnerRule, adapt: InnerRule):
        """Return the test loss, of train shape + adapt shape."""
        return expected_isotropic_loss(self.problem, self.weight_error(train), adapt)

    def best_adapt_step(self, train: InnerRule):
        """Return the rate of the best gradient step at test time, of the training rule's shape."""
        return best_adapt_step(self.problem, self.weight_error(train))

    def adaptation_objective(
        self, train: InnerRule, adapt: InnerRule
    ) -> tuple[IsotropicAdaptation, InnerRule]:
        """Return the test loss as a function of the rule at test time, and that rule."""
        return adaptation_objective(self.problem, self.weight_error(train), adapt)


@dataclasses.dataclass(frozen=True)
class IsotropicModel(IsotropicMeans):
    """The proportional theory of an isotropic problem: means, and variances likewise.

    measure: the spectrum of a task, as in `negmaml.theory.test_loss`.
    """

    measure: str = "auto"

    # The smallest n_t have the exact spectrum, which is known for integers only.
    num_exact_sizes: ClassVar[int] = EXACT_UP_TO

    def at_spectrum(self, n_t: int, measure: str) -> "IsotropicModel":
        """Return the model with the spectrum of another n_t."""
        problem = dataclasses.replace(self.problem, n_t=n_t)
        return dataclasses.replace(self, problem=problem, measure=measure)

    def moments(self, train: InnerRule) -> Moments:
        """Return the weight error, its limit and the corrections, without the task error."""
        inputs, train = self.inputs(train)
        return _moments(inputs, train, with_task_error=False)

    def weight_error(self, train: InnerRule):
        """Return E|omega* - w0|^2, of the rule's shape."""
        return _mean("weight_error", *self.inputs(train))

    def train_task_error(self, train: InnerRule):
        """Return tau^2, of the rule's shape."""
        # Ten nodes are too few for a filter that varies by powers of ten within the spectrum.
        law = "marchenko-pastur" if self.measure == "auto" else self.measure
        inputs, train = dataclasses.replace(self, measure=law).inputs(train)
        return _mean("train_task_error", inputs, train)

    def loss_terms(self, train: InnerRule, adapt: InnerRule) -> tuple[Any, Any, Any]:
        """Return the test loss of w0 itself, of omega*, and of omega* to leading order."""
        found = self.moments(train)
        # w0 itself has no error; its loss is the floor under every prediction.
        errors = jnp.zeros_like(found.limit), found.weight_error, found.limit
        floor, loss, limit = (expected_isotropic_loss(self.problem, x, adapt) for x in errors)
        return floor, loss, limit

    def deviations(self, train: InnerRule, adapt: InnerRule) -> tuple[Any, Any]:
        """Return the standard deviations of |omega* - w0|^2 and of the expected test loss."""
        inputs, rules = isotropic_inputs(self.problem, (train,), self.meta_ridge, self.measure)
        found = covariance(inputs, rules)
        return _deviations(found.values, found.log_units[0], adapt, self.problem)

    def loss_covariance(
        self, train_a: InnerRule, train_b: InnerRule, adapt: InnerRule | None
    ) -> tuple[Covariance, Covariance, Covariance]:
        """Return the covariances of the losses of a, b, and a with b, up to a common factor.

        The rule at test time scales the losses of both rules alike, so it is not needed.
        """
        del adapt
        pairs = (train_a,), (train_b,), (train_a, train_b)
        a, b, both = (
            covariance(*isotropic_inputs(self.problem, rules, self.meta_ridge, self.measure))
            for rules in pairs
        )
        return a, b, both

    def train_objective(
        self, train: InnerRule, adapt: InnerRule | None
    ) -> tuple[IsotropicObjective, InnerRule]:
        """Return the weight error as a function of the training rule, and that rule."""
        del adapt  # it scales the weight error and drops out
        inputs, train = self.inputs(train)
        return IsotropicObjective(inputs), train

    def inputs(self, train: InnerRule) -> tuple[IsotropicInputs, InnerRule]:
        """Return the numbers of the problem and the rule, all of one dtype."""
        inputs, (train,) = isotropic_inputs(self.problem, (train,), self.meta_ridge, self.measure)
        return inputs, train


def _deviations(variance, unit, adapt: InnerRule, problem: MixedLinearRegression):
    """Return the deviations of the weight error and of the loss h/2 |omega* - w0|^2."""

    @on_host
    def deviations(variance, unit, adapt):
        xp = namespace(variance, unit, adapt)
        shrink, _, exists = rms_filters(adapt, problem.n_r, problem.p)
        of_weights = times_exp_2log(deviation(variance), unit)
        of_loss = scale_by_filter_sq(of_weights / 2, shrink)
        return of_weights, xp.where(exists | (of_loss == 0), of_loss, xp.inf)

    return deviations(variance, unit, adapt)


def _mean(name: str, inputs: IsotropicInputs, train: InnerRule):
    """Return one field of `Moments`, of the rule's shape."""
    # A long batch is a program of its own even in a trace: its blocks keep memory small.
    if is_concrete((inputs, train)) or math.prod(train.batch_shape) > FEW_RATES:
        return getattr(_moments(inputs, train, name == "train_task_error"), name)
    return compiled_mean(compiled_filters(inputs, train), inputs.ridged, name)


def _moments(inputs: IsotropicInputs, train: InnerRule, with_task_error: bool) -> Moments:
    # NumPy is done with this many rates before a program would be compiled.
    if math.prod(train.batch_shape) <= ON_HOST and is_concrete((inputs, train)):
        return on_host(rule_moments)(inputs, train, with_task_error=with_task_error)
    return _compiled(inputs, train, with_task_error=with_task_error)


@partial(jit_fast_compile, static_argnames="with_task_error")
def _compiled(inputs: IsotropicInputs, rule: InnerRule, with_task_error: bool) -> Moments:
    """Return the moments of a long batch. Sizes are traced: one program serves every problem."""
    one = partial(rule_moments, inputs, with_task_error=with_task_error)
    count = math.prod(rule.batch_shape)
    results = with_plan(
        lambda sizes: min(sizes.rules, count),
        lambda size: lax.map(one, flat_batch(rule), batch_size=size),
    )
    return jax.tree.map(lambda x: x.reshape(rule.batch_shape), results)
