"""Figures of commands: readable, their findings true, and one colour for negative values."""

import numpy as np
import pytest
import xarray as xr

from tests.internals import CURVE_RATES, RATES, Panel, figures, plotting
from tests.pictures import assert_readable


def titles(figure):
    return [axis.get_title(loc="left").replace("\n", " ") for axis in figure.axes]


def marks(axis, label):
    """Lines whose label begins with `label`."""
    return [line for line in axis.lines if str(line.get_label()).startswith(label)]


def panel(best, theorem=None):
    """A panel whose loss is a parabola with the minimum `best`."""
    losses = np.add.outer((RATES - best) ** 2 + 1, np.linspace(-0.01, 0.01, 10))
    return Panel(
        RATES, losses, CURVE_RATES, (CURVE_RATES - best) ** 2 + 1, best, best, 0.1, theorem
    )


@pytest.mark.parametrize("theorem", (None, 1 + 100 * CURVE_RATES**2), ids=("none", "diverges"))
def test_reproduction_marks_best_rates_by_their_sign_and_ignores_theorems_beyond_the_axis(theorem):
    panels = {"a": panel(0.2, theorem), "b": panel(-0.3, theorem)}
    far = {"a": panel(0.0, theorem), "b": panel(-1.5, theorem)}
    figure = figures.reproduction({"overparameterized": panels, "underparameterized": far})
    assert_readable(figure)
    for axis, best in zip(figure.axes, (0.2, -0.3, 0.0, -1.5), strict=True):
        (mark,) = marks(axis, "best rate")
        assert mark.get_color() == plotting.sign_color(best)
        assert mark.get_xdata()[0] == pytest.approx(max(best, CURVE_RATES[0]))
        assert axis.get_ylim()[1] < 6
        assert len(marks(axis, "Theorem")) == (theorem is not None)
    assert [title[:33] for title in titles(figure)[:2]] == [
        "The best adaptation rate is posit", "The best training rate is negativ"
    ]  # fmt: skip
    assert "−1.50" in titles(figure)[3] and "0.0%" in titles(figure)[3]


X, Y = np.array([2.0, -1.0, 0.5]), np.array([1.0, 3.0])
MAP = np.array([[-1.0, 2.0, np.nan], [-3.0, -0.5, np.inf]])


def test_a_map_of_signed_values_is_white_at_zero_and_crosses_out_missing_ones():
    figure = figures.heat_map(X, Y, MAP, ("n_t/p", "price in $", "best rate"))
    assert_readable(figure)
    axis, bar = figure.axes
    image = axis.images[0]
    np.testing.assert_allclose(image.cmap(image.norm(0.0))[:3], 1, atol=0.01)
    assert image.cmap(image.norm(-1.5)) == pytest.approx(plotting.signed_map()(0.25))
    assert bar.get_ylim() == (-3, 2)
    assert titles(figure)[0] == "best rate is negative in 75% of cells"
    (missing,) = marks(axis, "no finite value")
    assert missing.get_xdata().tolist() == [1, 1]  # the second column in ascending order


def test_a_map_of_positive_values_names_the_least():
    figure = figures.heat_map(X, Y, np.abs(MAP), ("x", "y", "loss"))
    assert_readable(figure)
    assert titles(figure)[0] == "loss is least, 0.5, at x = -1, y = 3"
    nowhere = figures.heat_map(X, Y, np.full_like(MAP, np.nan), ("x", "y", "loss"))
    assert titles(nowhere)[0] == "loss is finite nowhere"


@pytest.mark.parametrize("count", (1, 3, 30))
def test_curves_have_a_legend_of_lines_and_bands(count):
    hues = np.linspace(-0.6, 0.6, count).tolist() if count > 1 else ()
    means = [(X - hue) ** 2 for hue in hues or [0.0]]
    lines = {
        f"rate = {hue:g}": (mean, 0.1 + 0 * X)
        for hue, mean in zip(hues or [0.0], means, strict=True)
    }
    figure = figures.curves(X, lines if hues else {"": lines["rate = 0"]}, ("x", "loss"), hues)
    assert_readable(figure, all_lines=count < figures.MOST_LABELS)
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[-1] == "± 2 standard errors" and 2 <= len(texts) <= figures.MOST_LABELS + 1
    if hues:
        assert figure.axes[0].lines[0].get_color() == plotting.line_colors(hues)[0]
    assert titles(figure)[0].startswith("loss is least, ")
    nothing = figures.curves(X, {"": (X * np.nan, X)}, ("x", "loss"))
    assert titles(nothing) == ["loss is finite nowhere"]


def test_phase_diagrams_can_be_read_and_state_their_shares():
    ratios = np.geomspace(0.05, 5, 20)
    best = -np.geomspace(0.01, 8, 400).reshape(20, 20)
    some = np.where(best > -0.02, 0.01, best)
    at = np.geomspace(0.1, 4, 6)
    errors = np.add.outer(at, [0.0, 0.1, 0.2])
    lowest = {f"lowest_{name}": at for name in ("neither", "rate", "ridge", "both")}
    figure = figures.phases({
        "n_t_over_p": ratios, "rows_over_p": ratios, "sigma_over_nu": ratios, "best_by_data": best,
        "best_by_noise": some, "rate": [-0.5, 0.0, 0.3], "point": at, "curve": at,
        "descent_theory": errors, "descent_mean": errors, "descent_error": 0.01 * errors,
        "ridge_rows_over_p": at, **lowest,
    })  # fmt: skip
    assert_readable(figure)
    found = titles(figure)
    assert "negative in all cells" in found[0] and f"{np.mean(some < 0):.0%} of cells" in found[1]
    assert "6 of 6 points" in found[2]
    (negative,) = marks(figure.axes[2], "_child0")
    assert (
        negative.get_color()
        == plotting.line_colors([-0.5, 0.0, 0.3])[0]
        == plotting.signed_map()(0.25)
    )


def test_maps_of_gains_show_a_lower_loss_in_the_colour_of_negative_values():
    axis = np.geomspace(0.1, 4, 5)
    gain = np.linspace(-2, 0.4, 25).reshape(5, 5)
    dims = {"noise": ("exponent", "sigma_over_nu"), "data": ("rows_over_p", "n_t_over_p")}
    parts = {
        f"{gained}_{name}": (("ridge", *dims[name]), np.stack([gain, np.abs(gain)]))
        for gained in figures.GAINS
        for name in dims
    }
    coordinates = {dim: axis for pair in dims.values() for dim in pair}
    figure = figures.payoff(xr.Dataset(parts, {"ridge": ["none", "best"], **coordinates}))
    assert_readable(figure)
    mesh = figure.axes[0].collections[0]
    drawn = mesh.cmap(mesh.norm(mesh.get_array().ravel()))
    assert drawn[-1] == pytest.approx(mesh.cmap(mesh.norm(-40.0)))  # a gain of 40% is blue
    assert [title.split(": ")[1] for title in titles(figure)[:2]] == [
        f"lower in {np.mean(gain > 0):.0%} of cells", "lower in all cells"
    ]  # fmt: skip
