"""Proximal adaptation, implicit MAML."""

import dataclasses
from collections.abc import Callable
from typing import Any, final

import jax
import numpy as np

from negmaml._core.arrays import namespace, outer, stop_gradient
from negmaml._core.checks import (
    check_count,
    check_finite,
    check_optional,
    check_positive,
)
from negmaml._core.pytree import pytree, static
from negmaml._core.types import ArrayLike, PyTree, ScalarLike
from negmaml.rules.field import field_point, is_field
from negmaml.rules.filters import Filter, LogForm, log_size
from negmaml.rules.implicit import LinearSolver, Settings, proximal_point
from negmaml.rules.pencil import Pencil, proximal_pencil
from negmaml.rules.solution import Solution
from negmaml.rules.stationary import StationaryRule


@final
@pytree
class Proximal(StationaryRule):
    r"""Proximal adaptation, implicit MAML: label_filter(x) = 1 / (x + strength).

    theta minimises |X theta - y|^2 / n + strength |theta - omega|^2, or is the stationary point for
    a negative strength. The strength has any sign and shape. At minus an eigenvalue of S the filter
    has a pole. Strength zero is the limit: the init filter is zero, but one at x = 0, where the
    label filter is infinite.

    On a general model theta is a minimum of loss(theta) + strength/2 |theta - omega|^2, found by
    trust region steps that never increase it. For a negative strength this function need not have a
    minimum. Then theta is a point of zero gradient, if one is found, by Gauss-Newton steps or else
    by ascent to a maximum.

    Arguments:
        strength: a number; for theory and simulation also an array of them.
        max_steps: the largest number of steps on a general model, static; a linear solve takes at
            most 20 times as many iterations.
        tolerance: of |grad loss(theta) + strength (theta - omega)| over strength |theta - omega|,
            static. The default is rounding^(3/4) of the dtype, 2e-12 in float64 and 6e-6 in
            float32. A residual within the rounding of the parameters is allowed too.

    `negmaml.adapt(..., return_info=True)` returns whether the solver converged, and whether the
    solution is no minimum (`negmaml.rules.SolveInfo`); otherwise a warning is issued if it did not
    converge.
    Raises ValueError or TypeError when the strength is NaN, infinite or not real, and for options
    that are not positive.

    >>> import negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> round(float(nm.adapt(square, 0.0, 1.0, nm.Proximal(3.0))), 4)  # 1 / (1 + strength)
    0.25
    """

    strength: Any
    _: dataclasses.KW_ONLY
    max_steps: int = static(default=200)
    tolerance: float | None = static(default=None)

    def __post_init__(self) -> None:
        strength = check_finite("strength", self.strength, "a proximal strength")
        object.__setattr__(self, "strength", strength)
        object.__setattr__(self, "max_steps", check_count("max_steps", self.max_steps))
        # None stands for a tolerance by the dtype of the parameters, which is not known here.
        tolerance = check_optional(check_positive, "tolerance", self.tolerance)
        object.__setattr__(self, "tolerance", tolerance)

    def spectral(self) -> Filter:
        return ProximalFilter(self.strength)

    def search_range(self, largest: ScalarLike) -> tuple[Any, Any]:
        """(smallest, largest) strength to try, in units of the largest eigenvalue."""
        return 1e-3 * largest, 1e3 * largest

    def check_meta(self) -> None:
        """Raise for strength zero, which does not depend on the start and has no meta-gradient."""
        strength = self.strength
        if not isinstance(strength, jax.core.Tracer) and np.ndim(strength) == 0 and strength == 0:
            raise ValueError(
                f"strength must not be 0 to meta-train a model, got {strength!r}: the adapted "
                "parameters would not depend on the start, and every meta-gradient would be zero; "
                "give a strength of either sign"
            )

    def solve(self, loss: Callable[..., Any], start: PyTree, *, remat: bool = False) -> Solution:
        """Solve grad loss(theta) + strength (theta - start) = 0; the result has `SolveInfo`."""
        if is_field(loss, start):
            return field_point(loss, start, self.strength, self._settings)
        return proximal_point(loss, start, self.strength, self._settings)

    @property
    def _solve_linear(self) -> LinearSolver:
        return self._settings.solve_linear

    @property
    def _settings(self) -> Settings:
        return Settings(self.max_steps, self.tolerance)


@final
@pytree
class ProximalFilter(Filter):
    """The filter strength / (x + strength) of `Proximal`: no zero, a pole at x = -strength.

    label_filter(x) = 1 / (x + strength). strength: any shape, the batch.
    """

    strength: Any

    def label_filter(self, x: ArrayLike) -> Any:
        strength, x = outer(self.strength, x)
        return 1 / (x + strength)

    def init_filter(self, x: ArrayLike) -> Any:
        """strength / (x + strength), which is one at x = 0 for strength zero, too."""
        strength, x = outer(self.strength, x)
        xp = namespace(strength, x)
        # At x = 0 the limit is one for every strength, zero included.
        null = x == 0
        return xp.where(null, 1.0, strength / (xp.where(null, 1.0, x) + strength))

    def log_form(self, x: ArrayLike) -> LogForm:
        """Both filters, at a pole as large as rounding may leave them."""
        strength, x = outer(self.strength, x)
        xp = namespace(strength, x)
        below = x + strength
        # Closer to the pole than the rounding of x and strength, neither value nor slope is known.
        least = xp.finfo(below.dtype).eps / 8 * xp.abs(strength) + 4 * xp.finfo(below.dtype).tiny
        least = stop_gradient(least)
        near = xp.where(below < 0, -least, least)
        below = xp.where(xp.abs(below) < least, near, below)
        null = xp.broadcast_to(x == 0, below.shape)
        size = log_size(xp.where(null, 1.0, strength)) - log_size(xp.where(null, 1.0, below))
        return LogForm(xp.where(null, 1.0, xp.sign(strength * below)), size, 1 / below, None)

    def zero_indicator(self, x: ArrayLike) -> Any:
        """strength / (x + strength) has no zero."""
        return namespace(self.strength, x).ones_like(outer(self.strength, x)[1])

    def pole_indicator(self, x: ArrayLike) -> Any:
        strength, x = outer(self.strength, x)
        return x + strength

    def pencil(self, largest: ScalarLike) -> Pencil:
        """S theta + strength (theta - omega) = 0."""
        return proximal_pencil(self.strength)
