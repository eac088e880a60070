"""The command line: reproduce, phases, payoff, predict, advise, sweep, status, ..."""

import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import negmaml
from negmaml import theory
from negmaml._core.extras import MissingExtraError
from negmaml._core.numerics import settled
from negmaml._core.provenance import versions
from negmaml.cli import sweeps as sweep_commands
from negmaml.cli.advise import advise
from negmaml.cli.output import check_writable
from negmaml.paper.reproduce import PROBLEMS, RUNS, Panel, experiments, to_dataset
from negmaml.problem import MixedLinearRegression, named_spectrum
from negmaml.rules import GradientDescent

SHAPE = ("exponent", "level", "share", "spikes")
Figure = Literal["all", "overparameterized", "underparameterized", "nonlinear"]
console = Console()


@dataclass(frozen=True)
class ProblemOptions:
    """Mixed linear regression: sizes, variances and offsets."""

    p: int = 60
    """Dimension of inputs and weights."""
    m: int = 3
    """Tasks in meta-training."""
    n_t: int = 30
    """Training points of a task."""
    n_v: int = 2
    """Validation points of a task."""
    n_r: int = 20
    """Adaptation points of a test task."""
    sigma: float = 1.0
    """Standard deviation of the label noise."""
    nu: float = 0.5
    """Standard deviation of the tasks' weights."""
    w0: float = 0.0
    """Mean of every task weight."""
    omega0: float = 0.0
    """Every coordinate of the start of meta-training."""
    spectrum: Literal["isotropic", "power", "two-level", "spikes"] = "isotropic"
    """Eigenvalues of the input covariance, of mean one."""
    exponent: float = 1.0
    """Of the power law."""
    level: float = 10.0
    """Of the upper of two levels, or what spikes add."""
    share: float = 0.5
    """Of the directions at the upper of two levels."""
    spikes: float = 1.0
    """How many directions are spikes."""

    def problem(self) -> MixedLinearRegression:
        """As the rest of the package knows it."""
        given = asdict(self)
        name, shape = given.pop("spectrum"), {n: given.pop(n) for n in SHAPE}
        if name != "isotropic":
            with jax.enable_x64(True):
                given["input_covariance"] = named_spectrum(name, self.p, **shape)
        return MixedLinearRegression(**given)


Problem = Annotated[ProblemOptions, tyro.conf.arg(name="")]


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit status: 0 well, 1 roads disagree, 2 bad input."""
    commands: dict[str, Any] = {
        "reproduce": reproduce,
        "phases": phases,
        "payoff": payoff,
        "predict": predict,
        "advise": advise,
        "sweep": sweep_commands.sweep,
        "status": sweep_commands.status,
        "merge": sweep_commands.merge,
        "heatmap": sweep_commands.heatmap,
        "curves": sweep_commands.curves,
        "verify": verify,
        "info": info,
    }
    try:
        return tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="negmaml",
            args=list(arguments),
            description=negmaml.__doc__,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except (ValueError, TypeError, OSError, MissingExtraError) as error:
        print(f"negmaml: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        notes = getattr(stop, "__notes__", ["nothing half-written was left behind"])
        print(f"negmaml: interrupted; {'; '.join(notes)}", file=sys.stderr)
        return 130


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
        runs: runs a point in panels b, 1000 when left out; panels a show a tenth of them, as in the
            paper. Of the nonlinear problem, networks a point in both panels, 20 when left out.
        figure: which of the paper's problems; all are the two linear ones, of a few seconds. The
            nonlinear one trains networks for minutes, beside the exact solution in their kernel.
        evaluation: exact mean over test tasks, or the paper's 100 sampled tasks of 50 points; the
            nonlinear problem has sampled tasks only.
        quick: a tenth of the runs.
    """
    imports = threading.Thread(target=_import_figures, daemon=True)
    imports.start()  # while XLA compiles
    check_writable(out)
    if figure == "nonlinear":
        return _reproduce_nonlinear(out, seed, runs, quick)
    runs = RUNS if runs is None else runs
    runs = runs // 10 if quick else runs
    names = list(PROBLEMS) if figure == "all" else [figure]
    done = {}
    columns = TextColumn("{task.description:<12}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("compiling", total=len(names) + 1)
        for name, panels in experiments(names, jax.random.key(seed), runs, evaluation):
            done[name] = panels
            progress.update(bar, advance=1, description="simulating")
        progress.update(bar, description="drawing")
        imports.join()
        described = {name: json.dumps(asdict(PROBLEMS[name])) for name in done}
        settings = dict(seed=str(seed), runs=str(runs), evaluation=evaluation, **described)
        paths = _write(done, out, settings, "reproduction")
    console.print(_agreement_table(done, "theory against simulation"))
    console.print("wrote " + ", ".join(str(path) for path in paths), soft_wrap=True)
    return 0


def _reproduce_nonlinear(out: Path, seed: int, runs: int | None, quick: bool) -> int:
    """`reproduce` for networks, a run after another."""
    from negmaml.paper import nonlinear

    runs = nonlinear.RUNS if runs is None else runs
    runs = runs // 10 if quick else runs
    done = []
    columns = TextColumn("{task.description:<12}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("training", total=runs)
        for losses in nonlinear.runs(jax.random.key(seed), runs):
            done.append(losses)
            progress.update(bar, advance=1)
    panels = {"nonlinear": nonlinear.panels(done)}
    described = {"nonlinear": json.dumps(nonlinear.SETTING._asdict())}
    settings = dict(seed=str(seed), runs=str(runs), evaluation="sampled", **described)
    paths = _write(panels, out, settings, "nonlinear", points="networks", curve="exact, in kernel")
    console.print(_agreement_table(panels, "exact solution in the kernel against networks"))
    console.print("wrote " + ", ".join(str(path) for path in paths), soft_wrap=True)
    return 0


def phases(out: Path = Path("phases"), seed: int = 0, runs: int = 400) -> int:
    """Draw phase diagrams of the best training rate, double descent, and rate against ridge.

    Args:
        out: folder for phases.png, .svg and .nc (opens with xarray); made if missing.
        seed: seed of the simulated points.
        runs: runs a simulated point.
    """
    check_writable(out)
    from negmaml.paper import figures
    from negmaml.paper.phases import phases as compute

    with console.status("computing"):
        dataset = compute(jax.random.key(seed), runs)
    dataset.attrs |= {**_provenance(), "seed": str(seed), "runs": str(runs)}
    path = out / "phases.nc"
    with figures.whole_file(path) as partial:
        dataset.to_netcdf(partial, engine="scipy")
    paths = [*figures.save(figures.phases(dataset), out, "phases"), path]
    for name in ("best_by_data", "best_by_noise"):
        share = float((dataset[name] < 0).mean())
        console.print(f"{name}: best training rate negative in {share:.1%} of the map")
    console.print("wrote " + ", ".join(str(path) for path in paths), soft_wrap=True)
    return 0


def payoff(out: Path = Path("payoff")) -> int:
    """Map where a negative training rate pays: spectrum, noise, data, with a ridge and without.

    Args:
        out: folder for payoff.png, .svg and .nc (opens with xarray); made if missing.
    """
    check_writable(out)
    from negmaml.paper import figures
    from negmaml.paper.payoff import payoff as compute

    with console.status("computing"):
        dataset = compute()
    dataset.attrs |= _provenance()
    path = out / "payoff.nc"
    with figures.whole_file(path) as partial:
        dataset.to_netcdf(partial, engine="scipy")
    paths = [*figures.save(figures.payoff(dataset), out, "payoff"), path]
    table = Table(
        "map", "ridge", "over rate 0", "over the same rate", title="where it gains over 1%"
    )
    for name in ("noise", "data"):
        for ridge in ("none", "best"):
            shares = (
                float((dataset[f"{what}_{name}"].sel(ridge=ridge) > 0.01).mean())
                for what in ("over_zero", "over_same")
            )
            table.add_row(name, ridge, *(f"{share:.0%}" for share in shares))
    console.print(table)
    console.print("wrote " + ", ".join(str(path) for path in paths), soft_wrap=True)
    return 0


def _import_figures() -> None:
    """Import what drawing and storing needs; an error shows where the import is used."""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
        import scipy.io  # noqa: F401
        import xarray  # noqa: F401
    except ModuleNotFoundError:
        pass


def _write(
    panels: dict[str, dict[str, Panel]], out: Path, settings: dict, stem: str, **labels: str
) -> list[Path]:
    from negmaml.paper import figures

    dataset = to_dataset(panels, {**_provenance(), **settings})
    path = out / f"{stem}.nc"
    with figures.whole_file(path) as partial:
        dataset.to_netcdf(partial, engine="scipy")
    return [*figures.save(figures.reproduction(dataset, **labels), out, stem), path]


def _agreement_table(results: dict[str, dict[str, Panel]], title: str) -> Table:
    table = Table(title=f"{title}: best rates, and gaps in test loss")
    for heading in ("problem", "rate", "theory", "found", "median gap", "worst gap"):
        table.add_column(heading, no_wrap=True)
    for name, panels in results.items():
        for letter, rate in (("a", "alpha_r"), ("b", "alpha_t")):
            panel = panels[letter]
            gap = np.abs(panel.theory / panel.mean - 1)
            found = f"{panel.found:+.3f}({1000 * panel.found_error:.0f})"
            gaps = f"{np.median(gap):.2%}", f"{gap.max():.2%}"
            label = name.removesuffix("parameterized")
            table.add_row(label, rate, f"{panel.predicted:+.3f}", found, *gaps)
    table.caption = "in brackets the standard error of the last digits"
    return table


def predict(problem: Problem, train_rate: float = -0.2, adapt_rate: float = 0.2) -> int:
    """Predict the test loss of one-step MAML, and the best rates.

    Args:
        problem: the problem.
        train_rate: alpha_t, the inner rate of meta-training, of any sign.
        adapt_rate: alpha_r, the inner rate at test time, of any sign.
    """
    task = problem.problem()
    with jax.enable_x64(True):
        rules = GradientDescent(train_rate), GradientDescent(adapt_rate)
        task, (train, adapt) = settled((task, rules), np.float64)
        best_train = GradientDescent(theory.best_train_rate(task, adapt))
        best_adapt = GradientDescent(theory.best_adapt_rate(task, best_train))
        rows = {
            f"test loss at alpha_t = {train_rate:g}, alpha_r = {adapt_rate:g}": theory.test_loss(
                task, train, adapt
            ),
            "best alpha_r for that alpha_t": theory.best_adapt_rate(task, train),
            "best alpha_t": best_train.rate,
            "best alpha_r at the best alpha_t": best_adapt.rate,
            "test loss at both best rates": theory.test_loss(task, best_train, best_adapt),
        }
        if task.isotropic:
            spread = theory.standard_deviation(task, best_train, best_adapt)
            rows["standard deviation of that over runs"] = spread.test_loss
        table = Table("quantity", "value", title="proportional theory")
        for name, value in rows.items():
            table.add_row(name, f"{float(value):.6g}")
    console.print(table)
    return 0


def verify(
    problem: Problem,
    train_rate: float = -0.2,
    adapt_rate: float = 0.2,
    steps: int = 1,
    runs: int = 1000,
    seed: int = 0,
) -> int:
    """Check six roads to the test loss against each other; fails when they disagree.

    Args:
        problem: the problem.
        train_rate: alpha_t, the inner rate of meta-training, of any sign.
        adapt_rate: alpha_r, the inner rate at test time, of any sign.
        steps: inner gradient steps of meta-training.
        runs: simulated runs.
        seed: seed of all random numbers.
    """
    result = negmaml.verify(
        problem.problem(),
        GradientDescent(train_rate, steps),
        GradientDescent(adapt_rate),
        key=jax.random.key(seed),
        runs=runs,
    )
    print(result)
    return 0 if result.agrees else 1


def info() -> int:
    """Print versions, devices, dtype and precision."""
    table = Table("what", "value")
    for name, value in _provenance().items():
        table.add_row(name, value)
    console.print(table)
    return 0


def _provenance() -> dict[str, str]:
    """What a stored result says of its making."""
    return versions() | {
        "dtype of simulations, and of theory in Python": str(jnp.result_type(float)),
        "dtype of theory in commands": "float64",
        "matmul precision of statistics": "highest",
    }
