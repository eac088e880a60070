r"""Moments of a random-coefficient model from groups of unequal sizes.

    y_ij = x_ij . w_i + noise,    w_i of mean w0 and covariance Omega,    noise of variance sigma^2

Each group gives a shrunken fit, defined however few its rows (A = X^T X, c = X^T y, tau > 0):

    B = (A + tau)^-1 A,    d = (A + tau)^-1 c,    N = (A + tau)^-1 A (A + tau)^-1,
    E d = B w0,    Cov d = B Omega B + sigma^2 N.

With tau of the order of sigma^2 / Omega this weights groups as generalised least squares does. Then

    sigma^2:  residuals within groups, over their degrees of freedom; if groups have too few rows,
              the solution of  sum r^T r = tr(A Omega) + n sigma^2  along with that for Omega;
    w0:       sum B w0 = sum d;
    Omega:    sum (d - B w0)(d - B w0)^T = sum B Omega B + sigma^2 N, a linear system, times G/(G-1)
              for what w0 has taken up, and its negative eigenvalues set to zero.

With more than `FULL` coefficients Omega is taken to be diagonal: its p^2/2 entries would need
more groups than there are.
"""

from typing import NamedTuple

import numpy as np

from negmaml._core.checks import check_array, check_scalar

FULL = 8  # coefficients up to which Omega is a full matrix
FREEDOM = 0.1  # degrees of freedom a row from which sigma^2 is that of residuals within groups


class RandomCoefficients(NamedTuple):
    """What `random_coefficients` estimates; leading batch axes as in its input.

    mean: w0, (..., p).
    covariance: Omega, (..., p, p), positive semidefinite.
    noise_variance: sigma^2, (...,).
    """

    mean: np.ndarray
    covariance: np.ndarray
    noise_variance: np.ndarray


class Summaries(NamedTuple):
    """What a group adds to every sum of the head of this module.

    values: flat, (..., numbers), of targets from which x.pilot is subtracted.
    pilot: (p,), a first w0; what is left of it is small, so that its square may be approximated.
    """

    values: np.ndarray
    pilot: np.ndarray


def random_coefficients(gram, counts, tau=None) -> RandomCoefficients:
    """Moments from the Gram matrices of (x, y) of every group, one target.

    Arguments:
        gram: (G, p + 1, p + 1), sums over the rows of each group, the target last.
        counts: (G,), rows of each group.
        tau: the shrinkage of the fits; None takes sigma^2 p / tr Omega, found in three rounds.

    Raises TypeError or ValueError if there are fewer than 2 groups, for other shapes, NaN and
    infinity, counts that are not above 0, and a tau that is not above 0.
    """
    gram, counts = _checked(gram, counts)
    if tau is not None:
        check_array("tau", check_scalar("tau", tau, "a shrinkage"), "a shrinkage", 0, strict=True)
        return from_sums(summaries(gram, counts, tau, pooled_fit(gram)), None)
    tau = first_shrinkage(gram, counts)
    for _ in range(3):
        tau = next_shrinkage(random_coefficients(gram, counts, tau), gram, counts)
    return random_coefficients(gram, counts, tau)


def _checked(gram, counts):
    gram = np.asarray(check_array("gram", gram, "sums over rows"))
    if gram.ndim != 3 or len(gram) < 2 or gram.shape[1] != gram.shape[2] or gram.shape[1] < 2:
        raise ValueError(
            "gram must hold at least 2 groups, shape (groups, p + 1, p + 1), got shape "
            f"{gram.shape}; Omega is their spread"
        )
    counts = np.asarray(check_array("counts", counts, "rows of a group", 0, strict=True))
    if counts.shape != gram.shape[:1]:
        raise ValueError(f"counts must have shape ({len(gram)},) like gram, got {counts.shape}")
    return gram, counts


def pooled_fit(gram):
    """Least squares over all rows of all groups: (p,)."""
    total = gram.reshape(-1, *gram.shape[-2:]).sum(0)
    return _solve(total[:-1, :-1], total[:-1, -1])


def first_shrinkage(gram, counts) -> float:
    """The mean eigenvalue of a group's A; ten times that where residuals within groups are few.

    Then sigma^2 and Omega are told apart by pairs of rows, of which little is left in B and d if
    tau is small.
    """
    p = gram.shape[-1] - 1
    mean = float(np.trace(gram[..., :p, :p], axis1=-2, axis2=-1).mean()) / p
    return mean if _has_freedom(counts, p) else 10 * mean


def next_shrinkage(found: RandomCoefficients, gram, counts) -> float:
    """sigma^2 over the mean eigenvalue of Omega, within a factor of 30 of `first_shrinkage`."""
    first = first_shrinkage(gram, counts)
    spread = float(np.trace(found.covariance)) / len(found.mean)
    ratio = float(found.noise_variance) / spread if spread > 0 else np.inf
    lowest = first / 30 if _has_freedom(counts, len(found.mean)) else first
    return float(np.clip(ratio, lowest, first * 30))


def _has_freedom(counts, p) -> bool:
    return float(np.maximum(counts - p, 0).sum()) >= FREEDOM * float(np.sum(counts))


def summaries(gram, counts, tau: float, pilot) -> Summaries:
    """The contribution of each group; sums over groups go to `from_sums`."""
    p = gram.shape[-1] - 1
    change = np.eye(p + 1)
    change[:p, p] = -pilot
    gram = change.T @ gram @ change
    counts = np.broadcast_to(counts, gram.shape[:-2]).astype(float)
    A, c, square = gram[..., :p, :p], gram[..., :p, p], gram[..., p, p]
    values, vectors = np.linalg.eigh(A)
    values = np.maximum(values, 0)
    rank = values > 1e-9 * values[..., -1:]
    turned = np.einsum("...pk,...p->...k", vectors, c)
    explained = np.sum(np.where(rank, turned**2 / np.where(rank, values, 1), 0), -1)
    freedom = counts - rank.sum(-1)
    within = np.where(freedom > 0, np.maximum(square - explained, 0), 0)

    def matrix(f):
        return np.einsum("...pk,...k,...qk->...pq", vectors, f, vectors)

    B, N = matrix(values / (values + tau)), matrix(values / (values + tau) ** 2)
    d = np.einsum("...pk,...k->...p", vectors, turned / (values + tau))
    if p <= FULL:
        # vec of (d - B w) (d - B w)^T needs d d^T, d B and B B: all products of rows with rows
        pairs = "...ij,...kl->...ikjl"
    else:
        pairs = "...ij,...ij->...ij"
        N = np.einsum("...ii->...i", N)
    parts = [
        np.stack([np.ones_like(counts), counts, within, freedom, square], -1),
        c, A, d, B, N,
        _square(d, p), _cross(d, B, p), np.einsum(pairs, B, B),
    ]  # fmt: skip
    lead = gram.shape[:-2]
    return Summaries(np.concatenate([part.reshape(*lead, -1) for part in parts], -1), pilot)


def _square(d, p):
    return np.einsum("...i,...k->...ik", d, d) if p <= FULL else d**2


def _cross(d, B, p):
    return np.einsum("...i,...kl->...ikl", d, B) if p <= FULL else d[..., :, None] * B


def from_sums(groups: Summaries, select) -> RandomCoefficients:
    """The estimates from the sums over groups.

    Arguments:
        groups: of `summaries`, (G, numbers).
        select: a matrix (S, G) of how often each group counts in each of S estimates; None for one
            estimate from all.
    """
    p = len(groups.pilot)
    sums = groups.values.sum(0) if select is None else select @ groups.values
    lead = sums.shape[:-1]
    full = p <= FULL
    o = p * p if full else p
    shapes = [(5,), (p,), (p, p), (p,), (p, p), (p, p) if full else (p,), (o,)]
    shapes += [(p, p, p) if full else (p, p), (o, o) if full else (p, p)]
    parts, start = [], 0
    for shape in shapes:
        size = int(np.prod(shape))
        parts.append(sums[..., start : start + size].reshape(*lead, *shape))
        start += size
    scalars, c, A, d, B, N, dd, dB, BB = parts
    count, rows, within, freedom, square = np.moveaxis(scalars, -1, 0)
    w0 = _solve(B, d)
    if full:
        mixed = np.einsum("...ikl,...l->...ik", dB, w0)
        outer = np.einsum("...i,...j->...ij", w0, w0).reshape(*lead, o)
        seen = dd.reshape(*lead, p, p) - mixed - np.swapaxes(mixed, -1, -2)
        seen = seen.reshape(*lead, o) + np.einsum("...ij,...j->...i", BB, outer)
    else:
        seen = dd - 2 * np.einsum("...ij,...j->...i", dB, w0)
        seen = seen + np.einsum("...ij,...j->...i", BB, w0**2)  # without products of two slopes
    correction = count / np.maximum(count - 1, 1)
    by_spread = _solve(BB, seen) * correction[..., None]
    by_noise = _solve(BB, N.reshape(*lead, o))
    weight = (A if full else np.einsum("...ii->...i", A)).reshape(*lead, o)
    left = square - 2 * np.sum(c * w0, -1) + np.einsum("...i,...ij,...j->...", w0, A, w0)
    joint = left - np.sum(weight * by_spread, -1)
    joint = joint / np.maximum(rows - np.sum(weight * by_noise, -1), 1e-9 * rows)
    inside = within / np.maximum(freedom, 1)
    noise = np.where(
        freedom >= FREEDOM * rows, inside, np.clip(joint, 1e-6 * left / rows, left / rows)
    )
    omega = by_spread - noise[..., None] * by_noise
    omega = omega.reshape(*lead, p, p) if full else omega[..., None] * np.eye(p)
    return RandomCoefficients(groups.pilot + w0, _semidefinite(omega), noise)


def _solve(matrix, right):
    """Batched solution, with a floor for directions that no group has."""
    n = matrix.shape[-1]
    floor = 1e-9 * np.trace(matrix, axis1=-2, axis2=-1)[..., None, None] / n + np.finfo(float).tiny
    return np.linalg.solve(matrix + floor * np.eye(n), right[..., None])[..., 0]


def _semidefinite(matrix):
    """The nearest positive semidefinite matrix."""
    values, vectors = np.linalg.eigh((matrix + np.swapaxes(matrix, -1, -2)) / 2)
    return np.einsum("...pk,...k,...qk->...pq", vectors, np.maximum(values, 0), vectors)
