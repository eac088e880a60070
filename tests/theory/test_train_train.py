"""The outer loss on the training points themselves: exact cases, published results, simulation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm

pytestmark = pytest.mark.usefixtures("x64")

PROBLEM = nm.MixedLinearRegression(p=40, m=4, n_t=20, n_v=1, n_r=20, sigma=0.5, nu=1.0, omega0=0.1)
BENT = dataclasses.replace(PROBLEM, input_covariance=np.arange(1, 41.0) ** -0.8)
RATES, ADAPT = nm.GradientDescent(jnp.array([-0.5, 0.0, 0.3])), nm.GradientDescent(0.2)
UNSPLIT = dict(split="train-train", meta_ridge=jnp.array(0.0))


@pytest.mark.slow
def test_at_rate_zero_training_points_are_as_good_as_others():
    problem = dataclasses.replace(BENT, n_v=BENT.n_t)
    one, two = (
        nm.theory.weight_error(problem, RATES, **options)
        for options in (UNSPLIT, UNSPLIT | {"split": "train-validation"})
    )
    np.testing.assert_allclose(one[1], two[1], rtol=1e-9)


@pytest.mark.slow
def test_with_fewer_points_than_dimensions_in_all_the_rate_does_not_matter():
    """b(K) has an inverse, so omega* fits the labels themselves: X omega* = y of every task."""
    problem = dataclasses.replace(BENT, n_t=8)
    rates = nm.GradientDescent(RATES.rate * 3)  # the last has its zero within the spectrum
    found = nm.theory.weight_error(problem, rates, **UNSPLIT)
    np.testing.assert_allclose(found, found[1], rtol=1e-8)


@pytest.mark.slow
def test_many_tasks_without_inner_steps():
    """m E|omega* - w0|^2 -> nu^2 (1 + (d + 1)/n) at rate and noise zero, for m large.

    Bai et al., "How important is the train-validation split in meta-learning?" (2021).
    """
    d, n, m = 20, 19, 10**7
    problem = nm.MixedLinearRegression(p=d, m=m, n_t=n, n_v=1, n_r=1, sigma=0.0, nu=1.0)
    found = m * nm.theory.weight_error(problem, nm.GradientDescent(0.0), split="train-train")
    np.testing.assert_allclose(found, 1 + (d + 1) / n, rtol=1e-5)


CASES = [
    (BENT, 3.0, RATES),
    pytest.param(PROBLEM, 0.0, RATES, marks=pytest.mark.slow),
    pytest.param(
        dataclasses.replace(BENT, n_t=60), 0.0, nm.GradientDescent(0.2, 2), marks=pytest.mark.slow
    ),
    pytest.param(BENT, 0.0, nm.Proximal(0.5), marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "ridge", "rule"), CASES)
def test_against_simulation(problem, ridge, rule):
    ridge = jnp.array(ridge)
    options = dict(split="train-train", meta_ridge=ridge)
    runs = nm.simulate(jax.random.key(0), problem, rule, ADAPT, runs=1000, **options)
    for found, seen in (
        (nm.theory.test_loss(problem, rule, ADAPT, **options), runs.test_loss),
        (nm.theory.weight_error(problem, rule, **options), runs.weight_error),
    ):
        error = seen.std(-1) / 1000**0.5
        assert jnp.all(jnp.abs(found - seen.mean(-1)) < 4 * error)


def test_what_it_does_not_take():
    for options, match in (
        (dict(split="validation"), "split must be one of"),
        (dict(split="train-train", method="expansion"), "method must be 'proportional' for split"),
        (dict(split="train-train", measure="exact"), "measure must be 'auto' for split"),
    ):
        with pytest.raises(ValueError, match=match):
            nm.theory.weight_error(PROBLEM, ADAPT, **options)
    with pytest.raises(ValueError, match="polynomial"):
        nm.theory.weight_error(PROBLEM, nm.GradientFlow(9.0), split="train-train")
