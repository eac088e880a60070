"""Selects rates by nested cross-validation and tests which differences are significant.

All methods see the same splits, so differences between them are paired.
"""

from typing import NamedTuple

import numpy as np

from negmaml._core.deprecation import renamed_attribute, warn_renamed
from negmaml.advice.cv import CVLosses
from negmaml.advice.splits import Splits

COVERAGE = 0.95
MIN_SPLITS = 5  # one for each fold
POOLED = ("joint training", "pooled ridge")  # methods that train on all rows alike
CHOOSE, REPORT, ALL = 0, 1, 2  # the means over held-out groups of `splits.cross_validation`
RENAMED = {
    "rate zero": "zero inner rate", "equal rates": "shared rate", "ridge alone": "per-group ridge",
}  # fmt: skip


class ByMethod(dict):
    """Values by name of a method; the names of the last release still work, with a warning."""

    def __missing__(self, name):
        if RENAMED.get(name) not in self:
            raise KeyError(name)
        warn_renamed(f"the method {name!r}", repr(RENAMED[name]))
        return self[RENAMED[name]]


class RateChoice(NamedTuple):
    """A training rate and a ridge, by their index in the grid, and the adaptation rate."""

    rate: int
    ridge: int
    adapt: float


class Difference(NamedTuple):
    """The decrease of the loss from a baseline's, on groups that did not choose the rates.

    value: in units of the loss, above 0 where the advised rates are better.
    error: its standard error over groups.
    low, high: its 95% interval.
    relative: value over the baseline's loss.
    """

    value: float
    error: float
    low: float
    high: float
    relative: float

    @property
    def significant(self) -> bool:
        """True if the interval excludes 0."""
        return self.low > 0 or self.high < 0

    @property
    def significantly_better(self) -> bool:
        """True if the interval is above 0: the advised rates are better than the baseline."""
        return self.low > 0


# After the class, since a type checker takes names in a NamedTuple for fields.
for _old, _new in {"told": "significant", "positive": "significantly_better"}.items():
    setattr(Difference, _old, renamed_attribute(f"Difference.{_old}", _new))


class RateGrid(NamedTuple):
    """The axes: training rates (R,), which contain 0; ridges (L,); adaptation rates or None."""

    rates: np.ndarray
    ridges: np.ndarray
    adapt: np.ndarray | None


def loss_at(coefficients, rate, ridge, adapt):
    """Half the quadratic with coefficients (..., 3, R, L) at a choice of rates: (...,)."""
    return half_quadratic(np.moveaxis(coefficients[..., rate, ridge], -1, 0), adapt)


def half_quadratic(coefficients, adapt):
    """The loss (c0 - 2 a c1 + a^2 c2) / 2 at an adaptation rate a; coefficients first."""
    c0, c1, c2 = coefficients
    return (c0 - 2 * adapt * c1 + adapt**2 * c2) / 2


def best_adapt_rate(coefficients, grid: RateGrid):
    """The best adaptation rate and its loss at every rate and ridge: (R, L) each, of (3, R, L)."""
    _, c1, c2 = coefficients
    if grid.adapt is None:
        # c2 is a mean square. Where it vanishes so does c1, and every rate is best.
        adapt = np.where(c2 > 0, c1 / np.where(c2 > 0, c2, 1), 0.0)
    else:
        losses = half_quadratic(coefficients, grid.adapt[:, None, None])
        adapt = grid.adapt[np.argmin(losses, 0)]
    return adapt, half_quadratic(coefficients, adapt)


def best_choices(meta, pooled, grid: RateGrid) -> dict[str, RateChoice]:
    """The best rates and ridge of every method, from mean coefficients (3, R, L) and (3, 1, L).

    advised: any rates.
    zero inner rate: no inner steps in meta-training.
    shared rate: the same positive rate in training and adaptation, the usual choice.
    joint training: a ridge on the pooled rows, then adapting.
    pooled ridge: a ridge on the pooled rows, without adapting.
    """
    adapt, loss = best_adapt_rate(meta, grid)
    found = {"advised": _argmin(loss, np.arange(len(grid.rates)), adapt)}
    found["zero inner rate"] = _argmin(loss, np.flatnonzero(grid.rates == 0), adapt)
    positive = np.flatnonzero(grid.rates > 0)
    # Without a positive rate on the axis the usual method has no choice.
    if len(positive):
        same = np.broadcast_to(grid.rates[:, None], loss.shape)
        found["shared rate"] = _argmin(half_quadratic(meta, same), positive, same)
    adapt, loss = best_adapt_rate(pooled, grid)
    found["joint training"] = _argmin(loss, np.arange(1), adapt)
    # c0 is twice the loss at the adaptation rate zero.
    found["pooled ridge"] = _argmin(pooled[0], np.arange(1), 0 * adapt)
    return found


def losses_of(chosen: dict[str, RateChoice], meta, pooled) -> dict[str, np.ndarray]:
    """The loss of each choice, from coefficients (..., 3, R, L) and (..., 3, 1, L)."""
    return {
        name: loss_at(pooled if name in POOLED else meta, *choice)
        for name, choice in chosen.items()
    }


def _argmin(loss, rows, adapt) -> RateChoice:
    """The least of the given rows of a loss (R, L)."""
    row, ridge = np.unravel_index(np.argmin(loss[rows]), loss[rows].shape)
    rate = int(rows[row])
    return RateChoice(rate, int(ridge), float(adapt[rate, ridge]))


def nested_losses(losses: CVLosses, splits: Splits, grid: RateGrid) -> dict[str, float]:
    """The loss of every method on groups that did not choose its rates and ridge.

    In each fold the choice is the best one for the groups that choose, and its loss is that of the
    groups that report.
    """
    reported: dict[str, list[float]] = {}
    for fold in np.unique(splits.fold):
        mine = splits.fold == fold
        meta, pooled = losses.meta[mine].mean(0), losses.pooled[mine].mean(0)
        chosen = best_choices(meta[CHOOSE], pooled[CHOOSE], grid)
        for name, value in losses_of(chosen, meta[REPORT], pooled[REPORT]).items():
            reported.setdefault(name, []).append(float(value))
        for name, values in losses.others.items():
            mean = values[mine].mean(0)
            # A ridge of the method is chosen within the fold, as the rates are.
            at = (REPORT, int(np.argmin(mean[CHOOSE]))) if mean.ndim == 2 else REPORT
            reported.setdefault(name, []).append(float(mean[at]))
    return {name: float(np.mean(values)) for name, values in reported.items()}


def bootstrap_error(replicates, splits: int):
    """Standard error over groups of a mean over splits, from a bootstrap over groups.

    A replicate's mean over its few splits varies with its groups and with its splits. The variance
    due to splits, estimated within replicates, is replaced by that of a mean over `splits`.

    Arguments:
        replicates: (B, splits a replicate, ...).
        splits: number of splits of the mean whose error is wanted.
    """
    each = replicates.shape[1]
    between = replicates.mean(1).var(0, ddof=1)
    within = replicates.var(1, ddof=1).mean(0)
    # A difference of two estimates of variances may be negative by chance.
    return np.sqrt(np.maximum(between - within / each, 0) + within / splits)


def t_quantile(groups: int) -> float:
    """The two-sided 95% quantile of Student's t with groups - 1 degrees of freedom."""
    from scipy.special import stdtrit  # imported here: a third of the time of importing the package

    return float(stdtrit(groups - 1, (1 + COVERAGE) / 2))


def with_interval(value: float, error: float, baseline: float, groups: int) -> Difference:
    """The difference `value` from a baseline's loss, with its interval."""
    half_width = t_quantile(groups) * error
    return Difference(value, error, value - half_width, value + half_width, value / baseline)


def best_rate_interval(rates, excess, errors, groups: int) -> tuple[float, float]:
    """The 95% interval of the best training rate, from the excess loss, which is 0 at the best.

    Near its optimum the loss is a parabola c (a - a0)^2 / 2, to which noise adds s a with random s.
    The minimum is then found at a0 - s/c. The excess of a0 is s^2 / (2c) and its standard error
    sd(s) |s| / c, with ratio |s| / (2 sd(s)). So a0 is excluded with the right probability if the
    excluded rates are those whose excess is above *half* the usual multiple of its error.
    """
    half = t_quantile(groups) / 2
    # The best rate has neither excess nor error.
    ratio = np.divide(excess, errors, out=np.zeros_like(excess), where=errors > 0)
    first, last = np.flatnonzero(ratio <= half)[[0, -1]]  # never empty: the best rate has ratio 0
    return _zero_beside(rates, ratio - half, first, -1), _zero_beside(rates, ratio - half, last, 1)


def _zero_beside(rates, margin, i, step) -> float:
    """The rate where the margin crosses zero next to i; linear, as the ratio is."""
    j = i + step
    if not 0 <= j < len(rates):
        return float(rates[i])
    return float(rates[i] + (rates[j] - rates[i]) * -margin[i] / (margin[j] - margin[i]))
