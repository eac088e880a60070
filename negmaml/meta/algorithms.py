r"""Meta-gradients for any JAX loss and parameter pytree.

These know no problem: `loss(params, data)` is any scalar function of the user's. Every
algorithm is a function (params, tasks) -> (value, gradient), the mean over tasks of

    value = loss(theta_i, query_i),      theta_i = adapt(params; support_i),

and they differ in the gradient. What the functions return are pytrees themselves, with the rule's
rates for leaves, so a new rate does not recompile a program that takes one as an argument. The
inner steps are in `negmaml.meta.inner`, the ways through them in `negmaml.meta.mixed` (forward over
reverse) and `negmaml.meta.lowrank` (wide dense layers).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from negmaml._core.checks import check_count
from negmaml.meta.batching import Tasks, mean_over_tasks
from negmaml.meta.inner import (
    Loss,
    adapt,
    check_params,
    check_scalar,
    merge,
    ready,
    scalar,
    split,
)
from negmaml.meta.lowrank import factored_loss, wide_weights
from negmaml.meta.mixed import backwards
from negmaml.rules import GradientDescent, Rule, Schedule, as_rule, check_rule, run

METHODS = ("mixed", "reverse", "remat", "low-rank")


class LearnedRates(NamedTuple):
    """Meta-parameters of Meta-SGD: where adaptation starts, and its rates (of any sign)."""

    params: Any
    rate: Any


def maml(
    loss: Loss, rule: Rule, *, mask=None, batch_size: int | None = None, has_aux: bool = False
) -> Callable[[Any, Tasks], Any]:
    r"""The objective of model-agnostic meta-learning; jax.grad of it is the meta-gradient.

        L_meta(params) = mean_i loss(adapt(params; support_i), query_i)

    Differentiable in everything: parameters, rates, data. `maml_value_and_grad` has the same
    arguments and returns the gradient faster. Also the way to test: with the rule of the test and
    fresh tasks it is the test loss. Source: Finn, Abbeel and Levine, ICML 2017.
    """

    return _algorithm(_objective, loss, rule, mask, batch_size, has_aux)


def maml_value_and_grad(
    loss: Loss,
    rule: Rule,
    *,
    mask=None,
    batch_size: int | None = None,
    method: str | None = None,
    has_aux: bool = False,
) -> Callable[[Any, Tasks], tuple]:
    r"""Value and exact, second-order meta-gradient of `maml`: (params, tasks) -> (value, gradient).

    Arguments:
        loss: scalar function of (params, data of one task); an rng key or other state of a task
            travels in its data.
        rule: as in `adapt`; any sign of rate.
        mask: which leaves adapt on a task, as in `adapt`; the gradient is that of all of them.
        batch_size: tasks computed at once, all when left out; blocks of them follow one another.
            Small blocks save time and memory where the adapted parameters of all tasks exceed the
            cache of a CPU. It changes the result by rounding only.
        method: "mixed" (forward-over-reverse, memory of the parameters of each step:
            `negmaml.meta.mixed`), "reverse" (reverse-over-reverse through stored steps), "remat"
            (the same with steps recomputed) or "low-rank" (adapted weights of wide dense layers
            are never formed: `negmaml.meta.lowrank`). When left out: "low-rank" where the loss has
            layers whose weights are twice as large as their factors, in + out numbers a row and
            step; else "reverse" for one step, and "mixed" for several, which then needs less
            memory and about the same time. `Proximal` has an implicit derivative, "reverse" only.
        has_aux: whether the loss returns (value, aux); then the result is ((value, aux), gradient)
            with the aux of the query losses, stacked over tasks.

    Raises ValueError for an unknown method, an empty batch, support and query of different
    numbers of tasks, and what `adapt` raises. Source: Finn, Abbeel and Levine, ICML 2017; the
    mixed mode, Kemaev et al., "Scalable Meta-Learning via Mixed-Mode Differentiation", ICML 2025.
    """
    if method not in (None, *METHODS):
        raise ValueError(f"method must be one of {METHODS} or None, got {method!r}")
    return _algorithm(_exact, loss, rule, mask, batch_size, has_aux, method)


def fomaml(
    loss: Loss, rule: Rule, *, mask=None, batch_size: int | None = None, has_aux: bool = False
):
    r"""First-order MAML: (params, tasks) -> (value, gradient), the gradient at the adapted point.

        gradient = mean_i  d loss(theta, query_i) / d theta  at theta = theta_i

    which is the gradient of the `maml` objective with jax.lax.stop_gradient around every inner
    gradient, d theta_i / d params = I. At rate zero it is exact. Arguments and errors as in
    `maml_value_and_grad`. Source: Finn, Abbeel and Levine, ICML 2017, section 5.2.
    """
    return _algorithm(_first_order, loss, rule, mask, batch_size, has_aux)


def anil(loss: Loss, rule: Rule, head, *, batch_size: int | None = None, has_aux: bool = False):
    """Almost no inner loop: MAML whose inner steps move the `head` only.

    `head` is the mask of `adapt`, a pytree of booleans like the parameters or a prefix of it;
    everything else as in `maml_value_and_grad`. Source: Raghu et al., ICLR 2020.
    """
    return maml_value_and_grad(loss, rule, mask=head, batch_size=batch_size, has_aux=has_aux)


def reptile(
    loss: Loss, rule: Rule, *, mask=None, batch_size: int | None = None, has_aux: bool = False
):
    r"""Reptile: (params, tasks) -> (value, gradient), the sum of the inner gradients.

        gradient = mean_i sum_k grad loss(theta_{i,k}, support_i)        (gradient descent)

    For one scalar rate it is (params - theta_i)/rate, with the limit at rate zero and the sign
    that descends for a negative one; for `InnerOptimizer` it is params - theta_i. The value is
    that of the other algorithms, the loss on the query after adapting, which the gradient does
    not use. Arguments and errors as in `maml_value_and_grad`; TypeError for `Proximal`. Source:
    Nichol, Achiam and Schulman 2018.
    """
    return _algorithm(_reptile, loss, rule, mask, batch_size, has_aux)


def imaml(
    loss: Loss, rule: Rule, *, mask=None, batch_size: int | None = None, has_aux: bool = False
):
    r"""Implicit MAML: (params, tasks) -> (value, gradient) of the proximal inner problem.

        theta_i:  grad loss(theta, support_i) + strength (theta - params) = 0
        gradient = mean_i (I + H_i/strength)^{-1} grad loss(theta_i, query_i)

    by Newton's method and conjugate gradients; memory does not grow with the inner work. Arguments
    and errors as in `maml_value_and_grad`; TypeError unless `rule` is `Proximal`. Source:
    Rajeswaran et al., NeurIPS 2019.
    """
    if not check_rule("rule", rule).implicit:
        raise TypeError(
            f"rule must be Proximal(strength), or another with a solve of its own, got {rule!r}"
        )
    return maml_value_and_grad(loss, rule, mask=mask, batch_size=batch_size, has_aux=has_aux)


def meta_sgd(
    loss: Loss,
    *,
    steps: int = 1,
    mask=None,
    batch_size: int | None = None,
    has_aux: bool = False,
):
    r"""Learned rates: (LearnedRates(params, rate), tasks) -> (value, LearnedRates of gradients).

    The rate of `GradientDescent(rate, steps)` is a meta-parameter like any other, unconstrained:
    descent may take it through zero to negative values. Its form is any of `adapt`: a scalar, one
    a step, or a pytree like the parameters, a leaf or an element each. Arguments and errors as in
    `maml_value_and_grad`. Source: Li et al. 2017.
    """
    rule = GradientDescent(0.0, steps)  # of it, only the number of steps is used
    return _algorithm(_learned, loss, rule, mask, batch_size, has_aux)


class _Algorithm(NamedTuple):
    """An algorithm and what it is made with; hashable, so that jit knows equal ones again.

    block: (algorithm, rule, params, tasks) -> (sums over tasks, aux stacked over tasks).
    """

    block: Callable
    loss: Loss
    hashable_mask: Any
    batch_size: int | None
    has_aux: bool
    method: str | None

    def __call__(self, rule, params, tasks):
        block = partial(self.block, self, rule, params)
        sums, aux = mean_over_tasks(block, tasks, self.batch_size)
        value, *gradient = sums
        value = (value, aux) if self.has_aux else value
        return (value, *gradient) if gradient else value

    @property
    def mask(self):
        """The pytree of booleans that was given."""
        if self.hashable_mask is None:
            return None
        treedef, flags = self.hashable_mask
        return treedef.unflatten(flags)


def _algorithm(block, loss, rule, mask, batch_size, has_aux, method=None):
    """The pytree (params, tasks) -> result, whose leaves are the numbers of the rule."""
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size)
    if mask is not None:
        leaves, treedef = jax.tree.flatten(mask)
        mask = treedef, tuple(leaves)
    algorithm = _Algorithm(block, loss, mask, batch_size, has_aux, method)
    return Partial(algorithm, as_rule("rule", rule))


def _objective(algorithm: _Algorithm, rule, params, tasks, remat: bool = False):
    """The sum of the query losses after adapting."""

    def one_task(support, query):
        inner = scalar(algorithm.loss, algorithm.has_aux)
        theta = adapt(inner, params, support, rule, mask=algorithm.mask, remat=remat)
        return check_scalar(algorithm.loss(theta, query), algorithm.has_aux)

    losses, aux = jax.vmap(one_task)(*tasks)
    return (jnp.sum(losses),), aux


def _exact(algorithm: _Algorithm, rule, params, tasks):
    """The second-order gradient, by the method asked for or the best that applies."""
    rule, params = ready(rule, params)
    method = algorithm.method
    if rule.implicit:
        if method not in (None, "reverse"):
            raise ValueError(
                f"method must be 'reverse' or None for {type(rule).__name__}, got {method!r}"
            )
        method = "reverse"
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
        total = partial(_objective, algorithm, rule, remat=method == "remat")

    def loss(params):
        (value,), aux = total(params, tasks)
        return value, aux

    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return (value, gradient), aux


def _first_order(algorithm: _Algorithm, rule, params, tasks):
    """The gradient of the query loss at the adapted parameters."""
    params = check_params(params)

    def one_task(support, query):
        inner = scalar(algorithm.loss, algorithm.has_aux)
        return _at_query(algorithm, adapt(inner, params, support, rule, mask=algorithm.mask), query)

    (value, aux), gradient = jax.vmap(one_task)(*tasks)
    return _sum((value, gradient)), aux


def _reptile(algorithm: _Algorithm, rule, params, tasks):
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


def _learned(algorithm: _Algorithm, rule, meta, tasks):
    """Value, and gradients in the parameters and in the rates."""
    if not isinstance(meta, LearnedRates):
        raise TypeError(f"params must be LearnedRates(params, rate), got {type(meta).__name__}")
    learned = GradientDescent(check_params(meta.rate), rule.steps)
    (value, gradient, of_rule), aux = _mixed(algorithm, learned, meta.params, tasks)
    return (value, LearnedRates(gradient, of_rule.rate)), aux


def _sum(tree):
    """The sum over the task axis of every leaf."""
    return jax.tree.map(lambda x: jnp.sum(x, 0), tree)


def _on_moving(algorithm: _Algorithm, frozen, support):
    """The loss on the support as a function of the leaves that adapt."""
    inner = scalar(algorithm.loss, algorithm.has_aux)
    return lambda theta: inner(merge(theta, frozen), support)


def _at_query(algorithm: _Algorithm, theta, query):
    """((value, aux), gradient) of the loss on the query."""

    def loss(theta):
        return check_scalar(algorithm.loss(theta, query), algorithm.has_aux)

    return jax.value_and_grad(loss, has_aux=True)(theta)


def _mixed(algorithm: _Algorithm, rule, params, tasks):
    """Sums of value, gradient in the parameters and in the rule, by the backward recursion."""
    rule, params = ready(rule, params)
    rule = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float, x)), rule)
    moving, frozen = split(params, algorithm.mask)
    inner = jax.grad(scalar(algorithm.loss, algorithm.has_aux))

    def one_task(support, query):
        theta, visited = run(rule, jax.grad(_on_moving(algorithm, frozen, support)), moving)
        (value, aux), slope = _at_query(algorithm, merge(theta, frozen), query)

        def of_support(full):
            return inner(full, support)

        gradient, of_rule = backwards(rule, of_support, frozen, visited, slope, algorithm.mask)
        return (value, gradient, of_rule), aux

    sums, aux = jax.vmap(one_task)(*tasks)
    return _sum(sums), aux


def _wide(algorithm: _Algorithm, rule, params, tasks) -> frozenset[int]:
    """The weights that the low-rank method keeps factored."""
    if rule.plain_rate is None:
        if algorithm.method == "low-rank":
            raise ValueError(f"method 'low-rank' needs GradientDescent as the rule, got {rule!r}")
        return frozenset()
    rates = _leaf_rates(rule, params, algorithm.mask)
    one_number = [r is not None and jnp.size(r[0]) == 1 for r in rates]
    task = jax.tree.map(lambda x: x[0], tuple(tasks))
    loss = scalar(algorithm.loss, algorithm.has_aux)
    on_support, on_query = (
        wide_weights(loss, params, data, one_number, rule.steps) for data in task
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
    flags = jax.tree.leaves(moving, is_leaf=lambda x: x is None)
    structure: Any = jax.tree.structure(params)
    of_leaves = structure.flatten_up_to(rates)
    return [own if moves else None for moves, own in zip(flags, of_leaves, strict=True)]


def _factored(algorithm: _Algorithm, rule, wide, params, tasks):
    """The sum of the query losses, with wide weights adapted in factored form."""
    rates, leaves = _leaf_rates(rule, params, algorithm.mask), jax.tree.leaves(params)

    def rate(i: int, k: int):
        value = jnp.asarray(rates[i][k], leaves[i].dtype)
        return value.reshape(()) if i in wide else value

    def loss(params, data):
        return check_scalar(algorithm.loss(params, data), algorithm.has_aux)

    def one_task(support, query):
        moving = [r is not None for r in rates]
        return factored_loss(loss, params, rate, rule.steps, support, query, wide, moving)

    losses, aux = jax.vmap(one_task)(*tasks)
    return (jnp.sum(losses),), aux
