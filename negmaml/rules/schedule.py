"""Values of a rule that differ from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.checks import as_array, check_finite, short_repr
from negmaml._core.pytree import pytree
from negmaml._core.types import Array


@pytree
class Schedule:
    """One value for each inner step, in place of a number of a rule or of a leaf of its rates.

        GradientDescent(Schedule([0.1, 0.05, -0.02]), steps=3)
        GradientDescent({"head": Schedule([0.1, 0.05]), "body": 0.01}, steps=2)

    Arguments:
        values: an array whose first axis is the step, with at least one entry. The remaining axes
            broadcast to the parameters that the value is for. Differentiable: rates of each step
            can be learned.

    Steps beyond the last value use the last value; values beyond the last step are not used. An
    array without a `Schedule` never means steps: in theory and simulation it is a batch of rates,
    on a general model one rate for each element of a leaf.

    Raises ValueError or TypeError for values that are not finite real numbers, or no axis.

    >>> import negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> rule = nm.GradientDescent(nm.Schedule([0.5, -1.0]), steps=2)
    >>> float(nm.adapt(square, 0.0, 1.0, rule))  # to 0.5, and back by 0.5
    0.0
    """

    values: Any

    def __init__(self, values: Any) -> None:
        values = as_array("values", values)  # Python numbers stay weakly typed, like a rate
        values = values if hasattr(values, "ndim") else np.asarray(values)
        values = check_finite("values", values, "a number of an inner rule for each step")
        if values.ndim == 0:
            raise ValueError(
                f"values must lead with a step axis of at least one entry, got "
                f"{short_repr(values)}; one number for all steps needs no Schedule"
            )
        object.__setattr__(self, "values", values)

    def first(self, steps: int) -> Array:
        """The values of the first `steps` steps, with the last value repeated."""
        count = jnp.shape(self.values)[0]
        if count == steps:
            return self.values
        # Indices beyond the last value repeat it.
        return jnp.asarray(self.values)[jnp.minimum(jnp.arange(steps), count - 1)]


def is_schedule(node) -> bool:
    """Return whether a node of a rule is a `Schedule`."""
    return isinstance(node, Schedule)


def separate(rule):
    """Split a rule into (stepped, fixed), two trees like it with None for the part of the other.

    `stepped` has an array that leads with the step axis in place of each `Schedule`.
    """
    # None marks the places that the other tree fills in `combine`.
    stepped = jax.tree.map(
        lambda part: part.first(rule.steps) if is_schedule(part) else None,
        rule, is_leaf=is_schedule,
    )  # fmt: skip
    fixed = jax.tree.map(
        lambda part: None if is_schedule(part) else part, rule, is_leaf=is_schedule
    )
    return stepped, fixed


def combine(stepped, fixed):
    """The rule of one step, from the numbers of that step and those common to all steps."""
    return jax.tree.map(
        lambda own, shared: shared if own is None else own,
        stepped, fixed, is_leaf=lambda part: part is None,
    )  # fmt: skip
