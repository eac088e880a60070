r"""The tangent kernel of a network at given parameters, without its Jacobian.

    k(x, x') = 1/o sum_{outputs a} <grad f_a(x), grad f_a(x')>

A dense layer z = h W has grad_W f = h^T d with d = df/dz, h and d a row for each time that one
point goes through the layer, so its share of the kernel is

    <h^T d, h'^T d'> = sum_{rows r, s} (h_r . h'_s) (d_r . d'_s)

which takes in + out numbers a row where the gradient has in * out. The layers are found in the
user's own function (`negmaml.meta.lowrank`). Other parameters, such as convolutions and biases,
have their gradients formed, for as many points at a time as fit into `BLOCK_BYTES`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial

from negmaml._core.arrays import contract
from negmaml._core.calls import explain_calls
from negmaml._core.checks import check_callable
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, PyTree
from negmaml.meta.lowrank import open_products, wide_weights

BLOCK_BYTES = 2**26  # of derivatives held at a time, for each of the two sets of points
BLOCK_ROWS = 1024


@explain_calls
def empirical_ntk(apply: Callable[..., Any], params: PyTree) -> Callable[..., Array]:
    r"""The tangent kernel of any JAX model at `params`: kernel(x1, x2), a matrix.

        k(x, x') = 1/o sum_a <d f_a(x) / d params, d f_a(x') / d params>      (o outputs)

    With one output, the linear model in params around `params` has this kernel exactly; with
    several, it is the mean of the o kernels on the diagonal, which wide networks have in common,
    and outputs count as independent of each other.

    Arguments:
        apply: function of (params, x) with values (points,) or (points, ...), each from its own
            point only: `flax_module.apply`, or lambda model, x: jax.vmap(model)(x) for Equinox.
        params: any pytree; the kernel sums over its floating point arrays, and keeps all else,
            such as the activations in an Equinox module, as it is.

    Returns a kernel for `meta_train`; f_0 is partial(apply, params). New parameters of the same
    shapes do not compile anew. Memory: derivatives of a block of points in factored form. Raises
    ValueError for params without floating point arrays or outputs without a point axis, TypeError
    for complex parameters and outputs. Source: Jacot, Gabriel and Hongler, NeurIPS 2018.

    >>> kernel = empirical_ntk(lambda w, x: jnp.tanh(x @ w), jnp.zeros(3))
    >>> kernel(jnp.eye(3), jnp.ones((2, 3)))[0]  # at zero, tanh is linear
    Array([1., 1.], dtype=float32)
    """
    check_callable("apply", apply, "of (params, x)")
    leaves, treedef = jax.tree.flatten(params)
    arrays = {i: jnp.asarray(leaf) for i, leaf in enumerate(leaves) if _is_array(leaf)}
    if any(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in arrays.values()):
        raise TypeError("params must be real, got complex arrays; split them into two real ones")
    moving = tuple(i for i, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating) and x.size)
    if not moving:
        raise ValueError(
            f"params must hold floating point arrays, which the kernel sums over, got {params!r}; "
            "a model whose parameters are elsewhere has to take them as its first argument"
        )
    # Other leaves are part of the hashable model, and arrays are its arguments.
    others = tuple((i, leaf) for i, leaf in enumerate(leaves) if i not in arrays)
    return Partial(_Tangent(apply, treedef, others, moving), arrays)


def _is_array(leaf) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


class _Tangent(NamedTuple):
    """A model without its arrays, hashable, so that jit recognises equal models."""

    apply: Callable
    treedef: Any
    others: tuple[tuple[int, Any], ...]
    moving: tuple[int, ...]

    @own_settings
    def __call__(self, arrays: dict[int, jax.Array], x1, x2):
        same = x1 is x2
        x1, x2 = jnp.asarray(x1), jnp.asarray(x2)
        return _kernel(self, arrays, x1, None if same else x2)

    def outputs(self, fixed, moving: list, x):
        """f of one point, (outputs,)."""
        leaves = fixed | dict(self.others) | dict(zip(self.moving, moving, strict=True))
        params = self.treedef.unflatten([leaves[i] for i in range(len(leaves))])
        values = jax.tree.leaves(self.apply(params, x[None]))
        if len(values) != 1 or jnp.shape(values[0])[:1] != (1,):
            raise ValueError(
                "apply must return one array with an entry a point on its first axis, got shapes "
                f"{[jnp.shape(v) for v in values]} for one point"
            )
        if not jnp.issubdtype(values[0].dtype, jnp.floating):
            raise TypeError(f"apply must return real numbers, got {values[0].dtype}")
        return values[0].ravel()


class _Derivatives(NamedTuple):
    """Factored derivatives of each of n points.

    inputs, slopes: (n, rows, in) and (n, o, rows, out) for each product.
    rest: the other gradients, (n, o, numbers).
    """

    inputs: list
    slopes: list
    rest: list


@partial(jax.jit, static_argnums=0)
def _kernel(model: _Tangent, arrays, x1, x2):
    one, outputs, block = _plan(model, arrays, x1[0])
    derivatives = jax.vmap(one)
    # The same points on both sides need their derivatives only once.
    if x2 is None and len(x1) <= block:
        both = derivatives(x1)
        return _pair(both, both) / outputs
    x2 = x1 if x2 is None else x2
    columns, rows = (_blocks(x, min(block, len(x))) for x in (x2, x1))

    def row(x):
        left = derivatives(x)
        parts = lax.map(lambda y: _pair(left, derivatives(y)), columns)  # blocks, n1, n2
        return jnp.moveaxis(parts, 0, 1).reshape(len(x), -1)

    # Rows of blocks one after another bound the memory of derivatives.
    K = lax.map(row, rows)
    return K.reshape(-1, K.shape[-1])[: len(x1), : len(x2)] / outputs


def _blocks(x, size: int):
    """x in blocks of one size, the last filled up with copies of the first point."""
    count = -(-len(x) // size)
    filled = jnp.concatenate([x, jnp.broadcast_to(x[:1], (count * size - len(x), *x.shape[1:]))])
    return filled.reshape(count, size, *x.shape[1:])


def _plan(model: _Tangent, arrays, x):
    """(point -> its `_Derivatives` without the axis n, outputs, points in a block)."""
    fixed = {i: leaf for i, leaf in arrays.items() if i not in model.moving}
    moving = [arrays[i] for i in model.moving]
    function = partial(model.outputs, fixed)
    # Weights of wide products keep their factors; all others get dense gradients.
    wide = wide_weights(function, moving, x, [True] * len(moving), 1)
    opened, shapes, uses = open_products(function, moving, x, wide)
    turned = [{t for leaf, t in uses if leaf == i} for i in range(len(moving))]
    if any(len(ways) > 1 for ways in turned):  # one weight used both ways: form its gradient
        wide = frozenset(i for i in wide if len(turned[i]) == 1)
        opened, shapes, uses = open_products(function, moving, x, wide)
    dense = [i for i in range(len(moving)) if i not in wide]

    def one(x):
        def of(some, shifts):
            leaves = list(moving)
            for i, leaf in zip(dense, some, strict=True):
                leaves[i] = leaf
            return opened(leaves, shifts, x)

        shifts = [jnp.zeros(shape, dtype) for shape, dtype in shapes]
        values, pull, inputs = jax.vjp(of, [moving[i] for i in dense], shifts, has_aux=True)
        # One pull-back for each output gives all slopes and dense gradients.
        rest, slopes = jax.vmap(pull)(jnp.eye(len(values), dtype=values.dtype))
        grouped = _by_leaf(uses, inputs, 0), _by_leaf(uses, slopes, 1)
        return _Derivatives(*grouped, [leaf.reshape(len(values), -1) for leaf in rest])

    held = jax.eval_shape(one, x)
    # Points in a block: as many as fit the memory of derivatives and of rows.
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))
    rows = max([1, *(len(h) for h in held.inputs)])
    outputs = jax.eval_shape(function, moving, x).shape[0]
    return one, outputs, max(1, min(BLOCK_BYTES // size, BLOCK_ROWS // rows))


def _by_leaf(uses, parts: list, axis: int) -> list:
    """Products of the same weight one after another along the axis of rows."""
    leaves = sorted({leaf for leaf, _ in uses})
    return [
        jnp.concatenate([x for (own, _), x in zip(uses, parts, strict=True) if own == leaf], axis)
        for leaf in leaves
    ]


def _pair(left: _Derivatives, right: _Derivatives):
    """o times the kernel between two blocks of points."""
    # Dense gradients by inner products, wide layers by the row formula of the head.
    total = sum(contract("xop,yop->xy", a, b) for a, b in zip(left.rest, right.rest, strict=True))
    for h1, d1, h2, d2 in zip(left.inputs, left.slopes, right.inputs, right.slopes, strict=True):
        inputs = contract("xra,ysa->xrys", h1, h2)
        total += jnp.sum(inputs * contract("xora,yosa->xrys", d1, d2), (1, 3))
    return total
