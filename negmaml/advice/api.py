"""`advise`: the method, rates and ridge for grouped data."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from negmaml._core.calls import explain_calls
from negmaml._core.checks import check_array, check_callable, check_choice, check_count, check_flag
from negmaml._core.keys import check_key
from negmaml._core.types import Numbers, PRNGKeyArray, Rows
from negmaml.advice.data import (
    UNITS,
    GroupedRows,
    default_sizes,
    drop_small_groups,
    group_rows,
    limit_groups,
)
from negmaml.advice.evaluation import CrossEvaluation
from negmaml.advice.features import kernel_features
from negmaml.advice.result import Advice, Sizes, summarise
from negmaml.advice.selection import MIN_SPLITS, RateGrid
from negmaml.advice.solve import single_blas_thread
from negmaml.advice.splits import bootstrap, cross_validation, max_training_groups
from negmaml.advice.statistics import quadratic_forms

POSITIVE = (0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.2, 1.5, 1.9, 2.4, 3.0, 4.0)  # dense where curves bend
RATES = np.array([*(-rate for rate in reversed(POSITIVE)), 0.0, *POSITIVE])
RIDGES = np.array([0.0, *np.geomspace(1e-4, 1.0, 9)])  # over rows and mean squared feature
KERNEL_FEATURES = 100
CHEAP_FEATURES = 32  # features up to which a solution costs next to nothing
FEW_GROUPS = 15  # below, intervals are rough


class SplitCounts(NamedTuple):
    """Number of splits, of bootstrap replicates, and of splits of each replicate."""

    splits: int
    replicates: int
    each: int


@explain_calls
def advise(
    x: Rows,
    y: Rows,
    groups: Rows,
    *,
    n_t: int | None = None,
    n_v: int | None = None,
    n_r: int | None = None,
    m: int | None = None,
    kernel: Callable[..., Any] | None = None,
    rates: Numbers | None = None,
    adapt_rates: Numbers | None = None,
    meta_ridges: Numbers | None = None,
    splits: int | None = None,
    intercept: bool = True,
    standardise: bool = False,
    unit: str = "scaled",
    key: PRNGKeyArray,
    progress: Callable[[int, int], None] | None = None,
) -> Advice:
    r"""Recommend a method for grouped data, by cross-validation over groups.

    The methods are a pooled ridge, a per-group ridge, joint training (a pooled ridge, then a
    gradient step), a linear mixed model, and meta-learning. In every split m groups train. Meta-
    learning takes omega that, on n_t + n_v rows of each, minimises

        sum_i |y_v - X_v theta_i(omega)|^2 + meta_ridge |omega|^2,
        theta_i(omega) = omega - train_rate/n_t X_t^T (X_t omega - y_t)

    exactly. Each held-out group then adapts on n_r of its rows, here at adapt_rate, and half the
    mean squared error of its other rows is its loss. Each fifth of the groups in turn neither
    trains nor chooses rates, ridges and structures, so the losses they report are unbiased by these
    choices. Standard errors come from a bootstrap over groups.

    Arguments:
        x: features, (rows, features), an array or a data frame; with a kernel, its inputs.
        y: targets, (rows,) or (rows, targets); the loss is the mean over targets.
        groups: a label for each row.
        n_t, n_v: support and query rows of a training group. None: see `default_sizes`.
        n_r: rows that a new group will have to adapt on. None: n_t.
        m: groups in meta-training. None: half of them.
        kernel: kernel(x1, x2) -> (rows 1, rows 2), for a model in its space instead of a linear
            one.
        rates: training rates of any sign; 0 is added. None: 25 from -4 to 4.
        adapt_rates: adaptation rates to choose among. None: any, since the loss is a quadratic.
        meta_ridges: strengths of at least 0. None: 0, and 9 from 1e-4 to 1 times m n_v times the
            mean squared feature.
        splits: number of splits. None: 100, or 20 with more than 32 features.
        intercept: add a constant feature, which adaptation moves and the ridge does not penalize.
        standardise: put features and targets in units of their standard deviations first.
        unit: unit of all rates given and returned: "scaled", 1 over the largest eigenvalue of the
            second moments of the features, or "raw".
        key: a random key, jax.random.key(seed).
        progress: called with the number of splits done and the total.

    Returns an `Advice`.

    Raises TypeError or ValueError, before any computing, for text, NaN or infinity in x or y, a
    constant y, fewer than 4 groups of enough rows, and sizes that leave no group to test on.
    Groups that are too small and constant features are dropped and listed in `Advice.notes`.

    >>> import jax, numpy as np
    >>> random = np.random.default_rng(0)
    >>> groups = np.repeat(np.arange(40), 12)
    >>> x = random.normal(size=(480, 3))
    >>> w = 1 + random.normal(size=(40, 3))
    >>> y = np.sum(x * w[groups], 1) + random.normal(size=480)
    >>> advice = advise(x, y, groups, n_r=6, key=jax.random.key(0))
    >>> advice.recommended, advice.gain["pooled ridge"].significant
    ('mixed model', True)
    """
    check_choice("unit", unit, UNITS)
    key = check_key("key", key)
    intercept, standardise = (
        check_flag(name, flag)
        for name, flag in (("intercept", intercept), ("standardise", standardise))
    )
    if progress is not None:
        check_callable("progress", progress, "of (splits done, splits in all)")
    # One generator per use: kernel landmarks, orders of rows, splits, bootstrap, groups.
    random = _generators(key)
    data = group_rows(x, y, groups, intercept=intercept, standardise=standardise)
    # One BLAS thread for all linear algebra: systems are small.
    with single_blas_thread():
        if kernel is not None:
            data = _in_kernel_space(data, kernel, random[0])
        sizes, data = _sizes(data, n_t, n_v, n_r, m, random[4])
        unit_size = data.rate_unit if unit == "scaled" else 1.0
        grid = _grid(data, sizes, unit_size, rates, adapt_rates, meta_ridges)
        counts = _split_counts(data, splits)
        forms = quadratic_forms(data, sizes.n_t, sizes.n_v, sizes.n_r, random[1])
        run = CrossEvaluation(data, sizes, grid, forms)
        advance = _counter(progress, counts.splits + counts.replicates * counts.each)
        size = data.groups, sizes.m, forms.train.shape[1]
        # Gains come from cross-validation, where no group reports on its own choice. Its folds
        # share training groups, so errors need a bootstrap over groups.
        main = cross_validation(*size, counts.splits, random[2])
        again = bootstrap(*size, counts.replicates, counts.each, random[3])
        losses = run.losses(main, advance)
        replicated = run.losses(again, advance, run.best_structure(losses))
    given = (x, y, groups, kernel)
    return summarise(
        data, sizes, grid, unit, unit_size, main, losses, replicated, counts.each, given
    )


def _generators(key) -> list[np.random.Generator]:
    """Five independent generators: a change in one use of randomness does not change the others."""
    typed = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    # A typed key and a raw one with the same numbers give the same advice.
    seed = np.asarray(jax.random.key_data(key) if typed else key).tolist()
    return [np.random.default_rng([*seed, stream]) for stream in range(5)]


def _in_kernel_space(data: GroupedRows, kernel, random) -> GroupedRows:
    """Replace the inputs by features of the kernel."""
    # The constant stays outside of the kernel: the ridge must not penalize it.
    columns = data.x[:, int(data.intercept) :]
    features = kernel_features(kernel, columns, random, KERNEL_FEATURES)
    z = np.hstack([data.x[:, : int(data.intercept)], features(columns), data.y])
    return replace(data, z=z, notes=(*data.notes, features.note))


def _sizes(data: GroupedRows, n_t, n_v, n_r, m, random) -> tuple[Sizes, GroupedRows]:
    """Complete and check the sizes; drop groups that are too small for them."""
    n_t, n_v, n_r = default_sizes(data.counts, n_t=n_t, n_v=n_v, n_r=n_r)
    data = limit_groups(drop_small_groups(data, n_t, n_v, n_r), random)
    # Checked after small groups are dropped: only the others can train.
    largest = max_training_groups(data.groups)
    m = min(data.groups // 2, largest) if m is None else check_count("m", m)
    if m > largest:
        raise ValueError(
            f"m must be at most {largest}, to leave groups to choose on and to report on, got {m} "
            f"with {data.groups} groups of enough rows"
        )
    if data.groups < FEW_GROUPS:
        note = f"only {data.groups} groups: intervals are rough"
        data = replace(data, notes=(*data.notes, note))
    return Sizes(m, n_t, n_v, n_r), data


def _grid(
    data: GroupedRows, sizes: Sizes, unit_size: float, rates, adapt_rates, meta_ridges
) -> RateGrid:
    """The axes, in raw units."""
    if rates is None:
        raw = RATES * data.rate_unit
    else:
        raw = _axis("rates", rates, "a training rate") * unit_size
    # Sorted, since the interval of the best rate interpolates between neighbours.
    raw = np.unique(np.append(raw, 0.0))  # zero is a baseline of every report
    adapt = None
    if adapt_rates is not None:
        adapt = _axis("adapt_rates", adapt_rates, "an adaptation rate") * unit_size
    if meta_ridges is None:
        # The meta-system is a sum over m n_v rows, so its eigenvalues grow with them and with the
        # mean square of a feature. A ridge in these units shrinks alike at all sizes.
        ridges = RIDGES * sizes.m * sizes.n_v * data.mean_square
    else:
        ridges = np.unique(_axis("meta_ridges", meta_ridges, "a ridge"))
        if ridges[0] < 0:
            raise ValueError(f"meta_ridges must be at least 0, got {ridges[0]:g}")
    return RateGrid(raw, ridges, adapt)


def _axis(name: str, values: Any, meaning: str) -> np.ndarray:
    axis = np.atleast_1d(np.asarray(check_array(name, values, meaning), float))
    if axis.ndim != 1:
        raise ValueError(f"{name} must be a list of numbers, got shape {axis.shape}")
    return axis


def _split_counts(data: GroupedRows, splits) -> SplitCounts:
    """Fewer splits with many features: a solution costs the cube of their number."""
    cheap = data.x.shape[1] <= CHEAP_FEATURES
    if splits is None:
        splits = 100 if cheap else 20
    elif check_count("splits", splits) < 2 * MIN_SPLITS:
        raise ValueError(f"splits must be at least {2 * MIN_SPLITS}, got {splits}")
    # At least two splits of each replicate: `bootstrap_error` subtracts the variance between them.
    return SplitCounts(splits, min(200, 2 * splits), 5) if cheap else SplitCounts(splits, 30, 2)


def _counter(progress, total: int) -> Callable[[int], None]:
    """A function that adds to the number of splits done and reports it."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return advance
