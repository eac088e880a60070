"""Any optax optimizer as the inner rule."""

from typing import Any, ClassVar, final
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp

from negmaml._core.checks import check_count
from negmaml._core.pytree import pytree, static
from negmaml._core.settings import own_settings
from negmaml.rules.base import InnerRule, check_rule

_KNOWN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # results of `_smooth_at_zero`


@final
@pytree
class InnerOptimizer(InnerRule):
    """`steps` steps of any optax optimizer as the inner rule, from a new state on every task.

    Arguments:
        transformation: an `optax.GradientTransformation` that needs only gradients and parameters.
            It is static: numbers inside it are constants of the compiled program. Build it inside
            your jitted function to trace them.
        steps: number of steps, a static integer of at least 1.

    Second-order meta-gradients differentiate its update, and are NaN where that has no derivative,
    such as Adam's square root at a gradient of zero. Give `eps_root` to avoid this, as in
    optax.adam(1e-2, eps_root=1e-10). `maml` and its relatives warn of such an optimizer when they
    are built. Raises TypeError or ValueError for anything else.

    >>> import negmaml as nm, optax
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> float(nm.adapt(square, 0.0, 1.0, InnerOptimizer(optax.sgd(-0.5))))
    -0.5
    """

    transformation: Any = static()
    steps: int = static(default=1)

    sums_gradients: ClassVar[bool] = False

    def __init__(self, transformation: Any, steps: int = 1):
        import optax

        if not isinstance(transformation, optax.GradientTransformation):
            raise TypeError(
                "transformation must be an optax.GradientTransformation such as optax.sgd(0.1), "
                f"got {transformation!r}"
            )
        object.__setattr__(self, "transformation", transformation)
        object.__setattr__(self, "steps", check_count("steps", steps))

    @property
    def smooth_at_zero(self) -> bool:
        """True if the update has a derivative where one entry of the gradient is zero."""
        return _smooth_at_zero(self.transformation)

    def init(self, params):
        """The optimizer's first state."""
        return self.transformation.init(params)

    def update(self, gradient, state, params):
        """One step of the optimizer."""
        import optax

        updates, state = self.transformation.update(gradient, state, params)
        return optax.apply_updates(params, updates), state


@own_settings
def _smooth_at_zero(transformation) -> bool:
    if transformation.update in _KNOWN:
        return _KNOWN[transformation.update]
    # One entry with a gradient and one without: a square root at zero shows as NaN.
    start = jnp.zeros(2)

    def update(gradient):
        updates, _ = transformation.update(gradient, transformation.init(start), start)
        return updates

    try:
        with jax.ensure_compile_time_eval(), jax.debug_nans(False):  # a NaN is the answer
            smooth = bool(jnp.all(jnp.isfinite(jax.jacobian(update)(jnp.array([1.0, 0.0])))))
    except Exception:  # traced numbers, or unsuitable parameters: assume a derivative
        return True
    _KNOWN[transformation.update] = smooth
    return smooth


def as_rule(name: str, rule) -> Any:
    """Return a rule as given, or one step of an optax transformation; else raise a TypeError."""
    if not isinstance(rule, InnerRule):
        import optax

        if isinstance(rule, optax.GradientTransformation):
            return InnerOptimizer(rule)
    return check_rule(name, rule)
