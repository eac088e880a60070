r"""The exact minimiser of the meta-loss among the functions of a kernel, and what it does on tasks.

    f*(x) = f_0(x) + k(x, .) A^T (A K A^T + meta_ridge)^-1 A (y - f_0)

is what gradient descent on the meta-loss reaches from f_0 (`negmaml.kernels.system` has A).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.checks import check_finite, check_nonnegative
from negmaml._core.numerics import contract
from negmaml._core.pytree import as_pytree, pytree, static
from negmaml.kernels.points import TILE, as_kernel, cross, gram, stack, start_values
from negmaml.kernels.solve import leave_out, solve
from negmaml.kernels.system import (
    Own,
    check_spectral,
    own_blocks,
    responses,
    systems,
)
from negmaml.meta import Tasks
from negmaml.rules import Rule


@pytree
class KernelModel:
    r"""A function in a kernel's space: model(x) = f_0(x) + sum_j k(x, points_j) weights_j.

    Of a batch of rules and ridges it is one function each: everything it returns leads with
    `batch`, the shape of the rule's parameter + that of the ridge.

    kernel, f0: as given to `meta_train`.
    points: (M, ...).   weights: batch + (M, outputs).
    reliable: batch, False where the solution is not finite, or singular to working precision
        without a clear rank: give a meta_ridge, or use float64.
    """

    kernel: Any
    f0: Any
    points: Any
    weights: Any
    reliable: Any
    has_outputs: bool = static()

    def __call__(self, x):
        """Values at points x: batch + (points,) or batch + (points, outputs), like the labels."""
        x = jnp.asarray(x)
        change = contract("nj,...jo->...no", cross(self.kernel, x, self.points), self.weights)
        return self._shape(start_values(self.f0, x, self._outputs) + change)

    def adapt(self, support, rule: Rule):
        """The function after adapting to one task by the rule: x -> values as from the model.

        Arguments: support, the task's (x, y), and any spectral rule; values of the function lead
        with batch + the rule's shape. Raises TypeError or ValueError for other shapes and rules.
        """
        check_spectral(rule)
        x, y = (jnp.asarray(part) for part in support)
        if x.shape[:1] != y.shape[:1] or y.shape[1:] != self._outputs:
            raise ValueError(
                f"support must be (x, y) of one task, y of shape (points, *{self._outputs}), got "
                f"{x.shape} and {y.shape}; jax.vmap over tasks, or use model.loss"
            )
        left = y.reshape(len(y), -1) - self._unshape(self(x))
        batch = left.shape[:-2]
        eye = jnp.eye(len(y), dtype=left.dtype)[None]
        C = responses(Own(self._within(x, x)[None], eye), rule)[..., 0, :, :]
        moved = contract("...st,Bto->B...so", C, left.reshape(-1, *left.shape[-2:]))
        return AdaptedModel(self, x, moved.reshape(*batch, *moved.shape[1:]), len(rule.batch_shape))

    def loss(self, tasks: Tasks, rule: Rule):
        """Half the mean squared error on the queries after adapting: batch + the rule's shape."""
        check_spectral(rule)
        stacked, _ = stack(tasks, None)
        m, n_t, n_v = stacked.sizes
        x = stacked.x
        x_t, x_v = (part.reshape(m, -1, *x.shape[1:]) for part in (x[: m * n_t], x[m * n_t :]))

        def left(x, y):  # before adapting, task first
            values = self._unshape(self(x.reshape(-1, *x.shape[2:])))
            values = values.reshape(*values.shape[:-2], *y.shape)
            return jnp.moveaxis(y - values, -3, 0)

        def blocks(points):
            x_t, x_v = points
            return Own(self._within(x_t, x_t), self.kernel(x_v, x_t))

        own = lax.map(blocks, (x_t, x_v), batch_size=min(m, max(1, TILE // (n_t + n_v))))
        s, v = left(x_t, stacked.y_t), left(x_v, stacked.y_v)
        return jnp.mean(_adapted_losses(own, rule, s, v), -1)

    @property
    def _outputs(self) -> tuple[int, ...]:
        return self.weights.shape[-1:] if self.has_outputs else ()

    def _within(self, x1, x2):
        K = self.kernel(x1, x2)
        return (K + K.T) / 2

    def _shape(self, values):
        return values if self.has_outputs else values[..., 0]

    def _unshape(self, values):
        return values if self.has_outputs else values[..., None]


@pytree
class AdaptedModel:
    """A `KernelModel` after adapting: model(x) + k(x, support) weights."""

    model: Any
    points: Any
    weights: Any
    rule_axes: int = static()

    def __call__(self, x):
        """Values at points x, batch + the rule's shape + (points,) or (points, outputs)."""
        x = jnp.asarray(x)
        change = contract("nj,...jo->...no", cross(self.model.kernel, x, self.points), self.weights)
        before = self.model._unshape(self.model(x))
        axes = tuple(range(before.ndim - 2, before.ndim - 2 + self.rule_axes))
        return self.model._shape(jnp.expand_dims(before, axes) + change)


@pytree
class LeftOut:
    """Each task as the model sees it that was trained on all others.

    support: labels less predictions before adapting, batch + (m, n_t, outputs).
    query: the same of query points, batch + (m, n_v, outputs).
    reliable: batch, as in `KernelModel`.
    own: the kernel within each task.
    """

    support: Any
    query: Any
    reliable: Any
    own: Any

    def losses(self, rule: Rule):
        """Half the mean squared error on the query of each task after adapting to its support.

        Returns shape batch + the rule's shape + (m,): tasks are the sample, so differences between
        rules have the standard error of their mean over tasks.
        """
        check_spectral(rule)
        s, v = (jnp.moveaxis(left, -3, 0) for left in (self.support, self.query))
        return _adapted_losses(Own(*self.own), rule, s, v)


def meta_train(
    kernel: Callable, tasks: Tasks, rule: Rule, *, meta_ridge=0.0, f0: Callable | None = None
) -> KernelModel:
    r"""The exact minimiser of the meta-loss of a kernel model, for every rate and ridge at once.

        f* minimises  sum over tasks |y_v - f'_v|^2 + meta_ridge |f - f_0|^2

    with f' the function after adapting to the task by the rule, on the inner loss
    |y_t - f_t|^2 / (2 n_t), and |.| the norm of the kernel's space: where gradient descent on the
    meta-loss goes from f_0. A linear kernel gives `negmaml.linear.minimiser`; the tangent kernel of
    a network at its parameters gives the network in its lazy regime.

    Arguments:
        kernel: (x1, x2) -> matrix; any function of JAX, `neural_tangent`, `relu_network`, a kernel
            of tinygp.
        tasks: `Tasks` of (x, y): x (m, n_t, ...) and y (m, n_t) or (m, n_t, outputs) in the
            support, n_v points in the query.
        rule: any rule that has a spectral filter q; a batch of parameters shares the data. Of
            one gradient step, a further rate costs one decomposition of an (m n_v)^2 matrix.
        meta_ridge: at least 0, stacked as in `simulate`; of any shape, a further ridge costs
            products with a vector.
        f0: x -> values like the labels, what training starts from; zero when left out.

    Returns a `KernelModel`. Memory: the kernel matrix of all M points and at most 6 M^2 more
    numbers. Differentiable in rates, ridges and what the kernel holds.

    Raises TypeError or ValueError for shapes that disagree, a rule without a filter or with a
    metric, a negative ridge, and a kernel that is not real, finite, symmetric or positive
    semidefinite to working precision. Points may repeat: without a ridge they get their least
    squares.

    >>> x = jnp.arange(12.0).reshape(2, 6, 1) / 6
    >>> tasks = Tasks((x[:, :3], x[:, :3, 0]), (x[:, 3:], x[:, 3:, 0]))
    >>> from negmaml.rules import GradientDescent
    >>> model = meta_train(lambda a, b: a @ b.T, tasks, GradientDescent(-0.5), meta_ridge=1e-3)
    >>> model(jnp.array([[2.0]])).round(2)  # the labels are x itself
    Array([2.], dtype=float32)
    """
    kernel, f0 = as_kernel(kernel), None if f0 is None else as_pytree(f0)
    check_spectral(rule)
    ridges = _check_ridges(meta_ridge)
    points, has_outputs = stack(tasks, f0)
    K = gram(kernel, points.x)
    weights, reliable = _train(K, points.y_t, points.y_v, rule, ridges.ravel())
    batch = rule.batch_shape + ridges.shape
    weights = weights.reshape(*batch, *weights.shape[2:])
    return KernelModel(kernel, f0, points.x, weights, reliable.reshape(batch), has_outputs)


def leave_one_task_out(
    kernel: Callable, tasks: Tasks, rule: Rule, *, meta_ridge=0.0, f0: Callable | None = None
) -> LeftOut:
    r"""Every task as seen by the model that is meta-trained on all others, without training again.

    For choosing rates and ridges on all tasks there are, without splits: `losses(rule)` of the
    result adapts to each left-out task by any rule. In closed form from the one solution of all
    tasks (`negmaml.kernels.solve` derives it); arguments, batches and errors as in `meta_train`, at
    least two tasks.

    >>> x = jnp.linspace(-1.0, 1.0, 24).reshape(4, 6, 1)
    >>> tasks = Tasks((x[:, :3], x[:, :3, 0]), (x[:, 3:], x[:, 3:, 0]))
    >>> from negmaml.rules import GradientDescent
    >>> rates = GradientDescent(jnp.array([-0.5, 0.0, 0.5]))
    >>> ridges = jnp.array([0.1, 1.0])
    >>> left = leave_one_task_out(lambda a, b: a @ b.T, tasks, rates, meta_ridge=ridges)
    >>> left.losses(GradientDescent(0.2)).shape  # rates, ridges, tasks
    (3, 2, 4)
    """
    kernel, f0 = as_kernel(kernel), None if f0 is None else as_pytree(f0)
    check_spectral(rule)
    ridges = _check_ridges(meta_ridge)
    points, _ = stack(tasks, f0)
    if points.sizes[0] < 2:
        raise ValueError("tasks must hold at least two to leave one out, got 1")
    K = gram(kernel, points.x)
    left, own = _leave_out(K, points.y_t, points.y_v, rule, ridges.ravel())
    batch = rule.batch_shape + ridges.shape
    support, query, reliable = (part.reshape(*batch, *part.shape[2:]) for part in left)
    return LeftOut(support, query, reliable, own)


def _check_ridges(meta_ridge):
    check_finite("meta_ridge", meta_ridge, "a ridge, or an array of them")
    ridges = jnp.asarray(meta_ridge, jnp.result_type(float, meta_ridge))
    if not isinstance(ridges, jax.core.Tracer) and ridges.size:
        check_nonnegative("meta_ridge", ridges.min(), "a ridge")
    return ridges


@jax.jit
def _train(K, y_t, y_v, rule: Rule, ridges):
    """(weights (rules, ridges, M, o), reliable (rules, ridges)), one rule after another."""
    own = own_blocks(K, *_sizes(y_t, y_v))
    at, entries = systems(K, own, rule)
    ridges = ridges.astype(K.dtype)

    def one(entry):
        system = at(entry)
        right = _right(system.C, y_t, y_v)
        c, reliable = solve(system.G, right.reshape(-1, right.shape[-1]), ridges)
        c = c.reshape(-1, *right.shape)
        on_support = -contract("ivt,rivo->rito", system.C, c)
        flat = (part.reshape(len(c), -1, part.shape[-1]) for part in (on_support, c))
        return jnp.concatenate([*flat], 1), reliable

    return lax.map(one, entries)


@jax.jit
def _leave_out(K, y_t, y_v, rule: Rule, ridges):
    own = own_blocks(K, *_sizes(y_t, y_v))
    at, entries = systems(K, own, rule)
    ridges = ridges.astype(K.dtype)

    def one(entry):
        system = at(entry)
        return leave_out(system, _right(system.C, y_t, y_v), y_t.astype(K.dtype), ridges)

    return lax.map(one, entries), own


def _sizes(y_t, y_v) -> tuple[int, int, int]:
    m, n_t = y_t.shape[:2]
    return m, n_t, y_v.shape[1]


def _right(C, y_t, y_v):
    """A (y - f_0), (m, n_v, o)."""
    return y_v.astype(C.dtype) - contract("ivt,ito->ivo", C, y_t.astype(C.dtype))


@jax.jit
def _adapted_losses(own: Own, rule: Rule, s, v):
    """Losses of tasks after adapting, from what is left before: s (m, ..., n_t, o), v alike.

    Returns shape batch + the rule's shape + (m,).
    """
    C = responses(own, rule)  # rule + (m, n_v, n_t)
    m, *batch = s.shape[:-2]
    C = C.reshape(-1, *C.shape[-3:])
    s, v = (part.reshape(m, -1, *part.shape[-2:]) for part in (s, v))

    def one(C):
        after = v - contract("ivt,ibto->ibvo", C, s)
        return jnp.mean(after**2, (-2, -1)) / 2

    losses = lax.map(one, C)  # rules, m, batch
    return jnp.transpose(losses, (2, 0, 1)).reshape(*batch, *rule.batch_shape, m)
