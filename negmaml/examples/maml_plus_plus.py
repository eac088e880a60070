r"""MAML++ (Antoniou, Edwards and Storkey, ICLR 2019) on sinusoids, as an objective of one's own.

Its parts, on top of MAML: rates learned for every layer and step, which may turn negative; the
query loss after every inner step, weighted, where the last step gains weight as training goes on;
normalisation with running statistics of each inner step; an outer rate annealed by a cosine.
"""

import jax
import jax.numpy as jnp
import optax

import negmaml as nm

WIDTH = 40


def init(key):
    """Two hidden layers, each with a gain and a shift after its normalisation."""
    keys = jax.random.split(key, 3)
    shapes = [(1, WIDTH), (WIDTH, WIDTH), (WIDTH, 1)]
    return [
        {"w": jax.random.normal(k, s) * (2 / s[0]) ** 0.5, "gain": jnp.ones(s[1]),
         "shift": jnp.zeros(s[1])} for k, s in zip(keys, shapes, strict=True)
    ]  # fmt: skip


def network(layers, statistics, x, momentum=0.9):
    """The prediction, and the running (mean, variance) of the inputs of each activation."""
    new = []
    for layer, (mean, variance) in zip(layers, statistics, strict=False):
        z = x @ layer["w"]
        mean, variance = (momentum * old + (1 - momentum) * now for old, now in
                          ((mean, z.mean(0)), (variance, z.var(0))))  # fmt: skip
        new.append((mean, variance))
        x = jax.nn.relu(layer["gain"] * (z - mean) / jnp.sqrt(variance + 1e-5) + layer["shift"])
    last = layers[-1]
    return x @ last["w"] + last["shift"], new


def loss(layers, statistics, data):
    """Mean squared error, and the new statistics."""
    predicted, new = network(layers, statistics, data[0])
    return jnp.mean((predicted - data[1]) ** 2), new


def objective(meta, state, tasks, inner_steps, annealed):
    """The weighted query losses of all inner steps, and the statistics of each step."""
    statistics, count = state
    last = jnp.minimum(count / annealed, 1.0)  # from equal weights to the last step alone
    weights = jnp.full(inner_steps, (1 - last) / inner_steps).at[-1].add(last)

    def one_task(support, query):
        layers, losses, kept = meta.params, [], []
        for k in range(inner_steps):
            rates = [rate.values[k] for rate in meta.rate]
            own = jax.tree.map(lambda x, k=k: x[k], statistics)
            point = nm.Stateful(layers, own)
            layers, own = nm.adapt(loss, point, support, nm.GradientDescent(rates))
            value, own = loss(layers, own, query)
            losses.append(value)
            kept.append(own)
        return jnp.stack(losses), jax.tree.map(lambda *x: jnp.stack(x), *kept)

    losses, kept = jax.vmap(one_task)(*tasks)
    return jnp.mean(losses @ weights), (jax.tree.map(lambda x: x.mean(0), kept), count + 1)


def main(steps: int = 3000, inner_steps: int = 3, rate: float = 0.02, seed: int = 0):
    """(test loss by inner step before meta-training and after, the learned rates)."""
    keys = jax.random.split(jax.random.key(seed), 3)
    rates = [nm.Schedule(jnp.full(inner_steps, rate)) for _ in range(3)]
    ones = [(jnp.zeros((inner_steps, WIDTH)), jnp.ones((inner_steps, WIDTH))) for _ in range(2)]
    start = nm.Stateful(nm.LearnedRates(init(keys[0]), rates), (ones, jnp.zeros(())))

    def value_and_grad(meta, tasks):
        of_params = lambda p: objective(p, meta.state, tasks, inner_steps, steps / 4)  # noqa: E731
        (value, state), gradient = jax.value_and_grad(of_params, has_aux=True)(meta.params)
        return value, nm.Stateful(gradient, state)

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    tasks = nm.tasks.Sinusoid(m=25, n_t=10, n_v=10)
    trained = nm.fit(keys[1], start, value_and_grad, tasks, optimizer, steps).params

    def test(meta):
        by_step, init_state = nm.state_per_step(loss, inner_steps - 1)
        _, first_step = init_state(())
        point = nm.Stateful(meta.params.params, (meta.state[0], first_step))
        rule = nm.GradientDescent(meta.params.rate, inner_steps)
        return nm.evaluate(keys[2], point, by_step, rule, tasks, by_step=True)

    return test(start), test(trained), [rate.values for rate in trained.params.rate]


if __name__ == "__main__":
    import tyro

    before, after, rates = tyro.cli(main)
    print("before meta-training", before, "after it", after, sep="\n")
    for layer, values in enumerate(rates):
        print(f"rates of layer {layer} by step: {', '.join(f'{r:.4f}' for r in values)}")
