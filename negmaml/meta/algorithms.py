r"""Meta-gradients for any JAX loss and parameter pytree.

These know no problem: `loss(params, data)` is any scalar function of the user's. Every
algorithm is a function (params, tasks) -> (value, gradient), the mean over tasks of

    value = loss(theta_i, query_i),      theta_i = adapt(params; support_i),

and they differ in the gradient. What the functions return are pytrees themselves, with the rule's
rates for leaves, so a new rate does not recompile a program that takes one as an argument. What
they compute is in `negmaml.meta.gradients`.
"""

import warnings
from collections.abc import Callable
from typing import Any

from jax.tree_util import Partial

from negmaml._core.checks import check_choice, check_count, check_flag, check_optional
from negmaml.meta import gradients as blocks
from negmaml.meta.gradients import Algorithm
from negmaml.meta.partition import Loss, check_loss, hashable
from negmaml.rules import GradientDescent, InnerRule, as_rule, check_rule

METHODS = ("mixed", "reverse", "remat", "low-rank")


# (params, tasks) -> (value, gradient like params); ((value, aux), gradient) with has_aux.
ValueAndGrad = Callable[[Any, Any], tuple[Any, Any]]


def maml(
    loss: Loss,
    rule: InnerRule,
    *,
    inner_loss: Loss | None = None,
    mask: Any = None,
    batch_size: int | None = None,
    has_aux: bool = False,
) -> Callable[[Any, Any], Any]:
    r"""The objective of model-agnostic meta-learning; jax.grad of it is the meta-gradient.

        L_meta(params) = mean_i loss(adapt(params; support_i), query_i)

    Differentiable in everything: parameters, rates, data. `maml_value_and_grad` has the same
    arguments and returns the gradient faster. Also the way to test: with the rule of the test and
    fresh tasks it is the test loss. Source: Finn, Abbeel and Levine, ICML 2017.
    """
    return _algorithm(
        blocks.objective, loss, rule, inner_loss=inner_loss, mask=mask, batch_size=batch_size,
        has_aux=has_aux,
    )  # fmt: skip


def maml_value_and_grad(
    loss: Loss,
    rule: InnerRule,
    *,
    inner_loss: Loss | None = None,
    mask: Any = None,
    batch_size: int | None = None,
    method: str | None = None,
    has_aux: bool = False,
) -> ValueAndGrad:
    r"""Value and exact, second-order meta-gradient of `maml`: (params, tasks) -> (value, gradient).

    Arguments:
        loss: scalar function of (params, data of one task); an rng key or other state of a task
            travels in its data.
        rule: as in `adapt`; any sign of rate.
        inner_loss: scalar function of (params, support) for the inner steps; `loss` when left out.
            With parameters of its own that `mask` keeps from adapting it is a learned loss, or a
            learned regulariser: the meta-gradient reaches them through the inner steps.
        mask: which leaves adapt on a task, as in `adapt`; the gradient is that of all of them.
        batch_size: tasks computed at once, all when left out; blocks of them follow one another.
            Small blocks save time and memory where the adapted parameters of all tasks exceed the
            cache of a CPU. It changes the result by rounding only.
        method: how to differentiate; the fastest that is exact for the loss and rule when left out.
            "reverse": reverse over reverse through stored steps, for any loss and rule.
            "remat": the same with steps recomputed.
            "mixed": forward over reverse, memory of the parameters of each step
            (`negmaml.meta.forward_over_reverse`). It takes the derivative of the inner gradient for
            symmetric.
            Rules of a user's own break that: `jax.custom_vjp`, and `jax.custom_jvp` unless it acts
            entry by entry and returns the function itself. The traced inner loss tells
            (`negmaml._core.symmetry`).
            "low-rank": adapted weights of wide dense layers are never formed, for
            `GradientDescent` (`negmaml.meta.lowrank`). Weights that such a rule or another
            operation takes stay dense.
            When left out: "low-rank" where the loss has layers whose weights are twice as large as
            their factors, in + out numbers a row and step; else "mixed" for several steps where it
            is exact, which then needs less memory and about the same time; else "reverse". A rule
            with a `solve` of its own takes "reverse" or "remat", `Proximal` "reverse".
        has_aux: whether the loss returns (value, aux); then the result is ((value, aux), gradient)
            with the aux of the query losses, stacked over tasks.

    The result is the gradient of `maml`, by nested autodiff, also where a backward rule is not a
    derivative: gradient reversal, clipping, straight-through estimators, `stop_gradient`. Inner
    gradients are taken in the leaves that adapt.

    Raises ValueError for an unknown method, "mixed" or "low-rank" where it is not exact, an empty
    batch, support and query of different numbers of tasks, a `lax.while_loop` that has to be
    differentiated in reverse, and what `adapt` raises. Source: Finn, Abbeel, Levine, ICML 2017; the
    mixed mode, Kemaev et al., "Scalable Meta-Learning via Mixed-Mode Differentiation", ICML 2025.
    """
    if method is not None:
        check_choice("method", method, METHODS)
    return _algorithm(
        blocks.exact, loss, rule, inner_loss=inner_loss, mask=mask, batch_size=batch_size,
        has_aux=has_aux, method=method,
    )  # fmt: skip


def fomaml(
    loss: Loss,
    rule: InnerRule,
    *,
    inner_loss: Loss | None = None,
    mask: Any = None,
    batch_size: int | None = None,
    has_aux: bool = False,
) -> ValueAndGrad:
    r"""First-order MAML: (params, tasks) -> (value, gradient), the gradient at the adapted point.

        gradient = mean_i  d loss(theta, query_i) / d theta  at theta = theta_i

    for `GradientDescent`. For every rule it is the gradient of the `maml` objective with
    jax.lax.stop_gradient around every inner gradient: d theta_i / d params = I, unless an update
    uses the parameters in another way, such as weight decay. States of `Stateful` parameters after
    inner steps are constants, too, and so is how far a `solve` of a rule goes. At rate zero it is
    exact. Arguments and errors as in
    `maml_value_and_grad`. Source: Finn, Abbeel and Levine, ICML 2017, section 5.2.
    """
    return _algorithm(
        blocks.first_order, loss, rule, inner_loss=inner_loss, mask=mask, batch_size=batch_size,
        has_aux=has_aux,
    )  # fmt: skip


def anil(
    loss: Loss,
    rule: InnerRule,
    head: Any,
    *,
    inner_loss: Loss | None = None,
    batch_size: int | None = None,
    has_aux: bool = False,
) -> ValueAndGrad:
    """Almost no inner loop: MAML whose inner steps move the `head` only.

    `head` is the mask of `adapt`, a pytree of booleans like the parameters or a prefix of it;
    everything else as in `maml_value_and_grad`. Source: Raghu et al., ICLR 2020.
    """
    hashable("head", head)  # a mask, and not the default of it
    return maml_value_and_grad(
        loss, rule, inner_loss=inner_loss, mask=head, batch_size=batch_size, has_aux=has_aux
    )


def reptile(
    loss: Loss,
    rule: InnerRule,
    *,
    inner_loss: Loss | None = None,
    mask: Any = None,
    batch_size: int | None = None,
    has_aux: bool = False,
) -> ValueAndGrad:
    r"""Reptile: (params, tasks) -> (value, gradient), the sum of the inner gradients.

        gradient = mean_i sum_k grad loss(theta_{i,k}, support_i)        (gradient descent)

    For one scalar rate it is (params - theta_i)/rate, with the limit at rate zero and the sign
    that descends for a negative one; for `InnerOptimizer` it is params - theta_i. The value is
    that of the other algorithms, the loss on the query after adapting, which the gradient does
    not use. Arguments and errors as in `maml_value_and_grad`; TypeError for `Proximal`. Source:
    Nichol, Achiam and Schulman 2018.
    """
    return _algorithm(
        blocks.summed, loss, rule, inner_loss=inner_loss, mask=mask, batch_size=batch_size,
        has_aux=has_aux,
    )  # fmt: skip


def imaml(
    loss: Loss,
    rule: InnerRule,
    *,
    inner_loss: Loss | None = None,
    mask: Any = None,
    batch_size: int | None = None,
    has_aux: bool = False,
) -> ValueAndGrad:
    r"""Implicit MAML: (params, tasks) -> (value, gradient) of the proximal inner problem.

        theta_i:  grad loss(theta, support_i) + strength (theta - params) = 0
        gradient = mean_i (I + H_i/strength)^{-1} grad loss(theta_i, query_i)

    by trust region steps and one linear solve; memory does not grow with the inner work. Where
    derivative rules of a user's own may make H_i asymmetric, its transpose stands there, and the
    solvers are others (`negmaml.rules.field`). Where one of them does not reach the tolerance of
    the rule, a `negmaml.ConvergenceWarning` is issued.
    Arguments and errors as in `maml_value_and_grad`; TypeError unless `rule` is `Proximal`. Source:
    Rajeswaran et al., NeurIPS 2019.
    """
    if not check_rule("rule", rule).implicit:
        raise TypeError(
            f"rule must be Proximal(strength), or another with a solve of its own, got {rule!r}"
        )
    return maml_value_and_grad(
        loss, rule, inner_loss=inner_loss, mask=mask, batch_size=batch_size, has_aux=has_aux
    )


def meta_sgd(
    loss: Loss,
    *,
    steps: int = 1,
    inner_loss: Loss | None = None,
    mask: Any = None,
    batch_size: int | None = None,
    has_aux: bool = False,
) -> ValueAndGrad:
    r"""Learned rates: (MetaSGDParams(params, rate), tasks) -> (value, MetaSGDParams of gradients).

    The rate of `GradientDescent(rate, steps)` is a meta-parameter like any other, unconstrained:
    descent may take it through zero to negative values. Its form is any of `adapt`: a number, or a
    pytree like the parameters or a prefix of it, by leaf or by element, each of them a `Schedule`
    for rates by step. Arguments and errors as in `maml_value_and_grad`. Source: Li et al. 2017.
    """
    rule = GradientDescent(0.0, steps)  # of it, only the number of steps is used
    return _algorithm(
        blocks.learned, loss, rule, inner_loss=inner_loss, mask=mask, batch_size=batch_size,
        has_aux=has_aux,
    )  # fmt: skip


def _algorithm(block, loss, rule, *, mask=None, batch_size=None, **options):
    """The pytree (params, tasks) -> result, whose leaves are the numbers of the rule."""
    loss = check_loss("loss", loss)
    options["inner_loss"] = check_optional(check_loss, "inner_loss", options["inner_loss"])
    options["has_aux"] = check_flag("has_aux", options["has_aux"])
    batch_size = check_optional(check_count, "batch_size", batch_size)
    mask = check_optional(hashable, "mask", mask)
    algorithm = Algorithm(block, loss, hashable_mask=mask, batch_size=batch_size, **options)
    rule = as_rule("rule", rule)
    rule.check_meta()
    if block in (blocks.objective, blocks.exact) and not rule.smooth_at_zero:
        warnings.warn(
            "the inner optimizer has no derivative where an entry of the gradient is zero (a dead "
            "unit, a constant input), and the meta-gradient is NaN there; build it with eps_root, "
            "such as optax.adam(1e-2, eps_root=1e-10), or use fomaml or reptile",
            stacklevel=3,
        )
    return Partial(algorithm, rule)
