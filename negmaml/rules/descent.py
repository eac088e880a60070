r"""Rules that step along the gradient: plain, with momentum, preconditioned.

All are linear in parameters and gradient, so on the linear model their filters are polynomials.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import contract, frozen, namespace, outer
from negmaml._core.checks import check_count, check_finite, check_flag
from negmaml._core.pytree import pytree, static
from negmaml.rules.base import Rule
from negmaml.rules.log_filters import Filters, filters_of_updates, log_size
from negmaml.rules.schedule import Schedule, is_schedule


class _Descent(Rule):
    """What the rules of this module share: `steps` steps at `rate`."""

    rate: Any
    linear: ClassVar[bool] = True

    def check(self, params) -> None:
        check_fit("rate", self.rate, params)

    @property
    def degree(self) -> int | None:
        return self.steps


@pytree
class GradientDescent(_Descent):
    r"""`steps` steps of gradient descent at `rate`: b(x) = (1 - rate x)^steps.

        q(x) = rate sum_{k < steps} (1 - rate x)^k        (= rate for one step)

    Arguments:
        rate: learning rate of any sign, traced, so a new value does not recompile. On the linear
            model an array of any shape, or a list, is a batch of rates that share their data. On a
            general model a number, or a pytree like the parameters or a prefix of it, of numbers or
            of arrays that broadcast to their leaf. In either, a `Schedule` has a value for each
            step.
        steps: number of steps, a static integer of at least 1.

    Raises ValueError or TypeError for a NaN, infinite or non-real rate and for steps < 1.
    """

    rate: Any
    steps: int = static(default=1)

    def __init__(self, rate: Any, steps: int = 1):
        object.__setattr__(self, "rate", check_finite("rate", rate, "an inner learning rate"))
        object.__setattr__(self, "steps", check_count("steps", steps))

    def q(self, x):
        """The filter on the labels, shape batch_shape + x.shape."""
        if is_schedule(self.rate):
            return super().q(x)
        rate, x = outer(self.rate, x)
        return rate * _geometric_sum(1 - rate * x, self.steps)

    def b(self, x):
        """The filter on the starting point, shape batch_shape + x.shape."""
        if is_schedule(self.rate):
            return super().b(x)
        rate, x = outer(self.rate, x)
        return (1 - rate * x) ** self.steps

    def filters(self, x) -> Filters:
        """As for every rule, in units of |1 - rate x|^steps where that is above one."""
        if is_schedule(self.rate):
            return filters_of_updates(self, x)
        if (type(self).q, type(self).b) != (GradientDescent.q, GradientDescent.b):
            return super().filters(x)
        rate, x = outer(self.rate, x)
        ratio = 1 - rate * x
        xp, count = namespace(ratio), self.steps
        if count == 1:
            return Filters(xp.sign(ratio), log_size(ratio), rate * xp.ones_like(ratio), None)
        unit = frozen(xp.maximum(xp.abs(ratio), 1.0))
        label = rate * _scaled_sum(ratio / unit, 1 / unit, count)
        sign = xp.sign(ratio) ** count
        return Filters(sign, count * log_size(ratio), label, count * xp.log(unit))

    def crossing(self, x):
        """1 - rate x: a power of it changes no sign where the power is even."""
        if is_schedule(self.rate):
            return super().crossing(x)
        rate, x = outer(self.rate, x)
        return 1 - rate * x

    @property
    def one_step(self):
        """The rate, if there is one step."""
        return _only(self.rate) if self.steps == 1 else None

    @property
    def plain_rate(self):
        """The rate, as long as a subclass has not changed the step."""
        return self.rate if type(self).update is GradientDescent.update else None

    def update(self, gradient, state, params):
        """params - rate gradient, in the type of each parameter."""
        return descend(self.rate, gradient, params), state


@pytree
class Momentum(_Descent):
    r"""Gradient descent with momentum: heavy ball (Polyak 1964), or Nesterov's (1983).

        v_{k+1} = momentum v_k + g_k,     theta_{k+1} = theta_k - rate v_{k+1}
                                          theta_{k+1} = theta_k - rate (g_k + momentum v_{k+1})

    from v_0 = 0, g_k the gradient at theta_k; the last line is Nesterov's. As `optax.sgd` has it.

    Arguments:
        rate, steps: as in `GradientDescent`.
        momentum: of any sign, in the forms a rate may have.
        nesterov: which of the two, static.

    On the linear model b is a polynomial of degree `steps`. Raises as `GradientDescent`.
    """

    rate: Any
    momentum: Any
    steps: int = static()
    nesterov: bool = static(default=False)

    def __post_init__(self):
        for name in ("rate", "momentum"):
            number = check_finite(name, getattr(self, name), "a number of any sign")
            object.__setattr__(self, name, number)
        object.__setattr__(self, "steps", check_count("steps", self.steps))
        object.__setattr__(self, "nesterov", check_flag("nesterov", self.nesterov))

    def check(self, params) -> None:
        super().check(params)
        check_fit("momentum", self.momentum, params)

    @property
    def one_step(self):
        """The rate of a single step, which Nesterov's enlarges by 1 + momentum."""
        if self.steps != 1:
            return None
        rate = jnp.asarray(_only(self.rate))
        one = jnp.ones_like(jnp.asarray(_only(self.momentum)))  # for the shape of a batch
        return rate * (one + _only(self.momentum) if self.nesterov else one)

    def init(self, params):
        """No velocity."""
        return jax.tree.map(jnp.zeros_like, params)

    def update(self, gradient, state, params):
        """(parameters, velocity) after one step."""
        velocity = add_scaled(gradient, self.momentum, state)
        ahead = add_scaled(gradient, self.momentum, velocity) if self.nesterov else velocity
        return descend(self.rate, ahead, params), velocity


@pytree
class Preconditioned(_Descent):
    r"""Gradient descent along P times the gradient: theta_{k+1} = theta_k - rate P g_k.

    Arguments:
        rate, steps: as in `GradientDescent`.
        preconditioner: P. On the linear model (p,), a diagonal, or (p, p), symmetric. On a general
            model a pytree like the parameters or a prefix of it, of numbers, of arrays that
            broadcast to their leaf (a diagonal), or of square matrices with a row for each
            element of their leaf. Its meta-gradient is that of a learned preconditioner.

    On the linear model it is a change of variables: with P = R R, theta = R phi descends plainly on
    inputs R x. It acts through P S, of the eigenvalues of R S R. Raises as `GradientDescent`.
    """

    rate: Any
    preconditioner: Any
    steps: int = static(default=1)

    def __post_init__(self):
        for name in ("rate", "preconditioner"):
            number = check_finite(name, getattr(self, name), "a number of any sign")
            object.__setattr__(self, name, number)
        object.__setattr__(self, "steps", check_count("steps", self.steps))

    def check(self, params) -> None:
        super().check(params)
        check_fit("preconditioner", self.preconditioner, params, matrices=True)

    @property
    def _plain(self) -> GradientDescent:
        return GradientDescent(self.rate, self.steps)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """That of the rate: the preconditioner is one for all."""
        return self._plain.batch_shape

    def q(self, x):
        """As for `GradientDescent`, on an eigenvalue of R S R."""
        return self._plain.q(x)

    def b(self, x):
        """As for `GradientDescent`, on an eigenvalue of R S R."""
        return self._plain.b(x)

    @property
    def one_step(self):
        """The rate, if there is one step."""
        return self._plain.one_step

    @property
    def metric(self):
        """P; raises ValueError for a matrix that is not symmetric."""
        P = self.preconditioner
        if np.ndim(P) == 2 and not isinstance(P, jax.core.Tracer) and not np.allclose(P, P.T):
            raise ValueError(f"preconditioner must be symmetric on the linear model, got {P!r}")
        return P

    def update(self, gradient, state, params):
        """params - rate P gradient."""

        def precondition(P, part):
            return jax.tree.map(lambda g: _times(P, g), part)

        ahead = jax.tree.map(precondition, self.preconditioner, gradient)
        return descend(self.rate, ahead, params), state


def descend(rates, direction, params):
    """params - rates * direction in the type of each parameter; rates may be a prefix."""

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
    if _is_matrix(P, g):
        return contract("ij,j->i", jnp.asarray(P, g.dtype), g.ravel()).reshape(g.shape)
    return jnp.asarray(P, g.dtype) * g


def _is_matrix(P, leaf) -> bool:
    return np.shape(P) == (np.size(leaf),) * 2 and np.shape(P) != np.shape(leaf)


def check_fit(name: str, numbers, params, matrices: bool = False) -> None:
    """Raise ValueError unless `numbers` is a prefix of the parameters with entries that fit.

    An entry is a number, for all leaves below it, or an array that broadcasts to its one leaf; a
    `Schedule` of either has one more axis.
    """

    def fits(entry, part):
        shape = np.shape(entry.values)[1:] if is_schedule(entry) else np.shape(entry)
        if shape == () or part is None:
            return
        alone = jax.tree_util.all_leaves([part])
        if alone and (_broadcasts(shape, np.shape(part)) or (matrices and _is_matrix(entry, part))):
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
    kept = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(r in (1, t) for r, t in kept)


def _shapes(part) -> str:
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(part)]
    return f"a parameter of shape {shapes[0]}" if len(shapes) == 1 else f"parameters {shapes}"


def _only(value):
    """The value of the only step."""
    return value.values[0] if isinstance(value, Schedule) else value


def _scaled_sum(ratio, unit, count: int):
    """S(count) = unit^count sum_{k < count} (ratio/unit)^k, with steps as in `_geometric_sum`.

    S(2n) = S(n) (unit^n + ratio^n) and S(n + 1) = unit^(n + 1) + ratio S(n).
    """
    if count == 1:
        return unit * namespace(ratio).ones_like(ratio)
    half = count // 2
    total = _scaled_sum(ratio, unit, half) * (unit**half + ratio**half)
    return unit ** (2 * half + 1) + ratio * total if count % 2 else total


def _geometric_sum(ratio, count: int):
    """sum_{k < count} ratio^k in O(log count) products, stable at ratio = 1.

    With S(n) the sum: S(2n) = S(n) (1 + ratio^n) and S(n + 1) = 1 + ratio S(n).
    """
    if count == 1:
        return namespace(ratio).ones_like(ratio)
    half = _geometric_sum(ratio, count // 2) * (1 + ratio ** (count // 2))
    return 1 + ratio * half if count % 2 else half
