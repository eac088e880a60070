r"""The open protocol of an inner rule: what a rule can say of itself, and who asks.

A rule is a pytree whose leaves are numbers, such as a rate, that derives from `Rule` and says as
much of the following as it has:

    on the linear model (theory, simulation)          on any model (adapt, maml and relatives)
    q(x)         filter on the labels                 steps         number of updates
    b(x)         filter on the start, 1 - x q(x)      init(params)  the state before the first
    one_step     q(x) where it is the same for all x  update(gradient, state, params)
    degree       of b, where it is a polynomial                     one step: (params, state)
    entire       whether b has no pole anywhere
    growth, pole where means over S end to exist
    metric       P, where the rule acts through P S   solve(loss, params)
    pencil       for inputs with a covariance                       all of it, where not by updates:
                                                                    a Solution, or parameters

A rule whose update is linear in parameters and gradient may set `linear = True` instead of giving
q and b: running it on x theta^2/2 - y theta is what the filters are. What a rule lacks raises a
TypeError that says what to add. Per-step values are `Schedule`s, which no rule has to know of:
`update` is called on the rule with the values of its step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import outer
from negmaml._core.checks import as_array, check_broadcast, shown
from negmaml.rules.log_filters import Filters, filters_of_updates, filters_of_values
from negmaml.rules.pencil import Pencil, pencil_of_updates
from negmaml.rules.schedule import is_schedule
from negmaml.rules.solution import Solution, as_solution
from negmaml.rules.unroll import run


class Rule:
    r"""How parameters adapt to a task's data; derive from it and say what you can.

    On a linear model with S = X^T X / n a rule is a pair of spectral filters,

        theta = b(S) omega + q(S) X^T y / n,        b(x) = 1 - x q(x).

    `negmaml.pytree` makes a class with annotated fields a rule that JAX can trace:

    >>> import negmaml as nm
    >>> @nm.pytree
    ... class SignedSquareStep(nm.Rule):
    ...     rate: float
    ...     def update(self, gradient, state, params):
    ...         move = lambda w, g: w - self.rate * g * jnp.abs(g)
    ...         return jax.tree.map(move, params, gradient), state
    >>> loss = lambda w, target: (w - target) ** 2 / 2
    >>> float(nm.adapt(loss, 0.0, 2.0, SignedSquareStep(0.25)))
    1.0
    """

    steps: Any = 1
    linear: ClassVar[bool] = False  # whether `update` is linear in parameters and gradient
    implicit: ClassVar[bool] = False  # whether `solve` has a derivative of its own, not by updates
    sums_gradients: ClassVar[bool] = True  # whether Reptile follows their sum, or params - theta
    tuned: ClassVar[str] = "rate"  # the field that optima search over

    # On the linear model.

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
                    f"rule, got {shown(self)}; pytrees of rates are for general models"
                )
            name = jax.tree_util.keystr(path).strip(".")
            shapes[name] = np.shape(part.values)[1:] if is_schedule(part) else np.shape(part)
        return check_broadcast(shapes)

    def q(self, x):
        """The filter on the labels, shape batch_shape + x.shape."""
        if not self.linear:
            raise _lacks(
                self, "q(self, x), its filter on an eigenvalue x of S",
                "theory and simulation", "or set linear = True if its update is linear",
            )  # fmt: skip
        return self._on_quadratic(x, start=0, label=1)

    def b(self, x):
        """The filter on the starting point, shape batch_shape + x.shape; 1 - x q(x)."""
        if not self.linear:
            return 1 - jnp.asarray(x) * self.q(x)
        return self._on_quadratic(x, start=1, label=0)

    def _on_quadratic(self, x, start, label):
        """theta after the updates on x theta^2/2 - label theta, for every x side by side."""
        x = jnp.asarray(x, jnp.result_type(float, x, *jax.tree.leaves(self)))
        first = jnp.full(self.batch_shape + x.shape, start, x.dtype)
        # A schedule keeps its step axis in front, behind it everything has the shape of `first`.
        wide = jax.tree.map(lambda leaf: outer(leaf, x)[0], self)
        return run(wide, lambda theta: x * theta - label, first)[0]

    @property
    def one_step(self):
        """The value of q(x) at every x if it is the same for all (one gradient step), else None.

        The meta-system is then linear in it, and a whole grid of rates costs one pass over data.
        """
        return None

    @property
    def degree(self) -> int | None:
        """The degree of b as a polynomial in x; None where it is none."""
        return None

    @property
    def entire(self) -> bool:
        """Whether b is as smooth as a polynomial, with no pole at any x; few nodes integrate it."""
        return self.degree is not None

    @property
    def metric(self):
        """None, or P, (p,) or (p, p) and symmetric, of a rule that acts through P S."""
        return None

    @property
    def pencil(self) -> Pencil:
        """The rule as a linear pencil in S, which the theory needs for inputs with a covariance.

        Rules with `linear = True` have one by their updates.
        """
        if not self.linear:
            raise _lacks(
                self, "pencil, a form that is linear in S",
                "the theory for problems with covariances",
                "see negmaml.rules.pencil, or use simulate",
            )  # fmt: skip
        return pencil_of_updates(self)

    def filters(self, x) -> Filters:
        """b and q with their sizes kept apart, which theory needs where the filters overflow.

        Of a rule with q and b of its own these values; one with `linear = True` is run in units
        that follow it.
        """
        if self.linear and type(self).q is Rule.q:
            return filters_of_updates(self, x)
        return filters_of_values(self.b(x), self.q(x))

    def pencil_on(self, largest):
        """A pencil for spectra up to `largest`, off by `pencil_error`; exact where there is one."""
        return self.pencil

    def pencil_error(self, largest) -> float:
        """The largest error of b that `pencil_on` makes on (0, largest), over the largest b."""
        return 0.0

    def crossing(self, x):
        """A function of x with a simple zero wherever b has one, of whatever order."""
        return self.filters(x).sign

    def pole(self, x):
        """A function of x with a simple zero wherever b has a pole; None of a rule without any."""
        return None

    @property
    def growth(self):
        """g of a rule with |b(x)| like exp(g x) at large x; zero of polynomials and fractions."""
        return 0.0

    def search_range(self, largest):
        """(smallest, largest) size of the tuned parameter to try on a spectrum up to `largest`."""
        return 1e-2 / largest, 1e4 / largest

    def with_tuned(self, value):
        """The same rule with another value of the tuned parameter."""
        return dataclasses.replace(self, **{self.tuned: value})  # type: ignore[type-var]

    # On any model.

    @property
    def moves_any_model(self) -> bool:
        """Whether it has an `update`, or a `solve` of its own."""
        own = type(self)
        return own.update is not Rule.update or own.solve is not Rule.solve

    def check(self, params) -> None:
        """Raise ValueError where the numbers of the rule do not fit the parameters."""

    def check_meta(self) -> None:
        """Raise ValueError where no model can be meta-trained with the numbers of the rule."""

    def init(self, params) -> Any:
        """The state before the first update."""
        return ()

    def update(self, gradient, state, params) -> tuple[Any, Any]:
        """(parameters, state) after one step; all are pytrees like the parameters that adapt."""
        raise _lacks(
            self, "update(self, gradient, state, params)", "adapting a general model",
            "it returns (params, state); with theory and simulate a rule acts by its filters",
        )  # fmt: skip

    def solve(self, loss, start, *, remat: bool = False):
        """The adapted parameters, from `start`, for a loss of the parameters only.

        A rule that solves a problem returns `negmaml.rules.Solution(params, info)`, which says
        whether it converged; parameters by themselves count as converged.
        """
        return run(self, jax.grad(loss), start, remat)[0]

    def solve_and_pull_back(self, loss, start, frozen) -> tuple[Solution, Callable]:
        """(solution for loss(theta, frozen), pull), for meta-gradients of rules that solve.

        `pull` takes the cotangent of the adapted parameters and returns those of `start` and of
        `frozen`, and whether they are accurate.
        """

        def solved(start, frozen):
            return as_solution(self.solve(lambda theta: loss(theta, frozen), start), self.steps)

        params, pull, info = jax.vjp(solved, start, frozen, has_aux=True)
        return Solution(params, info), lambda cotangent: (*pull(cotangent), True)

    @property
    def smooth_at_zero(self) -> bool:
        """Whether `update` has a derivative where one entry of the gradient is zero."""
        return True

    @property
    def plain_rate(self):
        """r of a rule whose step is params - r gradient and nothing else; None for others."""
        return None


def _lacks(rule: Rule, what: str, use: str, more: str) -> TypeError:
    name = type(rule).__name__
    return TypeError(f"rule {name} has no {what}, which {use} needs; define it, {more}")


def flat_batch(rule: Rule) -> Rule:
    """The rule with one leading axis for its whole batch, in every leaf, for vmap."""
    shape = rule.batch_shape

    def flat(part):
        if not is_schedule(part):
            return jnp.broadcast_to(jnp.asarray(part), shape).ravel()
        values = jnp.asarray(part.values)
        steps, own = values.shape[0], values.shape[1:]
        aligned = values.reshape(steps, *(1,) * (len(shape) - len(own)), *own)
        full = jnp.broadcast_to(aligned, (steps, *shape)).reshape(steps, -1)
        return jax.tree.map(lambda _: full.T, part)

    return jax.tree.map(flat, rule, is_leaf=is_schedule)


def check_filters(name: str, rule) -> Any:
    """The rule, lists of numbers as arrays, if its numbers have a meaning on the linear model.

    Raises otherwise. There a list is a batch of rates; on a general model it is a pytree, like
    parameters in a list.
    """
    structure: Any
    parts, structure = jax.tree.flatten(check_rule(name, rule), is_leaf=lambda x: x is not rule)
    if parts and parts[0] is not rule:
        rule = structure.unflatten([as_array(name, part) for part in parts])
    rule.batch_shape  # noqa: B018  one array a parameter, or a clear error
    rule.metric  # noqa: B018  symmetric, or a clear error
    return rule


def check_scalar_rule(name: str, rule) -> Any:
    """The rule, if it has one number for every parameter on the linear model; raises otherwise."""
    rule = check_filters(name, rule)
    if rule.batch_shape != ():
        raise ValueError(
            f"{name} must have one scalar parameter, got {shown(rule)}; call it for each, or "
            "jax.vmap over rules"
        )
    return rule


def check_rule(name: str, rule) -> Any:
    """`rule`, or a TypeError that names the argument."""
    if not isinstance(rule, Rule):
        number = f"; for a rate write GradientDescent({rule!r}) " if np.isscalar(rule) else " "
        raise TypeError(
            f"{name} must be an inner rule such as GradientDescent(-0.2), got {shown(rule)}{number}"
            "(a rule of your own derives from negmaml.Rule)"
        )
    return rule
