"""Lazy networks against real ones, and whether the training rate matters for either.

    python benchmarks/lazy.py widths    networks of growing width beside their kernels: a figure
    python benchmarks/lazy.py rates     the best training rate of kernels and networks: a table

Rates are in units of 1/lambda, lambda the largest eigenvalue of the infinite kernel over inputs,
and a loss is half the mean squared error. Training is on a fixed set of few tasks. Networks of
`widths` are centred (their value at the start is taken off), as the infinite kernel's prior mean is
zero, and pulled to their start by the ridge that the kernels have, so that training converges.
"""

import argparse
import json
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import Partial

import negmaml as nm
from negmaml.examples import digits, mlp
from negmaml.kernels.system import own_blocks, systems

BIAS = 0.5  # variance of biases, in networks and in the infinite kernel
RIDGE = 0.003  # meta-ridge over rows of the query and lambda
UNITS = np.linspace(-1.2, 1.2, 9)  # training rates times lambda
ADAPT = np.array([0.05, 0.1, 0.2, 0.4, 0.7, 1.0])  # adaptation rates times lambda


def quadratic(m, n_t, n_v):
    return nm.tasks.Quadratic(p=10, m=m, n_t=n_t, n_v=n_v, sigma=0.5, nu=1.0)


def sinusoid(m, n_t, n_v):
    family = nm.tasks.Sinusoid(m=m, n_t=n_t, n_v=n_v)
    return lambda key: nm.Tasks(*((x, y[..., 0]) for x, y in family(key)))


FAMILIES = {
    "quadratic": (quadratic, (3, 20, 4), (50, 20, 20), 10),
    "sinusoid": (sinusoid, (4, 10, 5), (50, 10, 20), 1),
}


def init(key, sizes):
    keys = iter(jax.random.split(key, 2 * len(sizes)))
    shapes = pairwise(sizes)
    return [
        (jax.random.normal(next(keys), s), jax.random.normal(next(keys), s[1:])) for s in shapes
    ]


def network(params, x):
    """ReLU layers in the scaling of `relu_network`, one output."""
    for i, (weight, shift) in enumerate(params):
        x = jax.nn.relu(x) if i else x
        x = (2 / len(weight)) ** 0.5 * (x @ weight) + BIAS**0.5 * shift
    return x[:, 0]


def centred(start, params, x):
    return network(params, x) - network(start, x)


def largest_eigenvalue(kernel, family):
    x = family(400, 1, 1)(jax.random.key(99)).support[0].reshape(400, -1)
    return float(jnp.linalg.eigvalsh(kernel(x, x) / 400)[-1])


def square_loss(apply, params, data):
    x, y = data
    return jnp.mean((apply(params, x) - y) ** 2) / 2


@partial(jax.jit, static_argnames=("name", "width", "depth", "steps"))
def one_network(key, name, width, depth, scale, steps):
    """(losses of trained networks, of their kernel, of the infinite kernel) over `UNITS`."""
    family, train_sizes, test_sizes, inputs = FAMILIES[name]
    tasks = family(*train_sizes)(jax.random.fold_in(key, 0))
    test = family(*test_sizes)(jax.random.fold_in(key, 1))
    start = init(jax.random.fold_in(key, 2), (inputs, *(width,) * depth, 1))
    rates, adapt = jnp.asarray(UNITS, jnp.float32) / scale, nm.GradientDescent(0.4 / scale)

    rows = train_sizes[0] * train_sizes[2]
    ridge = RIDGE * rows * scale

    def exact(kernel):
        rule = nm.GradientDescent(rates)
        return nm.kernels.meta_train(kernel, tasks, rule, meta_ridge=ridge).loss(test, adapt)

    tangent = nm.kernels.neural_tangent(network, start)
    loss = partial(square_loss, partial(centred, start))
    x = jnp.concatenate([part[0].reshape(-1, inputs) for part in tasks])
    K = tangent(x, x)
    at, entries = systems(K, own_blocks(K, *train_sizes[:2]), nm.GradientDescent(rates))

    def trained(pair):
        rate, entry = pair
        curvature = (jnp.linalg.eigvalsh(at(entry).G)[-1] + ridge) / rows
        optimizer = Partial(partial(optax.sgd, momentum=0.95, nesterov=True), 1 / curvature)
        algorithm = nm.maml_value_and_grad(loss, nm.GradientDescent(rate))

        def with_ridge(params, tasks):
            value, gradient = algorithm(params, tasks)
            pull = jax.tree.map(lambda p, s: ridge / rows * (p - s), params, start)
            return value, jax.tree.map(jnp.add, gradient, pull)

        params = nm.fit(key, start, with_ridge, tasks, optimizer, steps).params
        return nm.maml(loss, adapt)(params, test)

    networks = lax.map(trained, (rates, entries))
    return networks, exact(tangent), exact(nm.kernels.relu_network(depth, bias_variance=BIAS))


def widths(plan, seeds, steps, out):
    """Train at every width; print a line each, and draw."""
    results = {}
    for depth, width in plan:
        for name in FAMILIES:
            kernel = nm.kernels.relu_network(depth, bias_variance=BIAS)
            scale = largest_eigenvalue(kernel, FAMILIES[name][0])
            began = time.perf_counter()
            keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(seeds)]
            losses = np.array([one_network(k, name, width, depth, scale, steps) for k in keys])
            net, own, limit = np.moveaxis(losses, 1, 0)  # each (seeds, rates)
            results[depth, name, width] = net, own, limit
            gaps = [
                np.median(np.abs(a / b - 1)) for a, b in ((net, own), (own, limit), (net, limit))
            ]
            best = [UNITS[np.median(x, 0).argmin()] for x in (net, own, limit)]
            print(
                f"{depth} hidden, {name:<9} width {width:>4}: "
                f"median gap network-kernel {gaps[0]:6.1%}, kernel-limit {gaps[1]:6.1%}, "
                f"network-limit {gaps[2]:6.1%}; best rates {best[0]:+.1f} {best[1]:+.1f} "
                f"{best[2]:+.1f}; {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    draw(results, out)


def draw(results, out):
    """A panel for each family and depth: medians over seeds, bands to the quartiles."""
    from matplotlib.figure import Figure

    panels = sorted({(name, depth) for depth, name, _ in results})
    figure = Figure(figsize=(4.2 * len(panels), 3.4), dpi=110, layout="constrained")
    for axis, (name, depth) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
    ):
        mine = sorted(w for d, n, w in results if (n, d) == (name, depth))
        for i, width in enumerate(mine):
            net, own, limit = results[depth, name, width]
            shade = i / max(len(mine) - 1, 1)
            color = (0.85 - 0.75 * shade, 0.3, 0.3 + 0.5 * shade)
            low, middle, high = np.quantile(net, (0.25, 0.5, 0.75), 0)
            axis.fill_between(UNITS, low, high, color=color, alpha=0.12, lw=0)
            axis.plot(UNITS, middle, "o-", ms=3, lw=1, color=color, label=f"width {width}")
            axis.plot(UNITS, np.median(own, 0), ls=":", lw=1.2, color=color)
        axis.plot(UNITS, np.median(limit, 0), color="black", lw=1.6, label="infinite width, exact")
        axis.set_title(f"{name}, {depth} hidden layer{'s' * (depth > 1)}", fontsize=10)
        axis.set_xlabel(r"training rate $\alpha_t \lambda$")
        axis.set_ylim(0.9 * np.median(limit, 0).min(), 1.3 * np.median(limit, 0).max())
        axis.set_ylabel("test loss")
    axis.plot([], [], ls=":", color="gray", label="exact, tangent kernel")
    axis.legend(frameon=False, fontsize=7)
    figure.savefig(out)
    print("wrote", out)


# Does it matter? The best training rate, with the best adaptation rate for each.


def episodes(which):
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = data.images.reshape(-1, 64).astype(np.float32) / 8 - 0.6, data.target
    chosen = labels < 6 if which == "train" else labels >= 6

    def family(m, shots, queries):
        episode = nm.tasks.Episodes(
            images[chosen], labels[chosen], ways=digits.WAYS, shots=shots, queries=queries, m=m
        )

        def draw(key):
            return nm.Tasks(
                *((x, jax.nn.one_hot(y, digits.WAYS) - 1 / digits.WAYS) for x, y in episode(key))
            )

        return draw

    return family


def outputs(family):
    """Labels with an axis of outputs."""
    return lambda *sizes: lambda key: nm.Tasks(*((x, y[..., None]) for x, y in family(*sizes)(key)))


# Training family, test family, sizes of training (m, n_t, n_v) and of testing, network, loss.
CASES = {
    "quadratic": (
        outputs(quadratic),
        outputs(quadratic),
        (10, 20, 20),
        (100, 20, 20),
        (10, 64, 64, 1),
    ),
    "sinusoid": (outputs(sinusoid), outputs(sinusoid), (10, 10, 10), (100, 10, 20), (1, 64, 64, 1)),
    "digits": (
        episodes("train"),
        episodes("test"),
        (10, 5, 5),
        (60, 5, 10),
        (64, 64, 64, digits.WAYS),
    ),
}


def values(params, x):
    *hidden, (weight, bias) = params
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return x @ weight + bias


def squares(params, data):
    x, y = data
    return jnp.mean((values(params, x) - y) ** 2) / 2


def entropy(params, data):
    x, y = data  # centred one-hot labels: argmax is the class
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(values(params, x), y.argmax(-1))
    )


def lazy(name, seeds):
    """Test losses (seeds, train rates, adapt rates) of the exact solution, best ridge of a few."""
    train, test, sizes, test_sizes, layers = CASES[name]
    kernel = nm.kernels.relu_network(2, bias_variance=BIAS)
    x = train(*sizes)(jax.random.key(99)).support[0].reshape(-1, layers[0])
    scale = float(jnp.linalg.eigvalsh(kernel(x, x) / len(x))[-1])
    ridges = jnp.array([1e-3, 1e-2, 1e-1, 1.0])

    @jax.jit
    def one(key):
        tasks, fresh = train(*sizes)(key), test(*test_sizes)(jax.random.fold_in(key, 1))
        rates = nm.GradientDescent(jnp.asarray(UNITS, jnp.float32) / scale)
        model = nm.kernels.meta_train(kernel, tasks, rates, meta_ridge=ridges)
        return model.loss(fresh, nm.GradientDescent(jnp.asarray(ADAPT, jnp.float32) / scale))

    losses = np.array([one(jax.random.fold_in(jax.random.key(0), i)) for i in range(seeds)])
    best = losses.mean((0, 1, 3)).argmin()
    return losses[:, :, best]


def learning(name, loss, seeds, steps, unit):
    """The same of networks of 64 units a layer, trained by Adam; rates times `unit`."""
    train, test, sizes, test_sizes, layers = CASES[name]

    def run(item):
        key, rate = item
        tasks, fresh = train(*sizes)(key), test(*test_sizes)(jax.random.fold_in(key, 1))
        start = mlp.init(jax.random.fold_in(key, 2), layers)
        algorithm = nm.maml_value_and_grad(loss, nm.GradientDescent(rate))
        trained = nm.fit(key, start, algorithm, tasks, optax.adam(1e-3), steps).params
        adapt = jnp.asarray(ADAPT, jnp.float32) * unit
        return lax.map(lambda r: nm.maml(loss, nm.GradientDescent(r))(trained, fresh), adapt)

    keys = jnp.stack([jax.random.fold_in(jax.random.key(0), i) for i in range(seeds)])
    grid = jnp.asarray(UNITS, jnp.float32) * unit
    pairs = jnp.repeat(keys, len(grid)), jnp.tile(grid, seeds)
    return np.asarray(nm.map_over_devices(run, pairs)).reshape(seeds, len(grid), -1)


def best_rates(losses):
    """Of losses (seeds, train, adapt): best rates on the grid, and paired gains with errors."""
    mean = losses.mean(0)
    zero = int(np.argmin(np.abs(UNITS)))
    best_t = np.unravel_index(mean.argmin(), mean.shape)
    at_zero = (zero, mean[zero].argmin())
    positive = np.where(UNITS[:, None] > 0, mean, np.inf)
    negative = np.where(UNITS[:, None] < 0, mean, np.inf)
    best_p, best_n = (np.unravel_index(x.argmin(), x.shape) for x in (positive, negative))

    def mean_error(x):
        return f"{x.mean():.3f}({x.std(ddof=1) / len(x) ** 0.5:.3f})"

    def against(at):
        return mean_error(losses[:, *at] - losses[:, *at_zero])

    return (
        f"{UNITS[best_t[0]]:+.1f} | {ADAPT[best_t[1]]:.2f} | {mean_error(losses[:, *at_zero])} | "
        f"{against(best_n)} at {UNITS[best_n[0]]:+.1f} | "
        f"{against(best_p)} at {UNITS[best_p[0]]:+.1f}"
    )


def rates(seeds, steps):
    print("| task | regime | best train | best adapt | loss at 0 | negative - 0 | positive - 0 |")
    print("|---|---|---:|---:|---:|---:|---:|")
    units = {"quadratic": 0.1, "sinusoid": 0.02, "digits": 0.5}
    for name in CASES:
        print(f"| {name} | lazy | {best_rates(lazy(name, seeds))} |", flush=True)
        losses = learning(name, squares, seeds, steps, units[name])
        print(f"| {name} | learning | {best_rates(losses)} |", flush=True)
    losses = learning("digits", entropy, seeds, steps, 0.5)
    print(f"| digits, cross entropy | learning | {best_rates(losses)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("widths", "rates"))
    parser.add_argument(
        "--plan", type=json.loads, default=[[1, 64], [1, 512], [1, 4096], [2, 64], [2, 512]]
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/lazy.png"))
    given = parser.parse_args()
    if given.what == "widths":
        widths([tuple(pair) for pair in given.plan], given.seeds, given.steps, given.out)
    else:
        rates(given.seeds, given.steps)
