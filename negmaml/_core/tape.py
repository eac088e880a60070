r"""Gradients on the host: reverse mode on truncated Taylor numbers, up to third derivatives.

A `Node` holds numbers c_0 + c_1 e, or c_0 + c_1 e + c_2 d + c_3 e d, with e^2 = d^2 = 0, and how it
was made. Reverse mode over these numbers yields the gradient and its changes along directions:

    grad f(s + e v) = grad f(s) + e (Hessian f)(s) v.

That costs a few times as much as f, and there is nothing to compile. This module is a namespace
like `negmaml._core.jets`: its functions are those of NumPy that formulas use, and an unsupported
one is an AttributeError. Complex numbers may occur inside; the adjoint z' of z is that with
dL = Re(z' dz).
"""

import builtins
from collections.abc import Callable
from typing import Any

import numpy as np

inf, nan, finfo = np.inf, np.nan, np.finfo


class Node:
    """c, (2 or 4, ...): the coefficients. parents: pairs of a node and the pullback to it."""

    __slots__ = ("adjoint", "c", "index", "parents")
    __array_ufunc__ = None  # NumPy's arrays leave sums and products with a node to the node
    __hash__ = None  # type: ignore[assignment]
    count = 0  # of nodes so far, to visit them in order
    c: Any
    adjoint: Any
    parents: tuple[tuple["Node", Callable], ...]
    index: int

    def __init__(self, c, *parents: tuple["Node", Callable]):
        self.c, self.parents, self.adjoint = c, parents, None
        Node.count += 1
        self.index = Node.count

    def __array__(self, *_, **__):
        raise TypeError("a formula takes a number that is differentiated for a plain array")

    @property
    def value(self):
        return self.c[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.c.shape[1:]

    @property
    def ndim(self) -> int:
        return self.c.ndim - 1

    @property
    def size(self) -> int:
        return self.c[0].size

    @property
    def dtype(self):
        return self.c.dtype

    @property
    def T(self):
        return transpose(self, tuple(range(self.ndim))[::-1])

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __neg__(self):
        return Node(-self.c, (self, np.negative))

    def __abs__(self):
        return abs(self)

    def __add__(self, other):
        if _foreign(other):
            return NotImplemented
        a, b = _aligned(self, other)
        if not isinstance(other, Node):
            return Node(a + b, (self, _same))
        return Node(a + b, (self, _same), (other, _same))

    __radd__ = __add__

    def __sub__(self, other):
        return self + (-other)

    def __rsub__(self, other):
        return -self + other

    def __mul__(self, other):
        if _foreign(other):
            return NotImplemented
        return _bilinear(np.multiply, self, other, _times, _times)

    __rmul__ = __mul__

    def __truediv__(self, other):
        return self * (_inverse(other) if isinstance(other, Node) else 1 / np.asarray(other))

    def __rtruediv__(self, other):
        return _inverse(self) * other

    def __pow__(self, k: int):
        value = self.c[0]
        powers, factor = [], 1
        for i in range(4):  # the derivatives, zero beyond the degree
            powers.append(factor * value ** (k - i) if factor else np.zeros_like(value))
            factor *= k - i
        return _composed(self, *powers)

    def __matmul__(self, other):
        return matmul(self, other)

    def __rmatmul__(self, other):
        return matmul(other, self)

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
        index = (slice(None), *(index if isinstance(index, tuple) else (index,)))

        def back(adjoint):
            whole = np.zeros(self.c.shape, adjoint.dtype)
            whole[index] = adjoint
            return whole

        return Node(self.c[index], (self, back))

    def reshape(self, *shape):
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        found = self.c.reshape(len(self.c), *shape)
        return Node(found, (self, lambda adjoint: adjoint.reshape(self.c.shape)))

    def ravel(self):
        return self.reshape(-1)

    def swapaxes(self, i: int, j: int):
        axes = list(range(self.ndim))
        axes[i], axes[j] = axes[j], axes[i]
        return transpose(self, tuple(axes))

    def transpose(self, *axes: int):
        return transpose(self, axes)

    def sum(self, axis: int | None = None):
        return sum(self, axis)

    def max(self, axis: int = -1):
        return max(self, axis)

    def min(self, axis: int = -1):
        return min(self, axis)

    def astype(self, dtype):
        del dtype  # all of one type
        return self


def gradient(function: Callable, values: list) -> list:
    """The gradient of a scalar function of a list of arrays; all with the coefficients in front.

    values: real arrays, (2, ...) or (4, ...) each, a value and its changes; the gradient likewise.
    """
    leaves = [Node(np.asarray(x, np.float64)) for x in values]
    found = function(leaves)
    if isinstance(found, Node):
        _backward(found)
    return [np.zeros_like(x.c) if x.adjoint is None else x.adjoint for x in leaves]


def _backward(found: Node) -> None:
    reached: dict[int, Node] = {}
    unseen = [found]
    while unseen:
        node = unseen.pop()
        if node.index not in reached:
            reached[node.index] = node
            unseen += [parent for parent, _ in node.parents]
    found.adjoint = np.zeros_like(found.c)
    found.adjoint[0] = 1.0
    for index in sorted(reached, reverse=True):
        node = reached[index]
        for parent, back in node.parents if node.adjoint is not None else ():
            move = _fitting(back(node.adjoint), parent)
            parent.adjoint = move if parent.adjoint is None else parent.adjoint + move


def _fitting(adjoint, node: Node):
    """Summed over the axes along which the node was broadcast; real where it is."""
    more = adjoint.ndim - node.c.ndim
    if more > 0:
        adjoint = adjoint.sum(tuple(range(1, 1 + more)))
    wide = tuple(
        i for i, (n, m) in enumerate(zip(node.c.shape, adjoint.shape, strict=True)) if n < m
    )
    if wide:
        adjoint = adjoint.sum(wide, keepdims=True)
    if np.iscomplexobj(adjoint) and not np.iscomplexobj(node.c):
        return adjoint.real
    return adjoint


def value_of(x):
    """The plain values, of an array itself."""
    return x.value if isinstance(x, Node) else x


def _same(adjoint):
    return adjoint


def with_value(x, value):
    """The derivatives of a node with another value."""
    if not isinstance(x, Node):
        return value
    c = x.c.copy()
    c[0] = value
    return Node(c, (x, _same))


def _foreign(x) -> bool:
    """Whether x knows nodes, but is neither one nor a number or array."""
    return not isinstance(x, Node | np.ndarray | np.generic | int | float | complex)


def _coefficients(x, count: int):
    """(count, ...) of a node or an array."""
    if isinstance(x, Node):
        return x.c
    x = np.asarray(x)
    c = np.zeros((count, *x.shape), np.result_type(x, np.float64))
    c[0] = x
    return c


def _all(*values):
    """The coefficients of all, as many as of the nodes among them."""
    count = next(len(x.c) for x in values if isinstance(x, Node))
    return [_coefficients(x, count) for x in values]


def _ranked(c, rank: int):
    """With `rank` axes after the first, new ones in front."""
    more = rank + 1 - c.ndim
    return c.reshape(len(c), *(1,) * more, *c.shape[1:]) if more > 0 else c


def _aligned(one, other):
    a, b = _all(one, other)
    rank = builtins.max(a.ndim, b.ndim) - 1
    return _ranked(a, rank), _ranked(b, rank)


def _product(times: Callable, a, b):
    """The product of two sets of coefficients; `times` multiplies two arrays."""
    found = [times(a[0], b[0]), times(a[0], b[1]) + times(a[1], b[0])]
    if len(a) == 4:
        found.append(times(a[0], b[2]) + times(a[2], b[0]))
        both = times(a[1], b[2]) + times(a[2], b[1])
        found.append(times(a[0], b[3]) + times(a[3], b[0]) + both)
    return np.stack(found)


def _times(adjoint, other):
    return _product(np.multiply, adjoint, _ranked(other, adjoint.ndim - 1))


def _bilinear(times: Callable, one, other, to_one: Callable, to_other: Callable) -> Node:
    """A product; `to_one(adjoint, other)` pulls back to the first factor, `to_other` likewise."""
    a, b = _aligned(one, other) if times is np.multiply else _all(one, other)
    parents = []
    if isinstance(one, Node):
        parents.append((one, lambda adjoint: to_one(adjoint, b)))
    if isinstance(other, Node):
        parents.append((other, lambda adjoint: to_other(adjoint, a)))
    return Node(_product(times, a, b), *parents)


def _composed(f: Node, value, first, second, third) -> Node:
    """g(f) from g and its derivatives at f."""
    c = f.c
    found, slopes = [value, first * c[1]], [first, second * c[1]]
    if len(c) == 4:
        both = c[1] * c[2]
        found += [first * c[2], first * c[3] + second * both]
        slopes += [second * c[2], second * c[3] + third * both]
    pulled = np.stack(slopes)
    return Node(np.stack(found), (f, lambda adjoint: _times(adjoint, pulled)))


def _inverse(f: Node) -> Node:
    r = 1 / f.c[0]
    return _composed(f, r, -(r**2), 2 * r**3, -6 * r**4)


def exp(f):
    if not isinstance(f, Node):
        return np.exp(f)
    value = np.exp(f.c[0])
    return _composed(f, value, value, value, value)


def expm1(f):
    if not isinstance(f, Node):
        return np.expm1(f)
    slope = np.exp(f.c[0])
    return _composed(f, np.expm1(f.c[0]), slope, slope, slope)


def log(f):
    if not isinstance(f, Node):
        return np.log(f)
    r = 1 / f.c[0]
    return _composed(f, np.log(f.c[0]), r, -(r**2), 2 * r**3)


def log1p(f):
    if not isinstance(f, Node):
        return np.log1p(f)
    r = 1 / (1 + f.c[0])
    return _composed(f, np.log1p(f.c[0]), r, -(r**2), 2 * r**3)


def sqrt(f):
    if not isinstance(f, Node):
        return np.sqrt(f)
    root = np.sqrt(f.c[0])
    return _composed(f, root, 0.5 / root, -0.25 / root**3, 0.375 / root**5)


def abs(f):
    return where(value_of(f) >= 0, f, -f)


def real(f):
    return Node(f.c.real, (f, _same)) if isinstance(f, Node) else np.real(f)


def imag(f):
    if not isinstance(f, Node):
        return np.imag(f)
    return Node(f.c.imag, (f, lambda adjoint: -1j * adjoint))


def isinf(f):
    return np.isinf(value_of(f))


def isfinite(f):
    return np.isfinite(value_of(f))


def ones_like(f):
    return np.ones_like(value_of(f))


def zeros_like(f):
    return np.zeros_like(value_of(f))


def asarray(f, dtype=None):
    return f if isinstance(f, Node) else np.asarray(f, dtype)


def where(condition, one, other):
    if not isinstance(one, Node) and not isinstance(other, Node):
        return np.where(condition, one, other)
    a, b = (_ranked(c, np.ndim(condition)) for c in _aligned(one, other))
    parents = []
    for x, keep in ((one, condition), (other, np.logical_not(condition))):
        if isinstance(x, Node):
            parents.append((x, lambda adjoint, keep=keep: np.where(keep, adjoint, 0)))
    return Node(np.where(condition, a, b), *parents)


def maximum(one, other):
    return where(value_of(one) >= value_of(other), one, other)


def minimum(one, other):
    return where(value_of(one) <= value_of(other), one, other)


def max(f, axis: int = -1):
    """Return the largest entry of a vector."""
    return f[int(np.argmax(f.value))] if isinstance(f, Node) else np.max(f, axis)


def min(f, axis: int = -1):
    """Return the smallest entry of a vector."""
    return f[int(np.argmin(f.value))] if isinstance(f, Node) else np.min(f, axis)


def clip(f, low, high):
    return minimum(maximum(f, low), high)


def sum(f, axis: int | tuple | None = None):
    if not isinstance(f, Node):
        return np.sum(f, axis)
    axes = tuple(range(f.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(i % f.ndim + 1 for i in axes)

    def back(adjoint):
        return np.broadcast_to(np.expand_dims(adjoint, axes), f.c.shape)

    return Node(f.c.sum(axes), (f, back))


def cumsum(f):
    """Return the sums of the first entries of a vector."""
    return np.tril(np.ones((f.size, f.size))) @ f


def transpose(f: Node, axes: tuple[int, ...]) -> Node:
    order = (0, *(i + 1 for i in axes))
    return Node(f.c.transpose(order), (f, lambda adjoint: adjoint.transpose(np.argsort(order))))


def matmul(one, other):
    """Multiply two matrices, stacks of them, or a matrix and a vector."""
    left, right = np.ndim(value_of(one)), np.ndim(value_of(other))
    if left == 1:
        return matmul(asarray(one)[None], other)[..., 0, :] if right > 1 else sum(one * other)
    if right == 1:
        return matmul(one, asarray(other)[:, None])[..., 0]
    return _bilinear(
        np.matmul,
        one,
        other,
        lambda adjoint, b: _product(np.matmul, adjoint, b.swapaxes(-1, -2)),
        lambda adjoint, a: _product(np.matmul, a.swapaxes(-1, -2), adjoint),
    )


def einsum(subscripts: str, one, other):
    """Contract two operands; every index is in the output or in both."""
    terms, out = subscripts.split("->")
    first, second = terms.split(",")

    def times(x, y):
        return np.einsum(subscripts, x, y)

    def to_one(adjoint, b):
        return _product(lambda z, y: np.einsum(f"{out},{second}->{first}", z, y), adjoint, b)

    def to_other(adjoint, a):
        return _product(lambda z, y: np.einsum(f"{out},{first}->{second}", z, y), adjoint, a)

    return _bilinear(times, one, other, to_one, to_other)


def outer(one, other):
    return asarray(one)[:, None] * other


def stack(parts, axis: int = 0):
    if not any(isinstance(x, Node) for x in parts):
        return np.stack([np.asarray(x) for x in parts], axis)
    rank = np.ndim(value_of(parts[0]))
    axis = axis % (rank + 1)
    index = (slice(None),) * axis + (None,)
    return concatenate([asarray(x)[index] if rank else asarray(x).reshape(1) for x in parts], axis)


def concatenate(parts, axis: int = 0):
    if not any(isinstance(x, Node) for x in parts):
        return np.concatenate(parts, axis)
    pairs = _all(*parts)
    axis = axis % (pairs[0].ndim - 1) + 1
    ends = np.cumsum([x.shape[axis] for x in pairs])
    parents = []
    for x, pair, end in zip(parts, pairs, ends, strict=True):
        if isinstance(x, Node):
            part = (slice(None),) * axis + (slice(end - pair.shape[axis], end),)
            parents.append((x, lambda adjoint, part=part: adjoint[part]))
    return Node(np.concatenate(pairs, axis), *parents)


def append(one, other):
    return concatenate([asarray(x).reshape(-1) for x in (one, other)])


def pad(f, widths, constant_values=0):
    if not isinstance(f, Node):
        return np.pad(f, widths, constant_values=constant_values)
    widths = [widths] * f.ndim if isinstance(widths[0], int) else widths
    ends = [(low, low + n, low + n + high) for (low, high), n in zip(widths, f.shape, strict=True)]
    part = (slice(None), *(slice(low, high) for low, high, _ in ends))
    whole = np.zeros((len(f.c), *(size for *_, size in ends)), f.dtype)
    whole[0] = constant_values
    whole[part] = f.c
    return Node(whole, (f, lambda adjoint: adjoint[part]))


def tile(f, count: int):
    return concatenate([f] * count)


def broadcast_to(f, shape):
    return f * np.ones(shape) if isinstance(f, Node) else np.broadcast_to(f, shape)


def inverse(f: Node) -> Node:
    """Invert square matrices, (..., n, n)."""
    c = np.zeros_like(f.c)
    c[0] = np.linalg.inv(f.c[0])
    for _ in range(len(c) // 2):  # Newton's method makes one more order right each time
        c = 2 * c - _product(np.matmul, _product(np.matmul, c, f.c), c)
    turned = c.swapaxes(-1, -2)

    def back(adjoint):
        return -_product(np.matmul, _product(np.matmul, turned, adjoint), turned)

    return Node(c, (f, back))
