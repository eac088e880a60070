"""Evaluation on fresh tasks: the mean after adaptation and its 95% interval, as papers report."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial

from negmaml._core.checks import check_count, check_flag, check_optional, short_repr
from negmaml._core.convergence import warn_unless
from negmaml._core.deprecation import renamed_arguments
from negmaml._core.display import Table, add_table_repr, shape_text
from negmaml._core.keys import check_key
from negmaml._core.meshes import any_mesh, gathered, place, share
from negmaml._core.settings import own_transfers
from negmaml._core.types import Array, Devices, PRNGKeyArray, PyTree
from negmaml.meta.batching import as_tasks, leading_axis
from negmaml.meta.inner import adapt_leaves, inner_gradient
from negmaml.meta.model_variables import Variables, keys_of_tasks, variables
from negmaml.meta.partition import (
    check_inputs,
    check_loss,
    check_scalar,
    combine,
    freeze_mask,
    partition,
    thaw_mask,
)
from negmaml.meta.stateful import LiftedLoss, StatefulRule
from negmaml.rules import UNSOLVED, InnerRule, as_rule, run
from negmaml.training.sharding import TaskSharding, task_sharding
from negmaml.training.statistics import NORMAL_95, finite_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@add_table_repr
class Evaluation(NamedTuple):
    """The result of `evaluate`: a value for each task, and their mean with its error.

    With a dict of metrics, `values` and all that follows from them are dicts of the same keys.

    Attributes:
        values: the loss or metric on the query of each task, shape (episodes,). With `per_step` it
            has the values after 0, 1, ... steps, shape (steps + 1, episodes).
        unconverged: the fraction of tasks whose inner problem was not solved; zero for a rule that
            takes steps.

    >>> import negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> targets = jnp.array([0.0, 2.0])
    >>> rule = nm.GradientDescent(0.5, steps=2)
    >>> result = nm.evaluate(
    ...     jax.random.key(0), 0.0, square, rule, nm.Tasks(targets, targets), per_step=True
    ... )
    >>> result.values.shape, result.mean.tolist()  # after 0, 1 and 2 steps
    ((3, 2), [1.0, 0.25, 0.0625])
    """

    values: Any
    unconverged: Any = 0.0

    @property
    def mean(self) -> Any:
        """The mean over all tasks, shape () or (steps + 1,); not finite if a task diverged."""
        return jax.tree.map(lambda x: jnp.mean(x, -1), self.values)

    @property
    def standard_error(self) -> Any:
        """The standard error of the mean: the standard deviation over tasks / sqrt(episodes)."""
        return jax.tree.map(lambda x: jnp.std(x, -1, ddof=1) / x.shape[-1] ** 0.5, self.values)

    @property
    def interval(self) -> Any:
        """The half width of the 95% interval of the mean, 1.96 standard errors."""
        return jax.tree.map(lambda error: NORMAL_95 * error, self.standard_error)

    @property
    def median(self) -> Any:
        """The median over the tasks with a finite value; NaN if there are none."""
        return jax.tree.map(
            lambda x: jnp.nanmedian(jnp.where(jnp.isfinite(x), x, jnp.nan), -1), self.values
        )

    @property
    def diverged(self) -> Any:
        """The share of tasks whose value is not finite, shape () or (steps + 1,)."""
        return jax.tree.map(lambda x: jnp.mean(~jnp.isfinite(x), -1, dtype=x.dtype), self.values)

    def plot(self) -> "Figure":
        """Draw the values: against the number of inner steps, or their distribution over tasks.

        With `per_step` a panel has the mean over the tasks with a finite value, its 95% interval,
        and the range of the middle half of the tasks. Without, it has a histogram and the mean.

        Returns a matplotlib Figure, with a panel for each metric. Needs matplotlib: pip install
        "negmaml[figures]".
        """
        from negmaml.training.figures import draw_evaluation

        return draw_evaluation(self)

    def _summary(self) -> Table:
        named = self.values if isinstance(self.values, dict) else {"value": self.values}
        first, *_ = named.values()
        title = f"Evaluation on {first.shape[-1]} tasks, mean and 95% interval"
        if isinstance(first, jax.core.Tracer) or first.ndim > 2:
            return Table(title, [(name, shape_text(x)) for name, x in named.items()])
        # One row for each number of steps; a single row without `per_step`.
        texts = {name: [_text(row) for row in np.atleast_2d(x)] for name, x in named.items()}
        if first.ndim == 1:
            alone = not isinstance(self.values, dict)
            rows = [("after adapting" if alone else name, text) for name, (text,) in texts.items()]
            if np.any(self.unconverged):
                rows.append(("not converged", f"{np.mean(self.unconverged):.2%} of tasks"))
            return Table(title, rows)
        rows = [(str(k), *row) for k, row in enumerate(zip(*texts.values(), strict=True))]
        return Table(title, rows, ("steps", *named))


def _text(values) -> str:
    """Return mean and interval of the values of tasks; of the finite ones, labelled as such."""
    mean, interval, diverged = finite_mean(np.asarray(values))
    text = f"{mean:.4g} ± {interval:.2g}"
    return f"{text} without {diverged:.2g} of tasks, which diverged" if diverged else text


@renamed_arguments(by_step="per_step")
@own_transfers
@any_mesh
def evaluate(
    key: PRNGKeyArray,
    params: PyTree,
    loss: Callable[..., Any],
    rule: InnerRule,
    tasks: Callable[[Array], Any] | Iterable[Any],
    *,
    metric: Callable[..., Any] | dict[str, Callable[..., Any]] | None = None,
    episodes: int = 600,
    per_step: bool = False,
    mask: Any = None,
    mesh: Devices | None = None,
    task_axis: str | Sequence[str] | None = None,
) -> Evaluation:
    r"""Return the loss, or another metric, on the query of fresh tasks after adaptation.

        value_i = metric(adapt(loss, params; support_i), query_i),   mean ± 1.96 sd / sqrt(episodes)

    Arguments:
        key: jax.random key for the tasks.
        params: as in `fit`: any pytree, or a model with a state.
        loss: the loss of the inner steps, a function of (params, data).
        rule: the inner rule of the test, as in `adapt`. It may take more steps than in training: a
            `Schedule` repeats its last value.
        tasks: key -> tasks, called for one draw after another until there are `episodes` tasks, so
            that memory is that of one draw. Or `Tasks`, all of which are used; `episodes` is not
            read then.
        metric: (params, query) -> one number, such as accuracy; `loss` by default. It takes
            the model as the loss does, with `Stateful` parameters (params, state, query). Or a
            dict of such functions, among which the loss itself may be: all from one adaptation.
        episodes: number of tasks. Few-shot papers report 600.
        per_step: whether to return the metric after every inner step, 0 included.
        mask: as in `adapt`.
        mesh, task_axis: as in `fit`: the devices share the draws of tasks, or the given tasks, of
            any number. Parameters may be sharded as in `fit`. The values are those of one device
            up to rounding.

    Returns `Evaluation`. It compiles once for the same functions and shapes. Warns where a rule
    such as `Proximal` did not solve its inner problem, except inside jit and vmap. Raises as
    `adapt` does, and TypeError for `per_step` of a rule that takes no steps.

    >>> import negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> tasks = nm.Tasks(jnp.array([0.0, 2.0]), jnp.array([0.0, 2.0]))
    >>> evaluate(jax.random.key(0), 0.0, square, nm.GradientDescent(0.5), tasks).values.tolist()
    [0.0, 0.5]
    """
    key = check_key("key", key)
    episodes = check_count("episodes", episodes)
    rule = as_rule("rule", rule)
    per_step = check_flag("per_step", per_step)
    if per_step and rule.implicit:
        raise TypeError(f"per_step needs a rule that takes steps, got {rule!r}")
    # From here on functions are hashable, and so static arguments of the compiled programs.
    metrics = _check_metrics(metric, loss)
    loss = check_loss("loss", loss)
    test = _Test(loss, metrics, check_optional(freeze_mask, "mask", mask), per_step)
    model, sharding = variables(params), task_sharding(mesh, task_axis)
    if callable(tasks):
        sample = tasks if not jax.tree_util.all_leaves([tasks]) else Partial(tasks)
        compute = partial(_on_draws, test, episodes=episodes, sharding=sharding)
        arguments: tuple = (model, rule, key, sample)
    else:
        compute = partial(_on_tasks, test, sharding=sharding)
        arguments = model, rule, as_tasks(tasks), 0
    with sharding.context(key) if sharding is not None else contextlib.nullcontext():
        if sharding is not None:
            arguments = place(arguments, sharding.mesh)
        found = compute(*arguments)
    values, converged = found
    if converged is None:
        return Evaluation(values)
    # Inside jit and vmap a warning would come from every device; the result has the fraction.
    if not isinstance(converged, jax.core.Tracer):
        warn_unless(converged, UNSOLVED)
    kind = jnp.result_type(*jax.tree.leaves(values))
    return Evaluation(values, 1 - jnp.mean(converged, dtype=kind))


def _check_metrics(metric, loss) -> tuple[tuple[str, Any], ...] | None:
    """Return metrics as pairs (name, function), where None stands for the loss.

    A single one has the name "". Returns None for the loss by itself.
    """
    if metric is None:
        return None
    if not isinstance(metric, dict):
        return (("", check_loss("metric", metric)),)
    if not metric or not all(isinstance(name, str) and name for name in metric):
        raise ValueError(
            "metric must be a function or a dict of functions by their names, such as "
            f'{{"accuracy": accuracy}}, got {short_repr(metric)}'
        )
    return tuple(
        (name, None if own is loss else check_loss(f"metric[{name!r}]", own))
        for name, own in metric.items()
    )


class _Test(NamedTuple):
    """The functions and options of an evaluation; hashable, so that equal ones compile once."""

    loss: Callable
    metrics: tuple[tuple[str, Any], ...] | None
    hashable_mask: Any
    per_step: bool

    def of_task(self, model: Variables, rule, support, query, keys):
        """Return (metrics, convergence) of one task, whose random keys replace those of the state.

        A metric has shape () or (steps + 1,). The convergence is None for a rule of steps.
        """
        floats, state, form = model
        state = combine(keys, state)
        rule, floats = check_inputs(rule, floats)
        moving, frozen = partition(floats, thaw_mask(self.hashable_mask))
        loss = LiftedLoss(self.loss, form)

        def value(point):
            theta, state = point
            adapted = combine(theta, frozen)
            # The state that the loss returns is not needed after the last step.
            own = partial(loss, adapted, state, query)
            if self.metrics is None:
                return own()[0]
            arguments = *form.arguments(adapted, state), query
            found = {
                name: own()[0]
                if metric is None
                else check_scalar(metric(*arguments), False, f"metric {name}".strip())[0]
                for name, metric in self.metrics
            }
            return found.get("", found)

        if not self.per_step:
            point, info = adapt_leaves(loss, rule, (moving, frozen), state, support)
            return value(point), None if info.converged is True else info.converged
        gradient = inner_gradient(loss, frozen, support)
        # `run` stores every point before its step; the last one is added.
        last, (visited, _) = run(StatefulRule(rule), gradient, (moving, state))
        if rule.steps == 1:  # it comes without an axis for the steps
            visited = jax.tree.map(lambda x: x[None], visited)
        return jax.tree.map(jnp.append, lax.map(value, visited), value(last)), None


@partial(jax.jit, static_argnums=0, static_argnames="sharding")
def _on_tasks(test: _Test, model: Variables, rule, tasks, first, *, sharding: TaskSharding | None):
    """Return (values, convergence) of the tasks from number `first` on, the task axis last."""
    count = leading_axis("tasks.support and tasks.query", tuple(tasks))
    keys = keys_of_tasks(model.state, first + jnp.arange(count))

    def each(shared, items):
        of_task: Any = partial(test.of_task, *shared)
        tasks, keys = items
        return jax.vmap(of_task)(*tasks, keys)

    found = _shared(each, (model, rule), (tasks, keys), sharding)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), found)


@partial(jax.jit, static_argnums=0, static_argnames=("episodes", "sharding"))
def _on_draws(
    test: _Test, model: Variables, rule, key, sample, *, episodes: int,
    sharding: TaskSharding | None,
):  # fmt: skip
    """Return (values, convergence) of `episodes` tasks, drawn one batch after another."""

    def draw(key, sample, i):
        return as_tasks(sample(jax.random.fold_in(key, i)))

    # The last draw may have tasks beyond `episodes`, which are dropped.
    shapes = jax.eval_shape(partial(draw, key, sample), 0)
    count = leading_axis("tasks.support and tasks.query", tuple(shapes))

    def each(shared, numbers):
        model, rule, key, sample = shared
        return lax.map(
            lambda i: _on_tasks(test, model, rule, draw(key, sample, i), i * count, sharding=None),
            numbers,
        )

    numbers = jnp.arange(-(-episodes // count))
    found = _shared(each, (model, rule, key, sample), numbers, sharding)

    def join(x):
        x = jnp.moveaxis(x, 0, -2)  # the axis of draws before the axis of their tasks
        return x.reshape(*x.shape[:-2], -1)[..., :episodes]

    return jax.tree.map(join, found)


def _shared(each: Callable, shared, items, sharding: TaskSharding | None):
    """Return each(shared, items), on the devices that share them, if any."""
    if sharding is None:
        return each(shared, items)
    found = share(each, shared, items, sharding.mesh, sharding.axes)
    return gathered(found, sharding.mesh)
