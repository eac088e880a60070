"""Plots of a `FitResult` and of an `Evaluation`; each returns a matplotlib Figure."""

import warnings
from typing import Any

import jax
import numpy as np

from negmaml._core import plotting
from negmaml._core.plotting import INK, SERIES, number
from negmaml.training.statistics import finite_mean

COLUMNS = 3  # panels in a row
WINDOWS = 50  # running means in a plot
LOG_RANGE = 20  # ratio of losses beyond which their axis is logarithmic


def draw_fit(result):
    """Draw a `FitResult`: the losses, and each number of the evaluations in a panel of its own."""
    losses = np.asarray(result.loss, float)
    runs, steps = losses.reshape(-1, losses.shape[-1]), losses.shape[-1]
    series = _evaluations(result, losses.ndim)
    with plotting.style():
        figure, axes = _panels(1 + len(series))
        x = np.max(result.first_step) + np.arange(1, steps + 1)
        _draw_losses(axes[0], x, runs, np.ravel(result.finite))
        for axis, (name, values) in zip(axes[1:], series.items(), strict=True):
            at = np.reshape(result.evaluated, (-1, values.shape[-1]))[0]
            _draw_runs(axis, at, values, "evaluation", marker=".")
            axis.set_ylabel(name)
            plotting.set_finding(axis, _ends(name, values))
        plotting.set_finding(axes[0], _ends("loss", runs))
        for axis in axes:
            _count_steps(axis, "step")
            axis.legend()
    return figure


def draw_evaluation(evaluation):
    """Draw an `Evaluation`, with a panel for each metric."""
    values: Any = evaluation.values
    named = values if isinstance(values, dict) else {"value": values}
    arrays = {name: np.asarray(x, float) for name, x in named.items()}
    if any(x.ndim > 2 for x in arrays.values()):
        raise ValueError(
            "plot draws one evaluation, got values of the shapes "
            f"{[x.shape for x in arrays.values()]}; take one of them by jax.tree.map(lambda x: "
            "x[i], evaluation)"
        )
    with plotting.style():
        figure, axes = _panels(len(arrays))
        for axis, (name, x) in zip(axes, arrays.items(), strict=True):
            (_draw_steps if x.ndim == 2 else _draw_tasks)(axis, name, x)
            axis.legend()
    return figure


def _panels(count: int):
    """Return a figure and its panels, in rows."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure, axes = plotting.panels(rows, columns, 0.4 + 3.2 * rows)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def _ends(name: str, runs) -> str:
    """The first and the last finite value, means over runs."""
    finite = runs[:, np.isfinite(runs).all(0)]
    if not finite.size:
        return (
            f"{name} is finite at no step" if len(runs) == 1 else f"{name} of a run is not finite"
        )
    first, last = finite.mean(0)[[0, -1]]
    return f"{name} from {number(first)} to {number(last)}"


def _count_steps(axis, label: str) -> None:
    """Label an axis of steps, with ticks at whole numbers only."""
    axis.set_xlabel(label)
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _draw_losses(axis, x, runs, all_finite) -> None:
    """Draw the losses of runs, their running mean, and where they are not finite."""
    steps = runs.shape[-1]
    _draw_runs(axis, x, runs, "loss", alpha=0.4, lw=0.7)
    if (window := steps // WINDOWS) > 1:
        blocks = runs[:, : steps // window * window].reshape(len(runs), -1, window)
        means = np.array([[finite_mean(block)[0] for block in run] for run in blocks])
        _draw_runs(axis, x[window - 1 :: window], means, f"mean of {window} steps")
    if len(at := x[_broken(runs, all_finite).any(0)]):
        axis.plot(at, np.zeros(len(at)), "x", color=INK, ms=5, label="not finite",
                  transform=axis.get_xaxis_transform(), clip_on=False)  # fmt: skip
    finite = runs[np.isfinite(runs)]
    if finite.size and finite.min() > 0 and finite.max() > LOG_RANGE * finite.min():
        axis.set_yscale("log")
    axis.set_ylabel("loss")


def _broken(runs, all_finite):
    """Return where a step was taken and its loss is not finite."""
    finite, steps = np.isfinite(runs), runs.shape[-1]
    # Steps beyond the last finite loss were not taken, but for the one that ended the run.
    taken = steps - np.argmax(finite[:, ::-1], 1) + ~all_finite
    taken = np.where(finite.any(1), taken, ~all_finite)
    return ~finite & (np.arange(steps) < taken[:, None])


def _draw_runs(axis, x, runs, label: str, **style) -> None:
    """Draw a line for each run, in a colour of its own, with one label for all."""
    label += f", {len(runs)} runs" if len(runs) > 1 else ""
    for i, run in enumerate(runs):
        finite = np.where(np.isfinite(run), run, np.nan)  # a gap in the line
        axis.plot(
            x, finite, color=SERIES[i % len(SERIES)], label=label if i == 0 else None, **style
        )


def _evaluations(result, dims: int) -> dict[str, np.ndarray]:
    """Return the numbers of the evaluations by name, each of shape (runs, evaluations)."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(result.evaluation):
        if np.ndim(leaf) == dims and np.shape(leaf)[-1]:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            values = np.asarray(leaf, float).reshape(-1, np.shape(leaf)[-1])
            found[f"evaluation {name}".strip()] = values
    return found


def _draw_steps(axis, name: str, values) -> None:
    """Draw mean, interval and middle half of the tasks against the number of inner steps."""
    steps = np.arange(len(values))
    mean, interval, diverged = np.array([finite_mean(row) for row in values]).T
    finite = np.where(np.isfinite(values), values, np.nan)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        low, high = np.nanquantile(finite, (0.25, 0.75), axis=-1)
    axis.fill_between(
        steps, low, high, color=SERIES[0], alpha=0.15, lw=0, label="middle half of tasks"
    )
    axis.errorbar(steps, mean, interval, color=SERIES[0], capsize=2, label="mean, 95% interval")
    if diverged.any():
        text = f"up to {diverged.max():.2g} of tasks diverged, left out"
        at = steps[diverged > 0]
        axis.plot(at, np.zeros(len(at)), "x", color=INK, ms=5, label=text,
                  transform=axis.get_xaxis_transform(), clip_on=False)  # fmt: skip
    _count_steps(axis, "inner steps")
    axis.set_ylabel(name)
    plotting.set_finding(axis, f"{name}: {number(mean[0])} before, {number(mean[-1])} after steps")


def _draw_tasks(axis, name: str, values) -> None:
    """Draw the distribution of a value over tasks, and its mean."""
    mean, interval, diverged = finite_mean(values)
    finite = values[np.isfinite(values)]
    axis.hist(finite, bins=min(30, max(5, int(finite.size**0.5))), color=SERIES[0], alpha=0.4,
              label=f"{finite.size} tasks")  # fmt: skip
    if finite.size:
        axis.axvline(mean, color=INK, lw=1.2, label=f"mean {mean:.3g} ± {interval:.2g}")
    if diverged:
        axis.plot([], [], "x", color=INK, label=f"{diverged:.2g} of tasks diverged, left out")
    axis.set_xlabel(name)
    axis.set_ylabel("number of tasks")
    half = np.quantile(finite, (0.25, 0.75)) if finite.size else (np.nan, np.nan)
    plotting.set_finding(axis, f"half of the tasks from {number(half[0])} to {number(half[1])}")
