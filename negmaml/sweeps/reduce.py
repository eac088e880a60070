"""Statistics over seeds, which a sweep accumulates on the device instead of storing every cell.

The seeds are divided into chunks. A cell of the grid is then a point and a chunk, and its outputs
are the moments of the chunk: for each value of an output the number of its finite values, their
mean, the part of it that rounding left out (rest), the sum of their squared deviations from
it (m2), their minimum and their maximum. Far from zero the rounding errors of the means of chunks
can exceed their differences, so that the variance needs both parts. Stores hold these moments, so
they resume, extend and merge like all others. The moments of all chunks are merged in float64 on
the host, in ascending order of their first seeds.

Sets A and B with n = n_A + n_B values and d = mean_B - mean_A have together (Chan, Golub and
LeVeque 1979)

    mean = mean_A + d n_B / n,    m2 = m2_A + m2_B + d^2 n_A n_B / n.

A chunk is computed in tiles of `TILE` seeds. A tile is summed along a tree whose shape depends only
on the number of its seeds, and tiles are merged in order. So the order of all sums follows from the
seeds, and not from blocks, batches, devices or workers. Counts, minima and maxima never depend on
these. Means and deviations may differ in the last digit between batches of different shapes, since
a compiler may contract a product and a sum in one and not in the other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.checks import did_you_mean
from negmaml.sweeps import progressions
from negmaml.sweeps.functions import Output

TILE = 64  # seeds of a point that are computed at once
CHUNKS = 32  # chunks of the seeds of one call: units of resuming and of parallel work
MOMENTS = ("count", "mean", "rest", "m2", "min", "max")
STATISTICS = ("mean", "var", "std", "sem", "count", "min", "max")
QUANTILES = ("median", "quantile", "percentile")


@dataclass(frozen=True)
class Reduction:
    """The chunks of seeds: the i-th has the seeds from position bounds[i] to bounds[i + 1]."""

    seeds: range | tuple[int, ...]
    bounds: tuple[int, ...]

    @cached_property
    def firsts(self) -> range | tuple[int, ...]:
        """The first seed of each chunk, which names it in the grid of a store."""
        return progressions.compact([self.seeds[i] for i in self.bounds[:-1]])

    @cached_property
    def counts(self) -> np.ndarray:
        """The number of seeds of each chunk."""
        return np.diff(self.bounds).astype(np.int32)

    def chunks(self) -> list[range | tuple[int, ...]]:
        """The seeds of each chunk."""
        return [progressions.compact(self.seeds[a:b]) for a, b in pairwise(self.bounds)]

    def with_seeds(self, seeds: progressions.Values) -> "Reduction":
        """These chunks, and new ones of the seeds that are in none of them."""
        added = progressions.missing_from(self.seeds, seeds)
        return self.joined(reduction_of(added)) if added else self

    def joined(self, other: "Reduction") -> "Reduction":
        """The chunks of both; ValueError if different chunks share seeds."""
        own = dict(zip(self.firsts, self.chunks(), strict=True))
        new = [chunk for chunk in other.chunks() if own.get(chunk[0]) != chunk]
        added = new[0] if len(new) == 1 else tuple(seed for chunk in new for seed in chunk)
        if new and len(progressions.missing_from(self.seeds, added)) < len(added):
            raise ValueError(
                "statistics of some seeds cannot be taken out of, or added to, those that share "
                "seeds with them; ask for all seeds of the store, and maybe more"
            )
        bounds = self.bounds[-1] + np.cumsum([len(chunk) for chunk in new], dtype=int)
        seeds: Any = progressions.joined(self.seeds, progressions.compact(added))
        return Reduction(seeds, (*self.bounds, *bounds.tolist()))

    def to_json(self) -> dict[str, Any]:
        """The chunks as JSON."""
        return {"seeds": progressions.to_json(self.seeds), "bounds": self.bounds}

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> "Reduction":
        """The chunks in JSON; ValueError, TypeError or KeyError for invalid ones."""
        found = cls(progressions.from_json(held["seeds"]), tuple(held["bounds"]))
        bounds = found.bounds
        rising = all(type(n) is int for n in bounds) and all(a < b for a, b in pairwise(bounds))
        if not rising or bounds[:1] != (0,) or bounds[-1] != len(found.seeds):
            raise ValueError(f"bounds of the chunks of seeds cannot be {str(bounds)[:100]}")
        return found


def reduction_of(seeds: Sequence[int]) -> Reduction:
    """The chunks of some seeds: up to `CHUNKS`, as even as possible or of whole tiles."""
    whole = range(len(seeds))
    most = CHUNKS * TILE
    chunks = -(-len(whole) // TILE)
    size = TILE * -(-len(whole) // most) if len(whole) > most else -(-len(whole) // chunks)
    return Reduction(progressions.compact(seeds), (*whole[::size], len(whole)))


def parse_reduce(reduce: Any) -> tuple[str, ...]:
    """The statistics of reduce={"seed": [...]}; empty for None."""
    if reduce is None:
        return ()
    if not isinstance(reduce, Mapping):
        raise TypeError(
            f"reduce must be a dict such as {{'seed': ['mean', 'sem']}}, got {reduce!r}"
        )
    if list(reduce) != ["seed"]:
        raise ValueError(
            f"reduce has only the key 'seed', the dim of seeds, got {list(reduce)}; leave it out "
            "to keep every cell"
        )
    given = [reduce["seed"]] if isinstance(reduce["seed"], str) else reduce["seed"]
    if not isinstance(given, Sequence) or not given:
        raise TypeError(f"reduce['seed'] must list some of {', '.join(STATISTICS)}, got {given!r}")
    for name in given:
        if name in QUANTILES or (isinstance(name, str) and name.strip("pq").isdecimal()):
            raise ValueError(
                f"reduce: {name!r} needs all values at once, and a sweep keeps only moments; sweep "
                "without reduce, or have the function return the indicator of each threshold, "
                "whose mean is the share of seeds below it"
            )
        if name not in STATISTICS:
            close = did_you_mean(str(name), STATISTICS)
            raise ValueError(
                f"reduce: no statistic {name!r}{close}; known: {', '.join(STATISTICS)}"
            )
    return tuple(dict.fromkeys(given))


def moment_outputs(outputs: Sequence[Output]) -> tuple[Output, ...]:
    """The outputs of a cell that is a chunk; TypeError for complex ones."""
    found = []
    for output in outputs:
        if np.dtype(output.dtype).kind == "c":
            raise TypeError(
                f"reduce: output {output.name!r} is complex, which has no minimum; return its real "
                "and imaginary parts as two outputs"
            )
        for moment in MOMENTS:
            dtype = "int32" if moment == "count" else jnp.result_type(float).name
            found.append(replace(output, name=f"{output.name}_{moment}", dtype=dtype))
    return tuple(found)


def chunk_moments(evaluate: Callable[[jax.Array], dict], counts, longest: int) -> dict:
    """The moments of chunks of `counts` seeds, at most `longest`, and whether all are finite.

    evaluate(j), for j (T,), returns the outputs of the j-th seeds of every chunk: (chunks, T, ...).
    """
    width = min(TILE, longest)

    def tile(i):
        at = i * TILE + jnp.arange(width, dtype=jnp.int32)
        return _tile_moments(evaluate(at), at[None] < counts[:, None])

    if longest <= TILE:
        moments, finite = tile(jnp.int32(0))
    else:
        tiles = -(-jnp.max(counts) // TILE)

        def step(i, carry):
            moments, finite = tile(i)
            return jax.tree.map(_merge, carry[0], moments, is_leaf=_is_moments), carry[1] & finite

        shapes = jax.eval_shape(tile, jnp.int32(0))
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        none = {name: (*m[:4], m[4] + jnp.inf, m[5] - jnp.inf) for name, m in start[0].items()}
        moments, finite = lax.fori_loop(0, tiles, step, (none, ~start[1]))
    named: dict[str, jax.Array] = {}
    for name, (count, anchor, rest, *others) in moments.items():
        mean = anchor + rest
        parts = count, mean, (anchor - mean) + rest, *others
        named |= {f"{name}_{moment}": x for moment, x in zip(MOMENTS, parts, strict=True)}
    return named | {"finite": finite}


def _is_moments(leaf) -> bool:
    return isinstance(leaf, tuple)


def _tile_moments(out: Mapping[str, jax.Array], there) -> tuple[dict[str, tuple], jax.Array]:
    """The moments of each output over axis 1, where cells are there, and whether all are finite."""
    cells = jnp.sum(there, 1, dtype=jnp.int32)
    found, finite = {}, jnp.ones(cells.shape, bool)
    for name, values in out.items():
        x = values.astype(jnp.result_type(float))
        use = jnp.isfinite(x) & there.reshape(*there.shape, *[1] * (x.ndim - 2))
        # Missing values enter sums as zeros, which change nothing.
        count = _tree(jnp.add, use.astype(jnp.int32))
        n = jnp.maximum(count, 1).astype(x.dtype)
        # Sums of scaled values do not overflow; a power of two scales without rounding.
        mean = _tree(jnp.add, jnp.where(use, x / TILE, 0)) / (n / TILE)
        d = jnp.where(use, x - jnp.expand_dims(mean, 1), 0)
        # The mean of the deviations is the rounding error of the mean; it corrects both moments.
        error = _tree(jnp.add, d) / n
        m2 = _tree(jnp.add, jnp.where(use, d - jnp.expand_dims(error, 1), 0) ** 2)
        least = _tree(jnp.minimum, jnp.where(use, x, jnp.inf))
        most = _tree(jnp.maximum, jnp.where(use, x, -jnp.inf))
        found[name] = count, mean, error, m2, least, most
        whole = count == cells.reshape(-1, *[1] * (count.ndim - 1))
        finite &= jnp.all(whole, range(1, count.ndim))
    return found, finite


def _tree(combine, x):
    """The values along axis 1 combined in a tree: x_i with x_(i + half), within a tile.

    It fixes the order of sums, and takes a third of the time of XLA's reductions on a CPU.
    """
    half = TILE
    while x.shape[1] > 1:
        half //= 2
        n = x.shape[1]
        if n > half:
            pairs = combine(x[:, : n - half], x[:, half:])
            x = jnp.concatenate([pairs, x[:, n - half : half]], 1)
    return x[:, 0]


def _merge(a: tuple, b: tuple) -> tuple:
    """The moments of two disjoint sets together; the mean is the sum of the second and third."""
    count = a[0] + b[0]
    share = b[0] / jnp.maximum(count, 1).astype(a[1].dtype)
    # Zero where a set is empty: the squares of large means would give inf * 0.
    d = jnp.where(b[0] > 0, (b[1] - a[1]) + (b[2] - a[2]), 0)
    between = jnp.where(a[0] > 0, d, 0)
    return (
        count,
        # The first part stays, so that the second collects differences with little rounding.
        jnp.where(a[0] > 0, a[1], b[1]),
        jnp.where(a[0] > 0, a[2] + d * share, b[2]),
        a[3] + b[3] + between * between * (a[0].astype(share.dtype) * share),
        jnp.minimum(a[4], b[4]),
        jnp.maximum(a[5], b[5]),
    )


def statistics_of(dataset, sweep, names: Sequence[str] = STATISTICS):
    """The statistics in a dataset of moments; any other dataset as it is.

    sweep: the sweep or manifest of the dataset. names: the statistics to return.
    """
    return dataset if sweep.reduction is None else _merged(dataset, names or STATISTICS)


def _merged(moments, names: Sequence[str]):
    """The dataset of statistics of a dataset of moments, whose dim `seed` has the chunks."""
    moments = moments.load().sortby("seed")
    held = {str(name): array for name, array in moments.data_vars.items()}
    found = {}
    complete = held.get("completed", 1) > 0  # others may be written in part
    for output in [name.removesuffix("_m2") for name in held if name.endswith("_m2")]:
        count, *parts = (held[f"{output}_{moment}"] for moment in MOMENTS)
        parts = [count.where(complete, 0), *parts]
        for name, array in zip(STATISTICS, _statistics(*parts), strict=True):
            if name in names:
                dtype = np.int64 if name == "count" else parts[1].dtype
                found[f"{output}_{name}"] = array.astype(dtype)
    found["finite"] = held["finite"].all("seed")
    if "completed" in held:
        found["completed"] = held["completed"].min("seed")
    left = {name for name in moments.coords if "seed" not in moments[name].dims}
    return moments.drop_vars([*held, *(set(moments.coords) - left)]).assign(found)


def _statistics(count, mean, rest, m2, least, most):
    """The arrays of `STATISTICS`, from the moments of chunks along the dim `seed`."""
    zero = (0 * count.isel(seed=0, drop=True)).astype(float)
    total, center, spread = zero, zero, zero
    # One chunk after the other, so that the order of the sums is always the same.
    for i in range(count.sizes["seed"]):
        n, center_i, rest_i, spread_i = (
            array.isel(seed=i, drop=True).astype(float) for array in (count, mean, rest, m2)
        )
        d = (center_i + rest_i - center).where(n > 0, 0)
        share = n / np.maximum(total + n, 1)
        spread = spread + spread_i.where(n > 0, 0) + d * d * total * share
        center, total = center + d * share, total + n
    variance = (spread / np.maximum(total - 1, 1)).where(total > 1)
    deviation = np.sqrt(variance)
    some = total > 0
    least, most = (array.where(count > 0) for array in (least, most))
    bounds = least.min("seed").where(some), most.max("seed").where(some)
    return center.where(some), variance, deviation, deviation / np.sqrt(total), total, *bounds
