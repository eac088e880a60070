"""Selects rates by nested cross-validation and tests which differences are significant.

All methods see the same splits, so differences between them are paired.
"""

from functools import partial
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from negmaml._core.deprecation import renamed_attribute, warn_renamed
from negmaml.advice.cv import CVLosses
from negmaml.advice.methods import JOINT, META, POOLED, RANKED, SHARED, ZERO
from negmaml.advice.splits import Splits

COVERAGE = 0.95
WIDENING = (
    1.1  # of intervals of differences: without it they hold 93% (benchmarks/advice_coverage.py)
)
MIN_SPLITS = 5  # one for each fold
TOLERANCE = 0.005  # relative difference of losses below which the simpler method is preferred
POOLED_FITS = (JOINT, POOLED)  # methods that train on all rows alike
CHOOSE, REPORT, ALL = 0, 1, 2  # the means over held-out groups of `splits.cross_validation`
RENAMED = {
    "rate zero": "zero inner rate", "equal rates": "shared rate", "ridge alone": "per-group ridge",
    "advised": "meta-learning",
}  # fmt: skip


class ByMethod(dict):
    """Values by name of a method; the names of the last release still work, with a warning."""

    def __missing__(self, name):
        if RENAMED.get(name) not in self:
            raise KeyError(name)
        warn_renamed(f"the method {name!r}", repr(RENAMED[name]))
        return self[RENAMED[name]]


class RateChoice(NamedTuple):
    """The choice of a method: indices of its training rate and ridge, and the adaptation rate.

    Methods outside of the grid have a training rate and an adaptation rate of 0. `ridge` is then
    the index among their own options: ridges of the per-group ridge, structures of the mixed model.
    """

    rate: int
    ridge: int
    adapt: float


class Difference(NamedTuple):
    """How much lower the loss of a method is than that of another, on groups that did not choose.

    The interval contains the expected difference on new groups, at the settings of `Advice`, over
    training sets of m groups. Its error comes from a bootstrap over groups and from the differences
    between the choices of the folds and the final choice.

    Attributes:
        value: in units of the loss, above 0 where the first method is better.
        error: its standard error over groups.
        low, high: its 95% interval.
        relative: value over the loss of the second method.

    Values of `Advice.gain` and results of `Advice.compare` are such differences.

    >>> import negmaml as nm
    >>> gain = nm.advice.Difference(value=0.3, error=0.1, low=0.1, high=0.5, relative=0.2)
    >>> gain.significant, gain.significantly_better
    (True, True)
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
        """True if the interval is above 0: the first method is better than the second."""
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


def best_choices(losses: CVLosses, grid: RateGrid) -> dict[str, RateChoice]:
    """The best rates and ridge of every method, from mean losses without leading axes."""
    meta, pooled, others = losses
    adapt, loss = best_adapt_rate(meta, grid)
    found = {META: _argmin(loss, np.arange(len(grid.rates)), adapt)}
    found[ZERO] = _argmin(loss, np.flatnonzero(grid.rates == 0), adapt)
    positive = np.flatnonzero(grid.rates > 0)
    # Without a positive rate on the axis the usual method has no choice.
    if len(positive):
        same = np.broadcast_to(grid.rates[:, None], loss.shape)
        found[SHARED] = _argmin(half_quadratic(meta, same), positive, same)
    adapt, loss = best_adapt_rate(pooled, grid)
    found[JOINT] = _argmin(loss, np.arange(1), adapt)
    # c0 is twice the loss at the adaptation rate zero.
    found[POOLED] = _argmin(pooled[0], np.arange(1), 0 * adapt)
    for name, values in others.items():
        found[name] = RateChoice(0, int(np.argmin(values)), 0.0)
    return found


def losses_of(chosen: dict[str, RateChoice], losses: CVLosses) -> dict[str, np.ndarray]:
    """The loss of each choice, of the leading axes of the losses."""
    found = {}
    for name, choice in chosen.items():
        if name in losses.others:
            found[name] = losses.others[name][..., choice.ridge]
        else:
            found[name] = loss_at(losses.pooled if name in POOLED_FITS else losses.meta, *choice)
    return found


def _argmin(loss, rows, adapt) -> RateChoice:
    """The least of the given rows of a loss (R, L)."""
    row, ridge = np.unravel_index(np.argmin(loss[rows]), loss[rows].shape)
    rate = int(rows[row])
    return RateChoice(rate, int(ridge), float(adapt[rate, ridge]))


class Evidence(NamedTuple):
    """Losses of every method, from which any two methods are compared.

    nested: {method: (F,)}, on the groups that report in each of F folds, at the best choice of the
        groups that choose in the fold.
    final: the same at the choice on all groups.
    replicates: {method: (B, splits of a replicate)}, of a bootstrap over groups, at the choice on
        all groups.
    splits, groups: numbers of splits in cross-validation, and of groups.
    """

    nested: dict[str, np.ndarray]
    final: dict[str, np.ndarray]
    replicates: dict[str, np.ndarray]
    splits: int
    groups: int

    def difference(self, method: str, other: str) -> Difference:
        """The decrease of the loss by `method` from that of `other`, with its 95% interval.

        Its variance has two parts: sampling of groups at the final choices, from the bootstrap; and
        the choices, from the scatter over folds of the change in loss by the choice of the fold.
        """
        value = float(np.mean(self.nested[other] - self.nested[method]))
        sampling = bootstrap_error(self.replicates[other] - self.replicates[method], self.splits)
        choice = (self.nested[other] - self.final[other]) - (
            self.nested[method] - self.final[method]
        )
        error = float(sampling**2 + choice.var(ddof=1) / len(choice)) ** 0.5
        half_width = WIDENING * t_quantile(self.groups) * error
        loss = float(np.mean(self.nested[other]))
        return Difference(value, error, value - half_width, value + half_width, value / loss)


def decide(evidence: Evidence) -> str:
    """The method to recommend: the simplest whose loss exceeds the least by 0.5% or less.

    On real data (benchmarks/real_data.py decide) this is as close to the best method on other
    groups as the method of least loss. A pooled ridge, unless another method is significantly
    better, loses far more: with few groups large gains are not significant.
    """
    loss = {name: float(evidence.nested[name].mean()) for name in RANKED if name in evidence.nested}
    least = min(loss.values())
    return next(name for name, value in loss.items() if value <= (1 + TOLERANCE) * least)


def collect_evidence(
    losses: CVLosses,
    splits: Splits,
    grid: RateGrid,
    chosen: dict[str, RateChoice],
    replicated: CVLosses,
) -> Evidence:
    """Evaluate every method in the folds of cross-validation and in the bootstrap.

    Arguments:
        losses: of cross-validation with `splits`, (S, 3) means.
        chosen: the choices of every method on all groups.
        replicated: of a bootstrap, (B, splits of a replicate).
    """
    nested: dict[str, list[float]] = {name: [] for name in chosen}
    final: dict[str, list[float]] = {name: [] for name in chosen}
    for fold in np.unique(splits.fold):
        means = losses.map(partial(_mean_of_fold, mine=splits.fold == fold))
        report = means.map(itemgetter(REPORT))
        own = best_choices(means.map(itemgetter(CHOOSE)), grid)
        for found, choices in ((nested, own), (final, chosen)):
            for name, value in losses_of(choices, report).items():
                found[name].append(float(value))
    return Evidence(
        {name: np.array(values) for name, values in nested.items()},
        {name: np.array(values) for name, values in final.items()},
        losses_of(chosen, replicated),
        splits=len(splits.fold),
        groups=splits.weights.shape[-1],
    )


def _mean_of_fold(values, mine):
    return values[mine].mean(0)


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
