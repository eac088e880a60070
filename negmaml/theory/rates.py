"""Which rate to use: optima of the expansions, in training and at test time."""

import math

import jax
import jax.numpy as jnp

from negmaml.problem import MixedLinearRegression, check_count
from negmaml.rules import GradientDescent, Rule
from negmaml.theory.expansions import distance


def stationary_train_rates(p: int, n_t: int):
    r"""(alpha_t^-, alpha_t^+): where Theorem 1's loss is stationary in the training rate.

        alpha_t^{+-} = -(n_t+1)/(2p) +- sqrt( ((n_t+1)/(2p))^2 + n_t/p )

    The negative one is the minimum, the positive one the maximum, whatever the variances and
    the adaptation rate. Raises TypeError or ValueError for sizes below 1. Source: Bernacchia
    2021, below Theorem 1.

    >>> [round(rate, 4) for rate in stationary_train_rates(p=60, n_t=30)]
    [-1.0112, 0.4945]
    """
    p, n_t = check_count("p", p), check_count("n_t", n_t)
    half = (n_t + 1) / (2 * p)
    negative = -half - (half**2 + n_t / p) ** 0.5
    return negative, -n_t / p / negative  # their product is -n_t/p: no cancellation


def best_adapt_rate(problem: MixedLinearRegression, train: Rule):
    r"""The rate of one adaptation step that minimises the test loss after `train`.

    The loss is a quadratic in alpha_r: with E = nu^2 + D, D = E|omega* - w0|^2,

        alpha_r = E / ( E (1 + (p+1)/n_r) + sigma^2 p/n_r ),

    between 0 (noise alone) and 1/(1 + (p+1)/n_r) (no noise). Returns an array of the shape of
    the training rate; when E = sigma = 0 every rate is optimal and the noiseless value is
    returned. Raises ValueError as `theory.distance` does. Source: Bernacchia 2021, section 4.
    """
    p, n_r = problem.p, problem.n_r
    spread = problem.nu**2 + distance(problem, train)
    noise = jnp.asarray(problem.sigma) ** 2 * p / n_r
    nothing = (spread == 0) & (noise == 0)
    spread = jnp.where(nothing, 1.0, spread)
    return spread / (spread * (1 + (p + 1) / n_r) + noise)


def best_train_rate(problem: MixedLinearRegression, adapt: Rule | None = None):
    r"""The rate of one inner step in meta-training that minimises the test loss, globally.

    The adaptation rule multiplies the distance E|omega* - w0|^2 by a positive number, so the
    optimum is the same for every `adapt`, which may be left out. When p > n_v m it is
    alpha_t^- of `stationary_train_rates`. When p < n_v m it is the lowest minimum over the whole
    line of the rational function of Theorem 2, found on a grid and polished by Newton's method;
    its derivatives in sigma and nu are those of the stationarity condition.

    Returns a scalar. Raises ValueError at p = n_v m. Source: Bernacchia 2021, section 4.
    """
    del adapt
    dtype = jnp.result_type(float, problem.sigma, problem.nu)
    if problem.overparameterized:
        return jnp.asarray(stationary_train_rates(problem.p, problem.n_t)[0], dtype)

    def objective(rate):
        return distance(problem, GradientDescent(rate))

    slope = jax.grad(objective)
    curvature = jax.grad(slope)

    def search(slope, _):
        # Minima lie near zero without noise and near -n_t/(n_v + 1 + p) when noise dominates, so
        # rates 1% apart from far below the scale of the spectrum to n_t leave none out, and start
        # Newton where the curvature is positive.
        smallest, largest = 1e-6 * problem.n_t / (problem.n_t + problem.p), 10 * problem.n_t
        count = round(math.log(largest / smallest) / 0.01)
        rates = jnp.geomspace(smallest, largest, count, dtype=dtype)
        grid = jnp.concatenate([-rates, jnp.zeros(1, dtype), rates])
        best = grid[jnp.argmin(jax.vmap(objective)(grid))]

        def polish(_, rate):
            bend = curvature(rate)
            return jnp.where(bend > 0, rate - slope(rate) / jnp.where(bend > 0, bend, 1.0), rate)

        return jax.lax.fori_loop(0, 6, polish, best)

    return jax.lax.custom_root(
        slope, jnp.zeros((), dtype), search, lambda linear, y: y / linear(jnp.ones_like(y))
    )
