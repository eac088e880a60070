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
# # Your own model and your own tasks
#
# **At the end you can**
#
# - meta-train a model of Flax, Equinox or plain JAX on tasks of your own;
# - resume and load a run;
# - choose an algorithm and its rates by a fair test, with error bars.
#
# **You need** JAX, and a model whose loss is a function of parameters and data.
# `pip install ".[all,examples]"` in a copy of the repository.
#
# **It takes** ten minutes to read, and under a minute to run on a laptop.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import negmaml as nm

NEGATIVE, ZERO, POSITIVE = "#0072b2", "#6c757d", "#d55e00"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Tasks: a function of a key
#
# A task is a patient. The response to a drug grows with the dose along an S-shaped curve, whose
# height, steepness and position differ between patients. Each patient tries five doses. Which
# response will others have?
#
# A distribution of tasks is any function that takes a random key and returns
# `nm.Tasks(support, query)`. All arrays begin with the axis of tasks.


# %%
@jax.jit
def patients(key):
    """Dose-response curves of twenty patients: five rows to adapt on, and ten to predict."""
    keys = jax.random.split(key, 3)
    height, steepness, position = jax.random.normal(keys[0], (3, 20, 1, 1))
    dose = jax.random.uniform(keys[1], (20, 15, 1), minval=-3.0, maxval=3.0)
    curve = jax.nn.sigmoid(jnp.exp(0.5 + 0.3 * steepness) * (dose - position))
    noise = 0.05 * jax.random.normal(keys[2], dose.shape)
    response = (1 + 0.3 * height) * curve + noise
    return nm.Tasks((dose[:, :5], response[:, :5]), (dose[:, 5:], response[:, 5:]))


tasks = patients(jax.random.key(0))
print(tasks)

# %%
figure, axis = plt.subplots(figsize=(5.5, 2.6), layout="constrained")
for patient in range(5):
    (line,) = axis.plot(*np.array(tasks.query)[:, patient], "o", ms=3, label=f"patient {patient}")
    axis.plot(*np.array(tasks.support)[:, patient], "s", ms=6, color=line.get_color())
axis.plot([], [], "ks", ms=6, label="rows to adapt on")
axis.set(xlabel="dose", ylabel="response", title="Each patient has a curve of its own")
axis.legend(frameon=False, fontsize=7)
plt.show()

# %% [markdown]
# ## A model: Flax, Equinox or a function
#
# A Flax NNX module is passed as it is. The loss takes the module and the data of one task.


# %%
class Response(nnx.Module):
    def __init__(self, rngs, units=32):
        self.body = nnx.Linear(1, units, rngs=rngs)
        self.head = nnx.Linear(units, 1, rngs=rngs)

    def __call__(self, dose):
        return self.head(jnp.tanh(self.body(dose)))


def loss(model, data):
    dose, response = data
    return jnp.mean((model(dose) - response) ** 2)


model = Response(nnx.Rngs(0))
print(nm.variables(model))

# %% [markdown]
# ## Train, with an evaluation on the way
#
# An algorithm turns the loss and an inner rule, here three gradient steps, into a meta-gradient.
# `fit` trains, evaluates every 200 steps on patients that no step uses, and writes checkpoints.
# Call it again after an interruption, and it resumes.

# %%
steps = nm.GradientDescent(0.03, steps=3)
result = nm.fit(
    jax.random.key(1),
    model,
    nm.maml_value_and_grad(loss, steps),
    patients,
    optax.adam(1e-2),
    2000,
    evaluate=nm.maml(loss, steps),
    evaluate_every=200,
    checkpoint="runs/patients",
)
print("evaluations:", np.round(result.evaluation, 4))
assert result.evaluation[-1] < 0.8 * result.evaluation[0]

# %%
result.plot()

# %% [markdown]
# ## Load, and test on held-out patients
#
# `nm.load` returns the parameters of the latest checkpoint, in a module like the one it gets.
# `nm.evaluate` adapts to fresh patients and returns the loss of each, after every inner step.

# %%
loaded = nm.load("runs/patients", like=Response(nnx.Rngs(1)))
assert np.array_equal(loaded.head.kernel[...], result.params.head.kernel[...])

tested = nm.evaluate(jax.random.key(2), loaded, loss, steps, patients, episodes=1000, per_step=True)
print(tested)
assert tested.mean[3] + tested.interval[3] < tested.mean[0] - tested.interval[0]

# %%
one = jax.tree.map(lambda leaf: leaf[0], patients(jax.random.key(7)))
adapted = nm.adapt(loss, loaded, one.support, steps)
doses = np.linspace(-3, 3, 60)[:, None]
figure, axis = plt.subplots(figsize=(5.5, 2.8), layout="constrained")
axis.plot(doses, loaded(doses), color=ZERO, label="before adapting")
axis.plot(doses, adapted(doses), color=POSITIVE, label="after three steps")
axis.plot(*one.support, "ko", label="five rows to adapt on")
axis.plot(*one.query, "k.", alpha=0.4, label="rows to predict")
axis.set(
    xlabel="dose", ylabel="response", title="Five doses bend the common curve to a new patient"
)
axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## Choose an algorithm
#
# All algorithms have the same arguments, so that a fair test is a loop: the same start, the same
# patients in training, and the same new patients in the test. FOMAML ignores second derivatives.
# Meta-SGD also learns the rates, one for each weight, and no rule says that they are positive.


# %%
def train(algorithm, start):
    return nm.fit(jax.random.key(1), start, algorithm, patients, optax.adam(1e-2), 2000).params


def test(params, rule):
    return nm.evaluate(jax.random.key(2), params, loss, rule, patients, episodes=1000)


# %%
variables = nnx.state(model, nnx.Param)
rates = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.03), variables)
learned = train(nm.meta_sgd(loss, steps=3), nm.MetaSGDParams(model, rates))
results = {
    "MAML": test(result.params, steps),
    "FOMAML": test(train(nm.fomaml(loss, steps), model), steps),
    "Meta-SGD": test(learned.params, nm.GradientDescent(learned.rate, steps=3)),
}
for name, found in results.items():
    print(f"{name:9} {found.mean:.4f} ± {found.interval:.4f}")

# %% [markdown]
# The intervals are those of the mean over patients, who differ much. All algorithms met the same
# patients, so compare them in pairs:

# %%
for name in ("FOMAML", "Meta-SGD"):
    excess = np.asarray(results[name].values - results["MAML"].values)
    width = 1.96 * excess.std(ddof=1) / len(excess) ** 0.5
    print(f"loss of {name:8} minus that of MAML: {excess.mean():7.4f} ± {width:.4f}")
    assert name != "FOMAML" or excess.mean() > width

# %% [markdown]
# FOMAML has the larger loss, and its interval is far from zero. An interval that contains zero, as
# that of Meta-SGD may, leaves the question open. It is about these trained models on new patients:
# to compare algorithms, repeat the training over seeds, as the
# [guide to training](../../training/README.md) shows.
#
# ## Rates of both signs
#
# Which rates did Meta-SGD learn? Some are negative: these weights move *away* from the support.

# %%
flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(learned.rate)])
bins = np.linspace(-2, 5, 36).tolist()
figure, axis = plt.subplots(figsize=(5.5, 2.6), layout="constrained")
below, above = flat[flat < 0], flat[flat >= 0]
axis.hist(below, bins, color=NEGATIVE, label=f"{len(below)} negative rates")
axis.hist(above, bins, color=POSITIVE, label=f"{len(above)} positive rates")
axis.axvline(0.03, color=ZERO, ls="--", lw=1, label="at the start")
axis.set(xlabel="learned rate of a weight", ylabel="weights")
axis.set_title("A part of the learned rates is negative")
axis.legend(frameon=False)
plt.show()
print(f"{100 * np.mean(flat < 0):.0f} % of {len(flat)} rates are negative")
assert 0.05 < np.mean(flat < 0) < 0.5

# %% [markdown]
# Do they matter? Set the negative ones to zero, and test on the same patients.

# %%
clipped = jax.tree.map(lambda leaf: jnp.maximum(leaf, 0), learned.rate)
without = test(learned.params, nm.GradientDescent(clipped, steps=3))
print(f"with negative rates {results['Meta-SGD'].mean:.4f}, without {without.mean:.4f}")
assert without.mean > 1.1 * results["Meta-SGD"].mean

# %% [markdown]
# They do, for weights that were trained with them: without them the loss is larger.
#
# ## The same with Equinox
#
# An Equinox module, or any other pytree of arrays, is passed in the same way. It predicts for one
# row, so that the loss maps it over rows. With `nm.anil`, only the last layer adapts to a patient.

# %%
mlp = eqx.nn.MLP(1, 1, width_size=32, depth=1, activation=jnp.tanh, key=jax.random.key(3))


def mlp_loss(model, data):
    return jnp.mean((jax.vmap(model)(data[0]) - data[1]) ** 2)


head = jax.tree.map(lambda _: False, mlp)
head = eqx.tree_at(lambda m: (m.layers[-1].weight, m.layers[-1].bias), head, (True, True))
anil = nm.anil(mlp_loss, steps, head)
trained = nm.fit(jax.random.key(1), mlp, anil, patients, optax.adam(1e-2), 2000)
print(f"loss in the first and the last 100 steps: {trained.loss[:100].mean():.4f}, ", end="")
print(f"{trained.loss[-100:].mean():.4f}")
assert trained.loss[-100:].mean() < 0.7 * trained.loss[:100].mean()

# %% [markdown]
# ## Next steps
#
# - [Algorithms](../../meta/README.md), [models of other libraries](../../meta/models.md) with batch
#   statistics or dropout, [memory](../../meta/memory.md).
# - [Training](../../training/README.md): seeds, devices, loggers, early stopping;
#   [long runs](../../training/runs.md).
# - [Task distributions](../../tasks/README.md): images, episodes, rows of groups.
# - Many trainings at once: the notebook [cluster_sweep](cluster_sweep.ipynb).
