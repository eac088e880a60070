r"""The outer loop: any optax optimizer on any meta-gradient.

    tasks_i = sample_tasks(key_i)
    params_{i+1} = params_i + optimizer(d/d params value(params_i, tasks_i))

The key of step i is a function of the key and of i alone, so that a run can be cut anywhere. One
compiled program scans over the steps; it is pure, and so is `fit` without checkpoints and progress:
vmap it over keys, rates, starting points.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.tree_util import Partial

from negmaml._core.checks import check_count
from negmaml._core.pytree import as_pytree
from negmaml.meta.inner import check_params
from negmaml.training.checkpoint import in_chunks
from negmaml.training.state import Fit, Run, State, advance, start


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
    state = start(optimizer, params)
    if checkpoint is None and not progress:
        return _result(run, *advance(run, state, 0, steps, length=steps))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((run, state))):
        raise TypeError(
            "checkpoint and progress work on the host: leave them out inside jit, vmap and grad"
        )
    return _result(run, *in_chunks(run, state, steps, checkpoint, checkpoint_every, progress))


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
