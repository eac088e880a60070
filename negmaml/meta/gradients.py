r"""The algorithms on a block of tasks: weighted sums, and aux stacked over tasks.

A block is a function (algorithm, rule, params, tasks, weight) -> ((value, gradient, ...), aux) of
sums over tasks times the weight, one over the number of all tasks. The inner
steps are in `negmaml.meta.inner`, the ways through them in `negmaml.meta.forward_over_reverse`
(forward over reverse) and `negmaml.meta.lowrank` (wide dense layers).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.convergence import warn_unless
from negmaml._core.settings import own_transfers
from negmaml.meta import implicit, stateful
from negmaml.meta.batching import as_tasks, mean_over_tasks
from negmaml.meta.choice import choose, leaf_rates, symmetric
from negmaml.meta.forward_over_reverse import backwards
from negmaml.meta.inner import adapt
from negmaml.meta.lowrank import Plan, factored_loss
from negmaml.meta.partition import (
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
from negmaml.meta.shape_errors import explained_loops
from negmaml.meta.stateful import Stateful
from negmaml.rules import UNSOLVED, GradientDescent, run


class MetaSGDParams(NamedTuple):
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

    @own_transfers
    def __call__(self, rule, params, tasks):
        result, converged = self.with_convergence(rule, params, tasks)
        warn_unless(converged, UNSOLVED)
        return result

    def with_convergence(self, rule, params, tasks):
        """(result, whether each task converged); True for a rule that takes steps."""
        with explained_loops():
            if isinstance(params, Stateful):
                return self._with_state(rule, params, tasks), True
            return self._without_state(rule, params, tasks)

    def _without_state(self, rule, params, tasks):
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
                "params must be MetaSGDParams(params, rate) for meta_sgd, got Stateful parameters; "
                "to learn rates of a model with state, make them a part of its params, as "
                "negmaml.examples.maml_plus_plus does"
            )
        if self.method not in (None, "reverse", "remat"):
            raise TypeError(
                "Stateful parameters go with method 'reverse' or 'remat', since the state changes "
                f"what the recursion of others would run through again, got {self.method!r}"
            )
        losses = stateful.Losses(self.loss, self.inner_loss or self.loss, self.mask)

        def block(tasks, weight):
            sums, more = ways[self.block](losses, rule, params, tasks, weight)
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
        rest = rest.params if isinstance(rest, MetaSGDParams) else rest
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


def objective(algorithm: Algorithm, rule, params, tasks, weight, remat: bool = False):
    """The sum of the query losses after adapting."""

    def one_task(support, query):
        theta = adapt(algorithm.inner, params, support, rule, mask=algorithm.mask, remat=remat)
        return check_scalar(algorithm.loss(theta, query), algorithm.has_aux)

    losses, aux = jax.vmap(one_task)(*tasks)
    return (weight * jnp.sum(losses),), aux


def exact(algorithm: Algorithm, rule, params, tasks, weight):
    """The second-order gradient, by the method asked for or the best that is exact."""
    rule, params = ready(rule, params)
    method, wide = choose(algorithm, rule, params, tasks)
    if method == "mixed":
        (value, gradient, _), aux = _mixed(algorithm, rule, params, tasks, weight)
        return (value, gradient), aux
    if method == "low-rank":
        total = partial(_factored, algorithm, rule, wide)
    else:
        total = partial(objective, algorithm, rule, remat=method == "remat")

    def loss(params):
        (value,), aux = total(params, tasks, weight)
        return value, aux

    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return (value, gradient), aux


def first_order(algorithm: Algorithm, rule, params, tasks, weight):
    """The gradient with every inner gradient for a constant."""
    rule, params = ready(rule, params)
    if isinstance(rule, GradientDescent) or rule.implicit:  # d theta_i / d params = I

        def one_task(support, query):
            theta = adapt(algorithm.inner, params, support, rule, mask=algorithm.mask)
            return _at_query(algorithm, theta, query, weight)

        (value, aux), gradient = jax.vmap(one_task)(*tasks)
        return _sum((value, gradient)), aux

    def total(params):
        moving, frozen = split(params, algorithm.mask)
        still = lax.stop_gradient(frozen)

        def one_task(support, query):
            gradient = jax.grad(_on_moving(algorithm, still, support))
            theta, _ = run(
                rule, lambda at: lax.stop_gradient(gradient(lax.stop_gradient(at))), moving
            )
            return check_scalar(algorithm.loss(merge(theta, frozen), query), algorithm.has_aux)

        losses, aux = jax.vmap(one_task)(*tasks)
        return weight * jnp.sum(losses), aux

    (value, aux), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return (value, gradient), aux


def summed(algorithm: Algorithm, rule, params, tasks, weight):
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
    return jax.tree.map(lambda x: weight * x, _sum(sums)), aux


def learned(algorithm: Algorithm, rule, meta, tasks, weight):
    """Value, and gradients in the parameters and in the rates."""
    if not isinstance(meta, MetaSGDParams):
        raise TypeError(f"params must be MetaSGDParams(params, rate), got {type(meta).__name__}")
    meta = MetaSGDParams(check_params(meta.params), check_params(meta.rate))
    own = GradientDescent(meta.rate, rule.steps)
    rates = jax.tree.structure(meta.rate)
    if symmetric(algorithm, meta.params, tasks):
        (value, gradient, of_rule), aux = _mixed(algorithm, own, meta.params, tasks, weight)
        return (value, MetaSGDParams(gradient, jax.tree.unflatten(rates, of_rule))), aux

    def loss(meta):
        own = GradientDescent(meta.rate, rule.steps)
        (value,), aux = objective(algorithm, own, meta.params, tasks, weight)
        return value, aux

    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(meta)
    return (value, gradient), aux


def _sum(tree):
    """The sum over the task axis of every leaf."""
    return jax.tree.map(lambda x: jnp.sum(x, 0), tree)


def _on_moving(algorithm: Algorithm, frozen, support):
    """The loss on the support as a function of the leaves that adapt."""
    return lambda theta: algorithm.inner(merge(theta, frozen), support)


def _at_query(algorithm: Algorithm, theta, query, weight):
    """((value, aux), gradient) of the loss on the query times the weight."""

    def loss(theta):
        value, aux = check_scalar(algorithm.loss(theta, query), algorithm.has_aux)
        return weight * value, aux

    return jax.value_and_grad(loss, has_aux=True)(theta)


def _mixed(algorithm: Algorithm, rule, params, tasks, weight):
    """Sums of value and gradients, in the parameters and in the rule, by `backwards`."""
    rule, params = ready(rule, params)
    moving, frozen = split(params, algorithm.mask)
    inner = jax.grad(algorithm.inner)

    def one_task(support, query):
        theta, visited = run(rule, jax.grad(_on_moving(algorithm, frozen, support)), moving)
        (value, aux), slope = _at_query(algorithm, merge(theta, frozen), query, weight)

        def of_support(full):
            return inner(full, support)

        gradient, of_rule = backwards(rule, of_support, frozen, visited, slope, algorithm.mask)
        return (value, gradient, of_rule), aux

    sums, aux = jax.vmap(one_task)(*tasks)
    return _sum(sums), aux


def _factored(algorithm: Algorithm, rule, wide, params, tasks, weight):
    """The sum of the query losses, with wide weights adapted in factored form."""
    rates, leaves = leaf_rates(rule, params, algorithm.mask), jax.tree.leaves(params)

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
    return (weight * jnp.sum(losses),), aux
