r"""Correction of the task error for eigenvalues of a task that scatter from run to run.

Given the eigenvalues x_k of S, the task error tau^2 of a steep filter is far from linear in their
density, so its mean is not the value at the mean density. Let r = 1/(B + kappa) and s = B r, and
let delta be the error that all other tasks leave. At kappa = 1 and with A = tau^2 (t + p w)/n_v,
the response of log tau^2 to an eigenvalue at x is, by (15) and (16) of negmaml/theory/isotropic.md,

    f(x) = r^2 (V + delta B)/A + s^2/(t + p w)
           + 2 p s/(t + p w) { int mu r^2 s (V + delta B)/A - int mu r s^2/(t + p w) }.

A sum f(x_k) over the eigenvalues of a Wishart matrix is Gaussian, with the variance

    v = 1/2 sum_j j a_j^2,      f = sum_j a_j cos(j theta),

theta as in `negmaml.theory.isotropic.spectral_density`. For b a polynomial of degree K, tau^2 is at
most the power 2 K of a Gaussian number, and its mean rises by

    exp(v/(2 + 2 h))/(1 + h)^{1/2},      h = v/(2 K), zero for a filter that is no polynomial.
"""

import numpy as np

from negmaml._core.arrays import contract, namespace
from negmaml.theory.isotropic.scaling import SaddleDerivatives, ScaledSystem
from negmaml.theory.isotropic.spectral_density import INTERVALS


def log_scatter_factor(system: ScaledSystem, at: SaddleDerivatives, task_error, inverse_power):
    """Return the logarithm of the factor in (18), by which the mean of tau^2 rises.

    task_error: the limit of tau^2 in units of kappa. inverse_power: 1/(2 K) or zero.

    Zero unless the nodes are those of the Marchenko-Pastur law.
    """
    xp = namespace(task_error)
    if system.weights.shape[-1] != INTERVALS + 2:
        return xp.zeros_like(task_error)
    f = _response(system, at, task_error)[..., :-1]
    waves = np.arange(INTERVALS)
    ends = np.ones(INTERVALS + 1)
    ends[[0, -1]] = 0.5
    angles = np.pi * np.arange(INTERVALS + 1) / INTERVALS
    cosines = (2 * ends / INTERVALS * np.cos(np.outer(waves, angles))).astype(f.dtype)
    # Coefficients a_j of f in cos(j theta), by the trapezoidal rule on the nodes.
    coefficients = contract("...k,jk->...j", f, cosines)
    v = xp.sum(waves.astype(f.dtype) * coefficients**2, -1) / 2
    h = v * inverse_power
    return v / (2 + 2 * h) - xp.log1p(h) / 2


def _response(system: ScaledSystem, at: SaddleDerivatives, task_error):
    """Return f of (16) on the nodes."""
    xp, p, mean, r, s = namespace(task_error), system.p, system.mean, system.free, system.fitted
    known = task_error > 0
    free = at.t + p * at.w
    A = xp.where(known, task_error, 1.0) * free / system.n_v
    some = at.w > 0
    # delta from A = left + delta p w, which is (15) solved for it; `left` has sigma^2 and V.
    delta = xp.where(some & known, (A - at.left) / (p * xp.where(some, at.w, 1.0)), 0.0)
    own = r * r * system.V / A[..., None] + (delta / A)[..., None] * (r * s)
    moved = 2 * p * (mean(own * s) - mean(r * s * s) / free) / free
    f = own + s * s / free[..., None] + s * moved[..., None]
    return xp.where(known[..., None], f, 0.0)
