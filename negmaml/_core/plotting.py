"""The style of every figure: size, fonts, the colours of either sign, and saving.

A figure is 8.3 inches wide. A page such as README.md shows it at about 830 pixels, where a point
is 1.4 pixels high, so that texts of 8 points and more can be read. matplotlib comes with an extra
and is imported where it is used.

Values and rates below zero have one colour everywhere, zero is grey in lines and white in maps.
All colours are those of Okabe and Ito, which the colour-blind can tell apart.
"""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

from negmaml._core.extras import require

NEGATIVE, ZERO, POSITIVE = "#0072b2", "#6c757d", "#d55e00"
SERIES = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d1f")  # lines without a sign
INK = "#222222"  # texts, axes, simulated points

WIDTH, DPI = 8.3, 180  # inches, and pixels of an inch: 1494 pixels
SMALL, NORMAL = 8, 9  # points, of legends and ticks, and of all other texts
LINE, POINT = 1.6, 3.5  # points
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so texts have one size everywhere
    "font.size": NORMAL,
    "axes.titlesize": NORMAL,
    "axes.labelsize": NORMAL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "lines.linewidth": LINE,
    "lines.markersize": POINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "text.color": INK,
    # Texts stay texts, which can be searched and take less space than outlines.
    "svg.fonttype": "none",
    "svg.hashsalt": "negmaml",  # the same data give the same file
}


def style(extra: str = "figures"):
    """Return a context in which matplotlib draws in this style; `extra` installs matplotlib."""
    return require("matplotlib", extra).rc_context(STYLE)


def panels(
    rows: int, columns: int, height: float, layout: Literal["constrained"] | None = "constrained"
):
    """Return a figure of the standard width, and its axes as an array (rows, columns)."""
    # `Figure` without pyplot: no display is needed, and no global list keeps it alive.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        # Ticks are made when they are drawn, which may be outside `style`.
        axis.tick_params(which="both", labelsize=SMALL)
    return figure, axes


def set_finding(axis, text: str, width: int | None = None) -> None:
    """Set the title of a panel, which states its finding, wrapped to `width` characters."""
    width = width or int(120 / axis.get_subplotspec().get_gridspec().ncols - 8)
    axis.set_title("\n".join(textwrap.wrap(text, width)), loc="left")


def literal(text: str) -> str:
    """Escape a user's text, so that matplotlib does not read it as a formula."""
    return text.replace("$", r"\$")


def sign_color(value: float) -> str:
    """Return the colour of a negative, zero or positive value."""
    return NEGATIVE if value < 0 else POSITIVE if value > 0 else ZERO


def line_colors(values: Sequence[Any]) -> list[Any]:
    """Return a colour for the line of each value of a hue.

    Numbers on both sides of zero have the colours of their signs, the darker the further from zero.
    All other values have colours without a meaning.
    """
    try:
        numbers = [float(value) for value in values]
    except ValueError:  # names
        numbers = []
    if not any(x < 0 for x in numbers):
        return [SERIES[i % len(SERIES)] for i in range(len(values))]
    sides = {sign: sorted({abs(x) for x in numbers if sign * x > 0}) for sign in (-1, 1)}

    def color(x):
        if x == 0:
            return ZERO
        side = sides[-1 if x < 0 else 1]
        # The middle of the map's side is the colour of the sign itself.
        depth = 0.3 + 0.5 * side.index(abs(x)) / (len(side) - 1) if len(side) > 1 else 0.5
        return signed_map()(0.5 * (1 - depth if x < 0 else 1 + depth))

    return [color(x) for x in numbers]


@cache
def signed_map():
    """Return the map of signed values: white at zero, and the colour of each sign beside it."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = ["#00304d", NEGATIVE, "#ffffff", POSITIVE, "#5c2800"]
    return LinearSegmentedColormap.from_list("negmaml_signed", colors)


def signed_norm(bound: float, linear: float | None = None):
    """Return the norm from -bound to bound for `signed_map`; logarithmic beyond `linear`."""
    from matplotlib.colors import CenteredNorm, SymLogNorm

    if linear is None:
        return CenteredNorm(0.0, bound)
    return SymLogNorm(linthresh=linear, vmin=-bound, vmax=bound)


def crop_bar(bar, low: float, high: float) -> None:
    """Show only the part of a colour bar of signed values from low to high, and zero."""
    bar.ax.set_ylim(min(low, 0.0), max(high, 0.0))


def save(figure, folder: Path, stem: str) -> list[Path]:
    """Write a figure as PNG and SVG, and return the paths."""
    paths = []
    # Without a date, the same data give the same SVG file.
    for suffix, options in (("png", {}), ("svg", {"metadata": {"Date": None}})):
        paths.append(folder / f"{stem}.{suffix}")
        with style(), atomic_write(paths[-1]) as partial:
            figure.savefig(partial, **options)
    return paths


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, renamed to `path` at the end or removed on failure."""
    # In the same folder, since a rename is atomic only within a file system. The suffix stays,
    # because writers choose the format by it.
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
