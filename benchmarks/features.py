"""Theory from the moments of real features, compared with exact simulation on those features.

Tasks are linear in the features: y = k(x).w + noise with w ~ N(0, nu^2/p I). The theory uses only
the spectrum and the fourth moments that `theory.feature_moments` estimates from a sample. The
simulation draws new features for every run, solves each run exactly, computes the mean over tasks
and noise exactly, and evaluates on the covariance of the features.

    python benchmarks/features.py [--runs 60] [--points 2] [--out benchmarks/features.npz]

It saves its numbers, which `benchmarks/figures.py features` draws.
"""

import time
from pathlib import Path

import harness
import jax
import numpy as np

import negmaml as nm
from negmaml._core import plotting
from negmaml._core.plotting import INK, number

P, N_T, N_V, N_R, SIGMA, NU = 120, 20, 6, 20, 0.5, 1.0
TASKS = (4, 10, 16, 30, 60)  # n_v m / p = 0.2, 0.5, 0.8, 1.5, 3
RATES = (-0.5, -0.2, 0.0, 0.2, 0.5)  # in units of 1/largest eigenvalue of S
ADAPT = 0.3
SHOWN = (-0.5, 0.0, 0.5)  # of the rates, in the figure
RIDGE = 0.3  # in units of the mean eigenvalue; pixels are discrete, and singular without
TRUTH = 20_000  # features that stand for the population; the theory sees a few p


def random_features(kind):
    """Features of 20 Gaussian inputs by a random first layer, scaled by 1/sqrt(p)."""
    inputs = 20
    rng = np.random.default_rng(7)
    W, b = rng.standard_normal((inputs, P)) / inputs**0.5, rng.uniform(0, 2 * np.pi, P)
    activation = {
        "ReLU": lambda z: np.maximum(z, 0),
        "tanh": np.tanh,
        "Fourier": lambda z: np.cos(2 * z + b),
    }[kind]

    def draw(rng, count):
        return activation(rng.standard_normal((count, inputs)) @ W)

    return draw


def tangent_features():
    """Gradient of a two-layer tanh network of width 16 and 24 inputs in its 400 parameters.

    Products of few inputs and few units are far from Gaussian.
    """
    inputs, width = 24, 16
    rng = np.random.default_rng(8)
    W, a = rng.standard_normal((inputs, width)) / inputs**0.5, rng.standard_normal(width)

    def draw(rng, count):
        x = rng.standard_normal((count, inputs))
        h = np.tanh(x @ W)
        first = (1 - h**2) * a
        return np.concatenate([h, (x[:, :, None] * first[:, None]).reshape(count, -1)], 1)

    return draw


def digit_pixels():
    """Pixels of scikit-learn's digits that vary, centred, drawn with replacement."""
    from sklearn.datasets import load_digits

    pixels = load_digits().data / 16
    pixels = pixels[:, pixels.std(0) > 0.1]  # others are blank in most runs
    pixels = pixels - pixels.mean(0)

    def draw(rng, count):
        return pixels[rng.integers(len(pixels), size=count)]

    return draw


def simulate(draw, m, rates, H, ridge, runs):
    """Excess of the expected test loss over what w0 leaves, (rates, runs).

    Given the features, the mean over tasks, noise and test data is taken exactly.
    """
    p, found = len(H), []
    for run in range(runs):
        rng = np.random.default_rng([run, m])
        X = draw(rng, m * (N_T + N_V)).reshape(m, N_T + N_V, p)
        found.append([excess(X[:, :N_T], X[:, N_T:], rate, H, ridge) for rate in rates])
    return np.array(found).T


def excess(support, query, rate, H, ridge):
    """Mean over labels of omega^T H omega/2, for one gradient step."""
    m, n_v, p = query.shape
    noise = rate / N_T * (query @ support.swapaxes(1, 2))
    phi = query - noise @ support
    labels = NU**2 / p * phi @ phi.swapaxes(1, 2)
    labels = labels + SIGMA**2 * (noise @ noise.swapaxes(1, 2) + np.eye(n_v))
    rows = phi.reshape(m * n_v, p)
    if m * n_v <= p:
        solution = np.linalg.solve(rows @ rows.T + ridge * np.eye(m * n_v), rows)
    else:
        solution = np.linalg.solve(rows.T @ rows + ridge * np.eye(p), rows.T).T
    solution = solution.reshape(m, n_v, p)
    return np.sum((solution @ H) * (labels @ solution)) / 2


def compare(report, name, draw, runs, points):
    """Rows (n_v m / p, rate in its unit, theory, simulation, standard error)."""
    rng = np.random.default_rng(0)
    population = draw(rng, TRUTH)
    p = population.shape[1]
    covariance = population.T @ population / TRUTH
    quadratic = np.einsum("np,pq,nq->n", population, covariance, population, optimize=True)
    fourth = (population * quadratic[:, None]).T @ population / TRUTH
    moments = nm.theory.feature_moments(draw(rng, points * p))
    top = np.linalg.eigvalsh(covariance)[-1]
    top *= (1 + np.sqrt(np.trace(covariance) / (top * N_T))) ** 2
    rates, adapt, ridge = np.array(RATES) / top, ADAPT / top, RIDGE * np.trace(covariance) / p
    square = covariance @ covariance
    cube = square @ covariance
    H = covariance - 2 * adapt * square + adapt**2 * (cube + (fourth - cube) / N_R)
    rows = []
    for m in sorted({max(1, round(m * p / P)) for m in TASKS}):
        problem = moments.problem(m=m, n_t=N_T, n_v=N_V, n_r=N_R, sigma=SIGMA, nu=NU)
        rule = nm.GradientDescent(adapt)
        train = nm.GradientDescent(rates)
        loss = moments.test_loss(problem, train, rule, meta_ridge=ridge)
        theory = np.asarray(loss - moments.adapted(problem, rule).floor)
        simulated = simulate(draw, m, rates, H, ridge, runs)
        mean, error = simulated.mean(-1), simulated.std(-1, ddof=1) / runs**0.5
        rows += [(m * N_V / p, *row) for row in zip(RATES, theory, mean, error, strict=True)]
    rows = np.array(rows)
    off = np.abs(rows[:, 2] / rows[:, 3] - 1)
    error = np.median(rows[:, 4] / rows[:, 3])
    cells = [f"{x:.1%}" for x in (np.median(off), np.quantile(off, 0.95), off.max(), error)]
    report.row(f"{name}, {p}", f"{moments.kurtosis:.2f}", *cells)
    return rows


def draw(results):
    """A panel for each kind of features: curves theory, points simulation; a Figure."""
    with plotting.style():
        figure, axes = plotting.panels(2, 3, 5.6)
        *axes, last = axes.flat
        last.set_axis_off()  # the place of the legend
        for axis, (name, rows) in zip(axes, results.items(), strict=True):
            _draw_panel(axis, rows)
            off = np.abs(rows[:, 2] / rows[:, 3] - 1)
            plotting.set_finding(
                axis, f"{name}: theory off by\n{np.median(off):.1%}, most {off.max():.1%}"
            )
        axes[0].set_ylabel("excess test loss")
        axes[3].set_ylabel("excess test loss")
        last.legend(*axes[0].get_legend_handles_labels(), loc="center")
    return figure


def _draw_panel(axis, rows) -> None:
    for rate, color in zip(SHOWN, plotting.line_colors(SHOWN), strict=True):
        x, _, theory, mean, error = rows[rows[:, 1] == rate].T
        axis.plot(x, theory, color=color)
        label = rf"$\alpha_t$ = {number(rate)}/largest eigenvalue"
        axis.errorbar(x, mean, error, fmt="o", elinewidth=1, color=color, label=label)
    axis.plot([], [], color=INK, label="theory from moments")
    axis.plot([], [], "o", color=INK, label="simulation, ± standard error")
    axis.set(xscale="log", yscale="log", xlabel=r"$n_v m/p$")
    axis.set_xticks([0.2, 0.5, 1, 3], ["0.2", "0.5", "1", "3"])
    axis.xaxis.minorticks_off()


def main(options, report):
    jax.config.update("jax_enable_x64", True)
    started = time.process_time()
    kinds = {kind: random_features(kind) for kind in ("ReLU", "tanh", "Fourier")}
    kinds |= {"tangent": tangent_features(), "digits": digit_pixels()}
    head = "kurtosis", "median", "95th percentile", "worst", "standard error"
    report.table("features, p", *head)
    results = {
        name: compare(report, name, draw, options.runs, options.points)
        for name, draw in kinds.items()
    }
    np.savez_compressed(options.out, **results)
    report.note(f"{time.process_time() - started:.0f} s of CPU time")


if __name__ == "__main__":
    harness.run(
        main,
        __doc__,
        harness.option("--runs", type=int, default=60, help="simulated runs"),
        harness.option("--points", type=int, default=2, help="size of the sample, over p"),
        harness.option("--out", type=Path, default=harness.HERE / "features.npz"),
    )
