r"""The meta-learning algorithms, for any JAX loss and parameter pytree.

`loss(params, data)` is any scalar function. Every algorithm is a function (params, tasks) ->
(value, gradient), the mean over tasks of

    value = loss(theta_i, query_i),      theta_i = adapt(params; support_i),

and they differ in the gradient (`negmaml.meta.gradients`). The functions returned here are pytrees
with the rule's rates for leaves. A program that takes one as an argument does not compile again for
a new rate. In place of `params` they take `ParamsAndRule(params, rule)`, whose rule is then used.
"""

from collections.abc import Callable
from typing import Any

from jax.tree_util import Partial

from negmaml._core.caller import warn_caller
from negmaml._core.calls import explain_calls
from negmaml._core.checks import check_choice, check_count, check_flag, check_optional
from negmaml._core.types import Array, Numbers, ScalarLike
from negmaml.meta import annealing as annealed
from negmaml.meta import gradients
from negmaml.meta.gradients import Algorithm
from negmaml.meta.memory import check_bytes
from negmaml.meta.model_variables import TRAINED, check_trainable
from negmaml.meta.multi_step import WeightedSteps
from negmaml.meta.partition import Loss, check_loss, freeze_mask
from negmaml.rules import GradientDescent, InnerRule, as_rule, check_rule
from negmaml.rules.unroll import check_unroll

# In the order of `maml_value_and_grad`, which explains them.
METHODS = ("mixed", "reverse", "remat", "low-rank")


# (params, tasks) -> (value, gradient like params); ((value, aux), gradient) with has_aux.
ValueAndGrad = Callable[[Any, Any], tuple[Any, Any]]


@explain_calls
def maml(
    loss: Loss,
    rule: InnerRule,
    *,
    inner_loss: Loss | None = None,
    mask: Any = None,
    batch_size: int | None = None,
    segment: int | str | None = None,
    truncate: int | None = None,
    has_aux: bool = False,
    step_weights: Numbers | None = None,
) -> Callable[[Any, Any], Any]:
    r"""Return the objective of model-agnostic meta-learning, (params, tasks) -> value.

        L_meta(params) = mean_i loss(adapt(params; support_i), query_i)

    jax.grad of it is the meta-gradient. It is differentiable in parameters, rates and data.
    `maml_value_and_grad` has these arguments too and returns the gradient faster. With the rule of
    the test and fresh tasks the objective is the test loss. Source: Finn, Abbeel and Levine, ICML
    2017.

    >>> import jax, jax.numpy as jnp, negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> tasks = nm.Tasks(support=jnp.array([-1.0, 1.0]), query=jnp.array([-1.0, 1.0]))
    >>> objective = nm.maml(square, nm.GradientDescent(0.5))
    >>> float(objective(0.0, tasks)), float(jax.grad(objective)(1.0, tasks))
    (0.125, 0.25)
    """
    return _algorithm(
        gradients.objective, loss, rule, inner_loss=inner_loss, mask=mask, batch_size=batch_size,
        has_aux=has_aux, segment=segment, truncate=truncate, step_weights=step_weights,
    )  # fmt: skip


@explain_calls
def maml_value_and_grad(
    loss: Loss,
    rule: InnerRule,
    *,
    inner_loss: Loss | None = None,
    mask: Any = None,
    batch_size: int | None = None,
    method: str | None = None,
    segment: int | str | None = None,
    truncate: int | None = None,
    memory_budget: int | str | None = None,
    explain: bool = False,
    has_aux: bool = False,
    wrt: str = "params",
    step_weights: Numbers | None = None,
) -> ValueAndGrad:
    r"""Return (params, tasks) -> (value, gradient), the exact, second-order gradient of `maml`.

    Arguments:
        loss: scalar function of (params, data of one task). Put a task's random key in its data.
        rule: as in `adapt`; any sign of rate.
        inner_loss: scalar function of (params, support) for the inner steps; `loss` by default. If
            it has parameters of its own that `mask` freezes, it is a learned loss or a learned
            regulariser: the meta-gradient reaches them through the inner steps.
        mask: the leaves that adapt, as in `adapt`; the gradient is that of all leaves.
        batch_size: number of tasks computed at once, all by default. Small blocks save time and
            memory where the adapted parameters of all tasks exceed the cache of a CPU. It changes
            the result by rounding only.
        method: how to differentiate; by default the fastest that is exact for the loss and rule.
            "reverse": reverse over reverse through stored steps, for any loss and rule.
            "remat": reverse over reverse with steps recomputed.
            "mixed": forward over reverse, which stores only the parameters of each step
            (`negmaml.meta.forward_over_reverse`). It needs a symmetric derivative of the inner
            gradient. Derivative rules in the loss can break that: `jax.custom_vjp`, and
            `jax.custom_jvp` unless it acts entry by entry and returns the function itself. The
            traced inner loss is checked for them (`negmaml._core.symmetry`).
            "low-rank": adapted weights of wide dense layers are never formed, for
            `GradientDescent` (`negmaml.meta.lowrank`). Weights that enter a derivative rule or an
            operation other than a product stay dense.
            By default: "low-rank" where the loss has layers whose weights are twice as large as
            their factors, in + out numbers a row and step; else "mixed" for several steps where it
            is exact, which then needs less memory and about the same time; else "reverse". A rule
            with a `solve` of its own, such as `Proximal` or `Implicit`, takes "reverse".
        segment: number of inner steps in a segment. The parameters before each segment are then
            stored, and the steps of one segment are taken again when the derivative reaches them.
            "sqrt" for the square root of the number of steps K, which stores about 2 sqrt(K)
            parameters in place of K. "reverse" also stores the intermediate results of the steps
            of one segment, "remat" and "mixed" those of one step. The gradient is the same up to
            rounding.
        truncate: number k of last inner steps that derivatives pass through, all by default. The
            gradient is that of `maml` with theta_{K-k} replaced by its value plus params -
            stop_gradient(params). So d theta_{K-k} / d params = I, as in `fomaml`, and zero in
            frozen leaves and in numbers of the rule. Time and memory are those of k steps, beside
            a forward pass of the others.
        memory_budget: bytes, or a text such as "2GiB", for memory beside parameters, tasks and
            results. When the function is traced, those of `method`, `segment` and `batch_size` that
            are not given are chosen by `memory_plan`: the first within the budget.
        explain: whether to print that `memory_plan` when the function is traced, before it is
            compiled. Without a budget nothing is changed.
        has_aux: whether the loss returns (value, aux); then the result is ((value, aux), gradient)
            with the aux of the query losses, stacked over tasks.
        wrt: "params"; "rule", for the gradient in the numbers of the rule, such as rates, a
            strength or the weights of a learned optimizer; or "both". A gradient in the rule has
            the structure of the rule, with None in place of leaves that are no floating point
            numbers. "both" returns `ParamsAndRule` of gradients. To train a rule with `fit`, pass
            `ParamsAndRule(params, rule)` as the parameters.
        step_weights: weights of the query losses after each inner step, one for each step, for the
            multi-step loss of MAML++ (`negmaml.meta.multi_step`). By default only the loss after
            the last step counts. The method is then "reverse" or "remat", and `truncate` is None.

    The result is the gradient of `maml` by nested autodiff. That holds also where a derivative rule
    is not a derivative: gradient reversal, clipping, straight-through estimators, `stop_gradient`.
    Inner gradients are taken in the leaves that adapt.

    Raises ValueError for an unknown method or `wrt`, for "mixed" or "low-rank" where it is not
    exact, for an empty batch, and for support and query of different numbers of tasks. So does a
    `lax.while_loop` that has to be differentiated in reverse, and a `memory_budget` that no option
    keeps to. Raises TypeError for the gradient in a rule without floating point numbers, and as
    `adapt` does. Sources: Finn, Abbeel and Levine, ICML 2017; for "mixed", Kemaev et al., "Scalable
    Meta-Learning via Mixed-Mode Differentiation", ICML 2025; for `truncate`, Shaban et al.,
    "Truncated Back-propagation for Bilevel Optimization", AISTATS 2019.

    >>> import jax.numpy as jnp, negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> in_the_rate = maml_value_and_grad(square, GradientDescent(0.25), wrt="rule")
    >>> value, gradient = in_the_rate(0.0, nm.Tasks(jnp.ones(1), jnp.ones(1)))
    >>> float(value), float(gradient.rate)  # (1 - rate)^2 / 2 and its derivative
    (0.28125, -0.75)
    """
    # None lets `negmaml.meta.choice` decide for each loss and rule.
    if method is not None:
        check_choice("method", method, METHODS)
    if step_weights is not None and method in ("mixed", "low-rank"):
        raise ValueError(
            f"method must be 'reverse' or 'remat' with step_weights, got {method!r}, which follows "
            "the loss after the last step only; or leave method out"
        )
    memory_budget = check_optional(check_bytes, "memory_budget", memory_budget)
    return _algorithm(
        gradients.second_order, loss, rule, inner_loss=inner_loss, mask=mask, batch_size=batch_size,
        has_aux=has_aux, method=method, segment=segment, truncate=truncate, wrt=wrt,
        step_weights=step_weights,
        memory_budget=memory_budget, explain=check_flag("explain", explain),
    )  # fmt: skip


@explain_calls
def fomaml(
    loss: Loss,
    rule: InnerRule,
    *,
    inner_loss: Loss | None = None,
    mask: Any = None,
    batch_size: int | None = None,
    has_aux: bool = False,
    wrt: str = "params",
    step_weights: Numbers | None = None,
) -> ValueAndGrad:
    r"""Return (params, tasks) -> (value, gradient) of first-order MAML.

        gradient = mean_i  d loss(theta, query_i) / d theta  at theta = theta_i

    for `GradientDescent`. For every rule it is the gradient of the `maml` objective with
    jax.lax.stop_gradient around every inner gradient. Then d theta_i / d params = I, unless an
    update uses the parameters in another way, such as weight decay. The states of `Stateful`
    parameters after inner steps are constants too, and so is theta_i - params of a rule with a
    `solve` of its own. At rate zero the gradient is exact. The gradient in the numbers of the rule
    is that of the same objective, -mean_i sum_k grad loss(theta_{i,k}, support_i) . grad
    loss(theta_i, query_i) for one rate of gradient descent. Arguments and errors as in
    `maml_value_and_grad`; TypeError for the gradient in a rule with a `solve` of its own. Source:
    Finn, Abbeel and Levine, ICML 2017, section 5.2.

    >>> import jax.numpy as jnp, negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> tasks = nm.Tasks(support=jnp.array([-1.0, 1.0]), query=jnp.array([-1.0, 1.0]))
    >>> value, gradient = nm.fomaml(square, nm.GradientDescent(0.5))(1.0, tasks)
    >>> float(value), float(gradient)  # that of `maml` is half of it
    (0.25, 0.5)
    """
    return _algorithm(
        gradients.first_order, loss, rule, inner_loss=inner_loss, mask=mask, batch_size=batch_size,
        has_aux=has_aux, wrt=wrt, step_weights=step_weights,
    )  # fmt: skip


@explain_calls
def anil(
    loss: Loss,
    rule: InnerRule,
    head: Any,
    *,
    inner_loss: Loss | None = None,
    batch_size: int | None = None,
    has_aux: bool = False,
    wrt: str = "params",
) -> ValueAndGrad:
    """Return (params, tasks) -> (value, gradient) of ANIL, MAML that adapts only the `head`.

    `head` is the mask of `adapt`, a pytree of booleans like the parameters or a prefix of it. The
    other arguments are those of `maml_value_and_grad`. Source: Raghu et al., "Rapid learning or
    feature reuse?", ICLR 2020.

    >>> import jax.numpy as jnp, negmaml as nm
    >>> loss = lambda params, x: (params["head"] * params["body"] - x) ** 2 / 2
    >>> value_and_grad = nm.anil(loss, nm.GradientDescent(0.5), {"head": True, "body": False})
    >>> tasks = nm.Tasks(support=jnp.ones(3), query=jnp.ones(3))
    >>> value, gradient = value_and_grad({"head": 0.0, "body": 1.0}, tasks)
    >>> float(value), sorted(gradient)  # the body trains, too
    (0.125, ['body', 'head'])
    """
    freeze_mask("head", head)  # None, the default of a mask, would adapt all leaves
    return maml_value_and_grad(
        loss, rule, inner_loss=inner_loss, mask=head, batch_size=batch_size, has_aux=has_aux,
        wrt=wrt,
    )  # fmt: skip


@explain_calls
def reptile(
    loss: Loss,
    rule: InnerRule,
    *,
    inner_loss: Loss | None = None,
    mask: Any = None,
    batch_size: int | None = None,
    has_aux: bool = False,
) -> ValueAndGrad:
    r"""Return (params, tasks) -> (value, gradient) of Reptile, the sum of the inner gradients.

        gradient = mean_i sum_k grad loss(theta_{i,k}, support_i)        (gradient descent)

    For one scalar rate it is (params - theta_i)/rate: defined at rate zero, and of the sign that
    descends for a negative rate. For `InnerOptimizer` it is params - theta_i. The value is that of
    the other algorithms, the loss on the query after adaptation, which the gradient does not use.
    There is no gradient in the rule: the inner gradients that Reptile follows are no derivative of
    the value in it.
    Arguments and errors as in `maml_value_and_grad`; TypeError for `Proximal`. Source: Nichol,
    Achiam and Schulman 2018.

    >>> import jax.numpy as jnp, negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> tasks = nm.Tasks(support=jnp.array([-1.0, 1.0]), query=jnp.array([-1.0, 1.0]))
    >>> value, gradient = nm.reptile(square, nm.GradientDescent(0.5, steps=2))(1.0, tasks)
    >>> float(gradient)  # the mean over tasks of 2 + 1 and 0
    1.5
    """
    return _algorithm(
        gradients.reptile, loss, rule, inner_loss=inner_loss, mask=mask, batch_size=batch_size,
        has_aux=has_aux,
    )  # fmt: skip


@explain_calls
def imaml(
    loss: Loss,
    rule: InnerRule,
    *,
    inner_loss: Loss | None = None,
    mask: Any = None,
    batch_size: int | None = None,
    has_aux: bool = False,
    wrt: str = "params",
) -> ValueAndGrad:
    r"""Return (params, tasks) -> (value, gradient) of implicit MAML, for a proximal inner problem.

        theta_i:  grad loss(theta, support_i) + strength (theta - params) = 0
        gradient = mean_i (I + H_i/strength)^{-1} grad loss(theta_i, query_i)

    by trust region steps and one linear solve; memory does not grow with the number of steps. Where
    derivative rules in the loss may make H_i asymmetric, the gradient uses its transpose and other
    solvers (`negmaml.rules.field`). A `negmaml.ConvergenceWarning` is issued where a solver does
    not reach the tolerance of the rule. `Implicit` takes other steps and linear solvers, such as
    the gradient descent and conjugate gradients of the paper. Arguments and errors as in
    `maml_value_and_grad`; TypeError unless `rule` is `Proximal`, `Implicit` or has a `solve` of its
    own. Source: Rajeswaran et al., NeurIPS 2019.

    >>> import jax.numpy as jnp, negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> tasks = nm.Tasks(support=jnp.array([-1.0, 1.0]), query=jnp.array([-1.0, 1.0]))
    >>> value, gradient = nm.imaml(square, nm.Proximal(1.0))(1.0, tasks)
    >>> round(float(value), 4), round(float(gradient), 4)  # theta is halfway to the target
    (0.25, 0.25)
    """
    # Any other rule would be differentiated through its steps, which is `maml`.
    if not check_rule("rule", rule).implicit:
        raise TypeError(
            "rule must be Proximal(strength), Implicit(solver, strength), or another with a solve "
            f"of its own, got {rule!r}"
        )
    return maml_value_and_grad(
        loss, rule, inner_loss=inner_loss, mask=mask, batch_size=batch_size, has_aux=has_aux,
        wrt=wrt,
    )  # fmt: skip


@explain_calls
def meta_sgd(
    loss: Loss,
    *,
    steps: int = 1,
    inner_loss: Loss | None = None,
    mask: Any = None,
    batch_size: int | None = None,
    has_aux: bool = False,
    step_weights: Numbers | None = None,
) -> ValueAndGrad:
    r"""Return (MetaSGDParams(params, rate), tasks) -> (value, MetaSGDParams of gradients).

    Meta-SGD learns the rate of `GradientDescent(rate, steps)` like any other meta-parameter. The
    rate has no constraint and may become negative. It has any form that `adapt` takes: a number, or
    a pytree like the parameters or a prefix of it, by leaf or by element, each of them a `Schedule`
    for rates by step. Arguments and errors as in `maml_value_and_grad`. Source: Li et al. 2017.

    >>> import jax.numpy as jnp, negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> tasks = nm.Tasks(support=jnp.array([-1.0, 1.0]), query=jnp.array([-1.0, 1.0]))
    >>> value, gradient = nm.meta_sgd(square)(nm.MetaSGDParams(1.0, rate=0.5), tasks)
    >>> float(gradient.params), float(gradient.rate)  # a larger rate is better
    (0.25, -1.0)
    """
    rule = GradientDescent(0.0, steps)  # only its number of steps is used
    return _algorithm(
        gradients.meta_sgd, loss, rule, inner_loss=inner_loss, mask=mask, batch_size=batch_size,
        has_aux=has_aux, learns_rates=True, step_weights=step_weights,
    )  # fmt: skip


@explain_calls
def maml_plus_plus(
    loss: Loss,
    *,
    annealing: ScalarLike | Callable[[Array], Array],
    second_order_from: int = 0,
    inner_loss: Loss | None = None,
    mask: Any = None,
    batch_size: int | None = None,
    has_aux: bool = False,
) -> ValueAndGrad:
    r"""Return (params, tasks) -> (value, gradient) of MAML++, for `maml_plus_plus_params`.

        value = mean_i sum_k w_k(t) loss(theta_{i,k}, query_i),       k = 1, ..., K
        w_k(t) = (1 - s) / K + s [k = K],       s = min(t / annealing, 1)

    at outer step t. The rates of each inner step, and of each layer or parameter array, are learned
    as in `meta_sgd`; the model has running statistics for each inner step (`per_step_model`).

    Arguments:
        loss: as in `maml_value_and_grad`, a function of the model without rates.
        annealing: the number of outer steps during which the weights go from equal ones to the
            last inner step only; 0 for the loss after the last step from the start. Or a function
            of the outer step that returns the weights, (K,).
        second_order_from: the outer step from which inner gradients are differentiated too. Before
            it they are constants, as in `fomaml`. One of the two programs is run at each step;
            within `vmap` over outer steps that differ, both are.
        inner_loss, mask, batch_size, has_aux: as in `maml_value_and_grad`. The aux is that of the
            query loss after the last step.

    The outer step is part of the state of the model, which `fit`, its checkpoints and its resumed
    runs continue. The paper also uses a cosine schedule for the outer rate:
    optax.adam(optax.cosine_decay_schedule(1e-3, steps)).

    Raises TypeError for parameters that `maml_plus_plus_params` did not make, and for numbers of
    outer steps that are not integers; ValueError for negative ones. Raises as `adapt` does. Source:
    Antoniou, Edwards and Storkey, "How to train your MAML", ICLR 2019.

    >>> import jax, negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> start = nm.maml_plus_plus_params(0.0, rate=-0.5, steps=2)
    >>> tasks = nm.Tasks(jax.numpy.ones(3), jax.numpy.ones(3))
    >>> value, gradient = nm.maml_plus_plus(square, annealing=100)(start, tasks)
    >>> float(value), gradient.rate.values.shape, int(gradient.params.counter.outer)
    (1.828125, (2,), 1)
    """
    plan = annealed.Annealing(annealing, second_order_from)
    rule = GradientDescent(0.0)  # only checked: the parameters have the rates
    algorithm = _algorithm(
        annealed.maml_plus_plus, loss, rule, inner_loss=inner_loss, mask=mask,
        batch_size=batch_size, has_aux=has_aux, learns_rates=True,
    )  # fmt: skip
    return Partial(algorithm.func, plan)


def _algorithm(
    gradient, loss, rule, *, mask=None, batch_size=None, segment=None, truncate=None,
    step_weights=None, **options,
):  # fmt: skip
    """Return the algorithm as a pytree whose leaves are the numbers of the rule."""
    # All arguments are checked here, at the call of the user, and not in the first training step.
    loss = check_loss("loss", loss)
    options["inner_loss"] = check_optional(check_loss, "inner_loss", options["inner_loss"])
    options["has_aux"] = check_flag("has_aux", options["has_aux"])
    wrt = options.get("wrt", "params")
    check_choice("wrt", wrt, TRAINED)
    batch_size = check_optional(check_count, "batch_size", batch_size)
    # A mask may be a list or a dict, which jit could not compare.
    mask = check_optional(freeze_mask, "mask", mask)
    unroll = check_unroll(False, segment, truncate)
    algorithm = Algorithm(
        gradient, loss, hashable_mask=mask, batch_size=batch_size, unroll=unroll, **options
    )
    rule = as_rule("rule", rule)
    rule.check_meta()
    unroll.check_rule(rule)
    check_trainable(rule, wrt)
    # `maml` only returns the value, which may be differentiated in other arguments.
    in_params = gradient is not gradients.objective and wrt != "rule"
    if in_params and mask is None and rule.ignores_start:
        raise ValueError(
            f"rule must depend on the start where all leaves adapt, got {rule!r}, for which every "
            "meta-gradient would be zero; give a strength of either sign, exclude the leaves that "
            "the inner loss takes as hyperparameters by mask, or differentiate maml(loss, rule)"
        )
    # First-order methods do not differentiate the optimizer, so they work without eps_root.
    if gradient in (gradients.objective, gradients.second_order) and not rule.smooth_at_zero:
        warn_caller(
            "the inner optimizer has no derivative where an entry of the gradient is zero (a dead "
            "unit, a constant input), and the meta-gradient is NaN there; build it with eps_root, "
            "such as optax.adam(1e-2, eps_root=1e-10), or use fomaml or reptile",
        )
    if step_weights is not None:
        if truncate is not None:
            raise ValueError(
                f"truncate must be None with step_weights, got {truncate}: the losses after the "
                "steps before the last would have no gradient; use segment= for memory, or fomaml"
            )
        rule = WeightedSteps(rule, step_weights)
    # The rule is an argument of the `Partial`, so that its numbers are leaves.
    return Partial(algorithm, rule)
