"""The paper's two experiments: simulation, theory and their best rates.

Bernacchia 2021, figures 2 and 3: panel a is the test loss over the adaptation rate alpha_r at
alpha_t = 0.2, panel b over the training rate alpha_t at alpha_r = 0.2.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from negmaml import theory
from negmaml._core.arrays import canonicalize
from negmaml._core.checks import check_choice, check_count
from negmaml._core.keys import check_key
from negmaml.linear.simulation import EVALUATIONS, Simulation, compile_simulation
from negmaml.problem.model import MixedLinearRegression
from negmaml.rules import GradientDescent

PROBLEMS = {
    "overparameterized": MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5),
    "underparameterized": MixedLinearRegression(
        p=30, m=40, n_t=5, n_v=25, n_r=10, sigma=0.2, nu=0.2
    ),
}
RATES = np.round(np.linspace(-0.6, 0.6, 25), 2)
CURVE_RATES = np.linspace(-0.65, 0.65, 261)
FIXED_RATE = 0.2
RUNS = 1000  # per point of panels b; panels a show the first tenth of the runs, as in the paper
FIXED_INDEX = int(np.argmin(np.abs(RATES - FIXED_RATE)))
# The best training rate may lie outside the figure, so a few more rates bracket the predicted one.
SEARCH_STEPS = np.linspace(-1, 1, 9)


class Panel(NamedTuple):
    """One panel of a figure.

    rates, losses: the varied rate, and the simulated test loss of each run, (rates, runs).
    curve_rates, curve: the theory.
    predicted, found, found_error: the best rate by theory, by simulation, and the standard
        error of the latter.
    theorem: Theorem 1 or 2 of the paper at `curve_rates`, None for networks.
    """

    rates: np.ndarray
    losses: np.ndarray
    curve_rates: np.ndarray
    curve: np.ndarray
    predicted: float
    found: float
    found_error: float
    theorem: np.ndarray | None = None

    @property
    def mean(self) -> np.ndarray:
        """Mean test loss over runs at each rate."""
        return self.losses.mean(-1)

    @property
    def error(self) -> np.ndarray:
        """Standard error of `mean`."""
        return self.losses.std(-1, ddof=1) / self.losses.shape[-1] ** 0.5

    @property
    def theory(self) -> np.ndarray:
        """The theory at `rates`."""
        return np.interp(self.rates, self.curve_rates, self.curve)


def experiments(
    names: Sequence[str], key, runs: int = RUNS, evaluation: str = "expected"
) -> Iterator[tuple[str, dict[str, Panel]]]:
    """Yield (name, {"a": Panel, "b": Panel}) for each name in `PROBLEMS`.

    One simulation serves both panels: all rates share the data of a run, and panel a is the first
    tenth of its runs at alpha_t = 0.2. The results of a problem do not depend on the other names.
    Raises ValueError for an unknown name, and for fewer than 20 runs, of which panel a has two.
    """
    key = check_key("key", key)
    check_choice("evaluation", evaluation, EVALUATIONS)
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise TypeError(f"names must be a list of some of {', '.join(PROBLEMS)}, got {names!r}")
    if unknown := [name for name in names if name not in PROBLEMS]:
        raise ValueError(f"names must be among {', '.join(PROBLEMS)}, got {unknown[0]!r}")
    if check_count("runs", runs) < 20:
        raise ValueError(f"runs must be at least 20, two a point in panels a, got {runs!r}")
    with ThreadPoolExecutor() as threads:  # compilation is most of the work
        started = []
        for name in names:
            # The setting holds in this thread only; the threads that compile keep the caller's.
            with jax.enable_x64(True):
                prediction = tuple(
                    map(np.asarray, _predict(canonicalize(PROBLEMS[name], np.float64)))
                )
            program = threads.submit(_compile, name, key, prediction[-1], runs, evaluation)
            started.append((prediction, program))
        # No simulation starts while programs compile, since both would share the cores.
        wait([program for _, program in started])
        for name, (prediction, program) in zip(names, started, strict=True):
            yield name, _panels(prediction, program.result())


def _compile(name: str, key, best_train, runs: int, evaluation: str):
    """Compile the simulation of both panels and of rates around the predicted optimum."""
    # One simulation for the figure and for the search: more rates cost little, another pass a lot.
    train = np.concatenate([RATES, _search_rates(best_train)]).astype(np.float32)
    rules = GradientDescent(train), GradientDescent(RATES.astype(np.float32))
    problem, index = canonicalize(PROBLEMS[name], np.float32), list(PROBLEMS).index(name)
    return compile_simulation(key, problem, *rules, runs=runs, evaluation=evaluation, index=index)


def _panels(prediction, simulation: Callable[[], Simulation]) -> dict[str, Panel]:
    """Run the simulation and extract both panels."""
    curves, theorems, best_adapt, best_train = prediction
    # The simulation runs in float32; sums over its runs do not.
    losses = np.asarray(simulation().test_loss, np.float64)
    panel_a = losses[FIXED_INDEX, :, : losses.shape[-1] // 10]
    panel_b = losses[: RATES.size, FIXED_INDEX]
    search = _search_rates(best_train)
    # Panel a is a parabola in alpha_r, so all its points fit the optimum; panel b is not.
    found_a = with_jackknife(partial(_best_by_parabola, RATES), panel_a)
    found_b = with_jackknife(partial(best_on_grid, search), losses[RATES.size :, FIXED_INDEX])
    a = RATES, panel_a, CURVE_RATES, curves[0], float(best_adapt), *found_a, theorems[0]
    b = RATES, panel_b, CURVE_RATES, curves[1], float(best_train), *found_b, theorems[1]
    return {"a": Panel(*a), "b": Panel(*b)}


def _predict(problem):
    """Compute both theory curves, those of the paper's theorem, and the best rates."""
    fixed, varied = GradientDescent(FIXED_RATE), GradientDescent(CURVE_RATES)
    curves = (
        theory.test_loss(problem, fixed, varied),
        theory.test_loss(problem, varied, fixed),
    )
    theorem = theory.overparameterized if problem.overparameterized else theory.underparameterized
    theorems = theorem(problem, FIXED_RATE, CURVE_RATES), theorem(problem, CURVE_RATES, FIXED_RATE)
    best_adapt = theory.best_adapt_rate(problem, fixed)
    best_train = theory.best_train_rate(problem, fixed)
    return np.stack(curves), np.stack(theorems), best_adapt, best_train


def _search_rates(predicted):
    """Rates around a predicted optimum, wide enough for the simulated one."""
    return predicted + max(0.2, 0.5 * abs(predicted)) * SEARCH_STEPS


def _best_by_parabola(rates, mean) -> float:
    """The minimum of a loss that is quadratic in the rate, as it is in alpha_r."""
    c2, c1, _ = np.polyfit(rates, mean, 2)
    return -c1 / (2 * c2)


def best_on_grid(rates, mean) -> float:
    """The minimum of the parabola through the lowest point and its neighbours."""
    order = np.argsort(rates)
    rates, mean = rates[order], mean[order]
    i = int(np.clip(np.argmin(mean), 1, len(rates) - 2))  # an end has one neighbour only
    return _best_by_parabola(rates[i - 1 : i + 2], mean[i - 1 : i + 2])


def with_jackknife(estimate: Callable, losses, groups: int = 10) -> tuple[float, float]:
    """An estimate from mean losses (rates, runs), and its standard error over groups of runs."""
    runs = np.arange(losses.shape[-1])
    # Runs are independent, and so are groups of runs.
    leave_out = np.array([estimate(losses[:, runs % groups != g].mean(-1)) for g in range(groups)])
    # Jackknife over g groups: error^2 = (g - 1) / g sum_i (x_i - mean x)^2.
    error = np.sqrt((groups - 1) * np.mean((leave_out - leave_out.mean()) ** 2))
    return estimate(losses.mean(-1)), float(error)


def to_dataset(experiments: dict[str, dict[str, Panel]], attributes: dict[str, str]):
    """Return the data of the figures as a labelled xarray.Dataset.

    Dimensions: problem, panel, rate, curve_rate. The losses of single runs have the dimensions
    `run_a` and `run_b`, since panels differ in their number of runs.
    """
    import xarray as xr

    return xr.Dataset(*contents(experiments), attributes)


def contents(experiments: dict[str, dict[str, Panel]]) -> tuple[dict[str, tuple], dict[str, Any]]:
    """Return the variables and coordinates of `to_dataset`."""
    panels = [list(pair.values()) for pair in experiments.values()]

    def each(get):
        return np.array([[get(panel) for panel in pair] for pair in panels])

    by_panel = ("problem", "panel")
    variables: dict[str, tuple] = {
        "loss_mean": ((*by_panel, "rate"), each(lambda x: x.mean)),
        "loss_error": ((*by_panel, "rate"), each(lambda x: x.error)),
        "theory": ((*by_panel, "curve_rate"), each(lambda x: x.curve)),
        "theory_at_rate": ((*by_panel, "rate"), each(lambda x: x.theory)),
        "best_rate_predicted": (by_panel, each(lambda x: x.predicted)),
        "best_rate_found": (by_panel, each(lambda x: x.found)),
        "best_rate_found_error": (by_panel, each(lambda x: x.found_error)),
    }
    for letter, varied in (("a", "alpha_r"), ("b", "alpha_t")):
        losses = np.array([pair[letter].losses for pair in experiments.values()], np.float32)
        note = {"long_name": f"test loss of single runs over {varied}"}
        variables[f"loss_{letter}"] = (("problem", "rate", f"run_{letter}"), losses, note)
    if all(panel.theorem is not None for pair in panels for panel in pair):
        note = {"long_name": "Theorem 1 (p > n_v m) or 2 (p < n_v m) of Bernacchia 2021"}
        variables["theorem"] = (*variables["theory"][:1], each(lambda x: x.theorem), note)
    coordinates: dict[str, Any] = {
        "problem": list(experiments),
        "panel": ["a", "b"],
        "rate": RATES,
        "curve_rate": CURVE_RATES,
    }
    return variables, coordinates
