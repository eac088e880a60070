r"""A support that differs from one inner step to the next."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.checks import check_count, check_optional
from negmaml._core.pytree import pytree, static
from negmaml._core.types import Array, PyTree
from negmaml.meta.batching import leading_axis
from negmaml.rules import InnerRule
from negmaml.rules.unroll import ByStep


@pytree
class Minibatches:
    r"""A support of which each inner step takes other rows, in their order and around again.

        rows of step k:   (k size + 0, ..., k size + size - 1) mod n        for a `size`
        data of step k:   entry k mod n of every leaf                       without

    Pass it as the support of `adapt`, or of `Tasks`, whose task axis comes before the rows. Every
    algorithm and `evaluate` take it. The rows are taken as they are; shuffle them where tasks are
    drawn, so that each meta-step takes them in another order.

    Arguments:
        data: a pytree whose leaves lead with n rows. Without `size` n is the number of minibatches.
        size: number of rows of a minibatch, static.

    Raises ValueError where it is used for leaves of different n, and for a `size` above n. Raises
    TypeError for rules with a `solve` of their own, which take no steps.

    >>> import negmaml as nm
    >>> square = lambda w, x: (w - x[0]) ** 2 / 2
    >>> rule = nm.GradientDescent(0.5, steps=3)  # targets 4, 8 and 4 again
    >>> float(nm.adapt(square, 0.0, Minibatches(jnp.array([4.0, 8.0]), size=1), rule))
    4.5
    """

    data: Any
    size: int | None = static(default=None)

    def __post_init__(self) -> None:
        if isinstance(self.data, Minibatches):
            raise TypeError("data must be the rows of a support, got Minibatches")
        object.__setattr__(self, "size", check_optional(check_count, "size", self.size))

    def at(self, k: int | Array) -> PyTree:
        """The data of step k."""
        rows = leading_axis("the support in Minibatches", self.data)
        size = self.size
        if size is None:
            return jax.tree.map(lambda x: jnp.asarray(x)[k % rows], self.data)
        if size > rows:
            raise ValueError(
                f"size of Minibatches must be at most the number of rows, {rows}, got {size}"
            )
        start = k % rows * size % rows
        if rows % size == 0:  # a slice costs less than a gather
            return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), self.data)
        places = (start + jnp.arange(size)) % rows
        return jax.tree.map(lambda x: jnp.asarray(x)[places], self.data)


def at_step(support, k):
    """Return the data of step k of a support."""
    return support.at(k) if isinstance(support, Minibatches) else support


def on_support(function: Callable, support) -> Any:
    """Return function(point, data) as a gradient for `run`, with the data of each step."""
    if isinstance(support, Minibatches):
        return ByStep(lambda point, k: function(point, support.at(k)))
    return lambda point: function(point, support)


def check_whole(support, rule: InnerRule) -> None:
    """Raise TypeError for minibatches with a rule that solves its inner problem."""
    if isinstance(support, Minibatches):
        raise TypeError(
            "Minibatches need a rule that takes steps, got the rule "
            f"{rule!r}; pass the data as they are"
        )
