"""The torch side of meta_gradients.py: one workload by one peer, timed, as one line of JSON.

Run by the interpreter that has torch; meta_gradients.py writes the data, starts this and reads the
line. Five methods to the same second-order meta-gradient with one inner SGD step:

    learn2learn   MAML.clone and adapt, task by task
    higher        innerloop_ctx, task by task
    torchopt      MetaSGD, task by task, the model's state put back after each
    torch.func    vmap over the tasks of a loss with grad inside
    torch-loop    torch.autograd.grad with create_graph, task by task, no library

Methods that go task by task call backward for each task, which accumulates the meta-gradient and
frees the graph, as the examples of learn2learn and higher do.

    python benchmarks/peers_torch.py sinusoid higher --seconds 3 --data data.npz
"""

import argparse
import json
import math
import statistics
import time
import warnings

import harness
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

WARM_UP = 3  # untimed steps: the first ones start threads and choose kernels


# The models: a module for the methods that take one, a function of its parameters for the others.


def mlp_module(parameters):
    """Linear layers with ReLU between, of the sizes of `parameters`."""
    layers = []
    for weight in parameters[::2]:
        layers += [nn.Linear(weight.shape[1], weight.shape[0]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def mlp(parameters, x):
    """The function of the module of `mlp_module`."""
    *hidden, weight, bias = parameters
    for w, b in zip(hidden[::2], hidden[1::2], strict=True):
        x = torch.relu(F.linear(x, w, b))
    return F.linear(x, weight, bias)


def conv_module(parameters):
    """Blocks of convolution, normalisation by the batch's own statistics, ReLU and pooling."""
    *blocks, weight, _ = parameters
    layers = []
    for kernel in blocks[::3]:
        outputs, inputs = kernel.shape[:2]
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        layers.append(nn.BatchNorm2d(outputs, track_running_stats=False))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(weight.shape[1], weight.shape[0]))


def conv(parameters, x):
    """The function of the module of `conv_module`."""
    *blocks, weight, bias = parameters
    for kernel, scale, shift in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
        x = F.conv2d(x, kernel, padding=1)
        x = F.batch_norm(x, None, None, scale, shift, training=True)
        x = F.max_pool2d(torch.relu(x), 2)
    return F.linear(x.flatten(1), weight, bias)


MODELS = {
    "sinusoid": (mlp_module, mlp, F.mse_loss),
    "wide": (mlp_module, mlp, F.mse_loss),
    "conv4": (conv_module, conv, F.cross_entropy),
}


# The methods. Each takes (module, forward, criterion, inner rate) and returns a function of
# (support, query), pairs (x, y) that lead with the task axis, which gives the meta-loss and leaves
# the meta-gradient in the `grad` of the module's parameters.


def task_by_task(task_loss):
    """The mean of `task_loss(support, query)` over tasks, a backward pass for each."""

    def meta_loss(support, query):
        total = 0.0
        for *task, x_q, y_q in zip(*support, *query, strict=True):
            loss = task_loss(tuple(task), (x_q, y_q)) / len(query[0])
            loss.backward()
            total += loss.detach()
        return total

    return meta_loss


def learn2learn(module, _, criterion, rate):
    """The MAML wrapper, as in its README."""
    from learn2learn.algorithms import MAML

    maml = MAML(module, lr=rate)

    def task_loss(support, query):
        learner = maml.clone()
        learner.adapt(criterion(learner(support[0]), support[1]))
        return criterion(learner(query[0]), query[1])

    return task_by_task(task_loss)


def higher(module, _, criterion, rate):
    """A functional copy of the module and a differentiable SGD, for each task."""
    from higher import innerloop_ctx

    inner = torch.optim.SGD(module.parameters(), lr=rate)

    def task_loss(support, query):
        with innerloop_ctx(module, inner, copy_initial_weights=False) as (copy, optimizer):
            optimizer.step(criterion(copy(support[0]), support[1]))
            return criterion(copy(query[0]), query[1])

    return task_by_task(task_loss)


def torchopt(module, _, criterion, rate):
    """MetaSGD changes the module, so its initial state is put back after each task.

    The state is extracted once: it refers to the parameters, and so follows the outer optimizer.
    """
    from torchopt import MetaSGD, extract_state_dict, recover_state_dict

    inner = MetaSGD(module, lr=rate)
    initial = [(target, extract_state_dict(target)) for target in (module, inner)]

    def task_loss(support, query):
        inner.step(criterion(module(support[0]), support[1]))
        loss = criterion(module(query[0]), query[1])
        for target, state in initial:
            recover_state_dict(target, state)
        return loss

    return task_by_task(task_loss)


def torch_func(module, _, criterion, rate):
    """torch.func: the gradient of a vmapped loss which takes a gradient itself."""
    from torch.func import functional_call, grad, grad_and_value, vmap

    def loss(parameters, data):
        return criterion(functional_call(module, parameters, (data[0],)), data[1])

    def task_loss(parameters, support, query):
        gradient = grad(loss)(parameters, support)
        adapted = {name: value - rate * gradient[name] for name, value in parameters.items()}
        return loss(adapted, query)

    def objective(parameters, support, query):
        return vmap(task_loss, in_dims=(None, 0, 0))(parameters, support, query).mean()

    def meta_loss(support, query):
        parameters = dict(module.named_parameters())
        detached = {name: value.detach() for name, value in parameters.items()}
        gradient, value = grad_and_value(objective)(detached, support, query)
        for name, parameter in parameters.items():
            parameter.grad = gradient[name]
        return value

    return meta_loss


def torch_loop(module, forward, criterion, rate):
    """No library: the forward pass is a function of a list of parameters."""
    parameters = list(module.parameters())

    def task_loss(support, query):
        loss = criterion(forward(parameters, support[0]), support[1])
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        adapted = [p - rate * g for p, g in zip(parameters, gradient, strict=True)]
        return criterion(forward(adapted, query[0]), query[1])

    return task_by_task(task_loss)


PEERS = {
    "learn2learn": learn2learn,
    "higher": higher,
    "torchopt": torchopt,
    "torch.func": torch_func,
    "torch-loop": torch_loop,
}


# The timed functions.


def load(path, workload):
    """The module with the given weights, its function and criterion, the tasks and the rates."""
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    initial = [arrays[f"parameter_{i}"] for i in range(int(arrays["parameters"]))]
    make_module, forward, criterion = MODELS[workload]
    module = make_module(initial)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), initial, strict=True):
            parameter.copy_(value)
    tasks = [(arrays[f"{part}_x"], arrays[f"{part}_y"]) for part in ("support", "query")]
    return module, forward, criterion, tasks, float(arrays["inner"]), float(arrays["outer"])


def sample_sinusoids(like):
    """New sinusoid tasks in the shapes of `like`, all of them drawn at once."""
    meta_batch, shots = like[0][0].shape[:2]
    points = shots + like[1][0].shape[1]
    amplitude = 0.1 + 4.9 * torch.rand(meta_batch, 1, 1)
    phase = math.pi * torch.rand(meta_batch, 1, 1)
    x = 10 * torch.rand(meta_batch, points, 1) - 5
    y = amplitude * torch.sin(x + phase)
    return (x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:])


def meta_step(workload, parameters, meta_loss, tasks, outer):
    """The function that is timed: a whole step of training, or only the meta-gradient."""
    adam = torch.optim.Adam(parameters, lr=outer)

    def gradient():
        adam.zero_grad()
        meta_loss(*tasks)

    def training():
        adam.zero_grad()
        meta_loss(*sample_sinusoids(tasks))
        adam.step()

    return training if workload == "sinusoid" else gradient


def fastest_threads(step, seconds):
    """(median milliseconds of a step, threads), with one thread or torch's default, the faster.

    On such small operations a second thread may gain nothing. One that waits for a core used by
    another process can make a step a hundred times slower.
    """
    counts = sorted({1, torch.get_num_threads()})
    results = []
    for threads in counts:
        torch.set_num_threads(threads)
        results.append(
            (statistics.median(harness.call_times(step, seconds / len(counts))), threads)
        )
    return min(results)


def measure(workload, peer, seconds, path):
    """Measure one peer; returns the dictionary that is printed as JSON."""
    torch.manual_seed(0)
    module, forward, criterion, tasks, inner, outer = load(path, workload)
    parameters = list(module.parameters())  # before a peer replaces them by other tensors
    try:
        meta_loss = PEERS[peer](module, forward, criterion, inner)
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    before = harness.peak_mib()
    start = time.perf_counter()
    loss = float(meta_loss(*tasks))
    first = time.perf_counter() - start
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))
    step = meta_step(workload, parameters, meta_loss, tasks, outer)
    ms, threads = fastest_threads(step, seconds)
    return {
        "ms": ms,
        "first": first,
        "mib": harness.peak_mib() - before,
        "loss": loss,
        "norm": norm,
        "version": f"torch {torch.__version__}",
        "threads": threads,
    }


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description="Time the meta-gradient of a torch library.")
    parser.add_argument("workload", choices=MODELS)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--seconds", type=float, default=3.0, help="to spend on timed steps")
    parser.add_argument("--data", required=True, help="the .npz file that meta_gradients.py writes")
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    warnings.simplefilter("ignore")  # of old libraries, about what newer ones deprecate
    task = {"workload": options.workload, "method": options.peer}
    print(json.dumps(task | measure(options.workload, options.peer, options.seconds, options.data)))
