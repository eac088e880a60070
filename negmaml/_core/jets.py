r"""Derivatives of single numbers on the host: NumPy's arrays that carry a few of their derivatives.

What is written over `numerics.namespace` runs on these as it does on arrays of NumPy or JAX, and
then knows f, its derivative f_x in one number x, all f_n in several numbers n, and the mixed f_xn:
what an optimum in x depends on n by. There is nothing to trace and nothing to compile, where the
same derivatives by nested transformations are a program of thousands of equations. All there is
to it is the product rule and, for a function g of one number,

    g(f)_x = g' f_x,    g(f)_n = g' f_n,    g(f)_xn = g' f_xn + g'' f_x f_n.

This module is the namespace: its functions are those of NumPy that formulas of the package use, for
jets and plain arrays alike. What it lacks is an AttributeError, and what takes a jet for an array
raises a TypeError.
"""

import builtins
from collections.abc import Callable
from typing import Any

import numpy as np

_PRODUCT = {
    "": (("", ""),),
    "x": (("x", ""), ("", "x")),
    "n": (("n", ""), ("", "n")),
    "xn": (("xn", ""), ("x", "n"), ("n", "x"), ("", "xn")),
}

inf, finfo, broadcast_to = np.inf, np.finfo, np.broadcast_to


class Jet:
    """{"": f, "x": f_x, "n": f_n, "xn": f_xn}; one left out is zero.

    f_n and f_xn have an axis for n in front. Derivatives broadcast to the shape of f.
    """

    __slots__ = ("terms",)
    __array_ufunc__ = None  # NumPy's arrays leave sums and products with a jet to the jet
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, terms: dict[str, Any]):
        self.terms = terms

    def __array__(self, *_, **__):
        raise TypeError("a jet is no array: the formula takes it for one of NumPy or JAX")

    @property
    def value(self):
        """f alone."""
        return self.terms[""]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of f, like the following."""
        return np.shape(self.value)

    @property
    def ndim(self) -> int:
        return np.ndim(self.value)

    @property
    def size(self) -> int:
        return np.size(self.value)

    @property
    def dtype(self):
        return np.asarray(self.value).dtype

    def __add__(self, other):
        return _sum(self, other, np.add, lambda x: x)

    __radd__ = __add__

    def __sub__(self, other):
        return _sum(self, other, np.subtract, np.negative)

    def __rsub__(self, other):
        return -self + other

    def __neg__(self):
        return Jet({key: -term for key, term in self.terms.items()})

    def __mul__(self, other):
        if _foreign(other):
            return NotImplemented
        a, b = _aligned(self, other)
        found = {}
        for key, pairs in _PRODUCT.items():
            parts = [a[i] * b[j] for i, j in pairs if i in a and j in b]
            if parts:
                found[key] = sum(parts[1:], parts[0])
        return Jet(found)

    __rmul__ = __mul__

    def __truediv__(self, other):
        return self * _inverse(other)

    def __rtruediv__(self, other):
        return _inverse(self) * other

    def __pow__(self, k):
        f = self.value
        return _composed(self, f**k, k * f ** (k - 1), k * (k - 1) * f ** (k - 2 if k > 1 else 0))

    def __matmul__(self, weights):
        return (self * weights).sum(-1)

    def __abs__(self):
        return _composed(self, np.abs(self.value), np.sign(self.value), None)

    def __lt__(self, other):
        return self.value < value_of(other)

    def __le__(self, other):
        return self.value <= value_of(other)

    def __gt__(self, other):
        return self.value > value_of(other)

    def __ge__(self, other):
        return self.value >= value_of(other)

    def __eq__(self, other):
        return self.value == value_of(other)

    def __ne__(self, other):
        return self.value != value_of(other)

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        return self._each(lambda term, front: term[(slice(None),) * front + index])

    def reshape(self, *shape):
        """As of an array, of every term."""
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        return self._each(lambda term, front: term.reshape(term.shape[:front] + shape))

    def sum(self, axis: int):
        """Over an axis counted from the end."""
        return self._each(lambda term, _: term.sum(axis))

    def max(self, axis: int):
        """The largest along the last axis."""
        return self._chosen(np.argmax(self.value, axis), axis)

    def min(self, axis: int):
        """The smallest along the last axis."""
        return self._chosen(np.argmin(self.value, axis), axis)

    def _chosen(self, i, axis: int):
        i = np.expand_dims(i, axis)
        return self._each(
            lambda term, front: np.take_along_axis(
                term, np.broadcast_to(i, term.shape[:front] + i.shape), axis
            ).squeeze(axis)
        )

    def _each(self, function: Callable):
        """`function` of every term in full and the number of its axes in front."""
        found = {}
        for key, term in self.terms.items():
            front = int("n" in key)
            full = np.broadcast_to(term, np.shape(term)[:front] + self.shape)
            found[key] = function(full, front)
        return Jet(found)


def variables(x, numbers: list):
    """x and the arrays `numbers` as jets: n runs over x and then over all of these, flat."""
    units = np.eye(1 + sum(np.size(number) for number in numbers))
    jets, start = [Jet({"": x, "x": np.ones_like(x), "n": units[0]})], 1
    for number in numbers:
        own = units[start : start + np.size(number)]
        jets.append(Jet({"": number, "n": own.T.reshape(len(units), *np.shape(number))}))
        start += np.size(number)
    return jets[0], jets[1:]


def with_value(jet, value) -> Jet:
    """The derivatives of a jet, or an array, with another value."""
    return Jet((jet.terms if isinstance(jet, Jet) else {}) | {"": value})


def value_of(x):
    """Of a jet its value, of an array itself."""
    return x.value if isinstance(x, Jet) else x


def _foreign(x) -> bool:
    """Whether x is something that knows jets, but is none, and not a number or array."""
    return not isinstance(x, Jet | np.ndarray | np.generic | int | float)


def _aligned(*values) -> list[dict[str, Any]]:
    """Terms of jets or arrays, of equal rank but for the axis in front."""
    rank = builtins.max(np.ndim(value_of(value)) for value in values)
    return [_ranked(value, rank) for value in values]


def _ranked(value, rank: int) -> dict[str, Any]:
    if not isinstance(value, Jet):
        return {"": value}
    more = rank - value.ndim
    if not more:
        return value.terms
    return {
        key: term.reshape(term.shape[:1] + (1,) * more + term.shape[1:]) if "n" in key else term
        for key, term in value.terms.items()
    }


def _sum(left, right, plus: Callable, alone: Callable):
    if _foreign(right):
        return NotImplemented
    a, b = _aligned(left, right)
    return Jet(
        {
            key: plus(a[key], b[key]) if key in a and key in b else a[key] if key in a
            else alone(b[key])
            for key in _PRODUCT if key in a or key in b
        }
    )  # fmt: skip


def _composed(f: Jet, value, first, second) -> Jet:
    """g(f) from g, g' and g'' at f; None where g'' is zero everywhere."""
    terms = f.terms
    found = {"": value} | {key: first * terms[key] for key in terms if key}
    if second is not None and "x" in terms and "n" in terms:
        bent = second * terms["x"] * terms["n"]
        found["xn"] = found["xn"] + bent if "xn" in found else bent
    return Jet(found)


def _inverse(f):
    if not isinstance(f, Jet):
        return 1 / f
    inverse = 1 / f.value
    square = inverse * inverse
    return _composed(f, inverse, -square, 2 * square * inverse)


def exp(f):
    """As of NumPy, like all that follow."""
    value = np.exp(value_of(f))
    return _composed(f, value, value, value) if isinstance(f, Jet) else value


def expm1(f):
    if not isinstance(f, Jet):
        return np.expm1(f)
    slope = np.exp(f.value)
    return _composed(f, np.expm1(f.value), slope, slope)


def log(f):
    if not isinstance(f, Jet):
        return np.log(f)
    inverse = 1 / f.value
    return _composed(f, np.log(f.value), inverse, -inverse * inverse)


def sqrt(f):
    value = np.sqrt(value_of(f))
    if not isinstance(f, Jet):
        return value
    return _composed(f, value, 0.5 / value, -0.25 / value / f.value)


def abs(f):
    return f.__abs__()


def sign(f):
    return np.sign(value_of(f))


def isfinite(f):
    return np.isfinite(value_of(f))


def isinf(f):
    return np.isinf(value_of(f))


def asarray(f, dtype=None):
    return f if isinstance(f, Jet) else np.asarray(f, dtype)


def ones_like(f):
    return np.ones_like(value_of(f))


def zeros_like(f):
    return np.zeros_like(value_of(f))


def max(f, axis: int):
    return f.max(axis)


def min(f, axis: int):
    return f.min(axis)


def where(condition, one, other):
    """Derivatives are those of what is chosen."""
    a, b = _aligned(one, other)
    rank = np.ndim(condition)
    if rank > np.ndim(a[""]) and rank > np.ndim(b[""]):
        a, b = _ranked(Jet(a), rank), _ranked(Jet(b), rank)
    return Jet(
        {
            key: np.where(condition, a.get(key, 0.0), b.get(key, 0.0))
            for key in _PRODUCT if key in a or key in b
        }
    )  # fmt: skip


def maximum(one, other):
    return where(value_of(one) >= value_of(other), one, other)


def minimum(one, other):
    return where(value_of(one) <= value_of(other), one, other)


def clip(f, low, high):
    return minimum(maximum(f, low), high)
