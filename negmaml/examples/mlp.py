"""The network of the sinusoid examples: ReLU layers as a list of (weight, bias)."""

from itertools import pairwise

import jax
import jax.numpy as jnp


def init(key, sizes=(1, 40, 40, 1)):
    """He-normal weights and zero biases."""
    shapes = list(pairwise(sizes))
    keys = jax.random.split(key, len(shapes))
    # ReLU halves the second moment of its input, which the factor 2 makes up for.
    return [
        (jax.random.normal(k, shape) * (2 / shape[0]) ** 0.5, jnp.zeros(shape[1]))
        for k, shape in zip(keys, shapes, strict=True)
    ]


def loss(params, data):
    """Mean squared error on (x, y)."""
    x, y = data
    *hidden, (weight, bias) = params
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return jnp.mean((x @ weight + bias - y) ** 2)
