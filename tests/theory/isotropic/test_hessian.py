"""The term of order 1/p from the definitions at the head of its module, differentiated by JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from tests.helpers import mostly_slow
from tests.internals import (
    FOR_BOTH,
    exponent,
    first_order,
    isotropic_inputs,
    solve_saddle,
    training_set,
)

pytestmark = pytest.mark.usefixtures("x64")

SIZES = dict(n_t=14, n_r=5, sigma=0.6, nu=0.9, omega0=0.2)
CASES = {  # rows fewer and more than dimensions, with and without ridge
    "over": (dict(p=20, m=3, n_v=4), -0.4, 0.0),
    "over, a ridge": (dict(p=20, m=3, n_v=4), -0.4, 2.0),
    "under": (dict(p=20, m=4, n_v=9), 0.3, 0.0),
    "ridge": (dict(p=20, m=4, n_v=6), 0.5, 5.0),
}


class Definition:
    """F and the equations at the saddle point, as functions of kappa, eta and rho."""

    def __init__(self, system):
        self.system = system

    def g(self, kappa):
        return self.system.weights @ (1 / (self.system.b**2 + kappa))

    def u(self, kappa):
        system = self.system
        free = kappa / (system.b**2 + kappa)
        return system.sigma**2 + system.p * (system.weights @ (system.V * free))

    def F(self, kappa, eta, rho):
        p, m, n_v = self.system.p, self.system.m, self.system.n_v
        g, u1 = self.g(kappa), jax.grad(self.u)(kappa)
        c = p * g + eta * u1
        E = n_v / (1 - rho) ** 2 - p
        a = p * jax.grad(self.g)(kappa) + eta * jax.grad(jax.grad(self.u))(kappa)
        det, A = a * E - (p * g) ** 2, E + 2 * kappa * p * g + kappa**2 * a
        last = jnp.log(jnp.abs((m - 1) * p * det + m * c**2 * A))
        return (
            -m * jnp.log(c) + m * jnp.log1p(-rho) + (m - 1) / 2 * jnp.log(jnp.abs(det)) + last / 2
        )

    def t(self, kappa, eta=0.0, rho=0.0):
        p, n_v = self.system.p, self.system.n_v
        left = self.u(kappa) - kappa * jax.grad(self.u)(kappa)
        return n_v - p + p * kappa * self.g(kappa) + n_v * rho / (1 - rho) - eta * left

    def K(self, kappa, eta=0.0):
        p, m, g = self.system.p, self.system.m, self.g(kappa)
        moved = eta * (m - 1) * jax.grad(self.u)(kappa) / (p * g**2)
        return (1 - m + m * kappa * g) / g + moved

    def ridge(self, kappa, eta, rho):
        return self.t(kappa, eta, rho) * self.K(kappa, eta)

    def psi(self, kappa, rho=0.0):
        """dF/deta at fixed ridge and fixed weight of the fresh rows, at eta = 0."""
        at = kappa, 0.0, rho
        held = [jax.grad(of, (0, 1, 2))(*at)
                for of in (self.ridge, lambda *at: at[2] * self.t(*at))]  # fmt: skip
        (a, e, b), (c, f, d) = held
        determinant = a * d - b * c
        moves = (-d * e + b * f) / determinant, (c * e - a * f) / determinant
        F = jax.grad(self.F, (0, 1, 2))(*at)
        return F[1] + F[0] * moves[0] + F[2] * moves[1]

    def chi(self, kappa):
        return jax.grad(self.F)(kappa, 0.0, 0.0) / jax.grad(self.ridge)(kappa, 0.0, 0.0)


@jax.jit
def defined(system):
    """Return the derivatives of F by name, and the 1/p terms of weight error and task error."""
    it = Definition(system)
    p, m, n_v, D2 = system.p, system.m, system.n_v, system.offset
    first, second = (of(it.F, (0, 1, 2))(1.0, 0.0, 0.0) for of in (jax.grad, jax.hessian))
    F = {"k": first[0], "e": first[1], "r": first[2], "kk": second[0][0], "ek": second[0][1],
         "er": second[1][2], "kr": second[0][2]}  # fmt: skip

    def X(kappa):
        return jax.grad(it.F, 2)(kappa, 0.0, 0.0) - n_v * it.K(kappa) * it.chi(kappa)

    (t, t1), (K, K1), (psi, psi1), (_, chi1), (X0, X1) = (
        jax.value_and_grad(function)(1.0) for function in (it.t, it.K, it.psi, it.chi, X)
    )
    slope, psi_rho = t1 * K + t * K1, jax.grad(it.psi, 1)(1.0, 0.0)
    weight_error = t1 * psi + t * psi1 - D2 / p * (t * K) ** 2 * chi1
    error = n_v * (psi * K1 - psi1 * K) + slope * psi_rho - D2 / p * K**2 * (X1 * t - X0 * t1)
    return F, weight_error / slope, error / (m * slope)


@pytest.mark.parametrize(("sizes", "rate", "ridge"), mostly_slow(CASES.values(), 1, 2))
def test_the_next_order_is_that_of_its_definition(sizes, rate, ridge):
    problem = nm.MixedLinearRegression(**SIZES, **sizes)
    inputs, (rule,) = isotropic_inputs(problem, (nm.GradientDescent(rate),), ridge, "auto")
    _, _, system, at = solve_saddle(training_set(inputs, rule), True)
    expected, weight_error, error = defined(jax.tree.map(jnp.asarray, system))
    found = exponent(system, at, FOR_BOTH)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-8, err_msg=name)
    terms = first_order(system, at, True)
    np.testing.assert_allclose(terms[0], weight_error, rtol=1e-7)
    if at.t > 1e-9:  # else rho has no weight to be fixed
        np.testing.assert_allclose(terms[1], error, rtol=1e-7)
    np.testing.assert_array_equal(first_order(system, at, False)[0], terms[0])
