"""The style of every figure: size, fonts, the colours of either sign, and saving.

A figure is 8.3 inches wide. A page such as README.md shows it at about 830 pixels, where a point
is 1.4 pixels high, so that texts of 8 points and more can be read. matplotlib comes with an extra
and is imported where it is used.

Values and rates below zero have one colour everywhere, zero is grey in lines and white in maps.
All colours are those of Okabe and Ito, which the colour-blind can tell apart.
"""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from io import BytesIO
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
    # Notebooks show figures by this method if pyplot has not taught them another way.
    vars(figure)["_repr_png_"] = partial(_png, figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        # Ticks are made when they are drawn, which may be outside `style`.
        axis.tick_params(which="both", labelsize=SMALL)
    return figure, axes


def _png(figure) -> bytes:
    """Return a figure as a PNG file at half the size, which fits the page of a notebook."""
    content = BytesIO()
    with style():
        figure.savefig(content, dpi=DPI / 2)
    return content.getvalue()


def set_finding(axis, text: str, width: int | None = None) -> None:
    """Set the title of a panel, which states its finding, with lines of at most `width`."""
    width = width or int(120 / axis.get_subplotspec().get_gridspec().ncols - 8)
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, width)]
    axis.set_title("\n".join(lines), loc="left")


def number(value: float, digits: str = ".3g") -> str:
    """Format a number with the minus sign that matplotlib has at ticks."""
    return f"{value:{digits}}".replace("-", "\N{MINUS SIGN}")


def share_legend(figure, columns: int, axes: Iterable[Any] = ()) -> None:
    """Add one legend for `axes`, or all panels, below them, with an entry for each label."""
    found: dict[str, Any] = {}
    for axis in axes or figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    place = "outside lower center" if figure.get_layout_engine() else "lower center"
    figure.legend(found.values(), found.keys(), loc=place, ncols=columns)


def literal(text: str) -> str:
    """Escape a user's text, so that matplotlib does not read it as a formula."""
    return text.replace("$", r"\$")


def sign_color(value: float) -> str:
    """Return the colour of a negative, zero or positive value."""
    return NEGATIVE if value < 0 else POSITIVE if value > 0 else ZERO


def line_colors(values: Sequence[Any]) -> list[Any]:
    """Return a colour for the line of each value of a hue.

    If any is negative, each has the colour of its sign, the darker the further from zero. Others
    have colours without a meaning, many numbers those of a map in their order.
    """
    try:
        numbers = [float(value) for value in values]
    except ValueError:  # names
        numbers = []
    if not any(x < 0 for x in numbers):
        return _plain_colors(len(values))
    sides = {sign: sorted({abs(x) for x in numbers if sign * x > 0}) for sign in (-1, 1)}

    def color(x):
        if x == 0:
            return ZERO
        side = sides[-1 if x < 0 else 1]
        # The middle of the map's side is the colour of the sign itself.
        depth = 0.3 + 0.5 * side.index(abs(x)) / (len(side) - 1) if len(side) > 1 else 0.5
        return signed_map()(0.5 * (1 - depth if x < 0 else 1 + depth))

    return [color(x) for x in numbers]


def _plain_colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= len(SERIES):
        return list(SERIES[:count])
    return [colormaps["viridis"](i / count) for i in range(count)]


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
