"""The commands of figures: reproduce, phases, gain-map."""

import json
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from negmaml._core import plotting
from negmaml._core.keys import key_of
from negmaml.cli.output import (
    TALKS,
    Output,
    OutputOptions,
    print_table,
    provenance,
    say,
    writable_folder,
)
from negmaml.paper.reproduce import PROBLEMS, RUNS, Panel, contents, experiments

Figure = Literal["all", "overparameterized", "underparameterized", "nonlinear"]


def reproduce(
    out: Path = Path("reproduction"),
    seed: int = 0,
    runs: int | None = None,
    figure: Figure = "all",
    evaluation: Literal["expected", "sampled"] = "expected",
    quick: bool = False,
    output: Output = TALKS,
) -> int:
    """Reproduce the paper's figures: simulation against theory.

    Args:
        out: folder for reproduction.png, .svg and .nc (opens with xarray); made if missing.
        seed: seed of all random numbers.
        runs: runs per point in panels b, by default 1000; panels a show a tenth of them, as in the
            paper. For the nonlinear problem: networks per point in both panels, by default 20.
        figure: one of the paper's problems, or all for the two linear ones, which take seconds. The
            nonlinear one trains networks for minutes and compares with the exact kernel solution.
        evaluation: exact mean over test tasks, or the paper's 100 sampled tasks of 50 points, which
            the nonlinear problem always uses.
        quick: a tenth of the runs.
        output: the form of the output.
    """
    with writable_folder(out) as folder:
        imports = threading.Thread(target=_import_figures, daemon=True)
        imports.start()  # in parallel with compilation
        if figure == "nonlinear":
            return _reproduce_nonlinear(folder, seed, runs, quick, output)
        runs = RUNS if runs is None else runs
        runs = runs // 10 if quick else runs
        names = list(PROBLEMS) if figure == "all" else [figure]
        done = {}
        with output.progress("reproduce", "problems") as report:
            report.stage("compiling")
            for name, panels in experiments(names, key_of(seed), runs, evaluation):
                done[name] = panels
                report.stage("simulating")
                report(len(done), len(names))
            imports.join()
            described = {name: json.dumps(asdict(PROBLEMS[name])) for name in done}
            settings = dict(seed=str(seed), runs=str(runs), evaluation=evaluation, **described)
            paths = _write(done, folder, settings, "reproduction")
    _print_agreement(done, "theory against simulation", paths, output)
    return 0


def _reproduce_nonlinear(
    out: Path, seed: int, runs: int | None, quick: bool, output: OutputOptions
) -> int:
    """Run `reproduce` for the nonlinear problem, one network after another."""
    # Imported here: it needs kernels and training, which the linear figures do not.
    from negmaml.paper import nonlinear

    runs = nonlinear.RUNS if runs is None else runs
    runs = runs // 10 if quick else runs
    done = []
    with output.progress("reproduce", "runs") as report:
        report.stage("compiling and the first run")
        for losses in nonlinear.runs(key_of(seed), runs):
            done.append(losses)
            report.stage("training")
            report(len(done), runs)
    panels = {"nonlinear": nonlinear.panels(done)}
    described = {"nonlinear": json.dumps(nonlinear.CONFIG._asdict())}
    settings = dict(seed=str(seed), runs=str(runs), evaluation="sampled", **described)
    paths = _write(panels, out, settings, "nonlinear", points="networks", curve="exact, in kernel")
    _print_agreement(panels, "exact solution in the kernel against networks", paths, output)
    return 0


def phases(
    out: Path = Path("phases"), seed: int = 0, runs: int = 400, output: Output = TALKS
) -> int:
    """Draw phase diagrams of the best training rate, double descent, and rate against ridge.

    Args:
        out: folder for phases.png, .svg and .nc (opens with xarray); made if missing.
        seed: seed of the simulated points.
        runs: runs of each simulated point.
        output: the form of the output.
    """
    with writable_folder(out) as folder:
        # After the check of the folder, so that a wrong path fails before the imports.
        from negmaml.paper import figures, netcdf
        from negmaml.paper.phases import contents as compute

        with output.progress("phases") as report:
            report.stage("computing")
            variables, coordinates = compute(key_of(seed), runs, report)
        path = folder / "phases.nc"
        with plotting.atomic_write(path) as partial:
            settings = {**provenance(), "seed": str(seed), "runs": str(runs)}
            netcdf.write(partial, variables, coordinates, settings)
        values = {name: values for name, (_, values) in variables.items()} | coordinates
        paths = [*plotting.save(figures.phases(values), folder, "phases"), path]
    shares = {n: float((values[n] < 0).mean()) for n in ("best_by_data", "best_by_noise")}
    if not output.record({"share_of_negative_best_rates": shares, "files": paths}):
        for name, share in shares.items():
            say(f"{name}: best training rate negative in {share:.1%} of the map")
        output.written(paths)
    return 0


def gain_map(out: Path = Path("gain_map"), output: Output = TALKS) -> int:
    """Map the gain of negative training rates over spectrum, noise and data, with or without ridge.

    Args:
        out: folder for gain_map.png, .svg and .nc (opens with xarray); made if missing.
        output: the form of the output.
    """
    with writable_folder(out) as folder:
        from negmaml.paper import figures
        from negmaml.paper.gain_map import payoff as compute

        with output.progress("gain-map", "maps") as report:
            report.stage("computing")
            dataset = compute(report)
        dataset.attrs |= provenance()
        path = folder / "gain_map.nc"
        with plotting.atomic_write(path) as partial:
            dataset.to_netcdf(partial, engine="scipy")
        paths = [*plotting.save(figures.payoff(dataset), folder, "gain_map"), path]
    rows: list[tuple[str, str, float, float]] = []
    for name in ("noise", "data"):
        for ridge in ("none", "best"):
            over_zero, over_same = (
                float((dataset[f"{what}_{name}"].sel(ridge=ridge) > 0.01).mean())
                for what in ("over_zero", "over_same")
            )
            rows.append((name, ridge, over_zero, over_same))
    columns = "map", "ridge", "over rate 0", "over the same rate"
    names = "map", "ridge", "over_zero", "over_same"
    found = [dict(zip(names, row, strict=True)) for row in rows]
    if not output.record({"share_that_gains_over_1_percent": found, "files": paths}):
        shown = [(name, ridge, f"{a:.0%}", f"{b:.0%}") for name, ridge, a, b in rows]
        print_table(columns, shown, "where it gains over 1%")
        output.written(paths)
    return 0


def _import_figures() -> None:
    """Import the modules for drawing and storing; a missing one raises where it is used."""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
        import scipy.io  # noqa: F401
    except ModuleNotFoundError:
        pass


def _write(
    panels: dict[str, dict[str, Panel]], out: Path, settings: dict, stem: str, **labels: str
) -> list[Path]:
    from negmaml.paper import figures, netcdf

    path = out / f"{stem}.nc"
    # An interrupt then leaves the old file or none, never a part of the new one.
    with plotting.atomic_write(path) as partial:
        netcdf.write(partial, *contents(panels), {**provenance(), **settings})
    return [*plotting.save(figures.reproduction(panels, **labels), out, stem), path]


def _print_agreement(
    results: dict[str, dict[str, Panel]], title: str, paths: list[Path], output: OutputOptions
) -> None:
    """Print the best rates and the gaps in test loss of all panels."""
    found: list[dict[str, Any]] = []
    for name, panels in results.items():
        for letter, rate in (("a", "alpha_r"), ("b", "alpha_t")):
            panel = panels[letter]
            # Relative to the simulated mean.
            gap = np.abs(panel.theory / panel.mean - 1)
            found.append({
                "problem": name, "rate": rate, "predicted": panel.predicted, "found": panel.found,
                "found_error": panel.found_error, "median_gap": float(np.median(gap)),
                "worst_gap": float(gap.max()),
            })  # fmt: skip
    if output.record({"best_rates": found, "files": paths}):
        return
    rows = [
        # +0.123(4) means 0.123 +- 0.004: the error counts in units of the last digit.
        (x["problem"].removesuffix("parameterized"), x["rate"], f"{x['predicted']:+.3f}",
         f"{x['found']:+.3f}({1000 * x['found_error']:.0f})", f"{x['median_gap']:.2%}",
         f"{x['worst_gap']:.2%}")
        for x in found
    ]  # fmt: skip
    columns = "problem", "rate", "theory", "found", "median gap", "worst gap"
    note = "in brackets the standard error of the last digits"
    print_table(columns, rows, f"{title}: best rates, and gaps in test loss", note)
    output.written(paths)
