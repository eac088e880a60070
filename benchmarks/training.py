"""What the method around the meta-gradient costs: hooks, batches of a loader, tasks over devices.

    python benchmarks/training.py hooks      sinusoid, a callback every 100 steps
    python benchmarks/training.py batches    conv4, epochs of NumPy batches against a function
    python benchmarks/training.py devices    one core against two devices that share the tasks

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


def conv4_batches(count: int):
    """Meta-batches of Conv4 in NumPy."""
    from meta_gradients import image_tasks

    rng = np.random.default_rng(0)
    held = []
    for _ in range(count):
        tasks = {k: np.asarray(v, np.float32 if v.dtype == float else None)
                 for k, v in image_tasks(rng).items()}  # fmt: skip
        support, query = (
            (np.moveaxis(tasks[f"{part}_x"], 2, -1), tasks[f"{part}_y"])
            for part in ("support", "query")
        )
        held.append((support, query))
    return held


def conv4(tasks, steps, **options):
    """Meta-training of Conv4, a task at a time."""
    from meta_gradients import conv_parameters, cross_entropy

    arrays = conv_parameters(np.random.default_rng(1), [1, 32, 32, 32, 32], ways=5)
    arrays = [a.transpose(2, 3, 1, 0) if a.ndim == 4 else a.T for a in arrays]
    start = [jnp.asarray(a, jnp.float32) for a in arrays]
    loss = partial(cross_entropy, convolution=nm.im2col_convolution)
    value_and_grad = nm.maml_value_and_grad(loss, nm.GradientDescent(0.01), batch_size=1)
    optimizer = optax.adam(1e-3)
    return lambda: nm.fit(
        jax.random.key(0), start, value_and_grad, tasks, optimizer, steps, **options
    )


class Images:
    """The tasks of some meta-batches one by one, as a DataLoader wants them."""

    def __init__(self, held):
        self.tasks = [jax.tree.map(lambda x, i=i: x[i], batch)
                      for batch in held for i in range(len(batch[0][1]))]  # fmt: skip

    def __len__(self):
        return len(self.tasks)

    def __getitem__(self, i):
        return self.tasks[i]


def batches(steps=12):
    """The same meta-batches: drawn by a function, in a list, and from a DataLoader of torch."""
    held = conv4_batches(steps)
    pool = jax.tree.map(lambda *x: jnp.stack(x), *held)

    def draw(pool, key):
        return jax.tree.map(lambda x: x[jax.random.randint(key, (), 0, steps)], pool)

    function = jax.tree_util.Partial(draw, pool)
    ways = {"function of a key": conv4(function, steps), "batches of NumPy": conv4(held, steps)}
    try:
        from torch.utils.data import DataLoader
    except ImportError:
        print("torch is not installed: without its DataLoader")
    else:
        size = len(held[0][0][1])
        ways["DataLoader of torch"] = conv4(DataLoader(Images(held), batch_size=size), steps)
    compare(ways, steps)


WORKLOADS = {"sinusoid, 200 tasks": 200, "sinusoid, 600 tasks": 60, "conv4, 8 tasks": 6}  # steps


def devices():
    """One device pinned to a core, and two devices on two cores that share the tasks.

    Each is a process of its own, in turn, twice. It says something on an idle machine only: with
    other work on both cores the two devices, which wait for each other at every step, are often put
    on one of them.
    """
    if len(sys.argv) > 2:
        _on_devices(int(sys.argv[2]), sys.argv[3])
        return
    for name, steps in WORKLOADS.items():
        times = {1: [], 2: []}
        for count in (1, 2, 1, 2):
            command = [sys.executable, __file__, "devices", str(count), name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            times[count].append([1e3 * float(t) / steps for t in done.stdout.split()])
        (one, work_one), (two, work_two) = (np.mean(times[count], 0) for count in (1, 2))
        ratios = ", ".join(f"{a / b:.2f}" for (a, _), (b, _) in zip(*times.values(), strict=True))
        print(f"{name}: {one:.2f} and {two:.2f} ms a step on the wall, {work_one:.2f} and "
              f"{work_two:.2f} of processor; speed-up {ratios}", flush=True)  # fmt: skip


def _on_devices(count: int, name: str) -> None:
    """The least times of some runs."""
    os.sched_setaffinity(0, range(count))
    jax.config.update("jax_num_cpu_devices", count)
    steps, mesh = WORKLOADS[name], jax.devices() if count > 1 else None
    if name.startswith("conv4"):
        tasks = nm.Tasks(*jax.tree.map(jnp.asarray, conv4_batches(1)[0]))
        train = conv4(tasks, steps, mesh=mesh)
    else:
        train = sinusoid(m=int(name.split()[1]), steps=steps, mesh=mesh)
    train()
    times = [timed(train) for _ in range(ROUNDS)]
    print(*np.min(times, 0))


if __name__ == "__main__":
    {"hooks": hooks, "batches": batches, "devices": devices}[sys.argv[1]]()
