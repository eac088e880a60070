"""Gain of a negative training rate, for inputs of any spectrum: the maps of `negmaml gain-map`.

The excess loss of a training rate is its test loss, at the best adaptation rate, minus the test
loss of the mean task w0. The gain is the relative decrease of the excess from a baseline to the
best negative rate. The baselines are a zero rate, the best positive rate, and the best rate used
both in training and at test time. Each is computed without a ridge and with its best ridge.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.jit import jit_fast_compile
from negmaml.problem import named_spectrum
from negmaml.rules import GradientDescent
from negmaml.theory.anisotropic.inputs import inputs_from_spectrum, predict_traced

P, M, N_T, N_V, N_R, NOISE, EXPONENT = 60, 10, 30, 3, 20, 2.0, 1.0
CELLS = 13
EXPONENTS = np.linspace(0.0, 2.0, CELLS)
NOISES = np.geomspace(0.1, 10, CELLS)  # sigma/nu
RATIOS = np.geomspace(0.1, 4, CELLS)  # of n_t/p and, between its values, n_v m/p
NEGATIVE = -np.geomspace(20, 0.05, 9)  # rates in units of 1/largest eigenvalue of S
POSITIVE = np.geomspace(0.05, 2, 7)
RIDGES = np.geomspace(1e-3, 1e3, 13)  # in units of n_v m


def payoff(report: Callable[[int, int], Any] = lambda done, total: None):
    """Compute the maps as a labelled xarray.Dataset, in float64.

    report: called with the number of maps that are done, and of all.
    """
    import xarray as xr

    rows = RATIOS[:, None] * 0.98  # not n_v m = p, where the mean is infinite without ridge
    with jax.enable_x64(True):
        by_noise = _map(EXPONENTS[:, None], NOISES, N_T, N_V)
        report(1, 2)
        by_data = _map(EXPONENT, NOISE, P * RATIOS, P * rows / M)
    parts = {
        f"{gain}_{name}": (("ridge", *dims), values)
        for name, dims, found in (
            ("noise", ("exponent", "sigma_over_nu"), by_noise),
            ("data", ("rows_over_p", "n_t_over_p"), by_data),
        )
        for gain, values in found.items()
    }
    coordinates = {
        "ridge": ["none", "best"],
        "exponent": EXPONENTS,
        "sigma_over_nu": NOISES,
        "rows_over_p": rows[:, 0],
        "n_t_over_p": RATIOS,
    }
    return xr.Dataset(parts, coordinates)


def _map(exponent, noise, n_t, n_v) -> dict[str, np.ndarray]:
    """Gains over a grid: each (2, ...), without ridge and with the best."""
    cells = jnp.broadcast_arrays(*(jnp.asarray(x, float) for x in (exponent, noise, n_t, n_v)))
    shape = cells[0].shape
    found = _cells(jnp.stack([x.ravel() for x in cells], -1))
    return {name: np.asarray(x).T.reshape(2, *shape) for name, x in found.items()}


@jit_fast_compile
def _cells(cells):
    return lax.map(_cell, cells)


def _cell(cell):
    """Gains of one cell, (2,) each."""
    exponent, noise, n_t, n_v = cell
    s = named_spectrum("power", P, exponent=exponent)
    o = jnp.ones(P) / P  # nu = 1; the start is as far from w0 as tasks are
    # About the largest eigenvalue of S, by the edge of the Marchenko-Pastur law.
    top = s[0] * (1 + jnp.sqrt(P / (s[0] * n_t))) ** 2
    rates = jnp.concatenate([NEGATIVE, jnp.zeros(1), POSITIVE]) / top
    weights = s ** jnp.arange(1, 4)[:, None]
    m, none = jnp.asarray(float(M)), jnp.zeros(())
    at = inputs_from_spectrum(s, o, o, weights, m, n_t, n_v, noise, none, ridged=False)

    def excess(at):
        """Excess loss of every rate, at its best adaptation rate and at the same: (2, rates)."""
        forms = predict_traced(at, GradientDescent(rates)).forms
        power = jnp.sum(s**2) / N_R
        known = weights @ o
        floor = _lowest(known, noise, power)  # omega = w0: known has only the spread of tasks
        total = known + forms
        # The quadratic in the adaptation rate, at the training rate.
        same = noise**2 + total[:, 0] - 2 * rates * total[:, 1]
        same += rates**2 * ((N_R + 1) / N_R * total[:, 2] + power * (total[:, 0] + noise**2))
        found = jnp.stack([jax.vmap(partial(_lowest, noise=noise, power=power))(total), same])
        # Rates without a mean never win.
        return jnp.where(jnp.isfinite(found), found - floor, jnp.inf)

    def ridged(ridge):
        return excess(
            inputs_from_spectrum(s, o, o, weights, m, n_t, n_v, noise, ridge, ridged=True)
        )

    plain = excess(at)
    # One ridge at a time, to bound the memory of a cell.
    best = jnp.minimum(plain, jnp.min(lax.map(ridged, RIDGES * m * n_v), 0))
    found = jnp.stack([plain, best])  # ridge, own or same rate at test time, rate
    negative = jnp.min(found[:, 0, : len(NEGATIVE)], -1)
    zero, positive = found[:, 0, len(NEGATIVE)], jnp.min(found[:, 0, len(NEGATIVE) + 1 :], -1)
    return {
        "over_zero": 1 - negative / zero,
        "over_same": 1 - negative / jnp.min(found[:, 1], -1),
        "over_positive": 1 - negative / positive,
    }


def _lowest(A, noise, power):
    """Twice the least test loss of one step, where A[k] = sum_i s_i^(k+1) E (w - omega)_i^2."""
    curvature = (N_R + 1) / N_R * A[2] + power * (A[0] + noise**2)
    return noise**2 + A[0] - A[1] ** 2 / curvature
