r"""Linear pencils: a rule written so that the task's matrix S enters linearly.

Adaptation of weights omega with auxiliary vectors z = (omega, ..., y) is the stationary point of the
quadratic form z^T (C + A S) z / 2 in all of z but omega. K steps of gradient descent,

    v_k = v_{k-1} - rate S v_{k-1},        z = (v_0 = omega, y_1, v_1, ..., y_K, v_K),

have a multiplier y_k for each step: C couples y_k to v_k (+1) and v_{k-1} (-1), and A couples y_k to
v_{k-1} (rate). Every rule whose steps are linear in the gradients has such a pencil: a step that
moves by a mix of all gradients so far, v_k = v_{k-1} - sum_j M_kj S v_{j-1} (momentum, a schedule of
rates), has M instead of the diagonal. The proximal rule of strength c, S v + c (v - omega) = 0, has
z = (omega, y, v) with y coupled to v by S + c and to omega by -c.

Random matrices enter a pencil one row of data at a time, so averages of any product of filters follow
from one small matrix equation (`negmaml.theory.structured_equations`).
"""

import jax
import jax.numpy as jnp

from negmaml._core.pytree import pytree, static


@pytree
class Pencil:
    """C and A of this module's head; the first variable is omega, the last what is tested.

    constant: C, (d, d), symmetric.
    coupling: A on the variables it involves, (r, r), symmetric.
    points: (r,), one for each of those variables that is a point in weight space, zero for a
        multiplier: where label noise enters.
    first: position of the first of those variables, which are consecutive.
    """

    constant: jax.Array
    coupling: jax.Array
    points: jax.Array
    first: int = static()


def chain(mixing) -> Pencil:
    """The pencil of K steps v_k = v_{k-1} - sum_{j <= k} mixing[k, j] S v_{j-1}; (K, K)."""
    mixing = jnp.atleast_2d(jnp.asarray(mixing))
    steps = mixing.shape[0]
    v, y = 2 * jnp.arange(steps + 1), 2 * jnp.arange(steps) + 1
    zero = jnp.zeros((2 * steps + 1, 2 * steps + 1), mixing.dtype)
    half = zero.at[y, v[1:]].set(1.0).at[y, v[:-1]].set(-1.0)
    constant = half + half.T
    half = zero.at[y[:, None], v[None, :-1]].set(jnp.tril(mixing))
    coupling = (half + half.T)[:-1, :-1]
    points = jnp.zeros(2 * steps, mixing.dtype).at[v[:-1]].set(1.0)
    return Pencil(constant, coupling, points, 0)


def proximal(strength) -> Pencil:
    """The pencil of S v + strength (v - omega) = 0."""
    c = jnp.asarray(strength)
    zero, one = jnp.zeros_like(c), jnp.ones_like(c)
    constant = jnp.array([[zero, -c, zero], [-c, zero, c], [zero, c, zero]])
    coupling = jnp.array([[zero, one], [one, zero]])
    return Pencil(constant, coupling, jnp.array([zero, one]), 1)
