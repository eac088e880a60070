r"""The multi-step loss: query losses after every inner step, weighted.

With theta_k the parameters after k of K inner steps, the loss of a task is

    sum_{k = 1}^K w_k loss(theta_k, query).

It is the loss of MAML for w = (0, ..., 0, 1). The query after k steps starts from the state of the
model after k steps; that after all steps gives the new state and the aux.

Source: Antoniou, Edwards and Storkey, "How to train your MAML", ICLR 2019.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from negmaml._core.checks import as_array, check_finite
from negmaml._core.pytree import pytree, static
from negmaml.meta.choice import LossPair
from negmaml.meta.partition import combine
from negmaml.meta.stateful import StatefulRule
from negmaml.rules import InnerRule, Schedule
from negmaml.rules.unroll import last_point, of_same_kind


@pytree
class WeightedSteps:
    """A rule, and the weights of the query losses after each of its steps, (steps,)."""

    rule: InnerRule
    weights: Any

    def __post_init__(self):
        if self.rule.implicit:
            raise TypeError(f"step_weights needs a rule that takes steps, got {self.rule!r}")
        weights = check_finite("step_weights", as_array("step_weights", self.weights), "weights")
        if jnp.shape(weights) != (self.rule.steps,):
            raise ValueError(
                f"step_weights must have a weight for each of the {self.rule.steps} steps of the "
                f"rule, got shape {jnp.shape(weights)}"
            )
        object.__setattr__(self, "weights", jnp.asarray(weights))


def split_weights(rule) -> tuple[InnerRule, Any]:
    """Return (rule, weights of its steps), None for a rule without weights."""
    return (rule.rule, rule.weights) if isinstance(rule, WeightedSteps) else (rule, None)


@pytree
class _SummingRule(InnerRule):
    """A rule on points (point, total) that adds the weighted query loss after each step."""

    rule: StatefulRule
    weight: Any
    query_loss: Callable = static()

    @property
    def steps(self):  # type: ignore[override]
        """The number of steps of the rule."""
        return self.rule.steps

    def init(self, point):
        """The first state of the optimizer."""
        return self.rule.init(point[0])

    def update(self, gradient, state, point):
        """A step of the rule, and the loss after it."""
        point, total = point
        point, state = self.rule.update(gradient, state, point)
        value = self.query_loss(point)
        return (point, total + self.weight.astype(value.dtype) * value), state


def multi_step_loss(losses: LossPair, rule: InnerRule, gradient: Callable, start, frozen, query):
    """Return (multi-step loss, (aux, new state, None)) of one task.

    gradient: of the inner loss at (parameters, state), as from `inner_gradient`. start: the first
    of these points.
    """

    def at_query(point):
        theta, state = point
        return losses.outer(combine(theta, frozen), state, query)

    # The rule of a `ParamsAndRule` may have another number of steps than that of the algorithm.
    weights = WeightedSteps(rule, losses.step_weights).weights
    summing = _SummingRule(StatefulRule(rule), Schedule(weights), lambda point: at_query(point)[0])
    none = jnp.zeros((), jax.eval_shape(at_query, start)[0].dtype)
    at_point = of_same_kind(gradient, lambda point, *number: gradient(point[0], *number))
    last, total = last_point(summing, at_point, (start, none), losses.unroll)
    # The loss at this point is in the total. XLA drops here what only the loss needs.
    _, new, aux = at_query(last)
    return total, (aux, new, None)
