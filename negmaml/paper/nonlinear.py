r"""The paper's nonlinear experiment: an overparameterized network on quadratic regression.

Bernacchia 2021, section 5, argues that a wide network is linear in its parameters, so the results
for mixed linear regression hold for it. Here networks of two layers are meta-trained by gradient
descent on a few tasks, at rates of both signs. They are compared with the exact solution in the
tangent kernel at their initial parameters (`negmaml.kernels`), which needs no training. Both use
the same tasks. The mean of the labels over tasks is subtracted, so the initial function of a
network differs from the mean target only by its random part. Sizes follow those of the linear
problem; panels are as in `negmaml.paper.reproduce`.
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
from negmaml.kernels.system import systems, task_blocks
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


class NonlinearConfig(NamedTuple):
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


CONFIG = NonlinearConfig()
RUNS = 20


def init(key, config: NonlinearConfig):
    """Draw standard normal weights of both layers and biases of the first."""
    keys = jax.random.split(key, 3)
    shapes = {
        "weight": (config.p, config.width),
        "bias": (config.width,),
        "out": (config.width,),
    }
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def network(params, x):
    """Two layers, scaled so that rates do not depend on the width; x (n, p) to (n,)."""
    scale = (2 / x.shape[1]) ** 0.5
    hidden = jax.nn.relu(scale * (x @ params["weight"]) + params["bias"] / 2**0.5)
    return (2 / hidden.shape[1]) ** 0.5 * hidden @ params["out"]


def loss(params, data):
    """Half the mean squared error."""
    x, y = data
    return jnp.mean((network(params, x) - y) ** 2) / 2


def draw(key, config: NonlinearConfig) -> tuple[Tasks, Tasks]:
    """Draw training and test tasks, minus the mean of y over tasks, nu^2 (|x|^2 / p + 1)."""
    s = config
    sizes = (s.m, s.n_t, s.n_v), (s.test_tasks, s.n_r, s.test_points)

    def centred(part):
        x, y = part
        return x, y - s.nu**2 * (jnp.sum(x**2, -1) / s.p + 1)

    def one(i, m, n_t, n_v):
        family = Quadratic(p=s.p, m=m, n_t=n_t, n_v=n_v, sigma=s.sigma, nu=s.nu)
        return Tasks(*map(centred, family(jax.random.fold_in(key, i))))

    # Separate streams: the number of test tasks does not change the training tasks.
    return one(0, *sizes[0]), one(1, *sizes[1])


class NonlinearLosses(NamedTuple):
    """Test losses of one run.

    a, b: of networks at `RATES`, as adaptation rates (a) and as training rates (b).
    curve_a, curve_b: of the kernel's solution at `CURVE_RATES`.
    """

    a: jax.Array
    b: jax.Array
    curve_a: jax.Array
    curve_b: jax.Array


@partial(jax.jit, static_argnums=1)
@own_settings
def one_run(key, config: NonlinearConfig) -> NonlinearLosses:
    """Draw a network and tasks, solve exactly, train at every rate, and test all."""
    tasks, test = draw(jax.random.fold_in(key, 0), config)
    start = init(jax.random.fold_in(key, 1), config)
    # `Partial` is a pytree, so the parameters are traced and not constants of the program.
    kernel, f0 = kernels.empirical_ntk(network, start), Partial(network, start)

    def exact(train, adapt):
        return kernels.meta_train(kernel, tasks, train, f0=f0).loss(test, adapt)

    curve, fixed = GradientDescent(jnp.asarray(CURVE_RATES)), GradientDescent(FIXED_RATE)
    # The curvature of the lazy problem sets the step size of the outer descent.
    scales = _largest_eigenvalues(kernel, tasks, RATES)

    def trained(rate, scale):
        algorithm = maml_value_and_grad(loss, GradientDescent(rate))
        # The largest stable step of the lazy meta-loss; momentum for directions of low curvature.
        optimizer = Partial(partial(optax.sgd, momentum=0.9, nesterov=True), 1 / scale)
        return fit(key, start, algorithm, tasks, optimizer, config.steps).params

    # Five networks at a time, to bound the memory.
    networks = lax.map(lambda pair: trained(*pair), (jnp.asarray(RATES), scales), batch_size=5)
    at_fixed = jax.tree.map(lambda leaf: leaf[int(np.argmin(np.abs(RATES - FIXED_RATE)))], networks)
    rates = jnp.asarray(RATES, jnp.float32)
    return NonlinearLosses(
        lax.map(lambda rate: maml(loss, GradientDescent(rate))(at_fixed, test), rates),
        lax.map(lambda params: maml(loss, fixed)(params, test), networks),
        exact(fixed, curve),
        exact(curve, fixed),
    )


def _largest_eigenvalues(kernel, tasks: Tasks, rates):
    """The largest eigenvalue of the Hessian of the lazy meta-loss, at every rate."""
    (x_t, _), (x_v, y_v) = tasks
    x = jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in (x_t, x_v)])
    K = kernel(x, x)
    at, entries = systems(K, task_blocks(K, *x_t.shape[:2]), GradientDescent(jnp.asarray(rates)))
    return lax.map(lambda entry: jnp.linalg.eigvalsh(at(entry).G)[-1] / y_v.size, entries)


def runs(key, runs: int = RUNS, config: NonlinearConfig = CONFIG) -> Iterator[NonlinearLosses]:
    """Yield the losses of each run; run i depends only on the key and on i.

    Raises ValueError for fewer than 2 runs, which a standard error needs.
    """
    key = check_key("key", key)
    if check_count("runs", runs) < 2:
        raise ValueError(f"runs must be at least 2 for standard errors, got {runs!r}")
    if not isinstance(config, NonlinearConfig):
        raise TypeError(f"config must be a NonlinearConfig, got {config!r}")
    for i in range(runs):
        # NumPy waits for the run, so that progress is reported when it has ended.
        yield jax.tree.map(np.asarray, one_run(jax.random.fold_in(key, i), config))


def panels(done: list[NonlinearLosses]) -> dict[str, Panel]:
    """Both panels from at least two runs: points are networks, curves the kernel's solution."""
    parts: Any = [np.stack(part, -1) for part in zip(*done, strict=True)]
    stacked = NonlinearLosses(*parts)
    groups = min(10, len(done))

    def panel(losses, curves) -> Panel:
        curve = curves.mean(-1)
        found = with_jackknife(partial(best_on_grid, RATES), losses, groups)
        predicted = best_on_grid(CURVE_RATES, curve)
        return Panel(RATES, losses, CURVE_RATES, curve, predicted, *found)

    return {"a": panel(stacked.a, stacked.curve_a), "b": panel(stacked.b, stacked.curve_b)}
