r"""The interface of an inner rule: how parameters adapt to the data of a task.

A rule is a pytree whose leaves are numbers, such as a rate. A rule of your own derives from
`InnerRule` and defines, for the features that it should serve:

- for any model (adapt, maml and relatives) `update(gradient, state, params)`, which returns
  (params, state) after one step, with `steps` and, for a state, `init(params)`. Or, if the rule
  solves a problem, `solve(loss, start)`, which may also take the support; nothing else is needed.
- for the linear model (theory, simulation) `linear = True` if `update` is linear in the parameters
  and the gradient, and moves nothing where the gradient is zero (no weight decay). Or
  `label_filter(x)`. Or `spectral()`, which returns a `Filter` of your own, for filters with zeros,
  poles or a pencil.

A feature that needs a missing method raises a TypeError that says what to add. The rules of this
package are final: a rule that changes one of them holds it in a field. Values that differ from step
to step are a `Schedule`, which no rule has to handle: `update` runs on the rule of one step.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.checks import as_array, check_broadcast, short_repr
from negmaml._core.jit import is_concrete
from negmaml._core.pytree import split_floating
from negmaml._core.types import ArrayLike, PyTree, ScalarLike
from negmaml.rules.deprecated import adopt_old_names, old_attribute
from negmaml.rules.filters import (
    Filter,
    PolynomialFilter,
    RuleFilter,
    UndefinedMethodError,
    undefined,
)
from negmaml.rules.schedule import combine, is_schedule
from negmaml.rules.solution import Solution, as_solution
from negmaml.rules.unroll import run


class InnerRule:
    r"""The adaptation of parameters to a task's data; derive from it to define a rule.

    On a linear model with S = X^T X / n the result is a pair of spectral filters,

        theta = init_filter(S) omega + label_filter(S) X^T y / n,
        init_filter(x) = 1 - x label_filter(x).

    `negmaml.pytree` makes a class with annotated fields a rule that JAX can trace:

    >>> import negmaml as nm
    >>> @nm.pytree
    ... class SignedSquareStep(nm.InnerRule):
    ...     rate: float
    ...     def update(self, gradient, state, params):
    ...         move = lambda w, g: w - self.rate * g * jnp.abs(g)
    ...         return jax.tree.map(move, params, gradient), state
    >>> loss = lambda w, target: (w - target) ** 2 / 2
    >>> float(nm.adapt(loss, 0.0, 2.0, SignedSquareStep(0.25)))
    1.0

    Attributes:
        steps: number of updates.
        linear: whether `update` is linear in parameters and gradient, without weight decay.
        implicit: whether `solve` finds the adapted parameters, instead of a series of updates.
            True for a class that defines `solve`.
        sums_gradients: whether Reptile follows the sum of the gradients, or params - theta.
        tunable: name of the field that searches for optima vary.
    """

    steps: Any = 1
    linear: ClassVar[bool] = False
    implicit: ClassVar[bool] = False
    sums_gradients: ClassVar[bool] = True
    tunable: ClassVar[str] = "rate"

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        # A subclass of a final rule could change its update and not its filters. The theory would
        # then silently describe another rule.
        for base in cls.__bases__:
            if base.__dict__.get("__final__"):
                raise TypeError(
                    f"{cls.__name__} must not derive from {base.__name__}, whose filters would not "
                    "follow a change; derive from negmaml.InnerRule and hold the rule in a field"
                )
        adopt_old_names(cls)
        declared = any("implicit" in vars(base) for base in cls.__mro__ if base is not InnerRule)
        if cls.solve is not InnerRule.solve and not declared:
            cls.implicit = True

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            return old_attribute(self, name)

    # On any model.

    def init(self, params: PyTree) -> Any:
        """The state before the first update."""
        return ()

    def update(self, gradient: PyTree, state: PyTree, params: PyTree) -> tuple[Any, Any]:
        """(parameters, state) after one step; all are pytrees like the parameters that adapt."""
        raise _undefined(
            self, "update(self, gradient, state, params)", "adapting a general model",
            "define it, it returns (params, state); theory and simulate use the filters of a rule",
        )  # fmt: skip

    def solve(self, loss: Callable[..., Any], start: PyTree, *, remat: bool = False) -> Any:
        """The adapted parameters, from `start`, for a loss of the parameters only.

        It returns `negmaml.rules.Solution(params, info)`, which says whether it converged, or only
        the parameters, which then count as converged. It is called with those of the following
        keywords that its signature has:

            remat: as in `adapt`.
            support: the data of the task, as the loss takes it.
            apply: apply(function, theta, *data) calls a function of the model as the loss is
                called, with `theta`, parameters like `start`, and the frozen ones in their places.
        """
        return run(self, jax.grad(loss), start, remat)[0]

    def solve_and_pull_back(
        self,
        loss: Callable[..., Any],
        start: PyTree,
        frozen: PyTree,
        *,
        support: PyTree = None,
        apply: Callable[..., Any] | None = None,
    ) -> tuple[Solution, Callable[..., Any]]:
        """(solution for loss(theta, frozen), pull), for meta-gradients of rules that solve.

        `pull` takes the cotangent of the adapted parameters and returns those of `start`, of
        `frozen` and of the rule (like it, with None for leaves that are no floating point numbers),
        and whether they are accurate. Here `apply` takes (frozen, function, theta, ...).
        """
        numbers, others = split_floating(self)

        # The info is not differentiated, so it is an auxiliary output of the vjp.
        def solved(start, frozen, numbers):
            given = {"support": support, "apply": partial(apply, frozen) if apply else None}
            rule = combine(numbers, others)
            return solve_with(rule, lambda theta: loss(theta, frozen), start, **given)

        params, pull, info = jax.vjp(solved, start, frozen, numbers, has_aux=True)
        return Solution(params, info), lambda cotangent: (*pull(cotangent), True)

    def check(self, params: PyTree) -> None:
        """Raise ValueError if the numbers of the rule do not fit the parameters."""

    def check_meta(self) -> None:
        """Raise if no model can be meta-trained with the rule or its numbers."""

    @property
    def ignores_start(self) -> bool:
        """True if the adapted parameters are known to have derivative zero in the start."""
        return False

    @property
    def smooth_at_zero(self) -> bool:
        """True if `update` has a derivative where one entry of the gradient is zero."""
        return True

    # On the linear model.

    def spectral(self) -> Filter:
        """The filters of the rule, with what theory and simulation need to know about them."""
        return PolynomialFilter(self) if self.linear else RuleFilter(self)

    def label_filter(self, x: ArrayLike) -> Any:
        """The filter on the labels at an eigenvalue x of S, shape batch_shape + x.shape."""
        own = self.spectral()
        if isinstance(own, RuleFilter):  # it would ask this method
            raise _undefined(
                self, "label_filter(self, x), its filter on an eigenvalue x of S",
                "theory and simulation", "define it, or set linear = True if its update is linear",
            )  # fmt: skip
        return own.label_filter(x)

    def init_filter(self, x: ArrayLike) -> Any:
        """The filter on the starting point, shape batch_shape + x.shape; 1 - x label_filter(x)."""
        own = self.spectral()
        if isinstance(own, RuleFilter):
            return 1 - jnp.asarray(x) * self.label_filter(x)
        return own.init_filter(x)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The common shape of the parameters, which leads every result on the linear model.

        Raises ValueError when one is a pytree: weights of the linear model have one rate.
        """
        shapes = {}
        parts = jax.tree_util.tree_leaves_with_path(self, is_leaf=lambda node: node is not self)
        for path, part in parts:
            if not is_schedule(part) and not jax.tree_util.all_leaves([part]):
                raise ValueError(
                    "the linear model takes a number or one array of numbers as the parameter of a "
                    f"rule, got {short_repr(self)}; pytrees of rates are for general models"
                )
            name = jax.tree_util.keystr(path).strip(".")
            shapes[name] = np.shape(part.values)[1:] if is_schedule(part) else np.shape(part)
        return check_broadcast(shapes)

    def search_range(self, largest: ScalarLike) -> tuple[Any, Any]:
        """(smallest, largest) size of the tunable field to try on a spectrum up to `largest`."""
        return 1e-2 / largest, 1e4 / largest

    def with_tunable(self, value: ArrayLike) -> Self:
        """The rule with another value of its tunable field."""
        return dataclasses.replace(self, **{self.tunable: value})  # type: ignore[type-var]


def solve_with(rule: InnerRule, loss, start, **given) -> Solution:
    """The `Solution` by the `solve` of a rule, which gets those of the keywords that it takes."""
    return as_solution(rule.solve(loss, start, **accepted(type(rule).solve, given)), rule.steps)


def accepted(function: Callable, given: dict[str, Any]) -> dict[str, Any]:
    """The keywords that the signature of a function has."""
    names = _keywords(function)
    return given if names is None else {k: v for k, v in given.items() if k in names}


@cache
def _keywords(function: Callable) -> frozenset[str] | None:
    """The names that a function takes by keyword; None if it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY)


def flat_batch(rule: InnerRule) -> InnerRule:
    """The rule with one leading axis for its whole batch, in every leaf, for vmap."""
    shape = rule.batch_shape

    def flat(part):
        if not is_schedule(part):
            return jnp.broadcast_to(jnp.asarray(part), shape).ravel()
        values = jnp.asarray(part.values)
        steps, own = values.shape[0], values.shape[1:]
        aligned = values.reshape(steps, *(1,) * (len(shape) - len(own)), *own)
        # The batch comes first for vmap, the steps behind it.
        full = jnp.broadcast_to(aligned, (steps, *shape)).reshape(steps, -1)
        return jax.tree.map(lambda _: full.T, part)

    return jax.tree.map(flat, rule, is_leaf=is_schedule)


def check_filters(name: str, rule) -> Any:
    """Return the rule, lists of numbers as arrays, if its numbers are valid on the linear model.

    There a list is a batch of rates; on a general model it is a pytree, like parameters in a list.
    """
    structure: Any
    parts, structure = jax.tree.flatten(check_rule(name, rule), is_leaf=lambda x: x is not rule)
    # A rule without parameters is its own only leaf.
    if parts and parts[0] is not rule:
        rule = structure.unflatten([as_array(name, part) for part in parts])
    rule.batch_shape  # noqa: B018  raises unless each parameter is one array
    rule.spectral()  # raises for a preconditioner that is not symmetric
    # The filters of the package's own rules hold by construction, so calls need not pay for them.
    if not type(rule).__module__.startswith("negmaml.") and is_concrete(rule):
        _check_own_filters(name, rule)
    return rule


def _check_own_filters(name: str, rule: InnerRule) -> None:
    """Raise ValueError unless init_filter(x) = 1 - x label_filter(x), of shape batch + x.shape.

    The solution of the linear model and the theory rest on this identity. Weight decay breaks it:
    such an update is linear, but moves parameters where the gradient is zero.
    """
    own = rule.spectral()
    with jax.ensure_compile_time_eval():
        if isinstance(own, PolynomialFilter):
            error = np.abs(np.asarray(own.at_rest()) - 1)
        else:
            error = _identity_error(name, rule, own)
    if np.any(error > 1e-4):
        raise ValueError(
            f"{name} must leave parameters unchanged where the gradient is zero, so that "
            f"init_filter(x) = 1 - x label_filter(x); {type(rule).__name__} misses it by "
            f"{short_repr(error)}. Use a rule with weight decay on general models only (adapt, "
            "maml and relatives)"
        )


def _undefined(rule: InnerRule, what: str, use: str, remedy: str) -> UndefinedMethodError:
    """The error for a missing method; nobody can add one to a rule of the package."""
    if type(rule).__module__.startswith("negmaml."):
        remedy = "take another rule, such as GradientDescent, Momentum or Proximal"
    return undefined(type(rule).__name__, what, use, remedy)


def _identity_error(name: str, rule: InnerRule, own: Filter) -> Any:
    """|init_filter(x) + x label_filter(x) - 1| at two x, over the size of the terms."""
    x = np.array([0.0, 0.5])
    expected = rule.batch_shape + x.shape
    try:
        label, start = np.asarray(own.label_filter(x)), np.asarray(own.init_filter(x))
    except UndefinedMethodError:  # the feature that needs the filter says what to add
        return 0.0
    for filter_name, values in (("label_filter", label), ("init_filter", start)):
        if values.shape != expected:
            raise ValueError(
                f"{filter_name} of {name} must return shape batch_shape + x.shape = {expected} for "
                f"x of shape {x.shape}, got {values.shape} from {type(rule).__name__}"
            )
    return np.abs(start + x * label - 1) / (1 + np.abs(start) + np.abs(x * label))


def check_scalar_rule(name: str, rule) -> Any:
    """Return the rule if each of its parameters is one number on the linear model; else raise."""
    rule = check_filters(name, rule)
    if rule.batch_shape != ():
        raise ValueError(
            f"{name} must have one scalar parameter, got {short_repr(rule)}; call it for each, or "
            "jax.vmap over rules"
        )
    return rule


def check_rule(name: str, rule) -> Any:
    """Return `rule` if it is an inner rule, else raise a TypeError that names the argument."""
    if not isinstance(rule, InnerRule):
        number = f"; for a rate write GradientDescent({rule!r}) " if np.isscalar(rule) else " "
        if isinstance(rule, type) and issubclass(rule, InnerRule):
            number = f"; that is a class: write {rule.__name__}(...) with its numbers "
        raise TypeError(
            f"{name} must be an inner rule such as GradientDescent(-0.2), got "
            f"{short_repr(rule)}{number}(a rule of your own derives from negmaml.InnerRule)"
        )
    return rule
