"""Any optax optimizer as the inner rule."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, final
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.checks import check_count, short_repr
from negmaml._core.pytree import pytree, static
from negmaml._core.settings import own_settings
from negmaml._core.symmetry import iterates
from negmaml._core.types import ArrayLike, PyTree
from negmaml.rules.base import InnerRule, check_rule

_KNOWN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # results of `_smooth_at_zero`
_NEEDS: WeakKeyDictionary[Any, "_Needs"] = WeakKeyDictionary()  # results of `_needs`


@final
@pytree
class InnerOptimizer(InnerRule):
    """`steps` steps of any optax optimizer as the inner rule, from a new state on every task.

    Arguments:
        transformation: an `optax.GradientTransformation`. It is static: numbers inside it are
            constants of the compiled program. Build it inside your jitted function to trace them.
        steps: number of steps, a static integer of at least 1.

    A transformation that needs the loss too, such as optax.lbfgs(), gets it. The state of a model
    is then fixed during the steps, as for `Proximal`. A line search that iterates has no derivative
    of its steps, so that a meta-gradient through it raises a TypeError; hold such an optimizer in
    `negmaml.Implicit`, or use `fomaml`.

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

    def __init__(self, transformation: Any, steps: int = 1) -> None:
        import optax

        if not isinstance(transformation, optax.GradientTransformation):
            raise TypeError(
                "transformation must be an optax.GradientTransformation such as optax.sgd(0.1), "
                f"got {short_repr(transformation)}{_call_hint(transformation)}"
            )
        object.__setattr__(self, "transformation", transformation)
        object.__setattr__(self, "steps", check_count("steps", steps))

    @property
    def smooth_at_zero(self) -> bool:
        """True if the update has a derivative where one entry of the gradient is zero."""
        return _smooth_at_zero(self.transformation)

    @property
    def implicit(self) -> bool:  # type: ignore[override]
        """True if the transformation needs the loss, which only `solve` receives."""
        return _needs(self.transformation).loss

    def init(self, params: PyTree) -> PyTree:
        """The optimizer's first state."""
        return self.transformation.init(params)

    def update(self, gradient: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        """One step of the optimizer."""
        import optax

        updates, state = self.transformation.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def update_with_loss(
        self,
        loss: Callable[..., Any],
        value: ArrayLike,
        gradient: PyTree,
        state: PyTree,
        params: PyTree,
    ) -> tuple[PyTree, PyTree]:
        """One step of an optimizer that may use the loss, its value and its gradient."""
        import optax

        update = optax.with_extra_args_support(self.transformation).update
        updates, state = update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(params, updates), state

    def solve(self, loss: Callable[..., Any], start: PyTree, *, remat: bool = False) -> Any:
        """The parameters after `steps` steps on a loss of the parameters."""

        def step(carry, _):
            theta, state = carry
            value, gradient = jax.value_and_grad(loss)(theta)
            return self.update_with_loss(loss, value, gradient, state, theta), None

        step = jax.checkpoint(step) if remat else step
        (theta, _), _ = lax.scan(step, (start, self.init(start)), length=self.steps)
        return _not_differentiable(theta) if _needs(self.transformation).loop else theta


def update_on(rule: InnerRule, loss, value, gradient, state, params):
    """One step of any rule that takes steps, on a loss with this value and gradient at `params`."""
    if isinstance(rule, InnerOptimizer):
        return rule.update_with_loss(loss, value, gradient, state, params)
    return rule.update(gradient, state, params)


@jax.custom_jvp
def _not_differentiable(theta):
    """Return the argument; its derivative raises."""
    return theta


@_not_differentiable.defjvp
def _raise(primals, tangents):
    raise TypeError(
        "rule must have differentiable steps for this meta-gradient, got an InnerOptimizer whose "
        "line search iterates; differentiate its solution instead, with "
        "negmaml.Implicit(transformation, steps=...), or use fomaml"
    )


class _Needs(NamedTuple):
    """Requirements of the update of a transformation.

    loss: whether it takes the loss and its value.   loop: whether it then iterates.
    """

    loss: bool
    loop: bool


@own_settings
def _needs(transformation) -> _Needs:
    if transformation.update in _NEEDS:
        return _NEEDS[transformation.update]
    import optax

    start = jnp.zeros(2)

    def loss(params):
        return jnp.sum(params**2)

    def plain(params):
        return transformation.update(params, transformation.init(params), params)

    def with_loss(params):
        update = optax.with_extra_args_support(transformation).update
        given = {"value": loss(params), "grad": params, "value_fn": loss}
        return update(params, transformation.init(params), params, **given)

    try:
        jax.eval_shape(plain, start)
        found = _Needs(False, False)
    except Exception as error:
        # Any other error comes from parameters that do not suit the transformation.
        if not (isinstance(error, TypeError) and "keyword-only argument" in str(error)):
            return _Needs(False, False)
        found = _Needs(True, iterates(jax.make_jaxpr(with_loss)(start)))
    _NEEDS[transformation.update] = found
    return found


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


def _call_hint(value) -> str:
    """A hint for optax.adam, which is no transformation before it is called."""
    name = getattr(value, "__name__", "")
    return f"; call it, as in {name}(0.1)" if name.isidentifier() and callable(value) else ""
