"""A learned optimizer: a small network for each coordinate, trained through hundreds of its steps.

The network maps normalised means of the gradient to a step. It is an inner rule, and `wrt="rule"`
is the gradient in its weights, here of the test loss of regressions whose inputs have scales from
0.1 to 1. Forward over reverse stores the parameters and the two means of each step. The example
compares this gradient and its memory with those of reverse mode, and the trained optimizer with
gradient descent and Adam at the best of many rates.

Source: Metz et al., "Understanding and correcting pathologies in the training of learned
optimizers", ICML 2019.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import negmaml as nm

INPUTS, HIDDEN = 10, 8
RATES = jnp.geomspace(3e-3, 3.0, 16)


@nm.pytree
class LearnedOptimizer(nm.InnerRule):
    """Steps rate (m / sqrt(v) + network): without the network, Adam without its bias correction."""

    weights: Any
    rate: Any
    steps: int = nm.static(default=500)

    def init(self, params):
        """No gradient yet: both means are zero."""
        return (jax.tree.map(jnp.zeros_like, params),) * 2

    def update(self, gradient, state, params):
        """One step of every coordinate, and the new means."""
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state[0], gradient)
        square = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g**2, state[1], gradient)

        def move(w, g, m, v):
            scale = (v + 1e-8) ** -0.5
            features = jnp.stack([g * scale, m * scale, jnp.log(v + 1e-8) / 10], -1)
            hidden = jnp.tanh(features @ self.weights["in"] + self.weights["bias"])
            return w - self.rate * (m * scale + hidden @ self.weights["out"])

        return jax.tree.map(move, params, gradient, mean, square), (mean, square)


def initial(key, steps: int) -> LearnedOptimizer:
    """An optimizer whose network has no effect yet."""
    zeros = jnp.zeros(HIDDEN)
    weights = {"in": jax.random.normal(key, (3, HIDDEN)) / 2, "bias": zeros, "out": zeros}
    return LearnedOptimizer(weights, jnp.asarray(0.01), steps)


def loss(w, data):
    """Mean squared error of a linear model."""
    X, y = data
    return jnp.mean((X @ w - y) ** 2)


def sample(key, tasks: int = 8, rows: int = 40) -> nm.Tasks:
    """Regressions on inputs of unequal scales, with little noise."""
    kw, kx, ke = jax.random.split(key, 3)
    scales = jnp.geomspace(0.1, 1.0, INPUTS)
    w = jax.random.normal(kw, (tasks, INPUTS)) / scales
    X = jax.random.normal(kx, (2, tasks, rows, INPUTS)) * scales
    y = jnp.einsum("stni,ti->stn", X, w, precision="highest")
    y = y + 0.1 * jax.random.normal(ke, y.shape)
    return nm.Tasks((X[0], y[0]), (X[1], y[1]))


class LearnedOptimizerResult(NamedTuple):
    """Test losses, error of the gradient, and bytes of memory of each method of the gradient."""

    untrained: float
    learned: float
    descent: float
    adam: float
    gradient_error: float
    memory: dict[str, int]


def compare(rule: LearnedOptimizer, params, tasks) -> tuple[float, dict[str, int]]:
    """Return |difference of the two gradients| over their size, and the memory of each."""
    found, memory = {}, {}
    for method in ("mixed", "reverse"):
        algorithm = nm.maml_value_and_grad(loss, rule, wrt="rule", method=method)
        program: Any = jax.jit(algorithm).lower(params, tasks).compile()
        found[method] = ravel_pytree(program(params, tasks)[1])[0]
        memory[method] = program.memory_analysis().temp_size_in_bytes
    size = jnp.linalg.norm(found["reverse"])
    return float(jnp.linalg.norm(found["mixed"] - found["reverse"]) / size), memory


def main(meta_steps: int = 300, steps: int = 500, seed: int = 0) -> LearnedOptimizerResult:
    """Train the optimizer, and test it beside others on new tasks."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params, rule, fresh = jnp.zeros(INPUTS), initial(keys[0], steps), sample(keys[1], tasks=100)
    algorithm = nm.maml_value_and_grad(loss, rule, wrt="rule")
    outer = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(3e-3))
    start = nm.ParamsAndRule(params, rule)
    trained = nm.fit(keys[2], start, algorithm, sample, outer, meta_steps).params.rule

    def test(rule):
        return nm.maml(loss, rule)(params, fresh)

    def best(make):  # some rates diverge
        return float(jnp.nanmin(jax.lax.map(lambda rate: test(make(rate)), RATES)))

    error, memory = compare(trained, params, sample(keys[1]))
    descent = best(lambda rate: nm.GradientDescent(rate, steps))
    adam = best(lambda rate: nm.InnerOptimizer(optax.adam(rate, eps_root=1e-8), steps))
    before, after = float(test(rule)), float(test(trained))
    return LearnedOptimizerResult(before, after, descent, adam, error, memory)


if __name__ == "__main__":
    import tyro

    result = tyro.cli(main)
    print(*(f"{name}: {value}" for name, value in result._asdict().items()), sep="\n")
