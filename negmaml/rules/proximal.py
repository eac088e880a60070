"""Proximal adaptation, implicit MAML."""

from typing import Any, ClassVar

import jax
import numpy as np

from negmaml._core.checks import check_finite, shown
from negmaml._core.numerics import frozen, namespace, outer
from negmaml._core.pytree import pytree
from negmaml.rules.field import field_point, is_field
from negmaml.rules.implicit import proximal_point
from negmaml.rules.pencil import Pencil, proximal_pencil
from negmaml.rules.protocol import Rule
from negmaml.rules.scaled import Filters, log_size


@pytree
class Proximal(Rule):
    r"""Proximal adaptation, implicit MAML: q(x) = 1 / (x + strength).

    theta minimises |X theta - y|^2 / n + strength |theta - omega|^2 (for a negative strength
    it is the stationary point). Any sign and shape; near -x for an eigenvalue x of S the filter
    has a pole. Strength zero is the limit: b is zero, and one at x = 0, where q is infinite. Raises
    ValueError or TypeError when the strength is NaN, infinite or not real.
    """

    strength: Any

    tuned: ClassVar[str] = "strength"
    implicit: ClassVar[bool] = True

    def __post_init__(self):
        strength = check_finite("strength", self.strength, "a proximal strength")
        object.__setattr__(self, "strength", strength)

    def q(self, x):
        """The filter on the labels, shape strength.shape + x.shape."""
        strength, x = outer(self.strength, x)
        return 1 / (x + strength)

    def b(self, x):
        """The filter on the starting point, shape strength.shape + x.shape."""
        strength, x = outer(self.strength, x)
        xp = namespace(strength, x)
        null = x == 0
        return xp.where(null, 1.0, strength / (xp.where(null, 1.0, x) + strength))

    def filters(self, x) -> Filters:
        """As for every rule; at a pole as large as rounding may leave it."""
        if (type(self).q, type(self).b) != (Proximal.q, Proximal.b):
            return super().filters(x)
        strength, x = outer(self.strength, x)
        xp = namespace(strength, x)
        below = x + strength
        # Nearer to the pole than rounding x and strength may leave it nothing is known, no slope
        # either.
        least = xp.finfo(below.dtype).eps / 8 * xp.abs(strength) + 4 * xp.finfo(below.dtype).tiny
        least = frozen(least)
        near = xp.where(below < 0, -least, least)
        below = xp.where(xp.abs(below) < least, near, below)
        null = xp.broadcast_to(x == 0, below.shape)
        size = log_size(xp.where(null, 1.0, strength)) - log_size(xp.where(null, 1.0, below))
        return Filters(xp.where(null, 1.0, xp.sign(strength * below)), size, 1 / below, None)

    def crossing(self, x):
        """strength / (x + strength) has no zero."""
        return namespace(self.strength, x).ones_like(outer(self.strength, x)[1])

    def pole(self, x):
        """x + strength."""
        strength, x = outer(self.strength, x)
        return x + strength

    @property
    def pencil(self) -> Pencil:
        """S theta + strength (theta - omega) = 0."""
        return proximal_pencil(self.strength)

    def search_range(self, largest):
        """Strengths are measured in units of the largest eigenvalue."""
        return 1e-3 * largest, 1e3 * largest

    def check(self, params) -> None:
        if np.shape(self.strength) != ():
            raise ValueError(
                f"strength must be one number on a general model, got {shown(self.strength)}; for "
                "a batch of rules use jax.vmap"
            )

    def check_meta(self) -> None:
        """A strength of zero forgets where it starts: no gradient is left."""
        strength = self.strength
        if not isinstance(strength, jax.core.Tracer) and np.ndim(strength) == 0 and strength == 0:
            raise ValueError(
                f"strength must not be 0 to meta-train a model, got {strength!r}: what adapting "
                "ends at does not depend on where it starts then, and every meta-gradient is zero; "
                "give one of either sign"
            )

    def solve(self, loss, start, *, remat: bool = False):
        """The point where grad loss(theta) + strength (theta - start) = 0, by Newton's method."""
        if is_field(loss, start):
            return field_point(loss, start, self.strength)[0]
        return proximal_point(loss, start, self.strength)
