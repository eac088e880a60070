"""Work that several devices share is that of one device, on meshes of every kind."""

import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from tests.helpers import python

PROBLEM = nm.MixedLinearRegression(p=8, m=3, n_t=4, n_v=2, n_r=3, sigma=1.0, nu=0.5)
RATES = nm.GradientDescent(jnp.linspace(-0.4, 0.4, 5))
RATE = nm.GradientDescent(0.1)
KEY = jax.random.key(0)


def square(w, target):
    return jnp.sum((w - target) ** 2) / 2


def draw(key):
    return nm.Tasks(*jax.random.normal(key, (2, 3)))


def simulated(**options):
    return nm.simulate(KEY, PROBLEM, RATES, nm.GradientDescent(0.2), runs=7, **options)


def mapped(**options):
    return nm.map_over_devices(jax.vmap(jnp.sin), jnp.arange(10.0).reshape(5, 2), **options)


def evaluated(tasks=draw, **options):
    params = options.pop("params", jnp.ones(4))
    found = nm.evaluate(
        KEY, params, lambda w, target: square(w[0] * w[1], target), RATE, tasks, episodes=10,
        **options,
    )  # fmt: skip
    return found.values


def phases(**options):
    return nm.theory.phase_diagram(
        10.0, 3.0, np.linspace(4, 9, 5), 6.0, 0.5, 0.5, **options
    ).weight_error


def kernel_model(**options):
    x = jnp.arange(24.0).reshape(4, 6, 1) / 6
    tasks = nm.Tasks((x[:, :3], x[:, :3, 0]), (x[:, 3:], x[:, 3:, 0]))
    return nm.kernels.meta_train(lambda a, b: a @ b.T, tasks, RATES, meta_ridge=0.1, **options)


def same(first, second):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), first, second)


DEVICES = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tests.core.test_meshes import *

functions = [simulated, evaluated, mapped]
if sys.argv[1] == "all":
    fixed = nm.Tasks(jnp.arange(3.0), jnp.arange(3.0))
    functions += [lambda **o: evaluated(fixed, **o), phases, lambda **o: kernel_model(**o).weights]
explicit = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
auto = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
for function in functions:
    alone = function()
    for mesh in (explicit, auto, jax.devices()[:3])[: None if sys.argv[1] == "all" else 1]:
        same(function(mesh=mesh), alone)
    # In the context of a mesh, without sharing anything.
    with jax.set_mesh(explicit):
        same(function(), alone)

# Parameters that the user sharded, over all axes or over those that share no tasks.
whole = evaluated()
for mesh, names, options in ((explicit, "a", dict(task_axis="b")), (explicit, ("a", "b"), {})):
    params = jax.device_put(jnp.ones(4), NamedSharding(mesh, PartitionSpec(names)))
    same(evaluated(params=params, mesh=mesh, **options), whole)
    same(evaluated(params=params), whole)

# Arguments on an explicit mesh: results are on it, too.
if sys.argv[1] == "all":
    model = kernel_model()
    x = jax.device_put(jnp.ones((4, 1)), NamedSharding(explicit, PartitionSpec("a")))
    values = model(x)
    assert values.sharding.mesh == explicit
    same(values, model(jnp.ones((4, 1))))
    rates = nm.GradientDescent(x[:, 0])
    values = nm.simulate(KEY, PROBLEM, rates, nm.GradientDescent(0.2), runs=3).test_loss
    assert values.sharding.mesh == explicit
    losses = nm.maml(square, nm.GradientDescent(0.1))
    tasks = nm.Tasks(x[:, 0], x[:, 0])
    same(losses(jnp.ones(()), tasks), losses(jnp.ones(()), nm.Tasks(jnp.ones(4), jnp.ones(4))))
"""


@pytest.mark.parametrize("which", ("some", pytest.param("all", marks=pytest.mark.slow)))
def test_devices_of_meshes_of_every_kind_get_the_result_of_one(which):
    process = python(DEVICES, which)
    error = process.communicate()[1]
    assert process.returncode == 0, error


def test_shared_runs_are_gathered_once():
    """In the program before compilation: the one collective is that of the results."""
    mesh = jax.devices()[:1]
    text = jax.jit(lambda key: nm.simulate(key, PROBLEM, RATES, RATE, runs=3, mesh=mesh))
    lowered = text.lower(KEY).as_text()
    assert "all_reduce" not in lowered and "all_gather" not in lowered
    assert "sharding_constraint" in lowered


PROCESSES = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
index, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"localhost:{port}", 2, index)
from tests.core.test_meshes import *
assert jax.device_count() == 2 and jax.local_device_count() == 1
for function in (simulated, evaluated, phases):
    same(function(mesh=jax.devices()), function())
"""


@pytest.mark.slow
def test_processes_that_share_runs_and_episodes_get_the_result_of_one():
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    both = [python(PROCESSES, str(i), port) for i in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(errors)


@pytest.mark.parametrize("function", (simulated, evaluated, mapped, phases, kernel_model))
def test_anything_but_a_mesh_or_devices_raises(function):
    with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh or a list of devices"):
        function(mesh="all")
