"""Plots of results have labelled axes, a legend for every mark, and survive numbers not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm

pytest.importorskip("matplotlib")
NAN = np.nan


def fitted(loss, finite=True, evaluation=None, evaluated=None, first=0):
    loss = jnp.asarray(loss)
    return nm.FitResult(0.0, (), loss, None, evaluation, loss.shape[-1], jnp.asarray(finite), False,
                        None, None, first, evaluated)  # fmt: skip


def legends(figure):
    """Check labels and legends of all panels; return the texts of the legends."""
    figure.draw_without_rendering()
    for axis in figure.axes:
        assert axis.get_xlabel() and axis.get_ylabel()
        if "step" in axis.get_xlabel():
            assert all(tick == round(tick) for tick in axis.get_xticks())
    return [[text.get_text() for text in axis.get_legend().get_texts()] for axis in figure.axes]


def lines(axis, label):
    return [line for line in axis.lines if line.get_label() == label]


def test_a_fit_has_its_losses_their_means_and_its_evaluations_at_their_steps():
    loss, evaluation = np.linspace(4.0, 1.0, 100), {"a": jnp.arange(2.0), "b": jnp.ones((2, 3))}
    figure = fitted(loss, True, evaluation, jnp.array([250, 300]), 200).plot()
    assert legends(figure) == [["loss", "mean of 2 steps"], ["evaluation"]]
    (line,) = lines(figure.axes[0], "loss")
    np.testing.assert_allclose(line.get_xdata(), np.arange(201, 301))
    (mean,) = lines(figure.axes[0], "mean of 2 steps")
    np.testing.assert_allclose(mean.get_ydata(), loss.reshape(-1, 2).mean(1), rtol=1e-6)
    assert figure.axes[1].lines[0].get_xdata().tolist() == [250, 300]


@pytest.mark.parametrize(
    ("losses", "finite", "marks"),
    (
        ([1, NAN, 2, NAN, NAN], True, [2]),  # skipped, and later stopped early
        ([1, NAN, 2, NAN, NAN], False, [2, 4]),
        ([1, 2, NAN], False, [3]),
        ([1, 2, 3], False, []),  # the last update was not finite
        ([NAN, NAN], False, [1]),
        ([[1, 2, NAN], [NAN, NAN, np.inf]], [True, False], [1]),
    ),
)
def test_a_mark_shows_each_step_whose_loss_is_not_finite(losses, finite, marks):
    (axis,) = (figure := fitted(losses, finite).plot()).axes
    found = [x for line in lines(axis, "not finite") for x in line.get_xdata()]
    assert found == marks
    assert legends(figure)[0][0] == ("loss, 2 runs" if np.ndim(losses) == 2 else "loss")


def test_an_evaluation_by_step_has_mean_interval_and_quartiles_of_finite_tasks():
    values = np.random.default_rng(0).uniform(size=(3, 8))
    values[1, :2] = NAN, np.inf
    result = nm.Evaluation({"x": jnp.asarray(values), "y": jnp.full((3, 8), NAN)})
    first, second = legends(result.plot())
    assert first == ["middle half of tasks", "up to 0.25 of tasks diverged, left out",
                     "mean, 95% interval"]  # fmt: skip
    assert "up to 1 of tasks diverged, left out" in second
    drawn = result.plot().axes[0].containers[0].lines[0].get_ydata()
    np.testing.assert_allclose(drawn, [values[0].mean(), values[1, 2:].mean(), values[2].mean()])


def test_an_evaluation_has_a_histogram_over_tasks():
    result = nm.Evaluation(jnp.array([1.0, 2.0, 3.0, NAN]))
    (texts,) = legends(result.plot())
    assert texts == ["3 tasks", "mean 2 ± 1.1", "0.25 of tasks diverged, left out"]


def test_many_evaluations_at_once_are_no_plot():
    with pytest.raises(ValueError, match="plot draws one evaluation"):
        jax.tree.map(lambda x: x, nm.Evaluation(jnp.ones((2, 3, 4)))).plot()
