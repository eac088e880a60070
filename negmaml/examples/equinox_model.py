"""ANIL on an unchanged Equinox module: only its last layer adapts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import negmaml as nm


def main(steps: int = 2000, rate: float = 0.05, seed: int = 0) -> tuple[float, float]:
    """Return the test loss before and after meta-training (ANIL) on sinusoids."""
    keys = jax.random.split(jax.random.key(seed), 3)
    model = eqx.nn.MLP(in_size=1, out_size=1, width_size=40, depth=2, key=keys[0])

    def loss(model, data):
        x, y = data
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    # A mask is a tree of booleans like the model; only the last layer is marked to adapt.
    nothing = jax.tree.map(lambda _: False, model)
    head = eqx.tree_at(lambda m: (m.layers[-1].weight, m.layers[-1].bias), nothing, (True, True))
    rule, tasks = nm.GradientDescent(rate), nm.tasks.Sinusoid(m=25, n_t=10, n_v=10)
    value_and_grad = nm.anil(loss, rule, head)
    trained = nm.fit(keys[1], model, value_and_grad, tasks, optax.adam(1e-3), steps).params
    # The mask of training again, or all layers would adapt at test time.
    test = nm.maml(loss, rule, mask=head)
    fresh = nm.tasks.Sinusoid(m=1000, n_t=10, n_v=10)(keys[2])
    return float(test(model, fresh)), float(test(trained, fresh))


if __name__ == "__main__":
    import tyro

    print("test loss before and after: {:.3f}, {:.3f}".format(*tyro.cli(main)))
