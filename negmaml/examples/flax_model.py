"""MAML on a Flax module: its parameters are the pytree, its `apply` defines the loss."""

import jax
import jax.numpy as jnp
import optax
from flax import linen

import negmaml as nm


class Network(linen.Module):
    """Two hidden layers."""

    units: int = 40

    @linen.compact
    def __call__(self, x):
        for _ in range(2):
            x = linen.relu(linen.Dense(self.units)(x))
        return linen.Dense(1)(x)


def main(steps: int = 2000, rate: float = 0.01, seed: int = 0) -> tuple[float, float]:
    """Return the test loss before and after meta-training on sinusoids."""
    model = Network()

    # The parameters are an argument, since an inner step replaces them.
    def loss(params, data):
        x, y = data
        return jnp.mean((model.apply(params, x) - y) ** 2)

    keys = jax.random.split(jax.random.key(seed), 3)
    # Flax infers the shapes of the weights from an example of the input.
    params = model.init(keys[0], jnp.ones((1, 1)))
    rule, tasks = nm.GradientDescent(rate), nm.tasks.Sinusoid(m=25, n_t=10, n_v=10)
    value_and_grad = nm.maml_value_and_grad(loss, rule)
    trained = nm.fit(keys[1], params, value_and_grad, tasks, optax.adam(1e-3), steps).params
    test, fresh = nm.maml(loss, rule), nm.tasks.Sinusoid(m=1000, n_t=10, n_v=10)(keys[2])
    return float(test(params, fresh)), float(test(trained, fresh))


if __name__ == "__main__":
    import tyro

    print("test loss before and after: {:.3f}, {:.3f}".format(*tyro.cli(main)))
