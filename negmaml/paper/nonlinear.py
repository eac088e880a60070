r"""The paper's nonlinear experiment: an overparameterized network on quadratic regression.

Bernacchia 2021, section 5, argues that a wide network is linear in its parameters, so that what
holds for mixed linear regression holds for it. Here networks of two layers are meta-trained by
gradient descent on the meta-loss of a few tasks, at rates of both signs, and compared with the
exact solution in the tangent kernel at their initial parameters (`negmaml.kernels`), which needs
no training. Both see the same tasks, and the labels' mean over tasks is taken off, so that
networks start from the mean of what they are to learn but for their own random function. Sizes are
ours, after those of the linear problem; panels as in `negmaml.paper.reproduce`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import Partial

from negmaml import kernels
from negmaml._core.checks import check_count
from negmaml._core.keys import check_key
from negmaml._core.settings import own_settings
from negmaml.kernels.system import own_blocks, systems
from negmaml.meta import Tasks, maml, maml_value_and_grad
from negmaml.paper.reproduce import (
    CURVE_RATES,
    FIXED_RATE,
    RATES,
    Panel,
    best_on_grid,
    with_jackknife,
)
from negmaml.rules import GradientDescent
from negmaml.tasks import Quadratic
from negmaml.training import fit


class Setting(NamedTuple):
    """Sizes and scales of the experiment."""

    p: int = 20
    m: int = 3
    n_t: int = 30
    n_v: int = 2
    n_r: int = 20
    sigma: float = 1.0
    nu: float = 1.0
    width: int = 512
    steps: int = 400
    test_tasks: int = 50
    test_points: int = 20


SETTING = Setting()
RUNS = 20


def init(key, setting: Setting):
    """Standard normal weights of both layers and biases of the first."""
    keys = jax.random.split(key, 3)
    shapes = {
        "weight": (setting.p, setting.width),
        "bias": (setting.width,),
        "out": (setting.width,),
    }
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def network(params, x):
    """Two layers in the scaling in which rates do not depend on the width; x (n, p) to (n,)."""
    scale = (2 / x.shape[1]) ** 0.5
    hidden = jax.nn.relu(scale * (x @ params["weight"]) + params["bias"] / 2**0.5)
    return (2 / hidden.shape[1]) ** 0.5 * hidden @ params["out"]


def loss(params, data):
    """Half the mean squared error."""
    x, y = data
    return jnp.mean((network(params, x) - y) ** 2) / 2


def draw(key, setting: Setting) -> tuple[Tasks, Tasks]:
    """Tasks to train on and to test on, less the mean of y over tasks, nu^2 (|x|^2 / p + 1)."""
    s = setting
    sizes = (s.m, s.n_t, s.n_v), (s.test_tasks, s.n_r, s.test_points)

    def centred(part):
        x, y = part
        return x, y - s.nu**2 * (jnp.sum(x**2, -1) / s.p + 1)

    def one(i, m, n_t, n_v):
        family = Quadratic(p=s.p, m=m, n_t=n_t, n_v=n_v, sigma=s.sigma, nu=s.nu)
        return Tasks(*map(centred, family(jax.random.fold_in(key, i))))

    return one(0, *sizes[0]), one(1, *sizes[1])


class Losses(NamedTuple):
    """Test losses of one run: networks at `RATES`, the kernel's solution at `CURVE_RATES`; over
    the adaptation rate (a) and over the training rate (b)."""

    a: jax.Array
    b: jax.Array
    curve_a: jax.Array
    curve_b: jax.Array


@partial(jax.jit, static_argnums=1)
@own_settings
def one_run(key, setting: Setting) -> Losses:
    """Draw a network and tasks, solve exactly, train at every rate, and test all."""
    tasks, test = draw(jax.random.fold_in(key, 0), setting)
    start = init(jax.random.fold_in(key, 1), setting)
    kernel, f0 = kernels.neural_tangent(network, start), Partial(network, start)

    def exact(train, adapt):
        return kernels.meta_train(kernel, tasks, train, f0=f0).loss(test, adapt)

    curve, fixed = GradientDescent(jnp.asarray(CURVE_RATES)), GradientDescent(FIXED_RATE)
    scales = _largest_eigenvalues(kernel, tasks, RATES)

    def trained(rate, scale):
        algorithm = maml_value_and_grad(loss, GradientDescent(rate))
        # Steps of 1 / the largest curvature of the lazy meta-loss; momentum for the small ones.
        optimizer = Partial(partial(optax.sgd, momentum=0.9, nesterov=True), 1 / scale)
        return fit(key, start, algorithm, tasks, optimizer, setting.steps).params

    networks = lax.map(lambda pair: trained(*pair), (jnp.asarray(RATES), scales), batch_size=5)
    at_fixed = jax.tree.map(lambda leaf: leaf[int(np.argmin(np.abs(RATES - FIXED_RATE)))], networks)
    rates = jnp.asarray(RATES, jnp.float32)
    return Losses(
        lax.map(lambda rate: maml(loss, GradientDescent(rate))(at_fixed, test), rates),
        lax.map(lambda params: maml(loss, fixed)(params, test), networks),
        exact(fixed, curve),
        exact(curve, fixed),
    )


def _largest_eigenvalues(kernel, tasks: Tasks, rates):
    """Of the Hessian of the lazy meta-loss, at every rate."""
    (x_t, _), (x_v, y_v) = tasks
    x = jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in (x_t, x_v)])
    K = kernel(x, x)
    at, entries = systems(K, own_blocks(K, *x_t.shape[:2]), GradientDescent(jnp.asarray(rates)))
    return lax.map(lambda entry: jnp.linalg.eigvalsh(at(entry).G)[-1] / y_v.size, entries)


def runs(key, runs: int = RUNS, setting: Setting = SETTING) -> Iterator[Losses]:
    """The losses of one run after another; run i depends on the key and i alone.

    Raises ValueError for fewer than 2: a standard error needs as many.
    """
    key = check_key("key", key)
    if check_count("runs", runs) < 2:
        raise ValueError(f"runs must be at least 2 for standard errors, got {runs!r}")
    if not isinstance(setting, Setting):
        raise TypeError(f"setting must be a Setting of this module, got {setting!r}")
    for i in range(runs):
        yield jax.tree.map(np.asarray, one_run(jax.random.fold_in(key, i), setting))


def panels(done: list[Losses]) -> dict[str, Panel]:
    """Both panels from at least two runs: points are networks, curves the kernel's solution."""
    parts: Any = [np.stack(part, -1) for part in zip(*done, strict=True)]
    stacked = Losses(*parts)
    groups = min(10, len(done))

    def panel(losses, curves) -> Panel:
        curve = curves.mean(-1)
        found = with_jackknife(partial(best_on_grid, RATES), losses, groups)
        predicted = best_on_grid(CURVE_RATES, curve)
        return Panel(RATES, losses, CURVE_RATES, curve, predicted, *found)

    return {"a": panel(stacked.a, stacked.curve_a), "b": panel(stacked.b, stacked.curve_b)}
