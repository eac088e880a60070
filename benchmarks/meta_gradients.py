"""Time of a second-order meta-gradient on the CPU, in JAX and in four torch libraries.

Every method takes one inner SGD step and differentiates through it. Three workloads:

    sinusoid   whole meta-steps of the usual regression: sampling 25 tasks, 10 shots, 10 queries,
               the meta-gradient of a 1-40-40-1 ReLU network, an Adam update
    wide       only the meta-gradient, same tasks, a 1-1024-1024-1 network
    conv4      only the meta-gradient, 8 tasks of 5 ways, 1 shot, 1 query on 28 x 28 images, four
               blocks of 3 x 3 convolution, batch normalisation, ReLU, pooling; cross entropy

Every method computes the loss and the meta-gradient of the same weights and tasks once. The losses
and norms must agree; the table shows it, and the exit status is 1 otherwise. Then the method is
timed for a few seconds. Each measurement is a fresh process, and methods take turns, so that other
work on the machine affects all of them. The machine should still be idle: a torch thread that waits
for a core used by another process can make a method a hundred times slower. The torch methods are
therefore timed with one thread and with all, and the faster counts.

    python benchmarks/meta_gradients.py --torch-python PATH
    python benchmarks/meta_gradients.py --workloads conv4 --methods torch-loop,negmaml --rounds 1

The torch methods are in peers_torch.py, run by the interpreter of --torch-python. The row of a
method that is not installed there, or fails, gives the reason.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise

import harness
import numpy as np

INNER_RATE = 0.01
OUTER_RATE = 1e-3
SCAN_STEPS = 500  # meta-steps of the sinusoid in one call of a compiled JAX function
AGREEMENT = 1e-3  # relative; float32 methods differ by far less, the first-order gradient by more
TIME_LIMIT = 300  # seconds that one process may take, imports and compilation included

TORCH_METHODS = ["learn2learn", "higher", "torchopt", "torch.func", "torch-loop"]


# The data of all methods, in the layouts of torch.


def mlp_parameters(rng, sizes):
    """Weights (outputs, inputs) and biases of a network of these sizes, as small as torch's own."""
    arrays = []
    for inputs, outputs in pairwise(sizes):
        arrays.append(rng.normal(0, math.sqrt(1 / (3 * inputs)), (outputs, inputs)))
        arrays.append(rng.normal(0, 0.1, outputs))
    return arrays


def conv_parameters(rng, channels, ways):
    """Kernels, scales and shifts of the blocks, then the head.

    The convolutions have no bias: the normalisation that follows takes it away.
    """
    arrays = []
    for inputs, outputs in pairwise(channels):
        arrays.append(rng.normal(0, math.sqrt(2 / (9 * inputs)), (outputs, inputs, 3, 3)))
        arrays += [np.ones(outputs), np.zeros(outputs)]
    return arrays + mlp_parameters(rng, [channels[-1], ways])


def sinusoid_tasks(rng, meta_batch=25, shots=10, queries=10):
    """y = A sin(x + phi), A ~ U(0.1, 5), phi ~ U(0, pi), x ~ U(-5, 5)."""
    amplitude = rng.uniform(0.1, 5, (meta_batch, 1, 1))
    phase = rng.uniform(0, math.pi, (meta_batch, 1, 1))
    x = rng.uniform(-5, 5, (meta_batch, shots + queries, 1))
    y = amplitude * np.sin(x + phase)
    return {
        "support_x": x[:, :shots],
        "support_y": y[:, :shots],
        "query_x": x[:, shots:],
        "query_y": y[:, shots:],
    }


def image_tasks(rng, meta_batch=8, ways=5, side=28):
    """An image of noise for each way, and a noisier copy of it as the query."""
    images = rng.normal(size=(meta_batch, ways, 1, side, side))
    labels = np.tile(np.arange(ways), (meta_batch, 1))
    return {
        "support_x": images,
        "support_y": labels,
        "query_x": images + rng.normal(size=images.shape),
        "query_y": labels,
    }


def sinusoid_data(rng):
    """The small network and its tasks."""
    return mlp_parameters(rng, [1, 40, 40, 1]), sinusoid_tasks(rng)


def wide_data(rng):
    """The wide network and the same tasks."""
    return mlp_parameters(rng, [1, 1024, 1024, 1]), sinusoid_tasks(rng)


def conv4_data(rng):
    """The convolutional network and images."""
    return conv_parameters(rng, [1, 32, 32, 32, 32], ways=5), image_tasks(rng)


DATA = {"sinusoid": sinusoid_data, "wide": wide_data, "conv4": conv4_data}


def write_data(workload, path):
    """Write the weights, tasks and rates of all methods to one file, in single precision."""
    parameters, tasks = DATA[workload](np.random.default_rng(0))
    arrays = {f"parameter_{i}": array for i, array in enumerate(parameters)} | tasks
    arrays = {
        k: v.astype(np.float32 if v.dtype == np.float64 else v.dtype) for k, v in arrays.items()
    }
    np.savez(path, parameters=len(parameters), inner=INNER_RATE, outer=OUTER_RATE, **arrays)


# The losses of the JAX methods, functions of (list of parameters, (x, y)).


def squared_error(params, data):
    """Mean squared error of the ReLU network."""
    import jax
    import jax.numpy as jnp

    x, y = data
    *hidden, weight, bias = params
    for w, b in zip(hidden[::2], hidden[1::2], strict=True):
        x = jax.nn.relu(x @ w + b)
    return jnp.mean((x @ weight + bias - y) ** 2)


def native_convolution(x, kernel):
    """XLA's own."""
    from jax import lax

    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def cross_entropy(params, data, convolution=native_convolution):
    """Mean cross entropy of the convolutional network."""
    import jax
    import optax
    from jax import lax

    x, y = data
    *blocks, weight, bias = params
    for kernel, scale, shift in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
        x = convolution(x, kernel)
        x = jax.nn.relu(scale * normalise(x) + shift)
        x = lax.reduce_window(x, -math.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    logits = x.reshape(len(x), -1) @ weight + bias
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def normalise(x):
    """Zero mean and unit variance of every channel over the batch, as torch's batch_norm."""
    from jax import lax

    axes = (0, 1, 2)
    centered = x - x.mean(axes)
    return centered * lax.rsqrt((centered**2).mean(axes) + 1e-5)


LOSSES = {"sinusoid": squared_error, "wide": squared_error, "conv4": cross_entropy}


# The JAX methods. Each takes (workload, loss, inner rate) and returns a function of (parameters,
# support, query), the latter leading with the task axis, to the meta-loss and the meta-gradient.


def plain_objective(loss, rate):
    """Loss on the query of one task after a step on its support."""
    import jax

    def objective(params, support, query):
        gradient = jax.grad(loss)(params, support)
        adapted = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
        return loss(adapted, query)

    return objective


def plain_vmap(workload, loss, rate):
    """The definition, written down: a gradient within a vmap within a gradient."""
    import jax

    one_task = plain_objective(loss, rate)

    def objective(params, support, query):
        return jax.vmap(one_task, in_axes=(None, 0, 0))(params, support, query).mean()

    return jax.value_and_grad(objective)


def plain_map(workload, loss, rate):
    """Plain JAX, one task after another by lax.map."""
    import jax

    one_task = plain_objective(loss, rate)

    def objective(params, support, query):
        return jax.lax.map(lambda task: one_task(params, *task), (support, query)).mean()

    return jax.value_and_grad(objective)


def package(workload, loss, rate, method=None, batch_size=None):
    """negmaml with what its documentation advises."""
    import negmaml as nm

    if workload == "conv4":
        loss = partial(cross_entropy, convolution=nm.im2col_convolution)
        batch_size = batch_size or 1
    rule = nm.GradientDescent(rate)
    value_and_grad = nm.maml_value_and_grad(loss, rule, method=method, batch_size=batch_size)
    return lambda params, support, query: value_and_grad(params, nm.Tasks(support, query))


PLAIN_METHODS = {"plain-jax": plain_vmap, "plain-jax-map": plain_map}


def negmaml_methods():
    """Methods of this package, by their name in the table.

    The first argument of a method is the name of the workload, from which it chooses its options.
    """
    methods = ("mixed", "reverse")
    return {"negmaml": package} | {
        f"negmaml-{method}": partial(package, method=method) for method in methods
    }


def jax_methods():
    """All methods that this script runs itself."""
    return PLAIN_METHODS | negmaml_methods()


# The worker: one JAX method on one workload in its own process.


def load(path, workload):
    """Parameters in the layouts of JAX, support, query and the two rates."""
    import jax.numpy as jnp

    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    params = [arrays[f"parameter_{i}"] for i in range(int(arrays["parameters"]))]
    params = [p.transpose(2, 3, 1, 0) if p.ndim == 4 else p.T for p in params]
    pairs = []
    for part in ("support", "query"):
        x = arrays[f"{part}_x"]
        x = np.moveaxis(x, 2, -1) if workload == "conv4" else x
        pairs.append((jnp.asarray(x), jnp.asarray(arrays[f"{part}_y"])))
    return [jnp.asarray(p) for p in params], *pairs, float(arrays["inner"]), float(arrays["outer"])


def sample_sinusoids(key, support, query):
    """New sinusoid tasks in the shapes of (support, query), all of them drawn at once."""
    import jax
    import jax.numpy as jnp

    meta_batch, shots = support[0].shape[:2]
    keys = jax.random.split(key, 3)
    amplitude = jax.random.uniform(keys[0], (meta_batch, 1, 1), minval=0.1, maxval=5.0)
    phase = jax.random.uniform(keys[1], (meta_batch, 1, 1), maxval=math.pi)
    shape = (meta_batch, shots + query[0].shape[1], 1)
    x = jax.random.uniform(keys[2], shape, minval=-5.0, maxval=5.0)
    y = amplitude * jnp.sin(x + phase)
    return (x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:])


def training(value_and_grad, params, support, query, outer):
    """A function that trains for another SCAN_STEPS meta-steps at every call."""
    import jax
    import optax

    adam = optax.adam(outer)

    def step(carry, key):
        params, state = carry
        loss, gradient = value_and_grad(params, *sample_sinusoids(key, support, query))
        updates, state = adam.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    @jax.jit
    def steps(carry, key):
        return jax.lax.scan(step, carry, jax.random.split(key, SCAN_STEPS))

    carry, key = (params, adam.init(params)), jax.random.key(0)

    def train_on():
        nonlocal carry, key
        key, now = jax.random.split(key)
        carry, losses = jax.block_until_ready(steps(carry, now))
        return losses

    return train_on


def work(workload, method, seconds, path):
    """Measure one method; returns a dictionary with the keys that peers_torch.py prints."""
    import jax

    params, support, query, inner, outer = load(path, workload)
    value_and_grad = jax_methods()[method](workload, LOSSES[workload], inner)
    compiled = jax.jit(value_and_grad)
    before = harness.peak_mib()
    start = time.perf_counter()
    loss, gradient = jax.block_until_ready(compiled(params, support, query))
    first = time.perf_counter() - start
    norm = math.sqrt(sum(float((np.asarray(g, float) ** 2).sum()) for g in gradient))
    if workload == "sinusoid":
        steps, function = SCAN_STEPS, training(value_and_grad, params, support, query, outer)
    else:
        steps, function = 1, lambda: compiled(params, support, query)
    return {
        "ms": statistics.median(harness.call_times(function, seconds)) / steps,
        "first": first,
        "mib": harness.peak_mib() - before,
        "loss": float(loss),
        "norm": norm,
        "version": f"JAX {jax.__version__}",
        "threads": os.cpu_count(),
    }


# The parent process: writes the data, starts the workers and compares their results.


def run_method(options, workload, method, path):
    """Time one method in a fresh process; returns its dictionary or the reason of a failure."""
    if method in TORCH_METHODS:
        python, command = options.torch_python, ["peers_torch.py", workload, method]
    else:
        python = sys.executable
        command = ["meta_gradients.py", "--workloads", workload, "--method", method]
    # With traceback filtering, the last line of stderr would not be the error.
    environment = os.environ | {"JAX_TRACEBACK_FILTERING": "off"}
    return harness.in_process(
        *command, "--seconds", options.seconds, "--data", path, python=python,
        environment=environment, timeout=TIME_LIMIT,
    )  # fmt: skip


def measure(options, workload):
    """Time all methods of one workload in rounds; a method that fails is not run again."""
    results = {method: [] for method in options.methods}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "data.npz")
        write_data(workload, path)
        for index in range(options.rounds):
            for method, done in results.items():
                if any("skipped" in result for result in done):
                    continue
                harness.progress(f"{workload} round {index + 1} {method} ...")
                done.append(run_method(options, workload, method, path))
    return results


def summary(done):
    """Median, smallest and largest of the rounds' times, the rest from the last round."""
    if "skipped" in done[-1]:
        return done[-1]
    times = [result["ms"] for result in done]
    first = statistics.median(result["first"] for result in done)
    return done[-1] | {
        "threads": "/".join(sorted({str(result["threads"]) for result in done})),
        "ms": statistics.median(times),
        "range": (min(times), max(times)),
        "first": first,
    }


def disagreement(result, reference):
    """Relative difference of the loss or of the meta-gradient's norm, the larger; maybe NaN."""
    pairs = [(result[name], reference[name]) for name in ("loss", "norm")]
    differences = [abs(ours - theirs) / abs(theirs) for ours, theirs in pairs]
    return max(differences) if all(map(math.isfinite, differences)) else math.nan


def agrees(result, reference):
    """True if the difference is within AGREEMENT, or the method did not run; false for NaN."""
    return "skipped" in result or disagreement(result, reference) <= AGREEMENT


def cells_of(result, reference, best):
    """Cells of one row; `best` is the time of the fastest torch method, or None."""
    if "skipped" in result:
        return ["", result["skipped"], *[""] * 6]
    low, high = result["range"]
    return [
        result["threads"],
        f"{number(result['ms'])} ({number(low)} - {number(high)})",
        number(1000 / result["ms"]),
        f"{result['ms'] / best:.3g}" if best else "",
        f"{result['first']:.2f}",
        f"{result['mib']:.0f}",
        f"{disagreement(result, reference):.0e}",
        "agrees" if agrees(result, reference) else "disagrees",
    ]


def number(value):
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def median_method(norms):
    """The method with the median norm, which no single wrong method can shift to its own."""
    order = sorted(norms, key=norms.get)
    return order[len(order) // 2] if order else None


PREAMBLE = """\
One meta-step with sampling and Adam (sinusoid), or one meta-gradient (wide, conv4).
The first call is that of the meta-gradient only and compiles in JAX; imports are in no time.
MiB: increase of the peak memory of the process by the first call, with compilation.
The torch methods have one thread or as many as cores, whichever is faster in the process."""


def main(options, report):
    """Time every workload; the exit status is 1 if methods disagree."""
    if options.method:
        workload = options.workloads[0]
        print(json.dumps(work(workload, options.method, options.seconds, options.data)))
        return 0
    report.note(
        f"Load average {os.getloadavg()[0]:.1f} before the start; {options.rounds} rounds of "
        f"{options.seconds:g} s per method, each in its own process; median of medians."
    )
    report.note(PREAMBLE)
    agree = True
    for workload in options.workloads:
        results = {method: summary(done) for method, done in measure(options, workload).items()}
        ran = {method: result for method, result in results.items() if "skipped" not in result}
        if not ran:
            reasons = "; ".join(f"{method}: {v['skipped']}" for method, v in results.items())
            sys.exit(f"no method ran ({reasons})")
        reference = ran[median_method({method: r["norm"] for method, r in ran.items()})]
        best = min((ran[method]["ms"] for method in TORCH_METHODS if method in ran), default=None)
        head = ["threads", "ms, median (range)", "per second", "ms / best torch"]
        head += ["first call, s", "MiB", "difference", "loss and norm"]
        report.table(
            f"{workload} ({'; '.join(sorted({r['version'] for r in ran.values()}))})", *head
        )
        for method, result in results.items():
            report.row(method, *cells_of(result, reference, best))
        agree = agree and all(agrees(result, reference) for result in ran.values())
    return 0 if agree else 1


if __name__ == "__main__":
    methods = [*TORCH_METHODS, *jax_methods()]
    harness.run(
        main,
        __doc__,
        harness.option("--workloads", type=harness.choice_of(DATA), default=list(DATA)),
        harness.option("--methods", type=harness.choice_of(methods), default=methods),
        harness.option("--rounds", type=int, default=3, help="processes of each method"),
        harness.option("--seconds", type=float, default=3.0, help="of timed steps per process"),
        harness.option("--torch-python", default=sys.executable, help="interpreter with torch"),
        harness.option("--method", choices=jax_methods(), help=argparse.SUPPRESS),
        harness.option("--data", help=argparse.SUPPRESS),
    )
