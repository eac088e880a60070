"""The meta-system by dense matrix functions in NumPy."""

import numpy as np
import scipy.linalg

import negmaml as nm


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
