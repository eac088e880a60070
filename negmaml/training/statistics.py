"""The mean over tasks and its interval, where some tasks may have diverged."""

import numpy as np

NORMAL_95 = 1.959964  # half width of the 95% interval of a normal variable with variance 1


def finite_mean(values: np.ndarray) -> tuple[float, float, float]:
    """Return (mean, half width of its 95% interval, share left out) of the finite values."""
    finite = values[np.isfinite(values)].astype(float)
    mean = finite.mean() if finite.size else np.nan
    error = finite.std(ddof=1) / finite.size**0.5 if finite.size > 1 else np.nan
    return float(mean), float(NORMAL_95 * error), 1 - finite.size / values.size
