r"""Compression of long spectra: a million eigenvalues as a few hundred with multiplicities.

The theory needs sums over eigenvalues of smooth functions of log s. Eigenvalues are sorted into
bins of equal width w in log s, and those of a bin are replaced by the two nodes and weights with
the same number, mean, variance and third moment. The error of a sum is w^4/4320 times the fourth
derivative of its terms, and bins with one or two eigenvalues are exact. Task variances and offsets,
of which means and slopes enter, keep their sum and mean in each bin.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import namespace, stop_gradient

BINS = 64
# Spectra up to this length are not compressed.
MAX_UNCOMPRESSED = 128
# Those are padded to powers of two from here on, so that one program serves many p.
MIN_PADDED = 32


class Eigenvalues(NamedTuple):
    """s in falling order and the rest as in `PencilSystem`; bin_weights of `FourthMoments` or None.

    Eigenvalues of zero have the count zero and stand last.
    """

    s: Any
    count: Any  # type: ignore[assignment]
    o: Any
    d: Any
    weights: Any
    bin_weights: Any = None


def compress(s, o, d, weights, bin_weights=None) -> Eigenvalues:
    """Return the distinct values of a spectrum with their counts; known arrays stay on the host."""
    xp = namespace(s, o, d, weights, bin_weights)
    long = s.size > MAX_UNCOMPRESSED
    more = 0 if long else max(MIN_PADDED, 2 ** math.ceil(math.log2(s.size))) - s.size
    if more:
        s, o, d, weights, bin_weights = (
            None if x is None else xp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])
            for x in (s, o, d, weights, bin_weights)
        )
    positive = s > 0
    count = xp.where(positive, xp.ones_like(s), 0)
    unit = xp.max(s)
    # In place of zeros any positive value does: their count is zero.
    s = xp.where(positive, s, xp.where(unit > 0, unit, 1))
    o, d = xp.where(positive, o, 0), xp.where(positive, d, 0)
    found = Eigenvalues(s, count, o, d, weights, bin_weights)
    return _sort_descending(xp, _two_point_quadrature(xp, *found) if long else found)


def _sort_descending(xp, found: Eigenvalues) -> Eigenvalues:
    order = xp.argsort(stop_gradient(xp.where(found.count > 0, -found.s, 0)))
    return Eigenvalues(*(None if x is None else x[..., order] for x in found))


def _two_point_quadrature(xp, s, count, o, d, weights, bin_weights) -> Eigenvalues:
    """Return two nodes for each bin, as the head of this module says."""
    logs = stop_gradient(xp.log(s))
    low, high = xp.min(logs), xp.max(logs)
    width = xp.maximum(high - low, np.finfo(s.dtype).eps) / BINS
    bins = xp.clip(((logs - low) / width).astype(int), 0, BINS - 1)

    def total(values):
        """Return the sums of values over each bin."""
        if xp is np:
            rows = values.reshape(-1, s.size)
            found = np.stack([np.bincount(bins, row, BINS) for row in rows])
            return found.reshape(*values.shape[:-1], BINS)
        return jnp.zeros((*values.shape[:-1], BINS), s.dtype).at[..., bins].add(values)

    n = total(count)
    some = xp.where(n > 0, n, 1)
    center = xp.where(n > 0, total(count * s) / some, xp.max(s))  # any value does for an empty bin
    off = (s - center[bins]) / center[bins]
    square = count * off * off
    variance, third = total(xp.stack([square, square * off])) / some
    # Nodes at tilt -+ half with these weights have the mean zero and the two moments.
    flat = variance < 1e-24
    safe = xp.where(flat, 1, variance)
    tilt = third / safe / 2
    half = xp.sqrt(safe + tilt**2)
    nodes = xp.stack([tilt - half, tilt + half])
    share = xp.stack([(half + tilt), (half - tilt)]) / (2 * half)
    nodes, share = xp.where(flat, 0, nodes), xp.where(flat, np.array([[1], [0]], s.dtype), share)

    # Amounts on the two nodes with the sum and the mean of those on the eigenvalues.
    J, both = len(weights), [weights] if bin_weights is None else [weights, bin_weights]
    amounts = xp.concatenate([xp.stack([count * o, d]), *(count * x for x in both)])
    amount, moment = total(xp.stack([amounts, amounts * off]))
    gap = xp.where(flat, 1, nodes[1] - nodes[0])
    upper = xp.where(flat, 0, (moment - nodes[0] * amount) / gap)
    o, d, *means = xp.concatenate([amount - upper, upper], -1)

    counts = (share * n).ravel()
    per = xp.where(counts > 0, counts, 1)
    weights = xp.stack(means[:J]) / per
    bin_weights = None if bin_weights is None else xp.stack(means[J:]) / per
    return Eigenvalues((center * (1 + nodes)).ravel(), counts, o / per, d, weights, bin_weights)
