"""MAML on a Flax NNX module, which is passed as it is and comes back trained."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import negmaml as nm


class Network(nnx.Module):
    """Two hidden layers."""

    def __init__(self, rngs: nnx.Rngs, units: int = 40):
        self.first = nnx.Linear(1, units, rngs=rngs)
        self.second = nnx.Linear(units, units, rngs=rngs)
        self.last = nnx.Linear(units, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.second(nnx.relu(self.first(x)))))


def loss(network: Network, data):
    """The mean squared error."""
    x, y = data
    return jnp.mean((network(x) - y) ** 2)


def main(steps: int = 2000, rate: float = 0.01, seed: int = 0) -> tuple[float, float]:
    """Return the test loss before and after meta-training on sinusoids."""
    network, key = Network(nnx.Rngs(seed)), jax.random.key(seed)
    rule, tasks = nm.GradientDescent(rate), nm.tasks.Sinusoid(m=25, n_t=10, n_v=10)
    value_and_grad = nm.maml_value_and_grad(loss, rule)
    trained = nm.fit(key, network, value_and_grad, tasks, optax.adam(1e-3), steps).params
    # The key of the test differs from those of training.
    test, fresh = nm.maml(loss, rule), nm.tasks.Sinusoid(m=1000, n_t=10, n_v=10)
    tested = fresh(jax.random.fold_in(key, 1))
    return float(test(network, tested)), float(test(trained, tested))


if __name__ == "__main__":
    import tyro

    print("test loss before and after: {:.3f}, {:.3f}".format(*tyro.cli(main)))
