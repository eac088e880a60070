r"""What adaptation at test time does on average, exactly and at finite size.

With S ~ Wishart_p(n)/n of the adaptation data and a rule's filters b, q, a model that starts
from omega has adapted weights theta = b(S) omega + q(S) X^T y / n, so

    theta - w = b(S) (omega - w) + q(S) X^T noise / n,

and averaging over noise, task and inputs (isotropic, hence E b(S)^2 = h I) leaves

    E L_test(omega) = sigma^2/2 + h/2 (nu^2 + |omega - w0|^2) + sigma^2/(2 n) E tr(q(S)^2 S),
    h = E tr b(S)^2 / p.

The theory inserts a predicted distance |omega - w0|^2 here, the simulation a measured one.
"""

from typing import Any

import jax
import jax.numpy as jnp

from negmaml._core.numerics import outer
from negmaml._core.types import Array, ArrayLike, Float, ScalarLike
from negmaml.problem.model import MixedLinearRegression
from negmaml.problem.wishart import wishart_quadrature
from negmaml.rules import Rule


def shrinkage(rate: ArrayLike, n: ScalarLike, p: ScalarLike) -> Any:
    r"""h(a) = (1 - a)^2 + a^2 (p + 1)/n, the mean of tr (I - a S)^2 / p; n rows, p dimensions.

    Bernacchia 2021, below Theorem 1. Any shape of `rate`, any sign.
    """
    return (1 - rate) ** 2 + rate**2 * (p + 1) / n


def filter_means(rule: Rule, n: int, p: int) -> tuple[Float[Array, "*rule"], Float[Array, "*rule"]]:
    r"""(E tr b(S)^2 / p, E tr q(S)^2 S / p) for S ~ Wishart_p(n)/n, each of the rule's shape.

    One gradient step in closed form; everything else by the finite-size Gauss quadrature of
    ten nodes, exact for up to nine gradient steps and accurate while the filter is smooth on
    the scale of the spectrum.
    """
    if rule.metric is not None:
        raise ValueError(
            f"the mean test loss after {type(rule).__name__} depends on where omega lies, not on "
            "its distance alone; simulate with evaluation='sampled'"
        )
    if rule.one_step is not None:
        rate = jnp.asarray(rule.one_step)
        return shrinkage(rate, n, p), rate**2
    dtype = jnp.result_type(float, *jax.tree.leaves(rule))
    nodes, weights = (jnp.asarray(a, dtype) for a in wishart_quadrature(n, p))
    noise = jnp.where(nodes == 0, 0.0, rule.q(jnp.where(nodes == 0, 1.0, nodes)) ** 2 * nodes)
    return rule.b(nodes) ** 2 @ weights, noise @ weights


def expected_test_loss(
    problem: MixedLinearRegression, distance: ArrayLike, adapt: Rule
) -> Float[Array, "..."]:
    r"""E L_test given |omega - w0|^2 = `distance`: the equation at the head of this module.

    Arguments:
        problem: its p, n_r, sigma and nu enter.
        distance: squared distance of the meta-trained weights from w0, any shape.
        adapt: the rule used on a new task.

    Returns an array of shape distance.shape + rule shape. Exact for any number of test tasks:
    it is the mean over tasks, adaptation data and test points. Source: negmaml; for one step
    it is the conditional mean behind Bernacchia 2021, Theorems 1 and 2.

    >>> problem = MixedLinearRegression(p=4, m=1, n_t=1, n_v=1, n_r=2, sigma=1.0, nu=1.0)
    >>> float(expected_test_loss(problem, 0.0, GradientDescent(0.0)))  # sigma^2/2 + nu^2/2
    1.0
    """
    h, noise = filter_means(adapt, problem.n_r, problem.p)
    floor = problem.sigma**2 / 2 * (1 + problem.p / problem.n_r * noise)
    spread, h = outer(problem.nu**2 + distance, h)
    return floor + h / 2 * spread
