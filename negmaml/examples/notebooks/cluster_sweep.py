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
# # A study of many cells: from a laptop to a cluster
#
# **At the end you can**
#
# - evaluate a function of your own over a grid and many seeds;
# - kill and resume it;
# - share it among the jobs of a cluster;
# - take the result to pandas.
#
# **You need** JAX, and to have seen a job script. `pip install ".[all]"` in a copy of the
# repository.
#
# **It takes** ten minutes to read, and half a minute to run on a laptop. Everything is written
# into the current folder.

# %%
import inspect
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

# Every process of this notebook keeps its compiled programs here, for the others.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path("programs").absolute()))

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import negmaml as nm

NEGATIVE = "#0072b2"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## A function of a key and the axes
#
# A cell of a study is one call of a function in JAX. It takes a random key and one value of each
# axis, and returns a dict of arrays. This one meta-trains a linear model in 20 dimensions. It
# adapts with a rate to ten rows of each task, and fits the common weights to two other rows. The
# true common weights are zero, so that the result is the squared error of the fitted ones.


# %%
def meta_error(key, tasks, noise, rate):
    """Squared error of the meta-trained weights of a linear model."""
    draws = jax.random.normal(key, (tasks, 13, 21))
    x, weights = draws[:, :12, :20], draws[:, 12, :20, None] / 20**0.5
    y = x @ weights + noise * draws[:, :12, 20:]
    support, query = x[:, :10], x[:, 10:]
    step = rate * query @ jnp.swapaxes(support, 1, 2) / 10
    phi = (query - step @ support).reshape(-1, 20)
    rest = (y[:, 10:] - step @ y[:, :10]).reshape(-1)
    fitted = jnp.linalg.solve(phi.T @ phi + 0.01 * jnp.eye(20), phi.T @ rest)
    return {"error": jnp.sum(fitted**2)}


# %%
grid = {"tasks": [3, 15], "noise": [0.3, 1.0, 3.0], "rate": np.linspace(-2.0, 1.0, 13).tolist()}
sweep = partial(
    nm.sweep,
    meta_error,
    seeds=100,
    block=1300,  # cells that are computed and stored at once
    common_random_numbers=["rate"],  # all rates meet the same data
)

# %% [markdown]
# `tasks` is an integer that sets a shape, so that each of its values is compiled on its own. The
# real numbers of the other axes share one program.
#
# ## A store: kill and resume
#
# With `store=`, every finished block of cells is on the disk. `progress` may be a function, which
# is called after each block. This one interrupts the sweep, as Ctrl-C or a time limit would.


# %%
def interrupt(done, total):
    if done >= total // 3:
        raise KeyboardInterrupt


try:
    sweep(grid, store="study.zarr", progress=interrupt)
except KeyboardInterrupt as stop:
    print("interrupted;", *stop.__notes__)
print(nm.sweeps.status("study.zarr"))

# %% [markdown]
# The same call resumes it, and computes only the other blocks:

# %%
blocks: list[tuple[int, int]] = []


def count(done, total):
    blocks.append((done, total))


result = sweep(grid, store="study.zarr", progress=count)
print("cells done after each block:", blocks)
print(dict(result.error.sizes))
assert blocks[0][0] > 1300 and blocks[-1] == (7800, 7800) and result.finite.all()

# %% [markdown]
# ## Plot, pandas, CSV
#
# The result is a labelled dataset of xarray, with a dim for each axis and one for the seeds.

# %%
mean, error = result.error.mean("seed"), result.error.std("seed") / 10
figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True, layout="constrained")
for axis, tasks in zip(axes, grid["tasks"], strict=True):
    for noise, color in zip(grid["noise"], ("#adb5bd", "#6c757d", "#212529"), strict=True):
        cells = dict(tasks=tasks, noise=noise)
        y, bar = mean.sel(cells), error.sel(cells)
        axis.errorbar(mean.rate, y, bar, color=color, label=f"noise {noise:g}")
        axis.plot(y.idxmin("rate"), y.min(), "v", color=NEGATIVE)
    axis.set(title=f"{tasks} tasks", xlabel="training rate", yscale="log")
axes[0].set_ylabel("squared error of the weights")
axes[0].plot([], [], "v", color=NEGATIVE, label="least error")
axes[0].legend(frameon=False, fontsize=7)
figure.suptitle("At noise 1 and above the best training rate is negative")
plt.show()

# %%
best = mean.idxmin("rate").to_pandas()  # tasks by noise
print(best)
assert (best.loc[:, 1.0:] < 0).all(axis=None)
mean.to_dataframe().reset_index().to_csv("study.csv", index=False)
print(*Path("study.csv").read_text().splitlines()[:3], sep="\n")

# %% [markdown]
# ## Statistics in place of single seeds
#
# A study of a million seeds does not fit into a table. `reduce` accumulates statistics over the
# seeds while they are computed, and stores nothing else:

# %%
reduced = sweep(grid | {"tasks": 3}, reduce={"seed": ["mean", "sem"]})
print(dict(reduced.error_mean.sizes))
assert np.allclose(reduced.error_mean, mean.sel(tasks=3), rtol=1e-3)

# %% [markdown]
# ## Several workers
#
# Any number of processes can share a store, on one machine or on many. Each needs the function in a
# file that it can import, and a *spec*, which is the call above as a file:

# %%
imports = "import jax\nimport jax.numpy as jnp\n\n\n"
Path("study.py").write_text(imports + inspect.getsource(meta_error))
spec = f"""\
function = "study:meta_error"
seeds = 100
common_random_numbers = ["rate"]
block = 1300

[grid]
tasks = {grid["tasks"]}
noise = {grid["noise"]}
rate = {{ start = -2.0, stop = 1.0, num = 13 }}
"""
Path("spec.toml").write_text(spec)
print(spec)

# %% [markdown]
# `--worker 1/2` is the first of two processes. They claim blocks, so that none is computed twice,
# and if one dies, the other takes over its blocks.

# %%
command = [sys.executable, "-m", "negmaml", "sweep", "spec.toml", "--store", "shared.zarr"]
with open("workers.log", "w") as log:
    workers = [
        subprocess.Popen([*command, "--worker", f"{k}/2"], stdout=log, stderr=log) for k in (1, 2)
    ]
assert all(worker.wait() == 0 for worker in workers)
print(nm.sweeps.status("shared.zarr"))

# %% [markdown]
# Both stores have the same numbers: those of a cell depend on its key and its axes only, not on
# blocks or workers.

# %%
shared = sweep(grid, store="shared.zarr")
assert np.array_equal(shared.error, result.error)

# %% [markdown]
# ## On a cluster
#
# On SLURM the workers are the jobs of an array, and `--worker slurm` reads the number of each. The
# folder of the store has to be one that all nodes see. If the jobs run into their time limit,
# submit the script again: it resumes.

# %%
script = """\
#!/bin/bash
#SBATCH --array=1-16
#SBATCH --time=01:00:00
negmaml sweep spec.toml --store /shared/study.zarr --worker slurm
"""
Path("job.sh").write_text(script)
print(script)

# %% [markdown]
# `negmaml status /shared/study.zarr` shows progress, active workers and dead ones. Stores of
# different seeds, perhaps of different clusters, can be merged later, by `negmaml merge` or here:

# %%
sweep(grid, seeds=range(100, 200), store="more.zarr")
merged = nm.sweeps.merge(["study.zarr", "more.zarr"], "all.zarr")
print(dict(merged.error.sizes))
assert merged.sizes["seed"] == 200

# %% [markdown]
# ## Next steps
#
# - The [guide to sweeps](../../sweeps/README.md), the fields of a [spec](../../sweeps/spec.md),
#   [clusters](../../sweeps/clusters.md) with GPUs, Dask or several nodes.
# - Each cell may be a run of `fit`: `negmaml.examples.training_sweep`.
# - The linear model as a function that is ready to use: `nm.sweeps.linear`.
