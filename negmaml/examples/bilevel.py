"""Hyperparameters by implicit derivatives: of a ridge, of weight decays, of weights of the data.

    theta(h) = argmin_theta inner(theta, h; training data),    minimise outer(theta(h); other data)

`nm.Implicit` gives theta(h) a derivative in h for any solver. Each problem compares its
hypergradient with that of another method:

    ridge         one penalty of linear regression, against the closed form
    decays        one weight decay for each parameter, by `fit`, against unrolled gradient descent
    reweighting   one weight for each training row, of which half have false labels, against
                  influence functions with a dense Hessian

Sources: Lorraine, Vicol and Duvenaud, AISTATS 2020; Koh and Liang, ICML 2017.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import negmaml as nm


class BilevelResult(NamedTuple):
    """A problem: outer losses before and after, hyperparameters, and error of the hypergradient.

    gradient_error: |difference to the other method| over its size, at the first hyperparameters.
    """

    before: float
    after: float
    hyperparameters: jax.Array
    gradient_error: float


def squared_error(w, data):
    """Half the mean squared error of a linear model."""
    X, y = data
    return jnp.mean((X @ w - y) ** 2) / 2


def logistic(w, data, weights=1.0):
    """The logistic loss of a linear model for labels of -1 and 1, with weights of the rows."""
    X, y = data
    return jnp.mean(weights * jnp.logaddexp(0, -y * (X @ w)))


def regression(key, rows: int, inputs: int = 20, relevant: int = 4, noise: float = 1.0):
    """Rows of a linear model in which few inputs matter."""
    kx, ke = jax.random.split(key)
    X = jax.random.normal(kx, (rows, inputs))
    return X, X[:, :relevant].sum(1) + noise * jax.random.normal(ke, (rows,))


def newton(objective, start):
    """One Newton step, the exact solution of a quadratic problem: a solver for any pytree."""
    w, unravel = ravel_pytree(start)

    def flat(w):
        return objective(unravel(w))

    return unravel(w - jnp.linalg.solve(jax.hessian(flat)(w), jax.grad(flat)(w)))


def ridge(key, steps: int) -> BilevelResult:
    """Choose the penalty of ridge regression on validation rows."""
    train, test = (regression(k, n) for k, n in zip(jax.random.split(key), (30, 300), strict=True))
    rule = nm.Implicit(newton)

    def outer(log_penalty):
        def inner(w, data):
            return squared_error(w, data) + jnp.exp(log_penalty) / 2 * jnp.sum(w**2)

        return squared_error(nm.adapt(inner, jnp.zeros(20), train, rule), test)

    def closed_form(log_penalty):
        X, y = train
        S = X.T @ X / len(y)
        w = jnp.linalg.solve(S + jnp.exp(log_penalty) * jnp.eye(20), X.T @ y / len(y))
        return squared_error(w, test)

    return _learn(outer, jnp.asarray(-6.0), jax.grad(closed_form), optax.adam(0.1), steps)


def decays(key, steps: int) -> BilevelResult:
    """Learn one weight decay for each parameter as frozen leaves of the meta-parameters."""
    train, test = (regression(k, n) for k, n in zip(jax.random.split(key), (30, 300), strict=True))
    tasks = jax.tree.map(lambda x: x[None], nm.Tasks(train, test))
    mask = {"w": True, "log_decay": False}

    def outer_loss(params, data):
        return squared_error(params["w"], data)

    def inner_loss(params, data):
        penalty = jnp.sum(jnp.exp(params["log_decay"]) * params["w"] ** 2) / 2
        return squared_error(params["w"], data) + penalty

    def value_and_grad(rule):
        return nm.maml_value_and_grad(outer_loss, rule, inner_loss=inner_loss, mask=mask)

    # Conjugate gradients suit a minimum, where H is positive definite.
    implicit = value_and_grad(nm.Implicit(newton, linear_solver="cg"))
    start = {"w": jnp.zeros(20), "log_decay": jnp.full(20, -3.0)}
    before, found = implicit(start, tasks)
    # The other method differentiates the path, which has to be long enough to end at the minimum.
    expected = value_and_grad(nm.GradientDescent(0.2, steps=3000))(start, tasks)[1]
    trained = nm.fit(key, start, implicit, tasks, optax.adam(0.1), steps).params
    return BilevelResult(
        float(before), float(implicit(trained, tasks)[0]), trained["log_decay"],
        _error(found["log_decay"], expected["log_decay"]),
    )  # fmt: skip


def reweighting(key, steps: int, rows: int = 100, inputs: int = 10) -> BilevelResult:
    """Learn weights of the training rows on few clean rows; the first half has random labels."""
    keys = jax.random.split(key, 3)
    X = jax.random.normal(keys[0], (2 * rows, inputs))
    y = jnp.sign(X.sum(1))
    noisy = y.at[: rows // 2].set(jax.random.rademacher(keys[1], (rows // 2,), float))
    train, clean = (X[:rows], noisy[:rows]), (X[rows:], y[rows:])
    rule = nm.Implicit(optax.lbfgs(), tolerance=1e-4)

    def inner(w, logits):
        return logistic(w, train, jax.nn.sigmoid(logits)) + 0.01 * jnp.sum(w**2)

    def solution(logits):
        return nm.adapt(lambda w, _: inner(w, logits), jnp.zeros(inputs), None, rule)

    def influence(logits):
        """The derivative of theta is -H^{-1} d grad inner: one row of it for each weight."""
        w = solution(logits)
        slope = jnp.linalg.solve(jax.hessian(inner)(w, logits), jax.grad(logistic)(w, clean))
        return -jax.jacobian(jax.grad(inner), argnums=1)(w, logits).T @ slope

    def outer(logits):
        return logistic(solution(logits), clean)

    return _learn(outer, jnp.zeros(rows), influence, optax.adam(0.3), steps)


def _learn(outer, start, other_gradient, optimizer, steps: int) -> BilevelResult:
    """Minimise `outer` by its implicit gradient, compared with another one at the start."""
    value_and_grad = jax.value_and_grad(outer)
    before, first = jax.jit(value_and_grad)(start)

    def step(carry, _):
        hyper, state = carry
        updates, state = optimizer.update(value_and_grad(hyper)[1], state, hyper)
        return (optax.apply_updates(hyper, updates), state), None

    carry = start, optimizer.init(start)
    (hyper, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))(carry)
    error = _error(first, jax.jit(other_gradient)(start))
    return BilevelResult(float(before), float(jax.jit(outer)(hyper)), hyper, error)


def _error(found, expected) -> float:
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def main(steps: int = 100, seed: int = 0) -> dict[str, BilevelResult]:
    """Learn the hyperparameters of all three problems."""
    keys = jax.random.split(jax.random.key(seed), 3)
    problems = {"ridge": ridge, "decays": decays, "reweighting": reweighting}
    return {name: problems[name](k, steps) for name, k in zip(problems, keys, strict=True)}


if __name__ == "__main__":
    import tyro

    for name, result in tyro.cli(main).items():
        print(
            f"{name:12} outer loss {result.before:.3f} -> {result.after:.3f}, error of the "
            f"hypergradient {result.gradient_error:.1e}"
        )
