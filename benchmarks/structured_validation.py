"""Accuracy of the theory for inputs with a covariance: random problems, compared with simulation.

Problems: power-law, two-level, spiked and exponential spectra, random task variances and offsets,
one and several gradient steps with different rates, momentum, proximal, both signs, with and
without meta-ridge, n_t/p from 0.1 to 3, n_v m/p from 0.1 to 5, 10% away from the threshold.
Compared is the excess of the test loss, E (omega* - w0)^T H_r (omega* - w0)/2, one adaptation step
at a random rate, and the task error. The theory was not fitted to them. The simulation draws inputs
in NumPy and computes the mean over labels, task weights and signs of the offset given the inputs
exactly; runs are added until the standard error is below --error.

    OMP_NUM_THREADS=1 python benchmarks/structured_validation.py --seconds 600 --seed 0
"""

import time
from typing import NamedTuple

import harness
import jax
import numpy as np

import negmaml as nm
from negmaml.theory.anisotropic import inputs as structured

RULES = ("one step", "one step", "steps", "momentum", "proximal")


class Case(NamedTuple):
    """A random problem: `filters` is the rate of one step, else maps eigenvalues of S to (b, q)."""

    problem: nm.MixedLinearRegression
    train: nm.InnerRule
    filters: object
    adapt_rate: float
    ridge: float
    kind: str
    spectrum: str


def random_spectrum(rng, p):
    """(name, eigenvalues of mean one)."""
    name = rng.choice(["power", "levels", "spikes", "exponential"])
    if name == "power":
        s = np.arange(1, p + 1.0) ** -rng.uniform(0.3, 1.5)
    elif name == "levels":
        s = np.where(np.arange(p) < p * rng.uniform(0.1, 0.9), 1, 10 ** -rng.uniform(0.5, 2))
    elif name == "spikes":
        s = np.ones(p)
        s[: rng.integers(1, 4)] = 10 ** rng.uniform(0.5, 1.5)
    else:
        s = np.exp(-np.linspace(0, rng.uniform(1, 5), p))
    return str(name), s / s.mean()


def polynomial(rates, momentum=0.0):
    """Filters of gradient steps with these rates, by running them on x theta^2/2 - theta."""

    def filters(x):
        result = []
        for start, label in ((1.0, 0.0), (0.0, 1.0)):
            theta, velocity = np.full_like(x, start), np.zeros_like(x)
            for rate in rates:
                velocity = momentum * velocity + x * theta - label
                theta = theta - rate * velocity
            result.append(theta)
        return result

    return filters


def random_rule(rng, s, kinds):
    """(name, rule, its filters)."""
    kind, top = str(rng.choice(kinds)), s.max()
    if kind == "one step":
        rate = rng.uniform(-2, 2) / top
        return kind, nm.GradientDescent(rate), rate
    if kind == "steps":
        rates = rng.uniform(-1, 1, int(rng.integers(2, 4))) / top
        return kind, nm.GradientDescent(nm.Schedule(rates), len(rates)), polynomial(rates)
    if kind == "momentum":
        rate, momentum = rng.uniform(-0.7, 0.7) / top, rng.uniform(0, 0.9)
        return kind, nm.Momentum(rate, momentum, 3), polynomial([rate] * 3, momentum)
    strength = np.exp(rng.uniform(-2, 2))
    rule = nm.Proximal(strength)
    return kind, rule, lambda x: (strength / (x + strength), 1 / (x + strength))


def random_case(rng, sizes, kinds):
    p = int(rng.choice(sizes))
    spectrum, s = random_spectrum(rng, p)
    n_t = max(2, round(p * np.exp(rng.uniform(np.log(0.1), np.log(3)))))
    while True:
        rows = p * np.exp(rng.uniform(np.log(0.1), np.log(5)))
        m = max(1, round(np.exp(rng.uniform(0, np.log(40)))))
        n_v = max(1, round(rows / m))
        # A single task's filter may vanish: then the mean is infinite.
        if abs(n_v * m / p - 1) > 0.1 and abs(n_v * m - p) > 4 and (m > 1 or n_v < p):
            break
    sigma, nu = np.exp(rng.uniform(np.log(0.1), np.log(2), 2))
    offset = rng.choice([0.0, 1.0]) * rng.normal(0, 1, p) / p**0.5
    ridge = rng.choice([0.0, 0.0, m * n_v * np.exp(rng.uniform(np.log(0.01), 0))])
    problem = nm.MixedLinearRegression(
        p=p, m=m, n_t=n_t, n_v=n_v, n_r=max(2, p // 3), sigma=float(sigma), nu=float(nu),
        omega0=offset, input_covariance=s, weight_covariance=rng.exponential(1, p),
    )  # fmt: skip
    kind, rule, filters = random_rule(rng, s, kinds)
    rate = rng.uniform(-0.5, 0.5) / s.max()
    return Case(problem, rule, filters, float(rate), float(ridge), kind, spectrum)


def one_task(rng, problem, filters):
    """Phi_i and the covariance of its labels' residuals, given the inputs."""
    p, n_t, s = problem.p, problem.n_t, problem.input_covariance
    X = rng.standard_normal((n_t, p)) * np.sqrt(s / n_t)
    rows = rng.standard_normal((problem.n_v, p)) * np.sqrt(s)
    phi, noise = adapted(X, rows, filters)
    tasks = phi * (problem.nu**2 / p * problem.weight_covariance)
    noises = noise @ noise.T / n_t + np.eye(problem.n_v)
    return phi, tasks @ phi.T + problem.sigma**2 * noises


def adapted(X, rows, filters):
    """Rows times b(S) and times q(S) X^T, for X scaled such that S = X^T X; one step directly."""
    n_t, p = X.shape
    if np.isscalar(filters):
        noise = filters * (rows @ X.T)
        return rows - noise @ X, noise
    x, left = np.linalg.eigh(X @ X.T if n_t < p else X.T @ X)
    x = np.maximum(x, 1e-300)
    basis = X.T @ left / np.sqrt(x) if n_t < p else left
    b, q = filters(x)
    null = filters(np.zeros(1))[0][0] if n_t < p else 0.0
    inside = rows @ basis
    return (inside * (b - null)) @ basis.T + null * rows, inside * q * np.sqrt(x)


def one_run(rng, problem, filters, ridge, H):
    """Mean over labels of the quadratic form H, given the inputs."""
    p, n_v, rows = problem.p, problem.n_v, problem.rows
    blocks = [one_task(rng, problem, filters) for _ in range(problem.m)]
    Phi = np.concatenate([block for block, _ in blocks])
    if rows <= p:
        solution = Phi.T @ np.linalg.inv(Phi @ Phi.T + ridge * np.eye(rows))
    else:
        solution = np.linalg.inv(Phi.T @ Phi + ridge * np.eye(p)) @ Phi.T
    total = np.zeros(p)
    for i, (_, covariance) in enumerate(blocks):
        part = solution[:, i * n_v : (i + 1) * n_v]
        total += np.sum((part @ covariance) * part, 1)
    if np.any(problem.omega0):
        total += (np.eye(p) - solution @ Phi) ** 2 @ problem.omega0**2
    return H @ total


def simulated(rng, case, H, target, seconds):
    """Mean and relative standard error of the excess loss."""
    values, start = [], time.perf_counter()
    while True:
        values += [one_run(rng, case.problem, case.filters, case.ridge, H) for _ in range(20)]
        error = np.std(values, ddof=1) / len(values) ** 0.5 / np.mean(values)
        if (error < target and len(values) >= 40) or time.perf_counter() - start > seconds:
            return np.mean(values), error


def step_form(problem, rate):
    """H_r of one step."""
    s, n = problem.input_covariance, problem.n_r
    return s - 2 * rate * s**2 + rate**2 * ((n + 1) / n * s**3 + np.sum(s**2) / n * s)


def summary(errors, deviations):
    """Median, 95th percentile and worst of |error| and of |error| beyond two standard errors."""
    if not errors.size:
        return ["", ""]
    return [
        " / ".join(f"{100 * y:.2f}" for y in (*np.quantile(x, (0.5, 0.95)), x.max()))
        for x in (np.abs(errors), np.maximum(np.abs(errors) - 2 * deviations, 0))
    ]


def main(options, report):
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(options.seed)
    rows, kinds, start = [], [], time.perf_counter()
    while time.perf_counter() - start < options.seconds:
        case = random_case(rng, options.sizes, options.rules)
        H = step_form(case.problem, case.adapt_rate)
        mean, error = simulated(rng, case, H, options.error, options.per_problem)
        if error > 0.005:
            continue
        found = structured.predict(case.problem, case.train, case.ridge, H[None])
        gap, limit = float(found.forms[0]) / mean - 1, float(found.limit[0]) / mean - 1
        rows.append((case.problem.p, error, gap, limit, case.ridge > 0))
        kinds.append(case.kind)
        if abs(gap) > 0.006 + 2 * error:
            harness.progress(f"{gap:+.2%} (limit {limit:+.2%}, se {error:.2%}) {case}")
    p, error, gap, limit, ridged = np.array(rows).T
    kinds = np.array(kinds)
    report.note(f"{len(rows)} problems; median standard error {np.median(error):.2%}")
    report.note("relative error, %: median / 95th percentile / worst")
    report.table("rules", "n", "theory", "beyond 2 s.e.", "limit", "limit, beyond 2 s.e.")
    for name, chosen in (
        ("one step, p >= 60", (kinds == "one step") & (p >= 60)),
        ("  without ridge", (kinds == "one step") & (p >= 60) & (ridged == 0)),
        ("one step, p >= 40", kinds == "one step"),
        ("steps, momentum, p >= 60", np.isin(kinds, ("steps", "momentum")) & (p >= 60)),
        ("proximal, p >= 60", (kinds == "proximal") & (p >= 60)),
    ):
        cells = [cell for x in (gap, limit) for cell in summary(x[chosen], error[chosen])]
        report.row(name, chosen.sum(), *cells)


if __name__ == "__main__":
    harness.run(
        main,
        __doc__,
        harness.option("--seconds", type=float, default=600, help="for all problems"),
        harness.option("--per-problem", type=float, default=20, help="seconds"),
        harness.option("--error", type=float, default=0.0015, help="relative error to simulate to"),
        harness.option("--seed", type=int, default=0),
        harness.option("--sizes", type=int, nargs="+", default=[40, 60, 80, 120, 160]),
        harness.option("--rules", nargs="+", default=RULES, choices=sorted(set(RULES))),
    )
