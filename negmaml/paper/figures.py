"""Draws the figures of commands from computed results."""

from typing import Any

import numpy as np

from negmaml._core import plotting
from negmaml._core.plotting import INK, NEGATIVE, POINT, POSITIVE, SERIES, ZERO

THEORY, THEOREM = SERIES[0], SERIES[1]
RATES = {"a": "adaptation", "b": "training"}
SYMBOLS = {"a": r"$\alpha_r$", "b": r"$\alpha_t$"}
SIGNS = {NEGATIVE: "negative", ZERO: "zero", POSITIVE: "positive"}
ROWS = r"$n_v m/p$"
GAINS = {"over_zero": "rate 0", "over_same": r"$\alpha_t=\alpha_r$"}
MOST_LABELS = 12  # of lines in a legend; of more lines some have a label
MOST_CHARACTERS = 30  # of a label beside the axes; longer ones are below


def reproduction(experiments, points: str = "simulation", curve: str = "theory of this package"):
    """Draw the paper's figures from the panels of `negmaml reproduce`, one row per problem.

    Points are simulated means with standard errors, solid lines the theory, dashed ones the
    theorem of the paper, and diamonds the best rate predicted. Returns a matplotlib Figure.
    """
    rows = len(experiments)
    with plotting.style():
        # Fixed margins, since a layout engine would have to draw the figure twice.
        height = 0.8 + 2.8 * rows
        figure, axes = plotting.panels(rows, 2, height, layout=None)
        figure.subplots_adjust(0.085, 1.2 / height, 0.985, 1 - 0.5 / height, 0.2, 0.5)
        for row, (problem, panels) in zip(axes, experiments.items(), strict=True):
            for axis, letter in zip(row, ("a", "b"), strict=True):
                _draw_panel(axis, panels[letter], letter, points, curve)
            row[0].set_ylabel(f"test loss, {problem}")
        plotting.share_legend(figure, 3)
    return figure


def _draw_panel(axis, panel, letter: str, points: str, curve: str) -> None:
    axis.plot(panel.curve_rates, panel.curve, color=THEORY, label=curve, zorder=2)
    if panel.theorem is not None:
        axis.plot(
            panel.curve_rates, panel.theorem, color=THEOREM, ls="--", zorder=2.5,
            label="Theorems 1 and 2 of the paper",
        )  # fmt: skip
    axis.errorbar(
        panel.rates, panel.mean, panel.error, fmt="o", elinewidth=1, color=INK, zorder=3,
        label=f"{points}, ± standard error",
    )  # fmt: skip
    _mark_best(axis, panel)
    axis.set(xlim=panel.curve_rates[[0, -1]], ylim=_limits(panel))
    axis.set_xlabel(
        f"{RATES[letter]} rate {SYMBOLS[letter]}, {panel.losses.shape[-1]} runs a point"
    )
    sign = SIGNS[plotting.sign_color(panel.predicted)]
    best = f"The best {RATES[letter]} rate is {sign}, {plotting.number(panel.predicted, '.2f')}"
    plotting.set_finding(axis, f"{best}\n{_gaps(panel)}")


def _limits(panel) -> tuple[float, float]:
    """Limits of the loss for theory and simulation; a theorem may diverge beyond them."""
    shown = np.concatenate([panel.curve, panel.mean - panel.error, panel.mean + panel.error])
    shown = shown[np.isfinite(shown)]
    margin = 0.06 * np.ptp(shown)
    return shown.min() - margin, shown.max() + margin


def _mark_best(axis, panel) -> None:
    """Mark the best rate on the curve; beyond its ends by an arrow at the end."""
    low, high, best = panel.curve_rates[0], panel.curve_rates[-1], panel.predicted
    marker = "D" if low <= best <= high else "<" if best < low else ">"
    color, where = plotting.sign_color(best), "" if marker == "D" else ", beyond the axis"
    at = min(max(best, low), high)
    axis.plot(
        at, np.interp(at, panel.curve_rates, panel.curve), marker, color=color, ms=2.2 * POINT,
        mec="white", mew=0.8, zorder=4, clip_on=False,
        label=f"best rate, {SIGNS[color]}{where}",
    )  # fmt: skip


def _gaps(panel) -> str:
    """The largest relative error of theory and theorem from the simulated means."""

    def gap(curve):
        at = np.interp(panel.rates, panel.curve_rates, curve)
        return f"{np.max(np.abs(at / panel.mean - 1)):.1%}"

    if panel.theorem is None:
        return f"Largest error {gap(panel.curve)}"
    return f"Largest error: theory {gap(panel.curve)}, theorem {gap(panel.theorem)}"


def heat_map(x, y, values, labels: tuple[str, str, str]):
    """Draw `values`, with a row for each y, as a map; signed ones with the colours of signs."""
    rows, columns = np.argsort(y), np.argsort(x)
    x, y, values = x[columns], y[rows], np.asarray(values, float)[np.ix_(rows, columns)]
    values = np.where(np.isfinite(values), values, np.nan)
    with plotting.style():
        figure, axes = plotting.panels(1, 1, 4.8)
        axis = axes[0, 0]
        low, high = (
            f(values) if np.isfinite(values).any() else 0.0 for f in (np.nanmin, np.nanmax)
        )
        options: dict[str, Any] = {"cmap": "viridis"}
        if low < 0:
            options = {"cmap": plotting.signed_map(), "norm": plotting.signed_norm(max(-low, high))}
        drawn = axis.imshow(values, origin="lower", aspect="auto", **options)
        bar = figure.colorbar(drawn, label=plotting.literal(labels[2]))
        if low < 0:
            plotting.crop_bar(bar, low, high)
        _mark_missing(axis, values)
        for ticks, at in ((axis.set_xticks, x), (axis.set_yticks, y)):
            every = max(1, len(at) // 10)  # about ten labels fit an axis
            ticks(range(0, len(at), every), [f"{value:.3g}" for value in at[::every]])
        axis.set_xlabel(plotting.literal(labels[0]))
        axis.set_ylabel(plotting.literal(labels[1]))
        plotting.set_finding(axis, _map_finding(x, y, values, labels))
    return figure


def _mark_missing(axis, values) -> None:
    """Cross out cells without a finite value, which would look like zeros."""
    at = np.argwhere(np.isnan(values))
    if len(at):
        axis.plot(at[:, 1], at[:, 0], "x", color=INK, ms=5, label="no finite value")
        axis.legend(loc="lower left", bbox_to_anchor=(0, -0.22), borderaxespad=0)


def _map_finding(x, y, values, labels) -> str:
    """The share of negative cells if there are any, else the least value and its place."""
    across, up, what = map(plotting.literal, labels)
    finite = np.isfinite(values)
    if not finite.any():
        return f"{what} is finite nowhere"
    if (values < 0).any():
        return f"{what} is negative in {_share((values < 0)[finite])}"
    row, column = np.unravel_index(np.nanargmin(values), values.shape)
    least = f"{what} is least, {plotting.number(values[row, column])},"
    return f"{least} at {across} = {x[column]:.3g}, {up} = {y[row]:.3g}"


def _share(chosen) -> str:
    """The share of true cells, without rounding a part to none or all."""
    if np.all(chosen):
        return "all cells"
    share = f"{np.mean(chosen):.0%}"
    if share in {"0%", "100%"}:
        return f"{np.sum(chosen):,} of {np.size(chosen):,} cells"
    return f"{share} of cells"


def curves(x, lines: dict, labels: tuple[str, str], hue: tuple = ()):
    """Plot lines {label: (means, errors)} over x, with bands of two standard errors.

    hue: the value of each line, by which it is coloured.
    """
    order = np.argsort(x)
    x = np.asarray(x)[order]
    every = -(-len(lines) // MOST_LABELS)
    with plotting.style():
        figure, axes = plotting.panels(1, 1, 4.4)
        axis, drawn = axes[0, 0], []
        colors = plotting.line_colors(hue or ("",) * len(lines))
        for i, (label, (means, errors)) in enumerate(lines.items()):
            means, errors = means[order], errors[order]
            shown = plotting.literal(label or labels[1]) if i % every == 0 else None
            axis.plot(x, means, color=colors[i], label=shown)
            axis.fill_between(
                x, means - 2 * errors, means + 2 * errors, color=colors[i], alpha=0.25, lw=0
            )
            drawn.append((label, means))
        axis.fill_between([], [], color=ZERO, alpha=0.25, lw=0, label="± 2 standard errors")
        axis.set_xlabel(plotting.literal(labels[0]))
        axis.set_ylabel(plotting.literal(labels[1]))
        plotting.set_finding(axis, _curves_finding(x, drawn, labels))
        wide = max(map(len, lines)) > MOST_CHARACTERS
        figure.legend(loc="outside lower left" if wide else "outside right upper")
    return figure


def _curves_finding(x, lines, labels) -> str:
    """The least mean, its place and its line."""
    table = np.array([means for _, means in lines])
    table = np.where(np.isfinite(table), table, np.inf)
    line, at = np.unravel_index(np.argmin(table), table.shape)
    if not np.isfinite(table[line, at]):
        return plotting.literal(f"{labels[1]} is finite nowhere")
    place = f"{labels[0]} = {plotting.number(x[at])}"
    where = f"{place}, {lines[line][0]}" if len(lines) > 1 else place
    return plotting.literal(f"{labels[1]} is least, {plotting.number(table[line, at])}, at {where}")


def phases(values):
    """Draw the four panels of `negmaml phases` from arrays by name; returns a matplotlib Figure."""
    with plotting.style():
        figure, axes = plotting.panels(2, 2, 7.0)
        maps = (
            ("best_by_data", "n_t_over_p", r"$n_t/p$"),
            ("best_by_noise", "sigma_over_nu", r"$\sigma/\nu$"),
        )
        for axis, (name, coordinate, label) in zip(axes[0], maps, strict=True):
            x, y, best = values["rows_over_p"], values[coordinate], values[name]
            drawn = _draw_map(axis, x, y, best)
            axis.set_ylabel(label)
            bar = figure.colorbar(
                drawn, ax=axis, ticks=[-10, -3, -1, -0.3, -0.1, -0.03, 0, 0.1, 1, 10], format="%g",
                label=r"best training rate $\alpha_t$",
            )  # fmt: skip
            plotting.crop_bar(bar, best.min(), best.max())
        _draw_descent(axes[1, 0], values)
        _draw_ridge(axes[1, 1], values)
    return figure


def _draw_map(axis, x, y, best):
    # An image within the SVG: 40,000 vector cells would make a large file.
    # Rates of either sign over three decades: linear near zero, logarithmic beyond.
    drawn = axis.pcolormesh(
        x, y, best, norm=plotting.signed_norm(10, linear=0.03), cmap=plotting.signed_map(),
        rasterized=True,
    )  # fmt: skip
    lines = axis.contour(
        x, y, best, levels=[-3, -1, -0.3, -0.1, -0.03], colors="white", linewidths=0.8,
        linestyles="solid",
    )  # fmt: skip
    for text in axis.clabel(lines, fontsize=plotting.SMALL, fmt="%g"):
        if 0.7 < text.get_position()[0] < 1.4:  # on the dashed line
            text.remove()
    axis.axvline(1, color=INK, ls="--", lw=1.2, label="$n_v m = p$")
    axis.set(xscale="log", yscale="log", xlabel=ROWS)
    axis.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")
    plotting.set_finding(axis, f"The best training rate is negative in {_share(best < 0)}")
    return drawn


def _draw_descent(axis, values) -> None:
    rates, mean, error = (values[f"{x}"] for x in ("rate", "descent_mean", "descent_error"))
    colors = plotting.line_colors(rates)
    for i, (rate, color) in enumerate(zip(rates, colors, strict=True)):
        axis.plot(values["curve"], values["descent_theory"][:, i], color=color)
        label = rf"$\alpha_t$ = {plotting.number(rate)}"
        axis.errorbar(
            values["point"],
            mean[:, i],
            error[:, i],
            fmt="o",
            elinewidth=1,
            color=color,
            label=label,
        )
    axis.plot([], [], color=INK, label="theory")
    axis.plot([], [], "o", color=INK, label="simulation, ± standard error")
    axis.set(xscale="log", yscale="log", xlabel=ROWS, ylim=(0.03, 30))
    axis.set_ylabel(r"weight error $E|\omega^*-w_0|^2$")
    lowest = np.argmin(mean, -1) == np.argmin(rates)
    points = f"{lowest.sum()} of {len(lowest)} points"
    plotting.set_finding(
        axis, f"The error peaks at $n_v m = p$; the negative rate has the least at {points}", 50
    )
    axis.legend(loc="lower right")


def _draw_ridge(axis, values) -> None:
    styles = {
        "neither": (ZERO, ":", "rate 0, no ridge"),
        "rate": (NEGATIVE, "-", "best rate, no ridge"),
        "ridge": (SERIES[0], "-", "rate 0, best ridge"),
        "both": (INK, "--", "best rate and ridge"),
    }
    for name, (color, line, label) in styles.items():
        x, y = values["ridge_rows_over_p"], values[f"lowest_{name}"]
        axis.plot(x, y, color=color, ls=line, label=label)
    axis.set(xscale="log", yscale="log", xlabel=ROWS, ylim=(0.05, 10))
    axis.set_ylabel(r"weight error $E|\omega^*-w_0|^2$")
    over = np.nanmax(values["lowest_ridge"] / values["lowest_both"] - 1)
    plotting.set_finding(
        axis, f"A ridge replaces the rate: alone it is at most {over:.1%} above rate and ridge"
    )
    axis.legend(loc="lower left")


def payoff(dataset):
    """Draw the eight maps of `negmaml gain-map`; returns a matplotlib Figure."""
    maps = (
        ("noise", "sigma_over_nu", r"$\sigma/\nu$", "exponent", "decay of the spectrum"),
        ("data", "n_t_over_p", r"$n_t/p$", "rows_over_p", ROWS),
    )
    columns = [(gain, ridge) for gain in GAINS for ridge in ("none", "best")]
    with plotting.style():
        figure, axes = plotting.panels(2, 4, 5.8)
        # Changes of a few percent would be white on a linear scale.
        norm = plotting.signed_norm(100, linear=1)
        for row, (name, x, x_label, y, y_label) in zip(axes, maps, strict=True):
            for axis, (gain, ridge) in zip(row, columns, strict=True):
                # A gain may be minus infinity, through which no contour can be drawn.
                gains = dataset[f"{gain}_{name}"].sel(ridge=ridge).values.clip(-1)
                drawn = _draw_change(axis, dataset[x], dataset[y], -100 * gains, norm)
                shown = "no ridge" if ridge == "none" else "best ridge"
                lower = f"lower in {_share(gains > 0)}"
                plotting.set_finding(axis, f"{GAINS[gain]}, {shown}:\n{lower}", 40)
                axis.set(xscale="log", xlabel=x_label, yscale="log" if name == "data" else "linear")
            row[0].set_ylabel(y_label)
        figure.colorbar(
            drawn, ax=axes, shrink=0.8, extend="max", format="%g",
            ticks=[-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100],
            label="change of the excess loss (%)",
        )  # fmt: skip
        finding = "The best negative training rate lowers the excess test loss (blue) at high noise"
        figure.suptitle(f"{finding}. Compared with", x=0.01, ha="left", fontsize=plotting.NORMAL)
        axes[0, 0].plot([], [], color=INK, lw=0.8, label="no change")
        plotting.share_legend(figure, 1)
    return figure


def _draw_change(axis, x, y, change, norm):
    drawn = axis.pcolormesh(x, y, change, cmap=plotting.signed_map(), norm=norm, rasterized=True)
    if change.min() < 0 < change.max():
        axis.contour(x, y, change, levels=[0], colors=INK, linewidths=0.8)
    return drawn
