r"""Best rates and ridges for problems with covariances, where the rule at test time matters.

After one gradient step at test time the loss is a quadratic in its rate: with A_j the sums
tr(Sigma^j Omega) nu^2/p + E (omega* - w0)^T Sigma^j (omega* - w0),

    2 L = sigma^2 + A_1 - 2 alpha_r A_2
          + alpha_r^2 ( (n_r+1)/n_r A_3 + tr(Sigma^2)/n_r (A_1 + sigma^2) ),

so the best alpha_r is known for every training rule, and the best of both rates is the minimum of a
function of the training rate only.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import canonicalize, contract, namespace, working_dtype
from negmaml._core.pytree import pytree, static
from negmaml.problem import MixedLinearRegression, adapted
from negmaml.rules import InnerRule, check_rule
from negmaml.theory.anisotropic.equations import PencilSystem
from negmaml.theory.anisotropic.inputs import (
    AnisotropicInputs,
    finite_size_means,
    largest_eigenvalue,
    make_inputs,
    predict,
    predict_traced,
)
from negmaml.theory.isotropic.inputs import is_zero
from negmaml.theory.search import Optimum, minimise, reported, signed_grid

# Ridges tried, in units of n_v m times the mean eigenvalue, up to this factor either way.
RIDGE_RANGE, RIDGE_POINTS = 1e6, 61


class BestStepLoss(NamedTuple):
    """The loss at the best rate of one gradient step at test time: the equation of this module.

    n_r: rows. tasks: the sums tr Sigma^j Omega nu^2/p. square: tr Sigma^2.
    """

    n_r: Any
    tasks: Any
    square: Any

    def quadratic(self, sigma, forms):
        """Return (curvature, slope, constant) of 2 L = curvature r^2 - 2 slope r + constant."""
        A, power = self.tasks + forms, self.square / self.n_r
        noisy = A[..., 0] + sigma**2
        return (self.n_r + 1) / self.n_r * A[..., 2] + power * noisy, A[..., 1], noisy

    def best_rate(self, sigma, forms):
        """Return the rate at which the loss is lowest; 0 where it does not depend on the rate."""
        curvature, slope, _ = self.quadratic(sigma, forms)
        xp = namespace(curvature)
        return xp.where(curvature > 0, slope / xp.where(curvature > 0, curvature, 1), 0)

    def lowest(self, sigma, forms):
        """Return 2 L at the best rate."""
        _, slope, constant = self.quadratic(sigma, forms)
        return constant - slope * self.best_rate(sigma, forms)


class FixedAdaptLoss(NamedTuple):
    """The loss of a given rule at test time: floor + coefficients . forms / 2."""

    floor: Any
    coefficients: Any

    def lowest(self, sigma, forms):
        """Return the loss."""
        del sigma
        return self.floor + contract("...j,j->...", forms, self.coefficients) / 2


@pytree
class PencilObjective:
    """The arrays that a loss depends on, for every rule; names as in `AnisotropicInputs`.

    goal: a `BestStepLoss` or `FixedAdaptLoss`. Functions over a namespace take it, so that JAX and
    the host have derivatives of the loss in these arrays.
    """

    system: PencilSystem
    null_space_forms: Any
    sigma: Any
    goal: Any
    ridged: bool = static()

    def loss(self):
        """Return the loss, by JAX or on the host."""
        found = finite_size_means(self.system, self.ridged)
        forms, limit = found.forms + self.null_space_forms, found.limit + self.null_space_forms
        return _ordered(forms, limit, self.goal, self.sigma)


def _objective(at: AnisotropicInputs, train: InnerRule, goal) -> PencilObjective:
    return PencilObjective(at.system(train), at.null_space_forms, at.sigma, goal, at.ridged)


def _optimum(search, parts) -> Optimum:
    return Optimum(None, search, False, (PencilObjective.loss, parts))


def best_adapt_rate(
    problem: MixedLinearRegression, train: InnerRule, adapt: InnerRule | None, meta_ridge
):
    """Return the best tuned parameter of `adapt` after `train`; one gradient step if None."""
    _require_mean(problem, meta_ridge)
    if adapt is None or adapt.spectral().gradient_rate is not None:
        weights, step = _goal(problem, None)
        found = predict(problem, train, meta_ridge, weights)
        return step.best_rate(problem.sigma, found.forms)
    if train.batch_shape != ():
        raise ValueError(f"train must have one scalar parameter for this adapt, got {train!r}")
    dtype = working_dtype(problem, train, adapt, meta_ridge)
    numbers = canonicalize((problem, train, adapt, meta_ridge), dtype)
    return reported(
        "best_adapt_rate", _best_adaptation(numbers, ()), _adapt_grid(problem, adapt),
        lambda values: _adapted_losses(values, numbers),
    )  # fmt: skip


def _adapted_losses(values, numbers):
    """The means are linear in the form, so one prediction serves all values of the parameter."""
    problem, train, adapt, meta_ridge = numbers
    after = adapted(problem, adapt.with_tunable(values))
    found = predict(problem, train, meta_ridge, after.weights)
    return after.floor + jnp.sum(after.coefficients * found.forms, -1) / 2


def _objective_of_adaptation(value, numbers, _):
    problem, train, adapt, meta_ridge = numbers
    after = adapted(problem, adapt.with_tunable(value))
    at, train = make_inputs(problem, train, meta_ridge, after.weights)
    return _objective(at, train, FixedAdaptLoss(after.floor, after.coefficients))


def _search_adaptation(numbers, _):
    grid = _adapt_grid(numbers[0], numbers[2])
    return minimise(lambda values: _adapted_losses(values, numbers), grid)


def _adapt_grid(problem: MixedLinearRegression, adapt: InnerRule):
    s = problem.modes.s
    top = jnp.max(s)
    return signed_grid(adapt, top * (1 + jnp.sqrt(jnp.sum(s) / (top * problem.n_r))) ** 2)


_best_adaptation = _optimum(_search_adaptation, _objective_of_adaptation)


def best_train_rate(
    problem: MixedLinearRegression, train: InnerRule, adapt: InnerRule | None, meta_ridge
):
    """Return the best tuned parameter of `train`, for `adapt` or, if None, the best test step."""
    _require_mean(problem, meta_ridge)
    numbers = at, train, goal = _numbers(problem, train, adapt, meta_ridge)
    return reported(
        "best_train_rate", _best_parameter(numbers, ()), _train_grid(at, train),
        lambda values: _loss(at, goal, train.with_tunable(values)),
    )  # fmt: skip


def best_meta_ridge(problem: MixedLinearRegression, train: InnerRule, adapt: InnerRule | None):
    """Return the best ridge, 0 if none is better, for `adapt` or, if None, the best test step."""
    at, train, goal = _numbers(problem, train, adapt, 0.0)
    return jnp.exp(_best_log_ridge((dataclasses.replace(at, ridged=True), train, goal), ()))


def _numbers(problem: MixedLinearRegression, train: InnerRule, adapt: InnerRule | None, meta_ridge):
    """Return (inputs, rule, goal), the numbers that an optimum depends on."""
    weights, goal = _goal(problem, adapt)
    at, train = make_inputs(problem, train, meta_ridge, weights)
    return at, train, canonicalize(goal, at.m.dtype)


def _goal(problem: MixedLinearRegression, adapt: InnerRule | None):
    """Return (weights of the forms, the loss as a function of the forms)."""
    if adapt is None:
        s, o, _, _ = problem.modes
        weights = s ** np.arange(1, 4)[:, None]
        square = contract("k,k->", s, s)
        return weights, BestStepLoss(problem.n_r, contract("jk,k->j", weights, o), square)
    after = adapted(problem, check_rule("adapt", adapt))
    if adapt.batch_shape != ():
        raise ValueError(f"adapt must have one scalar parameter, got {adapt!r}")
    # The floor does not depend on the training rule: without it no digits of the rest are lost.
    return after.weights, FixedAdaptLoss(0.0, after.coefficients)


def _loss(at: AnisotropicInputs, goal, train: InnerRule):
    found = predict_traced(at, train)
    return _ordered(found.forms, found.limit, goal, at.sigma)


def _ordered(forms, limit, goal, sigma):
    """Return the loss, with values that keep an order where finite sizes make it infinite."""
    xp = namespace(forms)
    finite = xp.isfinite(forms).all(-1, keepdims=True)
    return goal.lowest(sigma, xp.where(finite, forms, 1e6 * limit))


def _train_grid(at: AnisotropicInputs, train: InnerRule):
    return signed_grid(train, largest_eigenvalue(at.spectrum, at.n_t))


def _objective_of_parameter(value, numbers, _):
    at, train, goal = numbers
    return _objective(at, train.with_tunable(value), goal)


def _search_parameter(numbers, _):
    at, train, goal = numbers
    return minimise(
        lambda values: _loss(at, goal, train.with_tunable(values)), _train_grid(at, train)
    )


_best_parameter = _optimum(_search_parameter, _objective_of_parameter)


def _at_ridge(at: AnisotropicInputs, logarithm) -> AnisotropicInputs:
    return dataclasses.replace(at, meta_ridge=jnp.exp(logarithm))


def _objective_of_ridge(logarithm, numbers, _):
    at, train, goal = numbers
    return _objective(_at_ridge(at, logarithm), train, goal)


def _search_log_ridge(numbers, _):
    """Return the logarithm of the best ridge, minus infinity if no ridge is better still."""
    at, train, goal = numbers
    s, count = at.spectrum.s, at.spectrum.count
    unit = jnp.log(at.m * at.n_v * jnp.sum(count * s) / jnp.sum(count))
    steps = jnp.linspace(-1, 1, RIDGE_POINTS, dtype=unit.dtype)
    loss = jax.vmap(lambda value: _loss(_at_ridge(at, value), goal, train))
    found = minimise(loss, unit + math.log(RIDGE_RANGE) * steps)
    lower, none = loss(jnp.stack([found, jnp.full_like(found, -jnp.inf)]))
    return jnp.where(lower < none, found, -jnp.inf)


_best_log_ridge = _optimum(_search_log_ridge, _objective_of_ridge)


def _require_mean(problem: MixedLinearRegression, meta_ridge) -> None:
    """Raise at the threshold without ridge, where no mean exists."""
    s = problem.modes.s
    if isinstance(s, jax.core.Tracer) or not is_zero(meta_ridge):
        return
    rank = int(np.sum(np.asarray(s) > 0))
    if rank == problem.rows:
        raise ValueError(
            f"n_v m = {rank}, the number of directions with inputs: without meta_ridge every mean "
            "is infinite there; give a meta_ridge, or change m or n_v"
        )
