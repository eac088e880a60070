r"""The exact minimiser of the meta-loss among the functions of a kernel, and its loss on tasks.

    f*(x) = f_0(x) + k(x, .) A^T (A K A^T + meta_ridge)^-1 A (y - f_0)

is the function that gradient descent on the meta-loss reaches from f_0 (`negmaml.kernels.system`
defines A).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from negmaml._core.arrays import contract
from negmaml._core.checks import check_choice, check_optional
from negmaml._core.deprecation import renamed_attribute
from negmaml._core.display import add_fields_repr
from negmaml._core.jit import jit_fast_compile
from negmaml._core.meshes import any_mesh, as_mesh, gathered, place, share, within
from negmaml._core.pytree import pytree, static
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, ArrayLike, Devices, PyTree
from negmaml.kernels.iterative import train_iteratively
from negmaml.kernels.points import (
    TILE,
    Points,
    as_kernel,
    as_start,
    check_ridges,
    cross,
    gram,
    pair,
    stack,
    start_values,
)
from negmaml.kernels.solve import solve
from negmaml.kernels.system import (
    TaskBlocks,
    adapted_losses,
    check_spectral,
    responses,
    right_side,
    systems,
    task_blocks,
    task_kernels,
)
from negmaml.meta import Tasks
from negmaml.rules import InnerRule

METHODS = "direct", "iterative"
BLOCK_NUMBERS = 2**23  # of matrices G that an accelerator solves at once
MANY_POINTS = 10_000


@add_fields_repr
@pytree
class KernelModel:
    r"""A function in a kernel's space: model(x) = f_0(x) + sum_j k(x, points_j) weights_j.

    It holds one function for each rule and ridge: all results lead with `batch`, the shape of the
    rule's parameter + that of the ridge.

    Attributes:
        kernel, f0: as given to `meta_train`.
        points: (M, ...).
        weights: batch + (M, outputs).
        well_conditioned: batch, False where the solution is not finite, or singular to working
            precision without a clear rank: give a meta_ridge, or use float64.
        has_outputs: whether labels, and so values, have an axis of outputs.

    >>> import negmaml as nm
    >>> x = jnp.arange(12.0).reshape(2, 6, 1) / 6
    >>> tasks = nm.Tasks((x[:, :3], x[:, :3, 0]), (x[:, 3:], x[:, 3:, 0]))
    >>> rule = nm.GradientDescent(-0.5)
    >>> model = nm.kernels.meta_train(lambda a, b: a @ b.T, tasks, rule, meta_ridge=1e-3)
    >>> adapted = model.adapt((x[0, :3], -x[0, :3, 0]), nm.GradientDescent(0.5))
    >>> adapted(x[0, 3:]).shape, bool(model.well_conditioned)
    ((3,), True)
    """

    kernel: Any
    f0: Any
    points: Any
    weights: Any
    well_conditioned: Any
    has_outputs: bool = static()

    reliable: ClassVar[Any] = renamed_attribute("KernelModel.reliable", "well_conditioned")

    @own_settings
    @any_mesh
    def __call__(self, x: ArrayLike) -> Any:
        """Values at points x: batch + (points,) or batch + (points, outputs), like the labels."""
        return _shaped(self._values(jnp.asarray(x)), self.has_outputs)

    @own_settings
    @any_mesh
    def adapt(self, support: PyTree, rule: InnerRule) -> Any:
        """The function after adapting to one task by the rule: x -> values as from the model.

        Arguments:
            support: the task's (x, y).
            rule: any spectral rule.

        Values of the function lead with batch + the rule's shape. Raises TypeError or ValueError
        for other shapes and rules.
        """
        rule = check_spectral(rule)
        x, y = pair("support", support)
        if x.shape[:1] != y.shape[:1] or y.shape[1:] != self._outputs:
            raise ValueError(
                f"support must be (x, y) of one task, y of shape (points, *{self._outputs}), got "
                f"{x.shape} and {y.shape}; jax.vmap over tasks, or use model.loss"
            )
        moved = _moved(cross(self.kernel, x, x), y, self._values(x), rule)
        return AdaptedModel(self, x, moved, len(rule.batch_shape))

    @own_settings
    @any_mesh
    def loss(self, tasks: Tasks, rule: InnerRule) -> Array:
        """Half the mean squared error on the queries after adapting: batch + the rule's shape."""
        rule = check_spectral(rule)
        points, has_outputs = stack(tasks, None)
        if has_outputs != self.has_outputs or points.y_t.shape[-1:] != self.weights.shape[-1:]:
            raise ValueError(
                f"labels of tasks must have shape (tasks, points, *{self._outputs}) as in "
                f"meta_train, got {jnp.shape(tasks.support[1])}"
            )
        blocks = task_kernels(self.kernel, points.x, points.sizes)
        return jnp.mean(adapted_losses(blocks, rule, *_left(points, self._values(points.x))), -1)

    @property
    def _outputs(self) -> tuple[int, ...]:
        return self.weights.shape[-1:] if self.has_outputs else ()

    def _values(self, x):
        """batch + (points, outputs), with or without an axis of outputs in the labels."""
        start = start_values(self.f0, x, self._outputs)
        return _combined(cross(self.kernel, x, self.points), self.weights, start)


@add_fields_repr
@pytree
class AdaptedModel:
    """A `KernelModel` after adapting: model(x) + k(x, support) weights."""

    model: Any
    points: Any
    weights: Any
    rule_axes: int = static()

    @own_settings
    @any_mesh
    def __call__(self, x: ArrayLike) -> Any:
        """Values at points x, batch + the rule's shape + (points,) or (points, outputs)."""
        x = jnp.asarray(x)
        # f before adapting, to which the weights on the support add.
        before = self.model._values(x)
        # The rule's batch goes behind the batch of the model, before points and outputs.
        axes = tuple(range(before.ndim - 2, before.ndim - 2 + self.rule_axes))
        before = jnp.expand_dims(before, axes)
        values = _combined(cross(self.model.kernel, x, self.points), self.weights, before)
        return _shaped(values, self.model.has_outputs)


@jax.jit
def _combined(K, weights, start):
    """start + K weights, batch + (points, outputs)."""
    return start + contract("nj,...jo->...no", K, weights)


def _shaped(values, has_outputs: bool):
    return values if has_outputs else values[..., 0]


@jax.jit
def _moved(K, y, values, rule: InnerRule):
    """Weights on the support that adapting adds: q(K / n) (y - values) / n."""
    # Adapting fits the residual on the support: one task whose queries are its support.
    left = y.reshape(len(y), -1) - values
    # With the identity for K_vt the response C is q(K / n) / n itself.
    blocks = TaskBlocks((K + K.T)[None] / 2, jnp.eye(len(y), dtype=K.dtype)[None])
    C = responses(blocks, rule)[..., 0, :, :]
    moved = contract("...st,bto->b...so", C, left.reshape(-1, *left.shape[-2:]))
    return moved.reshape(*left.shape[:-2], *moved.shape[1:])


@jax.jit
def _left(points: Points, values):
    """Labels less values, of supports and of queries: batch + (m, n, outputs)."""
    m, n_t, _ = points.sizes
    batch, outputs = values.shape[:-2], values.shape[-1]
    s, v = (part.reshape(*batch, m, -1, outputs) for part in jnp.split(values, [m * n_t], -2))
    return points.y_t - s, points.y_v - v


@own_settings
@any_mesh
def meta_train(
    kernel: Callable[..., Any],
    tasks: Tasks,
    rule: InnerRule,
    *,
    meta_ridge: ArrayLike = 0.0,
    f0: Callable[..., Any] | None = None,
    method: str | None = None,
    mesh: Devices | None = None,
) -> KernelModel:
    r"""The exact minimiser of the meta-loss of a kernel model, for every rate and ridge at once.

        f* minimises  sum over tasks |y_v - f'_v|^2 + meta_ridge |f - f_0|^2

    with f' the function after adapting to the task by the rule, on the inner loss
    |y_t - f_t|^2 / (2 n_t), and |.| the norm of the kernel's space: where gradient descent on the
    meta-loss converges from f_0. A linear kernel gives `negmaml.linear.minimiser`; the tangent
    kernel of a network at its parameters gives the network in its lazy regime.

    Arguments:
        kernel: (x1, x2) -> matrix; any function of JAX, `empirical_ntk`, `relu_network`, a kernel
            of tinygp or GPJax.
        tasks: `Tasks` of (x, y): x (m, n_t, ...) and y (m, n_t) or (m, n_t, outputs) in the
            support, n_v points in the query.
        rule: any rule that has a label filter; a batch of parameters shares the data. For one
            gradient step, a further rate costs one decomposition of an (m n_v)^2 matrix.
        meta_ridge: at least 0, stacked as in `simulate`; of any shape, a further ridge costs
            products with a vector.
        f0: the function that training starts from, x -> values like the labels; zero by default.
        method: "direct"; "iterative", preconditioned conjugate gradients on kernel matrices that
            are never stored, for a kernel that JAX can trace. The default is iterative from
            10,000 points on.
        mesh: a `jax.sharding.Mesh` or a list of devices that share the rules of the batch, of any
            number, for the direct method. Each of them holds the kernel matrix.

    Returns a `KernelModel`. Memory for M points: direct, the kernel matrix and at most 6 M^2 more
    numbers, or 6 * 2^23 on an accelerator if that is more; iterative, 1024 M for each rate and
    ridge. Its `well_conditioned` is True where the residual of every output became small. A
    `ConvergenceWarning` is issued if that of a solution or of a derivative did not. Differentiable
    in rates, ridges and what the kernel holds.

    Raises TypeError or ValueError for shapes that disagree, a rule without a filter or with a
    preconditioner, a negative ridge, and a kernel that is not real, finite, symmetric or positive
    semidefinite to working precision. Points may repeat: without a ridge they are fitted by
    least squares.

    >>> x = jnp.arange(12.0).reshape(2, 6, 1) / 6
    >>> tasks = Tasks((x[:, :3], x[:, :3, 0]), (x[:, 3:], x[:, 3:, 0]))
    >>> from negmaml.rules import GradientDescent
    >>> model = meta_train(lambda a, b: a @ b.T, tasks, GradientDescent(-0.5), meta_ridge=1e-3)
    >>> model(jnp.array([[2.0]])).round(2)  # the labels are x itself
    Array([2.], dtype=float32)
    """
    kernel, f0 = as_kernel(kernel), check_optional(as_start, "f0", f0)
    rule = check_spectral(rule)
    ridges = check_ridges(meta_ridge)
    if method is not None:
        check_choice("method", method, METHODS)
    mesh = as_mesh(mesh)
    points, has_outputs = stack(tasks, f0)
    x, *labels = points
    # Below 10,000 points the kernel matrix fits in memory and one decomposition is faster.
    if (method or METHODS[len(x) >= MANY_POINTS]) == "direct":
        arguments = gram(kernel, x), *labels, rule, jnp.ravel(ridges)
        if mesh is not None:
            arguments = place(arguments, mesh)
        with within(mesh, arguments):
            weights, well_conditioned = _train(*arguments, mesh=mesh)
    else:
        gram(kernel, x[:TILE])  # checks the kernel
        weights, well_conditioned = train_iteratively(kernel, x, *labels, rule, jnp.ravel(ridges))
    batch = rule.batch_shape + jnp.shape(ridges)
    weights = weights.reshape(*batch, *weights.shape[2:])
    return KernelModel(kernel, f0, x, weights, well_conditioned.reshape(batch), has_outputs)


def _train_all(K, y_t, y_v, rule: InnerRule, ridges, mesh: Mesh | None = None):
    """(weights (rules, ridges, M, o), well_conditioned (rules, ridges)), one rule after another."""
    blocks = task_blocks(K, y_t.shape[0], y_t.shape[1])
    at, entries = systems(K, blocks, rule)
    ridges = ridges.astype(K.dtype)

    def one(entry):
        system = at(entry)
        # A (y - f_0), of which c = (G + ridge)^-1 r is needed.
        right = right_side(system.C, y_t, y_v)
        c, well_conditioned = solve(system.G, right.reshape(-1, right.shape[-1]), ridges)
        c = c.reshape(-1, *right.shape)
        # Weights A^T c: c on the queries and -C^T c on the supports.
        on_support = -contract("ivt,rivo->rito", system.C, c)
        flat = (part.reshape(len(c), -1, part.shape[-1]) for part in (on_support, c))
        return jnp.concatenate([*flat], 1), well_conditioned

    one_by_one = partial(lax.map, one)
    # On a CPU one rule at a time, so that one matrix G is in memory.
    fitting = max(1, BLOCK_NUMBERS // len(blocks.vt[..., 0].ravel()) ** 2)

    def solve_all(_, entries):
        size = max(s for s in range(1, fitting + 1) if len(entries) % s == 0)
        if size == 1:
            return one_by_one(entries)
        together = partial(lax.map, one, batch_size=size)
        return lax.platform_dependent(entries, cpu=one_by_one, default=together)

    if mesh is None:
        return solve_all((), entries)
    return gathered(share(solve_all, (), entries, mesh), mesh)


_train = jit_fast_compile(_train_all, static_argnames="mesh", profile="heavy")
