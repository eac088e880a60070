"""Training with tasks on several devices or processes is training on one device."""

import socket

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from tests.helpers import python
from tests.training.tiny import tasks as TASKS

OPTIMIZER = optax.adam(1e-2)
PARAMS = {"w": jnp.full((1, 4), 0.3), "v": jnp.linspace(-1, 1, 4)[:, None]}


def loss(params, data):
    x, y = data
    return jnp.mean((x[:, None] @ params["w"] @ params["v"] - y[:, None]) ** 2)


def with_aux(params, data):
    return loss(params, data), jnp.max(data[0])


def centred(params, mean, data):
    x, y = data
    return loss(params, (x - x.mean(), y)), 0.9 * mean + 0.1 * x.mean()


RULE = nm.GradientDescent(-0.02, 2)
ALGORITHMS = {
    "maml": (nm.maml_value_and_grad(loss, RULE, batch_size=1), PARAMS),
    "first order, aux": (nm.fomaml(with_aux, RULE, has_aux=True), PARAMS),
    "state": (nm.maml_value_and_grad(centred, RULE), nm.Stateful(PARAMS, jnp.zeros(()))),
    "learned rates": (nm.meta_sgd(loss), nm.MetaSGDParams(PARAMS, 0.01)),
}


def train(name="maml", steps=3, tasks=TASKS, key=0, **options):
    algorithm, params = ALGORITHMS[name]
    key = jax.random.key(key) if isinstance(key, int) else key
    return nm.fit(key, params, algorithm, tasks, OPTIMIZER, steps, **options)


def same(first, second):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), first, second)


DEVICES = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tests.training.test_sharding import *

auto = jax.make_mesh((4,), ("task",), axis_types=(AxisType.Auto,))
explicit = jax.make_mesh((2, 2), ("model", "task"), axis_types=(AxisType.Explicit,) * 2)
two = jax.make_mesh((2, 2), ("seed", "task"), axis_types=(AxisType.Auto,) * 2)
everything = sys.argv[2] == "all"
for name in ALGORITHMS if everything else ("state",):
    same(train(name, mesh=auto), train(name))
same(train(mesh=jax.devices()[:2]), train())

# As the user's own arrays are sharded.
algorithm, params = ALGORITHMS["maml"]
own = jax.device_put(params["v"], NamedSharding(explicit, PartitionSpec("model")))
ALGORITHMS["maml"] = algorithm, params | {"v": own}
result = train(mesh=explicit, task_axis="task")
assert result.params["v"].sharding.spec[0] == "model"
ALGORITHMS["maml"] = algorithm, params
same(result, train())

# Seeds on one axis, tasks on the other.
keys = jax.random.split(jax.random.key(1), 2)
sharded = jax.device_put(keys, NamedSharding(two, PartitionSpec("seed")))
seeds = jax.jit(jax.vmap(lambda key: train(key=key, mesh=two, task_axis="task")))(sharded)
assert not seeds.loss.sharding.is_fully_replicated
same(jax.tree.map(lambda *x: np.stack(x), *(train(key=key) for key in keys)), seeds)

if not everything:
    sys.exit()

with jax.set_mesh(explicit):
    same(train(mesh=explicit), train())

# A shard_map of one's own: what its checks do to inner gradients, and the way without.
whole = algorithm(params, TASKS(keys[0]))[0]
for check, agrees in ((False, True), (True, False)):
    own = jax.shard_map(
        lambda params, tasks: jax.lax.pmean(nm.maml(loss, RULE)(params, tasks), "task"),
        mesh=auto, in_specs=(PartitionSpec(), PartitionSpec("task")), out_specs=PartitionSpec(),
        check_vma=check,
    )
    assert np.isclose(jax.jit(own)(params, TASKS(keys[0])), whole, rtol=1e-4) == agrees

# Batches, and a run that resumes on other devices.
batches = [jax.tree.map(np.asarray, TASKS(jax.random.key(i))) for i in range(2)]
same(train(tasks=batches, mesh=auto), train(tasks=batches))
train(steps=2, checkpoint=sys.argv[1], mesh=auto)
same(train(checkpoint=sys.argv[1], mesh=auto), train())
"""


@pytest.mark.parametrize("which", ("some", pytest.param("all", marks=pytest.mark.slow)))
def test_devices_that_share_the_tasks_get_the_result_of_one(which, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    process = python(DEVICES, str(tmp_path / "run"), which)
    error = process.communicate()[1]
    assert process.returncode == 0, error


def test_there_is_one_all_reduce_a_step():
    """In the program before compilation: the gradient and the value go in one message."""
    from tests.internals import task_sharding

    algorithm, params = ALGORITHMS["maml"]
    tasks_on_one = task_sharding(jax.devices()[:1], None)
    lowered = jax.jit(tasks_on_one.shard_gradient(algorithm)).lower(
        params, TASKS(jax.random.key(0))
    )
    assert lowered.as_text().count("all_reduce") == 1


PROCESSES = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
index, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"localhost:{port}", 2, index)
import numpy as np
from tests.training.test_sharding import *
assert jax.device_count() == 2 and jax.local_device_count() == 1
mesh = jax.make_mesh((2,), ("task",))
for name in ("maml", "state"):
    together = train(name, mesh=mesh)
    same(together.params, train(name).params)
batches = [jax.tree.map(np.asarray, TASKS(jax.random.key(i))) for i in range(2)]
mine = [jax.tree.map(lambda x: x[2 * index : 2 * index + 2], batch) for batch in batches]
same(train(tasks=mine, mesh=mesh).loss, train(tasks=batches).loss)
train(steps=2, checkpoint=sys.argv[3], mesh=mesh)
same(train(checkpoint=sys.argv[3], mesh=mesh).loss, train().loss)
"""


@pytest.mark.slow
def test_processes_that_share_the_tasks_get_the_result_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    both = [python(PROCESSES, str(i), port, str(tmp_path / "run")) for i in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(errors)


def test_invalid_arguments_raise_with_their_names():
    with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh or a list of devices"):
        train(mesh="all")
    with pytest.raises(ValueError, match=r"task_axis must be among the axes \('task',\)"):
        train(mesh=jax.devices()[:1], task_axis="data")
    with pytest.raises(ValueError, match="task_axis='task' needs a mesh"):
        train(task_axis="task")
