r"""Derivatives on the host: truncated Taylor numbers, and reverse mode over them.

A `Taylor` number holds a value and some partial derivatives of order one and two, {"": f, "x": f_x,
"xy": f_xy, ...}. The product rule and the chain rule,

    (f g)_xy = f g_xy + f_x g_y + f_y g_x + f_xy g,        g(f)_xy = g' f_xy + g'' f_x f_y,

are all there is to them, on arrays of NumPy or JAX alike. Nested transformations of the same
formulas trace for seconds and give programs of thousands of equations.

A `Node` is a Taylor number of NumPy arrays that knows how it was made. Reverse mode over nodes
gives the gradient of a scalar and its changes along directions,

    grad f(s + e v) = grad f(s) + e (Hessian f)(s) v,

for a few times the work of f, and with nothing to compile. This module is a namespace for formulas
written over `arrays.namespace`: its functions are those of NumPy that formulas use, for nodes and
plain arrays alike. An unsupported function is an AttributeError, and converting a node to an array
raises a TypeError. Complex numbers may occur inside; the adjoint z' of z is that with dL =
Re(z' dz).
"""

import operator
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import numpy as np

inf, nan, finfo = np.inf, np.nan, np.finfo


class Taylor:
    """{"": f, "x": f_x, "xy": f_xy, ...}; keys have their letters in order, a missing one is zero.

    kept: the keys that are followed, of at most two letters. Terms are arrays of NumPy or JAX, or
    nodes.
    """

    __slots__ = ("kept", "terms")
    __array_ufunc__ = None  # NumPy's arrays leave products with these numbers to them

    def __init__(self, terms: dict[str, Any], kept: tuple[str, ...]):
        self.terms, self.kept = terms, kept

    def __getitem__(self, key: str):
        return self.terms.get(key, 0.0)

    def map(self, function: Callable) -> "Taylor":
        """Apply a linear function to every term."""
        return Taylor({key: function(term) for key, term in self.terms.items()}, self.kept)

    def __add__(self, other: "Taylor") -> "Taylor":
        a, b = self.terms, other.terms
        # Only the keys that are followed; a key that one summand misses is zero there.
        both = {
            key: a[key] + b[key] if key in a and key in b else a[key] if key in a else b[key]
            for key in self.kept
            if key in a or key in b
        }
        return Taylor(both, self.kept)

    def __sub__(self, other: "Taylor") -> "Taylor":
        return self + -1.0 * other

    def __mul__(self, other) -> "Taylor":
        """Multiply by another Taylor number, or by a constant."""
        if not isinstance(other, Taylor):
            return self.map(lambda term: other * term)
        return self.product(other, operator.mul)

    __rmul__ = __mul__

    def product(self, other: "Taylor", times: Callable) -> "Taylor":
        """Apply the product rule to a bilinear function of two arrays."""
        a, b = self.terms, other.terms
        found: dict[str, Any] = {}
        for key, i, j, count in _product_rule(self.kept):
            if i in a and j in b:
                part = times(a[i], b[j])
                part = part if count == 1 else count * part
                found[key] = found[key] + part if key in found else part
        return Taylor(found, self.kept)

    def compose(self, value, first, second=None) -> "Taylor":
        """Return g(f) from g, g' and g'' at f; None for a second derivative of zero."""
        terms, found = self.terms, {"": value}
        # g(f)_xy = g' f_xy + g'' f_x f_y; a key of one letter has the first term only.
        for key in self.kept[1:]:
            parts = [first * terms[key]] if key in terms else []
            if len(key) == 2 and second is not None and key[0] in terms and key[1] in terms:
                parts.append(second * (terms[key[0]] * terms[key[1]]))
            if parts:
                found[key] = sum_of(parts)
        return Taylor(found, self.kept)

    def reciprocal(self) -> "Taylor":
        """Return 1/f, with -f_a/f^2 and 2 f_a f_b/f^3 - f_ab/f^2."""
        inverse = 1 / self.terms[""]
        # In terms of f_a/f, since powers of f may overflow.
        return (inverse * self).compose(inverse, -inverse, 2 * inverse)

    def log(self) -> "Taylor":
        """Return the derivatives of log |f|, f_a/f and f_ab/f - f_a f_b/f^2, without its value."""
        found = (1 / self.terms[""] * self).compose(None, 1.0, -1.0)
        del found.terms[""]
        return found


def sum_of(parts: list):
    """Return the sum of terms, without a zero before them."""
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


@cache
def _product_rule(kept: tuple[str, ...]) -> tuple[tuple[str, str, str, int], ...]:
    """Return (key, key of f, key of g, count) for every term of the derivatives of f g.

    The letters of a key are shared between the two factors in all ways; equal ways are counted.
    """
    ways: Counter[tuple[str, ...]] = Counter()
    for key in kept:
        for chosen in range(2 ** len(key)):
            shares = ["", ""]
            for i, letter in enumerate(key):
                shares[chosen >> i & 1] += letter
            ways[key, *shares] += 1
    return tuple((*way, times) for way, times in ways.items())  # type: ignore[misc]


class Node:
    """A Taylor number c of NumPy arrays, all of one shape, that is part of a computation.

    parents: pairs of a node and the pullback of adjoints, Taylor numbers too, to that node.
    """

    # Slots save memory: one gradient makes a node for every operation.
    __slots__ = ("adjoint", "c", "made", "parents")
    __array_ufunc__ = None  # NumPy's arrays leave sums and products with a node to the node
    # `==` compares values entry by entry, so a node cannot be a key.
    __hash__ = None  # type: ignore[assignment]
    adjoint: Taylor | None

    def __init__(self, c: Taylor, *parents: tuple["Node", Callable], made: list | None = None):
        self.c, self.parents, self.adjoint = c, parents, None
        # The nodes of this computation in the order in which they were made.
        self.made: list[Node] = parents[0][0].made if made is None else made
        # A node is made after its parents, so this is a topological order.
        self.made.append(self)

    def __array__(self, *_, **__):
        # NumPy calls this to convert a node, which would lose its derivatives without notice.
        raise TypeError("a formula takes a number that is differentiated for a plain array")

    @property
    def value(self):
        return self.c.terms[""]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.c.terms[""].shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return np.size(self.value)

    @property
    def dtype(self):
        return self.value.dtype

    @property
    def T(self):
        return self.transpose(*range(self.ndim)[::-1])

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __neg__(self):
        return _linear(self, np.negative, np.negative)

    def __abs__(self):
        # At zero, the derivative from the right.
        return where(self.value >= 0, self, -self)

    def __add__(self, other):
        # A term of one summand only keeps its shape, so it is broadcast to that of the sum.
        if isinstance(other, Node):
            return Node(_full(self.c + other.c), (self, _same), (other, _same))
        if _foreign(other):
            return NotImplemented
        terms = self.c.terms
        return Node(_full(Taylor(terms | {"": terms[""] + other}, self.c.kept)), (self, _same))

    __radd__ = __add__

    def __sub__(self, other):
        if not isinstance(other, Node):
            return self + (-other)
        return Node(_full(self.c - other.c), (self, _same), (other, _negative))

    def __rsub__(self, other):
        return -self + other

    def __mul__(self, other):
        if isinstance(other, Node):
            return _bilinear(np.multiply, self, other, operator.mul, operator.mul)
        if _foreign(other):
            return NotImplemented

        def scale(term):
            return term * other

        return _linear(self, scale, scale)

    __rmul__ = __mul__

    def __truediv__(self, other):
        return self * (_reciprocal(other) if isinstance(other, Node) else 1 / np.asarray(other))

    def __rtruediv__(self, other):
        return _reciprocal(self) * other

    def __pow__(self, k: int):
        # A factor that has become zero gives zeros: 0 * 0^-1 would be NaN.
        value, powers, factor = self.value, [], 1
        for i in range(4):  # the derivatives, zero beyond the degree
            powers.append(factor * value ** (k - i) if factor else np.zeros_like(value))
            factor *= k - i
        return _elementary(self, *powers)

    def __matmul__(self, other):
        return matmul(self, other)

    def __rmatmul__(self, other):
        return matmul(other, self)

    def __getitem__(self, index):
        # Only an array of indices can name an entry twice; its adjoints add up.
        axes = index if isinstance(index, tuple) else (index,)
        by_arrays = any(isinstance(i, list | np.ndarray) for i in axes)

        def back(adjoint):
            whole = np.zeros(self.shape, adjoint.dtype)
            if by_arrays:
                np.add.at(whole, index, adjoint)
            else:
                whole[index] = adjoint
            return whole

        return _linear(self, lambda term: term[index], back)

    def reshape(self, *shape):
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        own = self.shape
        return _linear(self, lambda x: np.reshape(x, shape), lambda x: np.reshape(x, own))

    def ravel(self):
        return self.reshape(-1)

    def swapaxes(self, i: int, j: int):
        return _linear(self, lambda x: x.swapaxes(i, j), lambda x: x.swapaxes(i, j))

    def transpose(self, *axes: int):
        order = np.argsort(axes)
        return _linear(self, lambda x: x.transpose(axes), lambda x: x.transpose(order))

    def sum(self, axis: int | None = None):
        return sum(self, axis)

    def max(self, axis: int = -1):
        return max(self, axis)

    def min(self, axis: int = -1):
        return min(self, axis)

    def astype(self, dtype):
        del dtype  # all of one type
        return self


def _compared(name: str) -> Callable:
    """Return a comparison of values, of nodes with nodes or arrays."""
    compare = getattr(operator, name)
    return lambda self, other: compare(self.value, value_of(other))


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Node, f"__{_name}__", _compared(_name))


def gradient(function: Callable, values: list) -> list:
    """Return the gradient of a scalar function of a list of arrays, and its changes.

    values: real arrays (2, ...), each a value and its change along a direction, or (4, ...), with
    a second direction and both. The gradient is in the same form.
    """
    kept = ("", "x", "y", "xy")[: len(values[0])]
    made: list[Node] = []
    leaves = [Node(_stacked(np.asarray(x, np.float64), kept), made=made) for x in values]
    found = function(leaves)
    # A function that does not depend on its inputs returns a plain number.
    if isinstance(found, Node):
        _backward(found)
    made.clear()  # nodes and this list refer to each other
    zero = Taylor({}, kept)
    adjoints = [zero if leaf.adjoint is None else leaf.adjoint for leaf in leaves]
    return [
        np.stack([np.broadcast_to(adjoint[key], leaf.shape) for key in kept])
        for leaf, adjoint in zip(leaves, adjoints, strict=True)
    ]


def _stacked(coefficients, kept: tuple[str, ...]) -> Taylor:
    """Return coefficients in front as a Taylor number; changes that are zero are left out."""
    # An input may not change along a direction, and a missing term costs nothing in products.
    terms = dict(zip(kept, coefficients, strict=True))
    return Taylor({key: x for key, x in terms.items() if not key or x.any()}, kept)


def _backward(found: Node) -> None:
    """Visit the nodes from the last to the first, and add up the adjoints of each."""
    found.adjoint = Taylor({"": np.ones_like(found.value)}, found.c.kept)
    # Later nodes come first, so the adjoint of a node is complete when its turn comes.
    for node in reversed(found.made):
        if node.adjoint is not None:
            for parent, back in node.parents:
                move = _fitting(back(node.adjoint), parent)
                parent.adjoint = move if parent.adjoint is None else parent.adjoint + move


def _fitting(adjoint: Taylor, node: Node) -> Taylor:
    """Sum over the axes along which the node was broadcast; take the real part for a real node."""
    # Broadcasting copies, so its transpose is a sum. dL = Re(z' dz) with a real dz sees only the
    # real part of z'.
    value, whole = node.c.terms[""], adjoint.terms[""]
    shape, real_node = value.shape, value.dtype.kind != "c" and whole.dtype.kind == "c"
    if whole.shape == shape and not real_node:
        return adjoint

    def fit(x):
        more = x.ndim - len(shape)
        if more > 0:
            x = x.sum(tuple(range(more)))
        wide = tuple(i for i, (n, m) in enumerate(zip(shape, x.shape, strict=True)) if n < m)
        x = x.sum(wide, keepdims=True) if wide else x
        return x.real if real_node else x

    return adjoint.map(fit)


def order(*trees) -> int:
    """Return the highest order of the derivatives that nodes among the leaves are to have."""
    kept = [x.c.kept for x in jax.tree.leaves(trees) if isinstance(x, Node)]
    return 1 + len(kept[0][-1]) if kept else 0


def value_of(x):
    """Return the value of a node, and an array as it is."""
    return x.value if isinstance(x, Node) else x


def replace_value(x, value):
    """Return a node with another value and the same derivatives."""
    if not isinstance(x, Node):
        return value
    return Node(Taylor(x.c.terms | {"": np.asarray(value)}, x.c.kept), (x, _same))


def _same(adjoint: Taylor) -> Taylor:
    return adjoint


def _negative(adjoint: Taylor) -> Taylor:
    return adjoint.map(np.negative)


def _foreign(x) -> bool:
    """Return whether x is of a type that knows nodes: neither a node nor a number or array."""
    return not isinstance(x, (Node, np.ndarray, np.generic, int, float, complex))


def _lift(x, kept: tuple[str, ...]) -> Taylor:
    return x.c if isinstance(x, Node) else Taylor({"": np.asarray(x)}, kept)


def _full(c: Taylor) -> Taylor:
    """Broadcast all terms to the shape of the value."""
    shape = c.terms[""].shape
    if all(term.shape == shape for term in c.terms.values()):
        return c
    return c.map(lambda term: np.broadcast_to(term, shape))


def _linear(f: Node, function: Callable, back: Callable) -> Node:
    """Apply a linear function to every term; `back` is its transpose."""
    return Node(f.c.map(function), (f, lambda adjoint: adjoint.map(back)))


def _bilinear(times: Callable, one, other, to_one: Callable, to_other: Callable) -> Node:
    """Multiply; `to_one(adjoint, other)` pulls back to the first factor, `to_other` likewise."""
    kept = (one if isinstance(one, Node) else other).c.kept
    # Adjoints are Taylor numbers: the product rule in the pullbacks gives the changes of the
    # gradient.
    a, b = _lift(one, kept), _lift(other, kept)
    parents = []
    if isinstance(one, Node):
        parents.append((one, lambda adjoint: to_one(adjoint, b)))
    if isinstance(other, Node):
        parents.append((other, lambda adjoint: to_other(adjoint, a)))
    return Node(a.product(b, times), *parents)


def _elementary(f: Node, value, first, second, third) -> Node:
    """Return g(f) from g and its first three derivatives at f."""
    c = f.c
    # The pullback multiplies by g'(f) as a Taylor number, whose terms of order two need g'''.
    found = c.compose(value, first, second)
    return Node(found, (f, lambda adjoint: adjoint * c.compose(first, second, third)))


def _reciprocal(f: Node) -> Node:
    r = 1 / f.value
    square = r * r
    # (1/f)' = -1/f^2, (1/f)'' = 2/f^3, (1/f)''' = -6/f^4.
    return _elementary(f, r, -square, 2 * square * r, -6 * square * square)


def _function(plain: Callable, slopes: Callable) -> Callable:
    """Return an elementary function; `slopes` are its first three derivatives at (x, value)."""

    def function(f):
        if not isinstance(f, Node):
            return plain(f)
        value = plain(f.value)
        return _elementary(f, value, *slopes(f.value, value))

    return function


def _log_slopes(x, _):
    r = 1 / x
    return r, -r * r, 2 * r * r * r


def _sqrt_slopes(x, root):
    slope, r = 0.5 / root, 1 / x
    return slope, -0.5 * slope * r, 0.75 * slope * r * r


exp = _function(np.exp, lambda _, value: (value, value, value))
expm1 = _function(np.expm1, lambda x, _: (np.exp(x),) * 3)
log = _function(np.log, _log_slopes)
# Only the value of log(1 + x) cancels near zero; its slopes are those of log at 1 + x.
log1p = _function(np.log1p, lambda x, value: _log_slopes(1 + x, value))
sqrt = _function(np.sqrt, _sqrt_slopes)


def abs(f):
    return f.__abs__() if isinstance(f, Node) else np.abs(f)


def real(f):
    return _linear(f, np.real, lambda x: x) if isinstance(f, Node) else np.real(f)


def imag(f):
    # dL = a Im(dz) = Re(-i a dz), so the adjoint of z is -i a.
    return _linear(f, np.imag, lambda x: np.multiply(-1j, x)) if isinstance(f, Node) else np.imag(f)


def _of_value(plain: Callable) -> Callable:
    """Return a function of the value, which is constant between its jumps."""
    return lambda f: plain(value_of(f))


sign, isinf, isfinite = map(_of_value, (np.sign, np.isinf, np.isfinite))
ones_like, zeros_like = map(_of_value, (np.ones_like, np.zeros_like))


def asarray(f, dtype=None):
    return f if isinstance(f, Node) else np.asarray(f, dtype)


def where(condition, one, other):
    """Choose values, with the derivatives of those chosen."""
    if not isinstance(one, Node) and not isinstance(other, Node):
        return np.where(condition, one, other)
    kept = (one if isinstance(one, Node) else other).c.kept
    a, b = _lift(one, kept), _lift(other, kept)
    keys = [key for key in kept if key in a.terms or key in b.terms]
    c = _full(Taylor({key: np.where(condition, a[key], b[key]) for key in keys}, kept))
    parents = []
    for x, chosen in ((one, condition), (other, np.logical_not(condition))):
        if isinstance(x, Node):
            keep = partial(_masked, chosen)
            parents.append((x, keep))
    return Node(c, *parents)


def _masked(chosen, adjoint: Taylor) -> Taylor:
    # Not a product: the adjoint of the other branch may be infinite.
    return adjoint.map(lambda x: np.where(chosen, x, 0))


def maximum(one, other):
    return where(value_of(one) >= value_of(other), one, other)


def minimum(one, other):
    return where(value_of(one) <= value_of(other), one, other)


def clip(f, low, high):
    return minimum(maximum(f, low), high)


def max(f, axis: int = -1):
    """Return the largest entries along an axis, the last if none is given."""
    return _entries(f, np.argmax(f.value, axis), axis) if isinstance(f, Node) else np.max(f, axis)


def min(f, axis: int = -1):
    """Return the smallest entries along an axis, the last if none is given."""
    return _entries(f, np.argmin(f.value, axis), axis) if isinstance(f, Node) else np.min(f, axis)


def _entries(f: Node, i, axis: int) -> Node:
    """Return the entries i along an axis."""
    # The first of several equal entries gets the derivative, as argmax and argmin choose it.
    i, shape = np.expand_dims(i, axis), f.shape

    def back(adjoint):
        whole = np.zeros(shape, adjoint.dtype)
        np.put_along_axis(whole, i, np.expand_dims(adjoint, axis), axis)
        return whole

    return _linear(f, lambda x: np.take_along_axis(x, i, axis).squeeze(axis), back)


def sum(f, axis: int | tuple | None = None):
    if not isinstance(f, Node):
        return np.sum(f, axis)
    shape = f.shape
    axes = tuple(range(f.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(i % f.ndim for i in axes)

    def back(adjoint):
        return np.broadcast_to(np.expand_dims(adjoint, axes), shape)

    return _linear(f, lambda x: x.sum(axes), back)


def cumsum(f):
    """Return the sums of the first entries of a vector."""
    return np.tril(np.ones((f.size, f.size))) @ f


def matmul(one, other):
    """Multiply two matrices, stacks of them, or a matrix and a vector."""
    left, right = np.ndim(value_of(one)), np.ndim(value_of(other))
    if left == 1:
        return matmul(asarray(one)[None], other)[..., 0, :] if right > 1 else sum(one * other)
    if right == 1:
        return matmul(one, asarray(other)[:, None])[..., 0]
    # C = A B has A' = C' B^T and B' = A^T C', without conjugates, since dL = Re(z' dz).
    return _bilinear(
        np.matmul,
        one,
        other,
        lambda adjoint, b: adjoint.product(b.map(_turned), np.matmul),
        lambda adjoint, a: a.map(_turned).product(adjoint, np.matmul),
    )


def _turned(matrix):
    return matrix.swapaxes(-1, -2)


def einsum(subscripts: str, one, other):
    """Contract two operands; every index is in the output or in both."""
    # An index of one operand only would be summed away, and no contraction could restore it.
    terms, out = subscripts.split("->")
    first, second = terms.split(",")
    return _bilinear(
        partial(np.einsum, subscripts),
        one,
        other,
        lambda adjoint, b: adjoint.product(b, partial(np.einsum, f"{out},{second}->{first}")),
        lambda adjoint, a: adjoint.product(a, partial(np.einsum, f"{out},{first}->{second}")),
    )


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
    kept = next(x.c.kept for x in parts if isinstance(x, Node))
    lifted = [_lift(x, kept) for x in parts]
    values = [c.terms[""] for c in lifted]
    axis = axis % values[0].ndim
    joined = {
        key: np.concatenate(
            [c.terms.get(key, np.zeros_like(x)) for c, x in zip(lifted, values, strict=True)], axis
        )
        for key in kept
        if any(key in c.terms for c in lifted)
    }
    ends, parents = np.cumsum([x.shape[axis] for x in values]), []
    for x, value, end in zip(parts, values, ends, strict=True):
        if isinstance(x, Node):
            part = (slice(None),) * axis + (slice(end - value.shape[axis], end),)
            parents.append((x, partial(_sliced, part)))
    return Node(Taylor(joined, kept), *parents)


def _sliced(part, adjoint: Taylor) -> Taylor:
    return adjoint.map(lambda x: x[part])


def append(one, other):
    return concatenate([asarray(x).reshape(-1) for x in (one, other)])


def pad(f, widths, constant_values=0):
    if not isinstance(f, Node):
        return np.pad(f, widths, constant_values=constant_values)
    widths = [widths] * f.ndim if isinstance(widths[0], int) else widths
    shape = [low + n + high for (low, high), n in zip(widths, f.shape, strict=True)]
    part = tuple(slice(low, low + n) for (low, _), n in zip(widths, f.shape, strict=True))

    def padded(x, constant):
        whole = np.full(shape, constant, x.dtype)
        whole[part] = x
        return whole

    # The padding is constant, so it is zero in all derivatives.
    terms = {key: padded(x, 0 if key else constant_values) for key, x in f.c.terms.items()}
    return Node(Taylor(terms, f.c.kept), (f, partial(_sliced, part)))


def tile(f, count: int):
    return concatenate([f] * count)


def broadcast_to(f, shape):
    return f * np.ones(shape) if isinstance(f, Node) else np.broadcast_to(f, shape)


def inverse(f: Node) -> Node:
    """Invert square matrices, (..., n, n)."""
    c = Taylor({"": np.linalg.inv(f.value)}, f.c.kept)
    for _ in range(len(c.kept) // 2):  # Newton's method makes one more order exact each time
        c = 2 * c - c.product(f.c, np.matmul).product(c, np.matmul)
    # From d(f^-1) = -f^-1 df f^-1.
    turned = c.map(_turned)

    def back(adjoint):
        return -1 * turned.product(adjoint, np.matmul).product(turned, np.matmul)

    return Node(c, (f, back))
