"""Spectra by name: their values, their derivatives, and clear errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml.problem import SPECTRA, named_spectrum


@pytest.mark.parametrize(
    ("name", "numbers", "shape"),
    (
        ("isotropic", {}, [1, 1, 1, 1]),
        ("power", dict(exponent=2.0), [1, 1 / 4, 1 / 9, 1 / 16]),
        ("power", dict(exponent=-1.0), [1, 2, 3, 4]),
        ("two-level", dict(level=5.0, share=0.25), [5, 1, 1, 1]),
        ("two-level", dict(level=0.0), [0, 0, 1, 1]),
        ("spikes", dict(level=3.0, spikes=3), [4, 4, 4, 1]),
    ),
)
def test_a_name_and_its_numbers_are_a_shape_of_mean_one(name, numbers, shape):
    found = named_spectrum(name, 4, **numbers)
    np.testing.assert_allclose(found, np.array(shape) / np.mean(shape), rtol=1e-6)


def test_numbers_are_traced_and_differentiable(x64):
    slope = jax.grad(lambda a: named_spectrum("power", 3, exponent=a)[0])(0.0)
    assert float(slope) == pytest.approx(np.log(6) / 3)  # of 1 / mean(k^-a)


def test_what_is_no_spectrum_is_refused():
    with pytest.raises(
        ValueError, match=rf"^spectrum must be one of {', '.join(map(repr, SPECTRA))}"
    ):
        named_spectrum("pareto", 4)
    with pytest.raises(ValueError, match=r"^exponent must be finite"):
        named_spectrum("power", 4, exponent=np.nan)
    with pytest.raises(ValueError, match=r"^level must be at least 0"):
        named_spectrum("two-level", 4, level=-1.0)


@pytest.mark.slow
def test_a_sweep_over_exponents_is_simulate_at_each(x64):
    sizes = dict(p=6, m=2, n_t=4, n_v=2, n_r=5, sigma=0.5, nu=1.0)
    rates = dict(train_rate=[-0.2, 0.1], adapt_rate=[0.2])
    grid = sizes | rates | dict(spectrum=["power", "isotropic"], exponent=[0.5, 2.0])
    found = nm.sweep(nm.sweeps.linear, grid, seeds=2)
    assert found.test_loss.dims == ("spectrum", "exponent", "seed", "train_rate", "adapt_rate")
    key = jax.random.key(0)
    model = nm.sweeps.linear
    here = model(
        key, **sizes, spectrum="power", exponent=2.0, **{k: jnp.array(v) for k, v in rates.items()}
    )
    problem = nm.MixedLinearRegression(
        **sizes, input_covariance=named_spectrum("power", 6, exponent=2.0)
    )
    rules = (nm.GradientDescent(jnp.array(rate)) for rate in rates.values())
    simulated = nm.simulate(key, problem, *rules, runs=1)
    np.testing.assert_allclose(here["test_loss"], simulated.test_loss[..., 0], rtol=1e-9)
