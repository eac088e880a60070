r"""Models with a state besides their parameters: running statistics, counters, random keys.

Every task starts from the common state, with random keys of its own. Each inner step replaces the
state by the new one of the loss, and the loss on the query starts from the last. The common state
is then the mean over tasks of the final states. Counters and other integers are those of the first
task. For a separate state at every inner step, as in
MAML++, see `per_step_state`.

A rule that solves an inner problem, such as `Proximal`, holds the state fixed while it solves. The
new state is then that of one evaluation at the solution.

Everything below the public functions works on `LiftedLoss`, one form for losses of all models.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from negmaml._core.keys import is_typed_key
from negmaml._core.pytree import pytree
from negmaml.meta.model_variables import Form, next_common_key
from negmaml.meta.partition import Loss
from negmaml.rules import InnerRule


@dataclass(frozen=True)
class LiftedLoss:
    """The loss of a model as (floating point leaves, state, data) -> (value, new state, aux).

    form: that of the model. has_aux: whether a loss that returns no state returns (value, aux).
    """

    loss: Loss
    form: Form
    has_aux: bool = False

    def __call__(self, floats, state, data):
        arguments = self.form.arguments(floats, state)
        return self.form.outcome(arguments, state, self.loss(*arguments, data), self.has_aux)


@pytree
class StatefulRule(InnerRule):
    """A rule on points (parameters, model state), whose gradients are (gradient, new state)."""

    rule: Any

    @property
    def steps(self):  # type: ignore[override]
        """The number of steps of the rule."""
        return self.rule.steps

    def init(self, point):
        """The first state of the optimizer."""
        return self.rule.init(point[0])

    def update(self, gradient, optimizer_state, point):
        """Update the parameters, and take the model state that came with the gradient."""
        (slope, model_state), (params, _) = gradient, point
        params, optimizer_state = self.rule.update(slope, optimizer_state, params)
        return (params, model_state), optimizer_state


class StepCount(NamedTuple):
    """Counters in a state: the inner step that comes next, and the meta-steps so far."""

    inner: Any
    outer: Any


def mean_state(start, states):
    """Return the common state after a meta-step, from that before it and those of all tasks."""

    def common(before, leaf):
        if isinstance(leaf, StepCount):  # the next tasks start from the state of the first step
            return StepCount(jnp.zeros_like(before.inner), before.outer + 1)
        if is_typed_key(leaf):
            return next_common_key(before)
        return jnp.mean(leaf, 0) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf[0]

    return jax.tree.map(common, start, states, is_leaf=_is_count)


def _is_count(node) -> bool:
    return isinstance(node, StepCount)
