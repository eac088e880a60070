"""Calls of `negmaml.kernels`."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np

import negmaml as nm
from negmaml import kernels
from tests.calls.form import Right, Wrong, wrong
from tests.calls.problem import RIDGES, RULES
from tests.calls.rules import COUNTS
from tests.internals import as_pytree

RULE = nm.GradientDescent(-0.5)
X = np.linspace(-1, 1, 12).reshape(2, 6, 1)
Y = X[..., 0]
TASKS = nm.Tasks((X[:, :3], Y[:, :3]), (X[:, 3:], Y[:, 3:]))


def linear(a, b):
    return a @ b.T + 1


TRAINED = {"kernel": linear, "tasks": TASKS, "rule": RULE, "meta_ridge": 0.1}
WITH_METRIC = nm.Preconditioned(0.1, np.ones(1))
BAD_TASKS = (None, 3, "tasks", {}, X, (X, Y), ((X, Y), (X[0], Y[0])), ((X,), (X,)),
             ((X, Y), (X, Y[:, :2])), ((X * np.nan, Y), (X, Y)), ((X, Y * 1j), (X, Y)),
             ((X, Y), (np.ones((2, 6, 2)), Y)))  # fmt: skip
BAD_KERNELS = (None, 3, "rbf", np.eye(12), lambda a, b: 1.0, lambda a, b: (a @ b.T)[:1],
               lambda a, b: -(a @ b.T), lambda a, b: a @ b.T * jnp.nan, lambda a, b: 1j * (a @ b.T),
               lambda a, b: a + jnp.zeros((len(a), len(b))))  # fmt: skip
RIDGES = tuple(ridge for ridge in RIDGES if ridge != [0.1, 0.2])  # several are one batch

# As from `meta_train` and `leave_one_task_out`, without training.
MODEL = kernels.KernelModel(
    as_pytree(linear), None, X.reshape(12, 1), np.ones((12, 1)), True, False
)
LEFT = kernels.LeftOut(Y[:, :3, None], Y[:, 3:, None], True, None)
WRONG = [
    *(row for function in (kernels.meta_train, kernels.leave_one_task_out)
      for row in wrong(function, TRAINED, kernel=BAD_KERNELS, tasks=BAD_TASKS,
                       rule=(*RULES, WITH_METRIC), meta_ridge=(*RIDGES, [0.1, -0.1]),
                       f0=(3, "zero", np.ones(12), lambda x: 0.0, lambda x: 1j * x[..., 0]))),
    Wrong(kernels.meta_train, TRAINED | {"rule": nm.InnerRule()},
          "has no label_filter"),
    *wrong(kernels.meta_train, TRAINED, method=("exact", 3, True, "")),
    *wrong(MODEL.adapt, {"support": (X[0], Y[0]), "rule": RULE}, rule=(*RULES, WITH_METRIC),
           support=(None, 3, X, (X[0], Y[0, :2]), (X, Y), (X[0], Y[0] * 1j),
                    (X[0], Y[0] * np.nan))),
    *wrong(MODEL.loss, {"tasks": TASKS, "rule": RULE}, rule=RULES, tasks=BAD_TASKS),
    *wrong(LEFT.losses, {"rule": RULE}, rule=RULES),
    *wrong(kernels.relu_network, {"depth": 1}, depth=COUNTS, kind=("tanh", None, 3),
           weight_variance=(-1.0, np.nan, "a", None, [1.0]), bias_variance=(-1.0, np.nan, 1j)),
    *wrong(kernels.empirical_ntk, {"apply": lambda w, x: x @ w, "params": np.ones(1)},
           apply=(3, None, "mlp"), params=(None, {}, np.arange(2), 1j * np.ones(2), "w")),
]  # fmt: skip


def trained(**changes):
    """The weights of a small model."""
    return kernels.meta_train(**TRAINED | changes).weights


RIGHT = [
    Right("a list of rates", lambda: trained(rule=nm.GradientDescent([-0.5, 0, Fraction(1, 4)])),
          lambda: trained(rule=nm.GradientDescent(np.array([-0.5, 0, 0.25])))),
    Right("a list of ridges", lambda: trained(meta_ridge=[0.1, 1]),
          lambda: trained(meta_ridge=np.array([0.1, 1.0]))),
    Right("a ridge of a fraction", lambda: trained(meta_ridge=Fraction(1, 2)),
          lambda: trained(meta_ridge=0.5)),
    Right("tasks as a dict", lambda: trained(tasks=TASKS._asdict()), trained),
    Right("points in a list", lambda: MODEL([[0.5], [1]]), lambda: MODEL(np.array([[0.5], [1.0]]))),
    Right("a support of lists", lambda: MODEL.adapt([X[0].tolist(), Y[0].tolist()], RULE)(X[1]),
          lambda: MODEL.adapt((X[0], Y[0]), RULE)(X[1])),
]  # fmt: skip
