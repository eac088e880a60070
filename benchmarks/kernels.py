"""Time of kernel meta-learning, compared with direct implementations.

    OPENBLAS_NUM_THREADS=1 taskset -c 0 python benchmarks/kernels.py [--torch-python PYTHON]

tangent: the tangent kernel of a three-layer network of width 1024 on 500 x 500 points, float32;
by the package, by jax.jacobian, and by torch.func if torch is installed.
train, leave-out: exact meta-training on 1000 points (50 tasks of 10 + 10) at 25 rates and 10
ridges, and leaving every task out, compared with a direct solve for each rate and ridge.

Each line runs in its own process. Times are CPU times of one thread, so they are meaningful on a
busy machine, too.
"""

import argparse
import json
import sys
from itertools import pairwise

import harness

POINTS, INPUTS, WIDTH = 500, 64, 1024
SIZES = (INPUTS, WIDTH, WIDTH, 1)


def measure(function, repeats=3):
    """CPU time of the first call and the least of the next, increase of peak memory, and a sum."""
    before, clock = harness.peak_mib(), harness.cpu_seconds
    first = harness.timed(function, clock)
    then = min(harness.timed(function, clock) for _ in range(repeats))
    increase = harness.peak_mib() - before
    total = float(abs(function()).sum())  # methods have to agree in it
    return [f"{first:.2f}", f"{then:.3f}", f"{increase:.0f}", f"{total:.6g}"]


def arrays():
    """Weights and points of the network, drawn by NumPy so that all methods use the same."""
    import numpy as np

    rng = np.random.default_rng(0)
    weights = [(rng.normal(size=(a, b)) / a**0.5).astype("f") for a, b in pairwise(SIZES)]
    return weights, *(rng.normal(size=(POINTS, INPUTS)).astype("f") for _ in range(2))


def network(weights, x):
    import jax

    for i, weight in enumerate(weights):
        x = (jax.nn.relu(x) if i else x) @ weight
    return x


def tangent_negmaml():
    import negmaml as nm

    weights, x1, x2 = arrays()
    kernel = nm.kernels.empirical_ntk(network, weights)
    return measure(lambda: kernel(x1, x2))


def tangent_jacobian():
    import jax

    weights, x1, x2 = arrays()

    @jax.jit
    def kernel(weights, x1, x2):
        each = jax.vmap(jax.jacobian(network), (None, 0))  # of a batch: every pair's derivatives
        left, right = (each(weights, x) for x in (x1, x2))
        pairs = zip(left, right, strict=True)
        return sum(a.reshape(POINTS, -1) @ b.reshape(POINTS, -1).T for a, b in pairs)

    return measure(lambda: kernel(weights, x1, x2), repeats=1)


def tangent_torch():
    """The tutorial of torch.func: vmapped jacrev of one point, contracted leaf by leaf."""
    import torch
    from torch.func import jacrev, vmap

    weights, x1, x2 = (torch.tensor(x) if hasattr(x, "shape") else x for x in arrays())
    weights = tuple(torch.tensor(w) for w in weights)

    def one(weights, x):
        for i, weight in enumerate(weights):
            x = (torch.relu(x) if i else x) @ weight
        return x

    def kernel():
        left, right = (vmap(jacrev(one), (None, 0))(weights, x) for x in (x1, x2))
        return sum(
            torch.einsum("Naf,Mbf->NMab", a.flatten(2), b.flatten(2))
            for a, b in zip(left, right, strict=True)
        )[..., 0, 0]

    return measure(kernel, repeats=1)


def problem(double: bool):
    import jax
    import jax.numpy as jnp
    import numpy as np

    import negmaml as nm

    jax.config.update("jax_enable_x64", double)
    tasks = nm.tasks.Quadratic(p=8, m=50, n_t=10, n_v=10, sigma=0.3, nu=1.0)(jax.random.key(0))
    tasks = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), tasks)
    kernel = nm.kernels.relu_network(2, bias_variance=0.5)
    return tasks, kernel, np.linspace(-0.6, 0.6, 25), np.geomspace(1e-4, 1e2, 10)


def train(double):
    import negmaml as nm

    tasks, kernel, rates, ridges = problem(double)
    rule = nm.GradientDescent(rates)
    return measure(lambda: nm.kernels.meta_train(kernel, tasks, rule, meta_ridge=ridges).weights)


def direct(double):
    """One Cholesky solve for each rate and ridge, with the system as a quadratic in the rate."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    tasks, kernel, rates, ridges = problem(double)

    @jax.jit
    def solve(tasks, rates, ridges):
        (x_t, y_t), (x_v, y_v) = tasks
        x = jnp.concatenate([x_t.reshape(-1, 8), x_v.reshape(-1, 8)])
        K, T, m = kernel(x, x), y_t.size, len(y_t)
        block = jnp.kron(jnp.eye(m), jnp.ones((y_v.shape[1], y_t.shape[1]))).astype(K.dtype)
        D = K[T:, :T] * block / y_t.shape[1]
        A = D @ K[:T, T:]
        B = D @ K[:T, :T] @ D.T
        G0, eye = K[T:, T:], jnp.eye(y_v.size, dtype=K.dtype)

        def one(pair):
            rate, ridge = pair
            factor = jax.scipy.linalg.cho_factor(G0 - rate * (A + A.T) + rate**2 * B + ridge * eye)
            c = jax.scipy.linalg.cho_solve(factor, y_v.ravel() - rate * D @ y_t.ravel())
            return jnp.concatenate([-rate * D.T @ c, c])

        grid = jnp.meshgrid(rates, ridges, indexing="ij")
        return lax.map(one, tuple(part.ravel() for part in grid)).reshape(25, 10, -1)

    grid = jnp.asarray(rates, float), jnp.asarray(ridges, float)
    return measure(lambda: solve(tasks, *grid))


def leave_out(double):
    import negmaml as nm

    tasks, kernel, rates, ridges = problem(double)
    rule, adapt = nm.GradientDescent(rates), nm.GradientDescent(rates)

    def losses():
        left = nm.kernels.leave_one_task_out(kernel, tasks, rule, meta_ridge=ridges)
        return left.losses(adapt)

    return measure(losses)


METHODS = {
    "tangent kernel, negmaml": tangent_negmaml,
    "tangent kernel, jax.jacobian": tangent_jacobian,
    "tangent kernel, torch.func": tangent_torch,
    **{
        f"{name}, float{32 + 32 * double}": (lambda f=f, double=double: f(double))
        for name, f in (
            ("meta_train", train),
            ("250 Cholesky solves", direct),
            ("leave_one_task_out", leave_out),
        )
        for double in (False, True)
    },
}


def main(options, report):
    if options.method:
        try:
            print(json.dumps({"cells": METHODS[options.method]()}))
        except ModuleNotFoundError as error:
            print(json.dumps({"skipped": f"{error.name} is not installed"}))
        return
    report.table("method", "first, s", "then, s", "MiB", "sum")
    for method in METHODS:
        python = options.torch_python if "torch" in method else sys.executable
        found = harness.in_process("kernels.py", "--method", method, python=python)
        report.row(method, *found.get("cells", [found.get("skipped"), "", "", ""]))


if __name__ == "__main__":
    harness.run(
        main,
        __doc__,
        harness.option("--method", choices=METHODS, help=argparse.SUPPRESS),
        harness.option("--torch-python", default=sys.executable, help="interpreter with torch"),
    )
