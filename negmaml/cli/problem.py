"""The commands for one problem: predict and verify."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from negmaml import theory
from negmaml._core.arrays import canonicalize
from negmaml._core.keys import key_of
from negmaml.cli.output import TALKS, Output, print_table, say
from negmaml.problem import MixedLinearRegression, named_spectrum
from negmaml.rules import GradientDescent


@dataclass(frozen=True)
class SpectrumOptions:
    """Parameters of the named spectra, of which each uses its own."""

    exponent: float = 1.0
    """Exponent of the power-law spectrum."""
    level: float = 10.0
    """Value of the upper level (two-level) or of the spikes."""
    share: float = 0.5
    """Fraction of eigenvalues at the upper level (two-level)."""
    spikes: float = 1.0
    """Number of spikes."""


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
    shape: Annotated[SpectrumOptions, tyro.conf.arg(name="spectrum")] = SpectrumOptions()
    """Each spectrum uses its own."""

    def record(self) -> dict:
        """The options in plain numbers, with the parameters of spectra as `spectrum_options`."""
        given = asdict(self)
        return given | {"spectrum_options": given.pop("shape")}

    def problem(self) -> MixedLinearRegression:
        """The problem with these sizes, variances and input covariance."""
        given = asdict(self)
        name, shape = given.pop("spectrum"), given.pop("shape")
        # Eigenvalues in float64, as the theory needs.
        if name != "isotropic":
            with jax.enable_x64(True):
                given["input_covariance"] = named_spectrum(name, self.p, **shape)
        return MixedLinearRegression(**given)


QUANTITIES = {
    "test_loss": "test loss at alpha_t = {:g}, alpha_r = {:g}",
    "best_adapt_rate_for_train_rate": "best alpha_r for that alpha_t",
    "best_train_rate": "best alpha_t",
    "best_adapt_rate": "best alpha_r at the best alpha_t",
    "best_test_loss": "test loss at both best rates",
    "standard_deviation_over_runs": "standard deviation of that over runs",
}
# Without a prefix the sizes are --p and --m instead of --problem.p.
Problem = Annotated[ProblemOptions, tyro.conf.arg(name="")]


def predict(
    problem: Problem, train_rate: float = -0.2, adapt_rate: float = 0.2, output: Output = TALKS
) -> int:
    """Predict the test loss of one-step MAML, and the best rates.

    Args:
        problem: the problem.
        train_rate: alpha_t, the inner rate of meta-training, of any sign.
        adapt_rate: alpha_r, the inner rate at test time, of any sign.
        output: the form of the output.
    """
    task = problem.problem()
    with jax.enable_x64(True):
        rules = GradientDescent(train_rate), GradientDescent(adapt_rate)
        task, (train, adapt) = canonicalize((task, rules), np.float64)
        best_train = GradientDescent(theory.best_train_rate(task, adapt))
        best_adapt = GradientDescent(theory.best_adapt_rate(task, best_train))
        found = {
            "test_loss": theory.test_loss(task, train, adapt),
            "best_adapt_rate_for_train_rate": theory.best_adapt_rate(task, train),
            "best_train_rate": best_train.rate,
            "best_adapt_rate": best_adapt.rate,
            "best_test_loss": theory.test_loss(task, best_train, best_adapt),
        }
        # The variance over runs is derived for isotropic inputs.
        if task.isotropic:
            spread = theory.standard_deviation(task, best_train, best_adapt)
            found["standard_deviation_over_runs"] = spread.test_loss
        found = {name: float(value) for name, value in found.items()}
    rates = {"train_rate": train_rate, "adapt_rate": adapt_rate}
    if not output.record({"problem": problem.record(), **rates, **found}):
        names = QUANTITIES | {"test_loss": QUANTITIES["test_loss"].format(train_rate, adapt_rate)}
        shown = [(names[name], f"{value:.6g}") for name, value in found.items()]
        print_table(("quantity", "value"), shown, "proportional theory")
    return 0


def verify(
    problem: Problem,
    train_rate: float = -0.2,
    adapt_rate: float = 0.2,
    steps: int = 1,
    runs: int = 1000,
    seed: int = 0,
    output: Output = TALKS,
) -> int:
    """Compute the test loss by six methods; fails if they disagree.

    Args:
        problem: the problem.
        train_rate: alpha_t, the inner rate of meta-training, of any sign.
        adapt_rate: alpha_r, the inner rate at test time, of any sign.
        steps: inner gradient steps of meta-training.
        runs: simulated runs.
        seed: seed of all random numbers.
        output: the form of the output.
    """
    # Imported here: it needs optax and the simulation, which `predict` does not.
    from negmaml.paper.cross_check import verify as compare

    rules = GradientDescent(train_rate, steps), GradientDescent(adapt_rate)
    with output.progress("verify"):
        result = compare(problem.problem(), *rules, key=key_of(seed), runs=runs)
    methods = [method._asdict() | {"agrees": method.agrees} for method in result.methods]
    if not output.record({"agrees": result.agrees, "methods": methods}):
        say(str(result))
    # Scripts can tell by the exit status, without reading the table.
    return 0 if result.agrees else 1
