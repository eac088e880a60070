"""Derivatives of what is best: forward, reverse, differences, and of second order."""

import dataclasses

import jax
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


def of_noise(best):
    return lambda sigma: best(dataclasses.replace(OFF, sigma=sigma))


def by_differences(function, x, step):
    """The slope at x to fourth order."""
    ahead, behind, far, back = (float(function(x + k * step)) for k in (1, -1, 2, -2))
    return (8 * (ahead - behind) - (far - back)) / (12 * step)


slow = pytest.mark.slow


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


@slow
@pytest.mark.parametrize("best", (adapting, best_train_rate))
def test_second_derivatives_are_differences_of_first(best, x64):
    function = of_noise(best)
    slope = jax.grad(function)
    expected = by_differences(slope, 0.5, 0.02)
    assert float(jax.hessian(function)(0.5)) == pytest.approx(expected, rel=1e-4)
