"""Calls of `negmaml.meta`, `negmaml.tasks` and `negmaml.training`."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax

import negmaml as nm
from tests.calls.form import Right, Wrong, wrong
from tests.calls.problem import KEY, KEYS
from tests.calls.rules import COUNTS, FLAGS, NUMBERS, TOLERANCES

RULE = nm.GradientDescent(0.1)
TASKS = nm.tasks.Sinusoid(m=2, n_t=2, n_v=2)
SIZES = {"m": 2, "n_t": 2, "n_v": 2}
DRAWN = TASKS(KEY)
PARAMS = jnp.ones(1)
RULES = (0.1, "sgd", None, optax.sgd, 1, [RULE], nm.GradientDescent)
FUNCTIONS = (3, "loss", np.ones(2), None, {}, [])
OPTIONAL_FUNCTIONS = (3, "loss", np.ones(2), {}, [])
BUDGETS = (0, -1, 1.5, True, "", "2 apples", "-1MB", "nan", [2])
SEGMENTS = (*COUNTS, "half", "")
TREES = (np.ones((2, 3)), {"w": np.ones(2)}, (np.ones(2), np.ones(3)), None, 3, "tasks", [])
MASKS = (False, {}, 1, "all", {"w": True}, [True, True], 0.0, np.array([1.0]))


def loss(w, data):
    x, y = data
    return jnp.mean((x * w - y) ** 2)


def wide(params, data):
    """A loss that wants {"w": (1, 2), "b": (2,)}."""
    return jnp.mean((data[0] @ params["w"] + params["b"]) ** 2)


MAML = nm.maml_value_and_grad(loss, RULE)
MADE = {"loss": loss, "rule": RULE}
ADAPTED = {"loss": loss, "params": PARAMS, "support": (np.ones(2), np.ones(2)), "rule": RULE}
TESTED = {"key": KEY, "params": PARAMS, "loss": loss, "rule": RULE, "tasks": TASKS, "episodes": 2}
FITTED = {"key": KEY, "params": PARAMS, "value_and_grad": MAML, "sample_tasks": TASKS,
          "optimizer": optax.sgd(0.1), "steps": 2}  # fmt: skip
LOOKS = {"evaluate": nm.maml(loss, RULE), "evaluate_every": 1}
LABELLED = {"images": np.ones((8, 2)), "labels": np.repeat([0, 1], 4), "ways": 2, "shots": 1,
            "queries": 1, "m": 2}  # fmt: skip
GROUPED = {"data": np.ones(8), "groups": np.repeat([0, 1], 4), "m": 2, "n_t": 1, "n_v": 1}
SPREAD = {"function": lambda x: x, "items": np.ones(2)}
IMAGES = {"x": np.ones((1, 4, 4, 1)), "kernel": np.ones((3, 3, 1, 2))}
PAIR = nm.ParamsAndRule(PARAMS, RULE)
OF_RULE = nm.maml_value_and_grad(loss, RULE, wrt="rule")
ESTIMATE = {"objective": nm.maml(loss, RULE), "sigma": 0.1, "samples": 2}
SIGMAS = (0, -1.0, np.nan, np.inf, "a", None, 1j, [0.1])
PES, PES_INIT = nm.persistent_evolution_strategies(loss, RULE, truncation=1, sigma=0.1, samples=2)
MAKERS = (nm.maml, nm.maml_value_and_grad, nm.fomaml, nm.reptile)


def keyed(wrt="params", **changes):
    """An evolution strategy, with names for its arguments."""
    estimate = nm.evolution_strategies(**ESTIMATE | {"wrt": wrt} | changes)

    def of_key(params, tasks, key):
        return estimate(params, tasks, key)

    return of_key


def gradient(make, rule=RULE):
    """(params, tasks) -> what an algorithm gives, with names for its arguments."""

    def of(params, tasks):
        return make(loss, rule)(params, tasks)

    of.__name__ = make.__name__
    return of


def fit_of(params, loss=wide):
    """A fit of parameters that the loss may not take."""
    value_and_grad = nm.maml_value_and_grad(loss, RULE)
    return nm.fit(KEY, params, value_and_grad, TASKS, optax.sgd(0.1), 2)


def adapt_of(params):
    return nm.adapt(wide, params, (np.ones((2, 1)), np.ones(2)), RULE)


def gradient_of(params):
    return nm.maml_value_and_grad(wide, RULE)(params, DRAWN)


def of_plus_plus(params):
    return nm.maml_plus_plus(loss, annealing=3)(params, DRAWN)


def evaluate_of(params):
    return nm.evaluate(KEY, params, wide, RULE, TASKS, episodes=2)


MISFITS = [
    ({"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, r"params\['w'\].*\(2, 2\)"),
    ({"w": jnp.ones((1, 2)), "b": jnp.ones(3)}, r"params\['b'\].*\(3,\)"),
]
STRUCTURES = (3, None, nm.maml(loss, RULE), lambda p, t: (p, p, p), lambda p, t: (p.sum(), (p, p)),
              lambda p, t: (jnp.ones(2), p), lambda p, t: (p.sum(), {"w": p}),
              lambda p, t: (p.sum(), p[0]), lambda p, t: p.sum(), lambda p, t: None,
              lambda p, t: (p.sum(), None), lambda p, t: (1j * p.sum(), p))  # fmt: skip

WRONG = [
    *wrong(nm.fit, FITTED, key=KEYS, value_and_grad=STRUCTURES, steps=(*COUNTS, None),
           params=(jnp.array(1), 3, 1j, {"w": jnp.arange(3)}, None, [], {}, "w"),
           sample_tasks=(3, None, DRAWN.support[0], {"a": 1}, [], "digits", lambda: DRAWN,
                         lambda key, more: DRAWN),
           optimizer=(0.1, None, optax.sgd, "adam", [optax.sgd(0.1)], {}),
           epochs=(1, 2, 0), evaluate=(3, LOOKS["evaluate"]), evaluate_every=(1,), patience=(3,),
           evaluation_tasks=(TASKS,), callback=(3, "print", [], lambda step: None),
           callback_every=(5, *COUNTS),
           checkpoint_every=(5, *COUNTS), resume=("all", "this", None, True, 1),
           progress=(1, 0, "yes", "x", None), state=(3, PARAMS, (1, 2), {}),
           mesh=(3, "cpu", [1, 2], ()), task_axis=("task",), checkpoint=(3, b"x", True, [], ""),
           nonfinite=(0, -1, None, True, 1.5, "skip", nm.LossScale), monitor=("loss",),
           monitor_mode=("max", "least", None)),
    *wrong(nm.fit, FITTED | LOOKS, evaluate_every=(*COUNTS, 3, 100), evaluate=(3, "loss", {}),
           evaluation_tasks=(3, [DRAWN], "x", {}), patience=COUNTS),
    *wrong(nm.fit, FITTED | LOOKS | {"patience": 2}, monitor=(3, "loss", ["loss"])),
    *wrong(nm.LossScale, {}, initial=(0, 0.5, np.nan, np.inf, "x", None, True), period=COUNTS,
           limit=COUNTS),
    *wrong(nm.fit, FITTED | {"callback": print}, callback_every=COUNTS),
    *(Wrong(function, {"params": params}, said)
      for function in (adapt_of, gradient_of, evaluate_of, fit_of) for params, said in MISFITS),
    *wrong(nm.adapt, ADAPTED, rule=RULES, mask=MASKS, remat=FLAGS, return_info=FLAGS,
           segment=SEGMENTS, truncate=COUNTS,
           params=(3, 1j, np.arange(2), None, {}, [], "w", jnp.array(True)),
           loss=(*FUNCTIONS, lambda w, d: w * d[0], lambda w, d: (loss(w, d), 0), lambda w, d: 1j,
                 lambda w, d: None, lambda w, d: 3)),
    Wrong(nm.adapt, ADAPTED | {"rule": nm.GradientDescent([0.1, 0.2])}, r"\brate\b"),
    Wrong(nm.adapt, ADAPTED | {"rule": nm.GradientDescent(jnp.ones(3))}, r"\brate\b"),
    Wrong(nm.adapt, ADAPTED | {"rule": nm.GradientFlow(1.0)}, "GradientFlow has no update"),
    Wrong(nm.maml, MADE | {"rule": nm.GradientFlow(1.0)}, "GradientFlow has no update"),
    *wrong(nm.evaluate, TESTED, key=KEYS, rule=RULES, loss=FUNCTIONS, metric=OPTIONAL_FUNCTIONS,
           tasks=(3, None, DRAWN.support[0], {"a": 1}, "x", []), episodes=COUNTS,
           per_step=FLAGS, params=(3, 1j, None, []), mask=MASKS),
    *wrong(nm.evaluate, TESTED | {"rule": nm.Proximal(1.0)}, per_step=(True,)),
    *(row for make in MAKERS for row in (
        *wrong(make, MADE, rule=RULES, loss=FUNCTIONS, inner_loss=OPTIONAL_FUNCTIONS,
               batch_size=COUNTS, has_aux=FLAGS, mask=(False, 1, "all", 0.0)),
        *wrong(gradient(make), {"params": PARAMS, "tasks": DRAWN}, tasks=TREES,
               params=(3, 1j, None, [], "w", np.arange(2), nm.ParamsAndRule(3, RULE))))),
    *(row for make in (nm.maml_value_and_grad, nm.fomaml) for row in wrong(
        make, MADE, wrt=(None, True, 1, "rate", ("params", "rule")))),
    *(Wrong(make, MADE | {"rule": nm.GradientDescent(0), "wrt": wrt}, r"rule must hold floating")
      for make in (nm.maml_value_and_grad, nm.fomaml) for wrt in ("rule", "both")),
    Wrong(nm.maml_value_and_grad, MADE | {"rule": optax.sgd(0.1), "wrt": "rule"},
          "rule must hold floating point numbers"),
    Wrong(gradient(nm.maml_value_and_grad), {"params": PAIR, "tasks": DRAWN}, "no gradient in its"),
    Wrong(gradient(nm.reptile), {"params": PAIR, "tasks": DRAWN}, "no gradient in its rule"),
    Wrong(OF_RULE, {"params": nm.ParamsAndRule(PARAMS, nm.Proximal(1.0)), "tasks": DRAWN},
          "rule in ParamsAndRule must be a GradientDescent"),
    Wrong(nm.adapt, ADAPTED | {"params": PAIR}, "pass its parts"),
    Wrong(nm.evaluate, TESTED | {"params": PAIR}, "pass its parts"),
    Wrong(nm.fit, FITTED | {"value_and_grad": OF_RULE}, r"params must be ParamsAndRule"),
    Wrong(nm.fit, FITTED | {"params": PAIR}, "no gradient in its rule"),
    *wrong(nm.variables, {"model": PAIR}, trained=("rules", True, PARAMS)),
    *wrong(nm.imaml, {"loss": loss, "rule": nm.Proximal(1.0)}, loss=FUNCTIONS,
           rule=(*RULES, RULE, nm.GradientFlow(1.0)), inner_loss=OPTIONAL_FUNCTIONS,
           batch_size=COUNTS, has_aux=FLAGS),
    *wrong(nm.anil, MADE | {"head": {"w": True}}, head=(None, False, 1, "head"), rule=RULES,
           loss=FUNCTIONS, has_aux=FLAGS, batch_size=COUNTS),
    *wrong(nm.maml_value_and_grad, MADE, method=("forward", 3, True, ""), segment=SEGMENTS,
           truncate=COUNTS, explain=FLAGS, memory_budget=BUDGETS),
    *wrong(nm.Minibatches, {"data": np.ones((4, 2))}, size=COUNTS,
           data=(nm.Minibatches(np.ones((4, 2))),)),
    *(Wrong(make, arguments | {"params": nm.MetaSGDParams(PARAMS, 0.1)},
            "params must be a model here, got MetaSGDParams")
      for make, arguments in ((nm.adapt, ADAPTED), (MAML, {"tasks": DRAWN}))),
    Wrong(nm.warm_start(loss, RULE, mask={"w": True, "h": False})[0],
          {"model": PARAMS, "tasks": DRAWN}, "params must be the model that init"),
    *wrong(nm.warm_start, {**MADE, "mask": {"w": True, "h": False}}, loss=FUNCTIONS, tasks=COUNTS,
           mask=(*MASKS[:-3], None), rule=RULES[:2], method=("forward", 3), has_aux=(True,),
           batch_size=(2,), wrt=("rule",)),
    *wrong(nm.memory_plan, {"value_and_grad": MAML, "params": PARAMS, "tasks": DRAWN},
           value_and_grad=(loss, None, 3), budget=BUDGETS, tasks=(DRAWN[0][0], None)),
    *wrong(nm.maml, MADE | {"rule": nm.Proximal(1.0)}, segment=(2,), truncate=(2,)),
    *wrong(nm.evolution_strategies, ESTIMATE, objective=FUNCTIONS, sigma=SIGMAS, antithetic=FLAGS,
           samples=(*COUNTS, 1, 3), batch_size=COUNTS, wrt=(None, "rates")),
    Wrong(nm.evolution_strategies, ESTIMATE | {"antithetic": False, "samples": 1}, "samples"),
    *wrong(keyed(), {"params": PARAMS, "tasks": DRAWN, "key": KEY}, key=KEYS,
           params=(3, 1j, None, [], "w", PAIR)),
    Wrong(keyed("rule"), {"params": PARAMS, "tasks": DRAWN, "key": KEY}, "must be ParamsAndRule"),
    Wrong(keyed(objective=lambda params, tasks: params), {"params": PARAMS, "tasks": DRAWN,
          "key": KEY}, "objective must return one real number"),
    *wrong(nm.persistent_evolution_strategies, MADE | {"truncation": 1, "sigma": 0.1, "samples": 2},
           loss=FUNCTIONS, rule=(*RULES, nm.Proximal(1.0), nm.GradientDescent(0)), sigma=SIGMAS,
           truncation=(*COUNTS, 2), samples=(*COUNTS, 1, 3), inner_loss=OPTIONAL_FUNCTIONS,
           mask=(False, 1, "all", 0.0), wrt=("params", None, True)),
    *wrong(PES_INIT, {"params": PAIR, "tasks": DRAWN}, tasks=(3, None, "tasks"),
           params=(PARAMS, None, nm.Stateful(PARAMS, 1))),
    Wrong(PES_INIT, {"params": nm.ParamsAndRule(PARAMS, nm.Momentum(0.1, 0.9, 1)), "tasks": DRAWN},
          "rule in ParamsAndRule must be a GradientDescent"),
    Wrong(PES_INIT, {"params": PAIR._replace(rule=nm.GradientDescent(0.1, 2)), "tasks": DRAWN},
          "rule in ParamsAndRule must take 1 steps"),
    *wrong(PES, {"params": PES_INIT(PAIR, DRAWN), "tasks": DRAWN, "key": KEY}, key=KEYS,
           params=(PARAMS, PAIR, None), tasks=(nm.tasks.Sinusoid(m=3, n_t=2, n_v=2)(KEY), 3)),
    *wrong(nm.meta_sgd, {"loss": loss}, loss=FUNCTIONS, steps=COUNTS, has_aux=FLAGS,
           batch_size=COUNTS, inner_loss=OPTIONAL_FUNCTIONS),
    *wrong(nm.maml_plus_plus, {"loss": loss, "annealing": 3}, loss=FUNCTIONS, has_aux=FLAGS,
           annealing=(-1, 1.5, "all", None, True, np.ones(2)), batch_size=COUNTS,
           second_order_from=(-1, 1.5, "all", None, True), inner_loss=OPTIONAL_FUNCTIONS,
           mask=(False, 1, "all", 0.0)),
    *(Wrong(make, {"model": model, "steps": 2}, r"\bparams\b")
      for make in (nm.maml_plus_plus_params, nm.per_step_model)
      for model in (3, 1j, None, [], "w", np.arange(2))),
    *wrong(nm.maml_plus_plus_params, {"model": PARAMS}, steps=COUNTS,
           rate=("fast", np.nan, None, [0.1, 0.2], [], 1j, np.ones(3), nm.Schedule(np.eye(3)))),
    *(Wrong(of_plus_plus, {"params": params}, said) for params, said in (
        (PARAMS, r"params must be MetaSGDParams\(params, rate\) for maml_plus_plus"),
        (nm.MetaSGDParams(PARAMS, 0.1), r"params must be those of maml_plus_plus_params\("))),
    *(row for make in (nm.maml, nm.maml_value_and_grad) for row in (
        *wrong(make, MADE, step_weights=([1.0, 2.0], 1.0, "last", np.nan, [np.inf], [], 1j)),
        Wrong(make, MADE | {"step_weights": [1.0], "truncate": 1}, "truncate must be None"),
        Wrong(make, {"loss": loss, "rule": nm.Proximal(1.0), "step_weights": [1.0]},
              "step_weights needs a rule that takes steps"))),
    *wrong(nm.maml_value_and_grad, MADE | {"step_weights": [1.0]}, method=("mixed", "low-rank")),
    *wrong(nm.per_step_model, {"model": PARAMS, "steps": 2}, steps=COUNTS,
           model=(nm.per_step_model(PARAMS, 2),)),
    *wrong(nm.per_step_state, {"loss": loss, "steps": 2}, loss=FUNCTIONS, steps=COUNTS),
    *(Wrong(make, {"loss": loss, "rule": nm.Proximal(zero)}, "strength must not be 0")
      for make in (nm.maml, nm.maml_value_and_grad, nm.imaml, nm.fomaml) for zero in (0.0, 0)),
    *(Wrong(make, {"loss": loss, "rule": nm.Implicit(RULE)}, "rule must depend on the start")
      for make in (nm.maml_value_and_grad, nm.imaml, nm.fomaml)),
    *(Wrong(nm.adapt, ADAPTED | {"rule": rule}, "strength")
      for rule in (nm.Proximal(jnp.ones(2)), nm.Implicit(RULE, jnp.ones(2)))),
    *(row for make in (nm.PrototypeHead, nm.RidgeHead, nm.LogisticHead)
      for row in wrong(make, {"features": loss}, features=FUNCTIONS, examples=OPTIONAL_FUNCTIONS,
                       head=(None, "", 3, ["head"], True), transposed=(1, 0, "yes", [True]))),
    *(row for make in (nm.RidgeHead, nm.LogisticHead)
      for row in wrong(make, {"features": loss}, strength=(*NUMBERS, np.ones(2), {"w": 1.0}))),
    *wrong(nm.LogisticHead, {"features": loss}, max_steps=COUNTS, tolerance=TOLERANCES),
    *wrong(nm.map_over_devices, SPREAD, batch_size=COUNTS, function=FUNCTIONS,
           items=(3, [], None, np.ones(0), {"a": np.ones(2), "b": np.ones(3)}, "ab")),
    *wrong(nm.im2col_convolution, IMAGES, stride=COUNTS, padding=("same", None, 1),
           x=(np.ones((4, 4, 1)), None, np.ones((1, 4, 4, 2)), "x"),
           kernel=(np.ones((3, 3, 2)), None, 3.0)),
    *wrong(nm.tasks.Sinusoid, SIZES, **dict.fromkeys(SIZES, COUNTS)),
    *wrong(nm.tasks.Quadratic, SIZES | {"p": 1, "sigma": 0.1, "nu": 0.1}, p=COUNTS, m=COUNTS,
           n_t=COUNTS, n_v=COUNTS, sigma=(-1.0, np.nan, "a", None, [0.1]), nu=(-1.0, None, 1j)),
    *wrong(nm.tasks.Grouped, GROUPED, m=(*COUNTS, 3), n_t=(*COUNTS, 4), n_v=(*COUNTS, 4),
           groups=([0, 1], None, 3, np.zeros((8, 1)), [None] * 8, [np.nan] * 8),
           data=(3, None, [], (np.ones(8), np.ones(7)), np.array(["a"] * 8),
                 (np.ones(8), np.array(list("abcdefgh"))), [None] * 8)),
    *(row for make in (nm.tasks.Episodes, nm.tasks.HostEpisodes)
      for row in wrong(make, LABELLED, ways=(*COUNTS, 3), shots=(*COUNTS, 4),
                       queries=(*COUNTS, 4), m=COUNTS, labels=([0, 1], None, np.zeros((8, 1))),
                       images=(np.array(["a"] * 8), None, 3), classes=([], [0, 7], "ab", 3),
                       orientations=(0, 2, True, None, "4", [4]), balanced=FLAGS, scale=FLAGS,
                       keys=FLAGS, augment=OPTIONAL_FUNCTIONS, augment_task=OPTIONAL_FUNCTIONS)),
    *(row for make in (nm.tasks.Episodes, nm.tasks.HostEpisodes)
      for row in wrong(make(**LABELLED).replace, {}, ways=(*COUNTS, 3), queries=(*COUNTS, 4),
                       classes=([0],), images=(np.ones(8),))),
    *wrong(nm.tasks.split_classes, {"labels": [0, 1, 2], "sizes": (2, 1)}, labels=([None, 1], []),
           sizes=((), (2, 2), (0, 1), (-1, 2), (0.5, 0.7), (1, 0.5), 3, "ab", None, [np.nan]),
           key=(3, "x")),
    *wrong(nm.tasks.image_folder, {"path": "."}, path=("nowhere", "no\nwhere"),
           size=(*COUNTS[:-1], (1, 2, 3), (0, 1)), mode=("CMYK", None, 3)),
    *(row for distribution in (
        TASKS, nm.tasks.Quadratic(p=1, sigma=0.1, nu=0.1, **SIZES), nm.tasks.Grouped(**GROUPED),
        nm.tasks.Episodes(**LABELLED), nm.tasks.HostEpisodes(**LABELLED),
        nm.tasks.Linear(nm.MixedLinearRegression(p=2, n_r=2, sigma=0.1, nu=0.1, **SIZES)))
      for row in wrong(distribution.__call__, {"key": KEY}, key=KEYS)),
]  # fmt: skip


def stepped(rule, params=PARAMS):
    """One adaptation."""
    return nm.adapt(loss, params, ADAPTED["support"], rule)


def value(w, target):
    return jnp.sum((w - target) ** 2)


def fitted(**changes):
    """Two steps on a loss that compiles at once."""
    given = {"params": 1.0, "sample_tasks": jax.random.normal, "steps": 2,
             "value_and_grad": jax.value_and_grad(value), "optimizer": optax.sgd(0.1)}  # fmt: skip
    return nm.fit(KEY, **given | changes).params


RIGHT = [
    Right("a rate of a fraction", lambda: stepped(nm.GradientDescent(Fraction(1, 10))),
          lambda: stepped(RULE)),
    Right("a rate of an integer", lambda: stepped(nm.GradientDescent(1)),
          lambda: stepped(nm.GradientDescent(1.0))),
    Right("rates in a list, for parameters in a list",
          lambda: nm.adapt(lambda p, t: p[0] ** 2 + p[1] ** 2, [1.0, 2.0], 0,
                           nm.GradientDescent([0.1, Fraction(-1, 2)])),
          lambda: [jnp.asarray(0.8), jnp.asarray(4.0)]),
    Right("an optimizer of optax", lambda: stepped(optax.sgd(0.1)), lambda: stepped(RULE)),
    Right("parameters of NumPy", lambda: stepped(RULE, np.ones(1, np.float32)),
          lambda: stepped(RULE)),
    Right("a mask of NumPy", lambda: nm.adapt(**ADAPTED, mask=np.bool_(True)),
          lambda: stepped(RULE)),
    Right("tasks as a pair", lambda: gradient(nm.fomaml)(PARAMS, tuple(DRAWN)),
          lambda: gradient(nm.fomaml)(PARAMS, DRAWN)),
    Right("tasks as a dict", lambda: gradient(nm.fomaml)(PARAMS, DRAWN._asdict()),
          lambda: gradient(nm.fomaml)(PARAMS, DRAWN)),
    Right("steps of NumPy", lambda: fitted(steps=np.int64(2)), fitted),
    Right("parameters of an array", lambda: fitted(params=np.float32(1)), fitted),
    Right("a raw key", lambda: TASKS(jax.random.PRNGKey(0)), lambda: DRAWN),
    Right("a batch size beyond the tasks",
          lambda: nm.fomaml(loss, RULE, batch_size=9)(PARAMS, DRAWN),
          lambda: gradient(nm.fomaml)(PARAMS, DRAWN)),
    Right("groups of strings",
          lambda: nm.tasks.Grouped(**GROUPED | {"groups": list("aaaabbbb")})(KEY),
          lambda: nm.tasks.Grouped(**GROUPED)(KEY)),
    Right("items in a list", lambda: nm.map_over_devices(SPREAD["function"], [np.ones(2)]),
          lambda: [np.ones(2)]),
]  # fmt: skip
