r"""Heads that a rule computes from the support: prototypes, ridge and logistic regression.

The head is the last, linear layer of a model, with outputs phi(x) W + b for the features phi of an
input. A rule of this module replaces its weights by those that fit the support best, in closed form
or by a solver, and leaves all other parameters as they are. With Phi the features of the n rows of
the support, one row each, and Y their targets, one-hot for classes,

    prototypes   c_k = mean of the features of class k,  W = 2 c,  b = -|c|^2
    ridge        min_W |Phi W - Y|^2 / (2n) + strength/2 |W|^2
    logistic     min_W cross entropy(Phi W, Y) / n + strength/2 |W|^2

where a bias is the weight of one more feature that is 1. The derivative goes through the solution
into the features, so that meta-training finds features in which such a head generalises.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple, final

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.checks import (
    check_callable,
    check_count,
    check_flag,
    check_optional,
    check_positive,
    check_scalar,
    short_repr,
)
from negmaml._core.display import tree_text
from negmaml._core.factorisations import linear_solve
from negmaml._core.pytree import as_pytree, pytree, static
from negmaml._core.types import Array, ArrayLike, PyTree
from negmaml.meta.partition import combine, names_of, partition
from negmaml.rules import InnerRule, Solution, SolveInfo
from negmaml.rules.implicit import Settings, proximal_point
from negmaml.rules.krylov import norm
from negmaml.rules.trust_region import ROUNDING

HIGHEST = lax.Precision.HIGHEST


@pytree
class LinearHead(InnerRule):
    """The parts that all heads share. A head defines `fit`."""

    features: Any
    _: dataclasses.KW_ONLY
    head: Any = static(default="head")
    transposed: bool | None = static(default=None)
    examples: Any = static(default=None)

    sums_gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        form = "of (params, inputs), called as the loss is"
        checked = {"features": as_pytree(check_callable("features", self.features, form))}
        if self.examples is not None:
            check_callable("examples", self.examples, "of the support")
        if not (isinstance(self.head, str) and self.head) and not callable(self.head):
            raise TypeError(
                "head must be the name of the layer such as 'head' or 'net.head', or a function "
                f"(path, leaf) -> bool, got {short_repr(self.head)}"
            )
        checked["transposed"] = check_optional(check_flag, "transposed", self.transposed)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def fit(self, phi: Array, targets: Array, strength: ArrayLike | None) -> tuple[Any, SolveInfo]:
        """Return the weights (features, outputs) for the rows of one support, and information.

        phi: the features, and a last column of 1 if the head has a bias. targets: (rows, outputs).
        """
        raise NotImplementedError

    def check(self, params: PyTree) -> None:
        """Raise ValueError unless `head` selects a weight and at most one bias that fits it."""
        self._select(params)

    def solve(  # type: ignore[override]
        self, loss: Callable[..., Any], start: PyTree, *, support: PyTree, apply: Callable[..., Any]
    ) -> Solution:
        """Return `start` with the head fitted to the support."""
        layer, rest = self._select(start)
        inputs, targets = self._examples(support)
        phi = _check_features(apply(self.features, start, inputs))
        transposed = self._is_transposed(layer.weight, phi.shape[1])
        outputs = 1 if layer.weight.ndim == 1 else layer.weight.shape[0 if transposed else 1]
        strength = getattr(self, "strength", None)
        if callable(strength):
            strength = _check_result(apply(strength, start))
        # The head is fitted in at least single precision.
        phi = phi.astype(jnp.promote_types(phi.dtype, jnp.float32))
        targets, valid = _as_columns(targets, len(phi), outputs, phi.dtype)
        if layer.bias is not None:
            phi = jnp.concatenate([phi, jnp.ones((len(phi), 1), phi.dtype)], 1)
        weight, info = self.fit(phi, targets, strength)
        info = info._replace(converged=info.converged & valid)
        return Solution(combine(layer.filled(weight, transposed), rest), info)

    def _examples(self, support):
        """Return (inputs, targets) of the support."""
        if self.examples is not None:
            return self.examples(support)
        if isinstance(support, tuple | list) and len(support) >= 2:
            return support[0], support[1]
        raise TypeError(
            f"the support of a head must be (inputs, targets), got {tree_text(support)}; for "
            "another form give examples, a function that returns this pair"
        )

    def _is_transposed(self, weight, width: int) -> bool:
        """Return whether the weight is (outputs, features), from its shape if not given."""
        fits = [weight.shape[0] == width, weight.ndim == 2 and weight.shape[1] == width]
        if self.transposed is None and all(fits):
            raise ValueError(
                f"transposed must be given for a square weight, {weight.shape}: True if the layer "
                "computes W x as in Equinox, False for x W as in Flax"
            )
        transposed = fits[1] if self.transposed is None else self.transposed
        if not fits[transposed]:
            raise ValueError(
                f"the weight of the head must have {width} rows, one for each feature"
                f"{', or columns if transposed' if weight.ndim == 2 else ''}, got shape "
                f"{weight.shape} for features of shape (rows, {width})"
            )
        return transposed

    def _select(self, params) -> tuple["Layer", Any]:
        """Return the layer of the head, and the tree of all other leaves."""
        chosen = self.head if callable(self.head) else partial(_is_below, self.head.split("."))
        flags = [
            bool(chosen(names_of(path), leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        ]
        if not any(flags):
            raise ValueError(
                f"head must select leaves that adapt, got {short_repr(self.head)}, which is not in "
                f"the paths of {tree_text(params)}"
            )
        mask = jax.tree.unflatten(jax.tree.structure(params), flags)
        tree, rest = partition(params, mask)
        return Layer.of(tree), rest


class Layer(NamedTuple):
    """The leaves of a linear layer, in the tree of the parameters with None for all others."""

    weight: Any
    bias: Any
    tree: Any

    @classmethod
    def of(cls, tree) -> "Layer":
        """Tell the weight from the bias by their axes; raise unless they make a linear layer."""
        leaves = sorted(jax.tree.leaves(tree), key=lambda leaf: -leaf.ndim)
        weight, bias = (*leaves, None)[:2]
        fits = len(leaves) <= 2 and weight.ndim in (1, 2)
        if fits and bias is not None:
            fits = bias.ndim == weight.ndim - 1 and (not bias.ndim or len(bias) in weight.shape)
        if not fits:
            raise ValueError(
                "head must select the weight of a linear layer, of shape (features, outputs) or "
                "(features,), and at most its bias, of shape (outputs,) or (), got "
                f"{tree_text(tree)}"
            )
        return cls(weight, bias, tree)

    def filled(self, weight, transposed: bool):
        """Return the tree with these weights, the last row for the bias, as the leaves are."""
        own = weight if self.bias is None else weight[:-1]
        own = own.T if transposed else own

        def new(leaf):
            value = own if leaf is self.weight else weight[-1]
            return value.astype(leaf.dtype).reshape(leaf.shape)

        return jax.tree.map(new, self.tree)


@final
@pytree
class PrototypeHead(LinearHead):
    r"""Prototypes as a linear head: class k has the mean c_k of its features on the support.

        outputs_k = 2 c_k . phi(x) - |c_k|^2 = |phi(x)|^2 - |phi(x) - c_k|^2

    Softmax and cross entropy of these outputs are those of prototypical networks, since |phi(x)|^2
    is common to all classes. Classes without a row on the support are never predicted. The head
    needs a bias. Source: Snell, Swersky and Zemel, NeurIPS 2017.

    Arguments:
        features: function of (params, inputs) that returns the features of the inputs of one task,
            shape (rows, features). It is called as the loss is: with the model, or for `Stateful`
            parameters with (params, state, inputs).
        head: the weight and the bias of the linear layer: the name of the layer in `params`, or
            names with dots between them, or a function (path, leaf) -> bool as for a mask. The
            weight has the shape (features, outputs), which says the number of classes. The values
            are not used, and their meta-gradient is zero.
        transposed: whether the weight has the shape (outputs, features), as in Equinox. By default
            it is seen from the shape, which is possible unless it is square.
        examples: function of the support that returns (inputs, targets), by default its first two
            entries. Targets are integer labels or one-hot, of shape (rows,) or (rows, classes).

    It is a rule as any other: `adapt`, `maml_value_and_grad`, `anil`, `evaluate` take it, and the
    loss is the user's, with the outputs features @ weight + bias. `return_info=True` of `adapt`
    returns whether all labels are among the classes and all numbers are finite; otherwise a warning
    is issued if not. Raises ValueError or TypeError for invalid arguments, for leaves that make no
    linear layer, and for features or targets of other shapes.

    >>> import negmaml as nm
    >>> params = {"head": {"w": jnp.zeros((1, 2)), "b": jnp.zeros(2)}}
    >>> rule = nm.PrototypeHead(lambda params, x: x)
    >>> support = jnp.array([[0.0], [2.0], [5.0]]), jnp.array([0, 0, 1])
    >>> adapted = nm.adapt(lambda params, data: 0.0, params, support, rule)
    >>> adapted["head"]["w"].tolist(), adapted["head"]["b"].tolist()
    ([[2.0, 10.0]], [-1.0, -25.0])
    """

    def check(self, params: PyTree) -> None:
        """Raise ValueError unless the head has a bias and several outputs."""
        layer, _ = self._select(params)
        if layer.bias is None or layer.weight.ndim == 1:
            raise ValueError(
                "head must have a weight of shape (features, classes) and a bias of shape "
                f"(classes,) for prototypes, got {tree_text(layer.tree)}"
            )

    def fit(self, phi: Array, targets: Array, strength: ArrayLike | None) -> Any:
        """Compute W and b from the means of the classes."""
        counts = jnp.sum(targets, 0)
        sums = jnp.matmul(phi[:, :-1].T, targets, precision=HIGHEST)
        means = sums / jnp.where(counts == 0, 1, counts)[None]
        # The outputs of a class without rows are below all others.
        lowest = jnp.finfo(means.dtype).min / 4
        bias = jnp.where(counts == 0, lowest, -jnp.sum(means**2, 0))
        converged = jnp.all(jnp.isfinite(lax.stop_gradient(means)))
        return jnp.concatenate([2 * means, bias[None]]), SolveInfo(converged, 0.0, 0)


@final
@pytree
class RidgeHead(LinearHead):
    r"""Ridge regression from the features to the targets of the support, in closed form.

        W = (Phi^T Phi / n + strength I)^-1 Phi^T Y / n
          = Phi^T (Phi Phi^T / n + strength I)^-1 Y / n

    The smaller of the two systems is solved, so that the cost is that of min(n, features)^3.
    A bias is the weight of a feature that is 1. For strength zero and n below the number of
    features it is the interpolation of smallest norm; a negative strength is allowed. Source:
    Bertinetto et al., ICLR 2019 (R2-D2), whose lambda is n strength.

    Arguments:
        features, head, transposed, examples: as in `PrototypeHead`. Targets may also be numbers, of
            shape (rows,) for a weight of shape (features,) or (features, 1), else
            (rows, outputs). Integer labels are one-hot.
        strength: a number of any sign; or a function of the model, such as
            lambda params: jnp.exp(params["log_strength"]), so that it is trained with the rest.

    For classes, multiply the outputs by a trained scale in the loss as in R2-D2, since regression
    to 0 and 1 leaves them too small for a softmax. `PrototypeHead` says how a head is used. Its
    `info` has the residual of the system. Raises as `PrototypeHead` does.

    >>> import negmaml as nm
    >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([1.0, 2.0])
    >>> rule = nm.RidgeHead(lambda params, x: x, strength=2.5)
    >>> nm.adapt(lambda params, data: 0.0, {"head": jnp.zeros(1)}, (x, y), rule)["head"].tolist()
    [0.5]
    """

    strength: Any = 1.0

    tunable: ClassVar[str] = "strength"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "strength", _check_strength(self.strength))

    def fit(self, phi: Array, targets: Array, strength: ArrayLike | None) -> Any:
        """Solve the smaller of both systems."""
        n, width = phi.shape
        dual = n <= width
        first, second = (phi, phi.T) if dual else (phi.T, phi)
        gram = jnp.matmul(first, second, precision=HIGHEST) / n
        matrix = gram + jnp.asarray(strength, phi.dtype) * jnp.eye(len(gram), dtype=phi.dtype)
        right = targets if dual else jnp.matmul(phi.T, targets, precision=HIGHEST)
        found = linear_solve(matrix, right / n)
        weight = jnp.matmul(phi.T, found, precision=HIGHEST) if dual else found
        return weight, _linear_info(*map(lax.stop_gradient, (matrix, found, right / n)))


@final
@pytree
class LogisticHead(LinearHead):
    r"""Logistic regression from the features to the classes of the support.

        min_{W, b}  -mean_i log softmax(phi(x_i) W + b)_{y_i} + strength/2 (|W|^2 + |b|^2)

    by trust region steps from zero, with the derivative of the solution by one linear system
    (`negmaml.rules.implicit`). Source: Bertinetto et al., ICLR 2019 (LR-D2).

    Arguments:
        features, head, transposed, examples: as in `PrototypeHead`. Targets may be the
            probabilities of the classes.
        strength: as in `RidgeHead`. Classes that a plane separates have no finite solution for
            strength zero; the weights are then those where the gradient is within the tolerance.
        max_steps, tolerance: of the solver, as in `Proximal`; static.

    `PrototypeHead` says how a head is used. Raises as it does.

    >>> import negmaml as nm
    >>> params = {"head": jnp.zeros((1, 2))}
    >>> rule = nm.LogisticHead(lambda params, x: x, strength=0.5)
    >>> support = jnp.array([[1.0], [-1.0]]), jnp.array([0, 1])
    >>> weight = nm.adapt(lambda params, data: 0.0, params, support, rule)["head"]
    >>> round(float(weight[0, 0]), 3)  # w = 2 sigmoid(-2 w)
    0.521
    """

    strength: Any = 1.0
    max_steps: int = static(default=200)
    tolerance: float | None = static(default=None)

    tunable: ClassVar[str] = "strength"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "strength", _check_strength(self.strength))
        object.__setattr__(self, "max_steps", check_count("max_steps", self.max_steps))
        tolerance = check_optional(check_positive, "tolerance", self.tolerance)
        object.__setattr__(self, "tolerance", tolerance)

    def check(self, params: PyTree) -> None:
        """Raise ValueError unless the head has several outputs."""
        layer, _ = self._select(params)
        if layer.weight.ndim == 1:
            raise ValueError(
                "head must have a weight of shape (features, classes) for logistic regression, got "
                f"{tree_text(layer.tree)}"
            )

    def fit(self, phi: Array, targets: Array, strength: ArrayLike | None) -> Any:
        """Minimise the regularised cross entropy."""

        def cross_entropy(weight):
            scores = jax.nn.log_softmax(jnp.matmul(phi, weight, precision=HIGHEST))
            return -jnp.sum(targets * scores) / len(phi)

        start = jnp.zeros((phi.shape[1], targets.shape[1]), phi.dtype)
        settings = Settings(self.max_steps, self.tolerance)
        return proximal_point(cross_entropy, start, strength, settings)


def _check_strength(strength):
    """Return a function as a pytree, or one finite number."""
    if callable(strength):
        return as_pytree(strength)
    return check_scalar("strength", strength, "a ridge strength")


def _check_result(strength):
    """Return the result of the function of the strength; raise unless it is one real number."""
    leaves = jax.tree.leaves(strength)
    if len(leaves) != 1 or isinstance(leaves[0], str) or jnp.shape(leaves[0]):
        raise ValueError(
            "strength must be a function that returns one number, of shape (), got "
            f"{short_repr(strength)}; take an entry, such as params['log_strength'][0]"
        )
    return leaves[0]


def _linear_info(matrix, found, right) -> SolveInfo:
    """Return the residual of a linear system, and whether it is within rounding."""
    residual = norm((jnp.matmul(matrix, found, precision=HIGHEST) - right).ravel())
    size = norm(matrix.ravel()) * norm(found.ravel()) + norm(right.ravel())
    return SolveInfo(residual <= ROUNDING * jnp.finfo(right.dtype).eps * size, residual, 0)


def _check_features(phi):
    """Return the features; raise ValueError unless they are (rows, features)."""
    if not hasattr(phi, "ndim") or phi.ndim != 2:
        raise ValueError(
            "features must return an array of shape (rows, features) for the inputs of one task, "
            f"got {tree_text(phi)}; flatten other axes"
        )
    if not len(phi):
        raise ValueError(f"the support of a head must have at least one row, got {tree_text(phi)}")
    return phi


def _as_columns(targets, n: int, outputs: int, dtype):
    """Return the targets (n, outputs), one-hot for labels, and whether all labels are classes."""
    targets, several = jnp.asarray(targets), outputs > 1
    if several and targets.shape == (n,) and not jnp.issubdtype(targets.dtype, jnp.floating):
        labels = targets.astype(int)
        valid = jnp.all((labels >= 0) & (labels < outputs))
        return jax.nn.one_hot(labels, outputs, dtype=dtype), valid
    if targets.shape not in ({(n, outputs)} if several else {(n,), (n, 1)}):
        labels = f"integer labels of shape ({n},) or " if several else f"of shape ({n},) or "
        raise ValueError(
            f"targets of a head must be {labels}({n}, {outputs}), for {n} rows and {outputs} "
            f"outputs, got {targets.dtype} of shape {targets.shape}"
        )
    return targets.reshape(n, outputs).astype(dtype), jnp.asarray(True)


def _is_below(names: list[str], path: tuple, leaf) -> bool:
    """Return whether these names follow each other in the path of a leaf."""
    path = tuple(map(str, path))
    return any(path[i : i + len(names)] == tuple(names) for i in range(len(path)))
