"""The test of meta-learning as papers report it: mean over fresh tasks, with its interval."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial

from negmaml._core.checks import check_count, check_flag, check_optional
from negmaml._core.convergence import warn_unless
from negmaml._core.deprecation import renamed_arguments
from negmaml._core.display import Table, add_table_repr, shape_text
from negmaml._core.keys import check_key
from negmaml._core.settings import own_transfers
from negmaml._core.types import PRNGKeyArray
from negmaml.meta.batching import as_tasks, leading_axis
from negmaml.meta.partition import (
    check_loss,
    check_scalar,
    hashable,
    holding,
    merge,
    ready,
    scalar,
    split,
    trainable,
)
from negmaml.meta.stateful import Stateful, parts, threading
from negmaml.rules import UNSOLVED, InnerRule, as_rule, as_solution, run
from negmaml.training.carried import Carried

NORMAL_95 = 1.959964  # half the width of the interval in standard errors


@add_table_repr
class Evaluation(NamedTuple):
    """What `evaluate` returns.

    Attributes:
        values: the loss or metric on the query of each task, shape (episodes,); after 0, 1, ...
            steps, shape (steps + 1, episodes), with `per_step`.
        unconverged: the share of tasks whose inner problem was not solved, from 0 to 1; zero for a
            rule that takes steps.
    """

    values: Any
    unconverged: Any = 0.0

    @property
    def mean(self):
        """Over tasks, shape () or (steps + 1,)."""
        return jnp.mean(self.values, -1)

    @property
    def standard_error(self):
        """Of the mean: the standard deviation over tasks / sqrt(episodes)."""
        return jnp.std(self.values, -1, ddof=1) / self.values.shape[-1] ** 0.5

    @property
    def interval(self):
        """Half the width of the 95% interval: 1.96 standard errors."""
        return NORMAL_95 * self.standard_error

    def _summary(self) -> Table:
        title = f"Evaluation on {self.values.shape[-1]} tasks, mean and 95% interval"
        if isinstance(self.values, jax.core.Tracer) or self.values.ndim > 2:
            return Table(title, [("values", shape_text(self.values))])
        pairs = zip(np.atleast_1d(self.mean), np.atleast_1d(self.interval), strict=True)
        texts = [f"{mean:.4g} ± {interval:.2g}" for mean, interval in pairs]
        if self.values.ndim == 1:
            rows = [("after adapting", texts[0])]
            if np.any(self.unconverged):
                rows.append(("not converged", f"{np.mean(self.unconverged):.2%} of tasks"))
            return Table(title, rows)
        return Table(title, [(str(k), text) for k, text in enumerate(texts)], ("steps", "value"))


@renamed_arguments(by_step="per_step")
@own_transfers
def evaluate(
    key: PRNGKeyArray,
    params: Any,
    loss: Callable[..., Any],
    rule: InnerRule,
    tasks: Any,
    *,
    metric: Callable[..., Any] | None = None,
    episodes: int = 600,
    per_step: bool = False,
    mask: Any = None,
) -> Evaluation:
    r"""The loss, or another metric, on the query of fresh tasks after adapting to their support.

        value_i = metric(adapt(loss, params; support_i), query_i),   mean ± 1.96 sd / sqrt(episodes)

    Arguments:
        key: jax.random key, of which the tasks are drawn.
        params: as in `fit`: any pytree, or `Stateful(params, state)`.
        loss: function of (params, data) that adaptation descends.
        rule: as in `adapt`, of the test. It may take more steps than training did: a `Schedule`
            repeats its last value.
        tasks: key -> tasks; as many draws as `episodes` takes, one after another, so that memory is
            that of one draw. Or `Tasks`, all of which are used, and `episodes` is not read.
        metric: (params, query) -> one number, such as accuracy; `loss` when left out. With
            `Stateful` parameters (params, state, query) -> number.
        episodes: number of tasks. Few-shot papers report 600.
        per_step: whether to give the metric after every inner step, 0 included.
        mask: as in `adapt`.

    Returns `Evaluation`. Compiled once for the same functions and shapes. Warns where a rule such
    as `Proximal` did not solve its inner problem, except inside jit and vmap. Raises as `adapt`,
    and TypeError for `per_step` of a rule that takes no steps.

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
    loss, metric = check_loss("loss", loss), check_optional(check_loss, "metric", metric)
    test = _Test(loss, metric, check_optional(hashable, "mask", mask), per_step)
    params = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, float) else x, params)
    if callable(tasks):
        source = tasks if not jax.tree_util.all_leaves([tasks]) else Partial(tasks)
        found = _drawn(test, key, Carried(params), rule, source, episodes=episodes)
    else:
        found = _given(test, Carried(params), rule, as_tasks(tasks))
    values, converged = found
    if converged is None:
        return Evaluation(values)
    if not isinstance(converged, jax.core.Tracer):
        warn_unless(converged, UNSOLVED)
    return Evaluation(values, 1 - jnp.mean(converged, dtype=values.dtype))


class _Test(NamedTuple):
    """What is asked; hashable, so that jit knows equal ones again."""

    loss: Callable
    metric: Callable | None
    hashable_mask: Any
    per_step: bool

    def of_task(self, params, rule, support, query):
        """(metric after adapting, shape () or (steps + 1,), whether a rule that solves did)."""
        mask = self.hashable_mask and self.hashable_mask[0].unflatten(self.hashable_mask[1])
        stateful = isinstance(params, Stateful)
        floats, rest = trainable(params.params if stateful else params)
        rule, floats = ready(rule, floats)
        moving, frozen = split(floats, mask)

        def value(point):
            theta, state = point if stateful else (point, None)
            whole = merge(merge(theta, frozen), rest)
            data = (whole, state, query) if stateful else (whole, query)
            result = (self.metric or self.loss)(*data)
            if self.metric is None and stateful:
                result = parts(result)[0]
            return check_scalar(result, False, "loss" if self.metric is None else "metric")[0]

        if stateful:
            rule, gradient, start = threading(self.loss, rule, params.state, support,
                                              (moving, frozen, rest))  # fmt: skip
        else:
            objective = scalar(holding(self.loss, rest))

            def of_support(theta):
                return objective(merge(theta, frozen), support)

            if rule.implicit:
                theta, info = as_solution(rule.solve(of_support, moving), rule.steps)
                return value(theta), info.converged
            gradient, start = jax.grad(of_support), moving
        last, (visited, _) = run(rule, gradient, start)
        if not self.per_step:
            return value(last), None
        if rule.steps == 1:
            visited = jax.tree.map(lambda x: x[None], visited)
        return jnp.append(lax.map(value, visited), value(last)), None


@partial(jax.jit, static_argnums=0)
def _given(test: _Test, params: Carried, rule, tasks):
    """(values, convergence) of the tasks, the task axis last."""
    leading_axis("tasks.support and tasks.query", tuple(tasks))
    found = jax.vmap(lambda support, query: test.of_task(params.tree, rule, support, query))(*tasks)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), found)


@partial(jax.jit, static_argnums=0, static_argnames="episodes")
def _drawn(test: _Test, key, params: Carried, rule, sample, *, episodes: int):
    """(values, convergence) of `episodes` tasks, drawn one batch after another."""

    def draw(i):
        return as_tasks(sample(jax.random.fold_in(key, i)))

    count = leading_axis("tasks.support and tasks.query", tuple(jax.eval_shape(draw, 0)))
    draws = -(-episodes // count)
    found = lax.map(lambda i: _given(test, params, rule, draw(i)), jnp.arange(draws))

    def joined(x):
        x = jnp.moveaxis(x, 0, -2)  # draws before the tasks of each
        return x.reshape(*x.shape[:-2], -1)[..., :episodes]

    return jax.tree.map(joined, found)
