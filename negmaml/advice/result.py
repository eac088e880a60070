"""The result of `advise`, and its computation from the losses of all splits."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from negmaml._core.checks import check_choice, check_flag
from negmaml._core.deprecation import renamed_attribute
from negmaml._core.display import Table, add_table_repr
from negmaml.advice import selection
from negmaml.advice.baselines import mixed_structures
from negmaml.advice.cv import CVLosses
from negmaml.advice.data import GroupedRows
from negmaml.advice.evaluation import Sizes, per_group_ridges
from negmaml.advice.methods import JOINT, META, MIXED, POOLED, SINGLE, ZERO
from negmaml.advice.selection import ALL, ByMethod, Difference, Evidence, RateChoice, RateGrid
from negmaml.advice.splits import Splits

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure


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
    """The method to use on grouped data, its gains over others, and settings of all methods.

    The methods are a pooled ridge, a per-group ridge, joint training, a mixed model and
    meta-learning; the last one also with a zero inner rate, and with a shared rate. `report`
    explains them.

    Attributes:
        recommended: the method to use: the simplest one whose loss exceeds the least by 0.5% or
            less. From the simplest, they are ordered as above.
        gain: {method: how much lower the loss of the recommended method is}, with 95% intervals,
            on groups that chose no settings. It is 0 for the recommended method itself.
        loss: {method: half the mean squared error on groups that chose no settings}.
        train_rate, adapt_rate: the rates of meta-learning, in `unit`. If the best training rate is
            not significantly better than zero, train_rate is zero, and adapt_rate and meta_ridge
            are the best with it.
        meta_ridge: the ridge of meta-learning.
        train_rate_interval: 95% interval of the best training rate, in `unit`; an end at the end
            of the grid may lie further out.
        unit, unit_size: "scaled" or "raw", and the raw rate of one unit.
        sizes: m, n_t, n_v, n_r.
        notes: sentences on the rows and columns that were dropped or changed.
        target: the name of the target, if it has one.
        fitted_loss: as `loss`, but on all groups, those that chose included. It is biased low, and
            comparable with the curves of `table` and `plot`.
        data, grid, curves, chosen, evidence, input: the rows, the rates that were tried, the
            losses, the choices and the arguments, which the methods below read.

    >>> import jax, negmaml as nm
    >>> random = np.random.default_rng(0)
    >>> groups, x = np.repeat(np.arange(40), 12), random.normal(size=(480, 3))
    >>> y = np.sum(x * (1 + random.normal(size=(40, 3)))[groups], 1) + random.normal(size=480)
    >>> advice = nm.advise(x, y, groups, n_r=6, key=jax.random.key(0))
    >>> advice.recommended, advice.gain["pooled ridge"].significantly_better
    ('mixed model', True)
    >>> advice.report().splitlines()[0]
    'Advice for 40 groups'
    """

    recommended: str
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
    target: str
    data: GroupedRows = field(repr=False)
    grid: RateGrid = field(repr=False)
    curves: LossCurves = field(repr=False)
    chosen: dict[str, RateChoice] = field(repr=False)
    evidence: Evidence = field(repr=False)
    fitted_loss: dict[str, float] = field(repr=False)
    input: tuple[Any, ...] = field(repr=False)

    told: ClassVar[Any] = renamed_attribute("Advice.told", "significantly_better")

    @property
    def best(self) -> RateChoice:
        """The best choice of meta-learning on all groups."""
        return self.chosen[META]

    def settings(self, method: str | None = None) -> dict[str, Any]:
        """The rates, ridge or structure of a method, chosen on all groups; None: the recommended.

        These are arguments of its model. Rates are in `unit`.
        """
        method = self._checked(method)
        choice, size = self.chosen[method], self.unit_size
        ridge = float(self.grid.ridges[choice.ridge % len(self.grid.ridges)])
        if method == MIXED:
            return {"structure": mixed_structures(self.data.intercept)[choice.ridge]}
        if method == SINGLE:
            return {"ridge": float(per_group_ridges(self.grid, self.sizes)[choice.ridge])}
        if method == POOLED:
            return {"ridge": ridge}
        if method == JOINT:
            return {"ridge": ridge, "adapt_rate": choice.adapt / size}
        if method == META:  # at rate zero, unless another one is significantly better
            return {"train_rate": self.train_rate, "adapt_rate": self.adapt_rate,
                    "meta_ridge": self.meta_ridge}  # fmt: skip
        rate = float(self.grid.rates[choice.rate]) / size
        return {"train_rate": rate, "adapt_rate": choice.adapt / size, "meta_ridge": ridge}

    def _checked(self, method: str | None) -> str:
        if method is None:
            return self.recommended
        check_choice("method", method, tuple(self.loss))
        return method

    @property
    def significantly_better(self) -> bool:
        """True if the best training rate is significantly better than a zero rate."""
        return self.compare(META, ZERO).significantly_better

    def compare(self, method: str, other: str) -> Difference:
        """How much lower the loss of `method` is than that of `other`, with its 95% interval."""
        for name, value in (("method", method), ("other", other)):
            check_choice(name, value, tuple(self.loss))
        return self.evidence.difference(method, other)

    @cached_property
    def table(self) -> "xarray.Dataset":
        """All losses and gains as a labelled xarray.Dataset; save it with `to_netcdf`."""
        from negmaml.advice.table import dataset

        return dataset(self)

    @cached_property
    def theory(self) -> Any:
        """Predictions of the theory for these groups and for other sizes: a `Theory`.

        Computed at the first access, since its first program takes five seconds to compile.
        """
        from negmaml.advice.predicted import theory_of

        return theory_of(self)

    @property
    def target_scale(self) -> float | None:
        """The unit of a standardised target in its own units; None for several such targets."""
        scale = self.data.scales[3]
        if len(scale) > 1 and np.any(scale != 1):
            return None
        return float(scale[0])

    @property
    def rmse(self) -> dict[str, float]:
        """The root mean squared error of every method, in units of the target.

        Several targets are averaged over. If they were standardised, the unit is their deviation.
        """
        scale = self.target_scale or 1.0
        return ByMethod({name: scale * (2 * loss) ** 0.5 for name, loss in self.loss.items()})

    @property
    def rmse_gain(self) -> dict[str, Difference]:
        """`gain` in units of the target: how much lower the RMSE is than that of each method.

        The interval is that of `gain`, from a - b = (a^2 - b^2) / (a + b) at the estimated RMSEs.
        """
        scale = self.target_scale or 1.0
        return ByMethod(
            {
                name: _rmse_difference(g, self.rmse[name], self.rmse[self.recommended], scale)
                for name, g in self.gain.items()
            }
        )

    @property
    def explained_variance(self) -> dict[str, float]:
        """1 - MSE / Var y of every method, with the variance over rows around the mean of groups.

        All groups have the same weight, as in the loss.
        """
        y, counts = self.data.y, self.data.counts
        weights = np.repeat(1 / (counts * len(counts)), counts)[:, None]
        variance = float(np.mean(np.sum(weights * (y - np.sum(weights * y, 0)) ** 2, 0)))
        return ByMethod({name: 1 - 2 * loss / variance for name, loss in self.loss.items()})

    @cached_property
    def cost_of_less(self) -> dict[str, float]:
        """Relative increase of the recommended method's loss with half of the data.

        {"half of the training groups": ..., "half of their rows": ..., "half of the rows to adapt
        on": ...}, each with rates and ridge of its own; sizes of 1 are not halved.
        """
        from negmaml.advice.less import cost_of_less

        return cost_of_less(self)

    def report(self, *, theory: bool = False, format: str = "text") -> str:
        """Return a report that begins with the method to use.

        Arguments:
            theory: add the predictions of the theory of meta-learning.
            format: "text", "markdown" or "html".
        """
        from negmaml.advice.document import FORMATS
        from negmaml.advice.report import report

        check_choice("format", format, FORMATS)
        return report(self, check_flag("theory", theory), format)

    def plot(self, *, theory: bool = False) -> "Figure":
        """Plot the methods, and the loss of meta-learning over its rates; a matplotlib Figure."""
        from negmaml.advice.figure import figure

        return figure(self, check_flag("theory", theory))

    def model(self, method: str | None = None) -> Any:
        """Return the model of a method, fitted to all groups; None: the recommended method.

        All models have the conventions of scikit-learn, `predict(X, groups)`, and `adapt(X, y)`,
        which returns a predictor for a new group.

        Raises ValueError for a method that is not in `loss`.
        """
        # Imported here, since scikit-learn is an optional dependency.
        from negmaml.advice.models import model_of

        return model_of(self, self._checked(method))

    def _summary(self) -> Table:
        low, high = self.train_rate_interval
        rows = [
            ("recommended", self.recommended, f"RMSE {self.rmse[self.recommended]:.4g}"),
            ("train_rate", f"{self.train_rate:.3g}", f"best in [{low:.2g}, {high:.2g}] (95%)"),
            ("adapt_rate", f"{self.adapt_rate:.3g}", f"unit: {self.unit}"),
            ("meta_ridge", f"{self.meta_ridge:.3g}", ""),
        ]
        for name, gain in self.gain.items():
            if name == self.recommended:
                continue
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
    mean = losses.map(lambda a: a.mean(0)[ALL])
    # All groups choose the rates to use. Only their reported loss needs the nested choice.
    chosen = ByMethod(selection.best_choices(mean, grid))
    repeated = replicated.map(lambda a: _by_replicate(a, each))
    curves = _loss_curves(mean.meta, grid, chosen[META], repeated.meta, count)
    evidence = selection.collect_evidence(losses, splits, grid, chosen, repeated)
    recommended = selection.decide(evidence)
    # The profile over ridges: the interval of the rate takes the best ridge at every rate.
    at = (np.arange(len(grid.rates)), np.argmin(curves.loss, 1))
    low, high = selection.best_rate_interval(
        grid.rates, curves.excess[at], curves.excess_error[at], groups
    )
    # A zero rate is the null hypothesis: another one is advised only if it is significant.
    use = chosen[META if evidence.difference(META, ZERO).significantly_better else ZERO]
    return Advice(
        recommended=recommended,
        train_rate=float(grid.rates[use.rate] / unit_size),
        adapt_rate=use.adapt / unit_size,
        meta_ridge=float(grid.ridges[use.ridge]),
        train_rate_interval=(low / unit_size, high / unit_size),
        gain=ByMethod({name: evidence.difference(recommended, name) for name in chosen}),
        loss=ByMethod({name: float(values.mean()) for name, values in evidence.nested.items()}),
        unit=unit,
        unit_size=unit_size,
        sizes=sizes,
        notes=data.notes,
        target=_target_name(given[1]),
        data=data,
        grid=grid,
        curves=curves,
        chosen=chosen,
        evidence=evidence,
        fitted_loss=ByMethod(
            {name: float(value) for name, value in selection.losses_of(chosen, mean).items()}
        ),
        input=given,
    )


def _target_name(y) -> str:
    """The name of the target where it has one, as a pandas Series has."""
    name = getattr(y, "name", None)
    return name if isinstance(name, str) else "the target"


def _rmse_difference(gain: Difference, other: float, best: float, scale: float) -> Difference:
    """A difference of losses as one of RMSEs: a - b = (a^2 - b^2) / (a + b)."""
    # With one of the RMSEs fixed, the interval could contain differences larger than the other.
    each = 2 * scale**2 / (other + best)
    value = each * gain.value
    return Difference(value, each * gain.error, each * gain.low, each * gain.high, value / other)


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
