"""What a run is made of, where it stands, and one compiled stretch of it."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.tree_util import Partial

from negmaml._core.deprecation import renamed_attribute
from negmaml._core.display import Table, add_table_repr, shape_text, tree_text
from negmaml._core.pytree import pytree, static
from negmaml.meta.partition import merge
from negmaml.meta.shape_errors import Explained
from negmaml.meta.stateful import Stateful
from negmaml.training.carried import Carried
from negmaml.training.sharding import Spread, unconverged_share

TRAINING, EVALUATION = 0, 1  # what the key is folded with


@add_table_repr
class FitResult(NamedTuple):
    """What `fit` returns.

    Attributes:
        params: after `step` updates; of the last step with a finite loss if `finite` is False, and
            of the best evaluation with `patience`.
        optimizer_state: that goes with them.
        loss: value at the parameters before each step, shape (steps,); NaN where none was taken.
        aux: auxiliary output of each step, stacked; None when the loss has none.
        evaluation: after each `evaluate_every` steps, stacked; None without `evaluate`.
        step: number of updates in `params`, those of a `state` it went on from included.
        finite: whether all losses and updates were finite.
        stopped_early: whether `patience` or a callback ended it before its steps.
        unconverged: at each step the share of tasks whose inner problem was not solved, shape
            (steps,), from 0 to 1; None where no rule solves any, or for a function of your own.
    """

    params: Any
    optimizer_state: Any
    loss: Any
    aux: Any
    evaluation: Any
    step: Any
    finite: Any
    stopped_early: Any
    unconverged: Any = None

    def _summary(self) -> Table:
        if any(isinstance(x, jax.core.Tracer) for x in (self.loss, self.step, self.finite)):
            return Table("FitResult, traced", [("loss", shape_text(self.loss))])
        losses = np.asarray(self.loss, float)
        taken = losses[..., np.isfinite(losses).reshape(-1, losses.shape[-1]).any(0)]
        ends = np.asarray([np.all(self.finite), np.any(self.stopped_early)])
        how = ("" if ends[0] else ", not all finite") + (", stopped early" if ends[1] else "")
        steps = sorted({int(s) for s in np.ravel(self.step)})
        rows = [
            ("params", tree_text(self.params)),
            ("updates", " to ".join(str(s) for s in dict.fromkeys((steps[0], steps[-1]))) + how),
            ("loss", f"{shape_text(self.loss)}, {_tail_text(taken)}"),
        ]
        for name in ("aux", "evaluation"):
            value = getattr(self, name)
            if value is not None:
                rows.append((name, tree_text(value)))
        if self.unconverged is not None and np.nansum(self.unconverged):
            share = np.nanmean(self.unconverged)
            rows.append(("not converged", f"{share:.2%} of the inner problems"))
        return Table("FitResult", rows)


FitResult.stopped = renamed_attribute(  # type: ignore[attr-defined]
    "FitResult.stopped", "stopped_early"
)


def _tail_text(losses) -> str:
    """The mean of the last tenth of the steps, for each run of a batch.

    No standard error: the steps of a run are not independent of each other.
    """
    if not losses.size:
        return "none finite"
    count = max(losses.shape[-1] // 10, 1)
    rows = losses[..., -count:].reshape(-1, count)
    known = [row[np.isfinite(row)].mean() for row in rows if np.isfinite(row).any()]
    ends = f"{min(known):.4g} to {max(known):.4g} over {len(rows)} runs"
    text = f"{known[0]:.4g}" if len(rows) == 1 else ends
    return f"mean of the last {count} steps {text}"


class Point(NamedTuple):
    """Parameters that can be gone on from."""

    params: Any
    optimizer_state: Any
    model_state: Any  # None unless the loss carries one
    step: Any


class Best(NamedTuple):
    """The best evaluation so far, and how many since were no better."""

    point: Point
    value: Any
    misses: Any


class State(NamedTuple):
    """Where a run is, and where it was when its loss was last known to be finite."""

    now: Point
    sound: Point
    finite: Any
    best: Best | None  # with patience
    stopped: Any

    @property
    def going(self):
        """Whether there is another step to take."""
        return self.finite & ~self.stopped


@pytree
class Run:
    """All that a step needs besides the state; functions as `Partial`s, so that it is a pytree."""

    key: Any
    value_and_grad: Any
    sample_tasks: Any  # None where the batches are handed in
    optimizer: Any
    evaluate: Any
    evaluation_tasks: Any
    carried: Carried
    evaluate_every: int | None = static()
    patience: int | None = static()
    spread: Spread | None = static()
    program: str = static(default="")  # recorded by a checkpoint; another one is traced anew


@partial(jax.jit, static_argnames="length")
def advance(run: Run, state: State, start, limit, batches=None, *, length: int):
    """The state after `length` steps from `start` on, as far as `limit`; and what was recorded.

    batches: of each step, where they are not sampled.
    """

    def step(state, number):
        i, batch = number
        take, shapes = _traced_once(partial(_take, run, i, batch), state)
        blank = jax.tree.map(_blank, shapes[1])
        go = state.going & (i < limit)
        return lax.cond(go, take, lambda state: (state, blank), state)

    return lax.scan(step, state, (start + jnp.arange(length), batches))


def _take(run: Run, i, batch, state: State):
    """One update, and (loss, aux, evaluation, share of tasks that did not converge)."""
    now = state.now
    tasks = batch
    if run.sample_tasks is not None:
        tasks = run.sample_tasks(address(run.key, TRAINING, i))
    (loss, aux), gradient, model_state, unconverged = _gradient(run, now, tasks)

    def value_of(params):  # for optimizers that search along a line
        return _gradient(run, now._replace(params=params), tasks)[0][0]

    optimizer = optax.with_extra_args_support(run.optimizer())
    updates, optimizer_state = optimizer.update(
        gradient, now.optimizer_state, now.params, value=loss, grad=gradient, value_fn=value_of
    )
    params = optax.apply_updates(now.params, updates)
    known = jnp.isfinite(loss)
    finite = known & _all_finite(params)
    sound = _choose(known, now, state.sound)
    moved = _choose(finite, Point(params, optimizer_state, model_state, now.step + 1), sound)
    evaluation = _evaluation(run, i, moved)
    best, stopped = state.best, state.stopped
    if best is not None:
        due = (i + 1) % run.evaluate_every == 0
        best = _choose(due & finite, _better(best, moved, evaluation), best)
        stopped = best.misses >= run.patience
    record = loss, aux, evaluation, unconverged
    return State(moved, sound, finite, best, stopped), record


def _gradient(run: Run, point: Point, tasks):
    """((loss, aux), gradient, model state, unconverged) at a point."""
    spread = unconverged_share if run.spread is None else run.spread.over
    function = Explained(spread(run.value_and_grad), "value_and_grad")
    result, unconverged = function(whole(run, point), tasks)
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            "value_and_grad must return (value, gradient), got "
            f"{tree_text(result)}; for the objective maml(loss, rule) pass "
            "maml_value_and_grad(loss, rule), for another one jax.value_and_grad(objective)"
        )
    value, gradient = result
    loss, aux = value if isinstance(value, tuple) else (value, None)
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ValueError(
            f"value_and_grad must return one real number as the value, got {tree_text(loss)}"
        )
    model_state = None
    if point.model_state is not None:
        gradient, model_state = gradient
        model_state = jax.tree.map(
            lambda new, old: jnp.asarray(new, old.dtype), model_state, point.model_state
        )
    return (loss, aux), _like(point.params, gradient), model_state, unconverged


def whole(run: Run, point: Point):
    """The parameters as the user gave them: with the leaves that do not train, and model state."""
    params = merge(point.params, run.carried.tree)
    return params if point.model_state is None else Stateful(params, point.model_state)


def _like(params, gradient):
    """The gradient with None where `params` has it; raises unless they fit each other."""

    def fitting(p, g):
        if p is None:
            return None
        if not (jax.tree_util.all_leaves([g]) and jnp.shape(g) == jnp.shape(p)):
            raise ValueError("shapes differ")
        return g

    try:
        return jax.tree.map(fitting, params, gradient, is_leaf=lambda x: x is None)
    except ValueError as mismatch:
        raise ValueError(
            "value_and_grad must return a gradient like the parameters "
            f"({tree_text(params)}), got {tree_text(gradient)}"
        ) from mismatch


def _traced_once(function, argument):
    """The function, to be called within the same trace, and the shapes of its result.

    Tracing a meta-gradient takes longer than running it on a small model, and a branch that also
    has to be known by shape would be traced twice.
    """
    program, shapes = jax.make_jaxpr(function, return_shape=True)(argument)
    structure = jax.tree.structure(shapes)

    def again(argument):
        return jax.tree.unflatten(structure, jaxpr_as_fun(program)(*jax.tree.leaves(argument)))

    return again, shapes


def _evaluation(run: Run, i, point: Point):
    """What `evaluate` says after step i, if it is one that is evaluated."""
    if run.evaluate is None:
        return None

    def evaluate(point):
        tasks = run.evaluation_tasks(address(run.key, EVALUATION, i))
        return run.evaluate(whole(run, point), tasks)

    evaluate, shapes = _traced_once(evaluate, point)
    if run.patience is not None and getattr(shapes, "shape", None) != ():
        raise ValueError(
            f"evaluate must return one number, lower for better, to stop by patience; got "
            f"{tree_text(shapes)}"
        )
    due = (i + 1) % run.evaluate_every == 0
    return lax.cond(due, evaluate, lambda _: jax.tree.map(_blank, shapes), point)


def _better(best: Best, point: Point, value) -> Best:
    """The better of the two; a value that is NaN is none."""
    improved = value < best.value
    fresh = Best(point, jnp.asarray(value, best.value.dtype), jnp.zeros_like(best.misses))
    return _choose(improved, fresh, best._replace(misses=best.misses + 1))


def address(key, purpose: int, i):
    """The key of step i for one purpose."""
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


@partial(jax.jit, static_argnames="patience")
def start(optimizer: Partial, params, model_state, *, patience: int | None) -> State:
    """The state of a run before its first step."""
    state = optimizer().init(params)
    return begin(Point(params, state, model_state, jnp.asarray(0)), patience)


def begin(point: Point, patience: int | None) -> State:
    """The state of a run that starts from a point."""
    best = Best(point, jnp.asarray(jnp.inf), jnp.asarray(0)) if patience else None
    return State(point, point, jnp.asarray(True), best, jnp.asarray(False))
