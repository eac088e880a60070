"""Phase diagrams of the proportional theory, double descent, and ridge against rate.

Four parts of one dataset: the best training rate over amounts of data, and over noise; the weight
error across p = n_v m; and the losses with a rate, a meta-ridge, both or neither.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml import theory
from negmaml._core.checks import check_count
from negmaml._core.jit import jit_fast_compile, on_host
from negmaml._core.keys import check_key
from negmaml.linear.data import Data, assemble, draw
from negmaml.linear.system import one_step_system
from negmaml.problem.model import MixedLinearRegression
from negmaml.rules import GradientDescent
from negmaml.theory.isotropic.inputs import isotropic_inputs
from negmaml.theory.isotropic.moments import rule_moments
from negmaml.theory.phases import best_rates_over

CELLS = 200
P, M = 100.0, 10.0  # of the maps, where only ratios and m count
NOISE = 0.5  # sigma/nu of the first map
RATIOS = np.geomspace(0.05, 5, CELLS)  # of n_t/p and n_v m/p
NOISES = np.geomspace(0.02, 20, CELLS)  # of sigma/nu

DESCENT = MixedLinearRegression(p=60, m=6, n_t=30, n_v=1, n_r=20, sigma=0.5, nu=1.0)
DESCENT_RATES = (-0.5, 0.0, 0.3)
DESCENT_N_V = (1, 2, 4, 6, 8, 9, 11, 12, 14, 18, 24, 36)
CURVE_N_V = tuple(range(1, 41))

# The start is as far from w0 as tasks are. From w0 itself the best ridge would be infinite.
RIDGE = MixedLinearRegression(p=100, m=10, n_t=50, n_v=1, n_r=20, sigma=0.5, nu=1.0, omega0=0.1)
RIDGE_N_V = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 20, 25, 30, 40, 50)
RIDGES = np.geomspace(1e-3, 1e3, 61)  # in units of n_v m
RIDGE_RATES = np.concatenate([-np.geomspace(0.02, 20, 40)[::-1], [0.0], np.geomspace(0.02, 2, 20)])


def phases(key, runs: int = 400):
    """Compute the figures of `negmaml phases` as a labelled xarray.Dataset.

    Each simulated point has its own data, so their errors are independent.
    """
    import xarray as xr

    return xr.Dataset(*contents(key, runs))


def contents(
    key, runs: int, report: Callable[[int, int], Any] = lambda done, total: None
) -> tuple[dict[str, tuple], dict[str, Any]]:
    """Return the variables and coordinates of `phases`.

    report: called with the number of parts that are done, and of all.
    """
    key = check_key("key", key)
    if check_count("runs", runs) < 2:
        raise ValueError(f"runs must be at least 2 for a standard error, got {runs!r}")
    with jax.enable_x64(True):
        parts = _maps()
        report(1, 3)
        parts |= _descent(key, runs)
        report(2, 3)
        parts |= _ridge()
    coordinates = {
        "n_t_over_p": RATIOS,
        "rows_over_p": RATIOS,
        "sigma_over_nu": NOISES,
        "rate": list(DESCENT_RATES),
        "point": np.array(DESCENT_N_V) * DESCENT.m / DESCENT.p,
        "curve": np.array(CURVE_N_V) * DESCENT.m / DESCENT.p,
        "ridge_rows_over_p": np.array(RIDGE_N_V) * RIDGE.m / RIDGE.p,
    }
    return parts, coordinates


def _maps() -> dict[str, tuple]:
    """Best training rates over (n_t/p, n_v m/p) and over (sigma/nu, n_v m/p)."""
    n_v = P / M * RATIOS  # n_v m / p = RATIOS; the theory takes real sizes
    by_data = best_rates_over(P, M, P * RATIOS[:, None], n_v, NOISE, 1.0)
    by_noise = best_rates_over(P, M, P, n_v, NOISES[:, None], 1.0)
    return {
        "best_by_data": (("n_t_over_p", "rows_over_p"), by_data),
        "best_by_noise": (("sigma_over_nu", "rows_over_p"), by_noise),
    }


def _descent(key, runs: int) -> dict[str, tuple]:
    """E|omega* - w0|^2 across the threshold, by theory and by simulation with standard errors."""
    train = GradientDescent(np.asarray(DESCENT_RATES))
    curve = [theory.weight_error(dataclasses.replace(DESCENT, n_v=n), train) for n in CURVE_N_V]
    found = [_distances(_data(key, i, runs)) for i in range(len(DESCENT_N_V))]
    return {
        "descent_theory": (("curve", "rate"), _finite(np.array(curve))),
        "descent_mean": (("point", "rate"), np.array([x.mean(0) for x in found])),
        "descent_error": (
            ("point", "rate"),
            np.array([x.std(0, ddof=1) / runs**0.5 for x in found]),
        ),
    }


def _data(key, index: int, runs: int) -> Data:
    """Draw the data of all runs of a simulated point, with the run as the first axis."""
    normals = np.asarray(_normals(key, index, runs), np.float64)
    return assemble(normals, dataclasses.replace(DESCENT, n_v=DESCENT_N_V[index]))


@partial(jit_fast_compile, static_argnames="runs")
def _normals(key, index: int, runs: int):
    """Draw enough normals for the largest problem, so that one program serves all."""
    key = jax.random.fold_in(key, index)  # independent points
    most = dataclasses.replace(DESCENT, n_v=max(DESCENT_N_V))
    return lax.map(
        lambda run: draw(jax.random.fold_in(key, run), most, jnp.float32), jnp.arange(runs)
    )


def _distances(data: Data) -> np.ndarray:
    """|omega* - w0|^2 of every run and rate, exactly, from omega_0 = w0 = 0.

    In NumPy, since a dozen shapes of few systems would each take longer to compile than to solve.
    The normal equations are accurate enough in float64: in 100 runs none differs from the solution
    by QR factorization by more than 1e-12.
    """
    A, B, a, c = one_step_system(data)
    wide = A.shape[-2] < A.shape[-1]  # then the solution of least norm, by the small Gram matrix
    found = []
    for rate in DESCENT_RATES:
        Phi, r = A - rate * B, (a - rate * c)[..., None]
        T = Phi.swapaxes(-1, -2)
        omega = T @ np.linalg.solve(Phi @ T, r) if wide else np.linalg.solve(T @ Phi, T @ r)
        found.append(np.sum(omega**2, (-2, -1)))
    return np.stack(found, -1)


def _ridge() -> dict[str, tuple]:
    """The lowest weight error with a rate, a ridge, both or neither, and its best rate."""
    train = GradientDescent(RIDGE_RATES)
    zero = int(np.argmin(np.abs(RIDGE_RATES)))  # the column without inner steps
    names = ("neither", "rate", "ridge", "both")
    lowest: dict[str, list] = {name: [] for name in names}
    best_rates: dict[str, list] = {"rate": [], "both": []}
    for n_v in RIDGE_N_V:
        problem = dataclasses.replace(RIDGE, n_v=n_v)
        plain = np.asarray(theory.weight_error(problem, train))
        ridged = _over_ridges(problem, train, RIDGES * problem.rows).min(0)
        for name, value in zip(
            names, (plain[zero], plain.min(), ridged[zero], ridged.min()), strict=True
        ):
            lowest[name].append(float(value))
        best_rates["rate"].append(float(RIDGE_RATES[np.argmin(plain)]))
        best_rates["both"].append(float(RIDGE_RATES[np.argmin(ridged)]))
    dimension = ("ridge_rows_over_p",)
    return {f"lowest_{name}": (dimension, _finite(np.array(x))) for name, x in lowest.items()} | {
        f"best_rate_{name}": (dimension, np.array(x)) for name, x in best_rates.items()
    }


def _over_ridges(problem: MixedLinearRegression, train: GradientDescent, ridges) -> np.ndarray:
    """The weight error at each ridge and rate, in one evaluation on the host."""
    inputs, (rule,) = isotropic_inputs(problem, (train,), 0.0, "auto")
    return np.asarray(on_host(rule_moments)(inputs.with_ridge(ridges[:, None]), rule).weight_error)


def _finite(values):
    """Replace infinity by NaN, across which no curve is drawn."""
    return np.where(np.isfinite(values), values, np.nan)
