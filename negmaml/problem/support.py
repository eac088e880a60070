"""A problem in the directions in which its inputs vary; in the others training moves nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import contract
from negmaml.problem.model import MixedLinearRegression


def on_support(problem: MixedLinearRegression):
    """The problem without directions of variance zero, and |omega_0 - w0|^2 in those.

    Where there are some, coordinates along the eigenvectors of the rest, with task weights of the
    same variance. A covariance that is traced is taken as it is.
    """
    covariance = problem.input_covariance
    if covariance is None or isinstance(covariance, jax.core.Tracer):
        return problem, 0.0
    matrix = np.asarray(covariance)
    if matrix.ndim == 1:
        s, V = matrix, np.eye(problem.p, dtype=matrix.dtype)
        varies = s > 0
    else:
        s, V = np.linalg.eigh(matrix.astype(np.result_type(np.float32, matrix)))
        varies = s > problem.p * np.finfo(s.dtype).eps * s[-1]
    if varies.all():
        return problem, 0.0
    varies[np.argmax(s)] = True  # of no directions there would be no problem
    s, V = s[varies], V[:, varies]
    weights = problem.weight_covariance
    if weights is None:
        weights = np.ones_like(s)
    elif np.ndim(weights) == 1:
        weights = contract("pk,p,pl->kl", V, weights, V)
    else:
        weights = contract("pk,pq,ql->kl", V, weights, V)
    w0, omega0 = (
        contract("p,pk->k", jnp.broadcast_to(jnp.asarray(x), (problem.p,)), V)
        for x in (problem.w0, problem.omega0)
    )
    changes = dict(input_covariance=s, weight_covariance=weights * (s.size / problem.p))
    reduced = dataclasses.replace(problem, p=s.size, w0=w0, omega0=omega0, **changes)
    return reduced, problem.offset_squared - reduced.offset_squared
