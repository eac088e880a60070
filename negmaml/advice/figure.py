"""Plots an `Advice`: all methods, and the loss of meta-learning over its rates."""

import textwrap

import numpy as np

from negmaml._core.extras import require
from negmaml.advice.methods import META, SHARED, ZERO

INK, CURVE, MARK, GOOD = "#222222", "#2a6f97", "#6c757d", "#d1495b"
BASELINES = {"shared rate": "#d1495b", "joint training": "#e09f3e", "pooled ridge": "#8d6a9f",
             "per-group ridge": "#b08968", "mixed model": "#4f772d"}  # fmt: skip
# Text stays text, and a fixed salt makes equal figures equal files.
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
         "axes.edgecolor": INK, "svg.fonttype": "none", "svg.hashsalt": "negmaml"}  # fmt: skip
CAPTION_WIDTH = 52  # characters


def figure(advice, theory: bool):
    """Plot the three panels; returns a matplotlib Figure."""
    matplotlib = require("matplotlib", "advice")
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(12.4, 5.2), dpi=150)
        axes = drawn.subplots(1, 3)
        drawn.subplots_adjust(0.1, 0.4, 0.95, 0.94, 0.32)
        captions = (
            _methods(axes[0], advice),
            _curves(axes[1], advice, theory),
            _surface(drawn, axes[2], advice),
        )
        for axis, caption in zip(axes, captions, strict=True):
            axis.legend(
                frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(-0.02, -0.17), ncols=2,
            )  # fmt: skip
            text = "\n".join(textwrap.wrap(caption, CAPTION_WIDTH))
            axis.text(0, -0.5, text, transform=axis.transAxes, fontsize=7.5, va="top")
    return drawn


def _methods(axis, advice) -> str:
    """Plot the RMSE of every method, from the best; returns the caption."""
    names = sorted(advice.rmse, key=advice.rmse.__getitem__, reverse=True)
    reference, best = advice.rmse[advice.recommended], names.index(advice.recommended)
    rmse, heights = np.array([advice.rmse[name] for name in names]), np.arange(len(names))
    ends = np.array([(advice.rmse_gain[name].low, advice.rmse_gain[name].high) for name in names])
    axis.hlines(heights, *(reference + ends.T), color=MARK, lw=2.5,
                label="95% interval of the difference")  # fmt: skip
    axis.plot(rmse, heights, "o", color=INK, ms=5, label="RMSE")
    axis.plot(reference, best, "o", color=GOOD, ms=5, label="RMSE, recommended")
    axis.axvline(reference, color=GOOD, lw=0.8, ls=":")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylabel("method")
    unit = " (standard deviations)" if advice.target_scale is None else ""
    axis.set_xlabel(f"RMSE of {advice.target} on held-out groups{unit}")
    return (
        f"(a) Root mean squared error after adapting to {advice.sizes.n_r} rows of a held-out "
        f"group; {advice.recommended} is recommended. Intervals are those of the difference from "
        "it."
    )


def _curves(axis, advice, theory: bool) -> str:
    """Plot the loss over the training rate for each ridge; returns the caption."""
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
    axis.plot(rates, best, color=CURVE, lw=1.8, zorder=3, label=f"{META}, best ridge")
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
        axis.plot(rates, advice.theory.loss, color=INK, ls=":", lw=1.6, label="theory", zorder=4)
    low, high = advice.train_rate_interval
    axis.axvspan(low, high, color=MARK, alpha=0.12, lw=0, label="95% interval of the best rate")
    axis.axvline(advice.train_rate, color=MARK, lw=1, label=f"rate to use, {advice.train_rate:.3g}")
    axis.set_ylim(bottom - 0.08 * (top - bottom), top)
    axis.set_xlabel(rf"training rate $\alpha_t$ ({advice.unit})")
    axis.set_ylabel("half the mean squared error")
    return (
        "(b) Loss of meta-learning at the best adaptation rate, one curve per ridge, and of other "
        "methods (dashed), on all held-out groups. Methods above the axis are not shown."
    )


def _surface(drawn, axis, advice) -> str:
    """Plot the loss over both rates at the best ridge; returns the caption."""
    table = advice.table["loss"].isel(meta_ridge=advice.best.ridge)
    x, y, z = table["train_rate"].values, table["adapt_rate"].values, table.values.T
    if len(y) > 1 and len(x) > 1:  # contours need two values on each axis
        level = np.minimum(z, np.quantile(z, 0.85))  # diverging corners would hide the valley
        mesh = axis.contourf(x, y, level, levels=24, cmap="viridis_r")
        bar = drawn.colorbar(mesh, ax=axis, format="%.4g")
        bar.set_label("half the mean squared error, cut at its 85% quantile", fontsize=7)
    adapt = advice.curves.adapt[:, advice.best.ridge] / advice.unit_size
    inside = (adapt >= y.min()) & (adapt <= y.max())
    axis.plot(x[inside], adapt[inside], color="#f4a261", lw=1.4, ls=":",
              label="best adaptation rate")  # fmt: skip
    axis.plot(advice.train_rate, advice.adapt_rate, "o", color="white", mec=INK, ms=6, ls="none",
              label="rates to use")  # fmt: skip
    axis.plot(y, y, color=GOOD, lw=0.9, label=SHARED)
    axis.axvline(0, color=INK, lw=0.7, ls="--", label=ZERO)
    axis.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()))
    axis.set_xlabel(rf"training rate $\alpha_t$ ({advice.unit})")
    axis.set_ylabel(rf"adaptation rate $\alpha_r$ ({advice.unit})")
    return "(c) Loss of meta-learning over both rates at the best ridge, on all held-out groups."
