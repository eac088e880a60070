r"""The outer loop: any optax optimizer on any meta-gradient.

    tasks_i = sample_tasks(key_i)
    params_{i+1} = params_i + optimizer(d/d params value(params_i, tasks_i))

The key of step i is a function of the key and of i alone, so that a run can be cut anywhere. One
compiled program scans over the steps; it is pure, and so is `fit` where the host has nothing to do
in between: vmap it over keys, rates, starting points.
"""

import contextlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from negmaml._core.checks import check_callable, check_count, short_repr
from negmaml._core.convergence import ConvergenceWarning
from negmaml._core.deprecation import renamed_arguments
from negmaml._core.keys import check_key
from negmaml._core.pytree import as_pytree
from negmaml._core.settings import own_transfers
from negmaml._core.types import PRNGKeyArray
from negmaml.meta.partition import trainable
from negmaml.meta.stateful import Stateful
from negmaml.rules import UNSOLVED
from negmaml.training.carried import Carried
from negmaml.training.data import Batches, check_sampler, number_of_steps, task_source
from negmaml.training.host_loop import Stretch, Watch, in_stretches
from negmaml.training.programs import bound_programs, known_optimizer
from negmaml.training.sharding import spread_over
from negmaml.training.state import FitResult, Point, Run, State, advance, begin, start, whole


@renamed_arguments({"this": "strict"}, checkpoint_of="resume")
@own_transfers
def fit(
    key: PRNGKeyArray,
    params: Any,
    value_and_grad: Callable[..., Any],
    sample_tasks: Any,
    optimizer: Any,
    steps: int | None = None,
    *,
    epochs: int | None = None,
    evaluate: Callable[..., Any] | None = None,
    evaluate_every: int | None = None,
    evaluation_tasks: Any = None,
    patience: int | None = None,
    callback: Callable[..., Any] | None = None,
    callback_every: int | None = None,
    state: FitResult | None = None,
    mesh: Any = None,
    task_axis: Any = None,
    checkpoint: Any = None,
    checkpoint_every: int | None = None,
    resume: str = "strict",
    progress: bool = False,
) -> FitResult:
    r"""Meta-train: `steps` updates of `params` by an optax optimizer on fresh tasks.

    Arguments:
        key: jax.random key; steps, tasks and evaluation tasks get theirs from it by address.
        params: the meta-parameters, any pytree. Its floating point leaves train; integers,
            functions and settings of a module come back as they are. Or `Stateful(params, state)`,
            for models with running statistics: the optimizer moves the parameters, and the state
            is what `value_and_grad` returns in its place.
        value_and_grad: (params, tasks) -> (value, gradient), of `maml_value_and_grad`, `fomaml`,
            ... or your own.
        sample_tasks: key -> tasks, a pure function such as those of `negmaml.tasks`; or an
            iterable of batches of NumPy, torch or JAX arrays, such as a DataLoader, read again
            from its start when it ends; or one `Tasks`, the same at every step.
        optimizer: an `optax.GradientTransformation`, or a `jax.tree_util.Partial` that makes one:
            fit(..., Partial(optax.adam, 1e-3), ...) does not recompile for another rate. One that
            wants extra arguments is given value, grad and value_fn.
        steps: number of updates; or `epochs`, passes over an iterable that has a length.
        evaluate: (params, tasks) -> anything, computed every `evaluate_every` steps, such as
            `maml(loss, another_rule)`.
        evaluation_tasks: key -> tasks for it, or `Tasks`; `sample_tasks` when left out. Each
            evaluation has tasks of its own, which no training step sees.
        patience: stop after so many evaluations without a lower one, and return the parameters of
            the lowest. `evaluate` must return one number.
        callback: (step, metrics, params) -> anything, on the host every `callback_every` steps (1
            when left out). metrics["loss"] is the mean since the last call, "evaluation" and "aux"
            are the latest. If it returns True the run stops; so does a true boolean of NumPy, JAX
            or torch.
        state: a result of `fit` to go on from, with its optimizer state; `params` is not read
            then, and the steps are numbered from its own: fit(...100), then fit(..., 100,
            state=first), is fit(..., 200).
        mesh: a `jax.sharding.Mesh` or a list of devices that share the tasks of every step. Each
            computes the gradient of its own, and one all-reduce averages them; the result is that
            of one device up to rounding. Parameters are everywhere, or as yours are sharded on
            the mesh. Several processes of `jax.distributed` each bring their part of the batches
            of an iterable, and sample those of a function together.
        task_axis: the axis or axes of the mesh that share the tasks; all when left out.
        checkpoint: directory of checkpoints, written every `checkpoint_every` steps (a tenth of
            the steps when left out). A run finds its own there and goes on from the latest, with
            the same result as if never interrupted (with an iterable, if it can be put where it
            was, by state_dict and load_state_dict or by get_state and set_state of its iterator,
            or gives the same batches again). One run at a time may use a directory. Needs orbax:
            pip install "negmaml[checkpoint]".
        resume: "strict" resumes only a checkpoint of this computation, "any" also one of another
            optimizer, loss or key whose arrays have the same shapes. It warns of the differences,
            and converts float32 to float64 or back. More steps are always fine.
        progress: whether to show a bar. Needs rich: pip install "negmaml[cli]".

    Returns `FitResult`. When a loss, or a parameter after an update, is not finite, the run stops
    there, the parameters of the last finite loss are returned, and a warning says so (none inside
    jit and vmap). Another warns of inner problems that a rule such as `Proximal` did not solve.
    Functions are static: pass the same objects, or `Partial`s of them, to compile once. Optimizers
    with equal programs count as the same object, so that optax.adam(1e-2) may be built in a loop.
    The programs of the last 64 combinations of functions and optimizers are kept, about 9 MB each
    for a small model; beyond that all are dropped.

    What is wrong is found before anything is compiled. Raises TypeError or ValueError for
    parameters none of which is floating point or that do not fit the loss, a key that is
    none, an optimizer that is none, a `sample_tasks` that is not a function of its key alone, a
    `value_and_grad` that returns no such pair, counts below 1, and for a checkpoint that is damaged
    or belongs to another run, which is left as it is.

    >>> square = lambda w, target: (w - target) ** 2
    >>> sample = lambda key: (jnp.zeros(1), jax.random.normal(key, (8,)))
    >>> value_and_grad = jax.value_and_grad(lambda w, tasks: jnp.mean(square(w, tasks[1])))
    >>> result = fit(jax.random.key(0), 3.0, value_and_grad, sample, optax.sgd(0.1), 200)
    >>> bool(abs(result.params) < 0.5), int(result.step)
    (True, 200)
    """
    key = check_key("key", key)
    sample, batches = task_source("sample_tasks", sample_tasks)
    looks = _Looks(evaluate, evaluate_every, evaluation_tasks, patience).checked(sample)
    steps = number_of_steps(steps, epochs, batches)
    whole_run = state is None and checkpoint is None  # none that goes on, or will
    if whole_run and looks.every is not None and looks.every > steps:
        raise ValueError(
            f"evaluate_every must be at most the number of steps, {steps}, got {looks.every}: "
            "nothing would be evaluated"
        )
    watch = Watch(
        checkpoint, checkpoint_every, resume, callback, callback_every, progress
    ).checked()
    spread = spread_over(mesh, task_axis)
    point, carried = _beginning(params, state)
    run = Run(
        key, _function("value_and_grad", value_and_grad), sample, _made(optimizer, point.params),
        looks.function, looks.tasks, carried, looks.every, looks.patience, spread,
    )  # fmt: skip
    bound_programs(run)
    _check_samplers(run)
    offset = 0 if state is None else point.step
    stretch = Stretch(offset, steps, None if batches is None else Batches(batches, spread))
    with spread.context(key) if spread is not None else contextlib.nullcontext():
        if spread is not None:
            run, point = spread.place((run, point))
        result = _trained(run, point, stretch, watch)
    if not _traced(result):
        _announce(result)
    return result


def _trained(run: Run, point: Point, stretch: Stretch, watch: Watch) -> FitResult:
    """All steps, in one program where the host has nothing to do in between."""
    begin = partial(_first, run.optimizer, patience=run.patience)
    if watch.idle and stretch.batches is None:
        start, steps = stretch.offset, stretch.steps
        rest = start, start + steps
        # What is wrong shows while it is traced, once: before the first program is compiled.
        jax.eval_shape(partial(advance, length=steps), run, jax.eval_shape(begin, point), *rest)
        return _result(run, start, *advance(run, begin(point), *rest, length=steps))
    first = begin(point)
    if _traced((run, first)):
        raise TypeError(
            "checkpoint, callback, progress and batches from an iterable work on the host: "
            "leave them out inside jit, vmap and grad"
        )
    offset = int(stretch.offset)
    stretch = stretch._replace(offset=offset)
    return _result(run, offset, *in_stretches(run, first, stretch, watch))


class _Looks(NamedTuple):
    """How a run is evaluated; as in `fit`."""

    function: Any
    every: int | None
    tasks: Any
    patience: int | None

    def checked(self, sample) -> "_Looks":
        """With functions as pytrees; raises where they do not go together."""
        function, every, tasks, patience = self
        if (function is None) != (every is None):
            raise ValueError(
                "evaluate and evaluate_every go together: what to compute, and after how many "
                f"steps; got evaluate={function!r}, evaluate_every={every!r}"
            )
        if function is None:
            for name, value in (("patience", patience), ("evaluation_tasks", tasks)):
                if value is not None:
                    raise ValueError(
                        f"{name} needs evaluate and evaluate_every, got {short_repr(value)} "
                        "without them"
                    )
            return self
        if tasks is None and sample is None:
            raise ValueError(
                "evaluation_tasks must be given when sample_tasks is an iterable: a function "
                "key -> tasks, or Tasks"
            )
        own = sample
        if tasks is not None:
            own, batches = task_source("evaluation_tasks", tasks)
            if batches is not None:
                raise TypeError(
                    "evaluation_tasks must be a function key -> tasks or Tasks, got "
                    f"{type(tasks).__name__}"
                )
        count = None if patience is None else check_count("patience", patience)
        every = check_count("evaluate_every", every)
        return _Looks(_function("evaluate", function), every, own, count)


def _function(name: str, function):
    return as_pytree(check_callable(name, function, "of (params, tasks)"))


def _made(optimizer, params) -> Partial:
    """A `Partial` that makes the optimizer, or an earlier one with the same program."""
    if isinstance(optimizer, Partial):
        return optimizer
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            "optimizer must be an optax.GradientTransformation such as optax.adam(1e-3), or a "
            f"jax.tree_util.Partial that makes one, got {short_repr(optimizer)}"
        )
    return Partial(_Given(known_optimizer(optimizer, params)))


class _Given(NamedTuple):
    """A function of no arguments that returns `value`; equal ones compile once."""

    value: Any

    def __call__(self):
        return self.value


def _beginning(params, state: FitResult | None) -> tuple[Point, Carried]:
    """Where a run starts, and the leaves of the parameters that do not train."""
    if state is not None and not isinstance(state, FitResult):
        raise TypeError(f"state must be a result of fit, got {type(state).__name__}")
    params = params if state is None else state.params
    model_state = None
    if isinstance(params, Stateful):
        model_state = jax.tree.map(jnp.asarray, params.state)
        params = params.params
    floats, rest = trainable(params)
    floats = jax.tree.map(jnp.asarray, floats)
    before = (None, jnp.asarray(0)) if state is None else (state.optimizer_state, state.step)
    return Point(floats, before[0], model_state, before[1]), Carried(rest)


def _check_samplers(run: Run) -> None:
    if run.sample_tasks is not None:
        check_sampler("sample_tasks", run.sample_tasks, run.key)
    if run.evaluation_tasks is not None and run.evaluation_tasks is not run.sample_tasks:
        check_sampler("evaluation_tasks", run.evaluation_tasks, run.key)


def _first(optimizer: Partial, point: Point, patience: int | None) -> State:
    if point.optimizer_state is not None:
        return begin(point, patience)
    return start(optimizer, point.params, point.model_state, patience=patience)


def _traced(tree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _result(run: Run, offset, state: State, history) -> FitResult:
    """The outcome of the steps from `offset` on, of which the history has a row each.

    Evaluations are due by the number of the step since the very start. Within a traced program,
    where that is not known, their count is the one that every offset has.
    """
    loss, aux, evaluation, unconverged = history
    if every := run.evaluate_every:
        first = (-offset - 1) % every
        count = len(loss) // every if _traced(offset) else -(-(len(loss) - int(first)) // every)
        rows = first + every * np.arange(count)
        evaluation = jax.tree.map(lambda x: x[rows], evaluation)
    point = state.now if state.best is None else _chosen(state)
    return FitResult(whole(run, point), point.optimizer_state, loss, aux, evaluation, point.step,
               state.finite, state.stopped, unconverged)  # fmt: skip


def _chosen(state: State) -> Point:
    """The best point; the last one while nothing was evaluated."""
    known = state.best.value < jnp.inf  # type: ignore[union-attr]
    return jax.tree.map(lambda b, n: jnp.where(known, b, n), state.best.point, state.now)  # type: ignore[union-attr]


def _announce(result: FitResult) -> None:
    """Warn of inner problems that were not solved, and of a run that stopped as not finite."""
    if result.unconverged is not None and np.nansum(result.unconverged):
        some = int(np.sum(np.asarray(result.unconverged) > 0))
        warnings.warn(
            f"at {some} of {len(result.loss)} steps {UNSOLVED} (unconverged of the result has the "
            "share of tasks at each step)",
            ConvergenceWarning,
            stacklevel=5,
        )
    if bool(result.finite):
        return
    finite = np.flatnonzero(np.isfinite(np.asarray(result.loss)))
    last = f"the last finite loss was {result.loss[finite[-1]]:.4g}" if len(finite) else (
        "no loss was finite"
    )  # fmt: skip
    warnings.warn(
        f"training stopped after {len(finite)} of {len(result.loss)} steps: the loss or an update "
        f"was not finite; {last}, and the parameters are those of update {int(result.step)}. Try a "
        "smaller learning rate or inner rate, or optax.clip_by_global_norm before the optimizer; "
        "look for a square root, logarithm or division at zero in the loss",
        RuntimeWarning,
        stacklevel=5,
    )
