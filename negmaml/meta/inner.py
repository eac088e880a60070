r"""Adapting a pytree of parameters to the data of one task."""

from typing import Any

from negmaml._core.checks import check_flag
from negmaml._core.convergence import warn_unless
from negmaml._core.settings import own_transfers
from negmaml.meta.partition import Loss, check_loss, holding, merge, ready, scalar, split, trainable
from negmaml.meta.shape_errors import explained_loops
from negmaml.meta.stateful import Stateful, adapt_with_state
from negmaml.rules import UNSOLVED, InnerRule, as_rule, as_solution


@own_transfers
def adapt(
    loss: Loss,
    params: Any,
    support: Any,
    rule: InnerRule,
    *,
    mask: Any = None,
    remat: bool = False,
    return_info: bool = False,
) -> Any:
    r"""Parameters after adapting to the data of one task.

        theta_0 = params,      theta_{k+1} = theta_k - rate * grad loss(theta_k, support)

    Arguments:
        loss: scalar function of (params, data).
        params: any pytree. Its floating point arrays and Python floats are the parameters; other
            leaves, integers, functions and settings of a module, come back as they are. Or
            `Stateful(params, state)`, whose loss hands a state on.
        support: the task's data, what `loss` takes.
        rule: any rule that moves a general model (`negmaml.rules`), of any sign:
            `GradientDescent`, whose rate is a number or a pytree like `params` or a prefix of it,
            with a `Schedule` for values by step; `Momentum`; `Preconditioned`; `InnerOptimizer`, or
            an optax transformation for one step of it; `Proximal`, the point where
            grad loss(theta, support) + strength (theta - params) = 0; or your own.
        mask: which leaves adapt, a pytree of booleans like `params` or a prefix of it; all when
            left out.
        remat: whether reverse-mode derivatives recompute each step instead of storing it.
        return_info: whether to return (params, info), where info.converged is False if a rule that
            solves a problem, such as `Proximal`, did not: see `negmaml.rules.SolveInfo`. Without
            it a `negmaml.ConvergenceWarning` is issued then.

    With more steps than a `Schedule` has values, its last value is used for the rest.

    Returns a pytree like `params`. Differentiable, so that jax.grad through it is the
    meta-gradient; vmap it for many tasks. Raises TypeError for what is no such rule and where no
    parameter is floating point, ValueError for a rate or mask unlike `params`, a mask that leaves
    nothing to adapt, a loss that is not scalar, and parameters whose shapes do not fit it, by name.

    >>> import negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> float(adapt(square, 0.0, 1.0, nm.GradientDescent(-0.5)))  # away from the target
    -0.5
    """
    remat, return_info = check_flag("remat", remat), check_flag("return_info", return_info)
    if isinstance(params, Stateful):
        loss = check_loss("loss", loss, "(params, state, data)")
        with explained_loops():
            adapted = adapt_with_state(loss, params, support, rule, mask, remat)
        info = as_solution(adapted, as_rule("rule", rule).steps).info
        return (adapted, info) if return_info else adapted
    params, rest = trainable(params)
    loss = check_loss("loss", loss)
    rule, params = ready(rule, params)
    moving, frozen = split(params, mask)
    objective = scalar(holding(loss, rest))

    def task_loss(theta):
        return objective(merge(theta, frozen), support)

    with explained_loops():
        theta, info = as_solution(rule.solve(task_loss, moving, remat=remat), rule.steps)
    adapted = merge(merge(theta, frozen), rest)
    if return_info:
        return adapted, info
    warn_unless(info.converged, UNSOLVED)
    return adapted
