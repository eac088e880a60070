"""A kernel as features: the functions that its matrix on the data spans.

With K = U diag(l) U^T on rows X, the features psi(x) = k(x, X) U l^(-1/2) have psi(X) psi(X)^T =
K, so that a linear model of psi is the kernel's model on these rows, and extends to all others:
what `negmaml.kernels` finds for one set of tasks, at the price of a linear model for many splits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from negmaml.kernels.points import as_kernel, cross

LANDMARKS = 2000  # rows that span the functions; more would take a minute to decompose
ROUNDING = 1e-10  # of the largest eigenvalue: what is below is rounding


@dataclass(frozen=True)
class KernelFeatures:
    """psi of the head of this module: `features(x)` is (rows, rank).

    Attributes:
        kernel: kernel(x1, x2) -> (rows 1, rows 2).
        landmarks: X, (rows, columns).
        weights: U l^(-1/2), (rows, rank).
        share: of the trace of K that the kept functions hold.
    """

    kernel: Callable
    landmarks: np.ndarray
    weights: np.ndarray
    share: float

    def __call__(self, x) -> np.ndarray:
        return evaluated(self.kernel, x, self.landmarks) @ self.weights

    @property
    def note(self) -> str:
        """What was kept, in words."""
        rows, rank = self.weights.shape
        return f"kernel: {rank} functions on {rows} rows, which hold {self.share:.4%} of its trace"


def kernel_features(kernel: Callable, x, random, most: int | None = None) -> KernelFeatures:
    """The features of a kernel on rows x, or on 2000 of them; at most `most`, the leading ones."""
    if len(x) > LANDMARKS:
        x = x[np.sort(random.choice(len(x), LANDMARKS, replace=False))]
    x = np.unique(x, axis=0)
    values, vectors = np.linalg.eigh(evaluated(kernel, x, x))
    if values[-1] <= 0 or values[0] < -1e-4 * values[-1]:
        raise ValueError(
            "kernel must be positive semidefinite and not zero, got eigenvalues from "
            f"{values[0]:.3g} to {values[-1]:.3g} on the data"
        )
    total = np.maximum(values, 0).sum()
    keep = np.flatnonzero(values > ROUNDING * values[-1])[::-1][:most]
    share = float(values[keep].sum() / total)
    return KernelFeatures(kernel, x, vectors[:, keep] / np.sqrt(values[keep]), share)


def evaluated(kernel: Callable, x1, x2) -> np.ndarray:
    """kernel(x1, x2) in float64, symmetric if the rows are the same."""
    with jax.enable_x64(True):
        points = (jax.numpy.asarray(x, float) for x in (x1, x2))
        matrix = np.asarray(cross(as_kernel(kernel), *points), np.float64)
    if not np.all(np.isfinite(matrix)):
        raise ValueError("kernel must be finite on the data, got NaN or infinity")
    return (matrix + matrix.T) / 2 if x1 is x2 else matrix
