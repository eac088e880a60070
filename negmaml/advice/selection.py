"""From losses of splits to a choice, and to what can be told of it.

All families of methods see the same splits, so differences between them are paired.
"""

from typing import NamedTuple

import numpy as np

from negmaml.advice.splits import Splits

COVERAGE = 0.95
FEWEST = 5  # splits, one for each fold
POOLED = ("joint training", "pooled ridge")  # methods that train on all rows alike
CHOOSE, REPORT, ALL = 0, 1, 2  # the means over held-out groups of `splits.cross_validation`


class Setting(NamedTuple):
    """A training rate and a ridge, by place in their grids, and the adaptation rate."""

    rate: int
    ridge: int
    adapt: float


class Measured(NamedTuple):
    """Losses of splits: meta (S, K, 3, R, L), pooled (S, K, 3, 1, L) as in `engine.Losses`.

    others: by name, (S, K, L) or (S, K).
    """

    meta: np.ndarray
    pooled: np.ndarray
    others: dict[str, np.ndarray]


class Difference(NamedTuple):
    """How much lower the loss is than a baseline's, on groups that did not choose.

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
    def told(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    @property
    def positive(self) -> bool:
        """Whether the interval is above 0: the advised rates are better."""
        return self.low > 0


class Grid(NamedTuple):
    """The axes: training rates (R,), which contain 0; ridges (L,); adaptation rates or None."""

    rates: np.ndarray
    ridges: np.ndarray
    adapt: np.ndarray | None


def loss_at(meta, rate, ridge, adapt):
    """Half the quadratic of a meta-loss array (..., 3, R, L) at a setting: (...,)."""
    c0, c1, c2 = np.moveaxis(meta[..., rate, ridge], -1, 0)
    return (c0 - 2 * adapt * c1 + adapt**2 * c2) / 2


def best_adapt(meta, grid: Grid):
    """The best adaptation rate and its loss at every rate and ridge: (R, L) each, of (3, R, L)."""
    c0, c1, c2 = meta
    if grid.adapt is None:
        adapt = np.where(c2 > 0, c1 / np.where(c2 > 0, c2, 1), 0.0)
    else:
        a = grid.adapt[:, None, None]
        adapt = grid.adapt[np.argmin(c0 - 2 * a * c1 + a**2 * c2, 0)]
    return adapt, (c0 - 2 * adapt * c1 + adapt**2 * c2) / 2


def settings(meta, pooled, grid: Grid) -> dict[str, Setting]:
    """The best setting of every family of meta-training, (3, R, L), and of pooling, (3, 1, L).

    advised: any; rate zero: without inner steps in meta-training; equal rates: the same positive
    rate in training and adaptation, the usual choice; joint training: pooled rows, then adapting;
    pooled ridge: without it.
    """
    adapt, loss = best_adapt(meta, grid)
    found = {"advised": _least(loss, np.arange(len(grid.rates)), adapt)}
    found["rate zero"] = _least(loss, np.flatnonzero(grid.rates == 0), adapt)
    positive = np.flatnonzero(grid.rates > 0)
    if len(positive):
        same = np.broadcast_to(grid.rates[:, None], loss.shape)
        c0, c1, c2 = meta
        found["equal rates"] = _least((c0 - 2 * same * c1 + same**2 * c2) / 2, positive, same)
    adapt, loss = best_adapt(pooled, grid)
    found["joint training"] = _least(loss, np.arange(1), adapt)
    found["pooled ridge"] = _least(pooled[0], np.arange(1), 0 * adapt)
    return found


def losses_of(chosen: dict[str, Setting], meta, pooled) -> dict[str, np.ndarray]:
    """The losses of settings in arrays (..., 3, R, L) and (..., 3, 1, L)."""
    return {
        name: loss_at(pooled if name in POOLED else meta, *setting)
        for name, setting in chosen.items()
    }


def _least(loss, rows, adapt) -> Setting:
    row, ridge = np.unravel_index(np.argmin(loss[rows]), loss[rows].shape)
    rate = int(rows[row])
    return Setting(rate, int(ridge), float(adapt[rate, ridge]))


def nested(measured: Measured, splits: Splits, grid: Grid) -> dict[str, float]:
    """The loss of every family on groups that did not choose its rates and ridge.

    Fold by fold: settings are those that are best for the groups that choose, the loss is that of
    the groups that report.
    """
    reported: dict[str, list[float]] = {}
    for fold in np.unique(splits.fold):
        mine = splits.fold == fold
        meta, pooled = measured.meta[mine].mean(0), measured.pooled[mine].mean(0)
        chosen = settings(meta[CHOOSE], pooled[CHOOSE], grid)
        for name, value in losses_of(chosen, meta[REPORT], pooled[REPORT]).items():
            reported.setdefault(name, []).append(float(value))
        for name, values in measured.others.items():
            mean = values[mine].mean(0)
            at = (REPORT, int(np.argmin(mean[CHOOSE]))) if mean.ndim == 2 else REPORT
            reported.setdefault(name, []).append(float(mean[at]))
    return {name: float(np.mean(values)) for name, values in reported.items()}


def standard_error(replicates, splits: int):
    """Standard error over groups of a mean over splits, from a bootstrap over groups.

    A replicate's mean over its few splits varies with its groups and with its splits. The second
    part, known from within replicates, is taken off, and what it is in a mean over `splits` put on.

    Arguments:
        replicates: (B, splits a replicate, ...).
        splits: of the mean whose error is wanted.
    """
    each = replicates.shape[1]
    between = replicates.mean(1).var(0, ddof=1)
    within = replicates.var(1, ddof=1).mean(0)
    return np.sqrt(np.maximum(between - within / each, 0) + within / splits)


def quantile(groups: int) -> float:
    """Of Student's t for as many groups, two-sided."""
    from scipy.special import stdtrit  # a third of the time of importing this package

    return float(stdtrit(groups - 1, (1 + COVERAGE) / 2))


def difference(value: float, error: float, of: float, groups: int) -> Difference:
    """A difference with its interval."""
    reach = quantile(groups) * error
    return Difference(value, error, value - reach, value + reach, value / of)


def rates_not_worse(rates, excess, errors, groups: int) -> tuple[float, float]:
    """The interval of training rates that cannot be told from the best: excess 0 at the best.

    Near its optimum the loss is a parabola c (a - a0)^2 / 2, of which noise adds s a with s random.
    The least is then found at a0 - s/c; the excess of a0 is s^2 / (2c), and its standard error
    sd(s) |s| / c. Their ratio is |s| / (2 sd(s)): a0 is left out with the right probability if
    rates are whose excess is above *half* the usual multiple of its error.
    """
    half = quantile(groups) / 2
    ratio = np.divide(excess, errors, out=np.zeros_like(excess), where=errors > 0)
    first, last = np.flatnonzero(ratio <= half)[[0, -1]]  # the best rate has ratio 0
    return _crossing(rates, ratio - half, first, -1), _crossing(rates, ratio - half, last, 1)


def _crossing(rates, margin, i, step) -> float:
    """Where the margin turns positive next to i, by linear interpolation: the ratio is linear."""
    j = i + step
    if not 0 <= j < len(rates):
        return float(rates[i])
    return float(rates[i] + (rates[j] - rates[i]) * -margin[i] / (margin[j] - margin[i]))
