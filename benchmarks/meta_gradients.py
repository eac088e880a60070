"""What a second-order meta-gradient costs on the CPU, in JAX and in four torch libraries.

Every method takes one inner SGD step and differentiates through it. Three workloads:

    sinusoid   whole meta-steps of the usual regression: sampling 25 tasks, 10 shots, 10 queries,
               the meta-gradient of a 1-40-40-1 ReLU network, an Adam update
    wide       the meta-gradient alone, same tasks, a 1-1024-1024-1 network
    conv4      the meta-gradient alone, 8 tasks of 5 ways, 1 shot, 1 query on 28 x 28 images, four
               blocks of 3 x 3 convolution, batch normalisation, ReLU, pooling; cross entropy

Every method is given the same weights and tasks once, and the loss and the norm of the meta-gradient
which come back must agree; the table says so, and the exit status is 1 if they do not. Then it is
timed for a few seconds. Each measurement is a fresh process; the methods take turns, round after
round, so that a change in what else the machine does hits them all. It should still do nothing
else: a thread of torch that waits for a core held by another process can slow a method a hundredfold,
so the torch methods are timed with one thread as well as with all, and the faster counts.

    python benchmarks/meta_gradients.py --torch-python PATH
    python benchmarks/meta_gradients.py --workloads conv4 --methods torch-loop,negmaml --rounds 1

The torch methods are in peers_torch.py, run by the interpreter of --torch-python. One that is not
installed there, or fails, is left out of the comparison, and its line says why.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise

import numpy as np

INNER_RATE = 0.01
OUTER_RATE = 1e-3
SCAN_STEPS = 500  # meta-steps of the sinusoid in one call of a compiled JAX function
AGREEMENT = 1e-3  # relative; float32 methods differ by far less, the first-order gradient by more
TIME_LIMIT = 300  # seconds that one process may take, imports and compilation included

TORCH_METHODS = ["learn2learn", "higher", "torchopt", "torch.func", "torch-loop"]


# The data: what every method is given, in the layouts of torch.


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
    """Everything that a method has to be told, in one file; numbers in single precision."""
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
    """The same, but one task after another by lax.map."""
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


PLAIN_ROADS = {"plain-jax": plain_vmap, "plain-jax-map": plain_map}


def negmaml_roads():
    """The methods of this package, by the name that the table gives them: register one here.

    A method that chooses its options by workload finds the workload's name in its first argument.
    """
    methods = ("mixed", "reverse")
    return {"negmaml": package} | {
        f"negmaml-{method}": partial(package, method=method) for method in methods
    }


def jax_methods():
    """All the methods that this script runs itself."""
    return PLAIN_ROADS | negmaml_roads()


# The worker: one JAX method on one workload, in a process of its own.


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
    """A function that goes on training for SCAN_STEPS meta-steps every time it is called."""
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

    def go_on():
        nonlocal carry, key
        key, now = jax.random.split(key)
        carry, losses = jax.block_until_ready(steps(carry, now))
        return losses

    return go_on


def call_times(function, seconds):
    """Milliseconds of each of as many calls as fit in `seconds`, at least three; two come before.

    The first of those compiles, the second still finds cold caches.
    """
    for _ in range(2):
        function()
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return times


def work(workload, method, seconds, path):
    """What the hidden --method option runs; gives the dictionary that peers_torch.py gives."""
    import jax

    params, support, query, inner, outer = load(path, workload)
    value_and_grad = jax_methods()[method](workload, LOSSES[workload], inner)
    compiled = jax.jit(value_and_grad)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    loss, gradient = jax.block_until_ready(compiled(params, support, query))
    first = time.perf_counter() - start
    norm = math.sqrt(sum(float((np.asarray(g, float) ** 2).sum()) for g in gradient))
    if workload == "sinusoid":
        steps, function = SCAN_STEPS, training(value_and_grad, params, support, query, outer)
    else:
        steps, function = 1, lambda: jax.block_until_ready(compiled(params, support, query))
    return {
        "ms": statistics.median(call_times(function, seconds)) / steps,
        "first": first,
        "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "loss": float(loss),
        "norm": norm,
        "version": f"JAX {jax.__version__}",
        "threads": os.cpu_count(),
    }


# The parent: writes the data, starts the processes and compares what they bring back.


def run_method(options, workload, method, path):
    """One method, timed in a fresh process: its dictionary, or the reason why there is none."""
    here = os.path.abspath(__file__)
    if method in TORCH_METHODS:
        script = os.path.join(os.path.dirname(here), "peers_torch.py")
        command = [options.torch_python, script, workload, method]
    else:
        command = [sys.executable, here, "--workloads", workload, "--method", method]
    command += ["--seconds", str(options.seconds), "--data", path]
    environment = os.environ | {"JAX_TRACEBACK_FILTERING": "off"}  # or it has the last word
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"took more than {TIME_LIMIT} s"}
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"skipped": f"failed with status {done.returncode}: {reason}"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(options, workload):
    """All methods of one workload, round after round; a method that fails once is not run again."""
    results = {method: [] for method in options.methods}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "data.npz")
        write_data(workload, path)
        for index in range(options.rounds):
            for method, done in results.items():
                if any("skipped" in result for result in done):
                    continue
                print(f"{workload} round {index + 1} {method} ...", file=sys.stderr, flush=True)
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
    """Whether it is within AGREEMENT; false for a NaN. A method that did not run is not asked."""
    return "skipped" in result or disagreement(result, reference) <= AGREEMENT


def row(method, result, reference, best):
    """One line of the table; `best` is the time of the fastest torch method, if any ran."""
    if "skipped" in result:
        return [method, "", result["skipped"], *[""] * 6]
    low, high = result["range"]
    return [
        method,
        result["threads"],
        f"{number(result['ms'])} ({number(low)} - {number(high)})",
        number(1000 / result["ms"]),
        f"{result['ms'] / best:.3g}" if best else "",
        f"{result['first']:.2f}",
        f"{result['mib']:.0f}",
        f"{disagreement(result, reference):.0e}",
        "agrees" if agrees(result, reference) else "DISAGREES",
    ]


def number(value):
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(results):
    """One workload as a markdown table, with whether all its methods agree."""
    ran = {method: result for method, result in results.items() if "skipped" not in result}
    norms = {method: result["norm"] for method, result in ran.items()}
    reference = ran.get(median_road(norms))
    best = min((ran[method]["ms"] for method in TORCH_METHODS if method in ran), default=None)
    head = [
        "method",
        "threads",
        "ms, median (range)",
        "a second",
        "ms / best torch",
        "first call, s",
    ]
    head += ["MiB"]
    lines = [[*head, "difference", "loss and norm"], ["---"] + ["---:"] * 7 + ["---"]]
    lines += [row(method, result, reference, best) for method, result in results.items()]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return text, all(agrees(result, reference) for result in ran.values())


def median_road(norms):
    """The method whose norm is in the middle, from which no single wrong method can draw the others."""
    order = sorted(norms, key=norms.get)
    return order[len(order) // 2] if order else None


def preamble(options):
    """What was run, where, and what the columns mean."""
    return (
        f"{os.cpu_count()} CPU cores, load average {os.getloadavg()[0]:.1f} before the start; "
        f"{options.rounds} rounds of {options.seconds:g} s a method, "
        "each a process of its own; median of the rounds' medians.\n"
        "One meta-step with sampling and Adam (sinusoid), or one meta-gradient (wide, conv4).\n"
        "The first call is that of the meta-gradient alone and compiles in JAX; imports are in no "
        "time.\n"
        "MiB: how far the first call raised the peak memory of the process, compilation included.\n"
        "The torch methods have one thread or as many as cores, whichever is faster in the "
        "process.\n"
    )


def compare(options):
    """Time every workload and print its table; gives the exit status."""
    agree = True
    print(preamble(options))
    for workload in options.workloads:
        results = {method: summary(done) for method, done in measure(options, workload).items()}
        ran = [result for result in results.values() if "skipped" not in result]
        if not ran:
            reasons = "; ".join(f"{method}: {v['skipped']}" for method, v in results.items())
            sys.exit(f"no method ran ({reasons})")
        versions = sorted({r["version"] for r in ran})
        text, same = table(results)
        print(f"{workload} ({'; '.join(versions)})\n\n{text}\n", flush=True)
        agree = agree and same
    return 0 if agree else 1


def choice_of(names):
    """The type of an option that takes some of `names`, separated by commas."""

    def parse_names(text):
        chosen = text.split(",")
        unknown = sorted(set(chosen) - set(names))
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {unknown}; choose from {','.join(names)}")
        return chosen

    return parse_names


def parse():
    """The command line."""
    methods = [*TORCH_METHODS, *jax_methods()]
    parser = argparse.ArgumentParser(description="Time meta-gradients in JAX and torch.")
    parser.add_argument("--workloads", type=choice_of(DATA), default=list(DATA))
    parser.add_argument("--methods", type=choice_of(methods), default=methods)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each method")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timed steps a process")
    parser.add_argument(
        "--torch-python", default=sys.executable, help="interpreter of the torch methods"
    )
    parser.add_argument("--method", choices=jax_methods(), help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    if arguments.method:
        workload = arguments.workloads[0]
        print(json.dumps(work(workload, arguments.method, arguments.seconds, arguments.data)))
    else:
        sys.exit(compare(arguments))
