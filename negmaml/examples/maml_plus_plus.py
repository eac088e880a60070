r"""MAML++ (Antoniou, Edwards and Storkey, ICLR 2019) on sinusoids.

It adds to MAML: learned rates for every layer and step, which may become negative; a weighted sum
of query losses after every inner step, in which the last step gains weight during training; running
normalization statistics for each inner step; and a cosine schedule of the outer rate.
"""

import jax
import jax.numpy as jnp
import optax

import negmaml as nm

WIDTH = 40


def init(key):
    """Two hidden layers, each with a gain and a shift after its normalisation."""
    shapes = [(1, WIDTH), (WIDTH, WIDTH), (WIDTH, 1)]
    weights = [jax.random.normal(jax.random.fold_in(key, i), s) * (2 / s[0]) ** 0.5
               for i, s in enumerate(shapes)]  # fmt: skip
    ones = [jnp.ones(w.shape[1]) for w in weights]
    return [{"w": w, "gain": one, "shift": 0 * one} for w, one in zip(weights, ones, strict=True)]


def loss(layers, statistics, data):
    """Mean squared error, and the running (mean, variance) of the inputs of each activation."""
    (x, y), (*hidden, last), new = data, layers, []
    for layer, held in zip(hidden, statistics, strict=True):
        z = x @ layer["w"]
        # A running mean scatters less than the statistics of the ten points of a support.
        mean, var = (0.9 * a + 0.1 * b for a, b in zip(held, (z.mean(0), z.var(0)), strict=True))
        x = jax.nn.relu(layer["gain"] * (z - mean) / jnp.sqrt(var + 1e-5) + layer["shift"])
        new.append((mean, var))
    return jnp.mean((x @ last["w"] + last["shift"] - y) ** 2), new


def main(steps: int = 3000, inner_steps: int = 3, rate: float = 0.02, seed: int = 0):
    """Return the test loss per inner step before and after meta-training, and the learned rates."""
    for_params, for_training, for_test = jax.random.split(jax.random.key(seed), 3)
    statistics = [(jnp.zeros(WIDTH), jnp.ones(WIDTH)) for _ in range(2)]
    model = nm.Stateful(init(for_params), statistics)
    # A rate for each of three layers, a prefix of the parameters; and each of them for each step.
    start = nm.maml_plus_plus_params(model, rate=[rate] * 3, steps=inner_steps)
    gradient = nm.maml_plus_plus(loss, annealing=steps // 4)
    tasks = nm.tasks.Sinusoid(m=25, n_t=10, n_v=10)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    trained = nm.fit(for_training, start, gradient, tasks, optimizer, steps).params
    before, after = (
        nm.evaluate(for_test, meta.params, loss, meta.rule, tasks, per_step=True)
        for meta in (start, trained)
    )
    return before, after, [rate.values for rate in trained.rate]


if __name__ == "__main__":
    import tyro

    before, after, rates = tyro.cli(main)
    print("before meta-training", before, "after it", after, sep="\n")
    for layer, values in enumerate(rates):
        print(f"rates of layer {layer} by step: {', '.join(f'{r:.4f}' for r in values)}")
