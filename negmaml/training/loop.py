r"""The outer loop: any optax optimizer on any meta-gradient.

    tasks_i = sample_tasks(key_i)
    params_{i+1} = params_i + optimizer(d/d params value(params_i, tasks_i))

The key of step i is a function of the key and of i only, so that a run can be cut at any step. One
compiled program scans over the steps. It is pure, and so is `fit` without work on the host: use
vmap over keys, rates and initial parameters.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from negmaml._core.caller import warn_caller
from negmaml._core.checks import short_repr
from negmaml._core.convergence import ConvergenceWarning
from negmaml._core.deprecation import renamed_arguments
from negmaml._core.jit import is_concrete
from negmaml._core.keys import check_key
from negmaml._core.meshes import place
from negmaml._core.platform import is_tracing
from negmaml._core.pytree import tree_where
from negmaml._core.settings import own_transfers
from negmaml._core.types import Array, Devices, PRNGKeyArray, PyTree
from negmaml.meta.batching import Tasks
from negmaml.meta.gradients import trained_variables
from negmaml.meta.model_variables import Form
from negmaml.rules import UNSOLVED
from negmaml.training.batches import Batches, check_sampler, number_of_steps, task_source
from negmaml.training.host_loop import Segment, run_segments
from negmaml.training.nonfinite import LossScale, check_policy, first_skips, needs_scale
from negmaml.training.options import EvaluationOptions, HostOptions, function_of_tasks
from negmaml.training.programs import bound_programs, known_optimizer
from negmaml.training.result import FitResult
from negmaml.training.sharding import task_sharding
from negmaml.training.state import (
    Held,
    TrainPoint,
    TrainSetup,
    TrainState,
    advance,
    advance_in_place,
    good_point,
    held,
    init_state,
    recombine,
    stride_of,
)


@renamed_arguments({"this": "strict"}, checkpoint_of="resume")
@own_transfers
def fit(
    key: PRNGKeyArray,
    params: PyTree,
    value_and_grad: Callable[..., Any],
    sample_tasks: Callable[[Array], Any] | Iterable[Any],
    optimizer: optax.GradientTransformation | optax.MultiSteps | Callable[..., Any],
    steps: int | None = None,
    *,
    epochs: int | None = None,
    evaluate: Callable[..., Any] | None = None,
    evaluate_every: int | None = None,
    evaluation_tasks: Callable[[Array], Any] | Tasks | None = None,
    patience: int | None = None,
    monitor: str | None = None,
    monitor_mode: str = "min",
    nonfinite: int | str | LossScale = "stop",
    callback: Callable[..., Any] | None = None,
    callback_every: int | None = None,
    state: FitResult | None = None,
    mesh: Devices | None = None,
    task_axis: str | Sequence[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: str = "strict",
    progress: bool = False,
) -> FitResult:
    r"""Meta-train `params` by `steps` updates of an optax optimizer on fresh tasks.

    Arguments:
        key: jax.random key. The keys of the tasks of each step and evaluation are functions of it
            and of the number of the step.
        params: the meta-parameters, any pytree. Its floating point leaves train; integers,
            functions and settings of a module are returned unchanged. Or a model with running
            statistics or random streams: a Flax NNX module, variables of linen, or
            `Stateful(params, state)`. The optimizer moves its parameters only, the state follows
            the loss (`nm.variables`), and the result is a model of the same kind.
        value_and_grad: (params, tasks) -> (value, gradient), from `maml_value_and_grad`, `fomaml`,
            ... or your own. One of `evolution_strategies` also gets a key, a function of the step.
        sample_tasks: key -> tasks, a pure function such as those of `negmaml.tasks`; or an
            iterable of batches of NumPy, torch or JAX arrays, such as a DataLoader, read again
            from its start when it ends; or one `Tasks` for every step.
        optimizer: an `optax.GradientTransformation`, or a `jax.tree_util.Partial` that makes one:
            fit(..., Partial(optax.adam, 1e-3), ...) does not recompile for another rate. One with
            extra arguments gets value, grad and value_fn. An `optax.MultiSteps` is taken, too.
        steps: number of updates; or `epochs`, passes over an iterable that has a length.
        evaluate: (params, tasks) -> any result, computed every `evaluate_every` steps, such as
            `maml(loss, another_rule)`.
        evaluation_tasks: key -> tasks for `evaluate`, or `Tasks`; `sample_tasks` by default. No
            training step uses the tasks of an evaluation.
        patience: stop after this number of evaluations without a lower one, and return the
            parameters of the lowest. `evaluate` must return one number, or several with `monitor`.
        monitor: the number that `patience` follows, such as "accuracy" for {"accuracy": ...}, or
            "query/accuracy" for a dict within a dict.
        monitor_mode: "min", or "max" where a higher number is better.
        nonfinite: after a batch whose loss, gradient or updated parameters are not finite, "stop"
            the run; or skip the update of up to this number of such batches in a row; or
            `LossScale(...)`, which also scales the loss. Parameters and states of optimizer and
            model keep their values when a batch is skipped, and the result counts it in `skipped`.
        callback: (step, metrics, params) -> any result, on the host every `callback_every` steps (1
            by default). metrics["loss"] is the mean since the last call; "evaluation", "aux" and
            "gradient_norm" are the latest; "wall_time" are seconds since the start, without the
            time between an interruption and its resumption. The run stops if it returns True, of
            Python, NumPy, JAX or torch.
        state: a result of `fit` to continue from, with its optimizer state. Of `params`, only
            the filter `trained` is read (`nm.variables`). The numbers of the steps continue:
            fit(...100), then fit(..., 100, state=first), is fit(..., 200).
        mesh: a `jax.sharding.Mesh` or a list of devices that share the tasks of every step. Each
            computes the gradient of its tasks, and one all-reduce averages them. The result is that
            of one device up to rounding. Parameters are replicated, or sharded on the mesh as you
            pass them. Each process of `jax.distributed` brings its part of the batches of an
            iterable; tasks of a function are drawn jointly.
        task_axis: the axis or axes of the mesh that share the tasks; all by default.
        checkpoint: directory of checkpoints, written every `checkpoint_every` steps (a tenth of the
            steps by default). A run resumes from the latest checkpoint in it, with the same result
            as without the interruption. For an iterable this needs state_dict and load_state_dict,
            or get_state and set_state of its iterator, or the same batches again. One run at a time
            may use a directory. Needs orbax: pip install "negmaml[checkpoint]".
        resume: "strict" resumes only a checkpoint of this computation, "any" also one of another
            optimizer, loss or key whose arrays have the same shapes. It warns of the differences,
            and converts float32 to float64 or back. More steps are always fine.
        progress: whether to show the progress on stderr: a bar on a terminal or in a notebook (with
            rich installed), lines in a log.

    Returns `FitResult`. A run that stops as not finite returns the parameters of the last finite
    loss, and warns, except inside jit and vmap. `optax.apply_if_finite` is taken into account: a
    batch whose update it rejects does not stop the run. Another warning reports inner problems that
    a rule such as `Proximal` did not solve.

    A run without work on the host holds the parameters and the state of the optimizer once, beside
    `params`, and is repeated up to the last finite loss where it has to return that. Others hold a
    copy of good parameters, those of the best evaluation with `patience`.

    Derivatives through `fit` are those of the optimizer. That of optax.adam(1e-3) is NaN where a
    gradient is exactly zero, by a square root at zero; give it an `eps_root`, such as 1e-10.

    Functions are static: pass the same objects, or `Partial`s of them, to compile once. Optimizers
    with equal programs count as the same object, so optax.adam(1e-2) may be built in a loop. The
    programs of the last 64 combinations of functions and optimizers are kept, about 9 MB each for a
    small model. With one more combination, all are dropped.

    Errors are raised before the first compilation: a TypeError or ValueError for parameters without
    a floating point leaf or that do not fit the loss, an invalid key or optimizer, and counts below
    1. Also for a `sample_tasks` that is not a function of its key only, for a `value_and_grad` that
    does not return such a pair, and for a checkpoint that is damaged or belongs to another run. The
    checkpoint is not changed.

    >>> square = lambda w, target: (w - target) ** 2
    >>> sample = lambda key: (jnp.zeros(1), jax.random.normal(key, (8,)))
    >>> value_and_grad = jax.value_and_grad(lambda w, tasks: jnp.mean(square(w, tasks[1])))
    >>> result = fit(jax.random.key(0), 3.0, value_and_grad, sample, optax.sgd(0.1), 200)
    >>> bool(abs(result.params) < 0.5), int(result.step)
    (True, 200)
    """
    key = check_key("key", key)
    sample, batches = task_source("sample_tasks", sample_tasks)
    # All arguments are checked before any program is traced.
    evaluation = EvaluationOptions(
        evaluate, evaluate_every, evaluation_tasks, patience, monitor, monitor_mode
    ).checked(sample)
    policy = check_policy(nonfinite)
    steps = number_of_steps(steps, epochs, batches)
    # A run that continues, or that a later call will continue, may end before an evaluation is due.
    complete = state is None and checkpoint is None
    if complete and evaluation.every is not None and evaluation.every > steps:
        raise ValueError(
            f"evaluate_every must be at most the number of steps, {steps}, got {evaluation.every}: "
            "nothing would be evaluated"
        )
    options = HostOptions(
        checkpoint, checkpoint_every, resume, callback, callback_every, progress
    ).checked()
    sharding = task_sharding(mesh, task_axis)
    point, form = _init_point(value_and_grad, params, state)
    value_and_grad = function_of_tasks("value_and_grad", value_and_grad)
    needs_scale(value_and_grad, policy)  # raises where it cannot be given
    setup = TrainSetup(
        key, value_and_grad, sample, _optimizer_maker(optimizer, point.params),
        evaluation.function, evaluation.tasks, form, evaluation.every, evaluation.patience,
        monitor, monitor_mode, policy, sharding, gradient_norm=callback is not None,
    )  # fmt: skip
    skips = first_skips(policy, None if state is None else state.skips)
    bound_programs(setup)
    _check_samplers(setup)
    segment = Segment(
        0 if state is None else point.step,
        steps,
        None if batches is None else Batches(batches, sharding),
    )
    # Within the mesh, functions of the user may constrain shardings by its axes.
    with sharding.context(key) if sharding is not None else contextlib.nullcontext():
        if sharding is not None:
            setup, point, skips = place((setup, point, skips), sharding.mesh)
        result = _train(setup, point, skips, segment, options)
    if is_concrete(result):
        _warn_of_result(result, policy)
    return result


def _train(setup: TrainSetup, point: TrainPoint, skips, segment: Segment, options: HostOptions):
    """Return the result of all steps, in one program where the host has no work in between."""
    init = partial(init_state, setup.optimizer, point, skips, patience=bool(setup.patience))
    if options.idle and segment.batches is None:
        start, steps = segment.offset, segment.steps
        last = start + steps
        # Errors of the user's functions are raised by this trace, which the call uses again, and so
        # before the first compilation.
        keep = is_tracing(setup, point)
        program = advance if keep else advance_in_place
        forward = partial(program, length=steps, stride=stride_of(steps))
        jax.eval_shape(forward, setup, jax.eval_shape(partial(init, keep=keep)), start, last)
        with warnings.catch_warnings():
            # Under a vmap that only the user's functions see, arrays of the state cannot be reused.
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            state, history = forward(setup, init(keep=keep), start, last)
            if state.kept is None and not is_concrete(state):
                state, history = forward(setup, init(keep=True), start, last)
        if state.kept is None and not bool(state.finite):
            run = partial(forward, setup, start=start)
            state = state._replace(
                kept=_last_finite(run, partial(init, keep=False), start, history)
            )
        return _result(setup, start, state, history)
    first = init(keep=True)
    # Under vmap a checkpoint or a callback would be of many runs at once.
    if not is_concrete((setup, first)):
        raise TypeError(
            "checkpoint, callback, progress and batches from an iterable work on the host: "
            "leave them out inside jit, vmap and grad"
        )
    segment = segment._replace(offset=int(segment.offset))
    return _result(setup, segment.offset, *run_segments(setup, first, segment, options))


def _last_finite(run: Callable, init: Callable, start: int, history) -> Held:
    """Return the parameters of the last finite loss, by running up to them again."""
    state, loss = None, history[0]
    # Once, unless a device adds numbers up in another order each time.
    while state is None or not bool(state.finite):
        (good,) = np.nonzero(np.isfinite(np.asarray(loss)))
        state, (loss, *_) = run(init(), limit=start + (int(good[-1]) if len(good) else 0))
    return held(state.now)


def _optimizer_maker(optimizer, params) -> Partial:
    """Return a `Partial` that makes the optimizer, or an earlier one with the same program."""
    if isinstance(optimizer, Partial):
        return optimizer
    if isinstance(optimizer, optax.MultiSteps):
        # Its own `gradient_transformation` would not pass on extra arguments.
        optimizer = optax.GradientTransformationExtraArgs(optimizer.init, optimizer.update)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            "optimizer must be an optax.GradientTransformation such as optax.adam(1e-3), or a "
            f"jax.tree_util.Partial that makes one, got {short_repr(optimizer)}"
        )
    return Partial(_Constant(known_optimizer(optimizer, params)))


class _Constant(NamedTuple):
    """A function of no arguments that returns `value`; functions of equal values are equal."""

    value: Any

    def __call__(self):
        return self.value


def _init_point(value_and_grad, params, state: FitResult | None) -> tuple[TrainPoint, Form]:
    """Return the point where a run starts, and the form of the model."""
    if state is not None and not isinstance(state, FitResult):
        raise TypeError(f"state must be a result of fit, got {type(state).__name__}")
    # The optimizer sees floating point leaves only.
    floats, model_state, form = (
        trained_variables(value_and_grad, params)
        if state is None
        else trained_variables(value_and_grad, state.params, params)
    )
    floats = jax.tree.map(jnp.asarray, floats)
    # The optimizer state is made by `init_state`, within its compiled program.
    before = (None, jnp.asarray(0)) if state is None else (state.optimizer_state, state.step)
    return TrainPoint(floats, before[0], model_state, before[1]), form


def _check_samplers(setup: TrainSetup) -> None:
    if setup.sample_tasks is not None:
        check_sampler("sample_tasks", setup.sample_tasks, setup.key)
    # One sampler may serve both; it is traced once then.
    if setup.evaluation_tasks is not None and setup.evaluation_tasks is not setup.sample_tasks:
        check_sampler("evaluation_tasks", setup.evaluation_tasks, setup.key)


def _result(setup: TrainSetup, offset, state: TrainState, history) -> FitResult:
    """Return the result of the steps from `offset` on, of which the history has one row each."""
    (loss, aux, evaluation, unconverged, _), evaluated = history, None
    if every := setup.evaluate_every:
        # An evaluation is due where the number of steps since the very first is a multiple. Within
        # a trace the offset is unknown, and the rows are as many as there are for any offset.
        first = (-offset - 1) % every
        steps = len(loss)
        count = -(-(steps - int(first)) // every) if is_concrete(offset) else steps // every
        rows = first + every * np.arange(count)
        evaluation, evaluated = jax.tree.map(lambda x: x[rows], evaluation), offset + rows + 1
    point = good_point(setup, state)
    point = point if state.best is None else _best_or_last(state, point)
    return FitResult(
        recombine(setup, point), point.optimizer_state, loss, aux, evaluation, point.step,
        state.finite, state.stopped, unconverged, state.skips, offset, evaluated,
    )  # fmt: skip


def _best_or_last(state: TrainState, last: TrainPoint) -> TrainPoint:
    """Return the best parameters, or the last ones if no evaluation was finite."""
    assert state.best is not None and state.kept is not None
    found = last._replace(**state.kept._asdict())
    evaluated = state.best.value < jnp.inf
    if is_concrete(evaluated):  # then nothing is copied
        return found if bool(evaluated) else last
    return tree_where(evaluated, found, last)


def _warn_of_result(result: FitResult, policy) -> None:
    """Warn of inner problems that were not solved, and of a run that stopped as not finite."""
    # Steps that were not taken are NaN.
    if result.unconverged is not None and np.nansum(result.unconverged):
        some = int(np.sum(np.asarray(result.unconverged) > 0))
        warn_caller(
            f"at {some} of {len(result.loss)} steps {UNSOLVED} (unconverged of the result has the "
            "fraction of tasks at each step)",
            ConvergenceWarning,
        )
    if bool(result.finite):
        return
    taken = np.flatnonzero(np.isfinite(np.asarray(result.loss)))
    last = (
        f"the last finite loss was {result.loss[taken[-1]]:.4g}"
        if len(taken)
        else "no loss was finite"
    )
    limit = policy.limit if isinstance(policy, LossScale) else policy or 0
    reason = (
        f"after {len(taken)} of {len(result.loss)} steps: the loss or an update was not finite"
        if limit == 0
        else f"since {limit + 1} batches in a row had a loss, gradient or update that is not finite"
    )
    warn_caller(
        f"training stopped {reason}; {last}, and the parameters are those of update "
        f"{int(result.step)}. Try a smaller learning rate or inner rate, or "
        "optax.clip_by_global_norm before the optimizer; look for a square root, logarithm or "
        "division at zero in the loss",
        RuntimeWarning,
    )
