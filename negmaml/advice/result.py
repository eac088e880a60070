"""The result of `advise`, and its computation from the losses of all splits."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from negmaml._core.deprecation import renamed_attribute
from negmaml._core.display import Table, add_table_repr
from negmaml.advice import selection
from negmaml.advice.cv import CVLosses
from negmaml.advice.data import GroupedRows
from negmaml.advice.selection import ALL, ByMethod, Difference, RateChoice, RateGrid
from negmaml.advice.splits import Splits


class Sizes(NamedTuple):
    """Number of training groups m; support, query and adaptation rows of a group."""

    m: int
    n_t: int
    n_v: int
    n_r: int


class LossCurves(NamedTuple):
    """Losses at every training rate and ridge, with rates in raw units.

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


@add_table_repr
@dataclass(frozen=True, repr=False)
class Advice:
    """Rates and ridge for grouped data, their gains over other methods, and confidence intervals.

    Attributes:
        train_rate, adapt_rate: the rates to use, in `unit`. If the best training rate is not
            significantly better than zero, train_rate is zero, and adapt_rate and meta_ridge are
            the best with it.
        meta_ridge: the ridge to use.
        train_rate_interval: 95% interval of the best training rate, in `unit`; an end at the end
            of the grid may lie further out.
        gain: how much lower the loss of the best rates is than that of each baseline, on groups
            that did not choose. The baselines: "zero inner rate", no inner steps in meta-training,
            then adapting; "shared rate", the same positive rate in both, the usual choice; "joint
            training", a ridge on all n_t + n_v rows, then adapting; "pooled ridge", the same
            without adapting; "per-group ridge", a ridge on the n_r rows of the group; "mixed
            model", the best linear unbiased predictor, for up to 40 coefficients.
        loss: {method: half the mean squared error on groups that did not choose}.
        unit, unit_size: "scaled" or "raw", and the raw rate of one unit.
        sizes: m, n_t, n_v, n_r.
        notes: sentences on the rows and columns that were dropped or changed.
        fitted_loss: as `loss`, but on all groups, those that chose included. It is biased low, and
            comparable with the curves of `table` and `plot`.
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
    data: GroupedRows = field(repr=False)
    grid: RateGrid = field(repr=False)
    curves: LossCurves = field(repr=False)
    best: RateChoice = field(repr=False)
    fitted_loss: dict[str, float] = field(repr=False)
    input: tuple[Any, ...] = field(repr=False)

    told = renamed_attribute("Advice.told", "significantly_better")

    @property
    def significantly_better(self) -> bool:
        """True if the best training rate is significantly better than a zero rate."""
        return self.gain["zero inner rate"].significantly_better

    @cached_property
    def table(self):
        """All losses and gains as a labelled xarray.Dataset; save it with `to_netcdf`."""
        from negmaml.advice.table import dataset

        return dataset(self)

    @cached_property
    def theory(self):
        """Predictions of the theory for these groups and for other sizes: a `Theory`.

        Computed at the first access, since its first program takes five seconds to compile.
        """
        from negmaml.advice.predicted import theory_of

        return theory_of(self)

    def report(self, *, theory: bool = False) -> str:
        """Return a page of text with one table; `theory` adds the predictions of the theory."""
        from negmaml.advice.report import text

        return text(self, theory)

    def plot(self, *, theory: bool = False):
        """Plot the loss over the training rate and over both rates; returns a matplotlib Figure."""
        from negmaml.advice.figure import figure

        return figure(self, theory)

    def model(self):
        """Return a `MetaRegressor` with these rates and this ridge, meta-trained on all groups."""
        # Imported here, since scikit-learn is an optional dependency.
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
            note = "" if gain.significant else " not significant"
            interval = f"[{gain.low:.3g}, {gain.high:.3g}]{note}"
            rows.append((f"gain over {name}", f"{gain.value:.3g}", interval))
        return Table(f"Advice for {self.data.groups} groups", rows)


def summarise(
    data: GroupedRows,
    sizes: Sizes,
    grid: RateGrid,
    unit: str,
    unit_size: float,
    splits: Splits,
    losses: CVLosses,
    replicated: CVLosses,
    each: int,
    given: tuple[Any, ...],
) -> Advice:
    """Compute the advice from the losses of cross-validation and of a bootstrap.

    Arguments:
        losses: those of `splits`, from cross-validation.
        replicated: those of bootstrap replicates, `each` splits a replicate.
        given: x, y, groups and kernel as the user passed them.
    """
    count, groups = len(splits.fold), data.groups
    meta, pooled = losses.meta.mean(0)[ALL], losses.pooled.mean(0)[ALL]
    # All groups choose the rates to use. Only their reported loss needs the nested choice.
    chosen = selection.best_choices(meta, pooled, grid)
    best = chosen["advised"]
    curves = _loss_curves(meta, grid, best, _by_replicate(replicated.meta, each), count)
    loss = ByMethod(selection.nested_losses(losses, splits, grid))
    # The bootstrap keeps this choice, so its errors are those of the loss at given rates.
    repeated = _replicated_losses(chosen, losses, replicated, each)
    fitted = ByMethod(
        {n: float(v) for n, v in selection.losses_of(chosen, meta, pooled).items()}
        | {n: float(np.min(v.mean(0)[ALL])) for n, v in losses.others.items()}
    )
    gain = ByMethod()
    for name in (name for name in repeated if name != "advised"):
        value = loss[name] - loss["advised"]
        error = float(selection.bootstrap_error(repeated[name] - repeated["advised"], count))
        if chosen.get(name) == best and name not in selection.POOLED:
            # The same choice on all groups: only the folds chose differently, by chance.
            error = max(error, abs(value))
        gain[name] = selection.with_interval(value, error, loss[name], groups)
    # The profile over ridges: the interval of the rate takes the best ridge at every rate.
    at = (np.arange(len(grid.rates)), np.argmin(curves.loss, 1))
    low, high = selection.best_rate_interval(
        grid.rates, curves.excess[at], curves.excess_error[at], groups
    )
    zero = "zero inner rate"
    # A zero rate is the null hypothesis: another one is advised only if it is significant.
    use = best if gain[zero].significantly_better else chosen[zero]
    return Advice(
        float(grid.rates[use.rate] / unit_size), use.adapt / unit_size,
        float(grid.ridges[use.ridge]), (low / unit_size, high / unit_size), gain, loss, unit,
        unit_size, sizes, data.notes, data, grid, curves, best, fitted, given,
    )  # fmt: skip


def _by_replicate(values, each: int):
    """Reshape (B each, 1, ...) to (B, each, ...): a bootstrap has one mean over held-out groups."""
    return values[:, 0].reshape(-1, each, *values.shape[2:])


def _loss_curves(meta, grid: RateGrid, best: RateChoice, replicates, splits: int) -> LossCurves:
    """Losses and excess losses with standard errors, each at its own best adaptation rate."""
    adapt, loss = selection.best_adapt_rate(meta, grid)
    repeated = selection.half_quadratic(np.moveaxis(replicates, 2, 0), adapt)
    at_best = (..., best.rate, best.ridge)
    # Paired: all rates share the groups of a replicate, whose scatter cancels in differences.
    difference = repeated - repeated[at_best][..., None, None]
    return LossCurves(
        meta, adapt, loss, selection.bootstrap_error(repeated, splits),
        loss - loss[at_best], selection.bootstrap_error(difference, splits),
    )  # fmt: skip


def _replicated_losses(chosen, losses: CVLosses, replicated: CVLosses, each: int):
    """The losses of every method in the bootstrap, (B, each), at its choice on all groups."""
    arrays = (_by_replicate(a, each) for a in (replicated.meta, replicated.pooled))
    found = selection.losses_of(chosen, *arrays)
    for name, values in replicated.others.items():
        values = _by_replicate(values, each)
        if values.ndim == 3:  # over ridges
            values = values[..., int(np.argmin(losses.others[name].mean(0)[ALL]))]
        found[name] = values
    return found
