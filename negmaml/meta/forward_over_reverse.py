r"""Meta-gradients by forward-over-reverse differentiation, one inner step at a time.

With theta_{k+1} = theta_k - rate * g_k and H_k the Hessian of the inner loss at theta_k, the
meta-gradient is a recursion backwards through the inner steps,

    v_K = grad loss(theta_K, query),      v_k = v_{k+1} - H_k (rate * v_{k+1}),      gradient = v_0.

H_k transposes in it. Where it is symmetric, as `negmaml._core.symmetry` finds, H_k u is a forward
derivative of the inner gradient at theta_k: of each step only theta_k is kept, and nothing of how
the gradient was computed. Source: Kemaev et al.,
"Scalable Meta-Learning via Mixed-Mode Differentiation", ICML 2025.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from negmaml.meta.partition import merge, split
from negmaml.rules import InnerRule, combine, separate


def backwards(rule: InnerRule, gradient, frozen, visited, slope, mask):
    """The recursion at the head of this module, for any update that is driven by gradients.

    Arguments:
        gradient: of the loss on the support, a function of all parameters.
        visited: (parameters, state) that each step started from.
        slope: the gradient at the adapted parameters, of all parameters.

    Returns the gradient in the parameters, and a list of those in the floating point leaves of the
    rule. An update is (theta', s') = u(rule, g, s, theta) with g = gradient(theta). A step maps the
    cotangents of (theta', s') to those of its arguments by the transpose of u. That of g goes to
    theta by the Hessian, which has to be symmetric, so one forward derivative of `gradient` serves.
    Frozen parameters enter through g only. Numbers of the rule that differ from step to step get
    their cotangents step by step; those of all steps add them up.
    """
    still = jax.tree.map(jnp.zeros_like, frozen)
    numbers, rule_of = _floats(rule)
    numbers = [jnp.asarray(x, jnp.result_type(float, x)) for x in numbers]
    rule = rule_of(numbers)
    stepped, fixed = separate(rule)
    fixed, fixed_of = _floats(fixed)

    def back(carry, step):
        of_theta, of_state, of_frozen, of_fixed = carry
        (theta, state), own = step
        floats, rebuild = _floats(state)
        own, own_of = _floats(own)
        g, hessian = jax.linearize(gradient, merge(theta, frozen))

        def update(own, fixed, g, floats, theta):
            one_step = combine(own_of(own), fixed_of(fixed))
            theta, state = one_step.update(g, rebuild(floats), theta)
            return theta, _floats(state)[0]

        arguments = own, fixed, split(g, mask)[0], floats, theta
        of_own, more, of_g, of_state, of_theta = jax.vjp(update, *arguments)[1](
            (of_theta, of_state)
        )
        through, past = split(hessian(merge(of_g, still)), mask)
        add = partial(jax.tree.map, jnp.add)
        carry = add(of_theta, through), of_state, add(of_frozen, past), add(of_fixed, more)
        return carry, of_own

    of_theta, of_frozen = split(slope, mask)
    state = jax.eval_shape(rule.init, of_theta)
    of_state = [jnp.zeros(x.shape, x.dtype) for x in _floats(state)[0]]
    first = (of_theta, of_state, of_frozen, jax.tree.map(jnp.zeros_like, fixed))
    if rule.steps == 1:
        last, of_own = back(first, (visited, jax.tree.map(lambda x: x[0], stepped)))
        of_own = jax.tree.map(lambda x: x[None], of_own)
    else:
        last, of_own = lax.scan(back, first, (visited, stepped), reverse=True)
    of_theta, of_state, of_frozen, of_fixed = last
    if of_state:  # the state starts from the parameters
        start = visited[0] if rule.steps == 1 else jax.tree.map(lambda x: x[0], visited[0])
        pull = jax.vjp(lambda theta: _floats(rule.init(theta))[0], start)[1]
        of_theta = jax.tree.map(jnp.add, of_theta, pull(of_state)[0])

    def parts(numbers):
        return tuple(_floats(part)[0] for part in separate(rule_of(numbers)))

    (of_rule,) = jax.vjp(parts, numbers)[1]((of_own, of_fixed))
    return merge(of_theta, of_frozen), of_rule


def _floats(tree):
    """The floating point leaves, and the function that puts others in their place."""
    leaves = jax.tree.leaves(tree)
    real = [jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.floating) for x in leaves]

    def rebuild(floats):
        own = iter(floats)
        marked = zip(leaves, real, strict=True)
        return jax.tree.unflatten(
            jax.tree.structure(tree), [next(own) if r else leaf for leaf, r in marked]
        )

    return [leaf for leaf, r in zip(leaves, real, strict=True) if r], rebuild
