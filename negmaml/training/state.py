"""The state of a run of `fit`, and the compiled program that advances it by many steps."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.tree_util import Partial

from negmaml._core.display import tree_text
from negmaml._core.jit import is_concrete
from negmaml._core.pytree import pytree, static, tree_where
from negmaml.meta.gradients import takes_key
from negmaml.meta.model_variables import Form, Variables, like_state
from negmaml.meta.shape_errors import WithShapeErrors
from negmaml.training.nonfinite import (
    LossScale,
    SkipState,
    next_skips,
    rejected_by_optimizer,
)
from negmaml.training.sharding import TaskSharding, unpack_result, with_unconverged_fraction

MAX_STRIDE = 64  # steps between two branches on whether a run has ended
SMALL = 2**12  # numbers of a leaf that is cheaper to copy than to reduce by itself
# Folded into the key, for tasks of steps and of evaluations, and for random gradients.
TRAINING, EVALUATION, ESTIMATE = 0, 1, 2


class TrainPoint(NamedTuple):
    """Parameters from which training can continue.

    model_state: `()` for a model without a state. step: number of updates so far.
    """

    params: Any
    optimizer_state: Any
    model_state: Any
    step: Any


class Held(NamedTuple):
    """Parameters that a run may return in place of its last ones; the optimizer has one state."""

    params: Any
    model_state: Any
    step: Any


class Best(NamedTuple):
    """The lowest evaluation (of -value, where the highest is asked for), and the number since.

    Only with `patience`.
    """

    value: Any
    misses: Any


class TrainState(NamedTuple):
    """The state of a run between two steps.

    kept: what a run returns that ends at `now` without being finite there: with `patience` the
    parameters of the best evaluation; before a finite one, or without, the last parameters at which
    the loss is known to be finite. None where the run can be repeated up to them. skips: None
    unless batches may be skipped.
    """

    now: TrainPoint
    kept: Held | None
    finite: Any
    best: Best | None
    stopped: Any
    skips: SkipState | None

    @property
    def running(self):
        """True until the run is stopped or not finite."""
        return self.finite & ~self.stopped


@pytree
class TrainSetup:
    """The functions and options of a run, which stay the same from step to step.

    The functions are `Partial`s or other pytrees, so that this is a pytree too. `sample_tasks` is
    None where batches are given. `form` makes the model of its parameters and its state. `program`
    identifies the functions for a checkpoint; another value is traced again.
    """

    key: Any
    value_and_grad: Any
    sample_tasks: Any
    optimizer: Any
    evaluate: Any
    evaluation_tasks: Any
    form: Form
    evaluate_every: int | None = static()
    patience: int | None = static()
    monitor: str | None = static()
    monitor_mode: str = static()
    nonfinite: int | LossScale | None = static()
    sharding: TaskSharding | None = static()
    gradient_norm: bool = static(default=False)
    program: str = static(default="")


@partial(jax.jit, static_argnames=("patience", "keep"))
def init_state(
    optimizer: Partial, point: TrainPoint, skips: SkipState | None, *, patience: bool, keep: bool
) -> TrainState:
    """Return the state of a run that starts from a point, with a new optimizer if it has none.

    keep: whether to keep good parameters, which `patience` does, too.
    """
    # None is part of the structure, so this branch is decided while tracing.
    if point.optimizer_state is None:
        point = point._replace(optimizer_state=optimizer().init(point.params))
    best = Best(jnp.asarray(jnp.inf), jnp.asarray(0)) if patience else None
    kept = held(point) if keep or patience else None
    state = TrainState(point, kept, jnp.asarray(True), best, jnp.asarray(False), skips)
    # Copies, since `advance_in_place` writes its results in place of the arrays that it gets.
    return jax.tree.map(jnp.copy, state)


def held(point: TrainPoint) -> Held:
    """Return the part of a point that a run may return later."""
    return Held(point.params, point.model_state, point.step)


def _advance(
    setup: TrainSetup, state: TrainState, start, limit, batches=None, *, length: int, stride=1
):
    """Return (state, history) after `length` steps from step `start` on, none from `limit` on.

    batches: of each step, where they are not sampled. stride: a divisor of `length`, the number of
    steps between two branches on an accelerator. A history is (loss, aux, evaluation, unconverged
    fraction), stacked; it is blank for steps that are not taken.
    """
    numbers = start + jnp.arange(length), batches
    first = jax.eval_shape(lambda: (jax.tree.map(lambda x: x[0], numbers), jnp.asarray(True)))
    take_step, shapes = _traced_once(partial(_take_step, setup), *first, state)
    blank = jax.tree.map(_blank, shapes[1])

    def goes_on(state, i):
        return state.running & (i < limit)

    # A run that has ended passes its state on: a scan cannot stop early.
    def branch_on_each(state, numbers):
        def step(state, number):
            take = partial(take_step, number, jnp.asarray(True))
            return lax.cond(goes_on(state, number[0]), take, lambda state: (state, blank), state)

        return lax.scan(step, state, numbers)

    # A branch copies the whole state on an accelerator, a kernel for each array; a selection is
    # part of the kernels that update it.
    def branch_once(state, numbers):
        def step(state, number):
            take = goes_on(state, number[0])
            return tree_where(take, take_step(number, take, state), (state, blank))

        def several(state, numbers):
            blanks = jax.tree.map(lambda x: jnp.broadcast_to(x, (stride, *x.shape)), blank)
            return lax.cond(
                goes_on(state, numbers[0][0]),
                lambda state: lax.scan(step, state, numbers),
                lambda state: (state, blanks),
                state,
            )

        groups = jax.tree.map(lambda x: x.reshape(-1, stride, *x.shape[1:]), numbers)
        state, history = lax.scan(several, state, groups)
        return state, jax.tree.map(lambda x: x.reshape(length, *x.shape[2:]), history)

    if stride == 1:
        return branch_on_each(state, numbers)
    return lax.platform_dependent(state, numbers, cpu=branch_on_each, default=branch_once)


advance = jax.jit(_advance, static_argnames=("length", "stride"))
# The results of a program that is not part of another take the place of its state, so that a run
# holds each array once.
advance_in_place = jax.jit(_advance, static_argnames=("length", "stride"), donate_argnames="state")


def stride_of(*counts: int) -> int:
    """Return the largest stride that divides all numbers of steps: no step is computed in vain."""
    common = math.gcd(*counts)
    return max(s for s in range(1, MAX_STRIDE + 1) if common % s == 0)


def _take_step(setup: TrainSetup, number, take, state: TrainState):
    """Return (state, history of one step) after step i; no evaluation is due unless `take`.

    number: (i, the tasks of the step), with None where they are to be sampled.
    """
    (i, tasks), now = number, state.now
    if setup.sample_tasks is not None:
        tasks = setup.sample_tasks(address(setup.key, TRAINING, i))
    scale = None if state.skips is None else state.skips.scale
    key = address(setup.key, ESTIMATE, i) if takes_key(setup.value_and_grad) else None
    options = tasks, scale, key
    (loss, aux), gradient, model_state, unconverged = _gradient(setup, now, *options)

    def value_of(params):  # for optimizers with a line search
        return _gradient(setup, now._replace(params=params), *options)[0][0]

    optimizer = optax.with_extra_args_support(setup.optimizer())
    # Optimizers without extra arguments ignore them.
    updates, optimizer_state = optimizer.update(
        gradient, now.optimizer_state, now.params, value=loss, grad=gradient, value_fn=value_of
    )
    params = optax.apply_updates(now.params, updates)
    updated = TrainPoint(params, optimizer_state, model_state, now.step + 1)
    loss_is_finite = jnp.isfinite(loss)
    updated, finite, skips = _accepted(setup, state, updated, loss_is_finite, gradient)
    evaluation = _evaluation(setup, i, take & finite, updated)
    # A finite loss makes the point before the update good.
    kept, best, stopped = state.kept, state.best, state.stopped
    if kept is not None:
        unevaluated = best is None or best.value == jnp.inf
        kept = tree_where(loss_is_finite & unevaluated, held(now), kept)
    if best is not None:
        assert setup.evaluate_every is not None and setup.patience is not None
        due = finite & ((i + 1) % setup.evaluate_every == 0)
        value = _monitored(setup, evaluation)
        improved = due & (value < best.value)  # False for NaN
        kept = tree_where(improved, held(updated), kept)
        misses = jnp.where(improved, 0, best.misses + due)
        best = Best(jnp.where(improved, value, best.value), misses)
        stopped = misses >= setup.patience
    norm = _norm(gradient) if setup.gradient_norm else None
    history = loss, aux, evaluation, unconverged, norm
    return TrainState(updated, kept, finite, best, stopped, skips), history


def _accepted(setup: TrainSetup, state: TrainState, updated: TrainPoint, loss_is_finite, gradient):
    """Return (the point after a step, whether the run is still finite, skips)."""
    now, rejected = state.now, rejected_by_optimizer(updated.optimizer_state)
    finite = _all_finite(updated.params)
    if state.skips is not None:
        finite &= loss_is_finite & _all_finite(gradient)
        updated = tree_where(finite, updated, now._replace(step=updated.step))
        skips, goes_on = next_skips(setup.nonfinite, state.skips, finite)
        return updated, goes_on, skips
    # No selection between the old and the new point, which would hold both: `good_point` knows
    # which of them a run returns.
    if rejected is None:
        return updated, finite & loss_is_finite, None
    # The optimizer has kept the parameters, so the state of the model stays with them.
    model_state = tree_where(rejected, now.model_state, updated.model_state)
    return updated._replace(model_state=model_state), finite & (loss_is_finite | rejected), None


def _gradient(setup: TrainSetup, point: TrainPoint, tasks, scale, key):
    """Return ((loss, aux), gradient, model state, unconverged fraction) at a point.

    scale: a factor of the loss in its derivatives, or None. key: of a random estimate.
    """
    shard = with_unconverged_fraction if setup.sharding is None else setup.sharding.shard_gradient
    function = WithShapeErrors(shard(setup.value_and_grad), "value_and_grad")
    model = Variables(point.params, point.model_state, setup.form)
    result, unconverged = function(model, tasks, scale, key)
    loss, aux, (gradient, model_state) = unpack_result(result)
    model_state = like_state(model_state, point.model_state)
    return (loss, aux), _check_gradient(point.params, gradient), model_state, unconverged


def good_point(setup: TrainSetup, state: TrainState) -> TrainPoint:
    """Return the last point; after a step that is not finite the one that was kept.

    The optimizer starts again there, since its own state may not be finite.
    """

    def last_good(state):
        good = TrainPoint(optimizer_state=None, **state.kept._asdict())
        return good._replace(optimizer_state=setup.optimizer().init(good.params))

    if is_concrete(state.finite):  # then nothing is copied
        return state.now if bool(state.finite) else last_good(state)
    return lax.cond(state.finite, lambda state: state.now, last_good, state)


def recombine(setup: TrainSetup, point: TrainPoint):
    """Return the model in the user's form."""
    return setup.form.model(point.params, point.model_state)


def _check_gradient(params, gradient):
    """Return the gradient with None where `params` has it; raise unless they fit each other."""

    def fitting(p, g):
        if p is None:  # a leaf that does not train
            return None
        if not (jax.tree_util.all_leaves([g]) and jnp.shape(g) == jnp.shape(p)):
            raise ValueError("shapes differ")
        return g

    # Without this check broadcasting would train on a gradient of another shape.
    try:
        return jax.tree.map(fitting, params, gradient, is_leaf=lambda x: x is None)
    except ValueError as mismatch:
        raise ValueError(
            "value_and_grad must return a gradient like the parameters "
            f"({tree_text(params)}), got {tree_text(gradient)}"
        ) from mismatch


def _traced_once(function, *arguments):
    """Return the traced function, for calls within the same trace, and the shapes of its result.

    Tracing a meta-gradient takes longer than running it on a small model. A branch of `lax.cond`
    whose shapes have to be known as well would be traced twice.
    """
    program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    structure = jax.tree.structure(shapes)

    def call(*arguments):
        return jax.tree.unflatten(structure, jaxpr_as_fun(program)(*jax.tree.leaves(arguments)))

    return call, shapes


def _evaluation(setup: TrainSetup, i, take, point: TrainPoint):
    """Return the result of `evaluate` after step i; blank if none is due or `take` is False."""
    if setup.evaluate is None:
        return None

    def evaluate(point):
        tasks = setup.evaluation_tasks(address(setup.key, EVALUATION, i))
        return setup.evaluate(recombine(setup, point), tasks)

    evaluate, shapes = _traced_once(evaluate, point)
    if setup.patience is not None:
        _monitored(setup, shapes)  # raises before anything is compiled
    # `cond` computes one branch, except under vmap over runs, whose steps agree anyway.
    due = take & ((i + 1) % setup.evaluate_every == 0)
    return lax.cond(due, evaluate, lambda _: jax.tree.map(_blank, shapes), point)


def _monitored(setup: TrainSetup, evaluation):
    """Return the number of an evaluation that `patience` follows, lower for better.

    Raises ValueError if `monitor` does not name one number.
    """
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(evaluation)
    }
    # A number by itself has no name.
    value = named.get("" if setup.monitor is None else setup.monitor)
    if getattr(value, "shape", None) != ():
        numbers = [name for name, leaf in named.items() if name and leaf.shape == ()]
        if setup.monitor is None and numbers:
            raise ValueError(
                f"patience needs monitor= where evaluate returns several values; one of {numbers}"
            )
        raise ValueError(
            f"evaluate must return one number to stop by patience, or several of which monitor="
            f"{setup.monitor!r} names one; it returns {tree_text(evaluation)}"
            + (f" with the numbers {numbers}" if numbers else "")
        )
    if isinstance(value, jax.ShapeDtypeStruct):
        return value
    value = jnp.asarray(value, jnp.result_type(float))
    return -value if setup.monitor_mode == "max" else value


def address(key, purpose: int, i):
    """Return the key of step i for one purpose, so that a run can be cut at any step."""
    return jax.random.fold_in(jax.random.fold_in(key, purpose), i)


def _all_finite(tree):
    """Return whether all numbers are finite."""
    leaves = [leaf.ravel() for leaf in jax.tree.leaves(tree)]
    parts = [leaf for leaf in leaves if leaf.size > SMALL]
    # One kernel for all small leaves of a type, while large ones are not copied.
    small = [leaf for leaf in leaves if leaf.size <= SMALL]
    for dtype in dict.fromkeys(leaf.dtype for leaf in small):
        parts.append(jnp.concatenate([leaf for leaf in small if leaf.dtype == dtype]))
    # 0 x is NaN for an x that is not finite. XLA adds products up without storing them, while on a
    # CPU it stores a flag for each number.
    return jnp.all(jnp.array([jnp.sum(part * 0) == 0 for part in parts]))


def _norm(tree):
    """Return the square root of the sum of all squares, in float32 or the type of the numbers."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))))
               for leaf in jax.tree.leaves(tree)]  # fmt: skip
    return jnp.sqrt(sum(squares))


def _blank(shape):
    """Return NaN for a number that was not computed, zero for an integer."""
    value = jnp.nan if jnp.issubdtype(shape.dtype, jnp.inexact) else 0
    return jnp.full(shape.shape, value, shape.dtype)
