r"""Inner problems that start from the solution of the outer step before."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from negmaml._core.calls import explain_calls
from negmaml._core.checks import check_count, short_repr
from negmaml.meta.algorithms import maml_value_and_grad
from negmaml.meta.batching import as_tasks, leading_axis
from negmaml.meta.model_variables import Stateful
from negmaml.meta.partition import Loss, check_loss, combine, freeze_mask, partition
from negmaml.rules import InnerRule


@explain_calls
def warm_start(
    loss: Loss, rule: InnerRule, *, mask: Any, tasks: int = 1, **options: Any
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    r"""Return (value_and_grad, init) of a bilevel problem that keeps its inner parameters.

        theta_i <- adapt((theta_i, h); support_i),     value = mean_i loss((theta_i, h), query_i)

    The leaves of the mask are the inner parameters theta, which continue from outer step to outer
    step in a state; all others are the hyperparameters h, which train. The gradient in h is that of
    `maml_value_and_grad` with the theta_i before the step as a constant start. For a rule that
    solves its inner problem, such as `Implicit(solver)`, it is the exact hypergradient, and a near
    start saves steps of a solver with an `absolute_tolerance`. For a rule that steps it is the
    derivative through the steps of this outer step only.

    Arguments:
        loss, rule, options: as in `maml_value_and_grad`, except `has_aux`, `batch_size` and `wrt`.
        mask: the inner parameters, as in `adapt`.
        tasks: number of inner problems, each of which keeps parameters of its own. They must come
            in the same order in every outer step.

    Returns (value_and_grad, init). init(params) is the model, `Stateful(hyperparameters, inner
    parameters)`, with None in place of the leaves of the other part, and each inner parameter once
    for each task, on a leading axis. `fit` trains it with `value_and_grad`. Raises as
    `maml_value_and_grad` does, and ValueError for another number of tasks.

    >>> import negmaml as nm
    >>> inner = lambda p, x: (p["w"] - p["h"] * x) ** 2 / 2
    >>> newton = lambda f, w: jax.tree.map(lambda a, b: a - b, w, jax.grad(f)(w))
    >>> value_and_grad, init = warm_start(
    ...     lambda p, y: (p["w"] - y) ** 2 / 2, nm.Implicit(newton), inner_loss=inner,
    ...     mask={"w": True, "h": False},
    ... )
    >>> model = init({"w": 0.0, "h": 1.0})
    >>> value, (gradient, new) = value_and_grad(model, nm.Tasks(jnp.ones(1), jnp.zeros(1)))
    >>> float(value), float(gradient["h"]), new["w"].tolist()
    (0.5, 1.0, [1.0])
    """
    loss, count = check_loss("loss", loss), check_count("tasks", tasks)
    frozen = freeze_mask("mask", mask)
    if not callable(frozen) and all(frozen[1]):
        raise ValueError(
            f"mask must be False for the hyperparameters, which train, got {short_repr(mask)}"
        )
    for name in ("has_aux", "batch_size", "wrt"):
        if name in options:
            raise TypeError(f"{name} is no option of warm_start, got {options[name]!r}")

    # The query loss is evaluated at the new inner parameters, which are its aux here.
    def with_solution(params, query):
        return loss(params, query), partition(params, mask)[0]

    one_task = maml_value_and_grad(with_solution, rule, mask=mask, has_aux=True, **options)

    def init(params) -> Stateful:
        inner, hyper = partition(jax.tree.map(jnp.asarray, params), mask)
        start = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), inner)
        return Stateful(hyper, start)

    def value_and_grad(model: Stateful, tasks):
        if not isinstance(model, Stateful):
            raise TypeError(
                f"params must be the model that init(params) returns, got {type(model).__name__}"
            )
        hyper, inner = model
        tasks = as_tasks(tasks)
        given = leading_axis("tasks.support and tasks.query", tuple(tasks))
        if given != count:
            raise ValueError(
                f"tasks must hold {count} tasks, as tasks= of warm_start, got {given}; each "
                "keeps inner parameters of its own, and a mesh cannot share them"
            )

        def solve(inner, task):
            alone = jax.tree.map(lambda x: x[None], task)
            (value, found), gradient = one_task(combine(inner, hyper), alone)
            found = jax.tree.map(lambda x: x[0], found)
            return value, partition(gradient, mask)[1], found

        values, gradients, found = jax.vmap(solve)(inner, tasks)
        mean = jax.tree.map(lambda x: jnp.mean(x, 0), gradients)
        return jnp.mean(values), Stateful(mean, found)

    return value_and_grad, init
