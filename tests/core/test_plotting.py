"""The style of figures: one colour a sign, texts that fit, files that are whole or absent."""

import pickle
from itertools import pairwise

import numpy as np
import pytest

from tests.internals import plotting

pytest.importorskip("matplotlib")


def hue(color):
    from matplotlib.colors import rgb_to_hsv, to_rgb

    return rgb_to_hsv(to_rgb(color))[0]


def test_maps_and_lines_have_one_colour_a_sign_and_zero_is_white_or_grey():
    bound = 6.0
    for norm in (plotting.signed_norm(bound), plotting.signed_norm(bound, linear=0.01)):
        assert np.allclose(plotting.signed_map()(norm(0.0))[:3], 1, atol=0.01)
        for value in (-6.0, -1.0, -0.1, 0.1, 1.0, 6.0):
            drawn = hue(plotting.signed_map()(norm(value))[:3])
            assert drawn == pytest.approx(hue(plotting.sign_color(value)), abs=0.02), value
    rates = [0.5, -0.2, 0.0, -0.5]
    for rate, color in zip(rates, plotting.line_colors(rates), strict=True):
        assert hue(color) == pytest.approx(hue(plotting.sign_color(rate)), abs=0.02), rate


@pytest.mark.parametrize("values", ([0.1, 1.0], ["a", "b"], [1.0], range(9)))
def test_lines_of_values_without_a_sign_do_not_have_the_colours_of_signs(values):
    signs = {plotting.NEGATIVE, plotting.POSITIVE, plotting.ZERO}
    assert not signs & set(plotting.line_colors(values))


def test_a_figure_is_wide_enough_and_its_titles_stay_in_their_panels():
    with plotting.style():
        figure, axes = plotting.panels(1, 3, 3.0)
        for axis in axes.flat:
            plotting.set_finding(axis, "the best training rate is negative in all of the plane")
    figure.draw_without_rendering()
    assert figure.bbox.width >= 1200
    boxes = [axis.get_tightbbox() for axis in axes.flat]
    assert all(a.x1 <= b.x0 for a, b in pairwise(boxes))
    assert figure.bbox.x1 >= boxes[-1].x1


def test_notebooks_show_a_figure_without_pyplot():
    figure, _ = plotting.panels(1, 1, 3.0)
    content = pickle.loads(pickle.dumps(figure))._repr_png_()
    assert content.startswith(b"\x89PNG")
    width = int.from_bytes(content[16:20], "big")
    assert 600 < width < 900


def test_a_users_text_is_no_formula():
    assert plotting.literal("price in $ or $") == r"price in \$ or \$"
