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
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.compilation import quick_jit
from negmaml._core.numerics import contract
from negmaml.problem import MixedLinearRegression, adapted
from negmaml.rules import Rule, check_rule
from negmaml.theory.search import minimise, signed_grid, stationary
from negmaml.theory.setting import is_zero
from negmaml.theory.structured import Situation, predict, predict_traced, situation_of

# Ridges tried, in units of n_v m times the mean eigenvalue, up to this factor either way.
RIDGE_RANGE, RIDGE_POINTS = 1e6, 61


def best_adapt_rate(problem: MixedLinearRegression, train: Rule, adapt: Rule | None, meta_ridge):
    """The tuned parameter of `adapt`, one gradient step when None, after `train`."""
    _require_mean(problem, meta_ridge)
    if adapt is None or (adapt.one_step is not None and adapt.metric is None):
        s, o, _, _ = problem.modes
        found = predict(problem, train, meta_ridge, _powers(s))
        curvature, slope, _ = _quadratic(s, o, problem.n_r, problem.sigma, found.forms)
        return _vertex(curvature, slope)
    if train.batch_shape != ():
        raise ValueError(f"train must have one scalar parameter for this adapt, got {train!r}")
    derivatives = _derivatives(problem, train, adapt, meta_ridge)
    return _best_adaptation(problem, train, adapt, meta_ridge, derivatives)


@partial(quick_jit, static_argnames="derivatives")
def _best_adaptation(problem, train: Rule, adapt: Rule, meta_ridge, derivatives: bool):
    """The means are linear in the form, so one prediction serves all values of the parameter."""

    def losses(values):
        after = adapted(problem, adapt.with_tuned(values))
        found = predict(problem, train, meta_ridge, after.weights)
        own = after.coefficients * found.forms
        return after.floor + jnp.sum(own, -1) / 2

    def loss(value):
        return losses(value[None])[0]

    found = minimise(losses, signed_grid(adapt, _largest(problem.modes.s, problem.n_r)))
    return stationary(loss, found) if derivatives else found


def best_train_rate(problem: MixedLinearRegression, train: Rule, adapt: Rule | None, meta_ridge):
    """The tuned parameter of `train`, for `adapt` or, when None, the best step at test time."""
    _require_mean(problem, meta_ridge)
    weights, goal = _goal(problem, adapt)
    situation, train = situation_of(problem, train, meta_ridge, weights)
    return _best_parameter(situation, train, goal, _derivatives(situation, train, goal))


def best_meta_ridge(problem: MixedLinearRegression, train: Rule, adapt: Rule | None):
    """The ridge, for `adapt` or, when None, the best step at test time; 0 where that is best."""
    weights, goal = _goal(problem, adapt)
    situation, train = situation_of(problem, train, 0.0, weights)
    return _best_ridge(situation, train, goal, _derivatives(situation, train, goal))


def _goal(problem: MixedLinearRegression, adapt: Rule | None):
    """(weights of the forms, how they make up what is minimised): coefficients, or n_r alone."""
    if adapt is None:
        s = problem.modes.s
        return _powers(s), jnp.asarray(float(problem.n_r), s.dtype)
    after = adapted(problem, check_rule("adapt", adapt))
    if adapt.batch_shape != ():
        raise ValueError(f"adapt must have one scalar parameter, got {adapt!r}")
    return after.weights, after.coefficients


def _powers(s):
    return s ** jnp.arange(1, 4)[:, None]


def _quadratic(s, o, n_r, sigma, forms):
    """(curvature, slope, constant) of 2 L in the rate of one step, curvature r^2 - 2 slope r +
    ..."""
    A = contract("jk,k->j", _powers(s), o) + forms
    power = jnp.sum(s**2) / n_r
    curvature = (n_r + 1) / n_r * A[..., 2] + power * (A[..., 0] + sigma**2)
    return curvature, A[..., 1], A[..., 0] + sigma**2


def _vertex(curvature, slope):
    """Where it is lowest; 0 where every rate is as good."""
    return jnp.where(curvature > 0, slope / jnp.where(curvature > 0, curvature, 1), 0)


def _loss(at: Situation, goal, found):
    """What is minimised, of a prediction; ordered even where finite sizes make it infinite."""

    def value(forms):
        if jnp.ndim(goal):
            return contract("...j,j->...", forms, goal)
        curvature, slope, constant = _quadratic(at.s, at.o, goal, at.sigma, forms)
        return constant - slope * _vertex(curvature, slope)

    finite = jnp.all(jnp.isfinite(found.forms), -1, keepdims=True)
    return value(jnp.where(finite, found.forms, 1e6 * found.limit))


@partial(quick_jit, static_argnames="derivatives")
def _best_parameter(at: Situation, train: Rule, goal, derivatives: bool):
    def objective(value):
        return _loss(at, goal, predict_traced(at, train.with_tuned(value)))

    found = minimise(objective, signed_grid(train, _largest(at.s, at.n_t)))
    return stationary(objective, found) if derivatives else found


@partial(quick_jit, static_argnames="derivatives")
def _best_ridge(at: Situation, train: Rule, goal, derivatives: bool):
    def value(ridge):
        ridged = dataclasses.replace(at, meta_ridge=ridge, ridged=True)
        return _loss(ridged, goal, predict_traced(ridged, train))

    def objective(logarithm):
        return value(jnp.exp(logarithm))

    unit = jnp.log(at.m * at.n_v * jnp.sum(at.s) / jnp.sum(at.s > 0))
    steps = jnp.linspace(-1, 1, RIDGE_POINTS, dtype=unit.dtype)
    found = minimise(jax.vmap(objective), unit + math.log(RIDGE_RANGE) * steps)
    lower, none = jax.vmap(value)(jnp.stack([jnp.exp(found), jnp.zeros_like(unit)]))
    found = stationary(objective, found) if derivatives else found
    return jnp.where(lower < none, jnp.exp(found), 0)


def _largest(s, n):
    """About the largest eigenvalue of S."""
    top = jnp.max(s)
    return top * (1 + jnp.sqrt(jnp.sum(s) / (top * n))) ** 2


def _derivatives(*trees) -> bool:
    """Whether someone may take derivatives: a program without them is traced sooner."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


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
