r"""The derivatives of an optimum, by the condition f_x = 0 in the numbers n that f depends on:

    dx = S . dn,        S = -f_xn / f_xx,

the sensitivity. There are three ways to compute S:

- on the host by `negmaml._core.taylor`, for known numbers and formulas over a namespace;
- by a program that calls the host for the same Hessian-vector product, for long formulas, whose
  nested transformations take minutes to compile;
- by nested transformations, for short formulas.
"""

import math
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.flatten_util import ravel_pytree
from jax.interpreters import ad, batching, mlir

from negmaml._core import taylor

HIGHEST = lax.Precision.HIGHEST
# Second derivatives in up to this many numbers are computed one by one, a tenth of a second each.
MAX_JACOBIAN = 32


def nested_sensitivity(objective: Callable) -> Callable:
    """Return the sensitivity by nested transformations, with derivatives of every order."""

    def slope(at, fixed):
        x, numbers = at
        return jax.jvp(lambda x: objective(x, numbers, fixed), (x,), (jnp.ones_like(x),))[1]

    def sensitivity(at, fixed):
        at, within = _finite(at)
        slopes = _gradient(slope)(at, fixed)
        return jnp.where(within, -slopes[1:] / slopes[0], 0.0)

    return _compiled_derivatives(sensitivity)


def sensitivity_by_parts(objective: Callable, parts: Callable) -> Callable:
    r"""Return the sensitivity with the objective differentiated on the host.

    With s the parts, g the gradient of the objective in them and h = (Hessian) s_x, which
    `negmaml._core.taylor` finds together, the gradient of f_x in n, x and the numbers, is that of

        g . s_x(n) + h . s(n)        at fixed g and h.

    Along a change of n it changes by that of this expression at fixed g and h, and by the changes
    of g and h, which the host computes too.
    """

    def along_x(at, fixed):
        x, numbers = at
        return jax.jvp(lambda x: parts(x, numbers, fixed), (x,), (jnp.ones_like(x),))

    def slopes(at, fixed, g, h):
        def weighted(at, _):
            pairs = zip(g + h, jax.tree.leaves(along_x(at, fixed)[::-1]), strict=True)
            return sum(jnp.sum(weight * value) for weight, value in pairs)

        return _gradient(weighted)(at, ())

    def sensitivity(at, fixed):
        at, within = _finite(at)
        # At fixed g and h the expression of the docstring is cheap: only the parts are
        # differentiated.
        g, h = _from_host(objective, along_x(at, fixed))
        found = slopes(at, fixed, g, h)
        return jnp.where(within, -found[1:] / found[0], 0.0)

    def change(at, fixed, moves):
        at, within = _finite(at)
        both, changes = jax.jvp(lambda at: along_x(at, fixed), (at,), (moves,))
        g, h, g_moves, h_moves = _from_host(objective, (*both, *changes))
        found, moved = jax.jvp(lambda at: slopes(at, fixed, g, h), (at,), (moves,))
        moved = moved + slopes(at, fixed, g_moves, h_moves)
        ratio = found[1:] / found[0]
        return jnp.where(within, (ratio * moved[0] - moved[1:]) / found[0], 0.0)

    program, change = jax.jit(sensitivity), _without_derivative(jax.jit(change))
    call = jax.custom_jvp(program)

    @call.defjvp
    def _(primals, tangents):
        at, fixed = primals
        return call(at, fixed), _changed(change, at, fixed, tangents[0])

    return call


def _changed(change: Callable, at, fixed, moves):
    """Return the change along `moves`; for few numbers by a Jacobian, which has a transpose."""
    # A Jacobian can be transposed for reverse mode; a host call along one direction cannot.
    flat, tree = ravel_pytree(at)
    if flat.size > MAX_JACOBIAN:
        return _FORWARD.bind(change(at, fixed, moves))
    # One unit direction at a time through the host, each with its own Hessian-vector product.
    units = jnp.eye(flat.size, dtype=flat.dtype)
    return along(jax.vmap(lambda unit: change(at, fixed, tree(unit)), out_axes=1)(units), moves)


def _finite(at):
    """Return (x, numbers) with zero in place of an infinite x, and True if x is finite."""
    within = jnp.isfinite(at[0])
    return (jnp.where(within, at[0], 0.0), at[1]), within


def _without_derivative(function: Callable) -> Callable:
    """Return the function; differentiating it raises NotImplementedError."""
    call = jax.custom_jvp(function)

    @call.defjvp
    def _(primals, tangents):
        raise NotImplementedError(
            "third derivatives of a best rate or ridge are not available: take differences of "
            "second ones"
        )

    return call


def _from_host(objective: Callable, coefficients: tuple) -> list[list]:
    """Return the gradients of `objective` at a point and along directions, computed on the host.

    coefficients: trees of arrays, the point first. Numbers are passed as bits: the thread of a
    callback may have another default precision, to which JAX would round them.
    """
    flat, tree = ravel_pytree(coefficients)
    one = jax.tree.structure(coefficients[0])
    shapes = [x.shape for x in jax.tree.leaves(coefficients[0])]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    count, dtype = len(coefficients), flat.dtype

    def run(bits):
        # In float64 whatever the program's precision: second derivatives lose half of the digits.
        values = np.asarray(bits).view(dtype).reshape(count, -1).astype(np.float64)
        parts = np.split(values, ends[:-1], 1)
        parts = [x.reshape(count, *shape) for x, shape in zip(parts, shapes, strict=True)]
        with np.errstate(all="ignore"):
            found = taylor.gradient(lambda x: objective(jax.tree.unflatten(one, x)), parts)
        joined = np.concatenate([x.reshape(count, -1) for x in found], 1)
        return joined.astype(dtype).view(np.uint32).reshape(np.shape(bits))

    # float64 becomes two words; the last axis is restored by the inverse conversion.
    bits = lax.bitcast_convert_type(flat, jnp.uint32)
    shape = jax.ShapeDtypeStruct(bits.shape, bits.dtype)
    found = jax.pure_callback(run, shape, bits, vmap_method="sequential")
    return [jax.tree.leaves(x) for x in tree(lax.bitcast_convert_type(found, dtype))]


def host_sensitivity(objective: Callable) -> Callable:
    """Return the sensitivity at (x, numbers) as a function: a gradient and its change."""

    def sensitivity(at, fixed):
        x, numbers = at
        within = np.isfinite(x)
        leaves, tree = jax.tree.flatten(numbers)
        x = np.where(within, x, 0.0)
        pairs = [np.stack([x, np.ones_like(x)]), *(np.stack([y, np.zeros_like(y)]) for y in leaves)]
        found = taylor.gradient(
            lambda parts: objective(parts[0], jax.tree.unflatten(tree, parts[1:]), fixed), pairs
        )
        # f_xx comes first, then f_x with each number.
        slopes = np.concatenate([change.ravel() for _, change in found])
        return np.where(within, -slopes[1:] / slopes[0], 0.0)

    return sensitivity


def _compiled_derivatives(function: Callable) -> Callable:
    """Return a function of a tree of numbers (and `fixed`) with one program for each derivative.

    JAX would differentiate a compiled program into another that it compiles with its own options,
    which is many times slower on these thousands of scalars. Here the derivative is a compiled
    Jacobian times the direction, and that has a compiled derivative again, to every order.
    """
    program = jax.jit(function)

    @jax.custom_jvp
    def call(at, fixed):
        return program(at, fixed)

    @call.defjvp
    def _(primals, tangents):
        return call(*primals), along(_jacobian(function)(*primals), tangents[0])

    return call


@cache
def _jacobian(function: Callable) -> Callable:
    return _compiled_derivatives(_gradient(function, jax.jacfwd))


def _gradient(function: Callable, transform: Callable = jax.grad) -> Callable:
    """Return the derivative in all numbers of the tree, concatenated along a last axis."""

    def derivative(at, fixed):
        leaves, parts = (jax.tree.leaves(x) for x in (at, transform(function)(at, fixed)))
        shapes = [d.shape[: d.ndim - np.ndim(x)] for d, x in zip(parts, leaves, strict=True)]
        flat = [d.reshape(*shape, -1) for d, shape in zip(parts, shapes, strict=True)]
        return jnp.concatenate(flat, -1)

    return derivative


@jax.jit  # as one program, because each of these few operations would be one by itself
def along(jacobian, moves):
    """Return the derivative along a tree of moves, from that in each number."""
    flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(moves)])
    return jnp.dot(jacobian, flat, precision=HIGHEST)


def _refuse(*_):
    raise NotImplementedError(
        "second derivatives of a best rate or ridge of a problem with covariances are not "
        "available in reverse mode over reverse mode: use jax.hessian, or jax.jvp of jax.grad"
    )


# The identity, without a transpose: reverse mode over reverse mode raises a clear error.
_FORWARD = Primitive("forward_only")
_FORWARD.def_impl(lambda x: x)
_FORWARD.def_abstract_eval(lambda x: x)
ad.primitive_transposes[_FORWARD] = _refuse
batching.primitive_batchers[_FORWARD] = lambda values, axes: (_FORWARD.bind(*values), *axes)
mlir.register_lowering(_FORWARD, lambda _, x: [x])
