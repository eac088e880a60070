"""Gradients on the host against differences, to third derivatives, and against those of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.internals import contract, inverse, namespace, stop_gradient, taylor

RNG = np.random.default_rng(1)
A, B = RNG.uniform(0.5, 1.5, (3, 3)), RNG.uniform(0.2, 0.8, 3)


def elementary(a, b):
    xp = namespace(a, b)
    return xp.sum(xp.exp(-a) * xp.log(a) + xp.sqrt(b) * xp.log1p(a) / xp.expm1(b) + a**3 - 2 / b**2)


def products(a, b):
    xp = namespace(a, b)
    stacked = xp.stack([a, a @ a.T])
    whole = contract("ij,j->i", a, b) + (stacked @ a)[1] @ b + b @ a
    return xp.sum(whole * xp.outer(b, b).ravel()[:3]) + b @ b


def inverses(a, b):
    xp = namespace(a, b)
    stacked = xp.stack([a, a * b])
    return xp.sum(inverse(stacked + 3 * np.eye(3)) * a)


def shapes(a, b):
    xp = namespace(a, b)
    wide = xp.pad(a, ((1, 0), (0, 2)), constant_values=0.5)
    joined = xp.concatenate([wide.swapaxes(0, 1), xp.append(b, 1.0)[None]])
    lowered = xp.where(joined > 0.7, joined**2, 3 * joined)
    kept = xp.maximum(xp.clip(lowered, 0.3, 1.2), xp.cumsum(b)[1])
    return xp.sum(kept * joined) + xp.max(b) * xp.min(b) * xp.abs(-b[0])


def complex_numbers(a, b):
    xp = namespace(a, b)
    turned = a + 1j * b
    quotient = (turned * turned) / (turned + 2)
    return xp.sum(xp.real(quotient) * xp.imag(xp.exp(turned)))


def picks(a, b):
    """An index that names entries twice: their adjoints add up."""
    return namespace(a, b).sum(a[np.array([0, 2, 0])] ** 2) * b[[1, 1]].sum()


@pytest.mark.parametrize(
    "function", (elementary, products, inverses, shapes, picks, complex_numbers)
)
def test_gradients_and_their_changes_are_those_of_differences(function):
    u, v, both = ([RNG.normal(size=x.shape) for x in (A, B)] for _ in range(3))
    nothing = [np.zeros_like(x) for x in (A, B)]
    h = 1e-4

    def gradient(*coefficients):
        stacks = [np.stack(of) for of in zip(*coefficients, strict=True)]
        return taylor.gradient(lambda parts: function(*parts), stacks)

    def moved(s, t):
        parts = zip((A, B), u, v, both, strict=True)
        return [x + s * p + t * q + s * t * r for x, p, q, r in parts]

    def slopes(s, t):
        return np.concatenate([x[0].ravel() for x in gradient(moved(s, t), nothing)])

    whole = [x.reshape(4, -1) for x in gradient((A, B), u, v, both)]
    value, in_s, in_t, in_both = np.concatenate(whole, 1)
    rise = (function(*moved(h, 0)) - function(*moved(-h, 0))) / (2 * h)
    along = np.concatenate([x.ravel() for x in u])
    assert value @ along == pytest.approx(rise, rel=1e-6)
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(in_s, (slopes(h, 0) - slopes(-h, 0)) / (2 * h), **close)
    np.testing.assert_allclose(in_t, (slopes(0, h) - slopes(0, -h)) / (2 * h), **close)
    h = 1e-3
    corners = slopes(h, h) - slopes(h, -h) - slopes(-h, h) + slopes(-h, -h)
    np.testing.assert_allclose(in_both, corners / (4 * h**2), rtol=1e-3, atol=1e-3)


def smooth(x, a, b):
    xp = namespace(x, a, b)
    rows = xp.exp(x * a[:, None] / b) * xp.asarray(np.arange(4.0)) + xp.sqrt(b + x)
    return (rows[1:] ** 3 / (2 - xp.log(b * x) - rows[:-1])).sum(-1).sum(-1) - 2**0.5 / x


def chosen(x, a, b):
    xp = namespace(x, a, b)
    larger, least = xp.maximum(a * x, b - 0.5), xp.min(a * a - x, -1)
    far = xp.where(xp.isfinite(a) & (np.arange(3) > 0), xp.abs(a) * x**2, b)
    inverse = 1 / stop_gradient(x + b)
    return (larger * xp.clip(a, -x, b)).sum(-1) + least * xp.max(far, -1) - inverse * b


def shaped(x, a, b):
    xp = namespace(x, a, b)
    wide = (a * xp.ones_like(x)).reshape(3, 1) @ xp.asarray(np.array([1.0])) + x
    return (xp.expm1(wide / 9) * xp.sign(a) * a**1 * (b - wide) ** 2).sum(-1) + a[0] ** 0 * -x


@pytest.mark.parametrize("function", (smooth, chosen, shaped))
def test_the_gradient_and_its_change_along_one_number_are_those_of_jax(function, x64):
    at = np.array(0.7), np.array([0.3, 1.1, -0.4]), np.array(1.3)
    along = np.ones(()), np.zeros(3), np.zeros(())
    pairs = [np.stack(pair) for pair in zip(at, along, strict=True)]
    found = taylor.gradient(lambda parts: function(*parts), pairs)
    gradient = jax.grad(function, (0, 1, 2))
    for ours, value, slope in zip(
        found, *jax.jit(lambda at: jax.jvp(gradient, at, along))(at), strict=True
    ):
        np.testing.assert_allclose(ours[0], value, rtol=1e-12)
        np.testing.assert_allclose(ours[1], slope, rtol=1e-12, atol=1e-15)


def test_a_node_is_never_taken_for_an_array():
    def of(wrong):
        return lambda: taylor.gradient(lambda parts: wrong(parts[0]), [np.ones((2, 3))])

    for wrong in (np.sqrt, np.asarray, jnp.sqrt, float, lambda _: taylor.no_such_function):
        with pytest.raises((TypeError, AttributeError)):
            of(wrong)()
    with pytest.raises(TypeError, match="takes a number that is differentiated for a plain array"):
        of(lambda x: np.sin(np.asarray(x)))()
