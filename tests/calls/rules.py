"""Calls of `negmaml.rules`."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import optax

import negmaml as nm
from tests.calls.form import Right, wrong

COUNTS = (0, -1, 1.5, True, "3", np.nan, [2])
NUMBERS = (np.nan, -np.inf, "0.1", 1j, None, [], (), {}, np.zeros(0), np.array(["a"]), b"x", [None],
           [0.1, np.nan], {"w": "a"}, np.array([1j]), jnp.zeros((2, 0)), object())  # fmt: skip
TOLERANCES = (0, -1e-3, np.nan, np.inf, "x", True, [1e-3])
FLAGS = (1, 0, "yes", None, np.array(True))

WRONG = [
    *wrong(nm.GradientDescent, {"rate": 0.1}, rate=NUMBERS, steps=COUNTS),
    *wrong(nm.Momentum, {"rate": 0.1, "momentum": 0.9, "steps": 2}, rate=NUMBERS, momentum=NUMBERS,
           steps=COUNTS, nesterov=FLAGS),
    *wrong(nm.Preconditioned, {"rate": 0.1, "preconditioner": 1.0}, rate=NUMBERS,
           preconditioner=NUMBERS, steps=COUNTS),
    *wrong(nm.GradientFlow, {"time": 1.0}, time=NUMBERS),
    *wrong(nm.Proximal, {"strength": 1.0}, strength=NUMBERS, max_steps=COUNTS,
           tolerance=TOLERANCES),
    *wrong(nm.Implicit, {"inner": optax.sgd(0.1)}, strength=NUMBERS, steps=COUNTS,
           linear_steps=COUNTS, linear_solver=("lu", "", None, 3, True, dict),
           inner=(0.1, None, "sgd", [optax.sgd(0.1)], {}, nm.Proximal(1.0)),
           **dict.fromkeys(("tolerance", "linear_tolerance"), TOLERANCES)),
    *wrong(nm.Implicit, {"inner": nm.GradientDescent(0.1)}, steps=(1, 100)),
    *wrong(nm.Schedule, {}, values=(0.1, [], (), {}, None, "ab", [np.nan], ["a"], [1j], [[]],
                                    np.zeros((0, 2)), [0.1, None], jnp.array(1.0))),
    *wrong(nm.InnerOptimizer, {"transformation": optax.sgd(0.1)},
           transformation=(0.1, optax.sgd, None, "sgd", lambda g: g), steps=COUNTS),
]  # fmt: skip


def filters(rule):
    """The filter of a rule on a spectrum."""
    x = np.array([0.0, 0.5, 2.0])
    return rule.label_filter(x), rule.init_filter(x)


NUMBERS_OF_A_RULE = {
    "fraction": (Fraction(-1, 4), -0.25),
    "integer": (2, 2.0),
    "zero": (0, 0.0),
    "numpy float": (np.float64(-0.25), -0.25),
    "numpy float16": (np.float16(-0.25), -0.25),
    "numpy integer": (np.int8(-2), -2.0),
    "0-d array": (np.array(-0.25), -0.25),
    "jax array": (jnp.array([0.5, -1.0]), np.array([0.5, -1.0])),
    "integers": (np.array([2, -1]), np.array([2.0, -1.0])),
}
RIGHT = [
    Right(f"{rule.__name__} of {name}", lambda r=rule, v=given: filters(r(v)),
          lambda r=rule, v=plain: filters(r(v)))
    for rule in (nm.GradientDescent, nm.GradientFlow)
    for name, (given, plain) in NUMBERS_OF_A_RULE.items()
] + [
    Right("steps of NumPy", lambda: filters(nm.GradientDescent(0.5, np.int64(3))),
          lambda: filters(nm.GradientDescent(0.5, 3))),
    Right("a schedule of fractions", lambda: nm.Schedule([Fraction(1, 2), -1]).values,
          lambda: np.array([0.5, -1.0])),
    Right("a schedule of a tuple", lambda: nm.Schedule((0.5, -1)).values,
          lambda: np.array([0.5, -1.0])),
    Right("a strength of a fraction", lambda: filters(nm.Proximal(Fraction(1, 2))),
          lambda: filters(nm.Proximal(0.5))),
]  # fmt: skip
