r"""Spectral filters: how a rule acts on a linear model, with its sizes kept apart from overflow.

On a linear model with S = X^T X / n a rule that is linear in the weights and the labels is

    theta = init_filter(S) omega + label_filter(S) X^T y / n,
    init_filter(x) = 1 - x label_filter(x)

at every eigenvalue x of S. Steps of gradient descent at `rate` have the init filter
(1 - rate x)^steps, the gradient flow exp(-time x), the proximal rule strength / (x + strength).

At ordinary rates and times these leave the range of floating point as soon as an eigenvalue is
large. The theory needs ratios of filters at different x, which do not. Hence `Filter.log_form`.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import namespace, outer, stop_gradient
from negmaml._core.jit import is_concrete
from negmaml._core.pytree import pytree, static
from negmaml._core.types import ArrayLike, ScalarLike
from negmaml.rules.pencil import Pencil, chain, pencil_of_updates
from negmaml.rules.unroll import each_step, run


class UndefinedMethodError(TypeError):
    """A feature needs a method that the rule or its filter does not define; says what to add.

    >>> import negmaml as nm
    >>> try:
    ...     nm.adapt(lambda w, data: w**2, 1.0, None, nm.GradientFlow(0.5))
    ... except nm.rules.UndefinedMethodError as error:
    ...     print(error)  # doctest: +ELLIPSIS
    rule GradientFlow has no update(self, gradient, state, params), ...
    """


class LogForm(NamedTuple):
    """Filter values whose sizes are logarithms, each of shape batch_shape + x.shape.

        init_filter = sign exp(log_init),    label_filter = label exp(scale)

    A scale of None is zero everywhere.
    """

    sign: Any
    log_init: Any
    label: Any
    scale: Any


class Filter(ABC):
    r"""The two filters of a rule as functions of the eigenvalues x of S, and what integrals need.

    A rule returns its filter from `InnerRule.spectral`. A subclass defines `label_filter`; each of
    the other members has a default, which is right for a filter without zeros of higher order,
    poles or exponential growth. Results have the shape of the rule's batch followed by that of x.

    Attributes:
        constant_filter: label_filter(x) if it is the same for all x (one gradient step), else
            None. The meta-system is then linear in it: a grid of rates costs one pass over data.
        preconditioner: None, or P of shape (p,) or (p, p), symmetric, for a rule that acts
            through P S; x are then the eigenvalues of P S.
        degree: of init_filter if it is a polynomial in x, else None.
        entire: whether init_filter has no pole anywhere, so that few nodes integrate it.
        exponential_type: g if |init_filter(x)| grows as exp(g x) at large x; zero for polynomials
            and fractions.
        exact_pencil: whether `pencil` has exactly these filters.

    >>> import negmaml as nm
    >>> class Truncated(nm.rules.Filter):  # least squares along large eigenvalues
    ...     def label_filter(self, x):
    ...         return jnp.where(x > 0.5, 1 / jnp.maximum(x, 0.5), 0.0)
    >>> Truncated().init_filter(jnp.array([0.0, 2.0])).tolist()
    [1.0, 0.0]
    """

    exact_pencil: ClassVar[bool] = True
    preconditioner: Any = None

    @property
    def constant_filter(self) -> Any:
        """The value of label_filter if it is the same for all x, else None."""
        return None

    @property
    def degree(self) -> int | None:
        """The degree of init_filter if it is a polynomial in x, else None."""
        return None

    @property
    def entire(self) -> bool:
        """True if init_filter has no pole anywhere."""
        return self.degree is not None

    @property
    def exponential_type(self) -> Any:
        """The g for which |init_filter(x)| grows as exp(g x) at large x."""
        return 0.0

    @property
    def gradient_rate(self) -> Any:
        """The rate of one plain gradient step if the rule is one, else None."""
        return self.constant_filter if self.preconditioner is None else None

    @abstractmethod
    def label_filter(self, x: ArrayLike) -> Any:
        """The factor of X^T y / n at an eigenvalue x of S."""

    def init_filter(self, x: ArrayLike) -> Any:
        """The factor of the starting point omega at an eigenvalue x of S."""
        return 1 - jnp.asarray(x) * self.label_filter(x)

    def log_form(self, x: ArrayLike) -> LogForm:
        """Both filters with their sizes kept apart, for values beyond the range of floats."""
        return log_form_of_values(self.init_filter(x), self.label_filter(x))

    def zero_indicator(self, x: ArrayLike) -> Any:
        """A function with a simple zero wherever init_filter has a zero of any order."""
        return self.log_form(x).sign

    def pole_indicator(self, x: ArrayLike) -> Any:
        """A function with a simple zero wherever init_filter has a pole; None if it has no pole."""
        return None

    def pencil(self, largest: ScalarLike) -> Pencil:
        """A linear pencil of the rule, for inputs with a covariance and spectra up to `largest`."""
        raise undefined(type(self).__name__, *PENCIL)

    def pencil_error(self, largest: ScalarLike) -> Any:
        """The largest error of the pencil's init_filter on (0, largest), over its largest value."""
        return 0.0


PENCIL = (
    "pencil(self, largest), a form that is linear in S", "the theory for problems with covariances",
    "define it in a Filter that spectral() returns, see negmaml.rules.pencil, or use simulate",
)  # fmt: skip


def undefined(name: str, what: str, use: str, remedy: str) -> UndefinedMethodError:
    """The error for a rule or filter called `name` that has no method `what`."""
    return UndefinedMethodError(f"rule {name} has no {what}, required by {use}; {remedy}")


@pytree
class RuleFilter(Filter):
    """The filter of a rule that defines `label_filter`, and maybe `init_filter`, itself."""

    rule: Any

    def label_filter(self, x):
        return self.rule.label_filter(x)

    def init_filter(self, x):
        return self.rule.init_filter(x)

    def pencil(self, largest) -> Pencil:
        raise undefined(type(self.rule).__name__, *PENCIL)


@pytree
class PowerFilter(Filter):
    r"""The filter of gradient descent at one rate: init_filter(x) = (1 - rate x)^steps.

        label_filter(x) = rate sum_{k < steps} (1 - rate x)^k        (= rate for one step)

    rate: any shape, the batch. steps: static.
    """

    rate: Any
    steps: int = static()
    preconditioner: Any = None

    @property
    def constant_filter(self):
        return self.rate if self.steps == 1 else None

    @property
    def degree(self) -> int:
        return self.steps

    def label_filter(self, x):
        rate, x = outer(self.rate, x)
        return rate * _geometric_sum(1 - rate * x, self.steps)

    def init_filter(self, x):
        rate, x = outer(self.rate, x)
        return (1 - rate * x) ** self.steps

    def log_form(self, x) -> LogForm:
        """In units of |1 - rate x|^steps wherever that is above one."""
        rate, x = outer(self.rate, x)
        ratio = 1 - rate * x
        xp, count = namespace(ratio), self.steps
        # One step needs no unit: label_filter is the rate itself.
        if count == 1:
            return LogForm(xp.sign(ratio), log_size(ratio), rate * xp.ones_like(ratio), None)
        # |ratio|^steps may overflow, so powers are taken of ratio / unit. The unit is a constant of
        # differentiation, since the result does not depend on it.
        unit = stop_gradient(xp.maximum(xp.abs(ratio), 1.0))
        label = rate * _scaled_sum(ratio / unit, 1 / unit, count)
        sign = xp.sign(ratio) ** count
        return LogForm(sign, count * log_size(ratio), label, count * xp.log(unit))

    def zero_indicator(self, x):
        """1 - rate x, since an even power of it does not change its sign."""
        rate, x = outer(self.rate, x)
        return 1 - rate * x

    def pencil(self, largest) -> Pencil:
        # Each step mixes only its own gradient: the mixing is diagonal.
        rate = jnp.asarray(self.rate, jnp.result_type(float, self.rate))
        return chain(rate * jnp.eye(self.steps, dtype=rate.dtype))


@pytree
class PolynomialFilter(Filter):
    r"""The filter of any rule whose update is linear in parameters and gradient, by running it.

    On x theta^2 / 2 - y theta the updates end at init_filter(x) for theta = 1, y = 0, and at
    label_filter(x) for theta = 0, y = 1: two polynomials in x, the first of degree `rule.steps`.

    Arguments:
        rule: the rule, whose updates are linear.
        preconditioner: None, or P as in `Filter`, if the updates act through P S.

    >>> import negmaml as nm
    >>> found = nm.rules.PolynomialFilter(nm.Momentum(0.5, momentum=0.0, steps=2))
    >>> float(found.init_filter(0.5))  # (1 - 0.5 x)^2
    0.5625
    """

    rule: Any
    preconditioner: Any = None

    @property
    def degree(self) -> int:
        return self.rule.steps

    def label_filter(self, x: ArrayLike) -> Any:
        return self._run(x, start=0, label=1)

    def init_filter(self, x: ArrayLike) -> Any:
        return self._run(x, start=1, label=0)

    def at_rest(self) -> Any:
        """theta after the updates from 1 at zero gradients: init_filter(x) + x label_filter(x).

        On x (theta - 1)^2 / 2 the gradient at 1 is zero for every x. Steps are unrolled, so that
        known numbers need no program.
        """
        theta = jnp.ones(self.rule.batch_shape)

        def step(one_step, carry):
            theta, state = carry
            return one_step.update(jnp.zeros_like(theta), state, theta)

        return each_step(self.rule, step, (theta, self.rule.init(theta)), unrolled=True)[0]

    def _run(self, x, start, label):
        """theta after the updates from `start`, at every x at once."""
        x = jnp.asarray(x, jnp.result_type(float, x, *jax.tree.leaves(self.rule)))
        first = jnp.full(self.rule.batch_shape + x.shape, start, x.dtype)
        # A schedule keeps its step axis in front, behind it everything has the shape of `first`.
        wide = jax.tree.map(lambda leaf: outer(leaf, x)[0], self.rule)
        return run(wide, lambda theta: x * theta - label, first)[0]

    def log_form(self, x: ArrayLike) -> LogForm:
        """By running the updates in units that follow the parameters.

        Known numbers keep their own precision, whatever JAX's default, and become NumPy arrays.
        """
        if not is_concrete((self.rule, x)):
            return self._log_form(x)
        numbers = jax.tree.leaves((self.rule, x))
        single = all(np.result_type(leaf) == np.float32 for leaf in numbers)
        # Evaluated eagerly even inside a trace, so that the values stay known to NumPy.
        with jax.ensure_compile_time_eval(), jax.enable_x64(not single):
            return jax.tree.map(np.asarray, self._log_form(x))

    def _log_form(self, x) -> LogForm:
        b, log_unit = _run_scaled(self.rule, x, start=1.0, label=0.0)
        q, scale = _run_scaled(self.rule, x, start=0.0, label=1.0)
        return LogForm(jnp.sign(b), log_size(b) + log_unit, q, scale)

    def pencil(self, largest: ScalarLike) -> Pencil:
        return pencil_of_updates(self.rule)


def log_size(value):
    """log |value|, minus infinity at zero, with the derivative zero there."""
    xp = namespace(value)
    zero = value == 0
    # Clipping keeps the derivative finite where the value overflowed.
    largest = xp.finfo(value.dtype).max
    return xp.where(zero, -xp.inf, xp.log(xp.minimum(xp.abs(xp.where(zero, 1.0, value)), largest)))


def log_form_of_values(init, label) -> LogForm:
    """The log form of two arrays of values; infinity counts as the largest number."""
    xp = namespace(init, label)
    init, label = xp.asarray(init), xp.asarray(label)
    largest = xp.finfo(label.dtype).max
    return LogForm(xp.sign(init), log_size(init), xp.clip(label, -largest, largest), None)


def _run_scaled(rule, x, start: float, label: float):
    """theta after the updates, in units that follow it, and the logarithm of the last unit.

    Parameters, the arrays of their shape in the state, and the label are divided by one unit after
    every step. The result of a linear rule is then divided by the product of these units.
    """
    x = jnp.asarray(x, jnp.result_type(float, x, *jax.tree.leaves(rule)))
    theta = jnp.full(rule.batch_shape + x.shape, start, x.dtype)
    # A schedule keeps its step axis in front, behind it everything has the shape of `theta`.
    wide = jax.tree.map(lambda leaf: outer(leaf, x)[0], rule)

    def scales(leaf):
        same_shape = jnp.shape(leaf) == theta.shape
        return same_shape and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)

    def step(one_step, carry):
        theta, state, label, log_unit = carry
        theta, state = one_step.update(x * theta - label, state, theta)
        # The largest of all numbers that one step maps linearly.
        unit = label
        for leaf in (theta, *filter(scales, jax.tree.leaves(state))):
            unit = jnp.maximum(unit, jnp.abs(leaf))
        unit = stop_gradient(jnp.where(unit > 0, unit, 1.0))
        state = jax.tree.map(lambda leaf: leaf / unit if scales(leaf) else leaf, state)
        return theta / unit, state, label / unit, log_unit + jnp.log(unit)

    first = theta, wide.init(theta), jnp.full_like(theta, label), jnp.zeros_like(theta)
    theta, _, _, log_unit = each_step(wide, step, first, unrolled=is_concrete((rule, x)))
    return theta, log_unit


def _scaled_sum(ratio, unit, count: int):
    """S(count) = unit^count sum_{k < count} (ratio/unit)^k, with steps as in `_geometric_sum`.

    S(2n) = S(n) (unit^n + ratio^n) and S(n + 1) = unit^(n + 1) + ratio S(n).
    """
    if count == 1:
        return unit * namespace(ratio).ones_like(ratio)
    # Doubling takes O(log count) products and adds only terms of one size.
    half = count // 2
    total = _scaled_sum(ratio, unit, half) * (unit**half + ratio**half)
    return unit ** (2 * half + 1) + ratio * total if count % 2 else total


def _geometric_sum(ratio, count: int):
    """sum_{k < count} ratio^k in O(log count) products, stable at ratio = 1.

    With S(n) the sum: S(2n) = S(n) (1 + ratio^n) and S(n + 1) = 1 + ratio S(n).
    """
    if count == 1:
        return namespace(ratio).ones_like(ratio)
    # The closed form (1 - ratio^n) / (1 - ratio) would cancel near ratio = 1.
    half = _geometric_sum(ratio, count // 2) * (1 + ratio ** (count // 2))
    return 1 + ratio * half if count % 2 else half
