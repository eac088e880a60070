r"""Meta-gradients by forward-over-reverse differentiation, one inner step at a time.

With theta_{k+1} = theta_k - rate * g_k and H_k the Hessian of the inner loss at theta_k, the
meta-gradient is a recursion backwards through the inner steps,

    v_K = grad loss(theta_K, query),      v_k = v_{k+1} - H_k (rate * v_{k+1}),      gradient = v_0.

Reverse mode would multiply by the transpose of H_k. Where H_k is symmetric, as
`negmaml._core.symmetry` finds, H_k u is a forward derivative of the inner gradient at theta_k. Then
only theta_k of each step is stored, and no intermediate result of its gradient. Source: Kemaev et
al., "Scalable Meta-Learning via Mixed-Mode Differentiation", ICML 2025.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.pytree import split_floating
from negmaml.meta.partition import combine, partition
from negmaml.rules import InnerRule, separate
from negmaml.rules import combine as combine_rule
from negmaml.rules.unroll import (
    PLAIN,
    Segments,
    Unroll,
    join_steps,
    loop_of,
    numbers_of,
    scan_segments,
    split_steps,
)


def backward_recursion(
    rule: InnerRule, gradients, frozen, visited, slope, mask, unroll: Unroll = PLAIN
):
    """Return the gradient in the parameters, and that in the rule with None for other leaves.

    Arguments:
        gradients: those of the loss on the support, functions of all parameters, and of those that
            adapt.
        frozen: parameters that do not adapt; they enter through `gradient` only.
        visited: (parameters, optimizer state) before each step or segment, as from `visit`.
        slope: the gradient of the query loss at the adapted parameters, of all parameters.
        mask: the leaves that adapt.
        unroll: which steps are differentiated.

    This is the recursion above for any update (theta', s') = u(rule, g, s, theta), g =
    gradient(theta). A step maps the cotangents of (theta', s') to those of its arguments by the
    transpose of u. The cotangent of g goes to theta by the Hessian, which is symmetric, so one
    forward derivative of `gradient` serves. The cotangents of numbers of the rule that differ from
    step to step are stored by step; those of numbers shared by all steps are added up.
    """
    gradient, on_moving = gradients
    no_frozen = jax.tree.map(jnp.zeros_like, frozen)
    numbers, rebuild_rule = _floats(rule)
    # Python floats of the rule become arrays, of which a cotangent can be taken.
    numbers = [jnp.asarray(x, jnp.result_type(float, x)) for x in numbers]
    rule = rebuild_rule(numbers)
    stepped, fixed = separate(rule)
    kept = unroll.differentiated(rule.steps)
    skipped = rule.steps - kept
    each = stepped, *numbers_of(gradient, rule.steps)  # numbers that differ from step to step
    if skipped:
        each = jax.tree.map(lambda x: x[skipped:], each)
    fixed, rebuild_fixed = _floats(fixed)

    def back(carry, step):
        of_theta, of_state, of_frozen, of_fixed = carry
        (theta, state), (own, *number) = step
        floats, rebuild_state = _floats(state)
        own, rebuild_own = _floats(own)
        # One linearisation gives both the gradient g and its forward derivative H u.
        g, hessian = jax.linearize(lambda full: gradient(full, *number), combine(theta, frozen))

        def update(own, fixed, g, floats, theta):
            one_step = combine_rule(rebuild_own(own), rebuild_fixed(fixed))
            theta, state = one_step.update(g, rebuild_state(floats), theta)
            return theta, _floats(state)[0]

        # The transpose of u, in the update of one step only: the graph stays small.
        arguments = own, fixed, partition(g, mask)[0], floats, theta
        transpose = jax.vjp(update, *arguments)[1]
        of_own, more_fixed, of_g, of_state, of_theta = transpose((of_theta, of_state))
        by_hessian = hessian(combine(of_g, no_frozen))
        more_theta, more_frozen = partition(by_hessian, mask)
        add = partial(jax.tree.map, jnp.add)
        carry = (
            add(of_theta, more_theta), of_state, add(of_frozen, more_frozen),
            add(of_fixed, more_fixed),
        )  # fmt: skip
        return carry, of_own

    def back_segment(carry, segment, steps):
        """Take the steps of a segment again, then go back through them."""
        first, own = segment
        loop = loop_of(rule, on_moving)._replace(own=own, steps=steps)
        visited = loop.visit(first)[1]
        return lax.scan(back, carry, (visited, own), reverse=True)

    # At the last step the cotangent of theta is v_K, and nothing depends on the optimizer state.
    of_theta, of_frozen = partition(slope, mask)
    state = jax.eval_shape(rule.init, of_theta)
    of_state = [jnp.zeros(x.shape, x.dtype) for x in _floats(state)[0]]
    last = (of_theta, of_state, of_frozen, jax.tree.map(jnp.zeros_like, fixed))
    if rule.steps == 1:  # `run` stacks nothing for a single step
        first, of_own = back(last, (visited, jax.tree.map(lambda x: x[0], each)))
        of_own = jax.tree.map(lambda x: x[None], of_own)
        start = visited[0]
    elif isinstance(visited, Segments):
        own = split_steps(each, kept, visited.size)
        pairs = Segments((visited.whole, own.whole), (visited.rest, own.rest), visited.size)
        first, of_own = scan_segments(back_segment, last, pairs, kept, reverse=True)
        of_own = join_steps(of_own)
        start = jax.tree.map(lambda x: x[0], visited.whole[0])
    else:
        first, of_own = lax.scan(back, last, (visited, each), reverse=True)
        start = jax.tree.map(lambda x: x[0], visited[0])
    of_theta, of_state, of_frozen, of_fixed = first
    if skipped:  # numbers of the first steps have no effect on a truncated derivative
        of_own = jax.tree.map(
            lambda x: jnp.concatenate([jnp.zeros((skipped, *x.shape[1:]), x.dtype), x]), of_own
        )

    def split_numbers(numbers):
        return tuple(_floats(part)[0] for part in separate(rebuild_rule(numbers)))

    # `separate` only moves numbers of the rule, so its transpose puts their cotangents in order.
    (of_rule,) = jax.vjp(split_numbers, numbers)[1]((of_own, of_fixed))
    if of_state and not skipped:  # the first optimizer state is a function of both

        def init(theta, numbers):
            return _floats(rebuild_rule(numbers).init(theta))[0]

        more = jax.vjp(init, start, numbers)[1](of_state)
        of_theta, of_rule = jax.tree.map(jnp.add, (of_theta, of_rule), more)
    return combine(of_theta, of_frozen), split_floating(rebuild_rule(of_rule))[0]


def _floats(tree):
    """Return the floating point leaves, and a function that puts others in their places."""
    leaves = jax.tree.leaves(tree)
    real = [jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.floating) for x in leaves]

    def rebuild(floats):
        remaining = iter(floats)
        marked = zip(leaves, real, strict=True)
        return jax.tree.unflatten(
            jax.tree.structure(tree), [next(remaining) if r else leaf for leaf, r in marked]
        )

    return [leaf for leaf, r in zip(leaves, real, strict=True) if r], rebuild
