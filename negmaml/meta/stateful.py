r"""Models with a state besides their parameters: running statistics, counters, random keys.

The parameters are `Stateful(params, state)` and a loss is a function

    loss(params, state, data) -> (value, new state)           or (value, new state, aux)

Every task starts from the common state. Each inner step replaces it by the new state of the loss,
and the loss on the query starts from the last. The common state is then the mean over tasks of the
final states. Leaves that are not floating point, such as counters and keys, are those of the first
task. For a separate state at every inner step, as in MAML++, see `per_step_state`.

Everything below the public functions works on `lift_loss`, one form for losses with and without a
state. A loss without one has the state `()`, which has no leaves and so costs nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from negmaml._core.checks import check_callable, check_count
from negmaml._core.pytree import pytree
from negmaml.meta.partition import Loss, check_scalar, combine
from negmaml.rules import InnerRule


class Stateful(NamedTuple):
    """Parameters that train, and the state of the model that its loss updates.

    Pass it as `params` to `adapt`, `fit`, `evaluate` or an algorithm. The loss is then a function
    of (params, state, data) that returns (value, new state) or (value, new state, aux).
    """

    params: Any
    state: Any


def as_stateful(params) -> Stateful:
    """Return `params` with the state as arrays; `()` is the state of a model without one."""
    if not isinstance(params, Stateful):
        return Stateful(params, ())
    return Stateful(params.params, jax.tree.map(jnp.asarray, params.state))


def lift_loss(loss: Loss, static, stateful: bool, has_aux: bool = False) -> Callable:
    """Return the loss as (floating point leaves, state, data) -> (value, new state, aux).

    Arguments:
        static: the leaves of the parameters that are not floating point.
        stateful: whether `loss` is a function of (params, state, data).
        has_aux: whether a loss without state returns (value, aux).
    """
    # Most models have no static leaves, and then the tree is not rebuilt.
    has_static = bool(jax.tree.leaves(static))

    def lifted(floats, state, data):
        params = combine(floats, static) if has_static else floats
        if not stateful:
            value, aux = check_scalar(loss(params, data), has_aux)
            return value, state, aux
        value, new, aux = _unpack(loss(params, state, data))
        return value, _cast_like(new, state), aux

    return lifted


def _unpack(result) -> tuple[Any, Any, Any]:
    """Return (value, new state, aux) of a loss with state; aux is None when it has none."""
    if not (isinstance(result, tuple) and len(result) in (2, 3)):
        raise TypeError(
            "the loss of Stateful parameters must return (value, new state) or (value, new state, "
            f"aux), got {type(result).__name__}"
        )
    # The aux of a loss with state needs no has_aux: it is the third of three.
    value, new, *aux = result
    check_scalar(value, False)
    return value, new, aux[0] if aux else None


def _cast_like(new, state):
    """Return the new state in the dtypes of the old one; raise where its structure differs.

    A scan over inner steps needs the same types before and after a step.
    """
    try:
        return jax.tree.map(lambda n, old: jnp.asarray(n, jnp.result_type(old)), new, state)
    except ValueError as mismatch:
        raise ValueError(
            f"the loss must return a state like the one it is given, "
            f"{jax.tree.structure(state)}, got {jax.tree.structure(new)}"
        ) from mismatch


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


@pytree
class _Step:
    """The number of the inner step whose state comes next, within a `per_step_state`."""

    number: Any


def mean_state(states):
    """Return the common state after a meta-step, from the states of all tasks, stacked."""

    def common(leaf):
        if isinstance(leaf, _Step):  # the next tasks start from the state of the first step
            return _Step(jnp.zeros_like(leaf.number[0]))
        return jnp.mean(leaf, 0) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf[0]

    return jax.tree.map(common, states, is_leaf=lambda node: isinstance(node, _Step))


def per_step_state(loss: Callable, steps: int) -> tuple[Callable, Callable]:
    r"""Return (loss, init) with a separate state for each of `steps` inner steps and the query.

    The new state is a stack of steps + 1 states and the number of the step. `init` makes it from
    one state. Statistics of batch normalisation are then those of one step of adaptation. Steps
    beyond `steps` share the last state. Source: Antoniou, Edwards and Storkey, "How to train your
    MAML", ICLR 2019.

    >>> count = lambda w, state, x: ((w - x) ** 2, state + 1)
    >>> loss, init = per_step_state(count, steps=1)
    >>> stack, _ = loss(0.0, init(jnp.zeros(())), 1.0)[1]
    >>> stack.tolist()
    [1.0, 0.0]
    """
    check_callable("loss", loss, "of (params, state, data)")
    last = check_count("steps", steps)

    # One state for each inner step and one for the query, alike at the start.
    def init(state):
        stack = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * (last + 1)), state)
        return stack, _Step(jnp.asarray(0))

    def stepped(params, state, data):
        stack, step = state
        # Evaluation may take more steps than training.
        place = jnp.minimum(step.number, last)
        value, new, *aux = loss(params, jax.tree.map(lambda x: x[place], stack), data)
        # The other states stay those of their steps.
        stack = jax.tree.map(lambda x, n: x.at[place].set(n), stack, new)
        return value, (stack, _Step(step.number + 1)), *aux

    return stepped, init
