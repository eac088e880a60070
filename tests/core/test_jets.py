"""Derivatives that NumPy's arrays carry along, against those of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from negmaml._core import jets
from negmaml._core.arrays import namespace, stop_gradient

X, A, B = np.array(0.7), np.array([0.3, 1.1, -0.4]), np.array(1.3)


def smooth(x, a, b):
    xp = namespace(x, a, b)
    rows = xp.exp(x * a[:, None] / b) * xp.asarray(np.arange(4.0)) + xp.sqrt(b + x)
    return (rows[1:] ** 3 / (2 - xp.log(b * x) - rows[:-1])).sum(-1).sum(-1) - 2**0.5 / x


def chosen(x, a, b):
    xp = namespace(x, a, b)
    larger, least = xp.maximum(a * x, b - 0.5), xp.min(a * a - x, -1)
    far = xp.where(xp.isfinite(a) & (np.arange(3) > 0), xp.abs(a) * x**2, b)
    return (
        (larger * xp.clip(a, -x, b)).sum(-1)
        + least * xp.max(far, -1)
        - 1 / stop_gradient(x + b) * b
    )


def shaped(x, a, b):
    xp = namespace(x, a, b)
    wide = (a * xp.ones_like(x)).reshape(3, 1) @ xp.asarray(np.array([1.0])) + x
    return (xp.expm1(wide / 9) * xp.sign(a) * a**1 * (b - wide) ** 2).sum(-1) + a[0] ** 0 * -x


@pytest.mark.parametrize("function", (smooth, chosen, shaped))
def test_value_and_derivatives_are_those_of_jax(function, x64):
    x, (a, b) = jets.variables(X, [A, B])
    found = function(x, a, b)
    arguments = tuple(map(jnp.asarray, (X, A, B)))

    def all_of(*at):
        flat = lambda g: jnp.concatenate([jnp.ravel(part) for part in g])  # noqa: E731
        along = (0, 1, 2)
        first, mixed = (
            flat(jax.grad(f, along)(*at)) for f in (function, jax.grad(function, argnums=0))
        )
        return function(*at), jax.grad(function)(*at), first, mixed

    expected = jax.jit(all_of)(*arguments)
    for key, value in zip(("", "x", "n", "xn"), expected, strict=True):
        np.testing.assert_allclose(found.terms.get(key, 0.0) + 0 * value, value, rtol=1e-12)


def test_a_jet_is_never_taken_for_an_array():
    x, _ = jets.variables(X, [])
    for wrong in (np.sqrt, np.asarray, jnp.sqrt, float, lambda _: jets.no_such_function):
        with pytest.raises((TypeError, AttributeError)):
            wrong(x)
