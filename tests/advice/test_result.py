"""Curves and errors of advice from given losses of splits and of a bootstrap."""

import jax
import numpy as np
import pytest

import negmaml as nm
from tests.internals import (
    ALL,
    CVLosses,
    RateChoice,
    RateGrid,
    _loss_curves,
    bootstrap_error,
    loss_at,
    summarise,
)

RATES, RIDGES = np.array([-0.5, 0.0, 0.4]), np.array([0.0, 1.0, 3.0, 9.0])
EACH, REPLICATES, SPLITS = 5, 6, 4
RANDOM = np.random.default_rng(0)


def losses(*lead):
    """(..., 3, R, L) coefficients, (..., 3, 1, L) pooled, and those of ridges (..., L)."""
    meta, pooled = (RANDOM.uniform(1, 2, (*lead, 3, rates, 4)) for rates in (3, 1))
    return CVLosses(meta, pooled, {"per-group ridge": RANDOM.uniform(1, 2, (*lead, 4)),
                                   "mixed model": RANDOM.uniform(1, 2, (*lead, 3))})  # fmt: skip


def test_curves_are_best_losses_with_errors_at_their_own_adaptation_rates():
    meta, again = losses().meta, losses(REPLICATES, EACH).meta
    found = _loss_curves(meta, RateGrid(RATES, RIDGES, None), RateChoice(2, 1, 0.0), again, SPLITS)
    for rate in range(3):
        for ridge in range(4):
            at = rate, ridge
            assert found.adapt[at] == meta[1][at] / meta[2][at]
            own = loss_at(again, *at, found.adapt[at])
            best = loss_at(again, 2, 1, found.adapt[2, 1])
            np.testing.assert_allclose(found.loss[at], loss_at(meta, *at, found.adapt[at]))
            np.testing.assert_allclose(found.error[at], bootstrap_error(own, SPLITS))
            np.testing.assert_allclose(found.excess[at], found.loss[at] - found.loss[2, 1])
            np.testing.assert_allclose(found.excess_error[at], bootstrap_error(own - best, SPLITS))


def test_fitted_losses_of_pooled_methods_are_those_on_all_groups(rows, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "negmaml.advice.api.summarise", lambda *args: seen.append(args) or summarise(*args)
    )
    options = dict(m=10, n_t=5, n_v=5, n_r=8, splits=20, key=jax.random.key(0))
    found = nm.advise(*rows, rates=RATES, meta_ridges=RIDGES, **options)
    pooled = next(a for a in seen[0] if isinstance(a, CVLosses)).pooled[:, ALL]
    by_ridge = pooled[:, 0, 0].mean(0) / 2  # without adapting
    assert found.fitted_loss["pooled ridge"] == pytest.approx(by_ridge.min())
