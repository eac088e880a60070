"""`advise`: rates and ridge from grouped data, and what they are worth."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from negmaml._core.checks import check_array, check_callable, check_choice, check_count, check_flag
from negmaml._core.keys import check_key
from negmaml.advice import selection as choice
from negmaml.advice.baselines import alone, mixed_model
from negmaml.advice.cv import losses
from negmaml.advice.data import UNITS, Grouped, default_sizes, grouped, large_enough
from negmaml.advice.features import kernel_features
from negmaml.advice.result import Advice, Sizes, summarise
from negmaml.advice.selection import Grid, Measured
from negmaml.advice.solve import one_thread
from negmaml.advice.splits import Splits, bootstrap, cross_validation, most_training_groups
from negmaml.advice.statistics import Quadratics, quadratics

POSITIVE = (0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.2, 1.5, 1.9, 2.4, 3.0, 4.0)  # dense where curves bend
RATES = np.array([*(-rate for rate in reversed(POSITIVE)), 0.0, *POSITIVE])
RIDGES = np.array([0.0, *np.geomspace(1e-4, 1.0, 9)])  # over rows and mean squared feature
KERNEL_FEATURES = 100
LIGHT = 32  # features up to which a solution costs next to nothing
MIXED = 40  # coefficients up to which a mixed model is tried: each group costs their cube


class Work(NamedTuple):
    """How many splits, and how many replicates of a bootstrap with how many splits each."""

    splits: int
    replicates: int
    each: int


def advise(
    x,
    y,
    groups,
    *,
    n_t: int | None = None,
    n_v: int | None = None,
    n_r: int | None = None,
    m: int | None = None,
    kernel: Callable | None = None,
    rates=None,
    adapt_rates=None,
    meta_ridges=None,
    splits: int | None = None,
    intercept: bool = True,
    standardise: bool = False,
    unit: str = "scaled",
    key,
    progress: Callable[[int, int], None] | None = None,
) -> Advice:
    r"""Which inner rates and ridge suit these groups, by exact meta-training on many splits of
    them.

    In every split m groups train: on n_t + n_v rows of each, omega minimises

        sum_i |y_v - X_v theta_i(omega)|^2 + meta_ridge |omega|^2,
        theta_i(omega) = omega - train_rate/n_t X_t^T (X_t omega - y_t)

    exactly. Each held-out group then adapts on n_r of its rows at adapt_rate, and half the mean
    squared error of its other rows is its loss. A fifth of the groups in turn neither trains nor
    chooses, so that the gain they report is that of a choice which they had no part in. Standard
    errors are those of a bootstrap over groups.

    Arguments:
        x: features, (rows, features): an array or a data frame. What the model is linear in; or,
            with a kernel, its inputs.
        y: targets, (rows,) or (rows, targets), of which the mean loss is taken.
        groups: a label for each row.
        n_t, n_v: support and query rows of a training group; n_r: rows that a new group will have
            to adapt on. None: by the sizes of the groups, see `default_sizes`.
        m: groups in meta-training; None: half of them.
        kernel: kernel(x1, x2) -> (rows 1, rows 2), for a model in its space instead of a linear
            one.
        rates: training rates of any sign; 0 is added. None: 25 from -4 to 4.
        adapt_rates: adaptation rates to choose among; None: any, since the loss is a quadratic.
        meta_ridges: strengths of at least 0. None: 0, and 9 from 1e-4 to 1 times m n_v times the
            mean squared feature.
        splits: how often groups are split; None: 100, fewer with more than 32 features.
        intercept: a constant feature, which the ridge leaves alone and adaptation moves.
        standardise: put features and targets in units of their standard deviations first.
        unit: of all rates given and returned: "scaled", 1 over the largest eigenvalue of the second
            moments of the features; or "raw".
        key: a random key, jax.random.key(seed).
        progress: called with splits done and splits in all.

    Returns an `Advice`.

    Raises TypeError or ValueError, before any computing, for text, NaN or infinity in x or y, for a
    constant y, for fewer than 4 groups of enough rows, for sizes that leave no group to test on.
    Groups that are too small and constant features are left out, and named in `Advice.notes`.

    >>> import jax, numpy as np
    >>> random = np.random.default_rng(0)
    >>> groups = np.repeat(np.arange(40), 12)
    >>> x = random.normal(size=(480, 3))
    >>> w = 1 + random.normal(size=(40, 3))
    >>> y = np.sum(x * w[groups], 1) + random.normal(size=480)
    >>> advice = advise(x, y, groups, n_r=6, key=jax.random.key(0))
    >>> bool(advice.adapt_rate > 0), advice.gain["pooled ridge"].told
    (True, True)
    """
    check_choice("unit", unit, UNITS)
    key = check_key("key", key)
    intercept, standardise = (
        check_flag(name, flag)
        for name, flag in (("intercept", intercept), ("standardise", standardise))
    )
    if progress is not None:
        check_callable("progress", progress, "of (splits done, splits in all)")
    random = _generators(key)
    data = grouped(x, y, groups, intercept=intercept, standardise=standardise)
    if kernel is not None:
        with one_thread():
            data = _in_kernel_space(data, kernel, random[0])
    sizes, data, notes = _sizes(data, n_t, n_v, n_r, m)
    size = data.unit if unit == "scaled" else 1.0
    grid = _grid(data, sizes, size, rates, adapt_rates, meta_ridges)
    work = _work(data, splits)
    with one_thread():
        forms = quadratics(data, sizes.n_t, sizes.n_v, sizes.n_r, random[1])
    run = _Run(data, sizes, grid, forms)
    total = work.splits + work.replicates * work.each
    advance = _counter(progress, total)
    draws = run.forms.train.shape[1]
    main = cross_validation(data.groups, sizes.m, draws, work.splits, random[2])
    again = bootstrap(data.groups, sizes.m, draws, work.replicates, work.each, random[3])
    with one_thread():
        measured, replicated = (run.measure(splits, advance) for splits in (main, again))
    return summarise(data, sizes, grid, unit, size, main, measured, replicated, work.each,
                     (*data.notes, *notes), (x, y, groups, kernel))  # fmt: skip


class _Run(NamedTuple):
    """What all splits share."""

    data: Grouped
    sizes: Sizes
    grid: Grid
    forms: Quadratics

    def measure(self, splits: Splits, advance) -> Measured:
        """Losses of meta-training and of every baseline."""
        free, sizes = int(self.data.intercept), self.sizes
        found = losses(self.forms, splits, self.grid.rates, self.grid.ridges, free, advance)
        few = self.grid.ridges * sizes.n_r / (sizes.m * sizes.n_v)
        single = splits.weights @ alone(self.forms, few, free)
        others = {"ridge alone": single}
        if self.data.x.shape[1] <= MIXED:
            others["mixed model"] = mixed_model(self.forms, splits, sizes.n_t + sizes.n_v)
        return Measured(found.meta, found.pooled, others)


def _generators(key) -> list[np.random.Generator]:
    """Four streams of random numbers, by address."""
    typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    root = np.asarray(jax.random.key_data(key) if typed else key).tolist()
    return [np.random.default_rng([*root, stream]) for stream in range(4)]


def _in_kernel_space(data: Grouped, kernel, random) -> Grouped:
    columns = data.x[:, int(data.intercept) :]
    features = kernel_features(kernel, columns, random, KERNEL_FEATURES)
    x = features(columns)
    if data.intercept:
        x = np.hstack([data.x[:, :1], x])
    return Grouped(**data.__dict__ | {"x": x, "notes": (*data.notes, features.note)})


def _sizes(data: Grouped, n_t, n_v, n_r, m) -> tuple[Sizes, Grouped, tuple[str, ...]]:
    """Sizes that fit the groups, and the groups that fit them."""
    n_t, n_v, n_r = default_sizes(data.counts, n_t=n_t, n_v=n_v, n_r=n_r)
    data, notes = large_enough(data, n_t, n_v, n_r)
    most = most_training_groups(data.groups)
    m = min(data.groups // 2, most) if m is None else check_count("m", m)
    if m > most:
        raise ValueError(
            f"m must be at most {most}, to leave groups to choose on and to report on, got {m} "
            f"with {data.groups} groups of enough rows"
        )
    if data.groups < 15:
        notes = (*notes, f"only {data.groups} groups: intervals are rough")
    return Sizes(m, n_t, n_v, n_r), data, notes


def _grid(data: Grouped, sizes: Sizes, size: float, rates, adapt_rates, meta_ridges) -> Grid:
    """The axes, in raw units."""
    raw = RATES * data.unit if rates is None else _axis("rates", rates, "a training rate") * size
    raw = np.unique(np.append(raw, 0.0))
    adapt = None
    if adapt_rates is not None:
        adapt = _axis("adapt_rates", adapt_rates, "an adaptation rate") * size
    if meta_ridges is None:
        shrunk = data.x[:, int(data.intercept) :]
        ridges = RIDGES * sizes.m * sizes.n_v * float(np.mean(shrunk**2))
    else:
        ridges = np.unique(_axis("meta_ridges", meta_ridges, "a ridge"))
        if ridges[0] < 0:
            raise ValueError(f"meta_ridges must be at least 0, got {ridges[0]:g}")
    return Grid(raw, ridges, adapt)


def _axis(name: str, values: Any, meaning: str) -> np.ndarray:
    axis = np.atleast_1d(np.asarray(check_array(name, values, meaning), float))
    if axis.ndim != 1:
        raise ValueError(f"{name} must be a list of numbers, got shape {axis.shape}")
    return axis


def _work(data: Grouped, splits) -> Work:
    """Less work where a solution costs more: it goes with the cube of the features."""
    light = data.x.shape[1] <= LIGHT
    if splits is None:
        splits = 100 if light else 20
    elif check_count("splits", splits) < 2 * choice.FEWEST:
        raise ValueError(f"splits must be at least {2 * choice.FEWEST}, got {splits}")
    return Work(splits, min(200, 2 * splits), 5) if light else Work(splits, 30, 2)


def _counter(progress, total: int) -> Callable[[int], None]:
    done = 0

    def advance(some: int) -> None:
        nonlocal done
        done += some
        if progress is not None:
            progress(done, total)

    return advance
