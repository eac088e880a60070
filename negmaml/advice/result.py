"""What `advise` returns, and how it follows from the losses of all splits."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from negmaml._core.display import Table, displayed
from negmaml.advice import selection as choice
from negmaml.advice.data import Grouped
from negmaml.advice.selection import ALL, Difference, Grid, Measured, Setting
from negmaml.advice.splits import Splits


class Sizes(NamedTuple):
    """Groups in meta-training; support, query and adaptation rows of a group."""

    m: int
    n_t: int
    n_v: int
    n_r: int


class Curves(NamedTuple):
    """Losses over the grid, rates in raw units.

    meta: (3, R, L), twice the coefficients of the loss in the adaptation rate.
    adapt, loss: (R, L), the best adaptation rate and the loss there.
    error: (R, L), standard error of the loss.
    excess, excess_error: (R, L), loss above the best one, and its standard error.
    """

    meta: np.ndarray
    adapt: np.ndarray
    loss: np.ndarray
    error: np.ndarray
    excess: np.ndarray
    excess_error: np.ndarray


@displayed
@dataclass(frozen=True, repr=False)
class Advice:
    """Rates and ridge for grouped data, what they gain, and how sure that is.

    Attributes:
        train_rate, adapt_rate: the rates to use, in `unit`. Where the best training rate cannot be
            told from zero, train_rate is zero, and adapt_rate and meta_ridge are the best with it.
        meta_ridge: the ridge to use.
        train_rate_interval: 95% interval of the best training rate, in `unit`; where it ends at the
            end of the grid, it may go on.
        gain: how much lower the loss of the best rates is than that of each baseline, on groups
            that did not choose. "rate zero": no inner steps in meta-training, then adapting; "equal
            rates": the same positive rate in both, the usual choice; "joint training": a ridge on
            all n_t + n_v rows, then adapting; "pooled ridge": without adapting; "ridge alone": on
            the n_r rows of the group; "mixed model": the best linear unbiased predictor,
            up to 40 coefficients.
        loss: {method: half the mean squared error on groups that did not choose}.
        unit, unit_size: "scaled" or "raw", and what one unit is in raw units.
        sizes: m, n_t, n_v, n_r.
        notes: what was left out or changed.
        fitted_loss: as `loss`, but on the groups that chose: lower by chance, and comparable with
            the curves of `table` and `plot`.
    """

    train_rate: float
    adapt_rate: float
    meta_ridge: float
    train_rate_interval: tuple[float, float]
    gain: dict[str, Difference]
    loss: dict[str, float]
    unit: str
    unit_size: float
    sizes: Sizes
    notes: tuple[str, ...]
    data: Grouped = field(repr=False)
    grid: Grid = field(repr=False)
    curves: Curves = field(repr=False)
    best: Setting = field(repr=False)
    fitted_loss: dict[str, float] = field(repr=False)
    input: tuple[Any, ...] = field(repr=False)

    @property
    def told(self) -> bool:
        """Whether a gain of the best training rate over rate zero can be told."""
        return self.gain["rate zero"].positive

    @cached_property
    def table(self):
        """Everything measured, as a labelled xarray.Dataset; save it with `to_netcdf`."""
        from negmaml.advice.table import dataset

        return dataset(self)

    @cached_property
    def theory(self):
        """What the structured theory says of these groups, and of other sizes: a `Theory`.

        Computed when asked for: its first program takes five seconds to compile.
        """
        from negmaml.advice.predicted import theory_of

        return theory_of(self)

    def report(self, *, theory: bool = False) -> str:
        """A page of plain words and one table; with what the theory says, if asked for."""
        from negmaml.advice.report import text

        return text(self, theory)

    def plot(self, *, theory: bool = False):
        """Loss over the training rate for every ridge, and over both rates: a matplotlib Figure."""
        from negmaml.advice.figure import figure

        return figure(self, theory)

    def model(self):
        """A `MetaRegressor` with these rates and this ridge, meta-trained on all groups."""
        from negmaml.advice.estimator import MetaRegressor

        x, y, groups, kernel = self.input
        return MetaRegressor(
            train_rate=self.train_rate, adapt_rate=self.adapt_rate, meta_ridge=self.meta_ridge,
            kernel=kernel, n_t=self.sizes.n_t, n_v=self.sizes.n_v, unit=self.unit,
            fit_intercept=self.data.intercept, standardise=bool(np.any(self.data.scales[1] != 1)),
        ).fit(x, y, groups)  # fmt: skip

    def _summary(self) -> Table:
        low, high = self.train_rate_interval
        rows = [
            ("train_rate", f"{self.train_rate:.3g}", f"best in [{low:.2g}, {high:.2g}] (95%)"),
            ("adapt_rate", f"{self.adapt_rate:.3g}", f"unit: {self.unit}"),
            ("meta_ridge", f"{self.meta_ridge:.3g}", ""),
        ]
        for name, gain in self.gain.items():
            words = f"[{gain.low:.3g}, {gain.high:.3g}]" + ("" if gain.told else " cannot be told")
            rows.append((f"gain over {name}", f"{gain.value:.3g}", words))
        return Table(f"Advice for {self.data.groups} groups", rows)


def summarise(
    data: Grouped,
    sizes: Sizes,
    grid: Grid,
    unit: str,
    unit_size: float,
    splits: Splits,
    measured: Measured,
    replicated: Measured,
    each: int,
    notes: tuple[str, ...],
    given: tuple[Any, ...],
) -> Advice:
    """The advice that the losses of cross-validation and of a bootstrap come to."""
    count, groups = len(splits.fold), data.groups
    meta = measured.meta.mean(0)[ALL]
    pooled = measured.pooled.mean(0)[ALL]
    chosen = choice.settings(meta, pooled, grid)
    curves = _curves(meta, grid, chosen["advised"], _by_replicate(replicated.meta, each), count)
    loss = choice.nested(measured, splits, grid)
    repeated = _family_losses(chosen, measured, replicated, each)
    fitted = {n: float(v) for n, v in choice.losses_of(chosen, meta, pooled).items()}
    fitted |= {n: float(np.min(v.mean(0)[ALL])) for n, v in measured.others.items()}
    gain = {}
    for name in (name for name in repeated if name != "advised"):
        value = loss[name] - loss["advised"]
        error = float(choice.standard_error(repeated[name] - repeated["advised"], count))
        if chosen.get(name) == chosen["advised"] and name not in choice.POOLED:
            error = max(error, abs(value))  # the same on all groups: folds differed by chance
        gain[name] = choice.difference(value, error, loss[name], groups)
    profile = np.argmin(curves.loss, 1)
    at = (np.arange(len(grid.rates)), profile)
    low, high = choice.rates_not_worse(
        grid.rates, curves.excess[at], curves.excess_error[at], groups
    )
    zero = gain["rate zero"]
    use = chosen["advised"] if zero.positive else chosen["rate zero"]
    return Advice(
        float(grid.rates[use.rate] / unit_size), use.adapt / unit_size,
        float(grid.ridges[use.ridge]), (low / unit_size, high / unit_size), gain, loss, unit,
        unit_size, sizes, notes, data, grid, curves, chosen["advised"], fitted, given,
    )  # fmt: skip


def _by_replicate(values, each: int):
    """(B, each, ...) of the single mean over held-out groups of each split."""
    values = values[:, 0]
    return values.reshape(-1, each, *values.shape[1:])


def _curves(meta, grid: Grid, best: Setting, again, splits: int) -> Curves:
    adapt, loss = choice.best_adapt(meta, grid)
    c0, c1, c2 = np.moveaxis(again, 2, 0)
    repeated = (c0 - 2 * adapt * c1 + adapt**2 * c2) / 2
    there = (..., best.rate, best.ridge)
    difference = repeated - repeated[there][..., None, None]
    return Curves(
        meta, adapt, loss, choice.standard_error(repeated, splits),
        loss - loss[there], choice.standard_error(difference, splits),
    )  # fmt: skip


def _family_losses(chosen, measured: Measured, replicated: Measured, each: int):
    """The losses of every method in the bootstrap, (B, each), at what it chose on all groups."""
    arrays = (_by_replicate(a, each) for a in (replicated.meta, replicated.pooled))
    found = choice.losses_of(chosen, *arrays)
    for name, values in replicated.others.items():
        again = _by_replicate(values, each)
        if again.ndim == 3:
            again = again[..., int(np.argmin(measured.others[name].mean(0)[ALL]))]
        found[name] = again
    return found
