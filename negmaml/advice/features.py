"""Features of a kernel: a linear model in them is the kernel's model on the data.

With K = U diag(l) U^T on rows X, the features

    psi(x) = k(x, X) U l^(-1/2)

satisfy psi(X) psi(X)^T = K. A linear model of psi therefore equals the kernel's model on these
rows and extends to all others. Many splits then cost as much as those of a linear model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from negmaml.kernels.points import as_kernel, cross

MAX_LANDMARKS = 2000  # rows of K: the eigendecomposition of more would take a minute
ROUNDING = 1e-10  # of the largest eigenvalue: smaller eigenvalues are rounding errors


@dataclass(frozen=True)
class KernelFeatures:
    """The function psi of the module docstring: `features(x)` is (rows, rank).

    Attributes:
        kernel: kernel(x1, x2) -> (rows 1, rows 2).
        landmarks: X, (rows, columns).
        weights: U l^(-1/2), (rows, rank).
        trace_fraction: fraction of the trace of K in the eigenvalues that are kept.
    """

    kernel: Callable
    landmarks: np.ndarray
    weights: np.ndarray
    trace_fraction: float

    def __call__(self, x) -> np.ndarray:
        return kernel_matrix(self.kernel, x, self.landmarks) @ self.weights

    @property
    def note(self) -> str:
        """A sentence on the rank of the features and the part of the kernel they represent."""
        rows, rank = self.weights.shape
        return f"kernel: {rank} features from {rows} rows, {self.trace_fraction:.4%} of its trace"


def kernel_features(kernel: Callable, x, random, most: int | None = None) -> KernelFeatures:
    """Return the leading features, at most `most`, of a kernel on rows x or on 2000 of them."""
    if len(x) > MAX_LANDMARKS:
        x = x[np.sort(random.choice(len(x), MAX_LANDMARKS, replace=False))]
    x = np.unique(x, axis=0)  # equal rows would only add zero eigenvalues
    values, vectors = np.linalg.eigh(kernel_matrix(kernel, x, x))
    # Rounding in a kernel of single precision leaves small negative eigenvalues.
    if values[-1] <= 0 or values[0] < -1e-4 * values[-1]:
        raise ValueError(
            "kernel must be positive semidefinite and not zero, got eigenvalues from "
            f"{values[0]:.3g} to {values[-1]:.3g} on the data"
        )
    total = np.maximum(values, 0).sum()
    # The directions of largest eigenvalue approximate K best; eigh sorts upwards.
    keep = np.flatnonzero(values > ROUNDING * values[-1])[::-1][:most]
    fraction = float(values[keep].sum() / total)
    return KernelFeatures(kernel, x, vectors[:, keep] / np.sqrt(values[keep]), fraction)


def kernel_matrix(kernel: Callable, x1, x2) -> np.ndarray:
    """Evaluate kernel(x1, x2) in float64; exactly symmetric if x1 is x2."""
    with jax.enable_x64(True):
        points = (jax.numpy.asarray(x, float) for x in (x1, x2))
        matrix = np.asarray(cross(as_kernel(kernel), *points), np.float64)
    if not np.all(np.isfinite(matrix)):
        raise ValueError("kernel must be finite on the data, got NaN or infinity")
    return (matrix + matrix.T) / 2 if x1 is x2 else matrix
