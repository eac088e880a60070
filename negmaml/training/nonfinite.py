r"""Policies for a batch whose loss, gradient or updated parameters are not finite.

By default it stops. With a number n it skips up to n such batches in a row. With `LossScale` it
also divides the scale of the loss by two after each:

    gradient = (d/d params  scale * loss) / scale
"""

import inspect
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from negmaml._core.checks import check_count, short_repr
from negmaml._core.pytree import pytree, static
from negmaml.meta.gradients import Algorithm

MIN_SCALE = 1.0  # below it the scaling is not the cause of an overflow
MAX_SCALE = 2.0**64


@pytree
class LossScale:
    r"""Dynamic scaling of the loss, for models that compute in float16: `fit(nonfinite=...)`.

    Derivatives below 6e-8 are zero in float16. The query loss is multiplied by the scale before it
    is differentiated, and the gradient is divided by it in float32. After a batch that is not
    finite, the update is skipped and the scale is halved. After `period` finite batches in a row it
    is doubled (Micikevicius et al. 2018, Mixed precision training).

    Arguments:
        initial: the first scale, at least 1.
        period: number of finite batches in a row after which the scale is doubled.
        limit: number of batches in a row that may be skipped; one more ends the run.

    Keep the parameters in float32 and convert them within the loss; gradients of float16 parameters
    are rounded to float16 when the scale is divided out. The inner loss is not scaled. For
    gradients of it that vanish, give an `inner_loss` that is multiplied by a constant, and a rate
    that is divided by it.

    A function of your own as `value_and_grad` must take the scale as a keyword, (params, tasks,
    loss_scale) -> (loss, gradient of loss_scale * loss); `fit` divides the gradient by it.

    >>> LossScale(initial=2.0**10).initial
    1024.0
    """

    initial: float = static(2.0**15)
    period: int = static(2000)
    limit: int = static(20)

    def __post_init__(self) -> None:
        number = isinstance(self.initial, Real) and not isinstance(self.initial, bool)
        if not (number and MIN_SCALE <= self.initial <= MAX_SCALE):
            raise (ValueError if number else TypeError)(
                f"initial must be a number from {MIN_SCALE:g} to 2**64, got "
                f"{short_repr(self.initial)}; 2.0**15 suits float16"
            )
        check_count("period", self.period)
        check_count("limit", self.limit)


class SkipState(NamedTuple):
    """Counts of a run that skips batches.

    Attributes:
        skipped: number of batches so far whose update was skipped.
        in_a_row: number of them since the last finite batch.
        scale: the present scale of the loss, None without `LossScale`.
        finite_in_a_row: finite batches since the scale was last changed, None without `LossScale`.
    """

    skipped: Any
    in_a_row: Any
    scale: Any = None
    finite_in_a_row: Any = None


def check_policy(policy) -> int | LossScale | None:
    """Return the argument `nonfinite` of `fit`, None for "stop"; raise if it is invalid."""
    if isinstance(policy, LossScale):
        return policy
    if isinstance(policy, str) and policy == "stop":
        return None
    if isinstance(policy, int | np.integer) and not isinstance(policy, bool) and policy >= 1:
        return int(policy)
    number = isinstance(policy, int | np.integer | str) and not isinstance(policy, bool)
    raise (ValueError if number else TypeError)(
        'nonfinite must be "stop", the number of batches in a row that may be skipped (at least '
        f"1), or a LossScale, got {short_repr(policy)}"
    )


def needs_scale(value_and_grad, policy) -> bool:
    """True if a function must take the scale of the loss; raise TypeError if it does not."""
    function = getattr(value_and_grad, "func", value_and_grad)
    if not isinstance(policy, LossScale) or isinstance(function, Algorithm):
        return False
    if "loss_scale" not in inspect.signature(value_and_grad).parameters:
        raise TypeError(
            "value_and_grad must be an algorithm of negmaml such as maml_value_and_grad(loss, "
            "rule), or take the keyword loss_scale and return (loss, gradient of loss_scale * "
            f"loss), for nonfinite=LossScale(...), got {short_repr(function)}"
        )
    return True


def first_skips(policy, before: SkipState | None) -> SkipState | None:
    """Return the counts at the start of a run, those of `before` where it was of the same kind."""
    if policy is None:
        return None
    scaled = isinstance(policy, LossScale)
    if before is not None and (before.scale is not None) == scaled:
        return before
    zero = jnp.zeros((), jnp.int32)
    return SkipState(zero, zero, *((jnp.float32(policy.initial), zero) if scaled else ()))


def next_skips(policy, skips: SkipState, finite) -> tuple[SkipState, Any]:
    """Return the counts after a batch, and whether the run continues."""
    skipped = skips.skipped + ~finite
    in_a_row = jnp.where(finite, 0, skips.in_a_row + 1)
    if not isinstance(policy, LossScale):
        return SkipState(skipped, in_a_row), in_a_row <= policy
    good = jnp.where(finite, skips.finite_in_a_row + 1, 0)
    full = good >= policy.period
    larger = jnp.where(full, jnp.minimum(2 * skips.scale, MAX_SCALE), skips.scale)
    scale = jnp.where(finite, larger, jnp.maximum(skips.scale / 2, MIN_SCALE))
    return SkipState(skipped, in_a_row, scale, jnp.where(full, 0, good)), in_a_row <= policy.limit


def rejected_by_optimizer(optimizer_state) -> Any:
    """Return whether the optimizer skipped its update; None for one that never skips.

    These are `optax.apply_if_finite` and `optax.MultiSteps` with `should_skip_update_fn`, anywhere
    in the optimizer.
    """

    def flag(node):
        if isinstance(node, optax.ApplyIfFiniteState):
            return ~node.last_finite
        if isinstance(node, optax.MultiStepsState) and isinstance(node.skip_state, dict):
            return node.skip_state.get("should_skip")
        return None

    nodes = jax.tree.leaves(optimizer_state, is_leaf=lambda node: flag(node) is not None)
    flags = [found for node in nodes if (found := flag(node)) is not None]
    return jnp.any(jnp.stack(flags)) if flags else None
