"""Blocks of tasks for rules that solve an inner problem, such as `Proximal`.

As those of `negmaml.meta.gradients`, with aux = (aux, whether each task converged): its inner
problem and, where a gradient goes through that, the linear system of the derivative.
"""

import jax
import jax.numpy as jnp

from negmaml.meta.inner import adapt
from negmaml.meta.partition import check_params, check_scalar, merge, ready, split


def objective(algorithm, rule, params, tasks, weight):
    """The sum of the query losses after adapting."""

    def one_task(support, query):
        theta, info = _adapted(algorithm, rule, params, support)
        value, aux = check_scalar(algorithm.loss(theta, query), algorithm.has_aux)
        return value, (aux, info.converged)

    losses, more = jax.vmap(one_task)(*tasks)
    return (weight * jnp.sum(losses),), more


def exact(algorithm, rule, params, tasks, weight):
    """The gradient by the implicit function theorem."""
    rule, params = ready(rule, params)
    if algorithm.method not in (None, "reverse"):
        raise ValueError(
            f"method must be 'reverse' or None for {type(rule).__name__}, got {algorithm.method!r}"
        )
    moving, frozen = split(params, algorithm.mask)

    def one_task(support, query):
        def inner(theta, frozen):
            return algorithm.inner(merge(theta, frozen), support)

        solution, pull = rule.solve_and_pull_back(inner, moving, frozen)
        (value, aux), slope = _at_query(algorithm, merge(solution.params, frozen), query, weight)
        of_theta, direct = split(slope, algorithm.mask)
        of_start, of_frozen, accurate = pull(of_theta)
        gradient = merge(of_start, jax.tree.map(jnp.add, direct, of_frozen))
        return (value, gradient), (aux, solution.info.converged & accurate)

    return _summed(jax.vmap(one_task)(*tasks))


def first_order(algorithm, rule, params, tasks, weight):
    """The gradient of the query loss at the adapted parameters."""
    params = check_params(params)

    def one_task(support, query):
        theta, info = _adapted(algorithm, rule, params, support)
        (value, aux), gradient = _at_query(algorithm, theta, query, weight)
        return (value, gradient), (aux, info.converged)

    return _summed(jax.vmap(one_task)(*tasks))


def _adapted(algorithm, rule, params, support):
    return adapt(algorithm.inner, params, support, rule, mask=algorithm.mask, return_info=True)


def _at_query(algorithm, theta, query, weight):
    """((value, aux), gradient) of the loss on the query times `weight`."""

    def loss(theta):
        value, aux = check_scalar(algorithm.loss(theta, query), algorithm.has_aux)
        return weight * value, aux

    return jax.value_and_grad(loss, has_aux=True)(theta)


def _summed(results):
    """Sums over tasks, and the rest of each."""
    sums, more = results
    return jax.tree.map(lambda x: jnp.sum(x, 0), sums), more
