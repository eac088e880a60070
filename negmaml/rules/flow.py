"""Gradient descent in continuous time."""

from typing import Any, ClassVar

from negmaml._core.arrays import namespace, outer
from negmaml._core.checks import check_finite
from negmaml._core.pytree import pytree
from negmaml.rules.base import Rule
from negmaml.rules.log_filters import Filters
from negmaml.rules.pencil import chain, error_of, interpolated


@pytree
class GradientFlow(Rule):
    r"""Gradient descent in continuous time: b(x) = exp(-time x), q(x) = (1 - exp(-time x)) / x.

    `time` may be negative (the flow runs uphill), zero, and of any shape. Raises ValueError or
    TypeError when it is NaN, infinite or not real.
    """

    time: Any

    tuned: ClassVar[str] = "time"

    def __post_init__(self):
        object.__setattr__(self, "time", check_finite("time", self.time, "a flow time"))

    def q(self, x):
        """The filter on the labels, shape time.shape + x.shape; `time` at x = 0."""
        time, x = outer(self.time, x)
        return time * _decay_mean(time * x)

    def b(self, x):
        """The filter on the starting point, shape time.shape + x.shape."""
        time, x = outer(self.time, x)
        return namespace(time).exp(-time * x)

    def filters(self, x) -> Filters:
        """As for every rule; uphill in units of exp(-time x)."""
        if (type(self).q, type(self).b) != (GradientFlow.q, GradientFlow.b):
            return super().filters(x)
        time, x = outer(self.time, x)
        z = time * x
        xp = namespace(z)
        down = z >= 0
        label = time * _decay_mean(xp.where(down, z, -z))  # (1 - exp(-z))/z exp(z) uphill
        return Filters(xp.ones_like(z), -z, label, xp.where(down, 0.0, -z))

    def crossing(self, x):
        """An exponential has no zero."""
        return namespace(self.time, x).ones_like(outer(self.time, x)[1])

    @property
    def growth(self):
        """-time."""
        return -self.time

    @property
    def entire(self) -> bool:
        """An exponential has no pole."""
        return True

    def pencil_on(self, largest):
        """That of a polynomial, `negmaml.rules.pencil.interpolated`."""
        return chain(interpolated(self.b, largest))

    def pencil_error(self, largest):
        """0.1% at |time| largest = 2, 0.4% at 3, 1.1% at 4."""
        return error_of(interpolated(self.b, largest), self.b, largest)

    def search_range(self, largest):
        """Beyond thirty times 1/largest eigenvalue all flows are the same."""
        return 1e-2 / largest, 30.0 / largest


def _decay_mean(z):
    """(1 - exp(-z)) / z, the mean of exp(-s) over s in (0, z); 1 at z = 0.

    Near zero the quotient has derivatives that cancel badly, so a Taylor polynomial replaces
    it there; its remainder z^9/10! is below the rounding of a float64.
    """
    xp = namespace(z)
    small = xp.abs(z) < 1e-1
    safe = xp.where(small, 1.0, z)
    near = xp.where(small, z, 0.0)
    series = xp.ones_like(near)
    for k in range(9, 1, -1):  # Horner form of sum_k (-z)^k / (k+1)!
        series = 1 - near / k * series
    return xp.where(small, series, -xp.expm1(-safe) / safe)
