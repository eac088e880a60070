"""The loop over the updates of a rule, with the numbers of each step."""

from collections.abc import Callable

import jax
from jax import lax

from negmaml.rules.schedule import combine, separate


def run(rule, gradient: Callable, start, remat: bool = False):
    """Return the last parameters and the (parameters, state) before every step, stacked."""
    _check_steps(rule)
    stepped, fixed = separate(rule)

    def step(carry, own):
        theta, state = carry
        return combine(own, fixed).update(gradient(theta), state, theta), carry

    # Reverse mode then stores the carry of every step and runs the step again.
    step = jax.checkpoint(step) if remat else step
    first = (start, rule.init(start))
    if rule.steps == 1:  # no loop, and nothing stacked
        (theta, _), visited = step(first, jax.tree.map(lambda x: x[0], stepped))
        return theta, visited
    # A scan compiles one step, whatever their number.
    (theta, _), visited = lax.scan(step, first, stepped, length=rule.steps)
    return theta, visited


def each_step(rule, advance: Callable, carry, unrolled: bool = False):
    """Return `carry` after carry = advance(rule of one step, carry) for every step.

    unrolled: whether to use a Python loop, which compiles nothing if all values are known.
    """
    _check_steps(rule)
    stepped, fixed = separate(rule)
    if unrolled or rule.steps == 1:
        for k in range(rule.steps):
            own = jax.tree.map(lambda x, k=k: x[k], stepped)
            carry = advance(combine(own, fixed), carry)
        return carry
    return lax.scan(
        lambda carry, own: (advance(combine(own, fixed), carry), None),
        carry, stepped, length=rule.steps,
    )[0]  # fmt: skip


def _check_steps(rule) -> None:
    # A traced number of steps would fail inside scan with a message that names no rule.
    if isinstance(rule.steps, jax.core.Tracer):
        raise TypeError(
            f"steps of {type(rule).__name__} must be static, an integer that JAX does not trace; "
            "declare it as `steps: int = negmaml.static(default=1)`"
        )
