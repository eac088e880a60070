"""The meta-system by dense matrix functions in NumPy, and a rule that takes the general route."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.linalg

import negmaml as nm


@nm.pytree
class General(nm.InnerRule):
    """A gradient step known by its label filter only, so that the general route serves it."""

    rate: Any

    def label_filter(self, x):
        rate, x = jnp.asarray(self.rate), jnp.asarray(x)
        return rate.reshape(rate.shape + (1,) * x.ndim) * jnp.ones_like(x)


def dense_filters(rule, S):
    """(b(S), q(S)) as p x p matrices, by products, exponentials and inverses of matrices."""
    identity = np.eye(len(S))
    if isinstance(rule, nm.GradientDescent):
        step = identity - rule.rate * S
        powers = [np.linalg.matrix_power(step, k) for k in range(rule.steps + 1)]
        return powers[-1], rule.rate * sum(powers[:-1])
    if isinstance(rule, nm.GradientFlow):
        # exp of [[-S, I], [0, 0]] t has int_0^t exp(-s S) ds as its upper right block.
        zero = np.zeros_like(S)
        flow = scipy.linalg.expm(rule.time * np.block([[-S, identity], [zero, zero]]))
        return flow[: len(S), : len(S)], flow[: len(S), len(S) :]
    q = np.linalg.pinv(S + rule.strength * identity)  # the limit, at strength zero
    return identity - q @ S, q


def dense_system(data, rule):
    """(Phi, r) task by task from the definition, for a rule with one strength."""
    Phi, r = [], []
    for X_t, y_t, X_v, y_v in zip(*(np.asarray(leaf) for leaf in data), strict=True):
        b, q = dense_filters(rule, X_t.T @ X_t / len(y_t))
        Phi.append(X_v @ b)
        r.append(y_v - X_v @ q @ X_t.T @ y_t / len(y_t))
    return np.concatenate(Phi), np.concatenate(r)
