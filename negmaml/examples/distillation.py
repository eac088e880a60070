"""Distillation: ten synthetic images that a classifier of handwritten digits is trained on.

    theta(D) = K steps of gradient descent on the distilled images and labels D, from zero,
    minimise over D the loss of theta(D) on the training images

The inner problem is linear regression on one-hot labels. Its K steps have a closed form, by which
the derivative through the steps is checked: with the Gram matrix G = X X^T / n of the distilled
images, theta = X^T (G^{-1} (I - (I - rate G)^K)) Y / n. Source: Wang et al., "Dataset
Distillation", 2018; for K to infinity the solution is that of Nguyen, Chen and Lee, "Dataset
Meta-Learning from Kernel Ridge-Regression", ICLR 2021.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import negmaml as nm

CLASSES, PIXELS = 10, 64


class DistillationResult(NamedTuple):
    """Accuracies on test images, and the error of the gradient.

    distilled, real: after training on the distilled images, and on one real image of each digit.
    gradient_error: |difference to the closed form| over its size, at the first images.
    images: the distilled images, of shape (10, 8, 8).
    """

    distilled: float
    real: float
    gradient_error: float
    images: jax.Array


def squared_error(w, data):
    """Half the mean squared error of a linear model."""
    images, labels = data
    return jnp.sum((images @ w - labels) ** 2) / len(images) / 2


def by_steps(rule):
    """Return the outer loss of distilled data, through the steps of the rule."""

    def outer(distilled, data):
        start = jnp.zeros((PIXELS, CLASSES))
        # Parameters before every 15th or so of 200 steps are stored.
        w = nm.adapt(squared_error, start, distilled, rule, remat=True, segment="sqrt")
        return squared_error(w, data)

    return outer


def by_closed_form(rule):
    """Return the outer loss of distilled data, by the filter of the rule on the Gram matrix."""

    def outer(distilled, data):
        X, Y = distilled
        gram = X @ X.T / len(X)
        identity = jnp.eye(len(X))
        left = identity - jnp.linalg.matrix_power(identity - rule.rate * gram, rule.steps)
        return squared_error(X.T @ jnp.linalg.solve(gram, left @ Y) / len(X), data)

    return outer


def main(
    steps: int = 1000, inner_steps: int = 200, rate: float = 1.0, seed: int = 0
) -> DistillationResult:
    """Distil the data set of scikit-learn (1797 images of 8x8) into one image of each digit."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    X = jnp.asarray(digits.data[order] / 16 / 4, jnp.float32)  # rows of norm about 1
    labels = digits.target[order]
    Y = jnp.eye(CLASSES)[labels]
    train, test = (X[:1000], Y[:1000]), (X[1000:], labels[1000:])
    rule = nm.GradientDescent(rate, inner_steps)

    # The first image of each digit, which training starts from and is compared with.
    first = np.array([np.argmax(labels == digit) for digit in range(CLASSES)])
    real = X[first], Y[first]
    outer = by_steps(rule)
    found, expected = (jax.jit(jax.grad(f))(real, train) for f in (outer, by_closed_form(rule)))
    error, size = (optax.tree.norm(tree) for tree in (optax.tree.sub(found, expected), expected))

    def batch(key):
        rows = jax.random.choice(key, len(train[0]), (256,), replace=False)
        return train[0][rows], train[1][rows]

    key = jax.random.key(seed)
    value_and_grad = jax.value_and_grad(outer)
    found = nm.fit(key, real, value_and_grad, batch, optax.adam(3e-3), steps)

    def accuracy(data):
        w = nm.adapt(squared_error, jnp.zeros((PIXELS, CLASSES)), data, rule)
        return float(jnp.mean(jnp.argmax(test[0] @ w, -1) == test[1]))

    distilled = found.params
    images = distilled[0].reshape(CLASSES, 8, 8)
    return DistillationResult(accuracy(distilled), accuracy(real), float(error / size), images)


if __name__ == "__main__":
    import tyro

    result = tyro.cli(main)
    print(f"test accuracy: distilled {result.distilled:.3f}, real images {result.real:.3f}")
    print(f"error of the gradient through the steps {result.gradient_error:.1e}")
