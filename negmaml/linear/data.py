"""Data of one meta-training run, or of a set of test tasks."""

from math import prod
from typing import Any, NamedTuple

import jax

from negmaml._core.arrays import cast, contract, working_dtype
from negmaml._core.display import add_fields_repr
from negmaml._core.keys import check_key
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, Float, PRNGKeyArray
from negmaml.problem.covariance import apply_covariance, covariance_sqrt
from negmaml.problem.model import MixedLinearRegression, check_problem


@add_fields_repr
class Data(NamedTuple):
    """Training and validation points of a set of tasks; all leaves lead with the task axis.

    Attributes:
        X_t, y_t: inputs and labels of the support, shapes (m, n_t, p) and (m, n_t).
        X_v, y_v: those of the query, shapes (m, n_v, p) and (m, n_v).

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=6, m=3, n_t=4, n_v=2, n_r=5, sigma=1.0, nu=0.5)
    >>> data = nm.linear.sample(jax.random.key(0), problem)
    >>> data.X_t.shape, data.y_t.shape, data.X_v.shape, data.y_v.shape
    ((3, 4, 6), (3, 4), (3, 2, 6), (3, 2))
    """

    X_t: Float[Array, "m n_t p"]
    y_t: Float[Array, "m n_t"]
    X_v: Float[Array, "m n_v p"]
    y_v: Float[Array, "m n_v"]


class CovarianceRoots(NamedTuple):
    """Square roots of the covariances of inputs and of task weights.

    inputs, weights: in the form of the covariance, a number, (p,) or (p, p).
    """

    inputs: Any
    weights: Any


def covariance_roots(problem: MixedLinearRegression) -> CovarianceRoots:
    """The square roots of both covariances, which multiply the normals of every run."""
    return CovarianceRoots(
        covariance_sqrt(problem.input_covariance), covariance_sqrt(problem.weight_covariance)
    )


@own_settings
def sample(
    key: PRNGKeyArray, problem: MixedLinearRegression, *, sqrt_cov: CovarianceRoots | None = None
) -> Data:
    """Draw the data of one run: m tasks with n_t training and n_v validation points each.

        w ~ N(w0, nu^2/p Omega)      x ~ N(0, Sigma)      y = x.w + sigma noise

    The inputs are the same for every sigma, nu and w0 at a given key: covariances multiply the
    same normals.

    Arguments:
        key: a JAX key.
        problem: the distribution of tasks.
        sqrt_cov: the problem's `covariance_roots`, if they are already known.

    Returns `Data` in the dtype of the problem's numbers.

    >>> import negmaml as nm
    >>> sizes = {"p": 6, "m": 3, "n_t": 4, "n_v": 2, "n_r": 5}
    >>> problem = nm.MixedLinearRegression(**sizes, sigma=0.0, nu=0.0, w0=1.0)
    >>> data = nm.linear.sample(jax.random.key(0), problem)
    >>> float(abs(data.y_t - data.X_t.sum(-1)).max()) < 1e-5  # no noise, and all weights are 1
    True
    """
    key = check_key("key", key)
    check_problem(problem)
    dtype = working_dtype(problem)
    return assemble(draw(key, problem, dtype), cast(problem, dtype), sqrt_cov)


def draw(key, problem: MixedLinearRegression, dtype):
    """The standard normals of one run, flat: one generator call for all of them."""
    return jax.random.normal(key, (normals_per_run(problem),), dtype)


def normals_per_run(problem: MixedLinearRegression) -> int:
    """The number of normals that `draw` draws."""
    return sum(map(prod, _shapes(problem)))


def assemble(
    normals, problem: MixedLinearRegression, sqrt_cov: CovarianceRoots | None = None
) -> Data:
    """Return the data made from the normals of `draw`; `sqrt_cov` are its `covariance_roots`.

    Normals may have leading axes for several runs if the problem has no covariances. Surplus
    normals are not used.
    """
    # A caller that loops over runs computes the roots once, outside of its loop.
    sqrt_cov = covariance_roots(problem) if sqrt_cov is None else sqrt_cov
    # Slices of one draw: a single call of the generator is faster than five.
    parts, start = [], 0
    for shape in _shapes(problem):
        part = normals[..., start : start + prod(shape)]
        parts.append(part.reshape(*part.shape[:-1], *shape))
        start += prod(shape)
    X_t, X_v, direction, noise_t, noise_v = parts
    X_t, X_v = apply_covariance(sqrt_cov.inputs, X_t), apply_covariance(sqrt_cov.inputs, X_v)
    # w ~ N(w0, nu^2/p Omega), then labels y = x.w + sigma noise.
    w = problem.w0 + problem.nu / problem.p**0.5 * apply_covariance(sqrt_cov.weights, direction)
    y_t = contract("...inp,...ip->...in", X_t, w) + problem.sigma * noise_t
    y_v = contract("...inp,...ip->...in", X_v, w) + problem.sigma * noise_v
    return Data(X_t, y_t, X_v, y_v)


def _shapes(problem: MixedLinearRegression) -> tuple[tuple[int, ...], ...]:
    """Training inputs, validation inputs, task directions, and both label noises."""
    m, n_t, n_v, p = problem.m, problem.n_t, problem.n_v, problem.p
    return (m, n_t, p), (m, n_v, p), (m, p), (m, n_t), (m, n_v)
