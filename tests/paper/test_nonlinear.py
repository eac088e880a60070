"""Networks on quadratic regression, compared with the exact solution in their tangent kernel."""

import jax
import numpy as np
import pytest

from tests.internals import CURVE_RATES, FIXED_INDEX, RATES, figures, nonlinear, to_dataset

SMALL = nonlinear.NonlinearConfig(
    n_t=10, n_r=10, width=256, steps=120, test_tasks=20, test_points=10
)


TINY = nonlinear.NonlinearConfig(p=4, n_t=4, n_r=4, width=16, steps=2, test_tasks=3, test_points=3)


@pytest.mark.slow
def test_wide_networks_are_near_the_kernel_and_panels_meet():
    panels = nonlinear.panels(list(nonlinear.runs(jax.random.key(1), 2, SMALL)))
    for panel in panels.values():
        inside = np.abs(RATES) <= 0.3
        gap = np.abs(panel.mean / panel.theory - 1)[inside]
        assert np.median(gap) < 0.1
    at = FIXED_INDEX
    np.testing.assert_allclose(panels["a"].losses[at], panels["b"].losses[at], rtol=1e-5)


@pytest.mark.slow
def test_a_run_has_finite_losses_at_every_rate():
    first, second = nonlinear.runs(jax.random.key(1), 2, TINY)
    for losses in zip(first, second, strict=True):
        assert np.all(np.isfinite(losses)) and not np.array_equal(*losses)
    shapes = [losses.shape for losses in first]
    assert shapes == [RATES.shape] * 2 + [CURVE_RATES.shape] * 2


def test_runs_are_drawn_and_stored_like_the_linear_ones():
    # A run trains networks, whose compilation takes 20 s: these losses are made up.
    random = np.random.default_rng(0)
    shapes = [RATES.shape] * 2 + [CURVE_RATES.shape] * 2
    done = [nonlinear.NonlinearLosses(*map(random.random, shapes)) for _ in range(2)]
    panels = {"nonlinear": nonlinear.panels(done)}
    assert to_dataset(panels, {}).sizes["problem"] == 1
    figure = figures.reproduction(panels, points="networks", curve="exact")
    labels = figure.axes[1].get_legend_handles_labels()[1]
    assert labels[:1] == ["exact"] and "networks, ± standard error" in labels
    assert "theorem" not in to_dataset(panels, {})


def test_labels_have_mean_zero_over_tasks():
    config = SMALL._replace(m=2000, n_t=2, n_v=1)
    (_, y), _ = jax.jit(nonlinear.draw, static_argnums=1)(jax.random.key(0), config)[0]
    assert abs(y.mean()) < 4 * y.std() / 2000**0.5
