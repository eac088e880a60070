"""Theorems 1 and 2."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml.theory import distance, expansion_parameter, overparameterized, underparameterized
from negmaml.theory.expansions import _g_coefficients, _polynomial
from tests.helpers import OVER, RATES, UNDER, z_score

SQUARE = nm.MixedLinearRegression(p=12, m=4, n_t=5, n_v=3, n_r=5, sigma=1.0, nu=1.0)
both = pytest.mark.parametrize("problem", (OVER, UNDER), ids=("over", "under"))


def h(rate, n, p):
    return (1 - rate) ** 2 + rate**2 * (p + 1) / n


def theorem_1(q, train, adapt):
    """Theorem 1 as THEORY prints it, in plain floats and for scalar offsets."""
    ratio = q.n_v * q.m / q.p
    noise = q.sigma**2 * ratio / 2 * (1 + train**2 * q.p / q.n_t) / h(train, q.n_t, q.p)
    offset = (1 - ratio) / 2 * q.p * (q.omega0 - q.w0) ** 2
    spread = q.nu**2 / 2 * (1 + ratio) + offset + noise
    return q.sigma**2 / 2 * (1 + adapt**2 * q.p / q.n_r) + h(adapt, q.n_r, q.p) * spread


def theorem_2(q, train, adapt, power=2):
    """Theorem 2 in plain floats; the power of h_t is 1 in the misprint.

    Traces of Wishart matrices from their published polynomials in n and p.
    """
    n, p = q.n_t, q.p
    t1, t2 = n * p, n * p * (n + p + 1)
    t3 = n * p * (n**2 + p**2 + 3 * n * p + 3 * n + 3 * p + 4)
    t4 = n * p * (
        n**3 + p**3 + 6 * n * p * (n + p) + 6 * n**2 + 6 * p**2 + 17 * n * p + 21 * (n + p) + 20
    )
    t11, t12 = n * p * (n * p + 2), t2 * (n * p + 4)
    t22 = t2 * n * p * (n + p + 1) + 8 * t4 // 1 if False else None
    del t22
    a = train / n
    g1 = (t1 - 2 * a * t2 + a**2 * t3) / (n * p)
    g2 = (p * t1 - 2 * a * t11 + a**2 * t12) / (n * p**2)
    g3 = (p - 4 * a * t1 + 6 * a**2 * t2 - 4 * a**3 * t3 + a**4 * t4) / p
    return g1, g2, g3, t11, t12
