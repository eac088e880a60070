r"""Chooses the method of a meta-gradient: the fastest of those that are exact.

- "mixed" assumes that the derivative of the inner gradient is symmetric. The traced program of the
  inner loss shows whether it is (`negmaml._core.symmetry`).
- "low-rank" needs steps params - rate gradient; it walks the loss with all its derivative rules.
- "reverse" and "remat" differentiate what `adapt` computes, for any loss and rule.
- A rule with a `solve` of its own has no updates to follow. Its derivative is that of the solution.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from negmaml._core.symmetry import asymmetry
from negmaml.meta.lowrank import wide_inputs
from negmaml.meta.minibatches import at_step
from negmaml.meta.partition import partition
from negmaml.rules import GradientDescent, InnerRule, Schedule
from negmaml.rules.unroll import PLAIN, Unroll


class LossPair(NamedTuple):
    """The two losses of an algorithm as `LiftedLoss`, and how to differentiate them.

    inner: the loss on the support, for the inner steps. outer: the loss on the query.
    mask: the leaves that adapt. method, wrt: as in `maml_value_and_grad`. unroll: how derivatives
    pass through the inner steps. step_weights: weights of the query losses after each step, None if
    only the last one counts.
    """

    inner: Any
    outer: Any
    mask: Any
    method: str | None
    unroll: Unroll = PLAIN
    wrt: str = "params"
    step_weights: Any = None


def choose(losses: LossPair, rule: InnerRule, params, state, tasks) -> tuple[str, frozenset[int]]:
    """Return (method, weights that it keeps factored) for the gradient of the query loss.

    The method is one of `maml_value_and_grad`, or "implicit" for a rule with a `solve` of
    its own. Raises for a requested method that is not exact.
    """
    # First the cases that need no trace of the losses, which takes time.
    method = losses.method
    if rule.implicit:
        if method not in (None, "reverse"):
            raise ValueError(
                f"method {method!r} follows the updates of a rule, and {type(rule).__name__} has a "
                "solve of its own; use method='reverse', or leave method out"
            )
        return "implicit", frozenset()
    if losses.step_weights is not None:
        if method in ("mixed", "low-rank"):
            raise ValueError(
                f"method must be 'reverse' or 'remat' with step_weights, got {method!r}, which "
                "follows the loss after the last step only; or leave method out"
            )
        return method or "reverse", frozenset()
    if method in ("mixed", "low-rank"):
        _check_follows_updates(method, rule, state, losses.unroll)
    if method in ("reverse", "remat"):
        return method, frozenset()
    if jax.tree.leaves(state):
        return "reverse", frozenset()
    # Factored updates save most where they apply, so they come first.
    inner = _trace(losses.inner, params, state, tasks[0])
    # They are compiled step by step, for few steps.
    few_steps = losses.unroll.segment is None
    if method != "mixed" and few_steps and isinstance(rule, GradientDescent):
        query = _trace(losses.outer, params, state, tasks[1])
        wide = _wide_weights(rule, params, losses.mask, (inner, query))
        if wide or method:
            return "low-rank", wide
    # The recursion saves memory over several steps; for one, reverse mode is simpler.
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


def _check_follows_updates(method: str, rule: InnerRule, state, unroll: Unroll) -> None:
    """Raise where "mixed" or "low-rank" cannot follow the inner steps."""
    if jax.tree.leaves(state):
        raise TypeError(
            "Stateful parameters go with method 'reverse' or 'remat', since the state changes "
            f"the loss from step to step, which others compute again, got {method!r}"
        )
    if method == "low-rank" and not isinstance(rule, GradientDescent):
        raise ValueError(f"method 'low-rank' needs GradientDescent as the rule, got {rule!r}")
    if method == "low-rank" and unroll.segment is not None:
        raise ValueError(
            "method 'low-rank' stores factors of all steps, so that segment must be None, got "
            f"{unroll.segment!r}; use method 'mixed', 'reverse' or 'remat'"
        )


def _trace(loss, params, state, data):
    """Return the jaxpr of the value of a loss on the data of one task."""
    # Only shapes matter to the trace: the first task stands for all.
    first = at_step(jax.tree.map(lambda x: x[0], data), 0)
    return jax.make_jaxpr(lambda params, data: loss(params, state, data)[0])(params, first)


def _wide_weights(rule: InnerRule, params, mask, programs) -> frozenset[int]:
    """Return the leaves that the low-rank method keeps factored in both losses."""
    rates = leaf_rates(rule, params, mask)
    # A rate for each entry of a weight has no factored form.
    one_number = [r is not None and jnp.size(r[0]) == 1 for r in rates]
    on_support, on_query = (
        wide_inputs(program.jaxpr, one_number, rule.steps) for program in programs
    )
    # Adapted weights are used in the query loss too, which must not need them dense.
    return on_support & on_query


def leaf_rates(rule, params, mask) -> list:
    """Return for each leaf of the parameters its rates by step, or None if it is frozen."""

    def by_step(rate):
        return rate.first(rule.steps) if isinstance(rate, Schedule) else [rate] * rule.steps

    def below(rate, part):
        return jax.tree.map(lambda _: by_step(rate), part)

    # The rates may be a prefix of the parameters: each applies to all leaves below it.
    rates = jax.tree.map(below, rule.rate, params, is_leaf=lambda node: isinstance(node, Schedule))
    moving = partition(jax.tree.map(lambda _: True, params), mask)[0]
    structure: Any = jax.tree.structure(params)
    flags, of_leaves = map(structure.flatten_up_to, (moving, rates))
    return [own if moves else None for moves, own in zip(flags, of_leaves, strict=True)]
