"""Kernel meta-learning: what it costs beside the obvious ways.

    python benchmarks/kernels.py [--torch-python PYTHON]      each line in a process of its own

tangent: the tangent kernel of a three-layer network of width 1024 on 500 x 500 points, float32;
by the package, by jax.jacobian, and, where torch is installed, by torch.func's recipe.
train, leave-out: exact meta-training on 1000 points (50 tasks of 10 + 10) at 25 rates and 10
ridges, and leaving every task out, beside a direct solve for each rate and ridge.

Times are CPU times, on one thread where linear algebra is told so (OPENBLAS_NUM_THREADS=1 taskset
-c 0): those of a busy machine say something too.
"""

import argparse
import resource
import subprocess
import sys
from itertools import pairwise

POINTS, INPUTS, WIDTH = 500, 64, 1024
SIZES = (INPUTS, WIDTH, WIDTH, 1)


def measure(function, repeats=3):
    """The result; CPU time of the first call and the least of the next, and rise of peak memory."""

    def seconds():
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(repeats + 1):
        start = seconds()
        result = function()
        times.append(seconds() - start)
    rose = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return result, f"first {times[0]:7.2f} s, then {min(times[1:]):7.3f} s, memory {rose:6.0f} MiB"


def arrays():
    """Weights and points of the network, from NumPy so that every method has the same."""
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
    import jax

    import negmaml as nm

    weights, x1, x2 = arrays()
    kernel = nm.kernels.empirical_ntk(network, weights)
    return measure(lambda: jax.block_until_ready(kernel(x1, x2)))


def tangent_jacobian():
    import jax

    weights, x1, x2 = arrays()

    @jax.jit
    def kernel(weights, x1, x2):
        each = jax.vmap(jax.jacobian(network), (None, 0))  # of a batch: every pair's derivatives
        left, right = (each(weights, x) for x in (x1, x2))
        pairs = zip(left, right, strict=True)
        return sum(a.reshape(POINTS, -1) @ b.reshape(POINTS, -1).T for a, b in pairs)

    return measure(lambda: jax.block_until_ready(kernel(weights, x1, x2)), repeats=1)


def tangent_torch():
    """The recipe of torch.func's tutorial: vmapped jacrev of one point, contracted leaf by leaf."""
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
    import jax

    import negmaml as nm

    tasks, kernel, rates, ridges = problem(double)
    rule = nm.GradientDescent(rates)
    return measure(
        lambda: jax.block_until_ready(
            nm.kernels.meta_train(kernel, tasks, rule, meta_ridge=ridges).weights
        )
    )


def direct(double):
    """One Cholesky solve for each rate and ridge; G as the quadratic in the rate that it is."""
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
    return measure(lambda: jax.block_until_ready(solve(tasks, *grid)))


def leave_out(double):
    import jax

    import negmaml as nm

    tasks, kernel, rates, ridges = problem(double)
    rule, adapt = nm.GradientDescent(rates), nm.GradientDescent(rates)

    def losses():
        left = nm.kernels.leave_one_task_out(kernel, tasks, rule, meta_ridge=ridges)
        return jax.block_until_ready(left.losses(adapt))

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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--torch-python", default=sys.executable)
    given = parser.parse_args()
    if given.method:
        try:
            result, line = METHODS[given.method]()
            print(f"{given.method:<30} {line}, sum {float(abs(result).sum()):.6g}")
        except ModuleNotFoundError as missing:
            print(f"{given.method:<30} skipped: {missing}")
    else:
        for method in METHODS:
            python = given.torch_python if "torch" in method else sys.executable
            subprocess.run([python, __file__, "--method", method], check=True)
