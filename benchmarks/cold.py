"""What a user waits for: every command and every first call, each in a fresh process.

python benchmarks/cold.py                    this tree, three rounds
python benchmarks/cold.py --tree DIR         another one, such as a release to compare with
python benchmarks/cold.py --only predict     rows whose name has the word

CPU seconds (user and system, children included), the best of the rounds, and their ratio to a bare
start of JAX measured in the same rounds: ratios hold on a machine that does other things too.
Commands run without the cache on disk and, the rows marked (again), a second time with it.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
}
COMMANDS = {
    "predict": ["predict"],
    "predict, bad input": ["predict", "--p", "-3"],
    "reproduce": ["reproduce", "--out", "reproduction"],
    "verify": ["verify"],
    "phases --runs 100": ["phases", "--runs", "100", "--out", "phases"],
    "sweep --dry-run": ["sweep", "phase_map", "--dry-run"],
}


def cost(arguments, tree: Path, folder: Path, cache: str) -> tuple[float, float]:
    """CPU seconds of a fresh process and its children, and the peak of resident memory in MiB."""
    environment = os.environ | {"PYTHONPATH": str(tree), "NEGMAML_CACHE": cache}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, _, usage = os.wait4(process.pid, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)
    return seconds, usage.ru_maxrss / 1024


def rows(only: str):
    """(name, arguments, whether a second time with the cache)."""
    for name, script in SCRIPTS.items():
        if only in name or name.startswith("bare"):
            yield name, ["-c", script], False
    for name, arguments in COMMANDS.items():
        if only in name:
            yield name, ["-m", "negmaml", *arguments], False
            yield f"{name} (again)", ["-m", "negmaml", *arguments], True


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    best: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache = Path(scratch), str(Path(scratch) / "programs")
        for _ in range(given.rounds):
            for name, arguments, again in rows(given.only):
                if again and name not in best:
                    cost(arguments, given.tree, folder, cache)  # fills it
                kept = cache if again else "off"
                seen = cost(arguments, given.tree, folder, kept)
                best[name] = min(best.get(name, seen), seen)
    bare = best["bare start of JAX"][0]
    print(f"{time.strftime('%Y-%m-%d')}, {given.tree}")
    print("| in a fresh process | CPU, s | / bare start | peak MiB |\n|---|---:|---:|---:|")
    for name, (seconds, peak) in best.items():
        print(f"| {name} | {seconds:.2f} | {seconds / bare:.1f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
