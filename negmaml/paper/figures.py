"""Draws the figures of commands from computed results."""

from typing import Any

INK, POINTS, CURVE, MARK = "#222222", "#2a6f97", "#d1495b", "#6c757d"
LABELS = {"a": r"adaptation rate $\alpha_r$", "b": r"training rate $\alpha_t$"}
OPTIMA = {"a": r"best $\alpha_r$", "b": r"best $\alpha_t$"}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    # Texts stay texts, which can be searched and take less space than outlines.
    "svg.fonttype": "none",
    "svg.hashsalt": "negmaml",  # the same data give the same file
}


def reproduction(experiments, points: str = "simulation", curve: str = "theory"):
    """Draw the paper's figures from the panels of `negmaml reproduce`, one row per problem.

    Points are simulated means with standard errors, curves the theory, dashed lines the best
    rate predicted. Returns a matplotlib Figure.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = len(experiments)
    with matplotlib.rc_context(STYLE):
        # `Figure` without pyplot: no display is needed, and no global list keeps it alive.
        figure = Figure(figsize=(7.2, 2.75 * rows), dpi=160)
        axes = figure.subplots(rows, 2, squeeze=False)
        # Fixed margins, since a layout engine would have to draw the figure twice.
        figure.subplots_adjust(0.09, 0.17 / rows, 0.98, 1 - 0.1 / rows, 0.24, 0.42)
        for row, (problem, panels) in zip(axes, experiments.items(), strict=True):
            for axis, letter in zip(row, ("a", "b"), strict=True):
                _draw_panel(axis, panels[letter], letter, points, curve)
            row[0].set_ylabel("test loss")
            row[0].set_title(problem, loc="left", color=INK, fontweight="bold")
        axes[0, 1].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _draw_panel(axis, panel, letter: str, points: str, curve: str) -> None:
    axis.plot(panel.curve_rates, panel.curve, color=CURVE, lw=1.6, label=curve, zorder=2)
    axis.errorbar(
        panel.rates, panel.mean, panel.error, fmt="o", ms=3.2, lw=1, color=POINTS, label=points,
        zorder=3,
    )  # fmt: skip
    low, high, best = panel.curve_rates[0], panel.curve_rates[-1], panel.predicted
    label = f"{OPTIMA[letter]} = {best:.2f}"
    if low <= best <= high:
        axis.axvline(best, color=MARK, ls="--", lw=1, zorder=1)
        axis.annotate(
            label, (best, 0.93), xycoords=("data", "axes fraction"), xytext=(4, 0),
            textcoords="offset points", color=MARK, fontsize=8,
        )  # fmt: skip
    else:  # off the axis: an arrow shows the side
        left = best < low
        text = f"← {label}" if left else f"{label} →"
        axis.annotate(
            text, (0.02 if left else 0.98, 0.93), xycoords="axes fraction",
            ha="left" if left else "right", color=MARK, fontsize=8,
        )  # fmt: skip
    axis.set_xlim(low, high)
    axis.set_xlabel(LABELS[letter])
    axis.set_title(f"{panel.losses.shape[-1]} runs per point", loc="right", fontsize=8, color=MARK)


def heat_map(x, y, values, labels: tuple[str, str, str], signed: bool):
    """Draw `values`, with a row for each y, as an image; signed values in one colour a sign."""
    import matplotlib
    import numpy as np
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    rows, columns = np.argsort(y), np.argsort(x)
    x, y, values = x[columns], y[rows], values[np.ix_(rows, columns)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.4), dpi=160, layout="constrained")
        axis = figure.subplots()
        options: dict[str, Any] = {"cmap": "viridis"}
        if signed and np.isfinite(values).any():
            # White is zero, whatever the range of the values.
            bound = np.nanmax(np.abs(values)) or 1.0
            options = {"cmap": "RdBu", "norm": TwoSlopeNorm(0.0, -bound, bound)}
        drawn = axis.imshow(values, origin="lower", aspect="auto", **options)
        for ticks, at in ((axis.set_xticks, x), (axis.set_yticks, y)):
            every = max(1, len(at) // 10)  # about ten labels fit an axis
            ticks(range(0, len(at), every), [f"{value:.3g}" for value in at[::every]])
        axis.set_xlabel(_literal(labels[0]))
        axis.set_ylabel(_literal(labels[1]))
        figure.colorbar(drawn, label=_literal(labels[2]))
    return figure


def _literal(text: str) -> str:
    """Escape a user's text, so that matplotlib does not read it as a formula."""
    return text.replace("$", r"\$")


def curves(x, lines: dict, labels: tuple[str, str]):
    """Plot lines {label: (means, errors)} over x, with bands of two standard errors."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    order = np.argsort(x)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.2), dpi=160, layout="constrained")
        axis = figure.subplots()
        for label, (means, errors) in lines.items():
            means, errors = means[order], errors[order]
            (line,) = axis.plot(x[order], means, lw=1.6, label=_literal(label))
            axis.fill_between(
                x[order], means - 2 * errors, means + 2 * errors, color=line.get_color(), alpha=0.25
            )
        axis.set_xlabel(_literal(labels[0]))
        axis.set_ylabel(_literal(labels[1]))
        if len(lines) > 1:
            axis.legend(frameon=False, fontsize=8)
    return figure


def phases(values):
    """Draw the four panels of `negmaml phases` from arrays by name; returns a matplotlib Figure."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 5.6), dpi=70)
        axes = figure.subplots(2, 2)
        figure.subplots_adjust(0.08, 0.09, 0.97, 0.94, 0.32, 0.38)
        maps = (
            ("best_by_data", "n_t_over_p", r"$n_t/p$"),
            ("best_by_noise", "sigma_over_nu", r"$\sigma/\nu$"),
        )
        for axis, (name, coordinate, label) in zip(axes[0], maps, strict=True):
            _draw_map(figure, axis, values[coordinate], values["rows_over_p"], values[name], label)
        _draw_descent(axes[1, 0], values)
        _draw_ridge(axes[1, 1], values)
    return figure


def payoff(dataset):
    """Draw the eight maps of `negmaml gain-map`; returns a matplotlib Figure."""
    import matplotlib
    from matplotlib.figure import Figure

    maps = (
        ("noise", "sigma_over_nu", r"$\sigma/\nu$", "exponent", "decay of the spectrum"),
        ("data", "n_t_over_p", r"$n_t/p$", "rows_over_p", r"$n_v m/p$"),
    )
    columns = [(w, r) for w in ("over_zero", "over_same") for r in ("none", "best")]
    titles = {"over_zero": "over rate 0", "over_same": r"over $\alpha_t=\alpha_r$"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.8), dpi=80, layout="constrained")
        axes = figure.subplots(2, 4)
        for row, (name, x, x_label, y, y_label) in zip(axes, maps, strict=True):
            for axis, (what, ridge) in zip(row, columns, strict=True):
                # A gain may be minus infinity, through which no contour can be drawn.
                values = 100 * dataset[f"{what}_{name}"].sel(ridge=ridge).values.clip(-0.5, 0.5)
                drawn = axis.pcolormesh(
                    dataset[x], dataset[y], values, cmap="RdBu", vmin=-50, vmax=50, rasterized=True
                )
                axis.contour(dataset[x], dataset[y], values, levels=[0], colors=INK, linewidths=0.8)
                axis.set(xscale="log", xlabel=x_label)
                if name == "data":
                    axis.set_yscale("log")
                shown = "no ridge" if ridge == "none" else "best ridge"
                axis.set_title(f"{titles[what]}, {shown}", loc="left", fontsize=8)
            row[0].set_ylabel(y_label)
        figure.colorbar(drawn, ax=axes, label="gain of the best negative rate (%)", shrink=0.7)
    return figure


def _draw_map(figure, axis, y, x, values, label: str) -> None:
    from matplotlib.colors import SymLogNorm

    # Rates of either sign over three decades: linear near zero, logarithmic beyond.
    norm = SymLogNorm(linthresh=0.01, vmin=-10, vmax=10)
    # An image within the SVG: 40,000 vector cells would make a large file.
    drawn = axis.pcolormesh(x, y, values, norm=norm, cmap="RdBu_r", rasterized=True)
    lines = axis.contour(
        x, y, values, levels=[-3, -1, -0.3, -0.1, -0.03, 0], colors=INK, linewidths=0.6,
        linestyles="solid",
    )  # fmt: skip
    axis.clabel(lines, fontsize=6, fmt="%g")
    axis.axvline(1, color=MARK, ls="--", lw=1)
    axis.set(xscale="log", yscale="log", xlabel=r"$n_v m/p$", ylabel=label)
    axis.set_title(r"best training rate $\alpha_t$", loc="left", fontsize=9)
    figure.colorbar(drawn, ax=axis, ticks=[-10, -1, -0.1, 0, 0.1, 1, 10], format="%g")


def _draw_descent(axis, values) -> None:
    for i, (rate, color) in enumerate(zip(values["rate"], (POINTS, MARK, CURVE), strict=True)):
        mean, error = values["descent_mean"][:, i], values["descent_error"][:, i]
        axis.plot(values["curve"], values["descent_theory"][:, i], color=color, lw=1.4)
        axis.errorbar(
            values["point"], mean, error, fmt="o", ms=3, lw=1, color=color,
            label=rf"$\alpha_t$ = {rate:g}",
        )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel=r"$n_v m/p$", ylim=(0.05, 30))
    axis.set_ylabel(r"$E|\omega^*-w_0|^2$")
    axis.set_title("double descent: theory, simulation", loc="left", fontsize=9)
    axis.legend(frameon=False, fontsize=7)


def _draw_ridge(axis, values) -> None:
    styles = {
        "neither": (MARK, ":", "neither"),
        "rate": (POINTS, "-", "best rate"),
        "ridge": (CURVE, "-", "best ridge, rate 0"),
        "both": (INK, "--", "both"),
    }
    for name, (color, line, label) in styles.items():
        x, y = values["ridge_rows_over_p"], values[f"lowest_{name}"]
        axis.plot(x, y, color=color, ls=line, lw=1.4, label=label)
    axis.set(xscale="log", yscale="log", xlabel=r"$n_v m/p$", ylim=(0.02, 10))
    axis.set_ylabel(r"$E|\omega^*-w_0|^2$")
    axis.set_title("does a ridge replace the rate?", loc="left", fontsize=9)
    axis.legend(frameon=False, fontsize=7)
