r"""Which method a meta-gradient is computed by: the fastest of those that are exact.

- "mixed" takes the derivative of the inner gradient for symmetric. The traced program of the inner
  loss says whether it is (`negmaml._core.symmetry`).
- "low-rank" needs steps params - rate gradient; it walks the loss with all its rules.
- "reverse" and "remat" differentiate what `adapt` computes, whatever that is.
- Those two also serve a rule with a `solve` of its own, which the others would not call.
"""

from typing import Any

import jax
import jax.numpy as jnp

from negmaml._core.symmetry import asymmetry
from negmaml.meta.lowrank import wide_inputs
from negmaml.meta.partition import scalar, split
from negmaml.rules import GradientDescent, InnerRule, Schedule


def choose(algorithm, rule: InnerRule, params, tasks) -> tuple[str, frozenset[int]]:
    """(method, weights that it keeps factored) for the gradient of the query loss.

    Raises ValueError for a method that was asked for and is not exact.
    """
    method = algorithm.method
    name = type(rule).__name__
    if rule.implicit:
        if method in ("mixed", "low-rank"):
            raise ValueError(
                f"method {method!r} follows the updates of a rule, and {name} has a solve of its "
                "own; use method='reverse' or 'remat', or leave method out"
            )
        return method or "reverse", frozenset()
    if method == "low-rank" and not isinstance(rule, GradientDescent):
        raise ValueError(f"method 'low-rank' needs GradientDescent as the rule, got {rule!r}")
    if method in ("reverse", "remat"):
        return method, frozenset()
    inner = _traced(algorithm.inner, params, tasks[0])
    if method != "mixed" and isinstance(rule, GradientDescent):
        query = _traced(scalar(algorithm.loss, algorithm.has_aux), params, tasks[1])
        wide = _wide(rule, params, algorithm.mask, (inner, query))
        if wide or method:
            return "low-rank", wide
    if method is None and rule.steps == 1:
        return "reverse", frozenset()
    found = asymmetry(inner, len(jax.tree.leaves(params)))
    if method is None:
        return "reverse" if found else "mixed", frozenset()
    if found:
        raise ValueError(
            "method 'mixed' takes the derivative of the inner gradient for symmetric, which it "
            f"need not be: the loss of the inner steps holds {found}, so that the meta-gradient "
            "could be wrong; use method='reverse' or 'remat', or leave method out"
        )
    return "mixed", frozenset()


def symmetric(algorithm, params, tasks) -> bool:
    """Whether the derivative of the inner gradient is known to be symmetric."""
    inner = _traced(algorithm.inner, params, tasks[0])
    return not asymmetry(inner, len(jax.tree.leaves(params)))


def _traced(loss, params, data):
    """The program of a loss on the data of one task."""
    return jax.make_jaxpr(loss)(params, jax.tree.map(lambda x: x[0], data))


def _wide(rule: InnerRule, params, mask, programs) -> frozenset[int]:
    """The weights that the low-rank method keeps factored."""
    rates = leaf_rates(rule, params, mask)
    one_number = [r is not None and jnp.size(r[0]) == 1 for r in rates]
    on_support, on_query = (
        wide_inputs(program.jaxpr, one_number, rule.steps) for program in programs
    )
    return on_support & on_query


def leaf_rates(rule, params, mask) -> list:
    """For each leaf of the parameters its rate at every step; None if it is frozen."""

    def by_step(rate):
        return rate.first(rule.steps) if isinstance(rate, Schedule) else [rate] * rule.steps

    def below(rate, part):
        return jax.tree.map(lambda _: by_step(rate), part)

    rates = jax.tree.map(below, rule.rate, params, is_leaf=lambda node: isinstance(node, Schedule))
    moving = split(jax.tree.map(lambda _: True, params), mask)[0]
    structure: Any = jax.tree.structure(params)
    flags, of_leaves = map(structure.flatten_up_to, (moving, rates))
    return [own if moves else None for moves, own in zip(flags, of_leaves, strict=True)]
