"""A user's script, for a type checker in strict mode: nothing of the package is of unknown type."""

import jax
import jax.numpy as jnp
import optax
from jax import Array

import negmaml as nm

problem = nm.MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
train, adapt = nm.GradientDescent(jnp.linspace(-0.6, 0.6, 25)), nm.GradientDescent(0.2)

loss = nm.theory.test_loss(problem, train, adapt, meta_ridge=0.1)
spread = nm.theory.standard_deviation(problem, train, adapt).test_loss
best_train, best_adapt = nm.theory.best_rates(problem)
ridge = nm.theory.best_meta_ridge(problem, nm.GradientDescent(-0.2))
low, high = nm.theory.stationary_train_rates(p=60, n_t=30)
moment = nm.theory.wishart_moment(5, 30, (1, 2))
nodes, weights = nm.theory.wishart_quadrature(5, 30)
map_ = nm.theory.phase_diagram(100.0, 10.0, 30.0, 2.0, 0.5, 1.0).best

simulated = nm.simulate(jax.random.key(0), problem, train, adapt, runs=200)
losses: Array = simulated.test_loss
agrees: bool = nm.verify(problem, nm.Momentum(-0.1, 0.5, 3), adapt, runs=100).agrees
data = nm.linear.sample(jax.random.key(0), problem)
Phi, r = nm.linear.meta_system(data, train)
solution = nm.linear.minimiser(Phi, r).omega


def square_loss(params: Array, batch: tuple[Array, Array]) -> Array:
    """Mean squared error."""
    x, y = batch
    return jnp.mean((x @ params - y) ** 2)


tasks = nm.tasks.Linear(problem)(jax.random.key(1))
params = jnp.zeros(60)
value_and_grad = nm.maml_value_and_grad(
    square_loss, nm.GradientDescent(nm.Schedule([0.1, -0.1]), 2)
)
value, gradient = value_and_grad(params, tasks)
objective = nm.maml(square_loss, nm.Proximal(1.0))(params, tasks)
adapted = nm.adapt(square_loss, params, tasks.support, nm.InnerOptimizer(optax.sgd(0.1)))
result = nm.fit(
    jax.random.key(2), params, value_and_grad, nm.tasks.Linear(problem), optax.adam(1e-3), 10
)
history = result.loss


class Powers(nm.sweeps.SweepFunction):
    """A sweep function that handles an axis whole."""

    accepts = requires = ("size", "powers")
    vectorized_axes = ("powers",)

    def __call__(self, key: Array, *, size: int, powers: Array) -> dict[str, Array]:
        return {"value": jnp.mean(jax.random.normal(key, (size,))) ** powers}


swept = nm.sweep(Powers(), {"size": [2, 3], "powers": [1.0, 2.0]}, 4)
means = swept["value"].mean("seed")
linear: nm.sweeps.SweepFunction = nm.sweeps.linear
