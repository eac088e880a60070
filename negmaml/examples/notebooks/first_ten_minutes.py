# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # First ten minutes: rates of either sign
#
# **At the end you can**
#
# - say why a step in the *wrong* direction may improve meta-training;
# - predict the best rates of a linear model without training anything, and differentiate them;
# - meta-train a small network.
#
# **You need** NumPy, and to have heard of MAML. `pip install ".[all]"` in a copy of the repository.
#
# **It takes** ten minutes to read, and 20 seconds to run on a laptop.

# %%
from dataclasses import replace

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import negmaml as nm

NEGATIVE, ZERO, POSITIVE = "#0072b2", "#6c757d", "#d55e00"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Tasks with a single weight
#
# A task is a small data set. Here each one is a line through the origin with a slope $w$ of its
# own, seen with noise: $y = w x + \text{noise}$. The slopes scatter around $w_0 = 1$.
#
# A model starts at the same slope $\omega$ in every task. It takes one gradient step on three
# *support* rows, with a rate $\alpha$. The adapted slope is
#
# $$\theta = \omega - \alpha\, s\, (\omega - \hat w), \qquad s = \text{mean}(x^2),$$
#
# where $\hat w$ is the least-squares slope of the support. A positive rate moves towards the task,
# a negative one away from it.

# %%
rng = np.random.default_rng(0)
tasks, support, w0, spread, noise = 4, 3, 1.0, 0.2, 1.0


def training_sets(runs):
    """Support and query rows of a number of training sets, each of four tasks."""
    w = w0 + spread * rng.normal(size=(runs, tasks, 1))
    x = rng.normal(size=(runs, tasks, support + 1))
    y = w * x + noise * rng.normal(size=x.shape)
    return x[..., :-1], y[..., :-1], x[..., -1], y[..., -1]


# %% [markdown]
# Meta-training chooses $\omega$ such that the adapted slopes predict another row of each task, its
# *query*. Both $x_q \theta$ and the squared error depend on $\omega$ in a simple way, so this is
# a regression with one unknown: find $\omega$ with $\phi\, \omega \approx r$.


# %%
def regression(rate, sets):
    """The factor phi of omega in each prediction, and the rest r of each label."""
    x, y, x_query, y_query = sets
    phi = x_query * (1 - rate * np.mean(x**2, -1))
    return phi, y_query - rate * x_query * np.mean(x * y, -1)


def meta_train(rate, sets):
    """The omega of least meta-loss for each training set."""
    phi, rest = regression(rate, sets)
    return np.sum(phi * rest, -1) / np.sum(phi**2, -1)


# %% [markdown]
# The loss of meta-training is a parabola in $\omega$. Each training set has its own noise, which
# moves the bottom of the parabola away from $w_0$. The figure shows eight training sets at
# three rates.

# %%
omega, sets = np.linspace(-1, 3, 101), training_sets(8)
figure, axes = plt.subplots(1, 3, figsize=(8, 2.6), sharey=True, layout="constrained")
for axis, rate, color in zip(axes, (-0.6, 0.0, 0.6), (NEGATIVE, ZERO, POSITIVE), strict=True):
    phi, rest = regression(rate, sets)
    meta = np.mean((phi[..., None] * omega - rest[..., None]) ** 2, 1) / 2
    axis.plot(omega, (meta - meta.min(1, keepdims=True)).T, color=color, lw=0.8)
    axis.plot(meta_train(rate, sets), np.zeros(8), "k|", ms=14, label="lowest points")
    axis.axvline(w0, color="k", ls=":", lw=1, label="$w_0$")
    axis.set(title=f"training rate {rate:g}", xlabel=r"$\omega$", ylim=(-0.1, 1.5), xlim=(-1, 3))
axes[0].set_ylabel("meta-loss above its minimum")
axes[2].legend(fontsize=7, loc="upper right")
figure.suptitle("A negative rate makes the loss steep, and noise moves its minimum less")
plt.show()

# %% [markdown]
# The reason is in `regression`. A negative rate makes $\phi = x_q (1 - \alpha s)$ larger, so that
# the same noise in the query label needs a smaller change of $\omega$. A positive rate makes $\phi$
# smaller. Many training sets confirm it:

# %%
sets = training_sets(100_000)
errors = {rate: np.mean((meta_train(rate, sets) - w0) ** 2) for rate in (-0.6, 0.0, 0.6)}
for rate, error in errors.items():
    print(f"training rate {rate:4g}: mean squared error of omega {error:.2f}")
assert errors[-0.6] < errors[0.0] < errors[0.6]

# %% [markdown]
# The price of a negative rate is noise of the support labels, which grows with $\alpha^2$. So the
# best rate is negative, but not too negative.
#
# ## Theory beside simulation
#
# `negmaml` has this problem in any dimension. `nm.theory` predicts the mean test loss over training
# sets, and `nm.simulate` measures it on random ones. In both, the rate of meta-training (`train`)
# and the rate at test time (`adapt`) are two numbers, and each may have any sign.

# %%
problem = nm.MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
adapt = nm.GradientDescent(0.1)
curve, points = np.linspace(-2.0, 1.0, 121), np.linspace(-2.0, 1.0, 13)

predicted = nm.theory.test_loss(problem, nm.GradientDescent(curve), adapt)
simulated = nm.simulate(
    jax.random.key(0), problem, nm.GradientDescent(points), adapt, runs=400
).test_loss
best, worst = nm.theory.stationary_train_rates(p=60, n_t=30)
print(f"best training rate {best:.2f}, worst {worst:.2f}; simulated losses: {simulated.shape}")
assert best < 0 < worst

# %% [markdown]
# A task has 60 weights here, and meta-training sees three tasks of 30 support and 2 query rows.
# A new task has 20 rows. Points are means of 400 training sets with standard errors. Nothing in the
# curve is fitted to them.

# %%
losses = np.asarray(simulated)
mean, error = losses.mean(-1), losses.std(-1, ddof=1) / 20
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for side, color, label in ((curve <= 0, NEGATIVE, "negative"), (curve >= 0, POSITIVE, "positive")):
    axis.plot(curve[side], predicted[side], color=color, label=f"theory, {label} rates")
axis.errorbar(points, mean, error, fmt="o", color="k", ms=3, label="simulation")
axis.axvline(best, color=ZERO, ls="--", lw=1, label=f"best rate {best:.2f}")
axis.set(xlabel="training rate", ylabel="test loss on new tasks")
axis.set_title("The best training rate is negative, and the theory predicts it")
axis.legend(frameon=False, fontsize=8)
plt.show()
assert np.allclose(mean, np.interp(points, curve, predicted), rtol=0.02)

# %% [markdown]
# The dashed line is the optimum of Theorem 1 of the paper, which is of leading order in the number
# of query rows over that of weights. `best_rates` has no such limit, and its training rate differs
# a little. At test time nothing is fitted to query labels, so that the model should move *towards*
# the task. The best rate there is positive:

# %%
train_rate, adapt_rate = nm.theory.best_rates(problem)
print(f"best rates: {train_rate:.2f} in meta-training, {adapt_rate:.3f} at test time")
assert train_rate < 0 < adapt_rate

# %% [markdown]
# ## An optimum that can be differentiated
#
# How does the best test rate change with the noise of the labels? `best_adapt_rate` is a function
# in JAX like any other: differentiate it with `value_and_grad`, and map it over noise levels with
# `vmap`.


# %%
def best_test_rate(noise):
    return nm.theory.best_adapt_rate(replace(problem, sigma=noise), nm.GradientDescent(best))


levels = np.linspace(0.1, 3.0, 59)
rates, slopes = jax.jit(jax.vmap(jax.value_and_grad(best_test_rate)))(jnp.asarray(levels))
quotients = np.gradient(rates, levels)  # finite differences of the rates
print(f"at noise {levels[18]:.1f}: slope {slopes[18]:.3f}, by differences {quotients[18]:.3f}")
assert np.all(np.abs(slopes - quotients)[1:-1] < 0.005)

# %%
figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
axis.plot(levels, rates, color=POSITIVE, label="best rate")
near = levels[[8, 28]]
tangent = rates[18] + slopes[18] * (near - levels[18])
axis.plot(near, tangent, "k", lw=1, label="derivative at noise 1")
axis.set(xlabel="noise of the labels", ylabel="best rate at test time")
axis.set_title("Noisier labels ask for a smaller step at test time")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## A meta-trained network
#
# The same rules work for any function in JAX. Tasks are now sine waves of random amplitude and
# phase, each with ten support points. The model is a network with two hidden layers, and a step of
# rate 0.01 should turn it into the sine wave at hand.


# %%
def predict(layers, x):
    for weight, bias in layers[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    return x @ layers[-1][0] + layers[-1][1]


def loss(layers, data):
    return jnp.mean((predict(layers, data[0]) - data[1]) ** 2)


shapes = [(1, 40), (40, 40), (40, 1)]
rng = np.random.default_rng(1)
start = [(rng.normal(size=s) / s[0] ** 0.5, np.zeros(s[1])) for s in shapes]
start = jax.tree.map(lambda leaf: leaf.astype(np.float32), start)

# %% [markdown]
# `maml_value_and_grad` gives the meta-gradient, `fit` runs the outer loop with any optimizer of
# optax, and `evaluate` adapts to new tasks, here by up to three steps.

# %%
waves, step = nm.tasks.Sinusoid(m=25, n_t=10, n_v=10), nm.GradientDescent(0.01)
algorithm = nm.maml_value_and_grad(loss, step)
trained = nm.fit(jax.random.key(2), start, algorithm, waves, optax.adam(3e-3), 1200).params
test = nm.evaluate(
    jax.random.key(3), trained, loss, replace(step, steps=3), waves, episodes=200, per_step=True
)
print(test)
assert test.mean[1] < 0.7 * test.mean[0]  # a single step already helps

# %%
wave, grid = waves(jax.random.key(4)), np.linspace(-5, 5, 100)[:, None]
rows = jax.tree.map(lambda leaf: leaf[0], wave.support)
adapted = nm.adapt(loss, trained, rows, replace(step, steps=3))
figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
axis.plot(grid, predict(trained, grid), color=ZERO, label="before adapting")
axis.plot(grid, predict(adapted, grid), color=POSITIVE, label="after three steps")
axis.plot(*rows, "ko", ms=4, label="ten support points")
axis.set(xlabel="x", ylabel="y", title="Three steps on ten points turn the network into a new wave")
axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# Would a negative training rate have helped here, too? For sine waves it does not: the
# [guide to algorithms](../../meta/README.md#examples) has the table. Networks that learn features
# differ from linear models, so try both signs.
#
# ## Next steps
#
# - [Why a negative rate helps](../../problem/README.md#why-a-negative-rate-helps), in formulas.
# - [Theory](../../theory/README.md) and [simulation](../../linear/README.md): all options.
# - Your own model: the notebook [own_model](own_model.ipynb), and the guides to
#   [algorithms](../../meta/README.md) and [training](../../training/README.md).
# - A file of rows in groups: the notebook [pupils_in_schools](pupils_in_schools.ipynb).
