"""Learned inner losses: a function of the labels, a regularizer, and a preconditioner.

On sinusoids, a network 1-40-40-1 adapts in one step. Its inner loss on the support differs from the
outer loss on the query, and has meta-parameters, which `mask` excludes from adapting:

    loss            a small network of (prediction, label), next to the squared error
    regulariser     a penalty for each element of the weights, of either sign
    preconditioner  no other loss, but a matrix factor of the step for each element
"""

import jax
import jax.numpy as jnp
import optax

import negmaml as nm
from negmaml.examples import mlp


def of_query(meta, data):
    """Mean squared error of the model, without the learned part."""
    return mlp.loss(meta["model"], data)


def learned_loss(meta, data):
    """The squared error plus a learned function of predictions and labels."""
    x, y = data
    # The network again, since the learned part needs its predictions and not only its error.
    *hidden, (weight, bias) = meta["model"]
    h = x
    for w, b in hidden:
        h = jax.nn.relu(h @ w + b)
    pairs = jnp.concatenate([h @ weight + bias, y], -1)
    first, last = meta["extra"]
    return of_query(meta, data) + jnp.mean(jnp.tanh(pairs @ first) @ last)


def learned_regulariser(meta, data):
    """The squared error plus squared weights, each with its own learned strength."""
    parts = jax.tree.map(lambda s, w: jnp.sum(s * w**2), meta["extra"], meta["model"])
    return of_query(meta, data) + sum(jax.tree.leaves(parts))


def main(steps: int = 2000, rate: float = 0.01, seed: int = 0) -> dict[str, float]:
    """Return the test loss of each after meta-training, and that of MAML."""
    keys = jax.random.split(jax.random.key(seed), 4)
    model, tasks = mlp.init(keys[0]), nm.tasks.Sinusoid(m=25, n_t=10, n_v=10)
    # Every learned part starts without effect, so that all variants start as plain MAML.
    zeros = jax.tree.map(jnp.zeros_like, model)
    network = (jax.random.normal(keys[3], (2, 16)), jnp.zeros((16, 1)))
    extras: dict[str, tuple] = {"plain": ((), None), "loss": (network, learned_loss),
              "regulariser": (zeros, learned_regulariser)}  # fmt: skip
    rule, results = nm.GradientDescent(rate), {}
    for name, (extra, inner) in extras.items():
        meta, mask = {"model": model, "extra": extra}, {"model": True, "extra": False}
        value_and_grad = nm.maml_value_and_grad(of_query, rule, inner_loss=inner, mask=mask)
        trained = nm.fit(keys[1], meta, value_and_grad, tasks, optax.adam(1e-3), steps).params
        # Adapting uses the learned loss, while the plain error measures all variants alike.
        test = nm.evaluate(keys[2], trained, inner or of_query, rule, tasks, metric=of_query,
                           mask=mask)  # fmt: skip
        results[name] = float(test.mean)

    def preconditioned(meta, tasks):  # the factors are numbers of the rule
        def objective(meta):
            own = nm.Preconditioned(rate, meta["extra"])
            return nm.maml(mlp.loss, own)(meta["model"], tasks)

        return jax.value_and_grad(objective)(meta)

    # Factors of one: plain gradient descent.
    meta = {"model": model, "extra": jax.tree.map(jnp.ones_like, model)}
    trained = nm.fit(keys[1], meta, preconditioned, tasks, optax.adam(1e-3), steps).params
    own = nm.Preconditioned(rate, trained["extra"])
    test = nm.evaluate(keys[2], trained["model"], mlp.loss, own, tasks)
    return results | {"preconditioner": float(test.mean)}


if __name__ == "__main__":
    import tyro

    for name, value in tyro.cli(main).items():
        print(f"{name:15} test loss {value:.3f}")
