r"""Rules that step along the gradient: plain, with momentum or with a preconditioner.

All are linear in parameters and gradient, so on the linear model their filters are polynomials.
"""

import dataclasses
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import contract
from negmaml._core.checks import check_count, check_finite, check_flag
from negmaml._core.pytree import pytree, static
from negmaml._core.types import PyTree, Rate
from negmaml.rules.base import InnerRule
from negmaml.rules.filters import Filter, PolynomialFilter, PowerFilter
from negmaml.rules.schedule import is_schedule


class _Descent(InnerRule):
    """`steps` steps at `rate`, the common part of the rules of this module."""

    rate: Rate
    linear: ClassVar[bool] = True

    def check(self, params: PyTree) -> None:
        check_fit("rate", self.rate, params)


@final
@pytree
class GradientDescent(_Descent):
    r"""`steps` steps of gradient descent at `rate`: init_filter(x) = (1 - rate x)^steps.

        label_filter(x) = rate sum_{k < steps} (1 - rate x)^k        (= rate for one step)

    Arguments:
        rate: learning rate of any sign, traced, so a new value does not recompile. On the linear
            model an array of any shape, or a list, is a batch of rates that share their data. On a
            general model a number, or a pytree like the parameters or a prefix of it, of numbers or
            of arrays that broadcast to their leaf. In either, a `Schedule` has a value for each
            step.
        steps: number of steps, a static integer of at least 1.

    Raises ValueError or TypeError for a NaN, infinite or non-real rate and for steps < 1.

    >>> import negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> adapted = nm.adapt(square, 0.0, 1.0, nm.GradientDescent(0.5, steps=2))
    >>> round(float(adapted), 6)  # 1 - (1 - 0.5)^2
    0.75
    >>> nm.GradientDescent(0.5, steps=2).init_filter(jnp.array([0.0, 1.0])).tolist()
    [1.0, 0.25]
    """

    rate: Rate
    steps: int = static(default=1)

    def __init__(self, rate: Rate, steps: int = 1) -> None:
        object.__setattr__(self, "rate", check_finite("rate", rate, "an inner learning rate"))
        object.__setattr__(self, "steps", check_count("steps", steps))

    def spectral(self) -> Filter:
        # Rates that differ have no closed form.
        if is_schedule(self.rate) and self.steps > 1:
            return PolynomialFilter(self)
        return PowerFilter(_first_value(self.rate), self.steps)

    def update(self, gradient: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        """params - rate gradient, in the type of each parameter."""
        return descend(self.rate, gradient, params), state


@final
@pytree
class Momentum(_Descent):
    r"""Gradient descent with momentum: heavy ball (Polyak 1964), or Nesterov's (1983).

        v_{k+1} = momentum v_k + g_k,     theta_{k+1} = theta_k - rate v_{k+1}
                                          theta_{k+1} = theta_k - rate (g_k + momentum v_{k+1})

    from v_0 = 0, with g_k the gradient at theta_k. The last line is Nesterov's form, and both agree
    with `optax.sgd`.

    Arguments:
        rate, steps: as in `GradientDescent`.
        momentum: of any sign, in the forms a rate may have.
        nesterov: whether to take Nesterov's form, static.

    On the linear model the init filter is a polynomial of degree `steps`. Raises the errors of
    `GradientDescent`.

    >>> import negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> rule = nm.Momentum(0.5, momentum=-0.2, steps=2)
    >>> round(float(nm.adapt(square, 0.0, 1.0, rule)), 6)  # 0.5 + 0.5 (0.5 - 0.2)
    0.65
    """

    rate: Rate
    momentum: Rate
    steps: int = static()
    nesterov: bool = static(default=False)

    def __post_init__(self) -> None:
        for name in ("rate", "momentum"):
            number = check_finite(name, getattr(self, name), "a number of any sign")
            object.__setattr__(self, name, number)
        object.__setattr__(self, "steps", check_count("steps", self.steps))
        object.__setattr__(self, "nesterov", check_flag("nesterov", self.nesterov))

    def check(self, params: PyTree) -> None:
        super().check(params)
        check_fit("momentum", self.momentum, params)

    def spectral(self) -> Filter:
        if self.steps > 1:
            return PolynomialFilter(self)
        # One step from zero velocity moves by rate g, or by rate (1 + momentum) g for Nesterov's.
        rate, momentum = (jnp.asarray(_first_value(x)) for x in (self.rate, self.momentum))
        ones = jnp.ones_like(momentum)  # for the shape of a batch
        return PowerFilter(rate * (ones + momentum if self.nesterov else ones), 1)

    def init(self, params: PyTree) -> PyTree:
        """No velocity."""
        return jax.tree.map(jnp.zeros_like, params)

    def update(self, gradient: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        """(parameters, velocity) after one step."""
        # Nesterov's form looks ahead along the new velocity.
        velocity = add_scaled(gradient, self.momentum, state)
        ahead = add_scaled(gradient, self.momentum, velocity) if self.nesterov else velocity
        return descend(self.rate, ahead, params), velocity


@final
@pytree
class Preconditioned(_Descent):
    r"""Gradient descent along P times the gradient: theta_{k+1} = theta_k - rate P g_k.

    Arguments:
        rate, steps: as in `GradientDescent`.
        preconditioner: P. On the linear model (p,), a diagonal, or (p, p), symmetric. On a general
            model a pytree like the parameters or a prefix of it, of numbers, of arrays that
            broadcast to their leaf (a diagonal), or of square matrices with a row for each
            element of their leaf. Its meta-gradient is that of a learned preconditioner.

    On the linear model it is a change of variables: with P = R R and theta = R phi, plain descent
    on phi has inputs R x. The filters act on the eigenvalues of R S R, which are those of P S.
    Raises the errors of `GradientDescent`.

    >>> import negmaml as nm
    >>> square = lambda w, target: jnp.sum((w - target) ** 2) / 2
    >>> rule = nm.Preconditioned(0.5, jnp.array([1.0, 2.0]))
    >>> nm.adapt(square, jnp.zeros(2), jnp.ones(2), rule).tolist()
    [0.5, 1.0]
    """

    rate: Rate
    preconditioner: Any
    steps: int = static(default=1)

    def __post_init__(self) -> None:
        for name in ("rate", "preconditioner"):
            number = check_finite(name, getattr(self, name), "a number of any sign")
            object.__setattr__(self, name, number)
        object.__setattr__(self, "steps", check_count("steps", self.steps))

    def check(self, params: PyTree) -> None:
        super().check(params)
        check_fit("preconditioner", self.preconditioner, params, matrices=True)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The shape of the rate: the preconditioner is the same for the whole batch."""
        return GradientDescent(self.rate, self.steps).batch_shape

    def spectral(self) -> Filter:
        P = self.preconditioner
        if np.ndim(P) == 2 and not isinstance(P, jax.core.Tracer) and not np.allclose(P, P.T):
            raise ValueError(f"preconditioner must be symmetric on the linear model, got {P!r}")
        # In the coordinates phi it is plain descent, so the filters are the same functions.
        plain: Any = GradientDescent(self.rate, self.steps).spectral()
        return dataclasses.replace(plain, preconditioner=P)

    def update(self, gradient: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        """params - rate P gradient."""

        def precondition(P, part):
            return jax.tree.map(lambda g: _times(P, g), part)

        ahead = jax.tree.map(precondition, self.preconditioner, gradient)
        return descend(self.rate, ahead, params), state


def descend(rates, direction, params):
    """params - rates * direction in the type of each parameter; rates may be a prefix."""

    # A rate may be one number for a subtree; its dtype must not promote the parameters.
    def move(rate, part, along):
        return jax.tree.map(
            lambda t, d: (t - jnp.asarray(rate, t.dtype) * d).astype(t.dtype), part, along
        )

    return jax.tree.map(move, rates, params, direction)


def add_scaled(first, scale, second):
    """first + scale * second in the type of each leaf; the scale may be a prefix."""

    def add(s, x, y):
        return jax.tree.map(lambda a, b: (a + jnp.asarray(s, a.dtype) * b).astype(a.dtype), x, y)

    return jax.tree.map(add, scale, first, second)


def _times(P, g):
    """P g for a matrix over the elements of g, or a diagonal."""
    # A matrix mixes the elements of its leaf, so they are one vector.
    if _is_matrix(P, g):
        return contract("ij,j->i", jnp.asarray(P, g.dtype), g.ravel()).reshape(g.shape)
    return jnp.asarray(P, g.dtype) * g


def _is_matrix(P, leaf) -> bool:
    return np.shape(P) == (np.size(leaf),) * 2 and np.shape(P) != np.shape(leaf)


def check_fit(name: str, numbers, params, matrices: bool = False) -> None:
    """Raise ValueError unless `numbers` is a prefix of the parameters with entries that fit.

    An entry is a number, for all leaves below it, or an array that broadcasts to its one leaf. A
    `Schedule` of either has one more axis. matrices: whether an entry may be a square matrix.
    """

    def fits(entry, part):
        shape = np.shape(entry.values)[1:] if is_schedule(entry) else np.shape(entry)
        if shape == () or part is None:
            return
        is_leaf = jax.tree_util.all_leaves([part])
        if is_leaf and (
            _broadcasts(shape, np.shape(part)) or (matrices and _is_matrix(entry, part))
        ):
            return
        raise ValueError(
            f"{name} must be a number, or an array that broadcasts to its leaf, got shape {shape} "
            f"for {_shapes(part)}; for a value a step wrap it, Schedule(values), and for a batch "
            "of rules use jax.vmap"
        )

    prefix: Any
    entries, prefix = jax.tree.flatten(numbers, is_leaf=is_schedule)
    try:
        parts = prefix.flatten_up_to(params)
    except (ValueError, TypeError, KeyError) as mismatch:
        raise ValueError(
            f"{name} must be a number, or a pytree like the parameters or a prefix of it "
            f"({jax.tree.structure(params)}), got {prefix}"
        ) from mismatch
    for entry, part in zip(entries, parts, strict=True):
        fits(entry, part)


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    # Broadcasting aligns the last axes; axes may not be added to the parameter.
    kept = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(r in (1, t) for r, t in kept)


def _shapes(part) -> str:
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(part)]
    return f"a parameter of shape {shapes[0]}" if len(shapes) == 1 else f"parameters {shapes}"


def _first_value(number):
    """The number that the first step uses."""
    return number.values[0] if is_schedule(number) else number
