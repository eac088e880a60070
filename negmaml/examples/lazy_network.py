"""Compares gradient descent on a network with the exact solutions in its kernels.

A network of one wide layer is meta-trained on three tasks of quadratic regression, at a negative, a
zero and a positive training rate, by gradient descent on the meta-loss. If the network is lazy, the
tangent kernel at its initial parameters gives the result without training. The kernel of infinite
width gives it for all such networks. With `output` below 1 the parameters move further for the same
outputs, which does not change the kernel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import negmaml as nm

P, SIGMA, NU = 10, 0.5, 1.0  # inputs, noise, standard deviation of tasks


class LazyResult(NamedTuple):
    """Test losses over the training rate: trained, exact in its kernel, exact at infinite width."""

    rates: np.ndarray
    network: np.ndarray
    kernel: np.ndarray
    limit: np.ndarray


def network(params, x):
    """One hidden layer, scaled so that rates do not depend on the width."""
    hidden = jax.nn.relu((2 / x.shape[1]) ** 0.5 * x @ params["in"] + params["bias"] / 2**0.5)
    return (2 / hidden.shape[1]) ** 0.5 * hidden @ params["out"]


def init(key, width):
    """Standard normal parameters."""
    keys = jax.random.split(key, 3)
    shapes = {"in": (P, width), "bias": (width,), "out": (width,)}
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def main(width: int = 1024, output: float = 1.0, steps: int = 300, seed: int = 0) -> LazyResult:
    """Solve exactly in both kernels, train, and test on 200 new tasks."""
    keys = jax.random.split(jax.random.key(seed), 3)
    tasks = nm.tasks.Quadratic(m=3, n_t=20, n_v=4, p=P, sigma=SIGMA, nu=NU)(keys[0])
    fresh = nm.tasks.Quadratic(m=200, n_t=20, n_v=20, p=P, sigma=SIGMA, nu=NU)(keys[1])
    start = init(keys[2], width)
    tangent = nm.kernels.empirical_ntk(network, start)
    infinite = nm.kernels.relu_network(1, bias_variance=0.5)

    # One estimate of the largest curvature sets the scale of all rates and of the ridge.
    x = fresh.support[0][:20].reshape(-1, P)
    largest = float(jnp.linalg.eigvalsh(infinite(x, x) / len(x))[-1])
    rates, adapt = jnp.array([-1.0, 0.0, 1.0]) / largest, 0.4 / largest
    # The meta-system is a sum over query rows, and so is the unit of its ridge.
    rows, ridge = tasks.query[1].size, 0.01 * tasks.query[1].size * largest

    def exact(kernel):
        rule = nm.GradientDescent(rates)
        model = nm.kernels.meta_train(kernel, tasks, rule, meta_ridge=ridge)
        return np.asarray(model.loss(fresh, nm.GradientDescent(adapt)))

    def trained(rate, start, fresh):
        def loss(params, data):
            x, y = data
            # Less its value at the start, the network begins at f_0 = 0 as the kernel's model does.
            return jnp.mean((output * (network(params, x) - network(start, x)) - y) ** 2) / 2

        # Curvatures are proportional to output^2, so inner rates are divided by it.
        algorithm = nm.maml_value_and_grad(loss, nm.GradientDescent(rate / output**2))

        def with_ridge(params, tasks):
            value, gradient = algorithm(params, tasks)
            # The slope of ridge |f - f_0|^2, with f - f_0 = output J moved in the lazy regime. The
            # meta-loss of the kernel is a sum over rows, and this one a mean, hence 1 / rows.
            pull = ridge * output**2 / rows
            moved = jax.tree.map(jnp.subtract, params, start)
            return value, jax.tree.map(lambda g, d: g + pull * d, gradient, moved)

        optimizer = optax.sgd(0.05 / (largest * output**2), 0.9, nesterov=True)
        params = nm.fit(keys[0], start, with_ridge, tasks, optimizer, steps).params
        return nm.maml(loss, nm.GradientDescent(adapt / output**2))(params, fresh)

    # A loop over rates compiles training once and holds one wide network at a time.
    each = jax.jit(lambda rates, *data: lax.map(lambda rate: trained(rate, *data), rates))
    networks = np.asarray(each(rates, start, fresh))
    return LazyResult(np.asarray(rates), networks, exact(tangent), exact(infinite))


if __name__ == "__main__":
    import tyro

    result = tyro.cli(main)
    print("training rate   network    kernel   infinite width")
    for row in zip(*result, strict=True):
        print("{:13.3f} {:9.4f} {:9.4f} {:16.4f}".format(*row))
