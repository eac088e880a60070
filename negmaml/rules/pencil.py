r"""Linear pencils: a rule written so that the task's matrix S enters linearly.

Adaptation of weights omega with auxiliary vectors z = (omega, ..., y) is the stationary point of
the quadratic form z^T (C + A S) z / 2 in all of z but omega. K steps of gradient descent,

    v_k = v_{k-1} - rate S v_{k-1},        z = (v_0 = omega, y_1, v_1, ..., y_K, v_K),

have a multiplier y_k for each step: C couples y_k to v_k (+1) and v_{k-1} (-1), and A couples y_k
to v_{k-1} (rate). Every rule whose steps are linear in the gradients has such a pencil: a step that
moves by a mix of all gradients so far, v_k = v_{k-1} - sum_j M_kj S v_{j-1} (momentum, a schedule
of rates), has M instead of the diagonal. The proximal rule of strength c, S v + c (v - omega) = 0,
has z = (omega, y, v) with y coupled to v by S + c and to omega by -c.

Random matrices enter a pencil one row of data at a time, so averages of any product of filters
follow from one small matrix equation (`negmaml.theory.anisotropic.equations`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import namespace
from negmaml._core.pytree import pytree, static
from negmaml.rules.schedule import combine, separate

DEGREE = 4  # of the polynomial that replaces a filter without a pencil


@pytree
class Pencil:
    """C and A of this module's head; the first variable is omega, the last the adapted weights.

    constant, coupling: C and A, (d, d), symmetric.
    points: (d,), one for each variable that is a point in weight space, zero for a multiplier.
    active: (first, end) of the variables for which A has entries.
    train_train: whether the outer loss uses the rows of data that A couples; then `active` includes
        the last variable.
    """

    constant: jax.Array
    coupling: jax.Array
    points: jax.Array
    active: tuple[int, int] = static()
    train_train: bool = static(default=False)

    def coupled(self) -> jax.Array:
        """A on the variables it involves, (a, a)."""
        first, last = self.active
        return self.coupling[first:last, first:last]

    def for_train_train(self) -> "Pencil":
        """The pencil of an outer loss on the training points themselves."""
        return dataclasses.replace(
            self, active=(self.active[0], len(self.points)), train_train=True
        )


def pencil_of_updates(rule) -> Pencil:
    """The pencil of a rule whose update is linear in parameters and gradient.

    The rule runs on K parameters, with the j-th unit vector as the gradient of step j. After step k
    the parameters are then minus the weights of all gradients so far.
    """
    stepped, fixed = separate(rule)
    dtype = jnp.result_type(float, *jax.tree.leaves(rule))
    units = jnp.eye(rule.steps, dtype=dtype)
    params = jnp.zeros(rule.steps, dtype)
    state, rows = rule.init(params), [params]
    for k in range(rule.steps):
        # A Python loop: a pencil has few steps, and its blocks are written out anyway.
        own = jax.tree.map(lambda values, k=k: values[k], stepped)
        params, state = combine(own, fixed).update(units[k], state, params)
        rows.append(params)
    return chain(-jnp.diff(jnp.stack(rows), axis=0))


def chain(mixing) -> Pencil:
    """The pencil of K steps v_k = v_{k-1} - sum_{j <= k} mixing[k, j] S v_{j-1}; (K, K)."""
    # A step can use only gradients of earlier points.
    mixing = jnp.tril(jnp.atleast_2d(jnp.asarray(mixing)))
    steps, dtype = mixing.shape[0], mixing.dtype
    half = np.zeros((2 * steps + 1, 2 * steps + 1))
    # The multiplier of step k couples to its two points: +1 to v_k and -1 to v_{k-1}.
    for k in range(1, 2 * steps, 2):
        half[k, k + 1], half[k, k - 1] = 1, -1
    blocks = mixing[:, None, :, None] * jnp.asarray(_POINT_TO_MULTIPLIER, dtype)[:, None]
    half_coupling = jnp.pad(blocks.reshape(2 * steps, 2 * steps), (0, 1))
    return Pencil(
        jnp.asarray(half + half.T, dtype),
        half_coupling + half_coupling.T,
        jnp.asarray(np.arange(2 * steps + 1) % 2 == 0, dtype),
        (0, 2 * steps),
    )


def interpolated(b, largest):
    """The mixing, for `chain`, of a polynomial that replaces a filter b with b(0) = 1.

    The polynomial of degree `DEGREE` equals b at 0 and at the Chebyshev points of (0, largest). In
    Newton's form each step but the last multiplies by 1 - x/x_k, and the last mixes all of them.
    """
    xp = namespace(b(largest))
    # Chebyshev points nearly minimise the largest error of interpolation.
    angles = np.pi * (np.arange(DEGREE) + 0.5) / DEGREE
    x = largest * xp.asarray((1 + np.cos(angles)) / 2)
    return xp.concatenate([xp.diag(1 / x)[:-1], _last_step(b, x, xp)[None]])


def error_of(mixing, b, largest) -> float:
    """The largest error of the polynomial of `mixing` on (0, largest), over the largest b there."""
    xp = namespace(mixing)
    grid = largest * xp.asarray(np.linspace(0, 1, 65))
    exact = b(grid)
    # Runs the steps of the mixing on scalars: the polynomial at each point of the grid.
    states = [xp.ones_like(grid)]
    for k in range(len(mixing)):
        gradient = grid * sum(mixing[k, j] * states[j] for j in range(k + 1))
        states.append(states[-1] - gradient)
    return xp.max(xp.abs(states[-1] - exact)) / xp.max(xp.abs(exact))


def _last_step(b, x, xp):
    """The weights of the last step, by forward substitution over the points."""
    products = [xp.ones_like(x)]
    for j in range(DEGREE - 1):
        products.append(products[-1] * (1 - x / x[j]))
    # The last step has to remove this difference at each of the points.
    values = products[-1] - b(x)
    found: list[Any] = []
    for i in range(DEGREE):
        known = sum(found[j] * products[j][i] for j in range(i))
        found.append((values[i] / x[i] - known) / products[i][i])
    return xp.stack(found)


# The place of an entry of the mixing in its 2 x 2 block of (point, multiplier).
_POINT_TO_MULTIPLIER = np.array([[0.0, 0.0], [1.0, 0.0]])


def proximal_pencil(strength) -> Pencil:
    """The pencil of S v + strength (v - omega) = 0."""
    # Variables (omega, y, v); y enforces S v + strength (v - omega) = 0.
    constant = np.array([[0.0, -1.0, 0.0], [-1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    coupling = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    strength = jnp.asarray(strength)
    points = jnp.asarray([1.0, 0.0, 1.0], strength.dtype)
    return Pencil(
        strength * jnp.asarray(constant, strength.dtype),
        jnp.asarray(coupling, strength.dtype),
        points,
        (1, 3),
    )
