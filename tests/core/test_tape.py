"""Gradients on the host against differences, to third derivatives."""

import numpy as np
import pytest

from negmaml._core import tape
from negmaml._core.arrays import contract, namespace
from negmaml._core.factorisations import inverse

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


@pytest.mark.parametrize("function", (elementary, products, inverses, shapes, complex_numbers))
def test_gradients_and_their_changes_are_those_of_differences(function):
    u, v, both = ([RNG.normal(size=x.shape) for x in (A, B)] for _ in range(3))
    nothing = [np.zeros_like(x) for x in (A, B)]
    h = 1e-4

    def gradient(*coefficients):
        stacks = [np.stack(of) for of in zip(*coefficients, strict=True)]
        return tape.gradient(lambda parts: function(*parts), stacks)

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


def test_a_formula_that_takes_a_node_for_an_array_is_refused():
    with pytest.raises(TypeError, match="takes a number that is differentiated for a plain array"):
        tape.gradient(lambda parts: np.sin(np.asarray(parts[0])), [np.ones((2, 3))])
