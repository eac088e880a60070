r"""The inner loop: how a rule moves any pytree of parameters on the data of one task.

A rule is K transitions (theta_k, s_k) -> (theta_{k+1}, s_{k+1}) driven by the gradient at
theta_k; s is the state of an optimizer, empty for gradient descent. `negmaml.meta.algorithms` differentiates
through these transitions, so this module keeps them apart from the gradient that drives them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from negmaml._core.checks import check_count
from negmaml._core.pytree import pytree, static
from negmaml.rules import GradientDescent, Proximal
from negmaml.rules.implicit import proximal_point

Loss = Callable[[Any, Any], Any]


@pytree
class InnerOptimizer:
    """`steps` steps of any optax optimizer as the inner rule, started anew on every task.

    Arguments:
        transformation: an `optax.GradientTransformation` that needs gradients and parameters
            only. It is static: numbers inside it are constants of the compiled program, so build
            it inside your jitted function to trace them.
        steps: number of steps, a static integer of at least 1.

    Meta-gradients go through its update; square roots of zero, as in Adam at a vanishing
    gradient, need `eps_root`. Raises TypeError or ValueError for anything else.

    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> float(adapt(square, 0.0, 1.0, InnerOptimizer(optax.sgd(-0.5))))
    -0.5
    """

    transformation: Any = static()
    steps: int = static()

    def __init__(self, transformation: Any, steps: int = 1):
        if not isinstance(transformation, optax.GradientTransformation):
            raise TypeError(
                "transformation must be an optax.GradientTransformation such as optax.sgd(0.1), "
                f"got {transformation!r}"
            )
        object.__setattr__(self, "transformation", transformation)
        object.__setattr__(self, "steps", check_count("steps", steps))


InnerRule = GradientDescent | InnerOptimizer | Proximal


class Transitions(NamedTuple):
    """A rule made ready for given parameters: what its K steps share and what they do not.

    rates: what the updates read besides the gradient; `stepped` marks leaves with a leading step
        axis (one leaf a parameter leaf), all others serve every step.
    init: parameters -> state.
    update: (rates of this step, gradient, state, parameters) -> (parameters, state).
    """

    rates: Any
    stepped: tuple[bool, ...]
    steps: int
    init: Callable
    update: Callable


def adapt(loss: Loss, params, support, rule: InnerRule, *, mask=None, remat: bool = False):
    r"""Parameters after adapting to the data of one task.

        theta_0 = params,      theta_{k+1} = theta_k - rate * grad loss(theta_k, support)

    Arguments:
        loss: scalar function of (params, data).
        params: any pytree of floating point arrays.
        support: the task's data, what `loss` takes.
        rule: `GradientDescent`, whose rate is a scalar, an array of one rate a step, or a pytree
            like `params` (leaves that broadcast to theirs, with a leading step axis or not), of
            any sign; `InnerOptimizer`; or `Proximal`, the point where
            grad loss(theta, support) + strength (theta - params) = 0, found by Newton's method.
        mask: which leaves adapt, a pytree of booleans like `params` or a prefix of it; all when
            left out.
        remat: whether reverse-mode derivatives recompute each step instead of storing it.

    Returns a pytree like `params`. Differentiable, so that jax.grad through it is the
    meta-gradient; vmap it for many tasks. Raises TypeError for another rule or parameters that
    are not floating point, ValueError for a rate or mask unlike `params` and for a loss that is
    not scalar.

    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> float(adapt(square, 0.0, 1.0, GradientDescent(-0.5)))  # away from the target
    -0.5
    """
    params = check_params(params)
    moving, frozen = split(params, mask)
    objective = scalar(loss)

    def task_loss(theta):
        return objective(merge(theta, frozen), support)

    if isinstance(rule, Proximal):
        return merge(proximal_point(task_loss, moving, rule.strength), frozen)
    transitions = prepare(rule, params, mask)
    return merge(run(transitions, jax.grad(task_loss), moving, remat)[0], frozen)


def run(transitions: Transitions, gradient: Callable, start, remat: bool = False):
    """The last parameters, and every (parameters, state) that a step started from, stacked."""

    def step(carry, stepped):
        theta, state = carry
        rates = unstep(transitions, stepped)
        return transitions.update(rates, gradient(theta), state, theta), carry

    step = jax.checkpoint(step) if remat else step
    first = (start, transitions.init(start))
    if transitions.steps == 1:  # no loop, and nothing stacked
        (theta, _), visited = step(first, [rate[0] for rate in stepped_rates(transitions)])
        return theta, visited
    (theta, _), visited = lax.scan(
        step, first, stepped_rates(transitions), length=transitions.steps
    )
    return theta, visited


def stepped_rates(transitions: Transitions) -> list:
    """The rates that differ from step to step, a list with a leading step axis."""
    marked = zip(jax.tree.leaves(transitions.rates), transitions.stepped, strict=True)
    return [rate for rate, stepped in marked if stepped]


def unstep(transitions: Transitions, stepped: list):
    """The rates of one step: those that `stepped` has for it, and those of every step."""
    leaves = jax.tree.leaves(transitions.rates)
    treedef: Any = jax.tree.structure(transitions.rates)
    own = iter(stepped)
    marked = zip(leaves, transitions.stepped, strict=True)
    return treedef.unflatten([next(own) if s else leaf for leaf, s in marked])


def prepare(rule: InnerRule, params, mask=None) -> Transitions:
    """The transitions of gradient descent or of an optimizer on the leaves of `params` that move.

    Raises TypeError for another rule, ValueError for a rate unlike `params`.
    """
    if isinstance(rule, InnerOptimizer):
        transformation = rule.transformation

        def optimize(_, gradient, state, theta):
            updates, state = transformation.update(gradient, state, theta)
            return optax.apply_updates(theta, updates), state

        return Transitions((), (), rule.steps, transformation.init, optimize)
    if not isinstance(rule, GradientDescent):
        raise TypeError(
            "rule must be GradientDescent, InnerOptimizer or Proximal for a general loss, got "
            f"{type(rule).__name__}; GradientFlow acts through the spectrum of a linear model, "
            "use it with simulate and theory"
        )
    rates = per_leaf(rule, params)
    moving = split(params, mask)[0]
    rates = jax.tree.map(lambda r, t: jnp.asarray(r, t.dtype), split(rates, mask)[0], moving)
    pairs = zip(jax.tree.leaves(rates), jax.tree.leaves(moving), strict=True)
    stepped = tuple(jnp.ndim(rate) > jnp.ndim(leaf) for rate, leaf in pairs)
    return Transitions(rates, stepped, rule.steps, lambda _: (), _descend)


def _descend(rates, gradient, state, theta):
    """theta - rate * gradient in the type of each parameter."""

    def move(t, rate, g):
        return (t - rate * g).astype(t.dtype)

    return jax.tree.map(move, theta, rates, gradient), state


def per_leaf(rule: GradientDescent, params):
    """One rate for each leaf of `params`, with a leading step axis where the rule has one."""
    rate, steps = rule.rate, rule.steps
    structure: Any = jax.tree.structure(params)
    if jax.tree_util.all_leaves([rate]):  # one array
        if jnp.ndim(rate) == 0:
            return jax.tree.map(lambda _: rate, params)
        alone = jax.tree_util.all_leaves([params])
        if jnp.shape(rate) == (steps,):
            if alone and steps > 1 and jnp.ndim(params) and _fits(rate, params, 0):
                raise ValueError(
                    f"rate of shape ({steps},) could mean one rate an element or one a step; give "
                    f"shape (1, {steps}) for elements or ({steps}, 1) for steps"
                )
            return jax.tree.map(lambda leaf: _for_every_step(rate, leaf), params)
    if structure == jax.tree.structure(rate):
        pairs = zip(jax.tree.leaves(rate), jax.tree.leaves(params), strict=True)
        if all(_fits(r, leaf, steps) for r, leaf in pairs):
            return rate
    raise ValueError(
        "rate must be a scalar, an array of one rate a step, or a pytree like the parameters "
        "whose leaves broadcast to theirs, with a leading axis of one entry a step or without "
        f"({structure}, steps={steps}), got {rate!r}"
    )


def _for_every_step(rate, leaf):
    return jnp.reshape(jnp.asarray(rate), (-1,) + (1,) * jnp.ndim(leaf))


def _fits(rate, leaf, steps: int) -> bool:
    """Whether `rate` broadcasts to the shape of `leaf`, behind a step axis or without one."""
    shape, target = jnp.shape(rate), jnp.shape(leaf)
    if len(shape) == len(target) + 1 and shape[0] == steps:
        shape = shape[1:]
    kept = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(r in (1, t) for r, t in kept)


def split(tree, mask):
    """(what moves, what is frozen): two trees like `tree` with None for the other's leaves."""
    if mask is None:
        return tree, jax.tree.map(lambda _: None, tree)
    try:
        flags = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), mask, tree)
    except ValueError as mismatch:
        raise ValueError(
            f"mask must be a pytree of booleans like the parameters or a prefix of them "
            f"({jax.tree.structure(tree)}), got {mask!r}"
        ) from mismatch
    if not all(isinstance(flag, bool) for flag in jax.tree.leaves(flags)):
        raise ValueError(f"mask must hold booleans, got {mask!r}; use True for leaves that adapt")
    moving = jax.tree.map(lambda flag, leaf: leaf if flag else None, flags, tree)
    frozen = jax.tree.map(lambda flag, leaf: None if flag else leaf, flags, tree)
    return moving, frozen


def merge(moving, frozen):
    """The tree that `split` took apart."""
    return jax.tree.map(
        lambda m, f: f if m is None else m, moving, frozen, is_leaf=lambda leaf: leaf is None
    )


def check_params(params):
    """`params` with arrays for leaves; TypeError unless all are floating point."""
    params = jax.tree.map(jnp.asarray, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"params must be floating point arrays, got {leaf.dtype} at "
                f"params{jax.tree_util.keystr(path)}; convert it, or close over it in the loss"
            )
    return params


def scalar(loss: Loss, has_aux: bool = False) -> Callable:
    """`loss` without its auxiliary output, and with a clear error where it is not a scalar."""

    def checked(params, data):
        return check_scalar(loss(params, data), has_aux)[0]

    return checked


def check_scalar(result, has_aux: bool):
    """(value, aux) of a loss; aux is None when it has none."""
    value, aux = result if has_aux else (result, None)
    types = jax.tree.map(jax.typeof, value)
    alone = jax.tree_util.all_leaves([value])
    if not (alone and types.shape == () and jnp.issubdtype(types.dtype, jnp.floating)):
        raise ValueError(
            f"loss must return one real number for the data of one task, got "
            f"{types}; average over points with jnp.mean, and set "
            "has_aux=True if it returns (value, aux)"
        )
    return value, aux
