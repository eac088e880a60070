"""Baselines of the rates: a ridge regression for each group, and the linear mixed model."""

import numpy as np

from negmaml.advice.cv import residual_vector
from negmaml.advice.moments import (
    STRUCTURES,
    RandomCoefficients,
    estimate_from_sums,
    pooled_fit,
    random_coefficients,
    structure_basis,
    summarize_groups,
    updated_shrinkage,
)
from negmaml.advice.solve import ridge_path
from negmaml.advice.splits import Splits
from negmaml.advice.statistics import QuadraticForms

BATCH_NUMBERS = 2**22  # in the systems of a batch of splits, 32 MB
MIN_TESTS = 1000  # groups tested a split: few groups are tested on several draws of their rows
MAX_DRAWS = 4


def per_group_ridge(forms: QuadraticForms, ridges, num_unpenalized: int):
    """Half the mean squared error of a ridge regression on the n_r rows of each group: (G, L)."""
    P = forms.test.shape[-1]
    p = P - forms.targets
    gram = forms.adapt.reshape(-1, P, P)
    v = residual_vector(ridge_path(gram[:, :p, :p], gram[:, :p, p:], ridges, num_unpenalized))
    rest = forms.rest.reshape(-1, 1, P, P)
    values = np.sum(v * (rest @ v), -2).mean(-1)  # v^T M v, averaged over targets
    return values.reshape(*forms.adapt.shape[:2], -1).mean(1) / 2


def mixed_structures(intercept: bool) -> tuple[str, ...]:
    """The structures of Omega to choose among: "intercept" needs a constant feature."""
    return STRUCTURES if intercept else STRUCTURES[1:]


def num_test_draws(forms: QuadraticForms) -> int:
    """Number of draws of their rows that few groups are tested on."""
    return int(np.clip(MIN_TESTS // len(forms.test), 1, min(MAX_DRAWS, forms.adapt.shape[1])))


def mixed_model(forms: QuadraticForms, splits: Splits, rows: int, structures, draws: int = 1):
    r"""Half the mean squared error of the best linear unbiased predictor: (S, K, structures).

    A linear mixed model (random intercept and slopes) with the moments of the training groups of
    each split. A held-out group's coefficients are their mean given its n_r rows,

        w0 + Omega (sigma^2 + A Omega)^-1 (c - A w0),      A = X^T X,  c = X^T y.
    """
    P = forms.test.shape[-1]
    p = P - forms.targets
    total = np.zeros((*splits.weights.shape[:2], len(structures)))
    # The moments are those of one target, so every target has a mixed model of its own.
    for target in range(p, P):
        keep = [*range(p), target]
        pooled, adapt, rest = (
            a[..., keep, :][..., keep] for a in (forms.pooled, forms.adapt, forms.rest)
        )
        for i, structure in enumerate(structures):
            estimates = _moments_of_splits(pooled, splits, rows, structure)
            total[..., i] += _split_errors(estimates, splits, adapt, rest, draws)
    return total / (2 * draws * forms.targets)


def _moments_of_splits(pooled, splits: Splits, rows: int, structure: str) -> RandomCoefficients:
    """The moments of the training groups of each split."""
    # One shrinkage for all splits, from the first draw: sums over groups need a common one.
    counts = np.full(len(pooled), rows)
    rough = random_coefficients(pooled[:, 0], counts, structure=structure)
    tau = updated_shrinkage(rough, pooled[:, 0], counts)
    # All draws are summarized once; a split is then a sum of rows of `groups`.
    flat = pooled.reshape(-1, *pooled.shape[-2:])
    groups = summarize_groups(flat, rows, tau, pooled_fit(pooled))
    return estimate_from_sums(groups, splits.train, structure_basis(structure, flat, rows))


def _split_errors(estimates, splits: Splits, adapt, rest, num_draws: int):
    """Sums over `num_draws` draws of the mean squared errors: (S, K)."""
    total = np.zeros(splits.weights.shape[:2])
    step = max(1, BATCH_NUMBERS // (len(adapt) * adapt.shape[-1] ** 2))
    for start in range(0, len(total), step):
        batch = slice(start, start + step)
        moments = tuple(value[batch] for value in estimates)
        for shift in range(num_draws):
            # Draws do not depend on the split, so the next ones serve as well.
            draws = (splits.draws[batch] + shift) % adapt.shape[1]
            drawn = (np.moveaxis(a[:, draws], 0, 1) for a in (adapt, rest))
            errors = _prediction_errors(*moments, *drawn)
            total[batch] += np.einsum("skg,sg->sk", splits.weights[batch], errors)
    return total


def _prediction_errors(w0, omega, noise, adapt, rest):
    """Mean squared errors (S, G) of the moments of S splits on their draws of G groups."""
    p = w0.shape[-1]
    A, c = adapt[..., :p, :p], adapt[..., :p, p:]
    v = residual_vector(predicted_coefficients(w0, omega, noise, A, c))
    return np.sum(v * (rest @ v), (-2, -1))


def predicted_coefficients(w0, omega, noise, A, c):
    """Best linear unbiased prediction of the coefficients of G groups: (S, G, p, 1).

    Arguments:
        w0, omega, noise: moments, (S, p), (S, p, p) and (S,).
        A, c: X^T X and X^T y of each group, (S, G, p, p) and (S, G, p, 1).

    With Omega = L L^T, Omega (sigma^2 + A Omega)^-1 = L (sigma^2 + L^T A L)^-1 L^T. The last system
    is positive definite for every Omega.
    """
    p = w0.shape[-1]
    # Estimates of Omega have eigenvalues of zero, where a Cholesky factor does not exist.
    values, vectors = np.linalg.eigh(omega)
    L = (vectors * np.sqrt(np.maximum(values, 0))[:, None, :])[:, None]
    w0 = w0[:, None, :, None]
    Lt = np.swapaxes(L, -1, -2)
    system = Lt @ A @ L + noise[:, None, None, None] * np.eye(p)
    right = Lt @ (c - A @ w0)
    flat = ridge_path(system.reshape(-1, p, p), right.reshape(-1, p, 1), np.zeros(1), 0)
    return w0 + L @ flat.reshape(right.shape)
