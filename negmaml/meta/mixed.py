r"""Meta-gradients by forward-over-reverse differentiation, one inner step at a time.

With theta_{k+1} = theta_k - rate * g_k and H_k the Hessian of the inner loss at theta_k, the
meta-gradient is a recursion backwards through the inner steps,

    v_K = grad loss(theta_K, query),      v_k = v_{k+1} - H_k (rate * v_{k+1}),      gradient = v_0.

A Hessian is symmetric, so H_k u is a forward derivative of the inner gradient at theta_k: of each
step only theta_k is kept, and nothing of how the gradient was computed. Source: Kemaev et al.,
"Scalable Meta-Learning via Mixed-Mode Differentiation", ICML 2025.
"""

import jax
import jax.numpy as jnp
from jax import lax

from negmaml.meta.inner import merge, split, stepped_rates, unstep


def backwards(transitions, gradient, frozen, visited, slope, mask):
    """The recursion at the head of this module, for any update that is driven by gradients.

    Arguments:
        gradient: of the loss on the support, a function of all parameters.
        visited: (parameters, state) that each step started from.
        slope: the gradient at the adapted parameters, of all parameters.

    Returns the gradient in the parameters and in `transitions.rates`. With the update
    (theta', s') = u(rates, g, s, theta), g = gradient(theta), a step maps the cotangents of
    (theta', s') to those of its arguments by the transpose of u, and that of g to theta by the
    Hessian, which is symmetric, so one forward derivative of `gradient` serves. Frozen
    parameters enter through g alone.
    """
    still = jax.tree.map(jnp.zeros_like, frozen)
    rates = jax.tree.leaves(transitions.rates)

    def back(carry, step):
        of_theta, of_state, of_frozen, of_fixed = carry
        (theta, state), stepped = step
        floats, rebuild = _floats(state)
        g, hessian = jax.linearize(gradient, merge(theta, frozen))

        def update(rates, g, floats, theta):
            theta, state = transitions.update(rates, g, rebuild(floats), theta)
            return theta, _floats(state)[0]

        arguments = unstep(transitions, stepped), split(g, mask)[0], floats, theta
        of_rates, of_g, of_state, of_theta = jax.vjp(update, *arguments)[1]((of_theta, of_state))
        through, past = split(hessian(merge(of_g, still)), mask)
        of_theta = jax.tree.map(jnp.add, of_theta, through)
        of_frozen = jax.tree.map(jnp.add, of_frozen, past)
        marked = list(zip(jax.tree.leaves(of_rates), transitions.stepped, strict=True))
        fixed = [rate for rate, stepped in marked if not stepped]
        of_fixed = [total + rate for total, rate in zip(of_fixed, fixed, strict=True)]
        return (of_theta, of_state, of_frozen, of_fixed), [r for r, stepped in marked if stepped]

    of_theta, of_frozen = split(slope, mask)
    state = jax.eval_shape(transitions.init, of_theta)
    of_state = [jnp.zeros(x.shape, x.dtype) for x in _floats(state)[0]]
    fixed = [r for r, stepped in zip(rates, transitions.stepped, strict=True) if not stepped]
    first = (of_theta, of_state, of_frozen, [jnp.zeros_like(rate) for rate in fixed])
    stepped = stepped_rates(transitions)
    if transitions.steps == 1:
        last, of_stepped = back(first, (visited, [rate[0] for rate in stepped]))
        of_stepped = [rate[None] for rate in of_stepped]
    else:
        last, of_stepped = lax.scan(back, first, (visited, stepped), reverse=True)
    of_theta, of_state, of_frozen, of_fixed = last
    if of_state:  # the state starts from the parameters
        start = visited[0] if transitions.steps == 1 else jax.tree.map(lambda x: x[0], visited[0])
        pull = jax.vjp(lambda theta: _floats(transitions.init(theta))[0], start)[1]
        of_theta = jax.tree.map(jnp.add, of_theta, pull(of_state)[0])
    parts = iter(of_stepped), iter(of_fixed)
    of_rates = [next(parts[0 if stepped else 1]) for stepped in transitions.stepped]
    return merge(of_theta, of_frozen), jax.tree.unflatten(
        jax.tree.structure(transitions.rates), of_rates
    )


def _floats(state):
    """The floating leaves of an optimizer's state, and the function that puts others in place."""
    leaves = jax.tree.leaves(state)
    real = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def rebuild(floats):
        own = iter(floats)
        marked = zip(leaves, real, strict=True)
        return jax.tree.unflatten(
            jax.tree.structure(state), [next(own) if r else leaf for leaf, r in marked]
        )

    return [leaf for leaf, r in zip(leaves, real, strict=True) if r], rebuild
