r"""The meta-gradients of the algorithms, on a block of tasks at a time.

Every algorithm is a function

    (losses, rule, params, state, tasks, weight) -> ((value, gradient), per task)

The first result holds sums over tasks of the loss times the weight, one over the number of all
tasks. The gradient is a `ParamsAndRule` with None for what `losses.wrt` leaves out. `per task` is
(aux, new state, convergence), stacked over tasks. The losses take and return a state of the model;
a model without one has the state `()` (`negmaml.meta.stateful`). Tasks are (support, query, keys),
where `keys` replace the random keys in the state.

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
from negmaml._core.display import tree_text
from negmaml._core.meshes import any_mesh
from negmaml._core.pytree import nothing_like
from negmaml._core.settings import own_transfers
from negmaml.meta.batching import as_tasks, leading_axis, mean_over_tasks
from negmaml.meta.choice import LossPair, choose, leaf_rates
from negmaml.meta.flat_products import with_flat_products
from negmaml.meta.forward_over_reverse import backward_recursion
from negmaml.meta.inner import adapt_leaves, apply_at, inner_gradient, state_at
from negmaml.meta.lowrank import LowRankPlan, factored_loss
from negmaml.meta.memory import planned
from negmaml.meta.minibatches import check_whole, on_support
from negmaml.meta.model_variables import (
    MetaSGDParams,
    ParamsAndRule,
    Variables,
    as_rule_form,
    keys_of_tasks,
    split_pair,
    variables,
    variables_as_before,
)
from negmaml.meta.multi_step import multi_step_loss, split_weights
from negmaml.meta.partition import (
    Loss,
    check_inputs,
    check_params,
    combine,
    partition,
    thaw_mask,
)
from negmaml.meta.shape_errors import explain_while_loops
from negmaml.meta.stateful import LiftedLoss, StatefulRule, mean_state
from negmaml.rules import UNSOLVED, GradientDescent, accepted, run
from negmaml.rules.unroll import PLAIN, Unroll, numbers_of, of_same_kind, visit


class Algorithm(NamedTuple):
    """A gradient function of this module with its losses and options.

    It is hashable, so that jit recognises equal algorithms and does not compile again.
    learns_rates: whether it takes `MetaSGDParams`.
    """

    gradient: Callable
    loss: Loss
    inner_loss: Loss | None = None
    hashable_mask: Any = None
    batch_size: int | None = None
    has_aux: bool = False
    method: str | None = None
    unroll: Unroll = PLAIN
    wrt: str = "params"
    learns_rates: bool = False
    memory_budget: int | None = None
    explain: bool = False

    @own_transfers
    @any_mesh
    def __call__(self, rule, params, tasks):
        result, converged = self.with_convergence(rule, params, tasks)
        warn_unless(converged, UNSOLVED)
        return result

    def with_convergence(self, rule, params, tasks, first=0, scale=None):
        """Return (result, convergence of each task); True for a rule that takes steps.

        first: the number of the first task in the meta-batch, of which `tasks` may be a part.
        scale: a factor of the query loss where it is differentiated; the result is without it.
        """
        if self.memory_budget is not None or self.explain:
            own = planned(self, rule, params, tasks)
            return own.with_convergence(rule, params, tasks, first, scale)
        rule, step_weights = split_weights(rule)
        rule, (floats, state, form) = self._parts(rule, params)
        tasks = as_tasks(tasks)
        count = leading_axis("tasks.support and tasks.query", tuple(tasks))
        keys = keys_of_tasks(state, first + jnp.arange(count))
        with explain_while_loops():
            losses = self.losses(form)._replace(step_weights=step_weights)
            block = partial(self.gradient, losses, rule, floats, state)
            batches = (*tasks, keys), self.batch_size
            sums, (aux, states, converged) = mean_over_tasks(block, *batches, scale)
        sums = sums if scale is None else unscaled(sums, scale)
        value, *gradient = sums
        result = (value, aux) if self.has_aux else value
        # `objective` returns the value only.
        if gradient:
            new = mean_state(state, states)
            result = result, self._in_form_of(params, form, gradient[0], new)
        return result, True if converged is None else converged

    def _parts(self, rule, params) -> tuple[Any, Variables]:
        """Return the rule, which may be part of `params`, and the parts of the model."""
        # From here on the parameters are floating point leaves, and every loss has a state.
        floats, state, form = self.variables(params)
        if self.learns_rates and getattr(form, "kind", None) is not MetaSGDParams:
            raise TypeError(
                f"params must be MetaSGDParams(params, rate) for {self.gradient.__name__}, got "
                f"{type(params).__name__}"
            )
        if pair := as_rule_form(form):
            floats, own = pair.fixed.combined(floats)
            rule = of_same_class(own, rule)
        return rule, Variables(floats, state, form)

    def default_method(self, rule, params, tasks) -> tuple[str | None, int]:
        """Return (method as from `choose`, steps); the method is None if there is only one."""
        rule, step_weights = split_weights(rule)
        rule, (floats, state, form) = self._parts(rule, params)
        rule, floats = check_inputs(rule, floats)
        losses = self.losses(form)._replace(step_weights=step_weights)
        second = self.gradient is second_order
        method = choose(losses, rule, floats, state, as_tasks(tasks))[0] if second else None
        return method, rule.steps

    def variables(self, params, before=None) -> Variables:
        """Return the parts of meta-parameters, of which those train that `wrt` names.

        before: the meta-parameters of an earlier run, which `params` are the result of.
        """
        return pair_variables("both" if self.gradient is objective else self.wrt, params, before)

    def _in_form_of(self, params, form, gradient, state):
        """Return the gradient, and the new state of the model, in the form of the parameters."""
        of_whole = self.learns_rates or as_rule_form(form) is not None
        own = gradient if of_whole else gradient.params
        if isinstance(params, Variables):
            if self.wrt != "params" and not of_whole:
                raise TypeError(
                    f"params must be ParamsAndRule(params, rule) for fit with wrt={self.wrt!r}, "
                    "since the rule trains; got only params"
                )
            return own, state
        if self.wrt == "rule" and not of_whole:
            return gradient.rule
        own = form.gradient(params, own, state)
        return ParamsAndRule(own, gradient.rule) if self.wrt == "both" and not of_whole else own

    def losses(self, form) -> LossPair:
        """Return the losses as functions of the floating point leaves and the state."""
        pair = as_rule_form(form)
        wrt = pair.trained if pair else self.wrt
        # The loss takes the parameters of a pair only.
        form = form.inner if pair or self.learns_rates else form
        outer = LiftedLoss(self.loss, form, self.has_aux)
        inner = outer if self.inner_loss is None else LiftedLoss(self.inner_loss, form)
        mask = thaw_mask(self.hashable_mask)
        return LossPair(inner, outer, mask, self.method, self.unroll, wrt)


def of_same_class(own, rule):
    """Return the rule of a `ParamsAndRule`; raise unless it is of the class of the algorithm's."""
    if type(own) is not type(rule):
        raise TypeError(
            f"the rule in ParamsAndRule must be a {type(rule).__name__}, as the rule that the "
            f"algorithm was built with, got {own!r}"
        )
    return own


def pair_variables(wrt: str, params, before=None) -> Variables:
    """Return the parts of meta-parameters; `wrt` names the part of a pair that trains."""
    if not isinstance(params, ParamsAndRule) or isinstance(before, Variables):
        return variables_as_before(params, before)
    if wrt == "params":
        raise TypeError(
            "params is ParamsAndRule, and this algorithm has no gradient in its rule; build it "
            "with wrt='rule' or wrt='both' if it takes them, or pass only pair.params"
        )
    return variables(params, wrt)


def trained_variables(value_and_grad: Any, params, before=None) -> Variables:
    """Return the parts of meta-parameters, of which those train that `value_and_grad` trains.

    before: the meta-parameters of an earlier run, which `params` are the result of.
    """
    function: Any = getattr(value_and_grad, "func", None)
    if isinstance(function, Algorithm) or takes_key(value_and_grad):
        return function.variables(params, before)
    return variables_as_before(params, before)


def takes_key(value_and_grad: Any) -> bool:
    """Return whether this is a random estimate of a gradient, a function of a key, too."""
    return getattr(getattr(value_and_grad, "func", None), "takes_key", False) is True


def of_variables(value_and_grad: Any) -> Callable:
    """Return a function of (variables, tasks, first task, scale, key) for any `value_and_grad`.

    first task: its number among all. scale: of the loss, or None; a function of the user's takes it
    as `loss_scale`, and scales its gradient only. key: for a function that `takes_key`, which needs
    no scale. It returns (value, (gradient, new state)) and the convergence of each task, True where
    it is not known.
    """
    function = getattr(value_and_grad, "func", None)
    if isinstance(function, Algorithm):  # a `Partial` of the algorithm and its rule
        exact: Any = partial(function.with_convergence, *value_and_grad.args)
        return lambda parts, tasks, first, scale, key: exact(parts, tasks, first, scale)
    if takes_key(value_and_grad):
        return lambda parts, tasks, first, scale, key: (value_and_grad(parts, tasks, key), True)

    def of_model(parts, tasks, first, scale, key):
        model = parts.model
        options = {} if scale is None else {"loss_scale": scale}
        try:
            result = value_and_grad(model, tasks, **options)
        except TypeError as error:
            error.add_note(
                "value_and_grad gets (params, tasks) with all tasks of a step; for a loss of one "
                "task pass maml_value_and_grad(loss, rule)"
            )
            raise
        check_pair(result)
        value, gradient = result
        gradient, state = parts.form.parts_of_gradient(model, gradient)
        gradient = gradient if scale is None else unscaled(gradient, scale)
        return (value, (gradient, state)), True

    return of_model


def unscaled(tree, scale):
    """Return the leaves divided by a scale, in float32 at least, and in their own types."""
    return jax.tree.map(lambda x: (x / scale).astype(x.dtype), tree)


def check_pair(result) -> None:
    """Raise TypeError unless the result of a `value_and_grad` is (value, gradient)."""
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            f"value_and_grad must return (value, gradient), got {tree_text(result)}; for the "
            "objective maml(loss, rule) pass maml_value_and_grad(loss, rule), for another one "
            "jax.value_and_grad(objective)"
        )


def objective(losses: LossPair, rule, params, state, tasks, weight):
    """Return the sum of the query losses after adaptation."""
    rule, params = check_inputs(rule, params)
    moving, frozen = partition(params, losses.mask)

    # The query loss starts from the state that the inner steps ended with.
    def one_task(support, query, keys):
        start = combine(keys, state)
        if losses.step_weights is not None:
            gradient = inner_gradient(losses.inner, frozen, support)
            return multi_step_loss(losses, rule, gradient, (moving, start), frozen, query)
        (theta, adapted_state), info = adapt_leaves(
            losses.inner, rule, (moving, frozen), start, support, losses.unroll
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
        return _mixed(losses, rule, params, state, tasks, weight)
    if method == "low-rank":
        total: Callable = partial(_factored, wide=wide)
    else:
        unroll = losses.unroll._replace(remat=method == "remat")
        losses, total = losses._replace(unroll=unroll), objective
    return _differentiate(total, losses, rule, params, state, tasks, weight)


def first_order(losses: LossPair, rule, params, state, tasks, weight):
    """Return value and gradient with every inner gradient, and the state after it, constant."""
    # An update such as weight decay uses the parameters too, and must be differentiated in them.
    rule, params = check_inputs(rule, params)
    if rule.implicit and losses.wrt != "params":
        raise TypeError(
            f"fomaml has no gradient in the numbers of a rule that solves, got {rule!r}; use imaml "
            "or maml_value_and_grad"
        )
    last_only = losses.wrt == "params" and losses.step_weights is None
    constant_shift = isinstance(rule, GradientDescent) and last_only
    if not (constant_shift or rule.implicit):
        return _differentiate(_with_constant_gradients, losses, rule, params, state, tasks, weight)
    # Here d theta_i / d params = I: the gradient is that of the query loss at theta_i.
    moving, frozen = partition(params, losses.mask)

    def one_task(support, query, keys):
        start = combine(keys, state)
        (theta, adapted_state), info = adapt_leaves(
            losses.inner, rule, (moving, frozen), start, support
        )
        at = combine(theta, frozen)
        (value, (aux, new)), gradient = _at_query(losses, at, adapted_state, query, weight)
        return (value, ParamsAndRule(gradient, nothing_like(rule))), (aux, new, _known(info))

    return _sum_over_tasks(one_task, tasks)


def _with_constant_gradients(losses: LossPair, rule, params, state, tasks, weight):
    """Return the sum of the query losses, whose inner gradients are constants for jax.grad."""
    moving, frozen = partition(params, losses.mask)

    def one_task(support, query, keys):
        # Frozen leaves enter the inner steps by gradients only, which are constants.
        gradient = inner_gradient(losses.inner, lax.stop_gradient(frozen), support)

        def constant(*at):
            return lax.stop_gradient(gradient(*lax.stop_gradient(at)))

        constant_gradient = of_same_kind(gradient, constant)
        start = moving, combine(keys, state)
        if losses.step_weights is not None:
            return multi_step_loss(losses, rule, constant_gradient, start, frozen, query)
        (theta, adapted_state), _ = run(StatefulRule(rule), constant_gradient, start)
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

    def one_task(support, query, keys):
        gradient = inner_gradient(losses.inner, frozen, support)
        start = combine(keys, state)
        (theta, adapted_state), (visited, _) = run(StatefulRule(rule), gradient, (moving, start))
        if rule.sums_gradients:
            # One step comes without an axis for the steps.
            visited = visited if rule.steps > 1 else jax.tree.map(lambda x: x[None], visited)
            # Computed again, since `run` returns the points; one at a time, for memory.
            points = visited, *numbers_of(gradient, rule.steps)
            slopes = lax.map(lambda at: gradient(*at)[0], points)
            direction = jax.tree.map(lambda g: jnp.sum(g, 0), slopes)
        else:
            direction = jax.tree.map(jnp.subtract, moving, theta)
        # Reptile follows inner gradients, so the query loss is only reported.
        value, new, aux = losses.outer(combine(theta, frozen), adapted_state, query)
        direction = combine(direction, jax.tree.map(jnp.zeros_like, frozen))
        return (value, ParamsAndRule(direction, nothing_like(rule))), (aux, new, None)

    sums, per_task = _sum_over_tasks(one_task, tasks)
    return jax.tree.map(lambda x: weight * x, sums), per_task


def meta_sgd(losses: LossPair, rule, meta, state, tasks, weight, of: Callable = second_order):
    """Return value, and gradients in the parameters and in the rates, by `of`."""
    meta = MetaSGDParams(check_params(meta.params), check_params(meta.rate))
    own, both = GradientDescent(meta.rate, rule.steps), losses._replace(wrt="both")
    (value, gradient), per_task = of(both, own, meta.params, state, tasks, weight)
    return (value, MetaSGDParams(gradient.params, gradient.rule.rate)), per_task


def _implicit(losses: LossPair, rule, params, state, tasks, weight):
    """Return value and gradient of a rule that solves, by the implicit function theorem."""
    moving, frozen = partition(params, losses.mask)

    def one_task(support, query, keys):
        start = combine(keys, state)
        check_whole(support, rule)

        def inner(theta, frozen):
            return losses.inner(combine(theta, frozen), start, support)[0]

        # The state of the query is that at the solution, and so depends on it.
        def outer(theta, state, query):
            return losses.outer(theta, state_at(losses.inner, theta, state, support), query)

        # With H the Hessian of the inner loss, pull_back maps a cotangent v of theta to
        # (I + H/strength)^{-1} v in the start, and to its effect through the frozen leaves and
        # through the numbers of the rule.
        apply = partial(apply_at, losses.inner.form, start)
        given = accepted(type(rule).solve_and_pull_back, {"support": support, "apply": apply})
        solution, pull_back = rule.solve_and_pull_back(inner, moving, frozen, **given)
        at = combine(solution.params, frozen)
        at_solution = losses._replace(outer=outer)
        (value, (aux, new)), slope = _at_query(at_solution, at, start, query, weight)
        # Frozen leaves act directly on the query loss, and through the solution.
        of_theta, direct = partition(slope, losses.mask)
        of_start, of_frozen, of_rule, accurate = pull_back(of_theta)
        gradient = combine(of_start, jax.tree.map(jnp.add, direct, of_frozen))
        gradients = _requested(losses.wrt, gradient, of_rule)
        return (value, gradients), (aux, new, solution.info.converged & accurate)

    return _sum_over_tasks(one_task, tasks)


def _mixed(losses: LossPair, rule, params, state, tasks, weight):
    """Return value and gradient by forward over reverse."""
    rule, params = check_inputs(rule, params)
    moving, frozen = partition(params, losses.mask)

    def one_task(support, query, keys):
        def inner(full, data):
            return losses.inner(full, state, data)[0]

        def of_moving(theta, data):
            return inner(combine(theta, frozen), data)

        on_all, on_moving = (on_support(jax.grad(f), support) for f in (inner, of_moving))
        theta, visited = visit(rule, on_moving, moving, losses.unroll)
        at = combine(theta, frozen)
        (value, (aux, new)), slope = _at_query(losses, at, state, query, weight)
        gradients = backward_recursion(
            rule, (on_all, on_moving), frozen, visited, slope, losses.mask, losses.unroll
        )
        return (value, _requested(losses.wrt, *gradients)), (aux, new, None)

    return _sum_over_tasks(one_task, tasks)


def _factored(losses: LossPair, rule, params, state, tasks, weight, wide):
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

    moves = [r is not None for r in rates]
    plan = LowRankPlan(rate, rule.steps, wide, moves, losses.unroll.differentiated(rule.steps))

    def one_task(support, query, keys):
        return factored_loss((inner, outer), params, plan, support, query)

    values, per_task = jax.vmap(one_task)(*tasks)
    return (weight * jnp.sum(values),), per_task


def _differentiate(total: Callable, losses: LossPair, rule, params, state, tasks, weight):
    """Return ((value, gradient), per task) of a function that returns ((value,), per task)."""
    trained, fixed = split_pair(params, rule, losses.wrt)

    def value_first(trained):
        params, rule = combine(trained, fixed)
        (value,), per_task = total(losses, rule, params, state, tasks, weight)
        return value, per_task

    gradient_of = with_flat_products(jax.value_and_grad(value_first, has_aux=True))
    (value, per_task), gradient = gradient_of(trained)
    return (value, gradient), per_task


def _requested(wrt: str, of_params, of_rule) -> ParamsAndRule:
    """Return the gradients that `wrt` names, the other one as None."""
    return ParamsAndRule(
        nothing_like(of_params) if wrt == "rule" else of_params,
        nothing_like(of_rule) if wrt == "params" else of_rule,
    )


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
