"""Problems and rates that several test modules share."""

import negmaml as nm

OVER = nm.MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
UNDER = nm.MixedLinearRegression(p=30, m=40, n_t=5, n_v=25, n_r=10, sigma=0.2, nu=0.2)

# Both signs, zero, and far out.
RATES = (-2.5, -0.4, -1e-3, 0.0, 0.3, 1.7)


def z_score(values, predicted):
    """Distance of a sample's mean from a prediction in standard errors."""
    return (values.mean() - predicted) / (values.std(ddof=1) / values.size**0.5)
