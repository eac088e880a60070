"""Numbers that README.md states are those of the benchmarks and of the committed figures."""

import re

import numpy as np
import pytest

from tests.documents import README, ROOT

TEXT = " ".join(README.read_text().split())
BENCHMARKS = (ROOT / "benchmarks/README.md").read_text()


def table(section, *first):
    """The rows of a section of the benchmarks whose first cells are these, as lists of texts."""
    (text,) = re.findall(rf"^## {re.escape(section)}.*?(?=^## |\Z)", BENCHMARKS, re.M | re.S)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    found = [row for row in rows if tuple(row[: len(first)]) == first or not first]
    assert found
    return found


def number(text):
    """The first number of a cell, without the error behind it."""
    return float(re.match(r"[+-]?[\d.]+", text)[0])


def saved(name):
    return np.load(ROOT / f"benchmarks/{name}.npz")


def test_printed_table_and_caption_are_the_figure():
    data = saved("reproduction")
    printed = re.findall(r"(?:over|under) +alpha_[rt] +(\S+) +(\S+)\(\d+\)", README.read_text())
    np.testing.assert_allclose(
        np.array(printed, float).reshape(2, 2, 2),
        np.stack([data["best_rate_predicted"], data["best_rate_found"]], -1),
        atol=6e-4,
    )
    over, under = data["best_rate_predicted"][:, 1]
    assert f"the best training rate, {over:.2f}," in TEXT
    assert f"the best rate is {under:.2f}.*" in TEXT


def test_seconds_of_the_figure():
    (row,) = table("Cold start", "`negmaml reproduce`")
    assert f"and the figure {number(row[1]):.0f} (" in TEXT


def test_times_against_torch():
    (row,) = table("Meta-gradients", "negmaml, as documented")
    sinusoid, wide, conv4 = (number(row[i]) for i in (2, 4, 7))
    assert (int(1 / sinusoid), int(1 / wide)) == (9, 14)
    assert 0.9 < conv4 < 1.1
    assert "a ninth of the time of torch.func, and of 1-1024-1024-1 a fourteenth" in TEXT
    assert "on Conv4 the two are equal" in TEXT


def test_accuracy_of_the_theory():
    section = "Accuracy of the theory"
    rows = [
        table(section, name)[0] for name in ("p >= 60, 5% away from p = n_v m", "p >= 20, 10% away")
    ]
    assert all(number(row[2]) < 0.1 for row in rows)
    assert "off by less than 0.1% in the median" in TEXT


def test_gain_of_a_negative_rate_over_zero():
    data = saved("gain_map")
    plain, ridge = data["over_zero_noise"]  # exponents by noise
    assert plain[0].min() >= 0 and f"up to {plain[0].max():.0%} less excess loss" in TEXT
    assert ridge[0].max() < 0.04 and "best meta-ridge the gain is at most 4%" in TEXT
    assert f"it costs up to {-plain.min():.0%}" in TEXT
    helps = data["sigma_over_nu"][plain[list(data["exponent"]).index(1.5)] > 0]
    assert 3 <= helps.min() < 3.5 and "from sigma/nu = 3 at eigenvalues k^-1.5" in TEXT


def test_rates_on_grouped_data():
    data = "Your own data"
    rows = [row for row in table(data) if len(row) == 11 and row[1] == "5"]
    negative = [row for row in rows if number(row[4]) < 0]
    lower = [1 - number(row[5]) / number(row[7]) for row in negative]
    assert (len(negative), len(rows)) == (6, 9) and "negative on six of nine data sets" in TEXT
    assert f"{min(lower):.0%}"[:-1] + f" to {max(lower):.0%} below that of one rate" in TEXT
    joint = [number(row[8]) <= number(row[5]) for row in rows]
    assert sum(joint) >= len(rows) - 2 and "at least as good nearly everywhere" in TEXT


@pytest.mark.parametrize(
    ("task", "regime", "column", "claim"),
    [
        ("quadratic", "lazy", 5, "A positive rate gains {gain:.0%} on quadratic regression"),
        ("digits, one-hot", "lazy", 5, "and {gain:.0%} on digits"),
        ("digits, cross entropy", "learning", 4, "by {gain:.0%} ± {error:.0%}"),
    ],
)
def test_rates_of_networks(task, regime, column, claim):
    (row,) = table("Lazy and learning networks", task, regime)
    difference, error = (float(part) for part in row[column].split("±"))
    zero = number(row[3])
    claim = claim.format(gain=-difference / zero, error=error / zero)
    assert claim.replace("% ±", " ±") in TEXT


def test_lazy_networks_gain_nothing_by_a_negative_rate():
    for task in ("quadratic", "sinusoid", "digits, one-hot"):
        (row,) = table("Lazy and learning networks", task, "lazy")
        difference, error = (float(part) for part in row[4].split("±"))
        assert difference > -2 * error
    assert "never significantly better than 0" in TEXT


def test_sinusoids_are_those_of_the_guide():
    guide = (ROOT / "negmaml/meta/README.md").read_text()
    claims = {"-0.02": "test loss {} at rate -0.02", "0.01": "{} at the test rate 0.01"}
    for rate, claim in claims.items():
        (loss,) = re.findall(rf"^\| {rate} \| (.*?) \|", guide, re.MULTILINE)
        assert claim.format(loss) in TEXT
