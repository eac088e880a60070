"""Derivatives of optima against finite differences: forward, reverse, and of second order."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

import negmaml as nm
from negmaml.theory import best_adapt_rate, best_meta_ridge, best_rates, best_train_rate

OFF = nm.MixedLinearRegression(p=40, m=4, n_t=20, n_v=25, n_r=20, sigma=0.5, nu=1.0, omega0=0.2)
TRAIN = nm.GradientDescent(-0.2)


def adapting(problem):
    return best_adapt_rate(problem, TRAIN, nm.Proximal(0.0))


def both(problem):
    return best_rates(problem)[1]


def ridge(problem):
    return best_meta_ridge(problem, TRAIN)


def of_noise(best, problem=OFF):
    return lambda sigma: best(dataclasses.replace(problem, sigma=sigma))


def by_differences(function, x, step):
    """The slope at x to fourth order."""
    ahead, behind, far, back = (float(function(x + k * step)) for k in (1, -1, 2, -2))
    return (8 * (ahead - behind) - (far - back)) / (12 * step)


slow = pytest.mark.slow


def coloured(p, m, exponent, sigma):
    return nm.MixedLinearRegression(
        p=p, m=m, n_t=20, n_v=3, n_r=10, sigma=sigma, nu=1.0,
        input_covariance=np.arange(1.0, p + 1) ** -exponent,
    )  # fmt: skip


@slow  # by default `known_step` below has these slopes
@pytest.mark.parametrize(
    ("problem", "expected"),
    ((coloured(30, 4, 1.0, 0.5), -8.990), (coloured(24, 6, 0.5, 1.0), -1.2404)),
)
def test_the_slope_of_the_best_rate_in_the_noise_for_inputs_with_a_covariance(
    problem, expected, x64
):
    """The differences of a fine search."""

    def best(sigma):
        noisy = dataclasses.replace(problem, sigma=sigma)
        return best_train_rate(noisy, adapt=nm.GradientDescent(0.2))

    at = problem.sigma
    assert float(jax.grad(best)(at)) == pytest.approx(expected, rel=3e-4)
    assert float(jax.jvp(best, (at,), (1.0,))[1]) == pytest.approx(expected, rel=3e-4)


@nm.pytree
class Averaging(nm.InnerRule):
    """Gradient descent that steps from the mean of its last two points, for arrays of JAX."""

    rate: Any
    steps: int = nm.static(default=2)
    linear = True
    tunable = "rate"

    def init(self, params):
        return params

    def update(self, gradient, state, params):
        middle = jax.tree.map(lambda new, old: (new + old) / 2, params, state)
        return jax.tree.map(lambda w, g: w - self.rate * g, middle, gradient), params


RNG = np.random.default_rng(5)
COLOURED = dataclasses.replace(
    coloured(30, 4, 1.0, 0.5), weight_covariance=RNG.uniform(0.5, 2, 30),
    omega0=RNG.normal(size=30) / 10, w0=0.1,
)  # fmt: skip
LONG = dataclasses.replace(
    COLOURED, p=150, n_v=8, input_covariance=np.linspace(1, 0.2, 150),
    weight_covariance=np.ones(150), omega0=0.2,
)  # fmt: skip
ORTHOGONAL = np.linalg.qr(RNG.normal(size=(30, 30)))[0]
TURNED = dataclasses.replace(
    COLOURED, input_covariance=(ORTHOGONAL / np.arange(1.0, 31)) @ ORTHOGONAL.T
)


def train_rate(problem, **numbers):
    return best_train_rate(problem, **numbers)


def known_step(problem, rate=0.2):
    return best_train_rate(problem, adapt=nm.GradientDescent(rate))


def ridged(problem, meta_ridge=0.5):
    return best_train_rate(problem, meta_ridge=meta_ridge)


def two_steps(problem):
    return best_train_rate(problem, nm.GradientDescent(0.0, 2))


def momentum(problem, momentum=0.4):
    return best_train_rate(problem, nm.Momentum(0.0, momentum, 2))


def averaging(problem):
    return best_train_rate(problem, Averaging(0.0))


def flow(problem):
    return best_train_rate(problem, nm.GradientFlow(0.0))


def strength(problem):
    return best_train_rate(problem, nm.Proximal(0.0))


def best_ridge(problem, rate=-0.2):
    return best_meta_ridge(problem, nm.GradientDescent(rate))


def best_strength(problem, rate=-0.2):
    return best_adapt_rate(problem, nm.GradientDescent(rate), nm.Proximal(0.0))


def best_step(problem, rate=-0.2):
    return best_adapt_rate(problem, nm.GradientDescent(rate))


def both_rates(problem):
    return best_rates(problem)[1]


def expanded(problem):
    return best_train_rate(problem, method="expansion")


@pytest.mark.parametrize(
    ("best", "problem", "options"),
    [
        (train_rate, OFF, {}),
        (best_ridge, OFF, {"rate": -0.2}),
        (known_step, COLOURED, {"rate": 0.2}),
        (averaging, OFF, {}),
        (expanded, OFF, {}),
        *(
            pytest.param(*case, marks=slow)
            for case in (
                (ridged, OFF, {"meta_ridge": 0.5}),
                (momentum, OFF, {"momentum": 0.4}),
                (flow, OFF, {}),
                (strength, OFF, {}),
                (best_strength, OFF, {"rate": -0.2}),
                (best_step, OFF, {"rate": -0.2}),
                (both_rates, OFF, {}),
                (train_rate, COLOURED, {}),
                (ridged, COLOURED, {"meta_ridge": 0.5}),
                (two_steps, COLOURED, {}),
                (momentum, COLOURED, {"momentum": 0.4}),
                (averaging, COLOURED, {}),
                (strength, COLOURED, {}),
                (best_ridge, COLOURED, {"rate": -0.2}),
                (best_strength, COLOURED, {"rate": -0.2}),
                (best_step, COLOURED, {"rate": -0.2}),
                (both_rates, COLOURED, {}),
                (known_step, LONG, {"rate": 0.2}),
                (known_step, TURNED, {"rate": 0.2}),
            )
        ),
    ],
)
def test_every_optimum_has_the_slopes_of_its_differences(best, problem, options, x64):
    """In the variances, the spectrum, the start, and numbers of the other rule and the ridge."""
    numbers = {"sigma": problem.sigma, "nu": problem.nu, "omega0": problem.omega0}
    if not problem.isotropic:
        numbers |= {"input_covariance": problem.input_covariance}
        numbers |= {"weight_covariance": problem.weight_covariance}

    def function(numbers, options):
        return best(dataclasses.replace(problem, **numbers), **options)

    point = numbers, options
    slopes = jax.grad(function, (0, 1))(*point)
    rng = np.random.default_rng(2)
    for group, name in [(0, name) for name in numbers] + [(1, name) for name in options]:
        value = np.asarray(point[group][name])
        move = value * rng.uniform(0.5, 1.5, value.shape)
        move = (move + move.T) / 2

        def along(t, group=group, name=name, move=move):
            moved = [dict(part) for part in point]
            moved[group][name] = moved[group][name] + t * move
            return function(*moved)

        found = float(np.sum(np.asarray(slopes[group][name]) * move))
        expected = by_differences(along, 0.0, 0.03)
        assert found == pytest.approx(expected, rel=5e-3, abs=2e-5), name


@pytest.mark.parametrize(
    "best", (best_train_rate, *(pytest.param(best, marks=slow) for best in (adapting, both, ridge)))
)
def test_forward_reverse_and_differences_agree(best, x64):
    function = of_noise(best)
    forward = float(jax.jvp(function, (0.5,), (1.0,))[1])
    assert forward == pytest.approx(float(jax.grad(function)(0.5)), rel=1e-12)
    # The search is good to the root of the precision, hence wide steps.
    assert forward == pytest.approx(by_differences(function, 0.5, 0.05), rel=2e-3)


compiled: list[str] = []


@jax.monitoring.register_event_duration_secs_listener
def _note(event, _, **facts):
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(facts.get("fun_name", ""))


@pytest.mark.parametrize(
    "rule",
    (nm.GradientDescent(0.0), nm.GradientDescent(0.0, 3), nm.GradientFlow(0.0), nm.Proximal(0.0)),
)
@pytest.mark.parametrize("meta_ridge", (0.0, 2.0))
def test_first_derivatives_of_known_numbers_are_not_compiled(rule, meta_ridge, x64):
    def function(nu):
        problem = dataclasses.replace(OFF, nu=nu)
        return best_train_rate(problem, rule, meta_ridge=meta_ridge)

    compiled.clear()
    assert float(jax.grad(function)(0.9)) == pytest.approx(
        by_differences(function, 0.9, 0.05), rel=2e-3
    )
    assert not any("sensitivity" in name for name in compiled)


def test_derivatives_of_traced_numbers_are_those_of_known_ones(x64):
    slope = jax.grad(of_noise(best_train_rate))
    assert float(jax.jit(slope)(0.5)) == pytest.approx(float(slope(0.5)), rel=1e-9)


@slow
def test_a_rule_that_is_written_for_arrays_of_jax_has_derivatives_too(x64):
    function = of_noise(lambda problem: best_train_rate(problem, nm.Momentum(0.0, 0.5, 2)))
    assert float(jax.grad(function)(0.5)) == pytest.approx(
        by_differences(function, 0.5, 0.05), rel=2e-3
    )


@pytest.mark.parametrize(
    ("best", "problem"),
    (
        (best_train_rate, OFF),
        pytest.param(adapting, OFF, marks=slow),
        pytest.param(ridge, OFF, marks=slow),
        pytest.param(averaging, OFF, marks=slow),
        pytest.param(known_step, COLOURED, marks=slow),
        pytest.param(best_ridge, COLOURED, marks=slow),
    ),
)
def test_second_derivatives_are_differences_of_first(best, problem, x64):
    function = of_noise(best, problem)
    slope = jax.grad(function)
    expected = by_differences(slope, 0.5, 0.02)
    assert float(jax.hessian(function)(0.5)) == pytest.approx(expected, rel=5e-4)


@slow
def test_second_derivatives_in_reverse_mode(x64):
    function = of_noise(best_train_rate)
    expected = by_differences(jax.grad(function), 0.5, 0.02)
    assert float(jax.grad(jax.grad(function))(0.5)) == pytest.approx(expected, rel=1e-4)


@slow
def test_third_derivatives_are_refused(x64):
    function = of_noise(best_train_rate)
    with pytest.raises(NotImplementedError, match="third derivatives of a best rate"):
        jax.jacfwd(jax.hessian(function))(0.5)


@slow
def test_second_derivatives_of_many_numbers_in_reverse_mode_are_refused(x64):
    function = of_noise(known_step, COLOURED)
    with pytest.raises(NotImplementedError, match=r"use jax\.hessian"):
        jax.grad(jax.grad(function))(0.5)
