"""Wrong uses of the public interface end in errors of our own that name what was given.

The table is generated: every argument of a kind is given every value that is wrong for its kind, in
every function that takes it.
"""

import itertools
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm

KEY = jax.random.key(0)
RULE = nm.GradientDescent(0.1)
TASKS = nm.tasks.Sinusoid(m=2, n_t=2, n_v=2)
DRAWN = TASKS(KEY)
PARAMS = jnp.ones(1)


def loss(w, data):
    x, y = data
    return jnp.mean((x * w - y) ** 2)


MAML = nm.maml_value_and_grad(loss, RULE)
FITTED = {"key": KEY, "params": PARAMS, "value_and_grad": MAML, "sample_tasks": TASKS,
          "optimizer": optax.sgd(0.1), "steps": 2}  # fmt: skip
LOOKS = {"evaluate": nm.maml(loss, RULE), "evaluate_every": 1}
ADAPTED = {"loss": loss, "params": PARAMS, "support": (jnp.ones(2), jnp.ones(2)), "rule": RULE}
TESTED = {"key": KEY, "params": PARAMS, "loss": loss, "rule": RULE, "tasks": TASKS, "episodes": 2}
LABELLED = {"images": np.ones((8, 2)), "labels": np.repeat([0, 1], 4), "ways": 2, "shots": 1,
            "queries": 1, "m": 2}  # fmt: skip
GROUPED = {"data": np.ones(8), "groups": np.repeat([0, 1], 4), "m": 2, "n_t": 1, "n_v": 1}
SIZES = {"m": 2, "n_t": 2, "n_v": 2}
MADE = {"loss": loss, "rule": RULE}
LINEAR = {"p": 2, "m": 2, "n_t": 2, "n_v": 2, "n_r": 2, "sigma": 0.1, "nu": 0.1}

MAKERS = (nm.maml, nm.maml_value_and_grad, nm.fomaml, nm.reptile)
COUNTS = (0, -1, 1.5, True, "3", jnp.ones(2))
RULES = (0.1, "sgd", None, optax.sgd, 1)
KEYS = (0, None, "seed", 0.5, jnp.zeros(2))
FUNCTIONS = (3, "loss", jnp.ones(2))
WRONG = [
    # (function, good arguments, the argument, wrong values)
    (nm.fit, FITTED, "key", KEYS),
    (nm.fit, FITTED, "params", (jnp.array(1), 3, 1j, {"w": jnp.arange(3)}, None)),
    (nm.fit, FITTED, "value_and_grad", (
        3, None, nm.maml(loss, RULE), lambda p, t: (p, p, p), lambda p, t: (p.sum(), (p, p)),
        lambda p, t: (jnp.ones(2), p))),
    (nm.fit, FITTED, "sample_tasks", (3, None, DRAWN.support[0], {"a": 1}, [], "digits")),
    (nm.fit, FITTED, "optimizer", (0.1, None, optax.sgd, "adam")),
    (nm.fit, FITTED, "steps", (*COUNTS, None)),
    (nm.fit, FITTED, "epochs", (1, 2)),  # besides steps
    (nm.fit, FITTED, "evaluate", (3, LOOKS["evaluate"])),  # without evaluate_every
    (nm.fit, FITTED | LOOKS, "evaluate_every", COUNTS),
    (nm.fit, FITTED | LOOKS, "evaluate", (3, "loss")),
    (nm.fit, FITTED | LOOKS, "evaluation_tasks", (3, [DRAWN])),
    (nm.fit, FITTED | LOOKS, "patience", COUNTS),
    (nm.fit, FITTED, "patience", (3,)),
    (nm.fit, FITTED, "callback", (3, "print")),
    (nm.fit, FITTED | {"callback": print}, "callback_every", COUNTS),
    (nm.fit, FITTED, "checkpoint_every", COUNTS),
    (nm.fit, FITTED, "checkpoint_of", ("all", None, True)),
    (nm.fit, FITTED, "progress", (1, "yes", None)),
    (nm.fit, FITTED, "state", (3, PARAMS, (1, 2))),
    (nm.fit, FITTED, "mesh", (3, "cpu", [1, 2], ())),
    (nm.fit, FITTED, "task_axis", ("task",)),
    (nm.adapt, ADAPTED, "rule", RULES),
    (nm.adapt, ADAPTED, "params", (3, 1j, jnp.arange(2))),
    (nm.adapt, ADAPTED, "mask", ({"w": True}, 1, [True, True])),
    (nm.adapt, ADAPTED, "loss", (
        lambda w, d: w * d[0], lambda w, d: (loss(w, d), 0), lambda w, d: 1j)),
    (nm.evaluate, TESTED, "key", KEYS),
    (nm.evaluate, TESTED, "rule", RULES),
    (nm.evaluate, TESTED, "loss", FUNCTIONS),
    (nm.evaluate, TESTED, "metric", FUNCTIONS),
    (nm.evaluate, TESTED, "tasks", (3, None, DRAWN.support[0], {"a": 1})),
    (nm.evaluate, TESTED, "episodes", COUNTS),
    (nm.evaluate, TESTED, "params", (3, 1j)),
    *((make, MADE, "rule", RULES) for make in (*MAKERS, nm.imaml)),
    *((make, MADE, "loss", FUNCTIONS) for make in (nm.maml, nm.fomaml, nm.reptile)),
    *((make, MADE, "batch_size", COUNTS) for make in (nm.maml, nm.maml_value_and_grad)),
    *((make, MADE, "has_aux", (1, "yes", None)) for make in (nm.maml, nm.fomaml)),
    (nm.maml, MADE, "inner_loss", FUNCTIONS),
    (nm.maml_value_and_grad, MADE, "method", ("forward", 3)),
    (nm.meta_sgd, {"loss": loss}, "steps", COUNTS),
    (nm.state_per_step, {"loss": loss}, "steps", COUNTS),
    *((nm.GradientDescent, {"rate": 0.1}, name, values) for name, values in (
        ("rate", (float("nan"), np.inf, "0.1", 1j, None)), ("steps", COUNTS))),
    (nm.Schedule, {}, "values", (0.1, [], [np.nan], ["a"])),
    (nm.InnerOptimizer, {}, "transformation", (0.1, optax.sgd, None)),
    *((nm.tasks.Sinusoid, SIZES, name, COUNTS) for name in SIZES),
    *((nm.tasks.Grouped, GROUPED, name, values) for name, values in (
        ("m", (*COUNTS, 3)), ("n_t", (*COUNTS, 4)), ("groups", ([0, 1], None)))),
    *((nm.tasks.Episodes, LABELLED, name, values) for name, values in (
        ("ways", (*COUNTS, 3)), ("shots", (*COUNTS, 4)), ("labels", ([0, 1],)))),
    (nm.tasks.Linear, {}, "problem", (3, None, LINEAR)),
    *((nm.MixedLinearRegression, LINEAR, name, COUNTS) for name in ("p", "m", "n_t", "n_v", "n_r")),
    *((nm.MixedLinearRegression, LINEAR, name, (-1.0, np.nan, np.inf, "a", [0.1, 0.2]))
      for name in ("sigma", "nu")),
]  # fmt: skip
CASES = [(f, good, name, value) for f, good, name, values in WRONG for value in values]


def label(case):
    function, _, name, value = case
    shown = re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # the same in every process
    return re.sub(r"\W+", "-", f"{function.__name__}-{name}-{shown}")[:60]


def test_there_are_enough_of_them():
    assert len(CASES) >= 150


@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_wrong_argument_is_named(case):
    function, good, name, value = case
    arguments = good | {name: value}
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**arguments)
    assert_own(caught, name)


def assert_own(caught, name):
    """The error is raised in our code, and its message names the argument."""
    message = str(caught.value)
    last = traceback.extract_tb(caught.tb)[-1].filename
    assert "negmaml" in last and "site-packages" not in last, f"raised in {last}: {message}"
    assert re.search(rf"\b{name}\b", message), message


TREES = [jnp.ones((2, 3)), {"w": jnp.ones(2)}, (jnp.ones(2), jnp.ones(3)), None, 3, "tasks"]


@pytest.mark.parametrize(
    ("make", "tasks"),
    list(itertools.product(MAKERS, TREES)),
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_wrong_tasks_are_named(make, tasks):
    with pytest.raises((TypeError, ValueError)) as caught:
        make(loss, RULE)(PARAMS, tasks)
    assert_own(caught, "tasks")


@pytest.mark.parametrize("distribution", (
    TASKS, nm.tasks.Quadratic(p=1, sigma=0.1, nu=0.1, **SIZES), nm.tasks.Grouped(**GROUPED),
    nm.tasks.Episodes(**LABELLED), nm.tasks.Linear(nm.MixedLinearRegression(**LINEAR)),
), ids=lambda d: type(d).__name__)  # fmt: skip
@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_key_is_named(distribution, key):
    with pytest.raises((TypeError, ValueError)) as caught:
        distribution(key)
    assert_own(caught, "key")
