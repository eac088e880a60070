r"""The proximal inner problem and its implicit derivative (implicit MAML).

    theta*(params):   F(theta, params) = grad loss(theta) + strength (theta - params) = 0

By the implicit function theorem d theta* = -(H + strength)^{-1} dF, with H the Hessian of the
loss at theta*: the derivative needs the solution, not the path to it. Both the Newton steps that
find theta* and the derivative solve with H + strength I, by conjugate gradients on
Hessian-vector products. Source: Rajeswaran et al., NeurIPS 2019.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

NEWTON_STEPS, CG_STEPS = 16, 64
LENGTHS = tuple(0.5**k for k in range(8))  # of a Newton step; the best is taken


def proximal_point(
    loss: Callable, params, strength, *, newton_steps: int = NEWTON_STEPS, cg_steps: int = CG_STEPS
):
    r"""The stationary point of loss(theta) + strength/2 |theta - params|^2 near `params`.

    It is the minimiser where the strength exceeds the negative curvature of the loss; for other
    strengths, negative ones included, a stationary point where the iteration reaches one.
    Differentiable in `params`, `strength` and everything the loss closes over, at the price of
    one more solve; at most `cg_steps` conjugate gradient iterations each.
    """
    from jax.scipy.sparse.linalg import cg  # slow to import, and not for theory

    start, unravel = ravel_pytree(params)
    strength = jnp.asarray(strength, start.dtype)
    gradient = jax.grad(lambda flat: loss(unravel(flat)))
    tolerance = float(jnp.finfo(start.dtype).eps) ** 0.75

    def residual(theta):
        return gradient(theta) + strength * (theta - start)

    def iterate(linear, right):
        return cg(linear, right, tol=tolerance, maxiter=cg_steps)[0]

    def solve(linear, right):  # a Hessian is its own transpose; cg alone has no reverse mode here
        return lax.custom_linear_solve(linear, right, iterate, symmetric=True)

    def newton(residual, theta):
        def unfinished(carry):
            k, _, error, first = carry
            return (k < newton_steps) & (error > tolerance * first)

        def step(carry):
            k, theta, _, first = carry
            value, hessian = jax.linearize(residual, theta)
            direction = solve(hessian, -value)
            candidates = theta[None] + jnp.asarray(LENGTHS, theta.dtype)[:, None] * direction[None]
            errors = jnp.linalg.norm(jax.vmap(residual)(candidates), axis=1)
            best = jnp.nanargmin(errors)
            return k + 1, candidates[best], errors[best], first

        error = jnp.linalg.norm(residual(theta))
        return lax.while_loop(unfinished, step, (0, theta, error, error))[1]

    return unravel(lax.custom_root(residual, start, newton, solve))
