r"""The meta-gradients of the algorithms, on a block of tasks at a time.

Every algorithm is a function

    (losses, rule, params, state, tasks, weight) -> ((value, gradient, ...), per task)

The first result holds sums over tasks of the loss times the weight, one over the number of all
tasks. `per task` is (aux, new state, convergence), stacked over tasks. The losses take and return a
state of the model; a model without one has the state `()` (`negmaml.meta.stateful`).

The inner steps are in `negmaml.meta.inner`. Derivatives through them are in this module by reverse
mode, in `negmaml.meta.forward_over_reverse`, and in `negmaml.meta.lowrank` for wide dense layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.convergence import warn_unless
from negmaml._core.settings import own_transfers
from negmaml.meta.batching import as_tasks, mean_over_tasks
from negmaml.meta.choice import LossPair, choose, has_symmetric_hessian, leaf_rates
from negmaml.meta.forward_over_reverse import backward_recursion
from negmaml.meta.inner import adapt_leaves, inner_gradient
from negmaml.meta.lowrank import LowRankPlan, factored_loss
from negmaml.meta.partition import (
    Loss,
    check_inputs,
    check_params,
    combine,
    partition,
    partition_floating,
    thaw_mask,
)
from negmaml.meta.shape_errors import explain_while_loops
from negmaml.meta.stateful import Stateful, StatefulRule, as_stateful, lift_loss, mean_state
from negmaml.rules import UNSOLVED, GradientDescent, run


class MetaSGDParams(NamedTuple):
    """Meta-parameters of `meta_sgd`: initial parameters and inner learning rates.

    `rate` is a number, or a pytree like `params` or a prefix of it. The rates are trained without
    a constraint, so they may become zero or negative.
    """

    params: Any
    rate: Any


class Algorithm(NamedTuple):
    """A gradient function of this module with its losses and options.

    It is hashable, so that jit recognises equal algorithms and does not compile again.
    """

    gradient: Callable
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
        """Return (result, convergence of each task); True for a rule that takes steps."""
        stateful = isinstance(params, Stateful)
        if stateful and self.gradient is meta_sgd:
            raise TypeError(
                "params must be MetaSGDParams(params, rate) for meta_sgd, got Stateful parameters; "
                "to learn rates of a model with state, make them a part of its params, as "
                "negmaml.examples.maml_plus_plus does"
            )
        # From here on the parameters are floating point leaves, and every loss has a state.
        params, state = as_stateful(params)
        floats, static = partition_floating(params)
        with explain_while_loops():
            block = partial(self.gradient, self.losses(static, stateful), rule, floats, state)
            sums, (aux, states, converged) = mean_over_tasks(
                block, as_tasks(tasks), self.batch_size
            )
        value, *gradient = sums
        result = (value, aux) if self.has_aux else value
        # `objective` returns the value only.
        if gradient:
            own = Stateful(gradient[0], mean_state(states)) if stateful else gradient[0]
            result = result, own
        return result, True if converged is None else converged

    def losses(self, static, stateful: bool) -> LossPair:
        """Return the losses as functions of the floating point leaves and the state."""
        # The loss takes the parameters of Meta-SGD without the rates.
        static = static.params if isinstance(static, MetaSGDParams) else static
        outer = lift_loss(self.loss, static, stateful, self.has_aux)
        inner = outer if self.inner_loss is None else lift_loss(self.inner_loss, static, stateful)
        return LossPair(inner, outer, thaw_mask(self.hashable_mask), self.method)


def reporting_convergence(value_and_grad: Any) -> Callable:
    """Return (params, tasks) -> (result, convergence of each task), True where it is not known."""
    function = getattr(value_and_grad, "func", None)
    if isinstance(function, Algorithm):  # a `Partial` of the algorithm and its rule
        return partial(function.with_convergence, *value_and_grad.args)
    return lambda params, tasks: (value_and_grad(params, tasks), True)


def objective(losses: LossPair, rule, params, state, tasks, weight, remat: bool = False):
    """Return the sum of the query losses after adaptation."""
    rule, params = check_inputs(rule, params)
    moving, frozen = partition(params, losses.mask)

    # The query loss starts from the state that the inner steps ended with.
    def one_task(support, query):
        (theta, adapted_state), info = adapt_leaves(
            losses.inner, rule, (moving, frozen), state, support, remat
        )
        value, new, aux = losses.outer(combine(theta, frozen), adapted_state, query)
        return value, (aux, new, _known(info))

    values, per_task = jax.vmap(one_task)(*tasks)
    return (weight * jnp.sum(values),), per_task


def second_order(losses: LossPair, rule, params, state, tasks, weight):
    """Return value and exact gradient, by the requested method or the fastest that is exact."""
    rule, params = check_inputs(rule, params)
    method, wide = choose(losses, rule, params, state, tasks)
    if method == "implicit":
        return _implicit(losses, rule, params, state, tasks, weight)
    if method == "mixed":
        (value, gradient, _), per_task = _mixed(losses, rule, params, state, tasks, weight)
        return (value, gradient), per_task
    if method == "low-rank":
        total = partial(_factored, losses, rule, wide)
    else:
        total = partial(objective, losses, rule, remat=method == "remat")
    return _differentiate(lambda params: total(params, state, tasks, weight), params)


def first_order(losses: LossPair, rule, params, state, tasks, weight):
    """Return value and gradient with every inner gradient, and the state after it, constant."""
    # An update such as weight decay uses the parameters too, and must be differentiated in them.
    rule, params = check_inputs(rule, params)
    if not (isinstance(rule, GradientDescent) or rule.implicit):
        return _differentiate(
            lambda params: _with_constant_gradients(losses, rule, params, state, tasks, weight),
            params,
        )
    # Here d theta_i / d params = I: the gradient is that of the query loss at theta_i.
    moving, frozen = partition(params, losses.mask)

    def one_task(support, query):
        (theta, adapted_state), info = adapt_leaves(
            losses.inner, rule, (moving, frozen), state, support
        )
        at = combine(theta, frozen)
        (value, (aux, new)), gradient = _at_query(losses, at, adapted_state, query, weight)
        return (value, gradient), (aux, new, _known(info))

    return _sum_over_tasks(one_task, tasks)


def _with_constant_gradients(losses: LossPair, rule, params, state, tasks, weight):
    """Return the sum of the query losses, whose inner gradients are constants for jax.grad."""
    moving, frozen = partition(params, losses.mask)

    def one_task(support, query):
        # Frozen leaves enter the inner steps by gradients only, which are constants.
        gradient = inner_gradient(losses.inner, lax.stop_gradient(frozen), support)

        def constant_gradient(point):
            return lax.stop_gradient(gradient(lax.stop_gradient(point)))

        (theta, adapted_state), _ = run(StatefulRule(rule), constant_gradient, (moving, state))
        value, new, aux = losses.outer(combine(theta, frozen), adapted_state, query)
        return value, (aux, new, None)

    values, per_task = jax.vmap(one_task)(*tasks)
    return (weight * jnp.sum(values),), per_task


def reptile(losses: LossPair, rule, params, state, tasks, weight):
    """Return value and the sum of the inner gradients, or params - theta for an optimizer."""
    rule, params = check_inputs(rule, params)
    if rule.implicit:
        raise TypeError(f"reptile needs a rule that steps, got {rule!r}")
    moving, frozen = partition(params, losses.mask)

    def one_task(support, query):
        gradient = inner_gradient(losses.inner, frozen, support)
        (theta, adapted_state), (visited, _) = run(StatefulRule(rule), gradient, (moving, state))
        if rule.sums_gradients:
            # One step comes without an axis for the steps.
            visited = visited if rule.steps > 1 else jax.tree.map(lambda x: x[None], visited)
            # Computed again, since `run` returns the points; one at a time, for memory.
            slopes = lax.map(lambda point: gradient(point)[0], visited)
            direction = jax.tree.map(lambda g: jnp.sum(g, 0), slopes)
        else:
            direction = jax.tree.map(jnp.subtract, moving, theta)
        # Reptile follows inner gradients, so the query loss is only reported.
        value, new, aux = losses.outer(combine(theta, frozen), adapted_state, query)
        direction = combine(direction, jax.tree.map(jnp.zeros_like, frozen))
        return (value, direction), (aux, new, None)

    sums, per_task = _sum_over_tasks(one_task, tasks)
    return jax.tree.map(lambda x: weight * x, sums), per_task


def meta_sgd(losses: LossPair, rule, meta, state, tasks, weight):
    """Return value, and gradients in the parameters and in the rates."""
    if not isinstance(meta, MetaSGDParams):
        raise TypeError(f"params must be MetaSGDParams(params, rate), got {type(meta).__name__}")
    meta = MetaSGDParams(check_params(meta.params), check_params(meta.rate))
    # The recursion also returns the gradient in the rates.
    if has_symmetric_hessian(losses, meta.params, state, tasks):
        own = GradientDescent(meta.rate, rule.steps)
        (value, gradient, of_rule), per_task = _mixed(
            losses, own, meta.params, state, tasks, weight
        )
        of_rate = jax.tree.unflatten(jax.tree.structure(meta.rate), of_rule)
        return (value, MetaSGDParams(gradient, of_rate)), per_task

    def total(meta):
        own = GradientDescent(meta.rate, rule.steps)
        return objective(losses, own, meta.params, state, tasks, weight)

    return _differentiate(total, meta)


def _implicit(losses: LossPair, rule, params, state, tasks, weight):
    """Return value and gradient of a rule that solves, by the implicit function theorem."""
    moving, frozen = partition(params, losses.mask)

    def one_task(support, query):
        def inner(theta, frozen):
            return losses.inner(combine(theta, frozen), state, support)[0]

        # With H the Hessian of the inner loss, pull_back maps a cotangent v of theta to
        # (I + H/strength)^{-1} v in the start, and to its effect through the frozen leaves.
        solution, pull_back = rule.solve_and_pull_back(inner, moving, frozen)
        at = combine(solution.params, frozen)
        (value, (aux, new)), slope = _at_query(losses, at, state, query, weight)
        # Frozen leaves act directly on the query loss, and through the solution.
        of_theta, direct = partition(slope, losses.mask)
        of_start, of_frozen, accurate = pull_back(of_theta)
        gradient = combine(of_start, jax.tree.map(jnp.add, direct, of_frozen))
        return (value, gradient), (aux, new, solution.info.converged & accurate)

    return _sum_over_tasks(one_task, tasks)


def _mixed(losses: LossPair, rule, params, state, tasks, weight):
    """Return value and gradients, in the parameters and in the rule, by forward over reverse."""
    rule, params = check_inputs(rule, params)
    moving, frozen = partition(params, losses.mask)

    def one_task(support, query):
        def inner(full):
            return losses.inner(full, state, support)[0]

        on_moving = jax.grad(lambda theta: inner(combine(theta, frozen)))
        theta, visited = run(rule, on_moving, moving)
        at = combine(theta, frozen)
        (value, (aux, new)), slope = _at_query(losses, at, state, query, weight)
        gradient, of_rule = backward_recursion(
            rule, jax.grad(inner), frozen, visited, slope, losses.mask
        )
        return (value, gradient, of_rule), (aux, new, None)

    return _sum_over_tasks(one_task, tasks)


def _factored(losses: LossPair, rule, wide, params, state, tasks, weight):
    """Return the sum of the query losses, with wide weights adapted in factored form."""
    rates, leaves = leaf_rates(rule, params, losses.mask), jax.tree.leaves(params)

    # In the dtype of the leaf, so that an update does not change it.
    def rate(i: int, k: int):
        value = jnp.asarray(rates[i][k], leaves[i].dtype)
        return value.reshape(()) if i in wide else value

    def inner(params, data):
        return losses.inner(params, state, data)[0], None

    def outer(params, data):
        value, new, aux = losses.outer(params, state, data)
        return value, (aux, new, None)

    plan = LowRankPlan(rate, rule.steps, wide, [r is not None for r in rates])

    def one_task(support, query):
        return factored_loss((inner, outer), params, plan, support, query)

    values, per_task = jax.vmap(one_task)(*tasks)
    return (weight * jnp.sum(values),), per_task


def _differentiate(total: Callable, params):
    """Return ((value, gradient), per task) of a function params -> ((value,), per task)."""

    def value_first(params):
        (value,), per_task = total(params)
        return value, per_task

    (value, per_task), gradient = jax.value_and_grad(value_first, has_aux=True)(params)
    return (value, gradient), per_task


def _at_query(losses: LossPair, theta, state, query, weight):
    """Return ((value, (aux, new state)), gradient) of the loss on the query times the weight."""

    # The weight is inside, see `mean_over_tasks`.
    def weighted(theta):
        value, new, aux = losses.outer(theta, state, query)
        return weight * value, (aux, new)

    return jax.value_and_grad(weighted, has_aux=True)(theta)


def _sum_over_tasks(one_task: Callable, tasks):
    """Return the first result of `one_task` summed over tasks, and the second stacked."""
    results, per_task = jax.vmap(one_task)(*tasks)
    return jax.tree.map(lambda x: jnp.sum(x, 0), results), per_task


def _known(info):
    """Return the convergence of a solver, or None where a rule takes steps and always succeeds."""
    return None if info.converged is True else info.converged
