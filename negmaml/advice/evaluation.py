"""Evaluates every method on splits of the groups."""

from typing import NamedTuple

import numpy as np

from negmaml.advice.baselines import mixed_model, mixed_structures, num_test_draws, per_group_ridge
from negmaml.advice.cv import CVLosses, cv_losses
from negmaml.advice.data import GroupedRows
from negmaml.advice.methods import MIXED, SINGLE
from negmaml.advice.selection import ALL, RateGrid
from negmaml.advice.splits import Splits
from negmaml.advice.statistics import QuadraticForms

MIXED_MODEL_FEATURES = 40  # each group of a mixed model costs the cube of their number


class Sizes(NamedTuple):
    """Number of training groups m; support, query and adaptation rows of a group."""

    m: int
    n_t: int
    n_v: int
    n_r: int


def per_group_ridges(grid: RateGrid, sizes: Sizes) -> np.ndarray:
    """The ridges of the per-group ridge: as many per row as those of meta-training.

    A group has n_r rows to adapt on, meta-training has m n_v query rows.
    """
    return grid.ridges * sizes.n_r / (sizes.m * sizes.n_v)


class CrossEvaluation(NamedTuple):
    """The data, grid and quadratic forms that all splits share."""

    data: GroupedRows
    sizes: Sizes
    grid: RateGrid
    forms: QuadraticForms

    def losses(
        self, splits: Splits, advance=lambda count: None, structure: int | None = None
    ) -> CVLosses:
        """Losses of every method.

        structure: the only structure of the mixed model to evaluate, for bootstrap replicates,
            whose mean over splits also needs only one draw of rows.
        """
        num_unpenalized, sizes = int(self.data.intercept), self.sizes
        grid = self.grid.rates, self.grid.ridges
        found = cv_losses(self.forms, splits, *grid, num_unpenalized, advance)
        single = per_group_ridge(self.forms, per_group_ridges(self.grid, sizes), num_unpenalized)
        # It uses no other group, so one loss for each group serves every split.
        others = {SINGLE: splits.weights @ single}
        if self.data.x.shape[1] <= MIXED_MODEL_FEATURES:
            names, rows = mixed_structures(self.data.intercept), sizes.n_t + sizes.n_v
            draws = num_test_draws(self.forms)
            if structure is None:
                others[MIXED] = mixed_model(self.forms, splits, rows, names, draws)
            else:
                values = mixed_model(self.forms, splits, rows, names[structure : structure + 1], 1)
                others[MIXED] = np.broadcast_to(values, (*values.shape[:-1], len(names)))
        return found._replace(others=others)

    def best_structure(self, losses: CVLosses) -> int | None:
        """Index of the best structure of the mixed model, if it is among the methods."""
        values = losses.others.get(MIXED)
        return None if values is None else int(np.argmin(values.mean(0)[ALL]))
