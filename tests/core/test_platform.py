"""Sizes of the platform that a program runs on, or that a trace is lowered for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml import theory
from tests.internals import CPU, GPU, TPU, device_platform, lowered_for, sizes_for, with_plan


def lowered(function, platform: str, *arguments) -> str:
    """The program of a function for a platform that need not be here."""
    traced = jax.jit(lambda *x: function(*x)).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def trips(program: str) -> list[int]:
    """Bounds of the counted loops of a lowered program."""
    bounds = re.findall(r"cond \{\s*%(\S+) = stablehlo.constant dense<(\d+)>", program)
    return [int(count) for _, count in bounds]


def test_platforms_without_an_entry_have_the_sizes_of_a_gpu():
    names = ("cpu", "tpu", "gpu", "cuda", "rocm")
    assert [sizes_for(name) for name in names] == [CPU, TPU, GPU, GPU, GPU]


def test_the_platform_is_that_of_the_arguments():
    device = jax.local_devices()[0]
    assert device_platform(1.0, np.ones(2), jax.device_put(1.0, device)) == device.platform
    with jax.default_device(device):
        assert device_platform() == device.platform


def test_a_trace_for_one_platform_has_no_other_branch():
    def cells(x):
        return with_plan(lambda sizes: sizes.block_numbers, lambda n: x + n)

    with lowered_for("tpu"):
        program = str(jax.make_jaxpr(cells)(1))
    assert str(TPU.block_numbers) in program
    assert str(GPU.block_numbers) not in program
    # Equal plans need no branch either.
    same = jax.make_jaxpr(lambda x: with_plan(lambda sizes: 3, lambda n: x + n))(1)
    assert [str(equation.primitive) for equation in same.eqns] == ["add"]


@pytest.mark.parametrize(("platform", "sizes"), [("cpu", CPU), ("cuda", GPU), ("tpu", TPU)])
def test_a_program_has_the_sizes_of_the_platform_it_is_lowered_for(platform, sizes):
    program = lowered(
        lambda x: with_plan(lambda sizes: sizes.block_numbers, lambda n: x + n), platform, 1
    )
    assert f"dense<{sizes.block_numbers}>" in program


def simulated(key, sigma):
    problem = nm.MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=sigma, nu=0.5)
    rates = nm.GradientDescent(jnp.linspace(-1, 1, 25))
    return nm.simulate(key, problem, rates, nm.GradientDescent(0.2), runs=10**6)


def mapped(_, sigma):
    n_t, m = np.linspace(1, 100, 200), np.arange(1, 201)
    return theory.phase_diagram(60, m[:, None], n_t, 20, sigma, 1.0)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(("function", "most"), [(simulated, 200), (mapped, 150)])
def test_accelerators_loop_over_few_blocks(function, most, platform):
    """A CPU takes 11,628 blocks of runs, and 625 of cells; a root is found in 150 steps at most."""
    counts = trips(lowered(function, platform, jax.random.key(0), 0.5))
    assert counts
    assert max(counts) <= most
