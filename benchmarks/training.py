"""Time of `fit` around the meta-gradient: callbacks, batches of a loader, tasks over devices.

    python benchmarks/training.py hooks      sinusoid, a callback every 100 steps
    python benchmarks/training.py batches    conv4, epochs of NumPy batches, and a function
    python benchmarks/training.py devices    one core, and two devices that share the tasks
    python benchmarks/training.py memory     peak memory with Adam, in units of the parameters

Variants are timed in turn over several rounds; ratios are those of medians. CPU seconds (user and
system) are less affected than wall seconds by other work on the machine.
"""

import argparse
import json
import os
import statistics
import time
from functools import partial

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import negmaml as nm
from negmaml.examples import mlp

ROUNDS = 5


def wall_and_cpu(function):
    """Wall and CPU seconds of one call."""
    wall, work = time.perf_counter(), time.process_time()
    jax.block_until_ready(function())
    return time.perf_counter() - wall, time.process_time() - work


def compare(report, variants, steps):
    """Add the time of a step of each variant, and its ratio to the first."""
    for function in variants.values():
        function()  # compile
    times = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, function in variants.items():
            times[name].append(wall_and_cpu(function))
    medians = {
        name: [1e3 * statistics.median(t[i] for t in own) / steps for i in (0, 1)]
        for name, own in times.items()
    }
    first = next(iter(medians.values()))
    report.table("variant", "wall, ms per step", "ratio", "CPU, ms per step", "ratio")
    for name, (wall, cpu) in medians.items():
        ratios = wall / first[0], cpu / first[1]
        report.row(name, *(f"{x:.3f}" for x in (wall, ratios[0], cpu, ratios[1])))


def sinusoid(m=25, steps=2000, **options):
    """Meta-training of the sinusoid network."""
    value_and_grad = nm.maml_value_and_grad(mlp.loss, nm.GradientDescent(0.01))
    tasks, start = nm.tasks.Sinusoid(m=m, n_t=10, n_v=10), mlp.init(jax.random.key(0))
    optimizer = optax.adam(1e-3)
    return lambda: nm.fit(
        jax.random.key(0), start, value_and_grad, tasks, optimizer, steps, **options
    )


def hooks(report, steps=2000):
    """One program, and the same in segments of 100 steps."""
    log = []
    options = {"callback": lambda *args: log.append(args[1]["loss"]), "callback_every": 100}
    variants = {"no callback": sinusoid(), "callback every 100 steps": sinusoid(**options)}
    compare(report, variants, steps)


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
    """Meta-training of Conv4, one task at a time."""
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
    """The tasks of some meta-batches one by one, as a DataLoader needs them."""

    def __init__(self, held):
        self.tasks = [jax.tree.map(lambda x, i=i: x[i], batch)
                      for batch in held for i in range(len(batch[0][1]))]  # fmt: skip

    def __len__(self):
        return len(self.tasks)

    def __getitem__(self, i):
        return self.tasks[i]


def batches(report, steps=12):
    """The same meta-batches: drawn by a function, in a list, and from a DataLoader of torch."""
    held = conv4_batches(steps)
    pool = jax.tree.map(lambda *x: jnp.stack(x), *held)

    def draw(pool, key):
        return jax.tree.map(lambda x: x[jax.random.randint(key, (), 0, steps)], pool)

    function = jax.tree_util.Partial(draw, pool)
    variants = {"function of a key": conv4(function, steps), "batches of NumPy": conv4(held, steps)}
    try:
        from torch.utils.data import DataLoader
    except ImportError:
        report.note("torch is not installed: without its DataLoader")
    else:
        size = len(held[0][0][1])
        variants["DataLoader of torch"] = conv4(DataLoader(Images(held), batch_size=size), steps)
    compare(report, variants, steps)


WORKLOADS = {"sinusoid, 200 tasks": 200, "sinusoid, 600 tasks": 60, "conv4, 8 tasks": 6}  # steps


def devices(report):
    """One device pinned to a core, and two devices on two cores that share the tasks.

    Each runs in its own process, in turn, twice. This needs an idle machine: the two devices wait
    for each other at every step, and with other work they are often scheduled on one core.
    """
    head = "one, ms per step", "two, ms", "one, CPU ms", "two, CPU ms", "speed-ups"
    report.table("devices", *head)
    for name, steps in WORKLOADS.items():
        times = {1: [], 2: []}
        for count in (1, 2, 1, 2):
            done = harness.in_process("training.py", "_devices", count, name)
            times[count].append([1e3 * t / steps for t in done["seconds"]])
        (one, cpu_one), (two, cpu_two) = (np.mean(times[count], 0) for count in (1, 2))
        ratios = ", ".join(f"{a / b:.2f}" for (a, _), (b, _) in zip(*times.values(), strict=True))
        report.row(name, *(f"{x:.2f}" for x in (one, two, cpu_one, cpu_two)), ratios)


def _devices(count: int, name: str) -> None:
    """Print the least times of some runs on `count` devices."""
    os.sched_setaffinity(0, range(count))
    jax.config.update("jax_num_cpu_devices", count)
    steps, mesh = WORKLOADS[name], jax.devices() if count > 1 else None
    if name.startswith("conv4"):
        tasks = nm.Tasks(*jax.tree.map(jnp.asarray, conv4_batches(1)[0]))
        train = conv4(tasks, steps, mesh=mesh)
    else:
        train = sinusoid(m=int(name.split()[1]), steps=steps, mesh=mesh)
    train()
    times = [wall_and_cpu(train) for _ in range(ROUNDS)]
    print(json.dumps({"seconds": np.min(times, 0).tolist()}))


MEMORY = {
    "loop by hand, donated": None,
    "fit": {},
    "fit, callback": {"callback": lambda *args: None, "callback_every": 2},
    "fit, patience": {"evaluate": lambda p, tasks: jnp.mean(p), "evaluate_every": 2, "patience": 9},
}
NUMBERS = 2 * 10**7


def memory(report):
    """Peak memory of six steps, the parameters that the caller holds included."""
    report.table("variant", "peak / parameters")
    for name in MEMORY:
        report.row(name, f"{harness.in_process('training.py', '_memory', name)['peak']:.1f}")


def _memory(name: str) -> None:
    """Print the increase of peak memory by training, in a fresh process."""
    value_and_grad = jax.value_and_grad(lambda p, tasks: jnp.mean((p - jnp.mean(tasks[1])) ** 2))
    tasks, optimizer = nm.Tasks(jnp.zeros(2), jnp.zeros(2)), optax.adam(1e-3)
    options = MEMORY[name]

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = optimizer.update(value_and_grad(params, tasks)[1], state, params)
        return optax.apply_updates(params, updates), state

    def train(params):
        if options is not None:
            key = jax.random.key(0)
            return nm.fit(key, params, value_and_grad, tasks, optimizer, 6, **options).params
        state = optimizer.init(params)
        for _ in range(6):
            params, state = jax.block_until_ready(step(params, state))
        return params

    train(jnp.ones(10))  # compilers and libraries take memory, too
    before = harness.peak_mib()
    jax.block_until_ready(train(jnp.ones(NUMBERS)))
    print(json.dumps({"peak": (harness.peak_mib() - before) / (4 * NUMBERS / 2**20)}))


PARTS = {"hooks": hooks, "batches": batches, "devices": devices, "memory": memory}


def main(options, report):
    if options.part == "_devices":
        _devices(int(options.arguments[0]), options.arguments[1])
    elif options.part == "_memory":
        _memory(*options.arguments)
    else:
        PARTS[options.part](report)


if __name__ == "__main__":
    harness.run(
        main,
        __doc__,
        harness.option("part", choices=[*PARTS, "_devices", "_memory"], metavar="|".join(PARTS)),
        harness.option("arguments", nargs="*", help=argparse.SUPPRESS),
    )
