r"""Adapting a pytree of parameters to the data of one task."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from negmaml._core.checks import check_flag
from negmaml._core.convergence import warn_unless
from negmaml._core.meshes import any_mesh
from negmaml._core.settings import own_transfers
from negmaml._core.types import PyTree
from negmaml.meta.minibatches import check_whole, on_support
from negmaml.meta.model_variables import variables
from negmaml.meta.partition import Loss, check_inputs, check_loss, combine, partition
from negmaml.meta.shape_errors import explain_while_loops
from negmaml.meta.stateful import LiftedLoss, StatefulRule
from negmaml.rules import UNSOLVED, InnerRule, Solution, as_solution, solve_with
from negmaml.rules.unroll import PLAIN, Unroll, check_unroll, last_point


@own_transfers
@any_mesh
def adapt(
    loss: Loss,
    params: PyTree,
    support: PyTree,
    rule: InnerRule,
    *,
    mask: Any = None,
    remat: bool = False,
    segment: int | str | None = None,
    truncate: int | None = None,
    return_info: bool = False,
) -> Any:
    r"""Return the parameters after adaptation to the data of one task.

        theta_0 = params,      theta_{k+1} = theta_k - rate * grad loss(theta_k, support)

    Arguments:
        loss: scalar function of (params, data).
        params: any pytree. Its floating point arrays and Python floats are the parameters; other
            leaves, integers, functions and settings of a module, are returned unchanged. Or a
            model with a state: a Flax NNX module, variables of linen, or `Stateful(params, state)`,
            each with the loss that `nm.variables` lists for it.
        support: the task's data, as `loss` takes it; or `Minibatches`, of which each step takes
            other rows.
        rule: any rule that moves a general model (`negmaml.rules`), of any sign:
            `GradientDescent`, whose rate is a number or a pytree like `params` or a prefix of it,
            with a `Schedule` for values by step; `Momentum`; `Preconditioned`; `InnerOptimizer`, or
            an optax transformation for one step of it; `Proximal`, the point where
            grad loss(theta, support) + strength (theta - params) = 0; `Implicit`, the same point
            by any solver; `PrototypeHead`, `RidgeHead` or `LogisticHead`, which fit the last layer;
            or your own.
        mask: the leaves that adapt, a pytree of booleans like `params` or a prefix of it, or a
            function of (path, leaf); all by default. For a Flax NNX module a filter such as
            `nnx.PathContains("head")`, or an `nnx.State` of booleans.
        remat: whether reverse-mode derivatives recompute each step instead of storing it.
        segment: number of steps in a segment. Reverse-mode derivatives then store the parameters
            before each segment only, and take the steps of one segment again at a time. "sqrt" for
            the square root of the number of steps, which stores the fewest parameters.
        truncate: number of last steps that derivatives pass through. To earlier steps they are
            those of the identity in `params`, and zero in anything else.
        return_info: whether to return (params, info). info.converged is False if a rule that
            solves a problem, such as `Proximal`, did not: see `negmaml.rules.SolveInfo`. Without
            it a `negmaml.ConvergenceWarning` is issued then.

    With more steps than a `Schedule` has values, its last value is used for the rest.

    Returns a pytree like `params`. It is differentiable: jax.grad through it is the meta-gradient.
    Use jax.vmap for many tasks. Raises TypeError for an invalid rule and where no parameter is
    floating point. Raises ValueError for a rate or mask unlike `params`, a mask without a leaf that
    adapts, a loss that is not scalar, and parameters whose shapes do not fit it, by name. Raises
    ValueError for `segment` or `truncate` of a rule with a `solve` of its own.

    >>> import negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> float(adapt(square, 0.0, 1.0, nm.GradientDescent(-0.5)))  # away from the target
    -0.5
    """
    return_info = check_flag("return_info", return_info)
    unroll = check_unroll(remat, segment, truncate)
    # Leaves that do not train are set aside: derivatives are taken of the others.
    floats, state, form = variables(params)
    loss = check_loss("loss", loss)
    rule, floats = check_inputs(rule, floats)
    unroll.check_rule(rule)
    moving, frozen = partition(floats, mask)
    # Reverse mode through a `lax.while_loop` in the loss fails with a message of JAX only.
    with explain_while_loops():
        (theta, state), info = adapt_leaves(
            LiftedLoss(loss, form), rule, (moving, frozen), state, support, unroll
        )
    # The result has the form of the argument, whatever was taken out of it.
    adapted = form.model(combine(theta, frozen), state)
    if return_info:
        return adapted, info
    warn_unless(info.converged, UNSOLVED)
    return adapted


def adapt_leaves(
    loss: LiftedLoss, rule: InnerRule, leaves, state, support, unroll: Unroll = PLAIN
) -> Solution:
    """Return the `Solution` ((adapted leaves, state of the model), info) for one task.

    leaves: (leaves that adapt, frozen leaves).
    """
    moving, frozen = leaves
    # The state of the model changes with every step, so it is part of the point that steps.
    if not rule.implicit:
        gradient = inner_gradient(loss, frozen, support)
        point = last_point(StatefulRule(rule), gradient, (moving, state), unroll)
        return as_solution(point, rule.steps)

    # A solver calls the loss any number of times, so the state is fixed while it does.
    check_whole(support, rule)

    def objective(theta):
        return loss(combine(theta, frozen), state, support)[0]

    apply = partial(apply_at, loss.form, state, frozen)
    theta, info = solve_with(
        rule, objective, moving, remat=unroll.remat, support=support, apply=apply
    )
    return Solution((theta, state_at(loss, combine(theta, frozen), state, support)), info)


def apply_at(form, state, frozen, function: Callable, theta, *data):
    """Return function(model, *data), of the model with these leaves, called as its loss is."""
    return function(*form.arguments(combine(theta, frozen), state), *data)


def state_at(loss: Callable, params, state, support):
    """Return the state after an evaluation on the support; the loss of most models has none."""
    return loss(params, state, support)[1] if jax.tree.leaves(state) else state


def inner_gradient(loss: Callable, frozen, support) -> Callable:
    """Return (adapting leaves, state) -> (gradient of the loss on the support, new state)."""

    def gradient(point, data):
        theta, state = point

        # The new state comes with the gradient: the loss is evaluated once.
        def value(theta):
            value, new, _ = loss(combine(theta, frozen), state, data)
            return value, new

        return jax.grad(value, has_aux=True)(theta)

    return on_support(gradient, support)
