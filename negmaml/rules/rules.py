r"""Inner rules: how parameters adapt to a task's data.

On a linear model with S = X^T X / n a rule is a pair of spectral filters,

    theta = b(S) omega + q(S) X^T y / n,        b(x) = 1 - x q(x),

so one object serves the theory (which integrates the filters), the exact simulation (which
applies them to data) and, for gradient descent, meta-training of any model. No rule rejects
or reinterprets a negative or zero strength.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.checks import check_count, check_finite
from negmaml._core.numerics import outer
from negmaml._core.pytree import pytree, static


@pytree
class GradientDescent:
    r"""`steps` steps of gradient descent at `rate`: b(x) = (1 - rate x)^steps.

        q(x) = rate sum_{k < steps} (1 - rate x)^k        (= rate for one step)

    Arguments:
        rate: learning rate of any sign, any shape (a batch of rates that share their data);
            traced, so a new value does not recompile. In `negmaml.adapt`, a scalar or a pytree
            like the parameters.
        steps: number of steps, a static integer of at least 1.

    Raises ValueError or TypeError for a NaN, infinite or non-real rate and for steps < 1.
    """

    rate: Any
    steps: int = static()

    def __init__(self, rate: Any, steps: int = 1):
        check_finite("rate", rate, "an inner learning rate")
        object.__setattr__(self, "rate", rate)
        object.__setattr__(self, "steps", check_count("steps", steps))

    def q(self, x):
        """The filter on the labels, shape rate.shape + x.shape."""
        rate, x = outer(self.rate, x)
        return rate * _geometric_sum(1 - rate * x, self.steps)

    def b(self, x):
        """The filter on the starting point, shape rate.shape + x.shape."""
        rate, x = outer(self.rate, x)
        return (1 - rate * x) ** self.steps


@pytree
class GradientFlow:
    r"""Gradient descent in continuous time: b(x) = exp(-time x), q(x) = (1 - exp(-time x)) / x.

    `time` may be negative (the flow runs uphill), zero, and of any shape. Raises ValueError or
    TypeError when it is NaN, infinite or not real.
    """

    time: Any

    def __post_init__(self):
        check_finite("time", self.time, "a flow time")

    def q(self, x):
        """The filter on the labels, shape time.shape + x.shape; `time` at x = 0."""
        time, x = outer(self.time, x)
        return time * _decay_mean(time * x)

    def b(self, x):
        """The filter on the starting point, shape time.shape + x.shape."""
        time, x = outer(self.time, x)
        return jnp.exp(-time * x)


@pytree
class Proximal:
    r"""Proximal adaptation, implicit MAML: q(x) = 1 / (x + strength).

    theta minimises |X theta - y|^2 / n + strength |theta - omega|^2 (for a negative strength
    it is the stationary point). Any sign and shape; near -x for an eigenvalue x of S the filter
    has a pole, and so at x = 0 has strength zero. Raises ValueError or TypeError when the
    strength is NaN, infinite or not real.
    """

    strength: Any

    def __post_init__(self):
        check_finite("strength", self.strength, "a proximal strength")

    def q(self, x):
        """The filter on the labels, shape strength.shape + x.shape."""
        strength, x = outer(self.strength, x)
        return 1 / (x + strength)

    def b(self, x):
        """The filter on the starting point, shape strength.shape + x.shape."""
        strength, x = outer(self.strength, x)
        return strength / (x + strength)


Rule = GradientDescent | GradientFlow | Proximal


def parameter(rule: Rule):
    """The number (or batch of numbers) that sets the rule: its rate, time or strength.

    Raises ValueError when it is a pytree of several arrays: weights of the linear model have
    one rate.
    """
    structure: Any = jax.tree.structure(rule)
    if structure.num_nodes != 2:  # the rule, and one leaf
        raise ValueError(
            f"the linear model takes a scalar or one array as the parameter of a rule, "
            f"got {rule!r}; for a batch of rates pass a NumPy or JAX array"
        )
    return jax.tree.leaves(rule)[0]


def batch_shape(rule: Rule) -> tuple[int, ...]:
    """The shape of the rule's parameter, which leads every result of that rule."""
    return np.shape(parameter(rule))


def _geometric_sum(ratio, count: int):
    """sum_{k < count} ratio^k in O(log count) products, stable at ratio = 1.

    With S(n) the sum: S(2n) = S(n) (1 + ratio^n) and S(n + 1) = 1 + ratio S(n).
    """
    if count == 1:
        return jnp.ones_like(ratio)
    half = _geometric_sum(ratio, count // 2) * (1 + ratio ** (count // 2))
    return 1 + ratio * half if count % 2 else half


def _decay_mean(z):
    """(1 - exp(-z)) / z, the mean of exp(-s) over s in (0, z); 1 at z = 0.

    Near zero the quotient has derivatives that cancel badly, so a Taylor polynomial replaces
    it there; its remainder z^9/10! is below the rounding of a float64.
    """
    small = jnp.abs(z) < 1e-1
    safe = jnp.where(small, 1.0, z)
    near = jnp.where(small, z, 0.0)
    series = jnp.ones_like(near)
    for k in range(9, 1, -1):  # Horner form of sum_k (-z)^k / (k+1)!
        series = 1 - near / k * series
    return jnp.where(small, series, -jnp.expm1(-safe) / safe)
