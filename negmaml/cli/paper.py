"""The commands of figures: reproduce, phases, gain-map."""

import json
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from negmaml._core import plotting
from negmaml._core.keys import key_of
from negmaml.cli.output import (
    check_writable,
    console,
    print_table,
    provenance,
    say,
    say_written,
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
    """
    out = check_writable(out)
    imports = threading.Thread(target=_import_figures, daemon=True)
    imports.start()  # in parallel with compilation
    if figure == "nonlinear":
        return _reproduce_nonlinear(out, seed, runs, quick)
    runs = RUNS if runs is None else runs
    runs = runs // 10 if quick else runs
    names = list(PROBLEMS) if figure == "all" else [figure]
    done = {}
    columns = TextColumn("{task.description:<12}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        # One step more than there are problems: the last one is drawing.
        bar = progress.add_task("compiling", total=len(names) + 1)
        for name, panels in experiments(names, key_of(seed), runs, evaluation):
            done[name] = panels
            progress.update(bar, advance=1, description="simulating")
        progress.update(bar, description="drawing")
        imports.join()
        described = {name: json.dumps(asdict(PROBLEMS[name])) for name in done}
        settings = dict(seed=str(seed), runs=str(runs), evaluation=evaluation, **described)
        paths = _write(done, out, settings, "reproduction")
    _print_agreement(done, "theory against simulation")
    say_written(paths)
    return 0


def _reproduce_nonlinear(out: Path, seed: int, runs: int | None, quick: bool) -> int:
    """Run `reproduce` for the nonlinear problem, one network after another."""
    # Imported here: it needs kernels and training, which the linear figures do not.
    from negmaml.paper import nonlinear

    runs = nonlinear.RUNS if runs is None else runs
    runs = runs // 10 if quick else runs
    done = []
    columns = TextColumn("{task.description:<12}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("training", total=runs)
        for losses in nonlinear.runs(key_of(seed), runs):
            done.append(losses)
            progress.update(bar, advance=1)
    panels = {"nonlinear": nonlinear.panels(done)}
    described = {"nonlinear": json.dumps(nonlinear.CONFIG._asdict())}
    settings = dict(seed=str(seed), runs=str(runs), evaluation="sampled", **described)
    paths = _write(panels, out, settings, "nonlinear", points="networks", curve="exact, in kernel")
    _print_agreement(panels, "exact solution in the kernel against networks")
    say_written(paths)
    return 0


def phases(out: Path = Path("phases"), seed: int = 0, runs: int = 400) -> int:
    """Draw phase diagrams of the best training rate, double descent, and rate against ridge.

    Args:
        out: folder for phases.png, .svg and .nc (opens with xarray); made if missing.
        seed: seed of the simulated points.
        runs: runs of each simulated point.
    """
    out = check_writable(out)
    # After the check of the folder, so that a wrong path fails before the imports.
    from negmaml.paper import figures, netcdf
    from negmaml.paper.phases import contents as compute

    with console.status("computing"):
        variables, coordinates = compute(key_of(seed), runs)
    path = out / "phases.nc"
    with plotting.atomic_write(path) as partial:
        settings = {**provenance(), "seed": str(seed), "runs": str(runs)}
        netcdf.write(partial, variables, coordinates, settings)
    values = {name: values for name, (_, values) in variables.items()} | coordinates
    paths = [*plotting.save(figures.phases(values), out, "phases"), path]
    for name in ("best_by_data", "best_by_noise"):
        share = float((values[name] < 0).mean())
        say(f"{name}: best training rate negative in {share:.1%} of the map")
    say_written(paths)
    return 0


def gain_map(out: Path = Path("gain_map")) -> int:
    """Map the gain of negative training rates over spectrum, noise and data, with or without ridge.

    Args:
        out: folder for gain_map.png, .svg and .nc (opens with xarray); made if missing.
    """
    out = check_writable(out)
    from negmaml.paper import figures
    from negmaml.paper.gain_map import payoff as compute

    with console.status("computing"):
        dataset = compute()
    dataset.attrs |= provenance()
    path = out / "gain_map.nc"
    with plotting.atomic_write(path) as partial:
        dataset.to_netcdf(partial, engine="scipy")
    paths = [*plotting.save(figures.payoff(dataset), out, "gain_map"), path]
    rows = []
    for name in ("noise", "data"):
        for ridge in ("none", "best"):
            shares = (
                float((dataset[f"{what}_{name}"].sel(ridge=ridge) > 0.01).mean())
                for what in ("over_zero", "over_same")
            )
            rows.append((name, ridge, *(f"{share:.0%}" for share in shares)))
    columns = "map", "ridge", "over rate 0", "over the same rate"
    print_table(columns, rows, "where it gains over 1%")
    say_written(paths)
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


def _print_agreement(results: dict[str, dict[str, Panel]], title: str) -> None:
    rows = []
    for name, panels in results.items():
        for letter, rate in (("a", "alpha_r"), ("b", "alpha_t")):
            panel = panels[letter]
            # Relative to the simulated mean.
            gap = np.abs(panel.theory / panel.mean - 1)
            # +0.123(4) means 0.123 +- 0.004: the error counts in units of the last digit.
            found = f"{panel.found:+.3f}({1000 * panel.found_error:.0f})"
            gaps = f"{np.median(gap):.2%}", f"{gap.max():.2%}"
            label = name.removesuffix("parameterized")
            rows.append((label, rate, f"{panel.predicted:+.3f}", found, *gaps))
    columns = "problem", "rate", "theory", "found", "median gap", "worst gap"
    note = "in brackets the standard error of the last digits"
    print_table(columns, rows, f"{title}: best rates, and gaps in test loss", note, wrap=False)
