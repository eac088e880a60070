"""The best inner rule by theory: one step or several, flow, proximal, of either sign.

For every problem the best parameter of each rule (global, both signs), the weight error
E|omega* - w0|^2 there relative to one step at its own best rate, and a simulation of it with its
standard error. The start is as far from w0 as tasks are. float64.
"""

import harness
import jax

import negmaml as nm

RULES = {
    "1 step": nm.GradientDescent(0.0),
    "2 steps": nm.GradientDescent(0.0, 2),
    "5 steps": nm.GradientDescent(0.0, 5),
    "flow": nm.GradientFlow(0.0),
    "proximal": nm.Proximal(1.0),
}
COMMON = {"p": 60, "n_r": 20, "sigma": 0.5, "nu": 1.0}
PROBLEMS = {
    f"n_t = {n_t}, n_v m = {rows}": nm.MixedLinearRegression(
        **COMMON, m=5, n_t=n_t, n_v=rows // 5, omega0=60**-0.5
    )
    for n_t, rows in ((15, 15), (15, 150), (60, 15), (60, 150), (240, 15))
}
RUNS = 2000


def cells_of(problem):
    """The cells of one problem: parameter, ratio to one step, and the ratio by simulation."""
    cells, reference = [], None
    for rule in RULES.values():
        best = nm.theory.best_train_rate(problem, rule)
        chosen = jax.tree.map(lambda _, best=best: best, rule)
        distance = float(nm.theory.weight_error(problem, chosen))
        reference = reference or distance
        runs = nm.simulate(
            jax.random.key(0), problem, chosen, nm.GradientDescent(0.0), runs=RUNS
        ).weight_error
        error = float(runs.std() / RUNS**0.5)
        simulated = f"{float(runs.mean()) / reference:.3f} ± {error / reference:.3f}"
        cells.append(f"{float(best):.3g}: {distance / reference:.3f} ({simulated})")
    return cells


def main(_, report):
    jax.config.update("jax_enable_x64", True)
    report.table("problem", *RULES, texts=1 + len(RULES))
    for name, problem in PROBLEMS.items():
        report.row(name, *cells_of(problem))


if __name__ == "__main__":
    harness.run(main, __doc__)
