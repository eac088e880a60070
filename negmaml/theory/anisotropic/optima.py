r"""What is best for problems with covariances, where the rule at test time matters in training.

After one gradient step at test time the loss is a quadratic in its rate: with A_j the sums
tr(Sigma^j Omega) nu^2/p + E (omega* - w0)^T Sigma^j (omega* - w0),

    2 L = sigma^2 + A_1 - 2 alpha_r A_2 + alpha_r^2 ( (n_r+1)/n_r A_3 + tr(Sigma^2)/n_r (A_1 +
    sigma^2) ),

so the best alpha_r is known for every training rule, and the best of both rates is the minimum of a
function of the training rate alone.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import contract, namespace, settled, working_dtype
from negmaml._core.pytree import pytree, static
from negmaml.problem import MixedLinearRegression, adapted
from negmaml.rules import Rule, check_rule
from negmaml.theory.anisotropic.equations import PencilSystem
from negmaml.theory.anisotropic.inputs import (
    AnisotropicInputs,
    largest_eigenvalue,
    make_inputs,
    predict,
    predict_traced,
    resummed,
)
from negmaml.theory.isotropic.inputs import is_zero
from negmaml.theory.search import Optimum, minimise, reported, signed_grid

# Ridges tried, in units of n_v m times the mean eigenvalue, up to this factor either way.
RIDGE_RANGE, RIDGE_POINTS = 1e6, 61


class Step(NamedTuple):
    """What the best step at test time needs: n_r, sums tr Sigma^j Omega nu^2/p, and tr Sigma^2."""

    n_r: Any
    tasks: Any
    square: Any

    def quadratic(self, sigma, forms):
        """(curvature, slope, constant) of 2 L in the rate: curvature r^2 - 2 slope r + ..."""
        A, power = self.tasks + forms, self.square / self.n_r
        noisy = A[..., 0] + sigma**2
        return (self.n_r + 1) / self.n_r * A[..., 2] + power * noisy, A[..., 1], noisy

    def lowest(self, sigma, forms):
        """2 L at the best rate."""
        curvature, slope, constant = self.quadratic(sigma, forms)
        return constant - slope * _vertex(curvature, slope)


class Weighted(NamedTuple):
    """The loss of a given rule at test time, up to constants and a factor."""

    coefficients: Any

    def lowest(self, sigma, forms):
        """2 L less a constant."""
        del sigma
        return contract("...j,j->...", forms, self.coefficients)


class Whole(NamedTuple):
    """The loss of a given rule at test time: floor + coefficients . forms / 2."""

    floor: Any
    coefficients: Any

    def lowest(self, sigma, forms):
        """The loss itself."""
        del sigma
        return self.floor + contract("...j,j->...", forms, self.coefficients) / 2


@pytree
class Parts:
    """Arrays that an objective depends on; as in `AnisotropicInputs`."""

    system: PencilSystem
    still: Any
    sigma: Any
    goal: Any
    ridged: bool = static()

    def objective(self):
        """The loss, for JAX or the host."""
        found = resummed(self.system, self.ridged)
        return _ordered(found.forms + self.still, found.limit + self.still, self.goal, self.sigma)


def _parts_at(at: AnisotropicInputs, train: Rule, goal) -> Parts:
    return Parts(at.system(train), at.still, at.sigma, goal, at.ridged)


def _optimum(search, parts) -> Optimum:
    return Optimum(None, search, False, (Parts.objective, parts))


def best_adapt_rate(problem: MixedLinearRegression, train: Rule, adapt: Rule | None, meta_ridge):
    """The tuned parameter of `adapt`, one gradient step when None, after `train`."""
    _require_mean(problem, meta_ridge)
    if adapt is None or (adapt.one_step is not None and adapt.metric is None):
        weights, step = _goal(problem, None)
        found = predict(problem, train, meta_ridge, weights)
        curvature, slope, _ = step.quadratic(problem.sigma, found.forms)
        return _vertex(curvature, slope)
    if train.batch_shape != ():
        raise ValueError(f"train must have one scalar parameter for this adapt, got {train!r}")
    dtype = working_dtype(problem, train, adapt, meta_ridge)
    numbers = settled((problem, train, adapt, meta_ridge), dtype)
    return reported(
        "best_adapt_rate", _best_adaptation(numbers, ()), _adapt_grid(problem, adapt),
        lambda values: _adapted_losses(values, numbers),
    )  # fmt: skip


def _adapted_losses(values, numbers):
    """The means are linear in the form, so one prediction serves all values of the parameter."""
    problem, train, adapt, meta_ridge = numbers
    after = adapted(problem, adapt.with_tuned(values))
    found = predict(problem, train, meta_ridge, after.weights)
    return after.floor + jnp.sum(after.coefficients * found.forms, -1) / 2


def _parts_of_adaptation(value, numbers, _):
    problem, train, adapt, meta_ridge = numbers
    after = adapted(problem, adapt.with_tuned(value))
    at, train = make_inputs(problem, train, meta_ridge, after.weights)
    return _parts_at(at, train, Whole(after.floor, after.coefficients))


def _search_adaptation(numbers, _):
    grid = _adapt_grid(numbers[0], numbers[2])
    return minimise(lambda values: _adapted_losses(values, numbers), grid)


def _adapt_grid(problem: MixedLinearRegression, adapt: Rule):
    s = problem.modes.s
    top = jnp.max(s)
    return signed_grid(adapt, top * (1 + jnp.sqrt(jnp.sum(s) / (top * problem.n_r))) ** 2)


_best_adaptation = _optimum(_search_adaptation, _parts_of_adaptation)


def best_train_rate(problem: MixedLinearRegression, train: Rule, adapt: Rule | None, meta_ridge):
    """The tuned parameter of `train`, for `adapt` or, when None, the best step at test time."""
    _require_mean(problem, meta_ridge)
    weights, goal = _goal(problem, adapt)
    at, train = make_inputs(problem, train, meta_ridge, weights)
    (at, train, goal), _ = numbers = _parts(at, train, goal)
    return reported(
        "best_train_rate", _best_parameter(*numbers),
        signed_grid(train, largest_eigenvalue(at.spectrum, at.n_t)),
        lambda values: _loss(at, goal, train.with_tuned(values)),
    )  # fmt: skip


def best_meta_ridge(problem: MixedLinearRegression, train: Rule, adapt: Rule | None):
    """The ridge, for `adapt` or, when None, the best step at test time; 0 where that is best."""
    weights, goal = _goal(problem, adapt)
    at, train = make_inputs(problem, train, 0.0, weights)
    return jnp.exp(_best_log_ridge(*_parts(dataclasses.replace(at, ridged=True), train, goal)))


def _parts(at: AnisotropicInputs, train: Rule, goal):
    """(numbers, fixed) of an `Optimum`."""
    return (at, train, settled(goal, at.m.dtype)), ()


def _goal(problem: MixedLinearRegression, adapt: Rule | None):
    """(weights of the forms, what is made of them): `Weighted` or, with None, the best `Step`."""
    if adapt is None:
        s, o, _, _ = problem.modes
        weights = s ** np.arange(1, 4)[:, None]
        square = contract("k,k->", s, s)
        return weights, Step(problem.n_r, contract("jk,k->j", weights, o), square)
    after = adapted(problem, check_rule("adapt", adapt))
    if adapt.batch_shape != ():
        raise ValueError(f"adapt must have one scalar parameter, got {adapt!r}")
    return after.weights, Weighted(after.coefficients)


def _vertex(curvature, slope):
    """Where it is lowest; 0 where every rate is as good."""
    xp = namespace(curvature)
    return xp.where(curvature > 0, slope / xp.where(curvature > 0, curvature, 1), 0)


def _loss(at: AnisotropicInputs, goal, train: Rule):
    """What is minimised; ordered even where finite sizes make it infinite."""
    found = predict_traced(at, train)
    return _ordered(found.forms, found.limit, goal, at.sigma)


def _ordered(forms, limit, goal, sigma):
    xp = namespace(forms)
    finite = xp.isfinite(forms).all(-1, keepdims=True)
    return goal.lowest(sigma, xp.where(finite, forms, 1e6 * limit))


def _parts_of_parameter(value, numbers, _):
    at, train, goal = numbers
    return _parts_at(at, train.with_tuned(value), goal)


def _search_parameter(numbers, _):
    at, train, goal = numbers
    grid = signed_grid(train, largest_eigenvalue(at.spectrum, at.n_t))
    return minimise(lambda values: _loss(at, goal, train.with_tuned(values)), grid)


_best_parameter = _optimum(_search_parameter, _parts_of_parameter)


def _parts_of_ridge(logarithm, numbers, _):
    at, train, goal = numbers
    return _parts_at(dataclasses.replace(at, meta_ridge=jnp.exp(logarithm)), train, goal)


def _search_log_ridge(numbers, _):
    """The logarithm of the best ridge, minus infinity where none is better still."""
    at, train, goal = numbers
    s, count = at.spectrum.s, at.spectrum.count
    unit = jnp.log(at.m * at.n_v * jnp.sum(count * s) / jnp.sum(count))
    steps = jnp.linspace(-1, 1, RIDGE_POINTS, dtype=unit.dtype)

    def loss(value):
        return _loss(dataclasses.replace(at, meta_ridge=jnp.exp(value)), goal, train)

    objective = jax.vmap(loss)

    found = minimise(objective, unit + math.log(RIDGE_RANGE) * steps)
    lower, none = objective(jnp.stack([found, jnp.full_like(found, -jnp.inf)]))
    return jnp.where(lower < none, found, -jnp.inf)


_best_log_ridge = _optimum(_search_log_ridge, _parts_of_ridge)


def _require_mean(problem: MixedLinearRegression, meta_ridge) -> None:
    s = problem.modes.s
    if isinstance(s, jax.core.Tracer) or not is_zero(meta_ridge):
        return
    rank = int(np.sum(np.asarray(s) > 0))
    if rank == problem.rows:
        raise ValueError(
            f"n_v m = {rank}, the number of directions with inputs: without meta_ridge every mean "
            "is infinite there; give a meta_ridge, or change m or n_v"
        )
