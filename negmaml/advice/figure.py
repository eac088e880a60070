"""Plots an `Advice`: all methods, and the loss of meta-learning over its rates."""

import numpy as np

from negmaml._core import plotting
from negmaml._core.plotting import INK, POINT, SERIES, ZERO, number
from negmaml.advice.methods import META, SHARED
from negmaml.advice.methods import ZERO as ZERO_RATE

CURVE, *COLORS = SERIES
BASELINES = dict(zip(
    ("joint training", "shared rate", "pooled ridge", "per-group ridge", "mixed model"),
    (*COLORS, INK), strict=True,
))  # fmt: skip


def figure(advice, theory: bool):
    """Plot the three panels; returns a matplotlib Figure."""
    with plotting.style("advice"):
        drawn, axes = plotting.panels(2, 2, 8.0)
        # The first panel has names of methods, and takes a row of its own.
        grid = axes[0, 0].get_gridspec()
        for axis in axes[0]:
            axis.remove()
        first = drawn.add_subplot(grid[0, :])
        _methods(first, advice)
        _curves(axes[1, 0], advice, theory)
        _surface(drawn, axes[1, 1], advice)
        first.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=3)
        plotting.share_legend(drawn, 4, list(axes[1]))
    return drawn


def _methods(axis, advice) -> None:
    """Plot the RMSE of every method, the best one on top."""
    names = sorted(advice.rmse, key=advice.rmse.__getitem__, reverse=True)
    reference, best = advice.rmse[advice.recommended], names.index(advice.recommended)
    rmse, heights = np.array([advice.rmse[name] for name in names]), np.arange(len(names))
    ends = np.array([(advice.rmse_gain[name].low, advice.rmse_gain[name].high) for name in names])
    axis.hlines(heights, *(reference + ends.T), color=ZERO, lw=2.5,
                label="95% interval of the difference")  # fmt: skip
    axis.plot(rmse, heights, "o", color=INK, ms=5, label="RMSE")
    axis.plot(
        reference,
        best,
        "D",
        ls=":",
        lw=0.8,
        color=CURVE,
        ms=6,
        label="RMSE of the recommended method",
    )
    axis.axvline(reference, color=CURVE, lw=0.8, ls=":")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylabel("method")
    unit = " (standard deviations)" if advice.target_scale is None else ""
    axis.set_xlabel(plotting.literal(f"RMSE of {advice.target} on held-out groups{unit}"))
    rows = f"{advice.sizes.n_r} rows of a held-out group"
    plotting.set_finding(
        axis,
        f"(a) Recommended: {advice.recommended}, RMSE {number(reference)} after adapting to {rows}",
        100,
    )


def _curves(axis, advice, theory: bool) -> None:
    """Plot the loss over the training rate for each ridge."""
    from matplotlib import colormaps

    rates, curves = advice.grid.rates / advice.unit_size, advice.curves
    ridges = len(advice.grid.ridges)
    others = [i for i in range(ridges) if i != advice.best.ridge]
    for i in others:
        label = "other ridges" if i == others[0] else None
        color = colormaps["Greys"](0.25 + 0.4 * i / ridges)
        axis.plot(rates, curves.loss[:, i], color=color, lw=0.8, zorder=2, label=label)
    best = curves.loss[:, advice.best.ridge]
    band = 2 * curves.excess_error[:, advice.best.ridge]
    axis.plot(rates, best, color=CURVE, zorder=3, label=f"{META}, best ridge")
    axis.fill_between(rates, best - band, best + band, color=CURVE, alpha=0.2, lw=0, zorder=1,
                      label="± 2 standard errors")  # fmt: skip
    # The axis shows the best nine tenths of the best curve; diverging rates would hide the rest.
    lowest = curves.loss.min()
    top = lowest + 1.15 * (np.quantile(best, 0.9) - lowest)
    # Baselines above the axis would stretch it.
    visible = {n: v for n, v in advice.fitted_loss.items() if n in BASELINES and v <= top}
    bottom = min([lowest, *visible.values()])
    for name, value in visible.items():
        axis.axhline(value, color=BASELINES[name], ls="--", lw=1, label=name)
    if theory:
        axis.plot(rates, advice.theory.loss, color=INK, ls=":", label="theory", zorder=4)
    (low, high), rate = advice.train_rate_interval, advice.train_rate
    sign = plotting.sign_color(rate)
    axis.axvspan(low, high, color=sign, alpha=0.12, lw=0, label="95% interval of the best rate")
    axis.axvline(rate, color=sign, lw=1, label=f"rate to use, {number(rate)}")
    axis.set_ylim(bottom - 0.08 * (top - bottom), top)
    axis.set_xlabel(rf"training rate $\alpha_t$ ({advice.unit})")
    axis.set_ylabel("loss at the best adaptation rate")
    above = len(BASELINES.keys() & advice.fitted_loss.keys()) - len(visible)
    hidden = f"; {above} methods lie above the axis" if above else ""
    interval = f"{number(low)} to {number(high)}"
    plotting.set_finding(
        axis, f"(b) Best training rate of meta-learning: {number(rate)} ({interval}){hidden}"
    )


def _surface(drawn, axis, advice) -> None:
    """Plot the loss over both rates at the best ridge."""
    table = advice.table["loss"].isel(meta_ridge=advice.best.ridge)
    x, y, z = table["train_rate"].values, table["adapt_rate"].values, table.values.T
    if len(y) > 1 and len(x) > 1:  # contours need two values on each axis
        level = np.minimum(z, np.quantile(z, 0.85))  # diverging corners would hide the valley
        mesh = axis.contourf(x, y, level, levels=24, cmap="viridis_r")
        bar = drawn.colorbar(mesh, ax=axis, format="%.4g")
        bar.set_label("loss, cut at its 85% quantile")
    adapt = advice.curves.adapt[:, advice.best.ridge] / advice.unit_size
    inside = (adapt >= y.min()) & (adapt <= y.max())
    axis.plot(x[inside], adapt[inside], color=INK, ls=":",
              label="best adaptation rate")  # fmt: skip
    color = plotting.sign_color(advice.train_rate)
    axis.plot(advice.train_rate, advice.adapt_rate, "D", color=color, mec="white", ms=2 * POINT,
              zorder=3, label="rates to use")  # fmt: skip
    axis.plot(y, y, color=BASELINES[SHARED], lw=1, label="equal rates")
    axis.axvline(0, color=INK, lw=1, ls="--", label=ZERO_RATE)
    axis.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()))
    axis.set_xlabel(rf"training rate $\alpha_t$ ({advice.unit})")
    axis.set_ylabel(rf"adaptation rate $\alpha_r$ ({advice.unit})")
    plotting.set_finding(
        axis, f"(c) Best adaptation rate: {number(advice.adapt_rate)}\nat the best ridge"
    )
