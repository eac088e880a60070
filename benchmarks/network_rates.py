"""Rates of trained networks, predicted from their own tasks and measured.

    python benchmarks/network_rates.py adapt    one step from the network, for n_r points
    python benchmarks/network_rates.py train    meta-training from the network on 10 new tasks

Networks with two hidden layers of 40 units are meta-trained by MAML on sinusoids, on mixed linear
regression of 10 inputs, and on pairs of digits with labels -1 and 1. `advice.network_rates` sees
300 of their tasks. Either the last layer or all parameters adapt. Losses are half mean squared
errors after one inner step.

adapt: the predicted best rate; the best of 21 measured ones, from -1 to 3 times the predicted, by a
parabola through three of them; and the rate that Meta-SGD learns for fixed parameters. Losses on
1000 other tasks: without a step, at the predicted rate (predicted and measured), at minus that
rate, and at the best measured rate.

train: training on 10 + 10 points of each task with a ridge, then a step on 10 points. Rates are in
units of 1 over the largest eigenvalue of the features. Losses are exact in the tangent kernel (40
draws of training tasks), at the best adaptation rate of each training rate: at the predicted rate,
and the differences from it at rate zero and at the best of 25 rates. "Network" is trained by Adam
on the same objective (16 draws) and adapts at the predicted rate; "rate zero" is its difference for
training at rate zero.
"""

from functools import partial

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import negmaml as nm
from negmaml.advice import network_rates
from negmaml.examples import mlp

PROBE, QUERIES = 300, 20
UNITS = np.linspace(-1, 3, 21)  # of the predicted rate
TRAIN_UNITS = np.linspace(-2, 2, 25)  # over the largest eigenvalue of the features
RIDGE = 0.01  # over rows and that eigenvalue
SIZES = {"m": 10, "n_t": 10, "n_v": 10, "n_r": 10}


def sinusoids(m, n_t, n_v):
    family = nm.tasks.Sinusoid(m=m, n_t=n_t, n_v=n_v)
    return lambda key: nm.Tasks(*((x, y[..., 0]) for x, y in family(key)))


def linear(m, n_t, n_v):
    sizes = {"p": 10, "m": m, "n_t": n_t, "n_v": n_v, "n_r": 1}
    return nm.tasks.Linear(nm.MixedLinearRegression(**sizes, sigma=0.5, nu=1.0, w0=0.3))


def digit_pairs(m, n_t, n_v):
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.data / 16).astype(np.float32)  # pixels are 0 to 16
    sizes = {"ways": 2, "shots": n_t // 2, "queries": n_v // 2, "m": m}
    episodes = nm.tasks.Episodes(images, data.target, **sizes)
    return lambda key: nm.Tasks(*((x, 2.0 * y - 1) for x, y in episodes(key)))


# Distribution, inputs, and inner rate and steps of the network's own training.
FAMILIES = {
    "sinusoid": (sinusoids, 1, 0.02, 6000),
    "linear": (linear, 10, 0.05, 1000),
    "digit pairs": (digit_pairs, 64, 0.02, 1000),
}


def network(params, x):
    """The network of the examples, one output."""
    *hidden, (weight, bias) = params
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return (x @ weight + bias)[:, 0]


def with_head(body, head, x):
    return network([*body, head], x)


def loss_of(apply):
    """Half the mean squared error of a model."""

    def loss(params, data):
        x, y = data
        return jnp.mean((apply(params, x) - y) ** 2) / 2

    return loss


def trained(name, scale):
    """A network that is meta-trained on a distribution."""
    family, inputs, rate, steps = FAMILIES[name]
    key = jax.random.key(0)
    value_and_grad = nm.maml_value_and_grad(loss_of(network), nm.GradientDescent(rate))
    start = mlp.init(key, (inputs, 40, 40, 1))
    steps = max(1, round(steps * scale))
    return nm.fit(key, start, value_and_grad, family(25, 10, 10), optax.adam(1e-3), steps).params


def models(name, scale):
    """Yield (adapting parameters, apply, params) of the trained network."""
    params = trained(name, scale)
    yield "last layer", partial(with_head, params[:-1]), params[-1]
    yield "all", network, params


def probe(family, apply, params):
    return network_rates(apply, params, family(PROBE, 20, 20)(jax.random.key(1)))


@partial(jax.jit, static_argnums=0)
def losses_at(loss, rates, params, tasks):
    return lax.map(lambda rate: nm.maml(loss, nm.GradientDescent(rate))(params, tasks), rates)


def minimum(x, y):
    """The minimum of a parabola through the lowest of the points and its neighbours."""
    at = np.clip(np.nanargmin(y), 1, len(x) - 2)
    a, b, _ = np.polyfit(x[at - 1 : at + 2], y[at - 1 : at + 2], 2)
    return -b / (2 * a)


def learned_rate(loss, params, tasks, unit, steps):
    """The one rate that Meta-SGD learns for fixed parameters."""
    labels = nm.MetaSGDParams("fixed", "learned")
    adam = optax.adam(optax.cosine_decay_schedule(unit / 10, steps))
    optimizer = optax.multi_transform({"fixed": optax.set_to_zero(), "learned": adam}, labels)
    start = nm.MetaSGDParams(params, jnp.zeros(()))
    return float(
        nm.fit(jax.random.key(2), start, nm.meta_sgd(loss), tasks, optimizer, steps).params.rate
    )


def adapt(options, report):
    """Compare predicted, measured and learned rates at test time."""
    head = "predicted rate", "measured", "Meta-SGD", "loss at 0", "predicted loss", "loss there"
    report.table("tasks, adapting", "n_r", *head, "loss at minus it", "best loss")
    for name in options.tasks_of:
        family = FAMILIES[name][0]
        for layer, apply, params in models(name, options.scale):
            found, loss = probe(family, apply, params), loss_of(apply)
            for n_r in options.n_r:
                rate, error = found.adapt_rate(n_r), found.adapt_rate_error(n_r)
                tasks = family(options.tasks, n_r, QUERIES)(jax.random.key(3))
                rates = jnp.asarray(rate * UNITS, jnp.float32)
                losses = np.asarray(losses_at(loss, rates, params, tasks))
                learned = learned_rate(
                    loss, params, family(25, n_r, 10), rate, max(1, round(300 * options.scale))
                )
                at = {unit: f"{losses[np.argmin(abs(UNITS - unit))]:.4f}" for unit in (-1, 0, 1)}
                report.row(
                    f"{name}, {layer}", n_r, f"{rate:.4f} ± {error:.4f}",
                    f"{minimum(rate * UNITS, losses):.4f}", f"{learned:.4f}", at[0],
                    f"{found.adapt_loss(rate, n_r):.4f}", at[1], at[-1], f"{losses.min():.4f}",
                )  # fmt: skip


def drawn(family, key):
    """Training tasks and test tasks."""
    m, n_t, n_v, n_r = SIZES.values()
    return family(m, n_t, n_v)(key), family(100, n_r, QUERIES)(jax.random.fold_in(key, 1))


def exact_losses(family, apply, params, rates, ridge, draws):
    """Losses of the exact solution in the tangent kernel, (draws, rates), at best adaptation."""
    kernel = nm.kernels.empirical_ntk(apply, params)
    unit = 0.5 / abs(rates).max()
    three = jnp.array([-1.0, 0.0, 1.0]) * unit

    @jax.jit
    def one(key):
        tasks, fresh = drawn(family, key)
        rule = nm.GradientDescent(jnp.asarray(rates, jnp.float32))
        model = nm.kernels.meta_train(
            kernel, tasks, rule, meta_ridge=ridge, f0=partial(apply, params)
        )
        return model.loss(fresh, nm.GradientDescent(three))

    losses = np.stack([one(key) for key in jax.random.split(jax.random.key(4), draws)])
    # The best adaptation rate of each training rate, for the mean over draws.
    below, at, above = np.moveaxis(losses.mean(0), -1, 0)
    best = (below - above) / (2 * (below + above - 2 * at))
    weights = np.stack([best * (best - 1) / 2, 1 - best**2, best * (best + 1) / 2], -1)
    return np.sum(losses * weights, -1)


def network_losses(family, apply, params, rates, adapt_rate, ridge, draws, steps):
    """Losses of the network, trained by Adam at each of the rates: (draws, rates)."""
    loss, rows = loss_of(apply), SIZES["m"] * SIZES["n_v"]

    def one(item):
        key, rate = item
        tasks, fresh = drawn(family, key)
        algorithm = nm.maml_value_and_grad(loss, nm.GradientDescent(rate))

        def with_ridge(theta, tasks):
            value, gradient = algorithm(theta, tasks)
            pull = jax.tree.map(lambda g, p, s: g + ridge / rows * (p - s), gradient, theta, params)
            return value, pull

        theta = nm.fit(key, params, with_ridge, tasks, optax.adam(1e-3), steps).params
        return nm.maml(loss, nm.GradientDescent(adapt_rate))(theta, fresh)

    keys = jax.random.split(jax.random.key(4), draws)
    items = jnp.repeat(keys, len(rates)), jnp.tile(jnp.asarray(rates, jnp.float32), draws)
    return np.asarray(nm.map_over_devices(one, items)).reshape(draws, -1)


def train(options, report):
    """Compare predicted training rates with exact and trained solutions."""
    head = "predicted rate", "best rate", "predicted loss", "exact there", "at zero", "at best"
    report.table("tasks, training", *head, "network", "rate zero")
    draws, network_draws = max(2, round(40 * options.scale)), max(2, round(16 * options.scale))
    for name in options.tasks_of:
        family = FAMILIES[name][0]
        for layer, apply, params in models(name, options.scale):
            found = probe(family, apply, params)
            largest = float(found.moments.s[0])
            ridge = RIDGE * SIZES["m"] * SIZES["n_v"] * largest
            best = found.best_rates(**SIZES, meta_ridge=ridge)
            rates = np.append(TRAIN_UNITS / largest, best.train)
            exact = exact_losses(family, apply, params, rates, ridge, draws)
            mean = exact.mean(0)
            zero = np.argmin(abs(TRAIN_UNITS))
            top = np.nanargmin(mean)
            net = network_losses(
                family, apply, params, [best.train, 0.0], best.adapt, ridge, network_draws,
                max(1, round(1000 * options.scale)),
            )  # fmt: skip
            units = [f"{x * largest:+.2f}" for x in (best.train, rates[top])]
            cells = [f"{best.loss:.4f}"]
            # Differences from the loss at the predicted rate are paired.
            cells += [_with_error(exact[:, -1])]
            cells += [_with_error(exact[:, i] - exact[:, -1], "+") for i in (zero, top)]
            cells += [_with_error(net[:, 0]), _with_error(net[:, 1] - net[:, 0], "+")]
            report.row(f"{name}, {layer}", *units, *cells)


def _with_error(x, sign=""):
    return f"{x.mean():{sign}.4f} ± {x.std(ddof=1) / len(x) ** 0.5:.4f}"


def main(options, report):
    {"adapt": adapt, "train": train}[options.part](options, report)


if __name__ == "__main__":
    harness.run(
        main,
        __doc__,
        harness.option("part", choices=("adapt", "train")),
        harness.option("--scale", type=float, default=1.0, help="of steps and of numbers of draws"),
        harness.option("--tasks-of", type=harness.choice_of(FAMILIES), default=list(FAMILIES)),
        harness.option("--tasks", type=int, default=1000, help="test tasks of `adapt`"),
        harness.option("--n-r", type=int, nargs="+", default=[2, 10, 50]),
    )
