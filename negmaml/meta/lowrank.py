r"""Inner steps on wide dense layers without forming the adapted weights.

A dense layer z = x W has the gradient h^T d, with h the inputs of the layer on the support (n rows)
and d the derivative of the loss in z. After an inner step,

    x W' = x W - rate (x h^T) d,

costs n products of vectors for each of its rows, and one product with W that all tasks share.
Forming W' would read and write as many numbers as W has, for every task. The formula is exact, and
so are its derivatives of any order in h and d. K steps add up K such terms.

The user's loss is not rewritten but interpreted. Its jaxpr is evaluated with products with a wide
weight in factored form, and everything else unchanged. A weight with another use (weight decay,
tied or convolution weights, inside scan or a custom derivative) stays dense, so the result is right
for any loss.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from negmaml.meta.minibatches import at_step
from negmaml.rules.unroll import identity_at

# The factored update is chosen where the dense one takes at least this many times its work. On CPU
# the two are equally fast at a ratio of 1 to 1.5 (benchmarks/modes.py).
MIN_WORK_RATIO = 2


class _Weight(NamedTuple):
    """Placeholder of a wide weight in the evaluation of a jaxpr: its leaf, and if transposed."""

    leaf: int
    transposed: bool = False


class _Product(NamedTuple):
    """A product of the array x, contracted along `axis`, with a weight in the form (in, out)."""

    weight: _Weight
    x: int  # position of x among the two operands, 0 or 1
    axis: int


def wide_weights(loss: Callable, params, data, moving: list[bool], steps: int) -> frozenset[int]:
    """Return the moving leaves of `params` that enter products only and exceed their factors.

    With r rows of inputs a dense update works on in * out numbers, the factored updates of all
    steps on steps * r (in + out).
    """
    return wide_inputs(jax.make_jaxpr(loss)(params, data).jaxpr, moving, steps)


def wide_inputs(jaxpr: Jaxpr, moving: list[bool], steps: int) -> frozenset[int]:
    """Return `wide_weights` of a traced loss, whose first inputs are the leaves."""
    variables: list[Any] = jaxpr.invars[: len(moving)]
    # Matrices only: a weight with more axes enters no plain product.
    marks = {
        variable: _Weight(i)
        for i, variable in enumerate(variables)
        if moving[i] and len(variable.aval.shape) == 2
    }
    rows: dict[int, int] = {}
    other_uses: set[int] = set()
    _count_uses(jaxpr, marks, rows, other_uses)

    def worth_factoring(i: int) -> bool:
        shape = variables[i].aval.shape
        return i not in other_uses and prod(shape) >= MIN_WORK_RATIO * steps * rows[i] * sum(shape)

    return frozenset(filter(worth_factoring, rows))


class LowRankPlan(NamedTuple):
    """The inner steps, leaf by leaf.

    rates: function (leaf, step) -> rate, a scalar for a wide leaf.
    wide: leaves that stay factored.
    moving: for each leaf whether it adapts.
    differentiated: the number of last steps that derivatives pass through.
    """

    rates: Callable
    steps: int
    wide: frozenset[int]
    moving: list[bool]
    differentiated: int


def factored_loss(losses: tuple[Callable, Callable], params, plan: LowRankPlan, support, query):
    """Return loss(theta_K, query) after the inner steps, with wide weights kept factored.

    losses: the inner and the outer loss, functions of (params, data) that return (scalar, aux).
    """
    rates, steps, wide, moving, differentiated = plan
    inner_loss, loss = losses
    theta = leaves = jax.tree.leaves(params)
    dense = [i for i, moves in enumerate(moving) if moves and i not in wide]
    factors: dict[int, list] = {i: [] for i in wide}
    # The loss is traced once and evaluated once a step.
    on_support = _Traced(inner_loss, params, at_step(support, 0), wide)

    def inner(dense_weights, shifts, theta, factors, data):
        recorder = _Recorder(factors, theta, shifts)
        value, _ = on_support(_replace(theta, dense, dense_weights), data, recorder)
        return value, recorder.inputs

    for k in range(steps):
        dense_weights, data = [theta[i] for i in dense], at_step(support, k)
        # A shift of zero is added to the result of each wide product: the derivative in it is d.
        blank = _Recorder(factors, theta, None)
        jax.eval_shape(lambda theta, d=data, r=blank: on_support(theta, d, r), theta)
        shifts = [jnp.zeros(shape, dtype) for shape, dtype in blank.shapes]
        (gradients, slopes), inputs = jax.grad(inner, (0, 1), has_aux=True)(
            dense_weights, shifts, theta, factors, data
        )
        moved = [
            (t - rates(i, k) * g).astype(t.dtype)
            for i, t, g in zip(dense, dense_weights, gradients, strict=True)
        ]
        factors = {i: list(pairs) for i, pairs in factors.items()}
        # W' = W - rate h^T d, stored as the pair (-rate h, d).
        for (weight, h), d in zip(inputs, slopes, strict=True):
            left, right = (d, h) if weight.transposed else (h, d)
            factors[weight.leaf].append((-rates(weight.leaf, k) * left, right))
        if k + 1 == steps - differentiated:  # a constant but for the start
            moved = [*map(identity_at, (leaves[i] for i in dense), moved)]
            factors = lax.stop_gradient(factors)
        theta = _replace(theta, dense, moved)
    return _Traced(loss, params, query, wide)(theta, query, _Recorder(factors, theta, ()))


def open_products(function: Callable, params, data, weights: frozenset[int]):
    """Return a function whose derivatives in weights can be had in factored form.

    weights: indices of leaves of `params` that enter products only, as from `wide_weights`.

    Returns (opened, shapes, uses). opened(leaves, shifts, data) -> (value, inputs) adds shifts[s],
    (rows, out), to product s, of inputs[s], (rows, in), with a weight. The derivative in a weight
    is then the sum over its products of inputs[s]^T d/d shifts[s], transposed where the product
    takes the weight transposed. shapes: (shape, dtype) of each shift. uses: (leaf, transposed) of
    each product.
    """
    traced, leaves = _Traced(function, params, data, weights), jax.tree.leaves(params)
    blank = _Recorder({i: [] for i in weights}, leaves, None)
    jax.eval_shape(lambda leaves: traced(leaves, data, blank), leaves)

    def opened(leaves, shifts, data):
        recorder = _Recorder({i: [] for i in weights}, leaves, shifts)
        value = traced(leaves, data, recorder)
        return value, [h for _, h in recorder.inputs]

    return opened, blank.shapes, [tuple(weight) for weight, _ in blank.inputs]


def _replace(leaves: list, indices: list[int], values: list) -> list:
    leaves = list(leaves)
    for i, value in zip(indices, values, strict=True):
        leaves[i] = value
    return leaves


class _Recorder:
    """Multiplies by factored weights, records the inputs of each product, and shifts its result.

    In the equation of this module the inputs are h and the derivative in the shift is d. Without
    shifts it only records the shapes of the results.
    """

    def __init__(self, factors: dict[int, list], leaves: list, shifts):
        self.factors, self.leaves, self.shifts = factors, leaves, shifts
        self.inputs: list = []
        self.shapes: list = []

    def __call__(self, weight: _Weight, x, precision, dtype):
        """Return x W + shift for x of shape (..., in)."""

        def times(x, matrix, axis, precision=lax.Precision.HIGHEST):
            contract = (((x.ndim - 1,), (axis,)), ((), ()))
            return lax.dot_general(
                x, matrix, contract, precision=precision, preferred_element_type=dtype
            )

        axis = 1 if weight.transposed else 0
        # x W has the precision of the user's product. The factored terms stand for entries of W',
        # so they are computed at full precision.
        z = times(x, self.leaves[weight.leaf], axis, precision)
        for pair in self.factors[weight.leaf]:
            first, second = reversed(pair) if weight.transposed else pair
            z = z + times(times(x, first, 1), second, 0).astype(z.dtype)
        self.shapes.append(((prod(z.shape[:-1]), z.shape[-1]), z.dtype))
        self.inputs.append((weight, x.reshape(-1, x.shape[-1])))
        if self.shifts:
            z = z + self.shifts[len(self.inputs) - 1].reshape(z.shape)
        return z


class _Traced:
    """The jaxpr of a loss on data of one shape, which any `_Recorder` can evaluate."""

    def __init__(self, loss: Callable, params, data, wide):
        self.closed, shape = jax.make_jaxpr(loss, return_shape=True)(params, data)
        self.result: Any = jax.tree.structure(shape)
        self.wide = wide

    def __call__(self, leaves: list, data, recorder: _Recorder):
        values = [_Weight(i) if i in self.wide else leaf for i, leaf in enumerate(leaves)]
        recorder.leaves = leaves
        outputs = _walk(
            self.closed.jaxpr, self.closed.consts, [*values, *jax.tree.leaves(data)], recorder
        )
        return self.result.unflatten(outputs)


def _walk(jaxpr, consts, arguments, recorder: _Recorder) -> list:
    """Evaluate a jaxpr in which some inputs are `_Weight`s that enter products only."""

    def evaluate(equation, inputs):
        weights = [x if isinstance(x, _Weight) else None for x in inputs]
        if not any(weights):
            return None
        if product := _as_product(equation, weights):
            return [_multiply(equation.params, product, inputs[product.x], recorder)]
        if flipped := _as_transpose(equation, weights):
            return [flipped]
        # A call of jit: `_count_uses` admits no other operation on a wide weight.
        inner = equation.params["jaxpr"]
        return _walk(inner.jaxpr, inner.consts, inputs, recorder)

    return evaluate_jaxpr(jaxpr, consts, arguments, evaluate)


def evaluate_jaxpr(jaxpr, consts, arguments, evaluate: Callable) -> list:
    """Evaluate a jaxpr with other results of some equations.

    evaluate: (equation, inputs) -> its results, or None for those of the equation itself.
    """
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        results = evaluate(equation, inputs)
        if results is None:
            results = _evaluate_equation(equation, inputs, jaxpr.debug_info)
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate_equation(equation, inputs, debug_info) -> list:
    """Evaluate one equation on arrays, as a jaxpr of its own."""
    # Names of arguments belong to the whole jaxpr, and one equation has others.
    debug_info = debug_info._replace(arg_names=None, result_paths=None)
    pairs = zip(equation.invars, inputs, strict=True)
    own = {atom: x for atom, x in pairs if not isinstance(atom, Literal)}
    jaxpr = Jaxpr([], list(own), equation.outvars, [equation], equation.effects, debug_info)
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, []))(*own.values())


def _multiply(parameters, product: _Product, x, recorder: _Recorder):
    """Evaluate a dot_general with a weight, with the contracted axis of x last."""
    x = jnp.moveaxis(x, product.axis, -1)
    dtype = parameters["preferred_element_type"]
    z = recorder(product.weight, x, parameters["precision"], dtype)
    return jnp.moveaxis(z, -1, 0) if product.x == 1 else z


def _count_uses(jaxpr, marks, rows: dict[int, int], other_uses: set[int]) -> None:
    """Add up the rows that multiply each marked weight, and collect weights with other uses."""
    marks = dict(marks)

    def look(atom):
        return None if isinstance(atom, Literal) else marks.get(atom)

    for equation in jaxpr.eqns:
        weights = [look(atom) for atom in equation.invars]
        if not any(weights):
            continue
        if product := _as_product(equation, weights):
            shape = equation.invars[product.x].aval.shape
            leaf = product.weight.leaf
            rows[leaf] = rows.get(leaf, 0) + prod(shape) // max(shape[product.axis], 1)
        elif flipped := _as_transpose(equation, weights):
            marks[equation.outvars[0]] = flipped
        # `_walk` enters calls of jit; a loop or a custom derivative needs the weight itself.
        elif equation.primitive.name in ("jit", "pjit"):
            inner = equation.params["jaxpr"].jaxpr
            pairs = zip(inner.invars, weights, strict=True)
            _count_uses(inner, {v: w for v, w in pairs if w}, rows, other_uses)
        else:
            other_uses |= {weight.leaf for weight in weights if weight}
    # A weight that is returned leaves the part of the program that is evaluated here.
    other_uses |= {weight.leaf for atom in jaxpr.outvars if (weight := look(atom))}


def _as_product(equation, weights) -> _Product | None:
    """Return the equation as a product of one weight with an array, or None if it is not one."""
    if equation.primitive.name != "dot_general" or all(weights):
        return None
    contract, batch = equation.params["dimension_numbers"]
    which = 0 if weights[0] else 1
    # A batched product, or one over two axes, is no dense layer.
    if batch != ((), ()) or len(contract[0]) != 1:
        return None
    weight = weights[which]
    as_in_out = _Weight(weight.leaf, weight.transposed != (contract[which][0] == 1))
    return _Product(as_in_out, 1 - which, contract[1 - which][0])


def _as_transpose(equation, weights) -> _Weight | None:
    """Return the transposed weight if the equation transposes a weight, else None."""
    if equation.primitive.name != "transpose" or equation.params["permutation"] != (1, 0):
        return None
    return _Weight(weights[0].leaf, not weights[0].transposed)
