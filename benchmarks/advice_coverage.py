"""Coverage of the 95% intervals of advice, and its decisions, on groups of known truth.

python benchmarks/advice_coverage.py [POPULATION ...] --sets 40

Each population gives sets of groups to advise on, and a pool of 1500 groups on which every method
is evaluated with m random training groups. The truth of a difference is that of the pool, at the
rates, ridges and structures that the advice chose: the mean over new groups and over training
groups. Regret is the loss of the recommended method over the least loss in the pool.
"""

from collections.abc import Callable
from typing import NamedTuple

import harness
import jax
import numpy as np

import negmaml as nm
from negmaml.advice.cv import CVLosses
from negmaml.advice.data import drop_small_groups, group_rows
from negmaml.advice.evaluation import CrossEvaluation, Sizes
from negmaml.advice.methods import META, METHODS, POOLED, RANKED, SINGLE, ZERO
from negmaml.advice.selection import ALL, RateGrid, losses_of
from negmaml.advice.splits import cross_validation
from negmaml.advice.statistics import quadratic_forms

RATES = np.sort(np.array([0.0, *(s * a for a in (0.1, 0.2, 0.35, 0.5, 0.7, 1.0) for s in (-1, 1))]))
POOL, POOL_SPLITS = 1500, 150
RATES_GAIN = "meta-learning over a zero inner rate"


class Population(NamedTuple):
    """Groups with coefficients of a mean and deviations, and their rows.

    mean, deviations: (p + 1,), the constant first.
    rows: of a group, (least, most).
    sizes: n_t, n_v and n_r.
    noise: noise(random, x) of a group's rows.
    rotate: True for deviations in directions that mix the features.
    """

    groups: int
    m: int
    sizes: tuple[int, int, int]
    rows: tuple[int, int]
    mean: np.ndarray
    deviations: np.ndarray
    noise: Callable
    scale: np.ndarray
    rotate: bool = False


def gaussian(random, x):
    """Standard normal noise."""
    return random.normal(size=len(x))


def heavy(random, x):
    """Noise of Student's t with 3 degrees of freedom."""
    return random.standard_t(3, size=len(x))


def unequal(random, x):
    """Normal noise whose deviation differs between groups and grows with the first feature."""
    return np.exp(random.normal() / 2 + x[:, 0] / 3) * random.normal(size=len(x))


def population(
    p=4, groups=40, m=None, n=10, rows=(20, 20), intercept=0.5, slopes=0.0, noise=gaussian,
    mean=1.0, scale=1.0, rotate=False,
):  # fmt: skip
    """A population; `slopes` may differ between features."""
    deviations = np.concatenate([[intercept], np.broadcast_to(slopes, p)])
    means = np.concatenate([[0.0], np.broadcast_to(mean, p)])
    return Population(groups, m or groups // 2, (n, n, n), rows, means, deviations, noise,
                      np.broadcast_to(scale, p), rotate)  # fmt: skip


POPULATIONS = {
    "identical groups": population(intercept=0.0),
    "intercepts only": population(intercept=0.7),
    "slopes": population(slopes=0.5),
    "slopes of one feature": population(slopes=np.array([1.0, 0, 0, 0]), m=5),
    "unlike groups": population(p=6, slopes=3.0, mean=0.0, m=4, n=14, rows=(30, 30)),
    "few training groups": population(p=6, slopes=0.4, m=4, n=8),
    "many features": population(
        p=20, slopes=0.6, m=10, n=10, rotate=True, scale=np.linspace(2, 0.3, 20)
    ),
    "few rows": population(slopes=0.4, n=2, rows=(5, 5), groups=60),
    "few groups": population(slopes=0.5, groups=16),
    "ragged groups": population(slopes=0.5, n=5, rows=(8, 80)),
    "heavy tails": population(slopes=0.5, noise=heavy),
    "unequal noise": population(slopes=0.5, noise=unequal),
}


def draw(population: Population, groups: int, random):
    """Features, targets and labels of new groups."""
    p = len(population.scale)
    mix = np.linalg.qr(np.random.default_rng(0).normal(size=(p, p)))[0]
    xs, ys, labels = [], [], []
    for g in range(groups):
        count = random.integers(population.rows[0], population.rows[1] + 1)
        x = random.normal(size=(count, p)) * population.scale
        change = population.deviations * random.normal(size=p + 1)
        if population.rotate:
            change[1:] = mix @ change[1:]
        w = population.mean + change
        xs.append(x)
        ys.append(w[0] + x @ w[1:] + population.noise(random, x))
        labels.append(np.full(count, g))
    return np.concatenate(xs), np.concatenate(ys), np.concatenate(labels)


def grid_of(population: Population) -> RateGrid:
    """Rates and ridges that are the same for every set of the population."""
    unit = 1 / max(1.0, float(np.max(population.scale)) ** 2)
    ridges = np.array([0.0, *np.geomspace(1e-3, 1.0, 6)]) * population.m * population.sizes[1]
    return RateGrid(RATES * unit, ridges, None)


def truth(population: Population) -> CVLosses:
    """Mean losses over the pool, at every rate, ridge and structure."""
    random = np.random.default_rng(12345)
    data = drop_small_groups(group_rows(*draw(population, POOL, random)), *population.sizes)
    forms = quadratic_forms(data, *population.sizes, random)
    run = CrossEvaluation(data, Sizes(population.m, *population.sizes), grid_of(population), forms)
    plan = cross_validation(data.groups, population.m, forms.train.shape[1], POOL_SPLITS, random)
    return run.losses(plan, lambda count: None).map(lambda a: a.mean(0)[ALL])


class Result(NamedTuple):
    """The recommendation for one set, its relative regret, and (truth, low, high) of gains."""

    recommended: str
    regret: float
    gains: dict[str, tuple[float, float, float]]


def advised(population: Population, pool: CVLosses, seed: int, splits) -> Result:
    """Advise on a new set of groups and compare with the pool."""
    n_t, n_v, n_r = population.sizes
    grid = grid_of(population)
    data = draw(population, population.groups, np.random.default_rng([1, seed]))
    advice = nm.advise(
        *data, n_t=n_t, n_v=n_v, n_r=n_r, m=population.m, rates=grid.rates, unit="raw",
        meta_ridges=grid.ridges, splits=splits, key=jax.random.key(seed),
    )  # fmt: skip
    true = losses_of(advice.chosen, pool)
    best = min(float(true[name]) for name in RANKED if name in true)
    gains = {
        name: (float(true[name] - true[advice.recommended]), gain.low, gain.high)
        for name, gain in advice.gain.items()
        if name != advice.recommended
    }
    rates = advice.compare(META, ZERO)
    gains[RATES_GAIN] = (float(true[ZERO] - true[META]), rates.low, rates.high)
    return Result(advice.recommended, float(true[advice.recommended]) / best - 1, gains)


def covered(results: list[Result], names) -> str:
    """Fraction of intervals over the named methods that contain the truth."""
    inside = [
        low <= value <= high
        for result in results
        for name, (value, low, high) in result.gains.items()
        if name in names
    ]
    return f"{np.mean(inside):.0%}" if inside else ""


def main(options, report) -> None:
    report.table(
        "population", "recommended", "regret, mean", "within 1%", "coverage, pooled ridge",
        "per-group ridge", "others", RATES_GAIN,
    )  # fmt: skip
    for name in options.names or POPULATIONS:
        population = POPULATIONS[name]
        pool = truth(population)
        results = [advised(population, pool, s, options.splits) for s in range(options.sets)]
        methods, counts = np.unique([r.recommended for r in results], return_counts=True)
        regrets = np.array([r.regret for r in results])
        report.row(
            name,
            ", ".join(f"{methods[i]} {counts[i]}" for i in np.argsort(-counts)),
            f"{regrets.mean():.1%}",
            f"{np.mean(regrets < 0.01):.0%}",
            covered(results, {POOLED}),
            covered(results, {SINGLE}),
            covered(results, set(METHODS) - {POOLED, SINGLE}),
            covered(results, {RATES_GAIN}),
        )


if __name__ == "__main__":
    harness.run(
        main,
        __doc__,
        harness.option("names", nargs="*", metavar="POPULATION", help="all by default"),
        harness.option("--sets", type=int, default=40),
        harness.option("--splits", type=int, default=None),
    )
