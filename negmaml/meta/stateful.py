r"""Models with a state besides their parameters: running statistics, counters, random keys.

The parameters are `Stateful(params, state)` and a loss is a function

    loss(params, state, data) -> (value, new state)           or (value, new state, aux)

Every task starts from the common state. It passes through the inner steps of the task, a new one
after each, and the loss on the query starts from the last. The common state is then the mean over
tasks of what they end with (floating point leaves; others, such as counters and keys, are those of
the first task). A loss that ignores the state it is given and returns it unchanged has a shared,
fixed one. For a state of its own at every inner step, as in MAML++, see `per_step_state`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.checks import check_callable, check_count
from negmaml._core.pytree import pytree
from negmaml.meta.batching import Tasks
from negmaml.meta.partition import check_scalar, merge, ready, split, trainable
from negmaml.rules import InnerRule, run


class Stateful(NamedTuple):
    """Parameters that train, and a state that the loss hands on."""

    params: Any
    state: Any


@pytree
class _Threading(InnerRule):
    """A rule on (parameters, state of the model); the state is what the last loss made of it."""

    rule: Any

    @property
    def steps(self):  # type: ignore[override]
        """Those of the rule."""
        return self.rule.steps

    def init(self, params):
        """The first state of the rule."""
        return self.rule.init(params[0])

    def update(self, gradient, state, params):
        """One update of the parameters; the model's state as the gradient came with."""
        moved, state = self.rule.update(gradient[0], state, params[0])
        return (moved, gradient[1]), state


def threading(loss: Callable, rule: InnerRule, state, support, leaves):
    """(rule, gradient, start) for `run` on (what moves, state of the model).

    leaves: (what moves, what is frozen, what is carried) of the parameters.
    """
    moving, frozen, rest = leaves
    if rule.implicit:
        raise TypeError(f"a model with state needs a rule that steps, got {rule!r}")

    def gradient(point):
        theta, state = point

        def objective(theta):
            value, new, _ = parts(loss(merge(merge(theta, frozen), rest), state, support))
            return value, like(new, state)

        return jax.grad(objective, has_aux=True)(theta)

    return _Threading(rule), gradient, (moving, jax.tree.map(jnp.asarray, state))


def adapt_with_state(loss: Callable, start: Stateful, support, rule: InnerRule, mask, remat=False):
    """`adapt` for a loss of (params, state, data); the parameters and the state after it."""
    params, rest = trainable(start.params)
    rule, params = ready(rule, params)
    moving, frozen = split(params, mask)
    threaded, gradient, first = threading(loss, rule, start.state, support, (moving, frozen, rest))
    (theta, state), _ = run(threaded, gradient, first, remat)
    return Stateful(merge(merge(theta, frozen), rest), state)


class Losses(NamedTuple):
    """The loss on the query and that of the inner steps, and which leaves adapt."""

    outer: Callable
    inner: Callable
    mask: Any


def objective(losses: Losses, rule, start: Stateful, tasks: Tasks, weight, remat: bool = False):
    """(sum of the query losses times `weight`, (aux, state) of each task)."""

    def one_task(support, query):
        theta, state = adapt_with_state(losses.inner, start, support, rule, losses.mask, remat)
        value, new, aux = parts(losses.outer(theta, state, query))
        return value, (aux, like(new, state))

    values, more = jax.vmap(one_task)(*tasks)
    return weight * jnp.sum(values), more


def exact(losses: Losses, rule, start: Stateful, tasks: Tasks, weight, remat: bool = False):
    """(sums of value and gradient, (aux, state) of each task), by reverse over reverse."""
    params, rest = trainable(start.params)

    def total(params):
        at = Stateful(merge(params, rest), start.state)
        return objective(losses, rule, at, tasks, weight, remat)

    (value, more), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return (value, gradient), more


def first_order(losses: Losses, rule, start: Stateful, tasks: Tasks, weight):
    """The same with inner gradients, and states after inner steps, for constants."""
    params, rest = trainable(start.params)
    rule, params = ready(rule, params)

    def total(params):
        moving, frozen = split(params, losses.mask)

        def one_task(support, query):
            leaves = moving, lax.stop_gradient(frozen), rest
            threaded, gradient, first = threading(losses.inner, rule, start.state, support, leaves)
            stopped = partial(_stopped, gradient)
            (theta, state), _ = run(threaded, stopped, first)
            full = merge(merge(theta, frozen), rest)
            value, new, aux = parts(losses.outer(full, state, query))
            return value, (aux, like(new, state))

        values, more = jax.vmap(one_task)(*tasks)
        return weight * jnp.sum(values), more

    (value, more), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return (value, gradient), more


def _stopped(gradient: Callable, point):
    return lax.stop_gradient(gradient(lax.stop_gradient(point)))


def summed(losses: Losses, rule, start: Stateful, tasks: Tasks, weight):
    """The same with the sum of the inner gradients, or the way an optimizer went: reptile."""
    params, rest = trainable(start.params)
    rule, params = ready(rule, params)
    leaves = moving, frozen = split(params, losses.mask)

    def one_task(support, query):
        threaded, gradient, first = threading(
            losses.inner, rule, start.state, support, (*leaves, rest)
        )
        (theta, state), (visited, _) = run(threaded, gradient, first)
        if rule.sums_gradients:
            visited = visited if rule.steps > 1 else jax.tree.map(lambda x: x[None], visited)
            slopes = lax.map(lambda point: gradient(point)[0], visited)
            way = jax.tree.map(lambda g: jnp.sum(g, 0), slopes)
        else:
            way = jax.tree.map(jnp.subtract, moving, theta)
        value, new, aux = parts(losses.outer(merge(merge(theta, frozen), rest), state, query))
        return (value, merge(way, jax.tree.map(jnp.zeros_like, frozen))), (aux, like(new, state))

    sums, more = jax.vmap(one_task)(*tasks)
    return jax.tree.map(lambda x: weight * jnp.sum(x, 0), sums), more


def parts(result) -> tuple[Any, Any, Any]:
    """(value, new state, aux) of a loss with state; aux is None when it has none."""
    if not (isinstance(result, tuple) and len(result) in (2, 3)):
        raise TypeError(
            "the loss of Stateful parameters must return (value, new state) or (value, new state, "
            f"aux), got {type(result).__name__}"
        )
    value, new, *aux = result
    check_scalar(value, False)
    return value, new, aux[0] if aux else None


def like(new, state):
    """The new state in the types of the old one; raises where it has another structure."""
    try:
        return jax.tree.map(lambda n, old: jnp.asarray(n, jnp.result_type(old)), new, state)
    except ValueError as mismatch:
        raise ValueError(
            f"the loss must return a state like the one it is given, "
            f"{jax.tree.structure(state)}, got {jax.tree.structure(new)}"
        ) from mismatch


@pytree
class _Step:
    """The number of the step that a state per step is at."""

    number: Any


def mean_state(states):
    """The common state of tasks whose own are stacked."""

    def common(leaf):
        if isinstance(leaf, _Step):
            return _Step(jnp.zeros_like(leaf.number[0]))
        return jnp.mean(leaf, 0) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf[0]

    return jax.tree.map(common, states, is_leaf=lambda node: isinstance(node, _Step))


def per_step_state(loss: Callable, steps: int) -> tuple[Callable, Callable]:
    r"""(loss, init) with a state of its own for each of `steps` inner steps, and for the query.

    The new state is a stack of steps + 1 states and the number of the step, which `init` makes of
    one state; statistics of batch normalisation are then those of that step of adapting. Steps
    beyond share the last. Source: Antoniou, Edwards and Storkey, "How to train your MAML", ICLR
    2019.

    >>> count = lambda w, state, x: ((w - x) ** 2, state + 1)
    >>> loss, init = per_step_state(count, steps=1)
    >>> stack, _ = loss(0.0, init(jnp.zeros(())), 1.0)[1]
    >>> stack.tolist()
    [1.0, 0.0]
    """
    check_callable("loss", loss, "of (params, state, data)")
    last = check_count("steps", steps)

    def init(state):
        stack = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * (last + 1)), state)
        return stack, _Step(jnp.asarray(0))

    def stepped(params, state, data):
        stack, step = state
        place = jnp.minimum(step.number, last)
        value, new, *aux = loss(params, jax.tree.map(lambda x: x[place], stack), data)
        stack = jax.tree.map(lambda x, n: x.at[place].set(n), stack, new)
        return value, (stack, _Step(step.number + 1)), *aux

    return stepped, init
