"""The commands for one problem: predict and verify."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from negmaml import theory
from negmaml._core.arrays import canonicalize
from negmaml._core.keys import key_of
from negmaml.cli.output import print_table
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
    # Named like the field above, so that its options read --spectrum.exponent.
    shape: Annotated[SpectrumOptions, tyro.conf.arg(name="spectrum")] = SpectrumOptions()

    def problem(self) -> MixedLinearRegression:
        """The problem with these sizes, variances and input covariance."""
        given = asdict(self)
        name, shape = given.pop("spectrum"), given.pop("shape")
        # Eigenvalues in float64, as the theory needs.
        if name != "isotropic":
            with jax.enable_x64(True):
                given["input_covariance"] = named_spectrum(name, self.p, **shape)
        return MixedLinearRegression(**given)


# Without a prefix the sizes are --p and --m instead of --problem.p.
Problem = Annotated[ProblemOptions, tyro.conf.arg(name="")]


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
        task, (train, adapt) = canonicalize((task, rules), np.float64)
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
        # The variance over runs is derived for isotropic inputs.
        if task.isotropic:
            spread = theory.standard_deviation(task, best_train, best_adapt)
            rows["standard deviation of that over runs"] = spread.test_loss
        shown = [(name, f"{float(value):.6g}") for name, value in rows.items()]
    print_table(("quantity", "value"), shown, "proportional theory")
    return 0


def verify(
    problem: Problem,
    train_rate: float = -0.2,
    adapt_rate: float = 0.2,
    steps: int = 1,
    runs: int = 1000,
    seed: int = 0,
) -> int:
    """Compute the test loss by six methods; fails if they disagree.

    Args:
        problem: the problem.
        train_rate: alpha_t, the inner rate of meta-training, of any sign.
        adapt_rate: alpha_r, the inner rate at test time, of any sign.
        steps: inner gradient steps of meta-training.
        runs: simulated runs.
        seed: seed of all random numbers.
    """
    # Imported here: it needs optax and the simulation, which `predict` does not.
    from negmaml.paper.cross_check import verify as compare

    result = compare(
        problem.problem(),
        GradientDescent(train_rate, steps),
        GradientDescent(adapt_rate),
        key=key_of(seed),
        runs=runs,
    )
    print(result)
    # Scripts can tell by the exit status, without reading the table.
    return 0 if result.agrees else 1
