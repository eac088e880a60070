"""The cost of less data: the loss of the recommended method at half of each size."""

import numpy as np

from negmaml.advice.evaluation import CrossEvaluation, Sizes
from negmaml.advice.selection import ALL, best_choices, losses_of
from negmaml.advice.solve import single_blas_thread
from negmaml.advice.splits import cross_validation
from negmaml.advice.statistics import quadratic_forms

SPLITS = 40


def cost_of_less(advice) -> dict[str, float]:
    """Relative increase of the recommended method's loss with half of the data: {change: cost}."""
    m, n_t, n_v, n_r = advice.sizes
    changes = {
        "half of the training groups": {"m": m // 2},
        "half of their rows": {"n_t": n_t // 2, "n_v": n_v // 2},
        "half of the rows to adapt on": {"n_r": n_r // 2},
    }
    with single_blas_thread():
        now = _loss(advice, advice.sizes)
        return {
            name: _loss(advice, advice.sizes._replace(**change)) / now - 1
            for name, change in changes.items()
            if min(change.values()) > 0
        }


def _loss(advice, sizes: Sizes) -> float:
    """The loss of the recommended method at other sizes, at its best choice for them."""
    grid, old = advice.grid, advice.sizes
    # As many ridges per row as before, since the meta-system is a sum over rows.
    grid = grid._replace(ridges=grid.ridges * sizes.m * sizes.n_v / (old.m * old.n_v))
    # The same numbers for all sizes: their differences have less noise.
    random = np.random.default_rng(0)
    forms = quadratic_forms(advice.data, sizes.n_t, sizes.n_v, sizes.n_r, random)
    plan = cross_validation(advice.data.groups, sizes.m, forms.train.shape[1], SPLITS, random)
    run = CrossEvaluation(advice.data, sizes, grid, forms)
    mean = run.losses(plan).map(lambda a: a.mean(0)[ALL])
    return float(losses_of(best_choices(mean, grid), mean)[advice.recommended])
