"""Grouped data of known truth, shared by the tests of advice."""

import numpy as np
import pytest


def grouped_rows(seed=0, groups=40, rows=24, p=4, sigma=1.0, nu=1.0, w0=1.0):
    """x, y and labels of groups with weights of variance nu^2 / p around w0."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(groups, rows, p))
    w = w0 + nu / p**0.5 * random.normal(size=(groups, p))
    y = np.einsum("gnp,gp->gn", x, w) + sigma * random.normal(size=(groups, rows))
    return x.reshape(-1, p), y.ravel(), np.repeat(np.arange(groups), rows)


@pytest.fixture(scope="session")
def rows():
    return grouped_rows()
