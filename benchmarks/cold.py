"""Time of every command and every first call in a fresh process.

python benchmarks/cold.py                    this tree, three rounds
python benchmarks/cold.py --tree DIR         another one, such as a release to compare with
python benchmarks/cold.py --only predict     rows whose name contains the word

CPU seconds (user and system, with children), the least of the rounds, and their ratio to a bare
start of JAX in the same rounds, which is comparable between busy and idle machines. Commands run
without the cache on disk, and a second time with it in rows marked (again). One more run of each
counts the programs that are lowered, their equations, and the seconds of compilation by XLA. Rows
"panels" are the methods of `benchmarks/reproduction.py`, which only simulate the panels of the
figures, and the package with its theory. Modules of the package are compiled before, as by an
installer.
"""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import harness
from harness import HERE

BARE = "import jax; jax.jit(lambda x: x + 1)(1.0)"
SETUP = """
import jax, dataclasses, negmaml as nm
jax.config.update("jax_enable_x64", True)
problem = nm.MixedLinearRegression(p=60, m=3, n_t=20, n_v=10, n_r=20, sigma=0.5, nu=1.0)
rule = nm.GradientDescent(0.2)
best = lambda sigma: nm.theory.best_train_rate(dataclasses.replace(problem, sigma=sigma))
"""
SCRIPTS = {
    "bare start of JAX": BARE,
    "import jax, optax": "import jax, optax",
    "import negmaml": "import negmaml",
    "test_loss": SETUP + "nm.theory.test_loss(problem, rule, rule)",
    "best_train_rate": SETUP + "nm.theory.best_train_rate(problem)",
    "best_rates": SETUP + "nm.theory.best_rates(problem)",
    "gradient of best_train_rate": SETUP + "jax.grad(best)(0.5)",
    "jvp of best_train_rate": SETUP + "jax.jvp(best, (0.5,), (1.0,))",
    "from negmaml import *": "from negmaml import *",
}
COMMANDS = {
    "predict": ["predict"],
    "predict, bad input": ["predict", "--p", "-3"],
    "reproduce": ["reproduce", "--out", "reproduction"],
    "verify": ["verify"],
    "phases --runs 100": ["phases", "--runs", "100", "--out", "phases"],
    "sweep --dry-run": ["sweep", "phase_map", "--dry-run"],
}


METHOD_SCRIPT = """
import sys; sys.path.insert(0, {here!r}); import reproduction as r
losses = r.METHODS[{method!r}](0)
for i, panel in enumerate(r.panels(100, 1000, 1.0)):
    r.curve(losses, panel, "shared", 100 * i)
"""
PANELS = """
import jax; from negmaml.paper.reproduce import PROBLEMS, experiments
dict(experiments(list(PROBLEMS), jax.random.key(0)))
"""
# Counts the programs lowered and compiled in a process, at its end.
COUNTED = """
import atexit, os, runpy, sys, jax, jax.monitoring
from jax._src.interpreters import mlir
programs, equations, seconds = [0], [0], [0.0]
def count(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=inner):
            if inner(value):
                total += count(getattr(value, "jaxpr", value))
    return total
def inner(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
lower = mlir.lower_jaxpr_to_module
def counted(name, jaxpr, *arguments, **options):
    programs[0] += 1
    equations[0] += count(getattr(jaxpr, "jaxpr", jaxpr))
    return lower(name, jaxpr, *arguments, **options)
mlir.lower_jaxpr_to_module = counted
def listen(event, duration, **_):
    if event.endswith("backend_compile_duration"):
        seconds[0] += duration
jax.monitoring.register_event_duration_secs_listener(listen)
@atexit.register
def write():
    with open(os.environ["COUNTS"], "w") as file:
        print(programs[0], equations[0], seconds[0], file=file)
kind, what, *sys.argv = {arguments!r}
sys.argv.insert(0, what)
exec(what) if kind == "-c" else runpy.run_module(what, run_name="__main__", alter_sys=True)
"""


NO_COUNTS = ["", "", ""]


class Row(NamedTuple):
    """Arguments of a Python interpreter, and whether to run it again with the cache on disk."""

    arguments: list[str]
    again: bool = False
    python: str = sys.executable


def cost(row: Row, setting: dict[str, str], folder: Path, cache: str) -> tuple[float, float]:
    """CPU seconds of a fresh process and its children, and the peak of resident memory in MiB."""
    environment = setting | {"NEGMAML_CACHE": cache}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [row.python, *row.arguments], cwd=folder, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, _, usage = os.wait4(process.pid, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)
    return seconds, usage.ru_maxrss / 1024


def counts(row: Row, setting: dict[str, str], folder: Path) -> list[str]:
    """Programs, equations and seconds of compiling, as cells of the table."""
    file = folder / "counts"
    file.unlink(missing_ok=True)
    code = COUNTED.replace("{arguments!r}", repr(row.arguments))
    environment = setting | {"NEGMAML_CACHE": "off", "COUNTS": str(file)}
    subprocess.run(
        [row.python, "-c", code], cwd=folder, env=environment, check=False,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    if not file.exists():
        return NO_COUNTS
    programs, equations, seconds = file.read_text().split()
    return [programs, equations, f"{float(seconds):.2f}"]


def rows(only: str, methods: list[str], torch_python: str):
    """Yield the name and the `Row` of each process."""
    for name, script in SCRIPTS.items():
        if only in name or name.startswith("bare"):
            yield name, Row(["-c", script])
    for name, arguments in COMMANDS.items():
        if only in name:
            yield name, Row(["-m", "negmaml", *arguments])
            yield f"{name} (again)", Row(["-m", "negmaml", *arguments], again=True)
    for method in methods:
        name = f"panels, {method}"
        if only in name:
            script = METHOD_SCRIPT.format(here=str(HERE), method=method)
            python = torch_python if method == "torch" else sys.executable
            yield name, Row(["-c", PANELS if method == "negmaml" else script], False, python)


def main(given, report) -> None:
    best: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache = Path(scratch), str(Path(scratch) / "programs")
        modules = {"PYTHONPATH": str(given.tree), "PYTHONPYCACHEPREFIX": str(folder / "modules")}
        setting = {n: v for n, v in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"} | modules
        wanted = dict(rows(given.only, given.methods.split(), given.torch_python))
        cost(Row(["-c", "from negmaml import *; import negmaml.cli"]), setting, folder, "off")
        for row in wanted.values():  # compile modules, fill the cache
            if row.again:
                cost(row, setting, folder, cache)
        for _ in range(given.rounds):
            for name, row in wanted.items():
                seen = cost(row, setting, folder, cache if row.again else "off")
                best[name] = min(best.get(name, seen), seen)
        counted = {
            name: NO_COUNTS if row.again else counts(row, setting, folder)
            for name, row in wanted.items()
        }
    bare = best["bare start of JAX"][0]
    report.note(str(given.tree))
    head = "CPU, s", "/ bare start", "peak MiB", "programs", "equations", "compiling, s"
    report.table("in a fresh process", *head)
    for name, (seconds, peak) in best.items():
        report.row(name, f"{seconds:.2f}", f"{seconds / bare:.1f}", f"{peak:.0f}", *counted[name])


if __name__ == "__main__":
    harness.run(
        main,
        __doc__,
        harness.option("--tree", type=Path, default=HERE.parent, help="the source to measure"),
        harness.option("--rounds", type=int, default=3),
        harness.option("--only", default="", help="part of the names of rows"),
        harness.option("--methods", default="numpy-batched torch jax-vmap negmaml"),
        harness.option("--torch-python", default=sys.executable, help="interpreter with torch"),
    )
