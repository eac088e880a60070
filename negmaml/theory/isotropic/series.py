"""Functions of a few variables to second order: a value and partial derivatives, by closed rules.

The theory needs a handful of first and second partial derivatives of one explicit function.
Nested transformations of it trace for seconds and give programs of thousands of equations; the
product rule and the derivatives of 1/f and log f are all there is to it, on arrays of NumPy or JAX
alike.
"""

from collections import Counter
from functools import cache
from typing import Any


class Series:
    """{"": f, "x": f_x, "xy": f_xy, ...}; a key holds its letters in order, one left out is zero.

    Of the derivatives, those in `kept` are followed, all of order one or two.
    """

    __array_ufunc__ = None  # NumPy's arrays leave products with a series to the series

    def __init__(self, terms: dict[str, Any], kept: tuple[str, ...]):
        self.terms, self.kept = terms, kept

    def __getitem__(self, key: str):
        return self.terms.get(key, 0.0)

    def __add__(self, other: "Series") -> "Series":
        keys = [key for key in self.kept if key in self.terms or key in other.terms]
        return Series({key: self._plus(other, key) for key in keys}, self.kept)

    def _plus(self, other: "Series", key: str):
        parts = [terms[key] for terms in (self.terms, other.terms) if key in terms]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def __mul__(self, other) -> "Series":
        """The product rule; `other` is a Series or a number."""
        if not isinstance(other, Series):
            return Series({key: other * value for key, value in self.terms.items()}, self.kept)
        product = {}
        for key in self.kept:
            parts = [
                self.terms[a] * other.terms[b]
                if times == 1
                else times * self.terms[a] * other.terms[b]
                for a, b, times in _splits(key)
                if a in self.terms and b in other.terms
            ]
            if parts:
                product[key] = sum(parts[1:], parts[0])
        return Series(product, self.kept)

    __rmul__ = __mul__

    def __sub__(self, other: "Series") -> "Series":
        return self + -1.0 * other

    def reciprocal(self) -> "Series":
        """1/f, with -f_a/f^2 and 2 f_a f_b/f^3 - f_ab/f^2."""
        inverse = 1 / self.terms[""]
        relative = self._over(inverse)
        out = {"": inverse}
        for key in self.kept:
            if len(key) == 1 and key in relative:
                out[key] = -inverse * relative[key]
            elif len(key) == 2:
                parts = self._pair(relative, key, -1.0, 2.0)
                out |= {key: inverse * parts} if parts is not None else {}
        return Series(out, self.kept)

    def log(self) -> "Series":
        """The derivatives of log |f|, f_a/f and f_ab/f - f_a f_b/f^2, without its value."""
        relative = self._over(1 / self.terms[""])
        out = {}
        for key in self.kept:
            if len(key) == 1 and key in relative:
                out[key] = relative[key]
            elif len(key) == 2:
                parts = self._pair(relative, key, 1.0, -1.0)
                out |= {key: parts} if parts is not None else {}
        return Series(out, self.kept)

    def _over(self, inverse) -> dict[str, Any]:
        return {key: inverse * value for key, value in self.terms.items() if key}

    @staticmethod
    def _pair(relative: dict[str, Any], key: str, own: float, cross: float):
        """own f_ab/f + cross f_a f_b/f^2, None where both are zero."""
        a, b = key[0], key[1]
        parts = [own * relative[key]] if key in relative else []
        if a in relative and b in relative:
            parts.append(cross * relative[a] * relative[b])
        return sum(parts[1:], parts[0]) if parts else None


@cache
def _splits(key: str) -> tuple[tuple[str, str, int], ...]:
    """Ways to share the letters of a key between two factors, and how often each comes up."""
    ways: Counter[tuple[str, ...]] = Counter()
    for chosen in range(2 ** len(key)):
        shares = ["", ""]
        for i, letter in enumerate(key):
            shares[chosen >> i & 1] += letter
        ways[tuple(shares)] += 1
    return tuple((a, b, times) for (a, b), times in ways.items())
