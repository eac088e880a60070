"""Exact simulation: draw runs, solve each for omega*, evaluate; all rates use the same runs."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from negmaml._core.arrays import cast, contract, working_dtype
from negmaml._core.checks import check_choice, check_count, check_nonnegative
from negmaml._core.deprecation import renamed_attribute
from negmaml._core.display import Table, add_table_repr, mean_range_text, shape_text
from negmaml._core.jit import FastCompileJit, jit_fast_compile, one_thread
from negmaml._core.keys import check_key
from negmaml._core.meshes import any_mesh, as_mesh, gathered, place, share, within
from negmaml._core.platform import CPU, DeviceSizes, device_platform, with_plan
from negmaml._core.pytree import pytree, static
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, Bool, Devices, Float, PRNGKeyArray, ScalarLike
from negmaml.linear.cholesky import panel_width
from negmaml.linear.data import (
    CovarianceRoots,
    Data,
    assemble,
    covariance_roots,
    draw,
    normals_per_run,
)
from negmaml.linear.evaluate import sampled_test_loss, test_tasks
from negmaml.linear.solve import MetaSolution, minimiser, one_step_corrections, one_step_distances
from negmaml.linear.system import meta_system, one_step_system
from negmaml.problem.adapted_loss import Adapted, adapted, expected_test_loss
from negmaml.problem.covariance import input_range
from negmaml.problem.model import SPLITS, MixedLinearRegression, check_problem
from negmaml.rules import InnerRule, check_filters

EVALUATIONS = ("expected", "sampled")

LIGHT_NORMALS = 2**26  # a second of work, twice what compiling for speed takes longer
# Small systems whose unrolled solution saves more than a third of a second of compiling it.
MANY_SYSTEMS = 10**6


@add_table_repr
class Simulation(NamedTuple):
    """The results of `simulate`; the last axis is the run.

    Attributes:
        test_loss: train shape + adapt shape + (runs,).
        weight_error: |omega* - w0|^2, train shape + (runs,).
        well_conditioned: train shape + (runs,), False where a run is not finite, its system is
            singular to working precision, or Phi has lost more than half its digits to
            cancellation. No run is removed: mask with it, or use float64.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
    >>> train = nm.GradientDescent(jnp.array([-0.5, 0.0, 0.5]))
    >>> result = nm.simulate(jax.random.key(0), problem, train, nm.GradientDescent(0.2))
    >>> result.weight_error.shape, bool(result.well_conditioned.all())
    ((3, 1000), True)
    >>> mean = result.test_loss.mean(-1)
    >>> bool(mean[0] < mean[2])  # a negative rate is better than a positive one
    True
    """

    test_loss: Float[Array, "*shape runs"]
    weight_error: Float[Array, "*train runs"]
    well_conditioned: Bool[Array, "*train runs"]

    def _summary(self) -> Table:
        return Table(
            f"Simulation of {shape_text(self.test_loss)}: train, adapt, runs",
            [
                ("test_loss", mean_range_text(self.test_loss, "runs")),
                ("weight_error", mean_range_text(self.weight_error, "runs")),
                ("well_conditioned", _share_text(self.well_conditioned)),
            ],
        )


Simulation.distance = renamed_attribute(  # type: ignore[attr-defined]
    "Simulation.distance", "weight_error"
)
Simulation.reliable = renamed_attribute(  # type: ignore[attr-defined]
    "Simulation.reliable", "well_conditioned"
)


def _share_text(flags) -> str:
    """The number of flags that are True, as text."""
    if isinstance(flags, jax.core.Tracer):
        return "traced"
    return f"{int(flags.sum())} of {flags.size}"


@own_settings
@any_mesh
def simulate(
    key: PRNGKeyArray,
    problem: MixedLinearRegression,
    train: InnerRule,
    adapt: InnerRule,
    *,
    runs: int = 1000,
    meta_ridge: ScalarLike = 0.0,
    evaluation: str = "expected",
    split: str = "train-validation",
    mesh: Devices | None = None,
) -> Simulation:
    r"""Meta-train exactly on random data, `runs` times, and evaluate on new tasks.

    Each run draws m tasks, solves for the minimiser omega* of the meta-loss that gradient descent
    from omega_0 reaches (`linear.minimiser`), and evaluates it after adaptation. All rates share
    the data of a run, so curves over rates are smooth and their differences have small errors.

    Arguments:
        key: a JAX key. Run i has a key folded from its index: the first runs of a longer simulation
            are those of a shorter one. A key of a generator that is not safe under vmap, such as
            rbg, is hashed into a threefry key.
        train: inner rule of meta-training; its parameter may have any shape.
        adapt: inner rule on test tasks; any shape.
        runs: number of independent runs, static, at least 1.
        meta_ridge: lambda >= 0 of (Phi^T Phi + lambda I), Phi stacked over tasks, not averaged.
        evaluation: "expected", the exact mean over test tasks given omega* (default), or
            "sampled", the paper's protocol of 100 fresh tasks of 50 points.
        split: "train-validation", or "train-train": the outer loss on the training points
            themselves (n_v is then unused).
        mesh: a `jax.sharding.Mesh` or a list of devices that share the runs, of any number; those
            of all processes of `jax.distributed`, too. The results are gathered on every device,
            and are those of one device up to rounding.

    Returns a `Simulation`. Differentiable in rates, sigma, nu, w0, omega0 and meta_ridge; works
    under jit and vmap. dtype follows the problem's and rules' numbers.

    Raises ValueError or TypeError for runs < 1, a negative or non-finite meta_ridge, and unknown
    `evaluation` or `split`.

    >>> import negmaml
    >>> problem = MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
    >>> rates = jnp.array([-0.5, 0.0, 0.5])
    >>> train, adapt = negmaml.GradientDescent(rates), negmaml.GradientDescent(0.2)
    >>> result = simulate(jax.random.key(0), problem, train, adapt)
    >>> result.test_loss.shape
    (3, 1000)
    """
    experiment = Experiment.checked(
        key, problem, train, adapt, runs, meta_ridge, evaluation, split, mesh
    )
    with within(experiment.mesh, experiment):
        return experiment.program()(experiment)


@own_settings
@any_mesh
def compile_simulation(
    key: PRNGKeyArray,
    problem: MixedLinearRegression,
    train: InnerRule,
    adapt: InnerRule,
    *,
    runs: int = 1000,
    meta_ridge: ScalarLike = 0.0,
    evaluation: str = "expected",
    split: str = "train-validation",
    mesh: Devices | None = None,
    index: int | None = None,
) -> Callable[[], Simulation]:
    """`simulate` in two stages: compile now, run when the returned function is called.

    Takes the arguments of `simulate`; an `index` is folded into the key, by the program itself.
    Several programs may compile at once in threads; run them one after another, since XLA on CPU
    can deadlock when two threads run batched linear algebra.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
    >>> train = nm.GradientDescent(jnp.array([-0.5, 0.0, 0.5]))
    >>> adapt = nm.GradientDescent(0.2)
    >>> run = nm.linear.compile_simulation(jax.random.key(0), problem, train, adapt)
    >>> run().test_loss.shape
    (3, 1000)
    """
    experiment = Experiment.checked(
        key, problem, train, adapt, runs, meta_ridge, evaluation, split, mesh
    )
    # The program folds the index into the key, so that one program serves all indices.
    experiment = dataclasses.replace(experiment, index=index)
    options = one_thread(device_platform(experiment))
    with within(experiment.mesh):
        executable = experiment.program().lower(experiment).compile(options)
    return lambda: executable(experiment)


@pytree
class Experiment:
    """All arguments of a simulation, checked, with numbers of one dtype.

    null_space_offset: |omega_0 - w0|^2 in directions in which no input varies; training leaves it.
    index: an integer to fold into the key, or None.
    mesh: the devices that share the runs, or None.
    """

    key: Any
    problem: MixedLinearRegression
    train: InnerRule
    adapt: InnerRule
    meta_ridge: Any
    null_space_offset: Any
    runs: int = static()
    evaluation: str = static()
    split: str = static()
    index: Any = None
    mesh: Mesh | None = static(default=None)

    @classmethod
    def checked(cls, key, problem, train, adapt, runs, meta_ridge, evaluation, split, mesh=None):
        """Return the experiment of valid arguments; raise ValueError or TypeError for others."""
        runs = check_count("runs", runs)
        check_choice("evaluation", evaluation, EVALUATIONS)
        check_choice("split", split, SPLITS)
        meta_ridge = check_nonnegative("meta_ridge", meta_ridge, "a ridge strength")
        key = check_key("key", key)
        check_problem(problem)
        train, adapt = check_filters("train", train), check_filters("adapt", adapt)
        # One dtype for all numbers: 0, 0.0 and jnp.array(0.0) share one program.
        dtype = working_dtype(problem, train, adapt, meta_ridge)
        null_space_offset = 0.0
        if train.spectral().preconditioner is None and adapt.spectral().preconditioner is None:
            problem, null_space_offset = input_range(problem)
        problem, train, adapt, meta_ridge, null_space_offset = cast(
            (problem, train, adapt, meta_ridge, null_space_offset), dtype
        )
        arrays = key, problem, train, adapt, meta_ridge, null_space_offset
        if (mesh := as_mesh(mesh)) is not None:
            arrays = place(arrays, mesh)
        return cls(*arrays, runs, evaluation, split, mesh=mesh)

    @property
    def devices(self) -> int:
        """The number of devices that share the runs."""
        return 1 if self.mesh is None else self.mesh.size

    def program(self) -> FastCompileJit:
        """`_simulate`, compiled fast for few runs or compiled to run fast for many."""
        light = self.runs * normals_of(self.problem, self.evaluation) < LIGHT_NORMALS
        return _simulate_few if light else _simulate_many


class RunPlan(NamedTuple):
    """How runs are computed.

    shape: (blocks, pieces, runs in a piece). A block is computed at once and drawn piece by piece.
    panel: of the program that solves small systems (`cholesky_solve`).
    """

    shape: tuple[int, int, int]
    panel: int


def _simulate(experiment: Experiment) -> Simulation:
    problem, runs = experiment.problem, experiment.runs
    rates = math.prod(experiment.train.batch_shape)
    rows = problem.m * problem.n_t if experiment.split == "train-train" else problem.rows

    def plan(sizes: DeviceSizes) -> RunPlan:
        normals = normals_kept(problem, experiment.evaluation, sizes)
        each, few = -(-runs // experiment.devices), runs * rates < MANY_SYSTEMS
        return plan_runs(each, normals, rates, min(rows, problem.p), sizes, few)

    return with_plan(plan, lambda plan: _simulate_in_blocks(experiment, plan))


def _simulate_in_blocks(experiment: Experiment, plan: RunPlan) -> Simulation:
    key, problem, train, adapt = (
        experiment.key, experiment.problem, experiment.train, experiment.adapt,
    )  # fmt: skip
    ridge, evaluation, runs = experiment.meta_ridge, experiment.evaluation, experiment.runs
    key = key if experiment.index is None else jax.random.fold_in(key, experiment.index)
    constants = precompute(problem, adapt, evaluation, plan.panel)

    def one_run(index, normals):
        data = assemble(normals, problem, constants.sqrt_cov)
        if experiment.split == "train-train":
            data = Data(data.X_t, data.y_t, data.X_t, data.y_t)
        # Even numbers address training data, odd numbers test data.
        test_key = jax.random.fold_in(key, 2 * index + 1)
        return evaluate_run(test_key, data, problem, train, adapt, ridge, evaluation, constants)

    def draw_run(index):
        return draw(jax.random.fold_in(key, 2 * index), problem, problem.sigma.dtype)

    @jax.checkpoint  # reverse mode stores indices, not data
    def block(indices):
        # In a loop by itself, or XLA on CPU merges the last stage of the generator into every use
        # of its numbers, and compiles and runs it once for each use. Accelerators draw in a single
        # piece, without a loop: numbers drawn where they are used move a third of the bytes.
        normals = lax.map(jax.vmap(draw_run), indices)
        found = jax.vmap(one_run)(indices.ravel(), normals.reshape(indices.size, -1))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), found)

    # Surplus runs fill the last block and are dropped below.
    mesh = experiment.mesh
    _, pieces, size = plan.shape
    indices = jnp.arange(experiment.devices * math.prod(plan.shape)).reshape(-1, pieces, size)
    if mesh is None:
        results = lax.map(block, indices)
    else:
        own = share(lambda _, indices: lax.map(block, indices), (), indices, mesh)
        results = gathered(own, mesh)
    losses, weight_error, well_conditioned = jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], indices.size)[..., :runs], results
    )
    if evaluation == "expected":
        forms = None if losses is None else jnp.moveaxis(losses, -2, -1)
        # The expectation is linear in these forms, so it is taken once for all runs.
        losses = expected(problem, weight_error, forms, adapt, constants)
        losses = jnp.moveaxis(losses, len(train.batch_shape), -1)
    return Simulation(losses, weight_error + experiment.null_space_offset, well_conditioned)


def expected(problem, weight_error, forms, adapt: InnerRule, constants):
    """Return the expected test loss, of weight error + adapt shape; forms have one axis more."""
    if constants.adapted is None:
        return expected_test_loss(problem, weight_error, adapt)
    return constants.adapted.test_loss(forms)


_simulate_few = jit_fast_compile(_simulate)
_simulate_many = jit_fast_compile(_simulate, profile="heavy")


class RunConstants(NamedTuple):
    """Quantities that all runs of one problem share.

    sqrt_cov: square roots of its covariances.
    adapted: the expected loss as quadratic forms, for inputs with a covariance, else None.
    panel: of the program that solves small systems (`cholesky_solve`).
    """

    sqrt_cov: CovarianceRoots
    adapted: Adapted | None
    panel: int


def precompute(
    problem: MixedLinearRegression, adapt: InnerRule, evaluation: str, panel: int
) -> RunConstants:
    """Compute the constants of all runs once, outside the loop over runs."""
    # Without covariances the expected loss depends on omega only through the weight error.
    if problem.isotropic or evaluation == "sampled":
        return RunConstants(covariance_roots(problem), None, panel)
    return RunConstants(covariance_roots(problem), adapted(problem, adapt), panel)


def evaluate_run(
    test_key, data: Data, problem, train, adapt, ridge, evaluation, constants: RunConstants
):
    """(test loss, weight_error, well_conditioned) of one run.

    For the expected loss the first is None if it follows from the weight error, else the quadratic
    forms of `constants.adapted`.
    """
    # The weights themselves are not needed, and a wide system need not form them.
    if evaluation == "expected" and constants.adapted is None:
        return None, *meta_train_distance(data, problem, train, ridge, constants.panel)
    omega, well_conditioned = meta_train(data, problem, train, ridge, constants.panel)
    error = omega - problem.w0
    weight_error = jnp.sum(error**2, -1)
    if constants.adapted is not None:
        return constants.adapted.forms(error), weight_error, well_conditioned
    loss = sampled_test_loss(test_key, problem, omega, adapt, sqrt_cov=constants.sqrt_cov)
    return loss, weight_error, well_conditioned


def normals_of(problem: MixedLinearRegression, evaluation: str) -> int:
    """The number of normals that a run draws, including simulated test tasks."""
    return normals_kept(problem, evaluation, CPU)


def normals_kept(problem: MixedLinearRegression, evaluation: str, sizes: DeviceSizes) -> int:
    """The number of normals of a run that exist at once."""
    tested = normals_per_run(test_tasks(problem)) if evaluation == "sampled" else 0
    return normals_per_run(problem) + int(sizes.tests_kept * tested)


def plan_runs(
    runs: int, normals: int, rates: int, k: int, sizes: DeviceSizes, few: bool = False
) -> RunPlan:
    """Plan the runs, and less than a block more, for a device.

    normals: of a run. rates, k: each run solves a k x k system for each rate. few: whether the
    systems are too few to repay a longer program.
    """
    numbers = normals + sizes.systems_kept * rates * k**2
    blocks = -(-runs // max(1, sizes.block_numbers // numbers))
    # Equal blocks, so that the surplus is smallest.
    in_block = -(-runs // blocks)
    pieces = min(sizes.draws, in_block)
    size = -(-in_block // pieces)
    if blocks > 1 and size >= sizes.lanes:
        size = -(-size // sizes.lanes) * sizes.lanes
        blocks = -(-runs // (pieces * size))
    return RunPlan((blocks, pieces, size), panel_width(k, sizes, few))


def meta_train(
    data: Data, problem: MixedLinearRegression, train: InnerRule, ridge, panel: int
) -> MetaSolution:
    """omega* of one run at every rate, from one Gram matrix for all rates if that is accurate."""
    if _use_shared_gram(data, train):
        start, system, rates = _one_step(data, problem, train)
        delta, well_conditioned = one_step_corrections(system, rates.ravel(), ridge, panel)
        return MetaSolution(
            (start + delta).reshape(*rates.shape, -1), well_conditioned.reshape(rates.shape)
        )
    Phi, r = meta_system(data, train)
    omega, well_conditioned = minimiser(Phi, r, problem.omega0, meta_ridge=ridge)
    # Phi = X_v - C X_t: if the filter nearly vanishes, Phi is only the rounding error of X_v.
    half_the_digits = jnp.finfo(Phi.dtype).eps ** 0.5 * jnp.max(jnp.abs(data.X_v))
    return MetaSolution(
        omega, well_conditioned & (jnp.max(jnp.abs(Phi), (-2, -1)) > half_the_digits)
    )


def meta_train_distance(
    data: Data, problem: MixedLinearRegression, train: InnerRule, ridge, panel: int
):
    """|omega* - w0|^2 of one run at every rate, and its flag; cheaper than `meta_train`."""
    if _use_shared_gram(data, train):
        start, system, rates = _one_step(data, problem, train)
        found = one_step_distances(system, rates.ravel(), ridge, start - problem.w0, panel)
        return jax.tree.map(lambda x: x.reshape(rates.shape), found)
    omega, well_conditioned = meta_train(data, problem, train, ridge, panel)
    return jnp.sum((omega - problem.w0) ** 2, -1), well_conditioned


def _use_shared_gram(data: Data, train: InnerRule) -> bool:
    """Return whether the normal equations are accurate enough to serve all rates of a run.

    They square the condition number, so the system has to be far from square. With a single task
    the filter may vanish on part of the spectrum.
    """
    m, rows, p = data.X_v.shape
    N = m * rows
    return train.spectral().constant_filter is not None and m > 1 and max(N, p) >= 1.5 * min(N, p)


def _one_step(data: Data, problem: MixedLinearRegression, train: InnerRule):
    """(omega_0, the system of labels relative to it, rates)."""
    start = jnp.broadcast_to(problem.omega0, data.X_v.shape[-1:])
    # Labels relative to omega_0 make the solution the correction omega* - omega_0.
    y_t = data.y_t - contract("itp,p->it", data.X_t, start)
    y_v = data.y_v - contract("ivp,p->iv", data.X_v, start)
    system = one_step_system(Data(data.X_t, y_t, data.X_v, y_v), train.spectral().preconditioner)
    return start, system, jnp.asarray(train.spectral().constant_filter)
