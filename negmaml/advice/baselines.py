"""What rates compete with: ridge on the group alone, and the linear mixed model."""

import numpy as np

from negmaml.advice.cv import as_residual
from negmaml.advice.moments import (
    from_sums,
    next_shrinkage,
    pooled_fit,
    random_coefficients,
    summaries,
)
from negmaml.advice.solve import ridge_path
from negmaml.advice.splits import Splits
from negmaml.advice.statistics import Quadratics

NUMBERS = 2**22  # of the systems of a batch of splits, 32 MB
TESTS = 1000  # of groups a split: with few groups each is tested on several draws of its rows
MOST_DRAWS = 4


def alone(forms: Quadratics, ridges, free: int):
    """Half the mean squared error of a ridge regression on the n_r rows of the group: (G, L)."""
    P, p = forms.test.shape[-1], forms.test.shape[-1] - forms.targets
    gram = forms.adapt.reshape(-1, P, P)
    v = as_residual(ridge_path(gram[:, :p, :p], gram[:, :p, p:], ridges, free))
    rest = forms.rest.reshape(-1, 1, P, P)
    values = np.sum(v * (rest @ v), -2).mean(-1)
    return values.reshape(*forms.adapt.shape[:2], -1).mean(1) / 2


def mixed_model(forms: Quadratics, splits: Splits, rows: int):
    r"""Half the mean squared error of the best linear unbiased predictor: (S, K).

    A linear mixed model (random intercept and slopes) with the moments of the training groups of
    each split; a held-out group's coefficients are their mean given its n_r rows,

        w0 + Omega (sigma^2 + A Omega)^-1 (c - A w0),      A = X^T X,  c = X^T y.
    """
    P = forms.test.shape[-1]
    p = P - forms.targets
    total = np.zeros(splits.weights.shape[:2])
    times = int(np.clip(TESTS // len(forms.test), 1, min(MOST_DRAWS, forms.adapt.shape[1])))
    for target in range(p, P):
        keep = [*range(p), target]
        pooled = forms.pooled[..., keep, :][..., keep]
        counts = np.full(len(pooled), rows)
        once = random_coefficients(pooled[:, 0], counts)
        tau = next_shrinkage(once, pooled[:, 0], counts)
        groups = summaries(pooled.reshape(-1, p + 1, p + 1), rows, tau, pooled_fit(pooled))
        estimates = from_sums(groups, splits.train)
        adapt, rest = (a[..., keep, :][..., keep] for a in (forms.adapt, forms.rest))
        step = max(1, NUMBERS // (len(pooled) * (p + 1) ** 2))
        for start in range(0, len(total), step):
            piece = slice(start, start + step)
            found = tuple(value[piece] for value in estimates)
            for more in range(times):
                draws = (splits.draws[piece] + more) % adapt.shape[1]
                errors = _adapted(*found, *_drawn(adapt, rest, draws))
                total[piece] += np.einsum("skg,sg->sk", splits.weights[piece], errors)
    return total / (2 * times * forms.targets)


def _drawn(adapt, rest, draws):
    return np.moveaxis(adapt[:, draws], 0, 1), np.moveaxis(rest[:, draws], 0, 1)


def _adapted(w0, omega, noise, adapt, rest):
    """Mean squared errors (S, G) of the estimates of S splits on their draws of G groups.

    With Omega = L L^T the system sigma^2 + L^T A L is positive definite whatever Omega.
    """
    p = w0.shape[-1]
    values, vectors = np.linalg.eigh(omega)
    L = (vectors * np.sqrt(np.maximum(values, 0))[:, None, :])[:, None]
    A, c = adapt[..., :p, :p], adapt[..., :p, p:]
    w0 = w0[:, None, :, None]
    Lt = np.swapaxes(L, -1, -2)
    system = Lt @ A @ L + noise[:, None, None, None] * np.eye(p)
    right = Lt @ (c - A @ w0)
    flat = ridge_path(system.reshape(-1, p, p), right.reshape(-1, p, 1), np.zeros(1), 0)
    v = as_residual(w0 + L @ flat.reshape(right.shape))
    return np.sum(v * (rest @ v), (-2, -1))
