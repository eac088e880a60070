"""What a run is made of, where it stands, and one compiled stretch of it."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import Partial

from negmaml._core.pytree import pytree, static

TRAINING, EVALUATION = 0, 1  # what the key is folded with


class Fit(NamedTuple):
    """What `fit` returns.

    Attributes:
        params: after `step` updates; of the last step with a finite loss if `finite` is False.
        optimizer_state: that goes with them.
        loss: value at the parameters before each step, shape (steps,); NaN where none was taken.
        aux: auxiliary output of each step, stacked; None when the loss has none.
        evaluation: after each `evaluate_every` steps, stacked; None without `evaluate`.
        step: number of updates in `params`.
        finite: whether all losses and updates were finite.
    """

    params: Any
    optimizer_state: Any
    loss: Any
    aux: Any
    evaluation: Any
    step: Any
    finite: Any


class State(NamedTuple):
    """Where a run is, and where it was when its loss was last known to be finite."""

    params: Any
    optimizer_state: Any
    step: Any
    finite: Any
    sound: Any  # (params, optimizer_state, step)


@pytree
class Run:
    """All that a step needs besides the state; functions as `Partial`s, so that it is a pytree."""

    key: Any
    value_and_grad: Any
    sample_tasks: Any
    optimizer: Any
    evaluate: Any
    evaluation_tasks: Any
    evaluate_every: int | None = static()


@partial(jax.jit, static_argnames="length")
def advance(run: Run, state: State, start, limit, *, length: int):
    """The state after `length` steps from `start` on, as far as `limit`; and what was recorded."""

    def step(state, i):
        take = partial(_take, run, i)
        shapes = jax.eval_shape(take, state)[1]
        blank = jax.tree.map(_blank, shapes)
        go = state.finite & (i < limit)
        return lax.cond(go, take, lambda state: (state, blank), state)

    return lax.scan(step, state, start + jnp.arange(length))


def _take(run: Run, i, state: State):
    """One update, and (loss, aux, evaluation)."""
    current = state.params, state.optimizer_state, state.step
    tasks = run.sample_tasks(_address(run.key, TRAINING, i))
    value, gradient = run.value_and_grad(state.params, tasks)
    loss, aux = value if isinstance(value, tuple) else (value, None)
    updates, optimizer_state = run.optimizer().update(gradient, state.optimizer_state, state.params)
    params = optax.apply_updates(state.params, updates)
    known = jnp.isfinite(loss)
    finite = known & _all_finite(params)
    sound = _choose(known, current, state.sound)
    moved = _choose(finite, (params, optimizer_state, state.step + 1), sound)
    new = State(moved[0], moved[1], moved[2], finite, sound)
    return new, (loss, aux, _evaluation(run, i, new.params))


def _evaluation(run: Run, i, params):
    """What `evaluate` says after step i, if it is one that is evaluated."""
    if run.evaluate is None:
        return None

    def evaluate(params):
        return run.evaluate(params, run.evaluation_tasks(_address(run.key, EVALUATION, i)))

    blank = jax.tree.map(_blank, jax.eval_shape(evaluate, params))
    due = (i + 1) % run.evaluate_every == 0
    return lax.cond(due, evaluate, lambda _: blank, params)


def _address(key, purpose: int, i):
    return jax.random.fold_in(jax.random.fold_in(key, purpose), i)


def _choose(condition, first, second):
    return jax.tree.map(partial(jnp.where, condition), first, second)


def _all_finite(tree):
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _blank(shape):
    """What stands for a number that was not computed: NaN, or zero where there is none."""
    return jnp.full(
        shape.shape, jnp.nan if jnp.issubdtype(shape.dtype, jnp.inexact) else 0, shape.dtype
    )


@jax.jit
def start(optimizer: Partial, params) -> State:
    """The state of a run before its first step."""
    current = params, optimizer().init(params), jnp.asarray(0)
    return State(*current, jnp.asarray(True), current)
