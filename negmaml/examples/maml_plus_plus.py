r"""MAML++ (Antoniou, Edwards and Storkey, ICLR 2019) on sinusoids, as a custom objective.

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
    # Activations shift as weights adapt, so every inner step has statistics of its own.
    stepwise_loss, stack_state = nm.per_step_state(loss, inner_steps)

    def objective(meta, state, tasks):
        """Weighted query losses of all inner steps, and the running statistics of each step."""
        # `count` is the outer step, on which the weights of the inner steps depend.
        (statistics, place), count = state
        last = jnp.minimum(4 * count / steps, 1.0)  # from equal weights to the last step only
        weights = jnp.full(inner_steps, (1 - last) / inner_steps).at[-1].add(last)

        def one_task(support, query):
            point, losses = nm.Stateful(meta.params, (statistics, place)), []
            for k in range(inner_steps):
                rule = nm.GradientDescent([own.values[k] for own in meta.rate])
                point = nm.adapt(stepwise_loss, point, support, rule)
                value, (own, _) = stepwise_loss(point.params, point.state, query)
                losses.append(value)
            return jnp.stack(losses) @ weights, own

        values, kept = jax.vmap(one_task)(*tasks)
        # Tasks run in parallel from the same statistics, and their mean is kept.
        return values.mean(), ((jax.tree.map(lambda x: x.mean(0), kept), place), count + 1)

    def value_and_grad(meta, tasks):
        # Only parameters and rates have a gradient; the state is replaced by its new value.
        of_all = jax.value_and_grad(objective, has_aux=True)
        (value, state), gradient = of_all(meta.params, meta.state, tasks)
        return value, nm.Stateful(gradient, state)

    def test(meta):
        rule = nm.GradientDescent(meta.params.rate, inner_steps)
        point = nm.Stateful(meta.params.params, meta.state[0])
        return nm.evaluate(for_test, point, stepwise_loss, rule, tasks, per_step=True)

    # One schedule for each of three layers, a prefix of the parameters.
    rates = [nm.Schedule(jnp.full(inner_steps, rate)) for _ in range(3)]
    statistics = stack_state([(jnp.zeros(WIDTH), jnp.ones(WIDTH)) for _ in range(2)])
    start = nm.Stateful(nm.MetaSGDParams(init(for_params), rates), (statistics, jnp.zeros(())))
    tasks = nm.tasks.Sinusoid(m=25, n_t=10, n_v=10)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    trained = nm.fit(for_training, start, value_and_grad, tasks, optimizer, steps).params
    return test(start), test(trained), [rate.values for rate in trained.params.rate]


if __name__ == "__main__":
    import tyro

    before, after, rates = tyro.cli(main)
    print("before meta-training", before, "after it", after, sep="\n")
    for layer, values in enumerate(rates):
        print(f"rates of layer {layer} by step: {', '.join(f'{r:.4f}' for r in values)}")
