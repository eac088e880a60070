r"""The outer loop: any optax optimizer on any meta-gradient.

    tasks_i = sample_tasks(key_i)
    params_{i+1} = params_i + optimizer(d/d params value(params_i, tasks_i))

The key of step i is a function of the key and of i alone, so that a run can be cut anywhere. One
compiled program scans over the steps; it is pure, and so is `fit` without checkpoints and progress:
vmap it over keys, rates, starting points.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import Partial

from negmaml.inner import check_params
from negmaml.pytree import as_pytree, check_count, pytree, static

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


def fit(
    key,
    params,
    value_and_grad: Callable,
    sample_tasks: Callable,
    optimizer,
    steps: int,
    *,
    evaluate: Callable | None = None,
    evaluate_every: int | None = None,
    evaluation_tasks: Callable | None = None,
    checkpoint=None,
    checkpoint_every: int | None = None,
    progress: bool = False,
) -> Fit:
    r"""Meta-train: `steps` updates of `params` by an optax optimizer on fresh tasks.

    Arguments:
        key: jax.random key; steps, tasks and evaluation tasks get theirs from it by address.
        params: the meta-parameters, any pytree of floating point arrays.
        value_and_grad: (params, tasks) -> (value, gradient), of `maml_value_and_grad`, `fomaml`,
            ... or your own.
        sample_tasks: key -> tasks, a pure function such as those of `negmaml.tasks`.
        optimizer: an `optax.GradientTransformation`, or a `jax.tree_util.Partial` that makes one:
            fit(..., Partial(optax.adam, 1e-3), ...) does not recompile for another rate.
        steps: number of updates.
        evaluate: (params, tasks) -> anything, computed every `evaluate_every` steps, such as
            `maml(loss, another_rule)`.
        evaluation_tasks: key -> tasks for it; `sample_tasks` when left out. Each evaluation has
            tasks of its own, which no training step sees.
        checkpoint: directory of checkpoints, written every `checkpoint_every` steps (a tenth of
            the steps when left out). A run finds its own there and goes on from the latest, with
            the same result as if never interrupted. Needs orbax: pip install "negmaml[checkpoint]".
        progress: whether to show a bar. Needs rich: pip install "negmaml[cli]".

    Returns `Fit`. When a loss, or a parameter after an update, is not finite, the run stops there
    and the parameters of the last finite loss are returned; nothing is raised. Functions are
    static: pass the same objects, or `Partial`s of them, to compile once.

    Raises TypeError or ValueError for parameters that are not floating point, an optimizer that is
    none, counts below 1, and for a checkpoint that is damaged or belongs to another run, which is
    left as it is.

    >>> square = lambda w, target: (w - target) ** 2
    >>> sample = lambda key: (jnp.zeros(1), jax.random.normal(key, (8,)))
    >>> value_and_grad = jax.value_and_grad(lambda w, tasks: jnp.mean(square(w, tasks[1])))
    >>> result = fit(jax.random.key(0), 3.0, value_and_grad, sample, optax.sgd(0.1), 200)
    >>> bool(abs(result.params) < 0.5), int(result.step)
    (True, 200)
    """
    params = check_params(params)
    steps = check_count("steps", steps)
    _check_evaluation(evaluate, evaluate_every)
    evaluate_every = (
        None if evaluate_every is None else check_count("evaluate_every", evaluate_every)
    )
    if not isinstance(optimizer, optax.GradientTransformation | Partial):
        raise TypeError(
            "optimizer must be an optax.GradientTransformation such as optax.adam(1e-3), or a "
            f"jax.tree_util.Partial that makes one, got {optimizer!r}"
        )
    if not isinstance(optimizer, Partial):
        optimizer = Partial(_Given(optimizer))
    run = Run(
        key,
        as_pytree(value_and_grad),
        as_pytree(sample_tasks),
        optimizer,
        None if evaluate is None else as_pytree(evaluate),
        as_pytree(evaluation_tasks or sample_tasks),
        evaluate_every,
    )
    state = _start(optimizer, params)
    if checkpoint is None and not progress:
        return _result(run, *advance(run, state, 0, steps, length=steps))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((run, state))):
        raise TypeError(
            "checkpoint and progress work on the host: leave them out inside jit, vmap and grad"
        )
    from negmaml.checkpoint import in_chunks

    return _result(run, *in_chunks(run, state, steps, checkpoint, checkpoint_every, progress))


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
def _start(optimizer: Partial, params) -> State:
    """The state of a run before its first step."""
    current = params, optimizer().init(params), jnp.asarray(0)
    return State(*current, jnp.asarray(True), current)


def _result(run: Run, state: State, history) -> Fit:
    loss, aux, evaluation = history
    if run.evaluate_every is not None:
        every = run.evaluate_every
        evaluation = jax.tree.map(lambda x: x[every - 1 :: every], evaluation)
    params, optimizer_state, step, finite, _ = state
    return Fit(params, optimizer_state, loss, aux, evaluation, step, finite)


class _Given(NamedTuple):
    """A function of no arguments that returns `value`; equal ones compile once."""

    value: Any

    def __call__(self):
        return self.value


def _check_evaluation(evaluate, evaluate_every) -> None:
    if (evaluate is None) != (evaluate_every is None):
        raise ValueError(
            "evaluate and evaluate_every go together: what to compute, and after how many steps; "
            f"got evaluate={evaluate!r}, evaluate_every={evaluate_every!r}"
        )
