"""The linear model as a sweep function: every field of the problem, and all rates at once."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.arrays import working_dtype
from negmaml._core.checks import check_choice, check_count, check_nonnegative
from negmaml._core.jit import compiler_options
from negmaml._core.keys import as_typed, check_key, counter_based
from negmaml._core.platform import DeviceSizes, device_platform, sizes_for, with_plan
from negmaml._core.pytree import pytree, static
from negmaml._core.settings import own_settings
from negmaml._core.types import PRNGKeyArray
from negmaml.linear.data import assemble, draw
from negmaml.linear.simulation import (
    EVALUATIONS,
    RunPlan,
    evaluate_run,
    expected,
    normals_kept,
    normals_of,
    plan_runs,
    precompute,
)
from negmaml.problem.model import MixedLinearRegression
from negmaml.problem.spectra import named_spectrum
from negmaml.rules import GradientDescent

SIZES = ("p", "m", "n_t", "n_v", "n_r")
STEPS = ("train_steps", "adapt_steps")
RATES = ("train_rate", "adapt_rate")
SHAPE = {"exponent": 1.0, "level": 10.0, "share": 0.5, "spikes": 1.0}  # of `named_spectrum`
STATIC = (*SIZES, *STEPS, "spectrum")
DEFAULTS: dict[str, Any] = {
    "w0": 0.0,
    "omega0": 0.0,
    "meta_ridge": 0.0,
    "train_steps": 1,
    "adapt_steps": 1,
}
DEFAULTS |= {"spectrum": "isotropic", **SHAPE}


@pytree
class LinearModel:
    """Meta-training of the linear model, exactly, once for each key: a function for `nm.sweep`.

    `linear(key, p=..., m=..., n_t=..., n_v=..., n_r=..., sigma=..., nu=..., train_rate=...,
    adapt_rate=...)`, and optionally w0, omega0 (scalars), meta_ridge, train_steps, adapt_steps, and
    of the inputs spectrum="power", exponent and so on (`problem.named_spectrum`), returns the first
    run of `nm.simulate` at that key:

        test_loss: train_rate.shape + adapt_rate.shape
        weight_error, well_conditioned: train_rate.shape

    Sizes and steps are static, both rate axes are vectorized: one pass over the data of a cell
    serves all of them, and all rates share their random numbers. It is a `sweeps.SweepFunction`.

    Arguments:
        evaluation: "expected", the exact mean over test tasks, or "sampled", the paper's protocol.

    >>> import negmaml as nm
    >>> model = nm.linear.LinearModel()
    >>> sizes = {"p": 20, "m": 2, "n_t": 10, "n_v": 2, "n_r": 10, "sigma": 0.1, "nu": 1.0}
    >>> rates = {"train_rate": jnp.array([-0.3, 0.0, 0.3]), "adapt_rate": 0.2}
    >>> model(jax.random.key(0), **sizes, **rates)["test_loss"].shape
    (3,)
    """

    evaluation: str = static()

    def __init__(self, evaluation: str = "expected") -> None:
        check_choice("evaluation", evaluation, EVALUATIONS)
        object.__setattr__(self, "evaluation", evaluation)

    accepts: ClassVar[tuple[str, ...]] = (
        *STATIC,
        "sigma",
        "nu",
        "w0",
        "omega0",
        "meta_ridge",
        *RATES,
        *SHAPE,
    )
    requires: ClassVar[tuple[str, ...]] = (*SIZES, "sigma", "nu", *RATES)
    static_axes: ClassVar[tuple[str, ...]] = STATIC
    vectorized_axes: ClassVar[tuple[str, ...]] = RATES
    output_dims: ClassVar[Mapping[str, Sequence[str]]] = {
        "test_loss": RATES, "weight_error": RATES[:1], "well_conditioned": RATES[:1]
    }  # fmt: skip

    @own_settings
    def __call__(self, key: PRNGKeyArray, **point: Any) -> dict[str, jax.Array]:
        key = as_typed(check_key("key", key))
        point = DEFAULTS | point
        # A batch of one: a single cell and a batch of cells then give the same numbers.
        numbers = {n: jnp.asarray(v)[None] for n, v in point.items() if self._is_number(n)}
        shared = {n: v for n, v in point.items() if n not in numbers}
        return jax.tree.map(lambda x: x[0], self.batched(key[None], numbers, shared))

    def _is_number(self, name: str) -> bool:
        return name not in (*STATIC, *RATES)

    def check(self, **point: Any) -> None:
        """Raise the errors of `MixedLinearRegression` for invalid values."""
        point = DEFAULTS | point
        for name in STEPS:
            check_count(name, point[name])
        _problem(point)
        check_nonnegative("meta_ridge", point["meta_ridge"], "a ridge strength")

    def batch_cells(self, **sizes: Any) -> int:
        """The number of cells that one call of the program should compute."""
        problem = _problem(DEFAULTS | {"sigma": 0.0, "nu": 0.0} | sizes)
        device = sizes_for(device_platform())
        most = device.steps_in_call * device.block_numbers
        return max(2, most // normals_of(problem, self.evaluation))

    def compiler_options(self, platform: str, cells: int, **sizes: Any) -> dict[str, Any] | None:
        """Options to compile a program that will compute `cells` cells."""
        # A program that runs only a few times should compile fast rather than run fast.
        few = cells <= 4 * self.batch_cells(**sizes)
        return compiler_options(platform, "light" if few else "heavy")

    @own_settings
    def batched(
        self, keys: PRNGKeyArray, numbers: Mapping[str, Any], shared: Mapping[str, Any]
    ) -> dict[str, jax.Array]:
        """Many cells: keys (B,), numbers (B,); shared rates of any shape, sizes as integers.

        Cells are drawn and solved in pieces that fit the cache, like the runs of `nm.simulate`.
        """
        # Generators that are unsafe under vmap would mix the draws of cells.
        keys = counter_based(keys)
        point = {**DEFAULTS, **numbers, **shared}
        dtype = working_dtype(*(point[n] for n in point if n not in STATIC))
        rules = [
            GradientDescent(jnp.asarray(point[rate], dtype), point[steps])
            for rate, steps in zip(RATES, STEPS, strict=True)
        ]
        numbers = {
            n: jnp.broadcast_to(jnp.asarray(v, dtype), keys.shape)
            for n, v in point.items()
            if self._is_number(n)
        }
        fixed = {name: point[name] for name in (*SIZES, "spectrum")}
        # Only the sizes matter to its draws; the numbers differ from cell to cell.
        problem = _problem(fixed | {"sigma": 0.0, "nu": 0.0})
        rates = math.prod(rules[0].batch_shape)

        def plan(sizes: DeviceSizes) -> RunPlan:
            normals = normals_kept(problem, self.evaluation, sizes)
            return plan_runs(len(keys), normals, rates, min(problem.rows, problem.p), sizes)

        def planned(plan: RunPlan):
            shape = plan.shape

            # Pad with copies of the last cell to full pieces, which compile once.
            def fold(x):
                return x[jnp.minimum(jnp.arange(math.prod(shape)), len(x) - 1)].reshape(shape)

            def piece(cells):
                keys, numbers = cells
                # In a loop of its own, for the reason that `negmaml.linear.simulation` gives.
                normals = lax.map(
                    jax.vmap(lambda key: draw(jax.random.fold_in(key, 0), problem, dtype)), keys
                )
                flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (keys, normals, numbers))
                one = partial(self._one, train=rules[0], adapt=rules[1], panel=plan.panel)
                return jax.vmap(lambda k, z, n: one(k, z, fixed | n))(*flat)

            out = lax.map(piece, jax.tree.map(fold, (keys, numbers)))
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(keys)], out)

        return with_plan(plan, planned)

    def _one(self, key, normals, point, train, adapt, panel: int) -> dict[str, jax.Array]:
        """One cell from its normals, as `nm.simulate` does a run."""
        problem = _problem(point)
        shared = precompute(problem, adapt, self.evaluation, panel)
        # Addresses 0 and 1 of the cell's key, as in run 0 of `simulate`.
        data, test_key = assemble(normals, problem, shared.sqrt_cov), jax.random.fold_in(key, 1)
        ridge = point["meta_ridge"]
        loss, weight_error, well_conditioned = evaluate_run(
            test_key, data, problem, train, adapt, ridge, self.evaluation, shared
        )
        if self.evaluation == "expected":
            loss = expected(problem, weight_error, loss, adapt, shared)
        return {
            "test_loss": loss,
            "weight_error": weight_error,
            "well_conditioned": well_conditioned,
        }


def _problem(point: dict[str, Any]) -> MixedLinearRegression:
    names = (*SIZES, "sigma", "nu", "w0", "omega0")
    given = {name: point[name] for name in names if name in point}
    if point["spectrum"] != "isotropic":
        shape = {name: point.get(name, value) for name, value in SHAPE.items()}
        given["input_covariance"] = named_spectrum(point["spectrum"], point["p"], **shape)
    return MixedLinearRegression(**given)
