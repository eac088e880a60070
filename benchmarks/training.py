"""What the road around the meta-gradient costs: hooks, batches of a loader, tasks over devices.

    python benchmarks/training.py hooks      sinusoid, a callback every 100 steps
    python benchmarks/training.py batches    conv4, epochs of NumPy batches against a function
    python benchmarks/training.py devices    sinusoid of 200 tasks, one core against two devices

Ways are timed in turn, several rounds, and the ratio is of the medians. Processor seconds
(user + system) are next to seconds on the wall, which other work on the machine disturbs.
"""

import os
import statistics
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import negmaml as nm
from negmaml.examples import mlp

ROUNDS = 5


def timed(function):
    """(wall, processor) seconds of one call."""
    wall, work = time.perf_counter(), time.process_time()
    jax.block_until_ready(function())
    return time.perf_counter() - wall, time.process_time() - work


def compare(ways, steps):
    """Print the cost of a step each way, and in units of the first."""
    for function in ways.values():
        function()  # compile
    times = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, function in ways.items():
            times[name].append(timed(function))
    medians = {
        name: [1e3 * statistics.median(t[i] for t in own) / steps for i in (0, 1)]
        for name, own in times.items()
    }
    first = next(iter(medians.values()))
    print(f"{'way':28} {'wall, ms':>9} {'ratio':>6} {'processor, ms':>14} {'ratio':>6}")
    for name, (wall, work) in medians.items():
        print(f"{name:28} {wall:9.3f} {wall / first[0]:6.3f} {work:14.3f} {work / first[1]:6.3f}")


def sinusoid(m=25, steps=2000, **options):
    """Meta-training of the sinusoid network."""
    value_and_grad = nm.maml_value_and_grad(mlp.loss, nm.GradientDescent(0.01))
    tasks, start = nm.tasks.Sinusoid(m=m, n_t=10, n_v=10), mlp.init(jax.random.key(0))
    optimizer = optax.adam(1e-3)
    return lambda: nm.fit(
        jax.random.key(0), start, value_and_grad, tasks, optimizer, steps, **options
    )


def hooks(steps=2000):
    """One program, and the same in stretches of 100 steps."""
    seen = []
    watched = {"callback": lambda *told: seen.append(told[1]["loss"]), "callback_every": 100}
    compare({"no hook": sinusoid(), "callback each 100 steps": sinusoid(**watched)}, steps)


def batches(steps=12):
    """The same meta-batches, drawn by a function and brought by a list of NumPy arrays."""
    from meta_gradients import conv_parameters, cross_entropy, image_tasks

    rng = np.random.default_rng(0)
    held = []
    for _ in range(steps):
        tasks = {k: np.asarray(v, np.float32 if v.dtype == float else None)
                 for k, v in image_tasks(rng).items()}  # fmt: skip
        support, query = (
            (np.moveaxis(tasks[f"{part}_x"], 2, -1), tasks[f"{part}_y"])
            for part in ("support", "query")
        )
        held.append((support, query))
    arrays = conv_parameters(rng, [1, 32, 32, 32, 32], ways=5)
    arrays = [a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T for a in arrays]
    start = [jnp.asarray(a, jnp.float32) for a in arrays]
    loss = partial(cross_entropy, convolution=nm.convolution)
    value_and_grad = nm.maml_value_and_grad(loss, nm.GradientDescent(0.01), batch_size=1)
    pool = jax.tree.map(lambda *x: jnp.stack(x), *held)

    def draw(pool, key):
        return jax.tree.map(lambda x: x[jax.random.randint(key, (), 0, steps)], pool)

    def train(tasks):
        return lambda: nm.fit(jax.random.key(0), start, value_and_grad, tasks, optimizer, steps)

    optimizer = optax.adam(1e-3)
    function = jax.tree_util.Partial(draw, pool)
    compare({"function of a key": train(function), "batches of NumPy": train(held)}, steps)


def devices(steps=300):
    """One device pinned to a core, and two devices that share the tasks, each in a process."""
    if len(sys.argv) > 2:
        count = int(sys.argv[2])
        os.sched_setaffinity(0, range(count))
        jax.config.update("jax_num_cpu_devices", count)
        mesh = jax.devices() if count > 1 else None
        train = sinusoid(m=200, steps=steps, mesh=mesh)
        train()
        times = [timed(train) for _ in range(ROUNDS)]
        print(*map(statistics.median, zip(*times, strict=True)))
        return
    times = {}
    for count in (1, 2):
        command = [sys.executable, __file__, "devices", str(count)]
        flags = {**os.environ, "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
        done = subprocess.run(command, env=flags, stdout=subprocess.PIPE, text=True, check=True)
        times[count] = [1e3 * float(t) / steps for t in done.stdout.split()]
    for count, (wall, work) in times.items():
        print(f"{count} device(s): {wall:.3f} ms on the wall, {work:.3f} ms of processor a step")
    print(f"speed-up on the wall {times[1][0] / times[2][0]:.2f}")


if __name__ == "__main__":
    {"hooks": hooks, "batches": batches, "devices": devices}[sys.argv[1]]()
