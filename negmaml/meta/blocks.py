r"""What the algorithms compute for a block of tasks: sums over tasks, and aux stacked over them.

A block is a function (algorithm, rule, params, tasks) -> ((value, gradient, ...), aux). The inner
steps are in `negmaml.meta.inner`, the ways through them in `negmaml.meta.mixed` (forward over
reverse) and `negmaml.meta.lowrank` (wide dense layers).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.convergence import warn_unless
from negmaml.meta import implicit, stateful
from negmaml.meta.batching import as_tasks, mean_over_tasks
from negmaml.meta.inner import adapt
from negmaml.meta.leaves import (
    Loss,
    check_params,
    check_scalar,
    holding,
    merge,
    ready,
    scalar,
    split,
    trainable,
)
from negmaml.meta.lowrank import Plan, factored_loss, wide_weights
from negmaml.meta.mixed import backwards
from negmaml.meta.stateful import Stateful
from negmaml.rules import UNSOLVED, GradientDescent, Schedule, run


class LearnedRates(NamedTuple):
    """Meta-parameters of Meta-SGD: where adaptation starts, and its rates (of any sign)."""

    params: Any
    rate: Any


class Algorithm(NamedTuple):
    """An algorithm and what it is made with; hashable, so that jit knows equal ones again."""

    block: Callable
    loss: Loss
    inner_loss: Loss | None = None
    hashable_mask: Any = None
    batch_size: int | None = None
    has_aux: bool = False
    method: str | None = None

    def __call__(self, rule, params, tasks):
        result, converged = self.with_convergence(rule, params, tasks)
        warn_unless(converged, UNSOLVED)
        return result

    def with_convergence(self, rule, params, tasks):
        """(result, whether each task converged); True for a rule that takes steps."""
        if isinstance(params, Stateful):
            return self._with_state(rule, params, tasks), True
        floats, rest = trainable(params)
        solves = {objective: implicit.objective, exact: implicit.exact,
                  first_order: implicit.first_order} if rule.implicit else {}  # fmt: skip
        block = partial(solves.get(self.block, self.block), self._holding(rest), rule, floats)
        sums, aux = mean_over_tasks(block, as_tasks(tasks), self.batch_size)
        aux, converged = aux if solves else (aux, True)
        value, *gradient = sums
        value = (value, aux) if self.has_aux else value
        return ((value, *gradient) if gradient else value), converged

    def _with_state(self, rule, params: Stateful, tasks):
        """The same for a loss that hands a state on; its new value comes with the gradient."""
        remat = self.method == "remat"
        ways: dict[Any, Any] = {
            objective: stateful.objective,
            exact: partial(stateful.exact, remat=remat),
            first_order: stateful.first_order,
            summed: stateful.summed,
        }
        if self.block not in ways:
            raise TypeError(
                "params must be LearnedRates(params, rate) for meta_sgd, got Stateful parameters; "
                "to learn rates of a model with state, make them a part of its params, as "
                "negmaml.examples.maml_plus_plus does"
            )
        if self.method not in (None, "reverse", "remat"):
            raise TypeError(
                "Stateful parameters go with method 'reverse' or 'remat', since the state changes "
                f"what the recursion of others would run through again, got {self.method!r}"
            )
        losses = stateful.Losses(self.loss, self.inner_loss or self.loss, self.mask)

        def block(tasks):
            sums, more = ways[self.block](losses, rule, params, tasks)
            return (sums if isinstance(sums, tuple) else (sums,)), more

        (value, *gradient), (aux, states) = mean_over_tasks(block, as_tasks(tasks), self.batch_size)
        value = (value, aux) if self.has_aux else value
        if not gradient:
            return value
        return value, Stateful(gradient[0], stateful.mean_state(states))

    def _holding(self, rest):
        """The algorithm whose losses take the leaves that are no parameters from `rest`."""
        if not jax.tree.leaves(rest):
            return self
        rest = rest.params if isinstance(rest, LearnedRates) else rest
        inner = self.inner_loss and holding(self.inner_loss, rest)
        return self._replace(loss=holding(self.loss, rest), inner_loss=inner)

    @property
    def inner(self) -> Callable:
        """The loss of the inner steps, without auxiliary output."""
        if self.inner_loss is not None:
            return scalar(self.inner_loss)
        return scalar(self.loss, self.has_aux)

    @property
    def mask(self):
        """The pytree of booleans that was given."""
        if self.hashable_mask is None:
            return None
        treedef, flags = self.hashable_mask
        return treedef.unflatten(flags)


def reporting(value_and_grad: Any) -> Callable:
    """(params, tasks) -> (result, whether each task converged), True where that is not known."""
    function = getattr(value_and_grad, "func", None)
    if isinstance(function, Algorithm):  # as the algorithms return it
        return partial(function.with_convergence, *value_and_grad.args)
    return lambda params, tasks: (value_and_grad(params, tasks), True)


def objective(algorithm: Algorithm, rule, params, tasks, remat: bool = False):
    """The sum of the query losses after adapting."""

    def one_task(support, query):
        theta = adapt(algorithm.inner, params, support, rule, mask=algorithm.mask, remat=remat)
        return check_scalar(algorithm.loss(theta, query), algorithm.has_aux)

    losses, aux = jax.vmap(one_task)(*tasks)
    return (jnp.sum(losses),), aux


def exact(algorithm: Algorithm, rule, params, tasks):
    """The second-order gradient, by the method asked for or the best that applies."""
    rule, params = ready(rule, params)
    method = algorithm.method
    if method in (None, "low-rank"):
        wide = _wide(algorithm, rule, params, tasks)
        dense = "reverse" if rule.steps == 1 else "mixed"
        method = "low-rank" if wide or method else dense
    if method == "mixed":
        (value, gradient, _), aux = _mixed(algorithm, rule, params, tasks)
        return (value, gradient), aux
    if method == "low-rank":
        total = partial(_factored, algorithm, rule, wide)
    else:
        total = partial(objective, algorithm, rule, remat=method == "remat")

    def loss(params):
        (value,), aux = total(params, tasks)
        return value, aux

    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return (value, gradient), aux


def first_order(algorithm: Algorithm, rule, params, tasks):
    """The gradient of the query loss at the adapted parameters."""
    params = check_params(params)

    def one_task(support, query):
        theta = adapt(algorithm.inner, params, support, rule, mask=algorithm.mask)
        return _at_query(algorithm, theta, query)

    (value, aux), gradient = jax.vmap(one_task)(*tasks)
    return _sum((value, gradient)), aux


def summed(algorithm: Algorithm, rule, params, tasks):
    """The sum of the inner gradients, or the way an optimizer went."""
    rule, params = ready(rule, params)
    if rule.implicit:
        raise TypeError(f"reptile needs a rule that steps, got {rule!r}")
    moving, frozen = split(params, algorithm.mask)

    def one_task(support, query):
        gradient = jax.grad(_on_moving(algorithm, frozen, support))
        theta, (visited, _) = run(rule, gradient, moving)
        if rule.sums_gradients:
            visited = visited if rule.steps > 1 else jax.tree.map(lambda x: x[None], visited)
            way = jax.tree.map(lambda g: jnp.sum(g, 0), lax.map(gradient, visited))
        else:
            way = jax.tree.map(jnp.subtract, moving, theta)
        value, aux = check_scalar(algorithm.loss(merge(theta, frozen), query), algorithm.has_aux)
        return (value, merge(way, jax.tree.map(jnp.zeros_like, frozen))), aux

    sums, aux = jax.vmap(one_task)(*tasks)
    return _sum(sums), aux


def learned(algorithm: Algorithm, rule, meta, tasks):
    """Value, and gradients in the parameters and in the rates."""
    if not isinstance(meta, LearnedRates):
        raise TypeError(f"params must be LearnedRates(params, rate), got {type(meta).__name__}")
    own = GradientDescent(check_params(meta.rate), rule.steps)
    (value, gradient, of_rule), aux = _mixed(algorithm, own, meta.params, tasks)
    return (value, LearnedRates(gradient, of_rule.rate)), aux


def _sum(tree):
    """The sum over the task axis of every leaf."""
    return jax.tree.map(lambda x: jnp.sum(x, 0), tree)


def _on_moving(algorithm: Algorithm, frozen, support):
    """The loss on the support as a function of the leaves that adapt."""
    return lambda theta: algorithm.inner(merge(theta, frozen), support)


def _at_query(algorithm: Algorithm, theta, query):
    """((value, aux), gradient) of the loss on the query."""

    def loss(theta):
        return check_scalar(algorithm.loss(theta, query), algorithm.has_aux)

    return jax.value_and_grad(loss, has_aux=True)(theta)


def _mixed(algorithm: Algorithm, rule, params, tasks):
    """Sums of value, gradient in the parameters and in the rule, by the backward recursion."""
    rule, params = ready(rule, params)
    rule = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float, x)), rule)
    moving, frozen = split(params, algorithm.mask)
    inner = jax.grad(algorithm.inner)

    def one_task(support, query):
        theta, visited = run(rule, jax.grad(_on_moving(algorithm, frozen, support)), moving)
        (value, aux), slope = _at_query(algorithm, merge(theta, frozen), query)

        def of_support(full):
            return inner(full, support)

        gradient, of_rule = backwards(rule, of_support, frozen, visited, slope, algorithm.mask)
        return (value, gradient, of_rule), aux

    sums, aux = jax.vmap(one_task)(*tasks)
    return _sum(sums), aux


def _wide(algorithm: Algorithm, rule, params, tasks) -> frozenset[int]:
    """The weights that the low-rank method keeps factored."""
    if rule.plain_rate is None:
        if algorithm.method == "low-rank":
            raise ValueError(f"method 'low-rank' needs GradientDescent as the rule, got {rule!r}")
        return frozenset()
    rates = _leaf_rates(rule, params, algorithm.mask)
    one_number = [r is not None and jnp.size(r[0]) == 1 for r in rates]
    losses = algorithm.inner, scalar(algorithm.loss, algorithm.has_aux)
    on_support, on_query = (
        wide_weights(loss, params, jax.tree.map(lambda x: x[0], data), one_number, rule.steps)
        for loss, data in zip(losses, tasks, strict=True)
    )
    return on_support & on_query


def _leaf_rates(rule, params, mask) -> list:
    """For each leaf of the parameters its rate at every step; None if it is frozen."""

    def by_step(rate):
        return rate.first(rule.steps) if isinstance(rate, Schedule) else [rate] * rule.steps

    def below(rate, part):
        return jax.tree.map(lambda _: by_step(rate), part)

    rates = jax.tree.map(
        below, rule.plain_rate, params, is_leaf=lambda node: isinstance(node, Schedule)
    )
    moving = split(jax.tree.map(lambda _: True, params), mask)[0]
    structure: Any = jax.tree.structure(params)
    flags, of_leaves = map(structure.flatten_up_to, (moving, rates))
    return [own if moves else None for moves, own in zip(flags, of_leaves, strict=True)]


def _factored(algorithm: Algorithm, rule, wide, params, tasks):
    """The sum of the query losses, with wide weights adapted in factored form."""
    rates, leaves = _leaf_rates(rule, params, algorithm.mask), jax.tree.leaves(params)

    def rate(i: int, k: int):
        value = jnp.asarray(rates[i][k], leaves[i].dtype)
        return value.reshape(()) if i in wide else value

    def inner(params, data):
        return algorithm.inner(params, data), None

    def loss(params, data):
        return check_scalar(algorithm.loss(params, data), algorithm.has_aux)

    plan = Plan(rate, rule.steps, wide, [r is not None for r in rates])

    def one_task(support, query):
        return factored_loss((inner, loss), params, plan, support, query)

    losses, aux = jax.vmap(one_task)(*tasks)
    return (jnp.sum(losses),), aux
