"""Reference tables: meta-learning algorithms on sinusoids and on few-shot digits.

    python benchmarks/reference.py sinusoid    regression as in Finn, Abbeel and Levine, ICML 2017
    python benchmarks/reference.py digits      classification of digits that were not trained on

A row is one algorithm, with its loss or accuracy on new tasks after 0, 1, 2, 5 and 10 inner steps
of gradient descent, or after the exact solution of its inner problem. Values are means over seeds
and tasks, with 95% intervals over tasks; all algorithms see the same tasks. The range over seeds is
that of the last column with a value. CPU seconds are for all seeds, with compilation.

Sinusoids: network 1-40-40-1, 25 tasks a step, Adam at 1e-3, inner rate 0.01, one inner step in
training (Reptile and MAML++: five), K support and query points. Nothing is tuned. "Joint training"
has inner rate 0 in training.

Digits: 3 ways, 5 shots, the network of `negmaml.examples.digits` with a bias in its head, 8
episodes a step, Adam at 1e-3, five inner steps in training. Algorithms are trained on the digits 0
to 5 and tested on 6 to 9. Training uses eight rotations and reflections as separate classes, the
test only upright digits. Inner rates are 0.3, strengths 0.1 for heads and 2 for iMAML. `--search`
instead trains each algorithm on 0 to 3 at every pair of `FACTORS` times these and `OUTER_RATES`,
and takes the pair that is best on 4 and 5.

iMAML takes 16 inner steps of rate 0.1, and stops before the solution, with a warning. MAML++ gives
the last inner step all weight after a quarter of the training. Its outer rate is constant, as that
of all algorithms, and these networks have no normalization.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

import negmaml as nm
from negmaml.examples import digits, mlp
from negmaml.training.evaluation import NORMAL_95

TEST_STEPS = (0, 1, 2, 5, 10)
RATE, STRENGTH, OUTER_RATE = 0.3, 0.1, 1e-3  # on digits
FACTORS, OUTER_RATES = (0.1, 0.3, 1.0, 3.0), (1e-3, 3e-3)  # tried by --search


class Task(NamedTuple):
    """The tasks and network of a table.

    train, test: distributions. head: the mask of the last layer. steps: inner steps in training.
    annealing: outer steps in which the weights of MAML++ change.
    """

    init: Callable
    loss: Callable
    metric: Callable | None
    head: Any
    steps: int
    annealing: int
    train: Any
    test: Any


def same(params, rate):
    """The start of most algorithms: the parameters themselves."""
    return params


def descent(task, params, rate, steps):
    """Gradient descent of all parameters at test time."""
    return params, nm.GradientDescent(rate, steps), None


class Method(NamedTuple):
    """An algorithm as a user would write it.

    algorithm: (task, inner rate) -> value_and_grad. start: (params, rate) -> meta-parameters.
    test: (task, meta-parameters, rate, steps) -> (params, rule, mask) of `evaluate`.
    rate: the inner rate or the strength on digits, 0 for an algorithm without one.
    """

    algorithm: Callable
    start: Callable = same
    test: Callable = descent
    rate: float = RATE


def joint_training(task, rate):
    return nm.maml_value_and_grad(task.loss, nm.GradientDescent(0.0))


def by_descent(algorithm, task, rate, steps=None):
    return algorithm(task.loss, nm.GradientDescent(rate, steps or task.steps))


def anil(task, rate):
    return nm.anil(task.loss, nm.GradientDescent(rate, task.steps), task.head)


def only_head(task, params, rate, steps):
    return params, nm.GradientDescent(rate, steps), task.head


def learned_rates(params, rate):
    return nm.MetaSGDParams(params, jax.tree.map(lambda x: jnp.full(x.shape, rate), params))


def at_learned_rates(task, meta, rate, steps):
    return meta.params, nm.GradientDescent(meta.rate, steps), None


def maml_plus_plus(task, rate):
    return nm.maml_plus_plus(task.loss, annealing=task.annealing)


def rates_of_each_step(params, rate):
    return nm.maml_plus_plus_params(params, rate=rate, steps=5)


def solving(make, **options):
    """An algorithm with a rule, make(strength), that solves the inner problem."""

    def algorithm(task, strength):
        return nm.maml_value_and_grad(task.loss, make(strength))

    def test(task, params, strength, steps):
        return params, make(strength), None

    return Method(algorithm, test=test, **options)


def proximal(strength):
    # The Hessian of a ReLU network is indefinite, where conjugate gradients may fail.
    descent = nm.GradientDescent(0.1, 16)
    return nm.Implicit(descent, strength, tolerance=0.1, linear_steps=5, linear_tolerance=0.1)


def with_scale(params, strength):
    # Regression to 0 and 1 leaves the outputs small for a softmax, hence a trained scale.
    return params | {"scale": jnp.asarray(5.0)}


METHODS = {
    "joint training": Method(joint_training),
    "MAML": Method(partial(by_descent, nm.maml_value_and_grad)),
    "FOMAML": Method(partial(by_descent, nm.fomaml)),
    "Reptile": Method(partial(by_descent, nm.reptile, steps=5)),
    "ANIL": Method(anil, test=only_head),
    "Meta-SGD": Method(
        lambda task, rate: nm.meta_sgd(task.loss, steps=task.steps), learned_rates, at_learned_rates
    ),
    "MAML++": Method(maml_plus_plus, rates_of_each_step, at_learned_rates),
    "iMAML": solving(proximal, rate=2.0),
    "prototypes": solving(lambda _: nm.PrototypeHead(digits.features), rate=0.0),
    "ridge head": solving(
        lambda strength: nm.RidgeHead(digits.features, strength=strength),
        start=with_scale, rate=STRENGTH,
    ),
    "logistic head": solving(
        lambda strength: nm.LogisticHead(digits.features, strength=strength), rate=STRENGTH
    ),
}  # fmt: skip
DESCENT = ("MAML", "FOMAML", "Reptile", "ANIL", "Meta-SGD", "MAML++")
TABLES = {
    "sinusoid": ("joint training", *DESCENT),
    # Joint training cannot learn labels that change with the episode.
    "digits": (*DESCENT, "iMAML", "prototypes", "ridge head", "logistic head"),
}


def train(method, task, keys, rates, outer_rates, steps):
    """Meta-parameters of runs with these keys, inner and outer rates, stacked."""

    def one(item):
        key, rate, outer = item
        start = method.start(task.init(jax.random.fold_in(key, 0)), rate)
        value_and_grad, optimizer = method.algorithm(task, rate), Partial(optax.adam, outer)
        key = jax.random.fold_in(key, 1)
        return nm.fit(key, start, value_and_grad, task.train, optimizer, steps).params

    return nm.map_over_devices(one, (keys, jnp.asarray(rates), jnp.asarray(outer_rates)))


def evaluate(method, task, points, rates, episodes):
    """Values (runs, tasks) after the solution, or (runs, steps, tasks) after `TEST_STEPS`."""

    def one(item):
        params, rule, mask = method.test(task, *item, TEST_STEPS[-1])
        values = nm.evaluate(
            jax.random.key(1), params, task.loss, rule, task.test, metric=task.metric,
            episodes=episodes, per_step=not rule.implicit, mask=mask,
        ).values  # fmt: skip
        return values if rule.implicit else values[jnp.array(TEST_STEPS)]

    return nm.map_over_devices(one, (points, jnp.asarray(rates)))


def choose(method, task, options):
    """Return the (inner rate, outer rate) of the highest accuracy, of one run each."""
    pairs = list(product(sorted({method.rate * x for x in FACTORS}), OUTER_RATES))
    rates, outer_rates = zip(*pairs, strict=True)
    keys = jnp.broadcast_to(jax.random.key(2), len(pairs))  # the same start and tasks for all
    points = train(method, task, keys, rates, outer_rates, options.steps)
    values = evaluate(method, task, points, rates, options.episodes)
    # As many steps as in training, unless the rule solves the inner problem.
    values = values if values.ndim == 2 else values[:, TEST_STEPS.index(task.steps)]
    return pairs[int(jnp.argmax(values.mean(-1)))]


def measure(method, task, rate, outer, options):
    """Return the cells of a row: a value for each of `TEST_STEPS` and for the solution, ..."""
    keys = jax.random.split(jax.random.key(0), options.seeds)
    rates, outer_rates = [rate] * len(keys), [outer] * len(keys)
    found = []

    def trained():
        found.append(train(method, task, keys, rates, outer_rates, options.steps))
        return found

    def evaluated():
        found.append(evaluate(method, task, found[0], rates, options.episodes))
        return found

    seconds = [f"{harness.timed(part, harness.cpu_seconds):.1f}" for part in (trained, evaluated)]
    values = np.asarray(found[1])
    solved = values.ndim == 2
    values = values if not solved else values[:, None]
    each = values.mean(0)  # the tasks are the same for all seeds
    interval = NORMAL_95 * each.std(-1, ddof=1) / each.shape[-1] ** 0.5
    cells = [f"{v:.3f} ± {i:.3f}" for v, i in zip(each.mean(-1), interval, strict=True)]
    cells = ["", "", "", "", "", *cells] if solved else [*cells, ""]
    last = values[:, -1].mean(-1)
    return [*cells, f"{last.min():.3f} to {last.max():.3f}", *seconds]


def head_of(*names):
    steps = [f"{k} steps" for k in TEST_STEPS]
    return *names, *steps, "solved", "range over seeds", "training, CPU s", "evaluation, CPU s"


def sinusoid(options, report):
    """Print the table of sinusoids."""
    report.table(*head_of("algorithm", "K"))
    for name, shots in product(chosen(options), options.shots):
        task = Task(
            mlp.init, mlp.loss, None, [False, False, True], 1, options.steps // 4,
            nm.tasks.Sinusoid(m=25, n_t=shots, n_v=shots),
            nm.tasks.Sinusoid(m=min(100, options.episodes), n_t=shots, n_v=100),
        )  # fmt: skip
        report.row(name, shots, *measure(METHODS[name], task, 0.01, 1e-3, options))


def in_all_orientations(images, labels):
    """Rotate by quarter turns and reflect: eight classes for each digit."""
    mirrored = images, images[:, :, ::-1]
    rotated = [np.rot90(x, k, axes=(1, 2)) for x in mirrored for k in range(4)]
    # Steps of ten keep the labels of the orientations apart.
    return np.concatenate(rotated), np.concatenate([labels + 10 * i for i in range(8)])


def digit_init(key):
    """The weights of the example, whose head gets a bias; prototypes need one."""
    params = digits.init(key)
    return params | {"head": {"weight": params["head"], "bias": jnp.zeros(digits.WAYS)}}


def digit_outputs(params, images):
    head = params["head"]
    outputs = digits.features(params, images) @ head["weight"] + head["bias"]
    return params.get("scale", 1.0) * outputs


def digit_loss(params, data):
    outputs = digit_outputs(params, data[0])
    return optax.softmax_cross_entropy_with_integer_labels(outputs, data[1]).mean()


def digit_accuracy(params, data):
    return jnp.mean(jnp.argmax(digit_outputs(params, data[0]), -1) == data[1])


def digit_tasks(annealing):
    """Return the tasks of the search and of the table."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = data.images.astype(np.float32) / 16, data.target  # pixels are 0 to 16
    sizes = {"ways": digits.WAYS, "shots": 5, "queries": 10}

    def episodes(first, last, m, turned=True):
        keep = (labels >= first) & (labels <= last)
        rows = images[keep], labels[keep]
        rows = in_all_orientations(*rows) if turned else rows
        return nm.tasks.Episodes(*rows, **sizes, m=m)

    head = {"kernel": False, "hidden": False, "bias": False, "head": True}
    network = partial(Task, digit_init, digit_loss, digit_accuracy, head, 5, annealing)
    return (
        network(episodes(0, 3, 8), episodes(4, 5, 50)),
        network(episodes(0, 5, 8), episodes(6, 9, 50, turned=False)),
    )


def few_shot_digits(options, report):
    """Print the table of digits."""
    search, task = digit_tasks(options.steps // 4)
    report.table(*head_of("algorithm", "inner, outer rate"), texts=2)
    for name in chosen(options):
        method = METHODS[name]
        pair = choose(method, search, options) if options.search else (method.rate, OUTER_RATE)
        text = ", ".join(f"{x:g}" for x in pair)
        report.row(name, text, *measure(method, task, *pair, options))


def chosen(options):
    """The algorithms of the table, in its order."""
    return [name for name in TABLES[options.part] if name in (options.methods or METHODS)]


def main(options, report):
    steps = {"sinusoid": 30_000, "digits": 800}
    options.steps = options.steps or steps[options.part]
    {"sinusoid": sinusoid, "digits": few_shot_digits}[options.part](options, report)


if __name__ == "__main__":
    harness.run(
        main,
        __doc__,
        harness.option("part", choices=tuple(TABLES)),
        harness.option("--methods", type=harness.choice_of(METHODS), help="algorithms, all"),
        harness.option("--steps", type=int, help="outer steps: 30,000 for sinusoids, 800 digits"),
        harness.option("--shots", type=int, nargs="+", default=[5, 10], help="K of sinusoids"),
        harness.option("--search", action="store_true", help="choose the rates on digits"),
        harness.option("--seeds", type=int, default=2),
        harness.option("--episodes", type=int, default=1000, help="tasks of an evaluation"),
    )
