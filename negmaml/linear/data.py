"""Data of one meta-training run, or of a set of test tasks."""

from math import prod
from typing import Any, NamedTuple

import jax

from negmaml._core.arrays import cast, contract, working_dtype
from negmaml._core.keys import check_key
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, Float, PRNGKeyArray
from negmaml.problem.covariance import apply_covariance, covariance_sqrt
from negmaml.problem.model import MixedLinearRegression, check_problem


class Data(NamedTuple):
    """Training and validation points of a set of tasks; all leaves lead with the task axis.

    Shapes: X_t (m, n_t, p), y_t (m, n_t), X_v (m, n_v, p), y_v (m, n_v).
    """

    X_t: Float[Array, "m n_t p"]
    y_t: Float[Array, "m n_t"]
    X_v: Float[Array, "m n_v p"]
    y_v: Float[Array, "m n_v"]


class Roots(NamedTuple):
    """Square roots of the covariances of inputs and task weights, in the form of each."""

    inputs: Any
    weights: Any


def roots(problem: MixedLinearRegression) -> Roots:
    """What colours the normals of every run alike."""
    return Roots(
        covariance_sqrt(problem.input_covariance), covariance_sqrt(problem.weight_covariance)
    )


@own_settings
def sample(
    key: PRNGKeyArray, problem: MixedLinearRegression, *, colours: Roots | None = None
) -> Data:
    """Draw the data of one run: m tasks with n_t training and n_v validation points each.

        w ~ N(w0, nu^2/p Omega)      x ~ N(0, Sigma)      y = x.w + sigma noise

    The inputs are the same for every sigma, nu and w0 at a given key; covariances colour the same
    normals (`colours`: the problem's `roots`, where a caller has them). Returns `Data` in the dtype
    of the problem's numbers.
    """
    key = check_key("key", key)
    check_problem(problem)
    dtype = working_dtype(problem)
    return assemble(draw(key, problem, dtype), cast(problem, dtype), colours)


def draw(key, problem: MixedLinearRegression, dtype):
    """The standard normals of one run, flat: one generator call for all of them."""
    return jax.random.normal(key, (normals_per_run(problem),), dtype)


def normals_per_run(problem: MixedLinearRegression) -> int:
    """How many numbers `draw` draws."""
    return sum(map(prod, _shapes(problem)))


def assemble(normals, problem: MixedLinearRegression, colours: Roots | None = None) -> Data:
    """The data that the normals of `draw` stand for; `colours` are the problem's `roots`.

    Of several runs on leading axes likewise, for problems without covariances. Normals beyond what
    the problem needs are left.
    """
    colours = roots(problem) if colours is None else colours
    parts, start = [], 0
    for shape in _shapes(problem):
        part = normals[..., start : start + prod(shape)]
        parts.append(part.reshape(*part.shape[:-1], *shape))
        start += prod(shape)
    X_t, X_v, direction, noise_t, noise_v = parts
    X_t, X_v = apply_covariance(colours.inputs, X_t), apply_covariance(colours.inputs, X_v)
    w = problem.w0 + problem.nu / problem.p**0.5 * apply_covariance(colours.weights, direction)
    y_t = contract("...inp,...ip->...in", X_t, w) + problem.sigma * noise_t
    y_v = contract("...inp,...ip->...in", X_v, w) + problem.sigma * noise_v
    return Data(X_t, y_t, X_v, y_v)


def _shapes(problem: MixedLinearRegression) -> tuple[tuple[int, ...], ...]:
    """Training inputs, validation inputs, task directions, and both label noises."""
    m, n_t, n_v, p = problem.m, problem.n_t, problem.n_v, problem.p
    return (m, n_t, p), (m, n_v, p), (m, p), (m, n_t), (m, n_v)
