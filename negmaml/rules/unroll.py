r"""The loop over the updates of a rule, with the numbers of each step.

Derivatives of K steps need the parameters before each of them. `Unroll` says which are stored: all,
or those before every segment of s steps, which are then taken again when the derivative reaches
them. With s = sqrt(K) about 2 sqrt(K) are held at once, for one more evaluation of each step.
Source: Griewank and Walther, "Evaluating Derivatives", SIAM 2008, chapter 12.
"""

from collections.abc import Callable
from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.checks import check_count, check_flag, check_optional
from negmaml.rules.schedule import combine, separate


class Unroll(NamedTuple):
    """How derivatives pass through the steps of a rule.

    Attributes:
        remat: whether reverse mode recomputes each step instead of storing its intermediate
            results.
        segment: number of steps in a segment, "sqrt" for the square root of their number; None to
            store the parameters before every step.
        truncate: number of last steps that are differentiated, all for None. To earlier steps the
            derivative is that of the identity in the start, and zero in everything else.
    """

    remat: bool = False
    segment: int | str | None = None
    truncate: int | None = None

    @property
    def stores_all(self) -> bool:
        """True if the parameters before every step are stored."""
        return self.segment is None and self.truncate is None

    def differentiated(self, steps: int) -> int:
        """The number of last steps, of all, that derivatives pass through."""
        return steps if self.truncate is None else min(self.truncate, steps)

    def segment_size(self, steps: int) -> int:
        """The number of steps in a segment, of `steps` that are differentiated."""
        if self.segment is None:
            return steps
        # The ceiling of the square root, with which the fewest parameters are stored at once.
        size = isqrt(steps - 1) + 1 if self.segment == "sqrt" else int(self.segment)
        return min(size, steps)

    def check_rule(self, rule) -> None:
        """Raise ValueError if the rule has no steps that this could apply to."""
        for name in ("segment", "truncate"):
            if getattr(self, name) is not None and rule.implicit:
                raise ValueError(
                    f"{name} must be None for a rule with a solve of its own, got "
                    f"{getattr(self, name)!r} for {rule!r}, whose derivative needs no steps"
                )


PLAIN = Unroll()


def check_unroll(remat, segment, truncate) -> Unroll:
    """Return the `Unroll` of these options of a user; raise if one is invalid."""
    if isinstance(segment, str) and segment != "sqrt":
        raise ValueError(f"segment must be a number of steps or 'sqrt', got {segment!r}")
    if segment != "sqrt":
        segment = check_optional(check_count, "segment", segment)
    truncate = check_optional(check_count, "truncate", truncate)
    return Unroll(check_flag("remat", remat), segment, truncate)


class ByStep(NamedTuple):
    """A gradient that differs from step to step: a function of parameters and number of the step.

    The loops of this module take it in place of a function of the parameters.
    """

    function: Callable

    def __call__(self, *arguments):
        return self.function(*arguments)


def numbers_of(gradient: Callable, steps: int) -> tuple:
    """Return (numbers of the steps,) for a gradient that takes them, else ()."""
    return (jnp.arange(steps),) if isinstance(gradient, ByStep) else ()


def of_same_kind(gradient: Callable, function: Callable) -> Any:
    """Return a function of the arguments of a gradient as a `ByStep` if the gradient is one."""
    return ByStep(function) if isinstance(gradient, ByStep) else function


class Loop(NamedTuple):
    """The steps of a rule as a function of the carry (parameters, state).

    step: (carry, own) -> carry.   own: numbers that differ from step to step, stacked: those of
    the rule, and the number of the step for a `ByStep`.   steps: their number.
    """

    step: Callable
    own: Any
    steps: int

    def between(self, start: int, stop: int) -> "Loop":
        """The loop over the steps from `start` up to `stop`."""
        own = jax.tree.map(lambda x: x[start:stop], self.own)
        return self._replace(own=own, steps=stop - start)

    def last(self, carry):
        """The carry after all steps."""
        return lax.scan(lambda c, x: (self.step(c, x), None), carry, self.own, length=self.steps)[0]

    def visit(self, carry):
        """(carry after all steps, carries before every step, stacked)."""
        return lax.scan(lambda c, x: (self.step(c, x), c), carry, self.own, length=self.steps)

    def visit_segments(self, carry, size: int):
        """(carry after all steps, carries before every segment as from `scan_segments`)."""

        def segment(carry, own, steps):
            return self._replace(own=own, steps=steps).last(carry), carry

        return scan_segments(segment, carry, split_steps(self.own, self.steps, size), self.steps)


def run(rule, gradient: Callable, start, remat: bool = False):
    """Return the last parameters and the (parameters, state) before every step, stacked."""
    loop = loop_of(rule, gradient)

    def step(carry, own):
        return loop.step(carry, own), carry

    # Reverse mode then stores the carry of every step and runs the step again.
    step = jax.checkpoint(step) if remat else step
    first = (start, rule.init(start))
    if rule.steps == 1:  # no loop, and nothing stacked
        (theta, _), visited = step(first, jax.tree.map(lambda x: x[0], loop.own))
        return theta, visited
    # A scan compiles one step, whatever their number.
    (theta, _), visited = lax.scan(step, first, loop.own, length=rule.steps)
    return theta, visited


def loop_of(rule, gradient: Callable) -> Loop:
    """Return the steps of a rule along the gradient, a function of the parameters."""
    _check_steps(rule)
    stepped, fixed = separate(rule)

    def step(carry, own):
        (theta, state), (own, *number) = carry, own
        return combine(own, fixed).update(gradient(theta, *number), state, theta)

    return Loop(step, (stepped, *numbers_of(gradient, rule.steps)), rule.steps)


def last_point(rule, gradient: Callable, start, unroll: Unroll):
    """Return the last parameters, with derivatives as `unroll` says."""
    if rule.steps == 1 or unroll.stores_all:
        return run(rule, gradient, start, unroll.remat)[0]
    loop, carry = differentiated_part(rule, gradient, start, unroll)
    if unroll.remat:
        loop = loop._replace(step=jax.checkpoint(loop.step))
    size = unroll.segment_size(loop.steps)
    if size == loop.steps:
        return loop.last(carry)[0]

    # Reverse mode stores the arguments of this function, and runs it again.
    @partial(jax.checkpoint, static_argnums=2)
    def segment(carry, own, steps):
        return loop._replace(own=own, steps=steps).last(carry), None

    return scan_segments(segment, carry, split_steps(loop.own, loop.steps, size), loop.steps)[0][0]


def visit(rule, gradient: Callable, start, unroll: Unroll):
    """Return the last parameters, and the carries before the differentiated steps.

    They are stacked over steps, or over segments as `Segments`.
    """
    if rule.steps == 1 or unroll.stores_all:
        return run(rule, gradient, start)
    loop, carry = differentiated_part(rule, gradient, start, unroll)
    size = unroll.segment_size(loop.steps)
    (theta, _), stored = (
        loop.visit(carry) if size == loop.steps else loop.visit_segments(carry, size)
    )
    return theta, stored


def differentiated_part(rule, gradient: Callable, start, unroll: Unroll):
    """Return (loop over the steps that derivatives pass through, carry before them)."""
    loop, carry = loop_of(rule, gradient), (start, rule.init(start))
    skipped = rule.steps - unroll.differentiated(rule.steps)
    if not skipped:
        return loop, carry
    # A scan of constants stores nothing for reverse mode, so all that the steps read is constant.
    constant, read = jax.closure_convert(loop.between(0, skipped).last, carry)
    theta, state = lax.stop_gradient(constant(lax.stop_gradient(carry), *lax.stop_gradient(read)))
    theta = jax.tree.map(identity_at, start, theta)
    return loop.between(skipped, loop.steps), (theta, state)


def identity_at(start, theta):
    """Return theta, with derivative one in `start` and zero in everything else."""
    if not jnp.issubdtype(theta.dtype, jnp.floating):
        return theta
    # The difference is exactly zero.
    return lax.stop_gradient(theta) + (start - lax.stop_gradient(start))


class Segments(NamedTuple):
    """A pytree by segment: stacked for all segments of one size, and for a shorter last one.

    size: number of steps of the first.   rest: None without a last segment of another size.
    """

    whole: Any
    rest: Any
    size: int


def split_steps(own, steps: int, size: int) -> Segments:
    """Return stacks over steps by segment, of shape (segments, size, ...) and (rest, ...)."""
    count = steps // size
    whole = jax.tree.map(lambda x: x[: count * size].reshape(count, size, *x.shape[1:]), own)
    return Segments(whole, jax.tree.map(lambda x: x[count * size :], own), size)


def scan_segments(each: Callable, carry, parts: Segments, steps: int, reverse: bool = False):
    """Return (carry, results by segment) of (carry, result) = each(carry, part, steps of it)."""
    count, left = divmod(steps, parts.size)

    def over_whole(carry):
        return lax.scan(
            lambda carry, part: each(carry, part, parts.size),
            carry, parts.whole, length=count, reverse=reverse,
        )  # fmt: skip

    if not left:
        carry, whole = over_whole(carry)
        return carry, Segments(whole, None, parts.size)
    if reverse:
        carry, rest = each(carry, parts.rest, left)
        carry, whole = over_whole(carry)
    else:
        carry, whole = over_whole(carry)
        carry, rest = each(carry, parts.rest, left)
    return carry, Segments(whole, rest, parts.size)


def join_steps(parts: Segments):
    """Return results by segment as stacks over steps, the inverse of `split_steps`."""
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts.whole)
    if parts.rest is None:
        return flat
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), flat, parts.rest)


def each_step(rule, advance: Callable, carry, unrolled: bool = False):
    """Return `carry` after carry = advance(rule of one step, carry) for every step.

    unrolled: whether to use a Python loop, which compiles nothing if all values are known.
    """
    _check_steps(rule)
    stepped, fixed = separate(rule)
    if unrolled or rule.steps == 1:
        for k in range(rule.steps):
            own = jax.tree.map(lambda x, k=k: x[k], stepped)
            carry = advance(combine(own, fixed), carry)
        return carry
    return lax.scan(
        lambda carry, own: (advance(combine(own, fixed), carry), None),
        carry, stepped, length=rule.steps,
    )[0]  # fmt: skip


def _check_steps(rule) -> None:
    # A traced number of steps would fail inside scan with a message that names no rule.
    if isinstance(rule.steps, jax.core.Tracer):
        raise TypeError(
            f"steps of {type(rule).__name__} must be static, an integer that JAX does not trace; "
            "declare it as `steps: int = negmaml.static(default=1)`"
        )
