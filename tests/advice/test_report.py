"""The report: the decision first, one name for each method, three formats."""

import html
import re

import jax
import pandas as pd
import pytest

import negmaml as nm
from tests.advice.conftest import grouped_rows
from tests.internals import (
    MEANINGS,
    Difference,
    Grid,
    Section,
    render,
    report_number,
    report_percent,
    rmse_difference,
)
from tests.pictures import assert_readable


@pytest.fixture(scope="module")
def advice():
    x, y, groups = grouped_rows(p=2)
    y = pd.Series(y, name="score_*")
    return nm.advise(x, y, groups, splits=10, standardise=True, key=jax.random.key(0))


def words(text):
    return " ".join(text.split())


def test_a_report_begins_with_the_method_to_use_and_its_gain_in_the_targets_units(advice):
    said = words(advice.report())
    best, rmse = advice.recommended, advice.rmse
    assert best == "mixed model"
    start = said.index("Use a mixed model: ")
    assert said.index("RMSE") > start
    assert f"predicts score_* with an RMSE of {rmse[best]:.4g} and explains" in said
    gain = advice.rmse_gain["pooled ridge"]
    assert f"has {rmse['pooled ridge']:.4g}: {gain.value:.3g} more (95% interval" in said
    order = [said.index(f" {title} ---") for title in ("Rates", "All methods", "More data", "Data")]
    assert order == sorted(order) and order[0] > start


def test_a_rate_of_zero_is_explained(advice):
    said = words(advice.report())
    assert advice.train_rate == 0
    assert "takes training rate 0, since no other is significantly better" in said


def test_every_method_has_one_name_and_a_line_in_the_glossary(advice):
    said = words(advice.report())
    assert set(advice.loss) == set(advice.gain) == set(MEANINGS)
    for name in advice.loss:
        assert f"{name}: {MEANINGS[name]}." in said


def test_formats_have_the_same_words(advice):
    markdown, page = advice.report(format="markdown"), advice.report(format="html")
    body = re.sub(r"<head>.*</head>|<[^>]*>", " ", page, flags=re.S)
    texts = advice.report(), markdown.replace("\\", ""), html.unescape(body)
    one, two, three = (re.findall(r"[\w%.]*\w", text) for text in texts)
    assert one == two == three
    assert "| mixed model |" in markdown and "<td>mixed model</td>" in page


def test_markup_in_names_is_escaped():
    sections = [Section("A<b", ["x_1 <script>", Grid(("a|b",), [["c|d"]]), {"t*": "m & n"}])]
    assert "\\|" in render("T", sections, "markdown")
    page = render("T", sections, "html")
    assert "<script>" not in page and "&lt;script&gt;" in page and "m &amp; n." in page
    assert render("T", sections, "text").splitlines()[0] == "T"


def test_rmse_and_explained_variance_are_those_of_predictions_in_the_targets_units(advice):
    _, y, _ = grouped_rows(p=2)
    scale = y.std()
    for name, loss in advice.loss.items():
        assert advice.rmse[name] == pytest.approx(scale * (2 * loss) ** 0.5)
        # Groups have equally many rows, so the variance is that over all rows.
        assert advice.explained_variance[name] == pytest.approx(1 - 2 * loss)
        gain = advice.rmse_gain[name]
        assert gain.value == pytest.approx(advice.rmse[name] - advice.rmse[advice.recommended])
        assert gain.low <= gain.value <= gain.high
        other = advice.gain[name]
        # One factor for all, so that no interval exceeds what the losses can differ by.
        assert gain.high * other.value == pytest.approx(gain.value * other.high)
        assert gain.low * other.value == pytest.approx(gain.value * other.low)


def test_an_interval_of_a_gain_is_below_the_rmse_of_the_other_method(advice):
    # The loss of the best is uncertain by more than its size.
    wide = Difference(0.4, 0.3, 0.1, 0.5, 0.8)
    gain = rmse_difference(wide, other=1.0, best=0.2**0.5, scale=1.0)
    assert gain.value == pytest.approx(1 - 0.2**0.5)
    assert gain.high < 1 - 0.2


def test_numbers_of_the_report_have_no_powers_of_ten_below_ten_millions():
    cases = {(236.4, 2): "236", (99.7, 2): "100", (0.01234, 2): "0.012", (23064.2, 4): "23064",
             (-236.4, 2): "-236", (3e9, 2): "3e+09", (13.0, 4): "13"}  # fmt: skip
    for (value, digits), text in cases.items():
        assert report_number(value, digits) == text
    assert [report_percent(f) for f in (0.523, 0.9961, 0.99999, 1.0, -0.7)] == [
        "52%", "99.6%", "more than 99.9%", "100%", "-70%",
    ]  # fmt: skip


def test_less_data_costs_what_advice_with_less_data_loses(advice):
    costs = advice.cost_of_less
    assert set(costs) == {
        "half of the training groups", "half of their rows", "half of the rows to adapt on",
    }  # fmt: skip
    x, y, groups = grouped_rows(p=2)
    half = nm.advise(x, y, groups, n_r=5, splits=40, standardise=True, key=jax.random.key(0))
    name = advice.recommended
    measured = half.fitted_loss[name] / advice.fitted_loss[name] - 1
    assert costs["half of the rows to adapt on"] == pytest.approx(measured, abs=0.08)
    assert measured > 0.1


def test_a_figure_can_be_read_and_names_the_best_method_on_top(advice):
    drawn = advice.plot()
    assert all(axis.get_xlabel() or axis.get_ylabel() for axis in drawn.axes)
    assert_readable(drawn, all_lines=False)  # other ridges are shades of one grey
    (methods,) = (axis for axis in drawn.axes if axis.get_ylabel() == "method")
    assert methods.get_yticklabels()[-1].get_text() == advice.recommended
