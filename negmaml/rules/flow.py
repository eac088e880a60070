"""Gradient descent in continuous time."""

from typing import Any, ClassVar, final

from negmaml._core.arrays import namespace, outer
from negmaml._core.checks import check_finite
from negmaml._core.pytree import pytree
from negmaml._core.types import ArrayLike, ScalarLike
from negmaml.rules.base import InnerRule
from negmaml.rules.filters import Filter, LogForm
from negmaml.rules.pencil import Pencil, chain, error_of, interpolated


@final
@pytree
class GradientFlow(InnerRule):
    r"""Gradient descent in continuous time, on the linear model only.

        init_filter(x) = exp(-time x),    label_filter(x) = (1 - exp(-time x)) / x

    Arguments:
        time: may be negative (the flow runs uphill), zero, and of any shape.

    Raises ValueError or TypeError for a time that is NaN, infinite or not real.

    >>> import negmaml as nm
    >>> rule = nm.GradientFlow(0.5)
    >>> round(float(rule.init_filter(2.0)), 4), round(float(rule.label_filter(2.0)), 4)
    (0.3679, 0.3161)
    """

    time: Any

    tunable: ClassVar[str] = "time"

    def __post_init__(self) -> None:
        object.__setattr__(self, "time", check_finite("time", self.time, "a flow time"))

    def spectral(self) -> Filter:
        return FlowFilter(self.time)

    def check_meta(self) -> None:
        self.update(None, None, None)  # raises: there are no steps on a general model

    def search_range(self, largest: ScalarLike) -> tuple[Any, Any]:
        """(smallest, largest) time to try: beyond 30/largest all flows are the same."""
        return 1e-2 / largest, 30.0 / largest


@final
@pytree
class FlowFilter(Filter):
    """The filter exp(-time x) of `GradientFlow`; it has neither zeros nor poles."""

    time: Any

    exact_pencil: ClassVar[bool] = False

    @property
    def entire(self) -> bool:
        return True

    @property
    def exponential_type(self) -> Any:
        return -self.time

    def label_filter(self, x: ArrayLike) -> Any:
        """(1 - exp(-time x)) / x, which is `time` at x = 0."""
        time, x = outer(self.time, x)
        return time * _decay_mean(time * x)

    def init_filter(self, x: ArrayLike) -> Any:
        time, x = outer(self.time, x)
        return namespace(time).exp(-time * x)

    def log_form(self, x: ArrayLike) -> LogForm:
        """In units of exp(-time x) where the flow runs uphill."""
        time, x = outer(self.time, x)
        z = time * x
        xp = namespace(z)
        # Downhill, z >= 0 and exp(-z) <= 1. Uphill exp(-z) may overflow, so it becomes the unit.
        down = z >= 0
        label = time * _decay_mean(xp.where(down, z, -z))  # (1 - exp(-z))/z exp(z) uphill
        return LogForm(xp.ones_like(z), -z, label, xp.where(down, 0.0, -z))

    def zero_indicator(self, x: ArrayLike) -> Any:
        return namespace(self.time, x).ones_like(outer(self.time, x)[1])

    def pencil(self, largest: ScalarLike) -> Pencil:
        """The pencil of a polynomial in its place, `negmaml.rules.pencil.interpolated`."""
        return chain(interpolated(self.init_filter, largest))

    def pencil_error(self, largest: ScalarLike) -> float:
        """The error of that polynomial: 0.1% at |time| largest = 2, 0.4% at 3, 1.1% at 4."""
        return error_of(interpolated(self.init_filter, largest), self.init_filter, largest)


def _decay_mean(z):
    """(1 - exp(-z)) / z, the mean of exp(-s) over s in (0, z); 1 at z = 0.

    Near zero the quotient has derivatives that cancel badly, so a Taylor polynomial replaces
    it there; its remainder z^9/10! is below the rounding of a float64.
    """
    xp = namespace(z)
    # Both branches of `where` are evaluated, so each gets a safe argument.
    small = xp.abs(z) < 1e-1
    safe = xp.where(small, 1.0, z)
    near = xp.where(small, z, 0.0)
    series = xp.ones_like(near)
    for k in range(9, 1, -1):  # Horner form of sum_k (-z)^k / (k+1)!
        series = 1 - near / k * series
    return xp.where(small, series, -xp.expm1(-safe) / safe)
