r"""The task error's mean over the eigenvalues of a task, which scatter from run to run.

Given the eigenvalues x_k of S, the task error tau^2 of a steep filter is far from linear in their
density, so its mean is not that at the mean density. By rotational invariance the other tasks enter
as an isotropic prior on omega, of precision c and with an error of variance delta an entry, so
with r = 1/(B + kappa) and s = B r,

    tau^2 = n_v A/(t + p w),    A = sigma^2 + kappa^2 sum_k r^2 (V + delta B),    kappa t = c

and the response of log tau^2 to an eigenvalue at x, with c and delta fixed and kappa = 1, is

    f(x) = r^2 (V + delta B)/A + s^2/(t + p w)
           + 2 p s/(t + p w) { int mu r^2 s (V + delta B)/A - int mu r s^2/(t + p w) }.

A sum f(x_k) over the eigenvalues of a Wishart matrix is Gaussian, with the variance

    v = 1/2 sum_j j a_j^2,      f = sum_j a_j cos(j theta),

theta as in `negmaml.theory.isotropic.spectral_density`. For b a polynomial of degree K, tau^2 is at
most the power
2 K of a Gaussian number z: log tau^2 bends as log (1 + z v^{1/2}/(2 K))^{2 K}. Its mean rises by

    exp(v/(2 + 2 h))/(1 + h)^{1/2},      h = v/(2 K), zero for a filter that is no polynomial.
"""

import numpy as np

from negmaml._core.arrays import contract, namespace
from negmaml.theory.isotropic.scaling import Point, Seen
from negmaml.theory.isotropic.spectral_density import INTERVALS


def log_growth(tasks: Seen, at: Point, task_error, bend):
    """The logarithm of this module's factor.

    Arguments: task_error, of the limit in units of kappa; bend, 1/(2 K) or zero.

    Zero on other nodes than those of the Marchenko-Pastur law.
    """
    xp = namespace(task_error)
    if tasks.weights.shape[-1] != INTERVALS + 2:
        return xp.zeros_like(task_error)
    f = _response(tasks, at, task_error)[..., :-1]
    waves = np.arange(INTERVALS)
    ends = np.ones(INTERVALS + 1)
    ends[[0, -1]] = 0.5
    angles = np.pi * np.arange(INTERVALS + 1) / INTERVALS
    cosines = (2 * ends / INTERVALS * np.cos(np.outer(waves, angles))).astype(f.dtype)
    coefficients = contract("...k,jk->...j", f, cosines)
    v = xp.sum(waves.astype(f.dtype) * coefficients**2, -1) / 2
    h = v * bend
    return v / (2 + 2 * h) - xp.log1p(h) / 2


def _response(tasks: Seen, at: Point, task_error):
    """f of this module's head on the nodes."""
    xp, p, mean, r, s = namespace(task_error), tasks.p, tasks.mean, tasks.free, tasks.fitted
    known = task_error > 0
    free = at.t + p * at.w
    A = xp.where(known, task_error, 1.0) * free / tasks.n_v
    some = at.w > 0
    delta = xp.where(some & known, (A - at.left) / (p * xp.where(some, at.w, 1.0)), 0.0)
    own = r * r * tasks.V / A[..., None] + (delta / A)[..., None] * (r * s)
    moved = 2 * p * (mean(own * s) - mean(r * s * s) / free) / free
    f = own + s * s / free[..., None] + s * moved[..., None]
    return xp.where(known[..., None], f, 0.0)
