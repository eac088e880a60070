r"""Weight gradients of a batch of tasks as products of two matrices.

The gradient of a weight that all tasks share is a sum over tasks t and rows n,

    G_{io} = sum_{t,n} x_{tni} d_{tno}.

XLA makes a transposed copy of an operand of such a product on a CPU. Over one axis of t n rows it
makes none, and the reshape costs nothing on any platform. So the program of a gradient is evaluated
with these products reshaped, and everything else unchanged.
"""

from collections.abc import Callable
from math import prod

import jax
from jax import lax

from negmaml._core.platform import is_tracing
from negmaml.meta.lowrank import evaluate_jaxpr


def with_flat_products(function: Callable) -> Callable:
    """Return the function with its sums over tasks and rows as products over one axis."""

    def flattened(*arguments):
        # Without compilation each operation runs by itself, and a trace would only cost time.
        if not is_tracing(arguments):
            return function(*arguments)
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        outputs = _walk(closed.jaxpr, closed.consts, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return flattened


def _walk(jaxpr, consts, arguments) -> list:
    """Evaluate a jaxpr with flat products."""

    def evaluate(equation, inputs):
        if _sums_over_rows(equation):
            return [_flat_product(*inputs, **equation.params)]
        if equation.primitive.name in ("jit", "pjit") and _any_sum(equation.params["jaxpr"]):
            inner = equation.params["jaxpr"]
            return _walk(inner.jaxpr, inner.consts, inputs)
        return None

    return evaluate_jaxpr(jaxpr, consts, arguments, evaluate)


def _any_sum(closed) -> bool:
    """True if a jaxpr, or one that it calls by jit, has a sum over tasks and rows."""
    return any(
        _sums_over_rows(equation)
        or (equation.primitive.name in ("jit", "pjit") and _any_sum(equation.params["jaxpr"]))
        for equation in closed.jaxpr.eqns
    )


def _sums_over_rows(equation) -> bool:
    """True for a product over the first axes of both operands, at least two of them."""
    if equation.primitive.name != "dot_general":
        return False
    (left, right), (batch, _) = equation.params["dimension_numbers"]
    leading = tuple(range(len(left)))
    # Axes that a mesh of kind Explicit shares must stay apart.
    whole = not any(any(atom.aval.sharding.spec) for atom in equation.invars)
    return whole and not batch and len(leading) >= 2 and tuple(left) == tuple(right) == leading


def _flat_product(x, d, *, dimension_numbers, **options):
    """Return sum over the first axes of x and d, of shape (other axes of x, other axes of d)."""
    count = len(dimension_numbers[0][0])
    rows = prod(x.shape[:count])
    flat = lax.dot_general(
        x.reshape(rows, -1), d.reshape(rows, -1), (((0,), (0,)), ((), ())),
        precision=options["precision"], preferred_element_type=options["preferred_element_type"],
    )  # fmt: skip
    return flat.reshape(*x.shape[count:], *d.shape[count:])
