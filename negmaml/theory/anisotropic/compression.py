r"""Long spectra in short: a thousand or a million eigenvalues as a few hundred with multiplicities.

What the theory needs of a spectrum are sums over eigenvalues of smooth functions of log s. Sorted
into bins of equal width w in log s, the eigenvalues of a bin are replaced by the two nodes and
weights that have the same number, mean, variance and third moment: the error of a sum is w^4/4320
of its terms' fourth derivative, and bins with one or two eigenvalues stay as they are. Task
variances and offsets, of which means and slopes enter, keep their sum and mean in each bin.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import frozen, namespace

BINS = 64
# Spectra up to this length are taken as they are.
LONGEST = 128
# Shorter ones are filled up to powers of two from here.
SHORTEST = 32


class Eigenvalues(NamedTuple):
    """As in `equations.PencilSystem`, with s falling, and the ranges of `FourthMoments` or None."""

    s: Any
    count: Any  # type: ignore[assignment]
    o: Any
    d: Any
    weights: Any
    ranges: Any = None


def compress(s, o, d, weights, ranges=None) -> Eigenvalues:
    """One or more eigenvalues in place of every few; eigenvalues of zero count as none.

    Of NumPy's arrays on the host. Spectra are filled up with zeros, so that one program serves many
    p.
    """
    xp = namespace(s, o, d, weights, ranges)
    longer = max(SHORTEST, 2 ** math.ceil(math.log2(s.size))) - s.size if s.size <= LONGEST else 0
    if longer:
        s, o, d, weights, ranges = (
            None if x is None else xp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, longer)])
            for x in (s, o, d, weights, ranges)
        )
    positive = s > 0
    count = xp.where(positive, xp.ones_like(s), 0)
    unit = xp.max(s)
    s = xp.where(positive, s, xp.where(unit > 0, unit, 1))
    o, d = xp.where(positive, o, 0), xp.where(positive, d, 0)
    short = Eigenvalues(s, count, o, d, weights, ranges)
    return _falling(xp, short if s.size <= LONGEST else _two_nodes(xp, *short))


def _falling(xp, found: Eigenvalues) -> Eigenvalues:
    """The largest first, eigenvalues of zero last."""
    order = xp.argsort(frozen(xp.where(found.count > 0, -found.s, 0)))
    return Eigenvalues(*(None if x is None else x[..., order] for x in found))


def _two_nodes(xp, s, count, o, d, weights, ranges) -> Eigenvalues:
    logs = frozen(xp.log(s))
    low, high = xp.min(logs), xp.max(logs)
    width = xp.maximum(high - low, np.finfo(s.dtype).eps) / BINS
    bins = xp.clip(((logs - low) / width).astype(int), 0, BINS - 1)

    def total(values):
        if xp is np:
            rows = values.reshape(-1, s.size)
            found = np.stack([np.bincount(bins, row, BINS) for row in rows])
            return found.reshape(*values.shape[:-1], BINS)
        return jnp.zeros((*values.shape[:-1], BINS), s.dtype).at[..., bins].add(values)

    n = total(count)
    some = xp.where(n > 0, n, 1)
    center = xp.where(n > 0, total(count * s) / some, xp.max(s))  # or a harmless one
    off = (s - center[bins]) / center[bins]
    square = count * off * off
    variance, third = total(xp.stack([square, square * off])) / some
    flat = variance < 1e-24
    safe = xp.where(flat, 1, variance)
    tilt = third / safe / 2
    half = xp.sqrt(safe + tilt**2)
    nodes = xp.stack([tilt - half, tilt + half])
    share = xp.stack([(half + tilt), (half - tilt)]) / (2 * half)
    nodes, share = xp.where(flat, 0, nodes), xp.where(flat, np.array([[1], [0]], s.dtype), share)

    # Amounts on the two nodes with the sum and the mean of those on the eigenvalues.
    J, both = len(weights), [weights] if ranges is None else [weights, ranges]
    amounts = xp.concatenate([xp.stack([count * o, d]), *(count * x for x in both)])
    amount, moment = total(xp.stack([amounts, amounts * off]))
    gap = xp.where(flat, 1, nodes[1] - nodes[0])
    upper = xp.where(flat, 0, (moment - nodes[0] * amount) / gap)
    o, d, *means = xp.concatenate([amount - upper, upper], -1)

    counts = (share * n).ravel()
    per = xp.where(counts > 0, counts, 1)
    weights = xp.stack(means[:J]) / per
    ranges = None if ranges is None else xp.stack(means[J:]) / per
    return Eigenvalues((center * (1 + nodes)).ravel(), counts, o / per, d, weights, ranges)
