"""Plots the losses of an `Advice`: over the training rate, and over both rates."""

import numpy as np

from negmaml._core.extras import require

INK, CURVE, MARK = "#222222", "#2a6f97", "#6c757d"
BASELINES = {"shared rate": "#d1495b", "joint training": "#e09f3e", "pooled ridge": "#8d6a9f",
             "per-group ridge": "#b08968",
             "mixed model": "#4f772d"}  # fmt: skip
# Text stays text, and a fixed salt makes equal figures equal files.
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
         "axes.edgecolor": INK, "svg.fonttype": "none", "svg.hashsalt": "negmaml"}  # fmt: skip


def figure(advice, theory: bool):
    """Plot both panels; returns a matplotlib Figure."""
    matplotlib = require("matplotlib", "advice")
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(8.4, 3.5), dpi=160)
        left, right = drawn.subplots(1, 2)
        drawn.subplots_adjust(0.08, 0.14, 0.97, 0.9, 0.3)
        _curves(left, advice, theory)
        _surface(drawn, right, advice)
    return drawn


def _curves(axis, advice, theory: bool) -> None:
    """Plot a curve for each ridge, with a band for the best, and lines for the baselines."""
    from matplotlib import colormaps

    rates, curves = advice.grid.rates / advice.unit_size, advice.curves
    ridges = len(advice.grid.ridges)
    for i in range(ridges):
        best = i == advice.best.ridge
        color = CURVE if best else colormaps["Greys"](0.25 + 0.4 * i / ridges)
        axis.plot(rates, curves.loss[:, i], color=color, lw=1.8 if best else 0.8, zorder=2 + best)
        if best:
            low, high = (curves.loss[:, i] + s * 2 * curves.excess_error[:, i] for s in (-1, 1))
            axis.fill_between(rates, low, high, color=color, alpha=0.2, lw=0, zorder=1)
    # The axis shows the best nine tenths of the best curve; diverging rates would hide the rest.
    lowest = curves.loss.min()
    top = lowest + 1.15 * (np.quantile(curves.loss[:, advice.best.ridge], 0.9) - lowest)
    # Baselines above the axis would stretch it.
    visible = {n: v for n, v in advice.fitted_loss.items() if n in BASELINES and v <= top}
    bottom = min([lowest, *visible.values()])
    for name, value in visible.items():
        axis.axhline(value, color=BASELINES[name], ls="--", lw=1, label=name)
    if theory:
        axis.plot(rates, advice.theory.loss, color=INK, ls=":", lw=1.6, label="theory", zorder=4)
    low, high = advice.train_rate_interval
    axis.axvspan(low, high, color=MARK, alpha=0.12, lw=0)
    axis.axvline(advice.train_rate, color=MARK, lw=1, label=f"advised {advice.train_rate:.3g}")
    axis.set_ylim(bottom - 0.08 * (top - bottom), top)
    axis.set_xlabel(rf"training rate $\alpha_t$ ({advice.unit})")
    axis.set_ylabel("loss on held-out groups")
    axis.set_title("one curve per ridge, the best in colour", loc="left", fontsize=8, color=MARK)
    axis.legend(frameon=False, fontsize=7)


def _surface(drawn, axis, advice) -> None:
    """Plot the loss over both rates at the best ridge."""
    table = advice.table["loss"].isel(meta_ridge=advice.best.ridge)
    x, y, z = table["train_rate"].values, table["adapt_rate"].values, table.values.T
    if len(y) > 1 and len(x) > 1:  # contours need two values on each axis
        level = np.minimum(z, np.quantile(z, 0.85))  # diverging corners would hide the valley
        mesh = axis.contourf(x, y, level, levels=24, cmap="viridis_r")
        drawn.colorbar(mesh, ax=axis, format="%.4g")
    best = advice.best
    adapt = advice.curves.adapt[:, best.ridge] / advice.unit_size
    inside = (adapt >= y.min()) & (adapt <= y.max())
    axis.plot(x[inside], adapt[inside], color="white", lw=1, ls=":")
    axis.plot(advice.train_rate, advice.adapt_rate, "o", color="white", mec=INK, ms=6)
    axis.plot(y, y, color="white", lw=0.8)
    axis.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()))
    axis.set_xlabel(rf"training rate $\alpha_t$ ({advice.unit})")
    axis.set_ylabel(r"adaptation rate $\alpha_r$")
    axis.set_title("both rates at the best ridge", loc="left", fontsize=8, color=MARK)
