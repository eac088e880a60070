"""Solves batches of small symmetric systems, each for many ridges."""

from contextlib import nullcontext

import numpy as np

# Up to this size a Cholesky factorization vectorized over the batch is faster than a LAPACK call
# per system: 10 ridges of 4 x 4 in 1.4 against 4.4 microseconds, of 16 x 16 in 32 against 33.
MAX_VECTORIZED = 16
FLOOR = 1e-10  # of the mean diagonal, added to it: then zero ridge gives the least norm
BATCH = 4096  # systems that fit the cache


def single_blas_thread():
    """Context in which BLAS uses one thread, if threadpoolctl is installed.

    For systems of 33 equations a second thread costs more than it gains, and up to a hundred
    times more when other jobs compete for the cores.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:  # threadpoolctl is installed with scikit-learn
        return nullcontext()
    return threadpool_limits(1, user_api="blas")


def ridge_path(G, b, ridges, num_unpenalized: int = 0):
    """Solve (G + ridge D) z = b for every system and every ridge.

    D is the identity, but with zeros in its first `num_unpenalized` entries (the intercept).

    Arguments:
        G: (B, p, p), symmetric positive semidefinite.
        b: (B, p, q).
        ridges: (L,), each at least 0.

    Returns (B, L, p, q). A singular system without ridge gets its solution of least norm, up to a
    relative error of 1e-10.
    """
    p = G.shape[-1]
    floor = FLOOR * np.trace(G, axis1=-2, axis2=-1) / p + np.finfo(float).tiny
    method = _by_cholesky if p <= MAX_VECTORIZED else _by_eigenvalues
    return method(G, b, np.asarray(ridges), num_unpenalized, floor)


def _by_cholesky(G, b, ridges, num_unpenalized, floor):
    size, p, q = b.shape
    out = np.empty((size, len(ridges), p, q))
    penalized = np.arange(num_unpenalized, p)
    step = max(1, BATCH // len(ridges))
    for start in range(0, size, step):
        piece = slice(start, start + step)
        count = len(G[piece])
        # Batch last: every step of the factorization then runs over contiguous memory.
        system = np.repeat(np.moveaxis(G[piece], 0, -1), len(ridges), -1)
        system[range(p), range(p)] += np.repeat(floor[piece], len(ridges))
        system[penalized, penalized] += np.tile(ridges, count)
        right = np.repeat(np.moveaxis(b[piece], 0, -1), len(ridges), -1)
        solved = cholesky_solve(system, right)
        out[piece] = np.moveaxis(solved, -1, 0).reshape(count, len(ridges), p, q)
    return out


def cholesky_solve(G, b):
    """Return G^-1 b, with the batch last: G (p, p, B), which is overwritten, and b (p, q, B)."""
    p = len(G)
    z = b.copy()
    for j in range(p):
        if j:
            G[j:, j] -= np.einsum("ikb,kb->ib", G[j:, :j], G[j, :j])
            z[j] -= np.einsum("kb,kqb->qb", G[j, :j], z[:j])
        inverse = 1 / np.sqrt(G[j, j])
        G[j:, j] *= inverse
        G[j, j] = inverse  # later steps only divide by the diagonal
        z[j] *= inverse
    for j in reversed(range(p)):
        z[j] -= np.einsum("kb,kqb->qb", G[j + 1 :, j], z[j + 1 :])
        z[j] *= G[j, j]
    return z


def _by_eigenvalues(G, b, ridges, num_unpenalized, floor):
    """Solve for all ridges by one eigendecomposition, after eliminating unpenalized coordinates."""
    if k := num_unpenalized:
        # Block elimination: the Schur complement of the unpenalized block carries the ridge.
        head, side, rest = G[:, :k, :k], G[:, k:, :k], G[:, k:, k:]
        head = head + floor[:, None, None] * np.eye(k)
        across = np.linalg.solve(head, np.concatenate([np.swapaxes(side, 1, 2), b[:, :k]], 2))
        to_rest, start = across[..., : -b.shape[2]], across[..., -b.shape[2] :]
        tail = _by_eigenvalues(rest - side @ to_rest, b[:, k:] - side @ start, ridges, 0, floor)
        first = start[:, None] - np.einsum("bfp,blpq->blfq", to_rest, tail)
        return np.concatenate([first, tail], 2)
    values, vectors = np.linalg.eigh(G)
    values = np.maximum(values, 0) + floor[:, None]
    rotated = np.swapaxes(vectors, 1, 2) @ b
    scaled = rotated[:, None] / (values[:, None] + ridges[:, None])[..., None]
    return vectors[:, None] @ scaled
