"""Everything public under settings of JAX that find mistakes or change numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from negmaml import tasks
from tests.test_lowering import AREAS, SIZES, TASKS, isotropic, key, network

SETTINGS = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "key reuse": lambda: jax.debug_key_reuse(True),
    "transfers": lambda: jax.transfer_guard("disallow"),
    "matmul precision": lambda: jax.default_matmul_precision("highest"),
    "nans": lambda: jax.debug_nans(True),
    "leaks": jax.checking_leaks,
    "x64": lambda: jax.enable_x64(True),
}
NUMBER = jnp.float32(0.3)
TASKS = jax.tree.map(jnp.asarray, TASKS)
CLASSES = nm.Tasks(*((x, (y > 0).astype(int)) for x, y in TASKS))
ONE = (TASKS.support[0][0], TASKS.support[1][0])
RULE, ADAPT = nm.GradientDescent(-0.2), nm.GradientDescent(0.1)
STEPS = nm.GradientDescent(0.1, steps=2)
RATES = nm.GradientDescent(jnp.linspace(-0.3, 0.3, 3))
PARAMS = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 1))}
WITH_HEAD = {"a": jnp.ones((3, 4)), "head": {"w": jnp.zeros((4, 2)), "b": jnp.zeros(2)}}
START = jnp.ones(3)
DATA = np.random.default_rng(0).standard_normal((48, 2)).astype(np.float32)
TARGETS, GROUPS = np.sin(DATA.sum(1)), np.arange(48) % 6
PIXELS = np.arange(48 * 9, dtype=np.uint8).reshape(48, 3, 3)
SGD = optax.sgd(0.1)
SOURCE = tasks.Linear(nm.MixedLinearRegression(p=3, m=2, n_t=3, n_v=2, n_r=3, sigma=0.5, nu=1.0))
ITEMS = jnp.arange(3.0)


def square(w, data):
    x, y = data
    return jnp.mean((x @ w - y) ** 2)


def tree_loss(w, data):
    return jnp.mean((network(w, data[0])[..., 0] - data[1]) ** 2)


def features(w, x):
    return jnp.tanh(x @ w["a"])


def label_loss(w, data):
    outputs = features(w, data[0]) @ w["head"]["w"] + w["head"]["b"][None]
    return optax.softmax_cross_entropy_with_integer_labels(outputs, data[1]).mean()


def headed(make):
    return nm.maml_value_and_grad(label_loss, make(features))(WITH_HEAD, CLASSES)


def plain_keys(drawn):
    return [[*part[:2], jax.random.key_data(part[2])] for part in drawn]


def drawn(key, x):
    return {"y": x * jax.random.normal(key)}


GRADIENT, VALUE = nm.maml_value_and_grad(square, STEPS), nm.maml(square, STEPS)


def trained(**options):
    return nm.fit(key(), START, GRADIENT, SOURCE, SGD, 3, **options).loss


def swept(**options):
    return nm.sweep(drawn, {"x": [1.0, 2.0]}, 2, **options).y.values


META = {
    "maml": lambda: nm.maml_value_and_grad(tree_loss, STEPS)(PARAMS, TASKS),
    "maml, reverse": lambda: nm.maml_value_and_grad(tree_loss, STEPS, method="reverse")(
        PARAMS, TASKS
    ),
    "maml, momentum": lambda: nm.maml_value_and_grad(tree_loss, nm.Momentum(0.1, 0.5, 2))(
        PARAMS, TASKS
    ),
    "maml, optimizer": lambda: nm.maml_value_and_grad(
        tree_loss, nm.InnerOptimizer(optax.adam(0.1, eps_root=1e-8), 2)
    )(PARAMS, TASKS),
    "maml, schedule": lambda: nm.maml_value_and_grad(
        tree_loss, nm.GradientDescent(nm.Schedule([0.1, -0.1]), 2)
    )(PARAMS, TASKS),
    "fomaml": lambda: nm.fomaml(tree_loss, STEPS)(PARAMS, TASKS),
    "reptile": lambda: nm.reptile(tree_loss, STEPS)(PARAMS, TASKS),
    "imaml": lambda: nm.imaml(square, nm.Proximal(5.0))(START, TASKS),
    "adapt": lambda: nm.adapt(tree_loss, PARAMS, ONE, STEPS),
    "imaml, gradient descent": lambda: nm.imaml(
        square, nm.Implicit(nm.GradientDescent(0.1, steps=200), 5.0)
    )(START, TASKS),
    "adapt, proximal": lambda: nm.adapt(square, START, ONE, nm.Proximal(1.0)),
}
META |= {
    head.__name__: lambda head=head: headed(head)
    for head in (nm.PrototypeHead, nm.RidgeHead, nm.LogisticHead)
}
OTHERS = {
    "simulate": lambda: nm.simulate(key(), isotropic(0.3), RATES, ADAPT, runs=3).test_loss,
    "test_loss": lambda: nm.theory.test_loss(isotropic(0.3), RATES, RATES),
    "best_train_rate": lambda: nm.theory.best_train_rate(isotropic(0.3)),
    "best_allocation": lambda: nm.theory.best_allocation(
        60, isotropic(0.3), RULE, split=0.5, tune=False
    ).m,
    "Sinusoid": lambda: tasks.Sinusoid(m=2, n_t=3, n_v=2)(key()),
    "Quadratic": lambda: tasks.Quadratic(p=3, m=2, n_t=2, n_v=2, sigma=0.1, nu=1.0)(key()),
    "Linear": lambda: SOURCE(key()),
    "Grouped": lambda: tasks.Grouped(DATA, GROUPS, m=3, n_t=2, n_v=1)(key()),
    "Episodes": lambda: tasks.Episodes(DATA, GROUPS, m=2, ways=2, shots=1, queries=2)(key()),
    "Episodes, all options": lambda: plain_keys(tasks.Episodes(
        PIXELS, GROUPS, m=2, ways=2, shots=1, queries=2, balanced=False, orientations=8, keys=True,
        augment=lambda key, x: x + jax.random.normal(key), augment_task=lambda key, x: x,
    )(key())),
    "HostEpisodes": lambda: tasks.HostEpisodes(
        PIXELS, GROUPS, m=2, ways=2, shots=1, queries=2, orientations=4
    )(key()),
    "fit": lambda: trained(),
    "fit, evaluated": lambda: trained(evaluate=VALUE, evaluate_every=1, patience=2),
    "fit, callback": lambda: trained(callback=lambda *_: None),
    "evaluate": lambda: nm.evaluate(key(), START, square, STEPS, SOURCE, episodes=4).values,
    "evaluate, by step": lambda: nm.evaluate(
        key(), START, square, STEPS, SOURCE, episodes=4, per_step=True
    ).values,
    "map_over_devices": lambda: nm.map_over_devices(lambda x: x**2, ITEMS, batch_size=2),
    "sweep": lambda: swept(),
    "sweep, linear": lambda: nm.sweep(
        nm.sweeps.linear,
        dict(**SIZES, sigma=[0.1, 0.5], nu=1.0, train_rate=[-0.2, 0.1], adapt_rate=0.1),
        2,
    ).test_loss.values,
    "advise": lambda: nm.advise(
        DATA, TARGETS, GROUPS, n_t=2, n_v=2, n_r=2, splits=12, key=key()
    ).train_rate,
}  # fmt: skip
PUBLIC = {
    f"{area}.{name}": lambda function=function: jax.jit(function)(NUMBER)
    for area, table in AREAS.items()
    for name, function in table.items()
}
CALLS = META | OTHERS | PUBLIC
# Each a few tenths of a second to trace and to run; the first of them is where a promotion shows.
CHEAP = ["maml", "imaml", "simulate", "test_loss", "Sinusoid", "fit", "evaluate", "sweep",
         "kernels.meta_train", "problem.adapted"]  # fmt: skip
DEFAULT = ["rank promotion", "transfers", "key reuse", "leaks"]
LONG = {
    (setting, "imaml") for setting in ("key reuse", "leaks", "rank promotion")
}  # seconds each; shown by maml as well


def quick(setting, name):
    return setting in DEFAULT and name in CHEAP and (setting, name) not in LONG


def rows():
    return [
        pytest.param(
            setting, name, id=f"{setting}: {name}",
            marks=[] if quick(setting, name) else pytest.mark.slow,
        )
        for setting in SETTINGS
        for name in CALLS
    ]  # fmt: skip


@pytest.mark.parametrize(("setting", "name"), rows())
def test_calls_give_under_a_setting_what_they_give_without(setting, name):
    expected = CALLS[name]()
    with SETTINGS[setting]():
        found = CALLS[name]()
    x64 = setting == "x64"
    jax.tree.map(
        lambda a, b: x64 or np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )
    if x64:
        assert jax.tree.structure(found) == jax.tree.structure(expected)
