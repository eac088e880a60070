"""A random search over meta-training itself: each cell of a sweep is a run of `fit`.

    python -m negmaml.examples.training_sweep --n 20
    negmaml sweep training_sweep --store search.zarr        # the same as a spec, which resumes

All points share their networks and tasks, so that they differ only in the rates searched.
"""

from typing import Any

import jax
import numpy as np
import optax

import negmaml as nm
from negmaml.examples import mlp

# The inner rate may have either sign; of the outer one only the order of magnitude is open.
RANGES: dict[str, Any] = {
    "train_rate": {"low": -0.02, "high": 0.02},
    "outer_rate": {"low": 1e-4, "high": 1e-2, "scale": "log"},
}


def train(key, train_rate, outer_rate, steps, width=40, adapt=None):
    """Meta-train a network on sinusoids by `fit`; its test loss, and the curve of its losses.

    train_rate and outer_rate are traced: all points are one compiled program. adapt: the rule at
    test time.
    """
    adapt = nm.GradientDescent(0.01) if adapt is None else adapt
    for_params, for_training, for_test = (jax.random.fold_in(key, i) for i in range(3))
    tasks, fresh = (nm.tasks.Sinusoid(m=m, n_t=10, n_v=10) for m in (25, 500))
    value_and_grad = nm.maml_value_and_grad(mlp.loss, nm.GradientDescent(train_rate))
    params = mlp.init(for_params, (1, width, width, 1))
    trained = nm.fit(
        for_training, params, value_and_grad, tasks, optax.adam(outer_rate), int(steps)
    )
    test = nm.maml(mlp.loss, adapt)(trained.params, fresh(for_test))
    # Ten means tell the course of training; a store of all losses would be much larger.
    return {"test_loss": test, "curve": trained.loss.reshape(10, -1).mean(1)}


def main(n: int = 20, steps: int = 2000, seeds: int = 3, store: str | None = None):
    """Search n points; returns the dataset."""
    grid = {"steps": steps, "point": nm.sweeps.random_points(n, **RANGES)}
    # A seed gives all points the same start and tasks, so their differences are paired.
    return nm.sweep(
        train, grid, seeds, store=store, common_random_numbers=list(RANGES), progress=True
    )


def report(result) -> str:
    """The five best points."""
    loss = result.test_loss.mean("seed").values
    lines = [f"{'train rate':>10} {'outer rate':>10} {'test loss':>10}"]
    for i in np.argsort(loss)[:5]:
        at = result.isel(point=i)
        lines.append(f"{float(at.train_rate):10.4f} {float(at.outer_rate):10.5f} {loss[i]:10.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    import tyro

    print(report(tyro.cli(main)))
