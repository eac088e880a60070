r"""Moments of a random-coefficient model from groups of unequal sizes.

    y_ij = x_ij . w_i + noise,    w_i of mean w0 and covariance Omega,    noise of variance sigma^2

Each group gives a ridge fit d, defined for any number of rows (A = X^T X, c = X^T y, tau > 0):

    B = (A + tau)^-1 A,    d = (A + tau)^-1 c,    N = (A + tau)^-1 A (A + tau)^-1,        (1)
    E d = B w0,    Cov d = B Omega B + sigma^2 N.                                         (2)

With tau of the order of sigma^2 / Omega this weights groups as generalized least squares does. The
estimates solve

    sum B w0 = sum d,                                                                     (3)
    sum (d - B w0)(d - B w0)^T = sum B Omega B + sigma^2 N,                               (4)

with sums over G groups. The left side of (4) is multiplied by G/(G-1), since w0 is fitted, and
negative eigenvalues of Omega are set to zero. sigma^2 is the sum of squared residuals within
groups over their degrees of freedom. If groups have too few rows for that, it solves

    sum r^T r = tr(A Omega) + n sigma^2,    r = y - X w0                                  (5)

together with (4). With more than `MAX_FULL` coefficients Omega is taken to be diagonal, since its
p^2/2 entries would need more groups than are usual.

A structure restricts Omega to sum_k t_k S_k, with few parameters t where groups are few. Then (4)
holds in its products with every S_k, and sigma^2 solves (5): it includes what Omega cannot
represent.
"""

from typing import NamedTuple

import numpy as np

from negmaml._core.calls import explain_calls
from negmaml._core.checks import check_array, check_choice, check_scalar
from negmaml._core.display import add_fields_repr
from negmaml._core.types import ArrayLike

STRUCTURES = ("intercept", "equal", "full")  # of Omega, from few parameters to many
MAX_FULL = 8  # coefficients up to which Omega is a full matrix
MIN_FREEDOM = 0.1  # degrees of freedom a row, from which residuals within groups give sigma^2


@add_fields_repr
class RandomCoefficients(NamedTuple):
    """Moments of the coefficients of groups, as estimated by `random_coefficients`.

    Attributes:
        mean: w0, (..., p).
        covariance: Omega, (..., p, p), positive semidefinite.
        noise_variance: sigma^2, (...,).

    >>> import negmaml as nm
    >>> rows = np.random.default_rng(0).normal(size=(50, 10, 3))  # x of two features, and y
    >>> found = nm.advice.random_coefficients(np.swapaxes(rows, 1, 2) @ rows, np.full(50, 10))
    >>> found.mean.shape, found.covariance.shape, bool(found.noise_variance > 0)
    ((2,), (2, 2), True)
    """

    mean: np.ndarray
    covariance: np.ndarray
    noise_variance: np.ndarray


class GroupSummaries(NamedTuple):
    """The contributions of each group to the sums of equations (3) to (5).

    values: all contributions side by side, (..., numbers), with targets y - x.pilot.
    pilot: (p,), a first estimate of w0. The rest of w0 is small, so its square may be approximated.
    """

    values: np.ndarray
    pilot: np.ndarray


@explain_calls
def random_coefficients(
    gram: ArrayLike, counts: ArrayLike, tau: float | None = None, *, structure: str = "full"
) -> RandomCoefficients:
    """Estimate the moments of the coefficients of groups, from their Gram matrices of (x, y).

        y_ij = x_ij . w_i + noise,    w_i of mean w0 and covariance Omega

    Arguments:
        gram: (G, p + 1, p + 1), sums over the rows of each group, the target last.
        counts: (G,), rows of each group.
        tau: the ridge of the fits; None takes sigma^2 p / tr Omega, found in three iterations.
        structure: "full": any Omega, diagonal for more than 8 coefficients. "intercept": only the
            first coefficient varies between groups. "equal": the first one has a variance of its
            own, the others have equal variances in units of the features' standard deviations.

    Returns `RandomCoefficients`, for one target; the head of this module has the equations. Raises
    TypeError or ValueError for fewer than 2 groups, wrong shapes, NaN and infinity, for
    counts or a tau that are not above 0, and for an unknown structure.

    >>> import negmaml as nm
    >>> random = np.random.default_rng(0)
    >>> X, w = random.normal(size=(500, 10, 2)), 1 + random.normal(size=(500, 2))
    >>> y = np.einsum("gnp,gp->gn", X, w) + 0.5 * random.normal(size=(500, 10))
    >>> rows = np.concatenate([X, y[..., None]], -1)
    >>> found = nm.advice.random_coefficients(np.swapaxes(rows, 1, 2) @ rows, np.full(500, 10))
    >>> bool(abs(found.mean - 1).max() < 0.2), bool(abs(found.noise_variance - 0.5**2) < 0.02)
    (True, True)
    """
    check_choice("structure", structure, STRUCTURES)
    gram, counts = _checked(gram, counts)
    if tau is not None:
        check_array("tau", check_scalar("tau", tau, "a shrinkage"), "a shrinkage", 0, strict=True)
        groups = summarize_groups(gram, counts, tau, pooled_fit(gram))
        return estimate_from_sums(groups, None, structure_basis(structure, gram, counts))
    tau = initial_shrinkage(gram, counts)
    # The estimates depend weakly on tau, so three rounds are enough.
    for _ in range(3):
        found = random_coefficients(gram, counts, tau, structure=structure)
        tau = updated_shrinkage(found, gram, counts)
    return random_coefficients(gram, counts, tau, structure=structure)


def structure_basis(structure: str, gram, counts) -> np.ndarray | None:
    """The matrices S_k of a structure as columns, (p^2, k) or (p, k); None if it is "full"."""
    if structure == "full":
        return None
    p = gram.shape[-1] - 1
    diagonals = np.zeros((p, 1 if structure == "intercept" or p == 1 else 2))
    diagonals[0, 0] = 1.0
    if diagonals.shape[1] == 2:
        total = gram.reshape(-1, *gram.shape[-2:]).mean(0) / np.mean(counts)
        # The first coefficient belongs to the constant, if there is one, which has no deviation.
        means = total[0, 1:p] if np.isclose(total[0, 0], 1) else 0.0
        variances = np.diagonal(total)[1:p] - means**2
        diagonals[1:, 1] = np.where(variances > 0, 1 / np.where(variances > 0, variances, 1), 0)
    if p > MAX_FULL:
        return diagonals
    return (diagonals[:, None] * np.eye(p)[..., None]).reshape(p * p, -1)


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
    """Least-squares coefficients over all rows of all groups: (p,)."""
    total = gram.reshape(-1, *gram.shape[-2:]).sum(0)
    return _solve(total[:-1, :-1], total[:-1, -1])


def initial_shrinkage(gram, counts) -> float:
    """The mean eigenvalue of a group's A, or ten times that if few degrees of freedom are left.

    In the second case only pairs of rows separate sigma^2 from Omega. A small tau would remove
    that information from B and d.
    """
    p = gram.shape[-1] - 1
    mean = float(np.trace(gram[..., :p, :p], axis1=-2, axis2=-1).mean()) / p
    return mean if _has_freedom(counts, p) else 10 * mean


def updated_shrinkage(found: RandomCoefficients, gram, counts) -> float:
    """sigma^2 over the mean eigenvalue of Omega, within a factor of 30 of `initial_shrinkage`."""
    initial = initial_shrinkage(gram, counts)
    variance = float(np.trace(found.covariance)) / len(found.mean)
    ratio = float(found.noise_variance) / variance if variance > 0 else np.inf
    lowest = initial / 30 if _has_freedom(counts, len(found.mean)) else initial
    return float(np.clip(ratio, lowest, initial * 30))


def _has_freedom(counts, p) -> bool:
    """True if residuals within groups have enough degrees of freedom to estimate sigma^2."""
    return float(np.maximum(counts - p, 0).sum()) >= MIN_FREEDOM * float(np.sum(counts))


def summarize_groups(gram, counts, tau: float, pilot) -> GroupSummaries:
    """Compute the contributions of each group, whose sums `estimate_from_sums` takes."""
    p = gram.shape[-1] - 1
    # Labels less a first fit: the expanded left side of (4) would cancel for a large common w0.
    shift = np.eye(p + 1)  # (x, y) to (x, y - x.pilot)
    shift[:p, p] = -pilot
    gram = shift.T @ gram @ shift
    counts = np.broadcast_to(counts, gram.shape[:-2]).astype(float)
    A, c, square = gram[..., :p, :p], gram[..., :p, p], gram[..., p, p]
    values, vectors = np.linalg.eigh(A)
    values = np.maximum(values, 0)
    rank = values > 1e-9 * values[..., -1:]  # smaller eigenvalues are rounding errors
    rotated = np.einsum("...pk,...p->...k", vectors, c)
    explained = np.sum(np.where(rank, rotated**2 / np.where(rank, values, 1), 0), -1)
    freedom = counts - rank.sum(-1)
    # Squared residuals of the least-squares fit within the group.
    within = np.where(freedom > 0, np.maximum(square - explained, 0), 0)

    def matrix(f):  # the function of A with eigenvalues f
        return np.einsum("...pk,...k,...qk->...pq", vectors, f, vectors)

    B, N = matrix(values / (values + tau)), matrix(values / (values + tau) ** 2)
    d = np.einsum("...pk,...k->...p", vectors, rotated / (values + tau))
    if p <= MAX_FULL:
        # (d - B w) (d - B w)^T needs the products of all entries of d and B with each other.
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
    return GroupSummaries(np.concatenate([part.reshape(*lead, -1) for part in parts], -1), pilot)


def _square(d, p):
    return np.einsum("...i,...k->...ik", d, d) if p <= MAX_FULL else d**2


def _cross(d, B, p):
    return np.einsum("...i,...kl->...ikl", d, B) if p <= MAX_FULL else d[..., :, None] * B


def estimate_from_sums(groups: GroupSummaries, select, basis=None) -> RandomCoefficients:
    """Solve equations (3) to (5) for the moments.

    Arguments:
        groups: contributions of G groups, (G, numbers).
        select: (S, G), how often each group counts in each of S estimates; None for one estimate
            from all groups.
        basis: of `structure_basis`.
    """
    p = len(groups.pilot)
    sums = groups.values.sum(0) if select is None else select @ groups.values
    lead = sums.shape[:-1]
    full = p <= MAX_FULL
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
    w0 = _solve(B, d)  # equation (3)
    if full:
        mixed = np.einsum("...ikl,...l->...ik", dB, w0)
        outer = np.einsum("...i,...j->...ij", w0, w0).reshape(*lead, o)
        left_side = dd.reshape(*lead, p, p) - mixed - np.swapaxes(mixed, -1, -2)
        left_side = left_side.reshape(*lead, o) + np.einsum("...ij,...j->...i", BB, outer)
    else:
        left_side = dd - 2 * np.einsum("...ij,...j->...i", dB, w0)
        # Products of different entries of w0 are left out: beside the pilot they are small.
        left_side = left_side + np.einsum("...ij,...j->...i", BB, w0**2)
    correction = count / np.maximum(count - 1, 1)
    without_noise = _within(basis, BB, left_side) * correction[..., None]
    per_noise = _within(basis, BB, N.reshape(*lead, o))
    weight = (A if full else np.einsum("...ii->...i", A)).reshape(*lead, o)
    residual = square - 2 * np.sum(c * w0, -1) + np.einsum("...i,...ij,...j->...", w0, A, w0)
    # Rounding may leave less than zero where the fit is exact.
    residual = np.maximum(residual, 1e-12 * np.maximum(square, 0))
    # Equation (5), with Omega = without_noise - sigma^2 per_noise from (4).
    joint = residual - np.sum(weight * without_noise, -1)
    joint = joint / np.maximum(rows - np.sum(weight * per_noise, -1), 1e-9 * rows)
    joint = np.clip(joint, 1e-6 * residual / rows, residual / rows)
    enough = (freedom >= MIN_FREEDOM * rows) & (basis is None)
    noise = np.where(enough, within / np.maximum(freedom, 1), joint)
    omega = without_noise - noise[..., None] * per_noise  # equation (4)
    omega = omega.reshape(*lead, p, p) if full else omega[..., None] * np.eye(p)
    return RandomCoefficients(groups.pilot + w0, _semidefinite(omega), noise)


def _within(basis, matrix, right):
    """Solve matrix z = right for z = basis t, in the products with the columns of the basis."""
    if basis is None:
        return _solve(matrix, right)
    return _solve(basis.T @ matrix @ basis, right @ basis) @ basis.T


def _solve(matrix, right):
    """Solve batched systems, with a floor on eigenvalues for directions that no group spans."""
    n = matrix.shape[-1]
    floor = 1e-9 * np.trace(matrix, axis1=-2, axis2=-1)[..., None, None] / n + np.finfo(float).tiny
    return np.linalg.solve(matrix + floor * np.eye(n), right[..., None])[..., 0]


def _semidefinite(matrix):
    """Return the nearest positive semidefinite matrix."""
    values, vectors = np.linalg.eigh((matrix + np.swapaxes(matrix, -1, -2)) / 2)
    return np.einsum("...pk,...k,...qk->...pq", vectors, np.maximum(values, 0), vectors)
