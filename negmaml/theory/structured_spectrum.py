r"""Long spectra in short: a thousand or a million eigenvalues as a few hundred with multiplicities.

What the theory needs of a spectrum are sums over eigenvalues of smooth functions of log s. Sorted
into bins of equal width w in log s, the eigenvalues of a bin are replaced by the two nodes and
weights that have the same number, mean, variance and third moment: the error of a sum is w^4/4320
of its terms' fourth derivative, and bins with one or two eigenvalues stay as they are. Task
variances and offsets, of which means and slopes enter, keep their sum and mean in each bin.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

BINS = 64
# Spectra up to this length are taken as they are.
LONGEST = 128


class Eigenvalues(NamedTuple):
    """s, count, o, d, (k,), and weights, (J, k), as in `structured_equations.System`."""

    s: jax.Array
    count: jax.Array  # type: ignore[assignment]
    o: jax.Array
    d: jax.Array
    weights: jax.Array


def condensed(s, o, d, weights) -> Eigenvalues:
    """One or more eigenvalues in place of every few; eigenvalues of zero count as none."""
    positive = s > 0
    count = jnp.where(positive, jnp.ones_like(s), 0)
    unit = jnp.max(s)
    s = jnp.where(positive, s, jnp.where(unit > 0, unit, 1))
    o, d = jnp.where(positive, o, 0), jnp.where(positive, d, 0)
    if s.size <= LONGEST:
        return Eigenvalues(s, count, o, d, weights)
    return _two_nodes(s, count, o, d, weights)


def _two_nodes(s, count, o, d, weights) -> Eigenvalues:
    logs = lax.stop_gradient(jnp.log(s))
    low, high = jnp.min(logs), jnp.max(logs)
    width = jnp.maximum(high - low, jnp.finfo(s.dtype).eps) / BINS
    bins = jnp.clip(((logs - low) / width).astype(int), 0, BINS - 1)

    def total(values):
        return jnp.zeros((*values.shape[:-1], BINS), s.dtype).at[..., bins].add(values)

    n = total(count)
    some = jnp.where(n > 0, n, 1)
    center = jnp.where(n > 0, total(count * s) / some, unit_of(s))
    off = (s - center[bins]) / center[bins]
    variance, third = (total(count * off**j) / some for j in (2, 3))
    flat = variance < 1e-24
    safe = jnp.where(flat, 1, variance)
    tilt = third / safe / 2
    half = jnp.sqrt(safe + tilt**2)
    nodes = jnp.stack([tilt - half, tilt + half])
    share = jnp.stack([(half + tilt), (half - tilt)]) / (2 * half)
    nodes, share = jnp.where(flat, 0, nodes), jnp.where(flat, 0.5, share)

    def split(values):
        """Amounts on the two nodes with the sum and the mean of those on the eigenvalues."""
        amount, moment = total(values), total(values * off)
        gap = jnp.where(flat, 1, nodes[1] - nodes[0])
        upper = jnp.where(flat, 0.5 * amount, (moment - nodes[0] * amount) / gap)
        return jnp.concatenate([amount - upper, upper], -1)

    counts = (share * n).ravel()
    per = jnp.where(counts > 0, counts, 1)
    return Eigenvalues(
        (center * (1 + nodes)).ravel(),
        counts,
        split(count * o) / per,
        split(d),
        split(count * weights) / per,
    )


def unit_of(s):
    """A harmless eigenvalue where there is none."""
    return jnp.max(s)
