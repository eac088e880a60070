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
# # Pupils in schools: from an untidy file to predictions for a new school
#
# **At the end you can**
#
# - read a file of rows in groups as it is;
# - decide how to predict for a new group from a few of its rows;
# - say by how much that is better than the usual choices;
# - save the model, and use it on another file.
#
# **You need** Python and a little pandas. `pip install ".[all,examples]"` in a copy of the
# repository.
#
# **It takes** ten minutes to read, and under 20 seconds to run on a laptop.

# %%
import shutil
from pathlib import Path

import jax
import joblib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import negmaml as nm
from negmaml.examples import pupils

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

shutil.copyfile(pupils.FILE, "pupils.csv")
print(*Path("pupils.csv").read_text().splitlines()[:7], sep="\n")

# %% [markdown]
# 55 schools tested their pupils. In a new school, six pupils have been tested. Which scores will
# the others have? The file is as the school office exported it: a line above the header, decimal
# commas, percentages, dates, codes with leading zeros, and more to come.
#
# ## Read the file
#
# `read_table` recognises most of it. Where it cannot know, it raises an error that names the
# remedy:

# %%
columns = {"group": "school", "target": "score"}
try:
    nm.advice.read_table("pupils.csv", **columns)
except ValueError as error:
    print(error)

# %% [markdown]
# `k.A.` stands for "not stated", so that it is a missing value. The options of the error message
# are those of the command `negmaml advise`; in Python, they are arguments. The notes say
# everything that was recognised, filled in or left out:

# %%
table = nm.advice.read_table("pupils.csv", na=["k.A."], **columns)
print(*table.notes, sep="\n")
print("\nfeatures:", *table.x.columns)
assert "free_meals_Yes" in table.x and "free_meals_yes" in table.x

# %% [markdown]
# Read the notes as you would read a contract. The identifier, the constant year and the row of
# totals are out, which is right. `track` has codes, not numbers, which is right as well. But there
# is a column for `free_meals_Yes` and one for `free_meals_yes`: the same answer in two spellings.
# Only you can know that, so tidy it in pandas. `read_table` takes data frames, too.


# %%
def tidy(path):
    """The rows of a file of the school office, with one spelling of each answer."""
    frame = pd.read_csv(path, sep=";", comment="#", dtype=str)
    frame["free_meals"] = frame["free_meals"].str.strip().str.lower()
    return frame


table = nm.advice.read_table(tidy("pupils.csv"), na=["k.A."], decimal=",", **columns)
print("features:", *table.x.columns)
print("rows and features:", table.x.shape, "schools:", len(set(table.groups)))

# %% [markdown]
# ## Decide
#
# `advise` compares five methods on schools that were held out. Each school there shows the scores
# of `n_r=6` pupils, and the errors on its other pupils count.

# %%
score = pd.Series(table.y, name="score")
advice = nm.advise(table.x, score, table.groups, n_r=6, standardise=True, key=jax.random.key(0))
print(advice.report().partition("\nRates\n")[0])
print(*advice.notes, sep="\n")
assert advice.recommended == "mixed model"

# %% [markdown]
# The decision is a *mixed model*: each school has its own coefficients, which are predicted from
# its six pupils and from how much coefficients vary between schools. The report continues with
# rates, sizes and a line for every term; `report(format="html")` makes a page of it. Small schools,
# such as the one of two pupils, are left out of the comparison only: `advice.model()` has all rows.
#
# An analyst would probably have taken one of two simpler ways: one regression for all schools,
# which ignores the school, or one regression for each school, which has only six pupils to learn
# from. Both are in the comparison:

# %%
names = sorted(advice.rmse, key=lambda name: -advice.rmse[name])
gains = [advice.rmse_gain[name] for name in names]
usual = ("pooled ridge", "per-group ridge")
for name, gain in zip(names, gains, strict=True):
    interval = f"{gain.low:5.2f} to {gain.high:4.2f}" if gain.high else ""
    print(
        f"{name:16} RMSE {advice.rmse[name]:.2f}   above the best by {gain.value:4.2f} {interval}"
    )
assert all(advice.gain[name].significantly_better for name in usual)

# %%
colors = {"mixed model": "#009e73", "pooled ridge": "#e69f00", "per-group ridge": "#cc79a7"}
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
axis.barh(names, [g.value for g in gains], color=[colors.get(n, "#adb5bd") for n in names])
low_high = np.array([[g.value - g.low, g.high - g.value] for g in gains]).T
values = [g.value for g in gains]
axis.errorbar(values, names, xerr=low_high, fmt="none", color="k", lw=1, label="95% interval")
axis.set(xlabel="RMSE above that of the mixed model, in points of the score")
axis.set_title("The mixed model is better than both usual choices")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# Should you use a negative training rate here? Rates belong to meta-learning, one of the five
# methods. Its interval of the best training rate contains zero, so that the file does not
# decide on a sign:

# %%
low, high = advice.train_rate_interval
print(f"best training rate of meta-learning: between {low:.2f} and {high:.2f} (95%)")
assert low < 0 < high and advice.train_rate == 0

# %% [markdown]
# ## Does it hold?
#
# The file was made for this notebook, by `negmaml.examples.pupils`. So we can have sixty more
# schools, which nobody has in practice. Each model adapts to the first 2, 4, 6 or 8 pupils of a
# school and predicts those from the ninth on.

# %%
models = {name: advice.model(name) for name in colors}
unseen = pupils.untidy(pupils.pupils(60, seed=1, first=100), seed=1)
unseen["free_meals"] = unseen["free_meals"].str.strip().str.lower()
y = pd.to_numeric(unseen["score"].str.replace(",", "."))
x, school = table.encode(unseen[y.notna()]), unseen["school"][y.notna()]
y = y.dropna()


# %%
def rmse(model, known):
    """The error on new schools, of which each shows the scores of its first pupils."""
    losses = []
    for rows in school.groupby(school).groups.values():
        adapted = model.adapt(x.loc[rows[:known]], y[rows[:known]])
        losses.append(np.mean((adapted.predict(x.loc[rows[8:]]) - y[rows[8:]]) ** 2))
    return np.mean(losses) ** 0.5


known = (2, 4, 6, 8)
found = {name: [rmse(model, k) for k in known] for name, model in models.items()}
print(pd.DataFrame(found, known).round(2).rename_axis("pupils known"))
assert abs(found["mixed model"][2] / advice.rmse["mixed model"] - 1) < 0.1

# %%
figure, axis = plt.subplots(figsize=(5.5, 2.8), layout="constrained")
for name, errors in found.items():
    axis.plot(known, errors, "o-", color=colors[name], label=name)
    axis.plot(6, advice.rmse[name], "x", ms=9, color=colors[name])
axis.plot([], [], "kx", ms=9, label="as promised by advise")
axis.set(xlabel="pupils known in a new school", ylabel="RMSE", xticks=known)
axis.set_title("On sixty new schools the ranking is the promised one")
axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# The mixed model is ahead for any number of known pupils in the figure. One regression for each
# school needs more than eight pupils to become as good as one for all schools. The promises were
# made for training on half of the schools, and these models have all of them.

# %%
assert all(a < min(b, c) for a, b, c in zip(*found.values(), strict=True))
assert found["per-group ridge"][-1] > found["pooled ridge"][-1]

# %% [markdown]
# ## Save the model, and predict
#
# Save the model together with the table, which knows how columns become features. In another
# process, or next year, load both.

# %%
joblib.dump({"table": table, "model": models["mixed model"]}, "pupils.joblib")

new = pupils.untidy(pupils.pupils(1, seed=12, first=900), seed=12)  # the file of a new school
new.loc[6:, "score"] = ""  # six pupils have been tested
new.to_csv("new_school.csv", sep=";", index=False)

# %%
saved = joblib.load("pupils.joblib")
rows = tidy("new_school.csv").replace("k.A.", None)
score = pd.to_numeric(rows["score"].str.replace(",", "."))
x, tested = saved["table"].encode(rows), score.notna()

here = saved["model"].adapt(x[tested], score[tested])
rows["predicted"] = here.predict(x).round(1)
print(rows.loc[~tested, ["school", "pupil_id", "earlier", "hours", "predicted"]].head(8))
assert np.isfinite(rows["predicted"]).all() and tested.sum() == 6

# %% [markdown]
# The typical error of such a prediction is `advice.rmse`, about five points.

# %%
assert 4.5 < advice.rmse["mixed model"] < 5.5

# %% [markdown]
# ## Next steps
#
# - All of this for a file, with figures and a page in HTML, is one command:
#   `negmaml advise pupils.csv --group school --target score --na k.A. --n-r 6`.
# - The [guide to advice](../../advice/README.md): methods, intervals, columns, scikit-learn.
# - Real schools: `python -m negmaml.examples.schools`.
# - Why rates may be negative: the notebook [first_ten_minutes](first_ten_minutes.ipynb).
