"""Values that differ from step to step, inside any rule."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.checks import as_array, check_finite, short_repr
from negmaml._core.pytree import pytree


@pytree
class Schedule:
    """One value for each inner step, in place of a number of a rule or of a leaf of its rates.

        GradientDescent(Schedule([0.1, 0.05, -0.02]), steps=3)
        GradientDescent({"head": Schedule([0.1, 0.05]), "body": 0.01}, steps=2)

    Arguments:
        values: leads with the step axis, at least one entry; behind it a number, or a shape that
            broadcasts to that of the parameters it is for. Differentiable: rates by step can be
            learned.

    Steps beyond the last value use the last; values beyond the last step are not used. An array
    without a `Schedule` never means steps: in theory and simulation it is a batch of rates, on a
    general model one rate for each element of a leaf.

    Raises ValueError or TypeError for values that are not finite real numbers, or no axis.
    """

    values: Any

    def __init__(self, values: Any):
        values = as_array("values", values)  # without a dtype of their own, as a rate is
        values = values if hasattr(values, "ndim") else np.asarray(values)
        values = check_finite("values", values, "a number of an inner rule for each step")
        if values.ndim == 0:
            raise ValueError(
                f"values must lead with a step axis of at least one entry, got "
                f"{short_repr(values)}; one number for all steps needs no Schedule"
            )
        object.__setattr__(self, "values", values)

    def first(self, steps: int):
        """The values of that many steps, the last repeated beyond its own."""
        count = jnp.shape(self.values)[0]
        if count == steps:
            return self.values
        return jnp.asarray(self.values)[jnp.minimum(jnp.arange(steps), count - 1)]


def is_schedule(node) -> bool:
    """Whether a node of a rule holds a value for each step."""
    return isinstance(node, Schedule)


def separate(rule):
    """(stepped, fixed): two trees like the rule, None for what the other has.

    `stepped` has an array that leads with the step axis in place of each `Schedule`.
    """
    stepped = jax.tree.map(
        lambda part: part.first(rule.steps) if is_schedule(part) else None,
        rule, is_leaf=is_schedule,
    )  # fmt: skip
    fixed = jax.tree.map(
        lambda part: None if is_schedule(part) else part, rule, is_leaf=is_schedule
    )
    return stepped, fixed


def combine(stepped, fixed):
    """The rule of one step, of the numbers of that step and those of all."""
    return jax.tree.map(
        lambda own, shared: shared if own is None else own,
        stepped, fixed, is_leaf=lambda part: part is None,
    )  # fmt: skip
