"""Points that are listed or drawn, and the objects and fields of a spec."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

import negmaml as nm
from negmaml.sweeps import StoreError, random_points
from tests.internals import main as cli
from tests.internals import spec

RANGES = {
    "rate": {"low": -1, "high": 1},
    "noise": {"low": 1e-3, "high": 10.0, "scale": "log"},
    "size": {"low": 1, "high": 3, "integer": True},
    "kind": ["a", "b"],
}


def function(key, rate, noise, size, kind, other=1.0):
    sign = 1.0 if kind == "a" else -1.0
    return {"value": other * sign * rate + noise * jnp.sum(jax.random.normal(key, (size,)))}


def test_random_points_are_within_their_ranges_and_spread_over_them():
    points = random_points(400, seed=3, fixed=7, **RANGES)
    columns = {name: np.array([point[name] for point in points]) for name in points[0]}
    assert set(columns["fixed"]) == {7}
    assert set(columns["kind"]) == {"a", "b"}
    assert {type(point["size"]) for point in points} == {int}
    for name, uniform in (("rate", (columns["rate"] + 1) / 2),
                          ("noise", np.log10(columns["noise"]) / 4 + 0.75)):  # fmt: skip
        assert (uniform > 0).all() and (uniform < 1).all(), name
        # The largest gap to the uniform distribution is below this in all but 0.1% of cases.
        gap = abs(np.sort(uniform) - np.arange(1, 401) / 400).max()
        assert gap < 1.95 / 20
    counts = np.bincount(columns["size"])[1:]
    assert counts.sum() == 400 and counts.min() > 90


def test_more_points_begin_with_the_same_and_another_seed_has_others():
    assert random_points(9, **RANGES)[:4] == random_points(4, **RANGES)
    assert not set(p["rate"] for p in random_points(9, seed=1, **RANGES)) & set(
        p["rate"] for p in random_points(9, **RANGES)
    )
    assert len(random_points(6, a=[1, 2, 3], b=["x", "y"])) == 6  # each once
    negative = random_points(5, rate={"low": -1.0, "high": -0.01, "scale": "log"})
    assert all(-1 < point["rate"] < -0.01 for point in negative)


def test_points_are_one_axis_with_the_numbers_of_the_grid(tmp_path):
    points = random_points(5, **RANGES)
    result = nm.sweep(function, {"point": points, "other": [1.0, 2.0]}, 3)
    assert dict(result["value"].sizes) == {"point": 5, "other": 2, "seed": 3}
    for i, point in enumerate(points):
        assert all(result[name].values[i] == value for name, value in point.items())
        one = nm.sweep(function, point | {"other": [1.0, 2.0]}, 3)
        np.testing.assert_array_equal(result["value"].isel(point=i), one["value"])
    path = tmp_path / "x.zarr"
    nm.sweep(function, {"point": points, "other": 1.0}, 3, store=path)
    more = {"point": random_points(8, **RANGES), "other": 1.0}
    with pytest.raises(StoreError, match=r"axis kind,noise,rate,size: asked adds 3"):
        nm.sweep(function, more, 3, store=path)
    longer = nm.sweep(function, more, 3, store=path, extend=True)
    assert longer.sizes["point"] == 8
    np.testing.assert_array_equal(longer["value"][:5], result["value"].sel(other=1.0))
    assert xr.open_zarr(path)["kind"].dims == ("point",)


@pytest.mark.parametrize(
    ("ranges", "error", "said"),
    [
        (dict(n=0, a=[1]), ValueError, "n of random points must be an integer >= 1, got 0"),
        (dict(n=2.5, a=[1]), ValueError, "n of random points"),
        (dict(n=2, seed=-1, a=[1]), ValueError, "seed of random points"),
        (dict(n=2), ValueError, "need a range"),
        (dict(n=3, a=[1, 2]), ValueError, "not so many different ones"),
        (dict(n=2, a=[]), ValueError, "no values to choose from"),
        (dict(n=2, a={"low": 1}), TypeError, "range of 'a' needs numbers low and high"),
        (dict(n=2, a={"low": 1, "high": 1}), ValueError, "low < high"),
        (dict(n=2, a={"low": 0, "high": np.inf}), ValueError, "both finite"),
        (dict(n=2, a={"low": 0, "high": 1, "scael": "log"}), ValueError, "did you mean 'scale'"),
        (dict(n=2, a={"low": 0, "high": 1, "scale": "sqrt"}), ValueError, "one of .*'log'"),
        (dict(n=2, a={"low": -1, "high": 1, "scale": "log"}), ValueError, "of one sign"),
        (dict(n=2, a={"low": 0.5, "high": 2, "integer": True}), ValueError, "whole bounds"),
    ],
)
def test_wrong_ranges_are_refused_in_our_words(ranges, error, said):
    with pytest.raises(error, match=said):
        random_points(**ranges)


@pytest.mark.parametrize(
    ("points", "error", "said"),
    [
        ([], TypeError, "'point' must be a list of dicts"),
        (3, TypeError, "'point' must be a list of dicts"),
        ([3], TypeError, "'point' must be a list of dicts"),
        ([{"a": 1.0}, {"b": 1.0}], ValueError, r"same names, a; point 1 has b"),
        ([{"a": 1.0}, {"a": 1.0}], ValueError, "got 1.0 twice"),
        ([{"a": 1.0, "seed": 2}], ValueError, "'seed' is reserved"),
        ([{"c": 1.0}], ValueError, "unknown axis 'c'"),
    ],
)
def test_wrong_points_are_refused_in_our_words(points, error, said):
    with pytest.raises(error, match=said):
        nm.sweep(lambda key, a, b=0.0: {"value": a}, {"point": points}, 1)


def test_a_whole_axis_is_no_part_of_points():
    point = {"p": 6, "m": 2, "n_t": 4, "n_v": 2, "n_r": 4, "sigma": 0.1, "nu": 0.5}
    grid = {"point": [point | {"train_rate": 0.1}], "adapt_rate": 0.2}
    with pytest.raises(ValueError, match="'point' zips train_rate, a vectorized axis"):
        nm.sweep(nm.sweeps.linear, grid, 1)


SPEC = """
function = "tests.sweeps.test_points:fitted"
seeds = 2
points = [{ outer = 0.1 }]
[options]
rule = { rule = "Momentum", rate = -0.1, momentum = 0.9, steps = 2 }
activation = { callable = "jax.nn:relu" }
inner = { rule = "InnerOptimizer", transformation = { call = "optax:sgd", learning_rate = 0.1 } }
[random]
n = 2
outer = { low = 0.01, high = 1.0, scale = "log" }
"""


def fitted(key, outer, rule, activation, inner):
    assert isinstance(rule, nm.Momentum) and activation is jax.nn.relu
    assert isinstance(inner, nm.InnerOptimizer)
    assert isinstance(inner.transformation, optax.GradientTransformation)
    return {"value": activation(jax.random.normal(key)) + outer * rule.rate}


def test_a_spec_names_rules_functions_and_points(tmp_path):
    (tmp_path / "spec.toml").write_text(SPEC)
    arguments = ["sweep", str(tmp_path / "spec.toml"), "--store", str(tmp_path / "x.zarr")]
    assert cli.run(arguments) == 0
    with xr.open_zarr(tmp_path / "x.zarr") as found:
        drawn = random_points(2, outer={"low": 0.01, "high": 1.0, "scale": "log"})
        assert found["outer"].values.tolist() == [0.1, *(point["outer"] for point in drawn)]
        noise = found["value"] + 0.1 * found["outer"].astype("float32")
        assert (noise > -1e-6).all()
    assert cli.run([*arguments, "--override", "random.n=3", "--extend"]) == 0
    assert xr.open_zarr(tmp_path / "x.zarr").sizes["point"] == 4
    with pytest.raises(StoreError, match="allow_code_change"):
        fields = spec.read(arguments[1], ["options.rule.rate=-0.2"])
        call = fields["function"], fields["grid"], fields["seeds"]
        nm.sweep(*call, store=tmp_path / "x.zarr")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('options.rule.rule="Momentun"', "options.rule: no rule 'Momentun'; did you mean 'Mom"),
        ('options.rule.rule="InnerRule"', "no rule 'InnerRule'"),
        ("options.rule.rat=1", "options.rule: Momentum does not take"),
        ('options.activation.callable="jax.nn:rely"', "has no 'rely'; did you mean 'relu'"),
        ('options.activation.callable="jax.none:relu"', "no module 'jax.none'"),
        ('options.activation.callable="relu"', 'must be "module:function"'),
        ("options.activation.x=1", 'write call = "jax.nn:relu"'),
        ('options.activation.callable="math:pi"', "is no function"),
        ("options=3", "options must be a table"),
        ("random=3", "random must be a table with n"),
        ("points=3", "points must be a list of tables"),
        ("random.outer.low=2", "random: range of 'outer' needs low < high"),
        ("grid.point=3", "grid.point"),
    ],
)
def test_wrong_specs_are_one_clear_line(change, said, tmp_path, capsys):
    (tmp_path / "spec.toml").write_text(SPEC)
    if change == "options=3":
        (tmp_path / "spec.toml").write_text('function="jax:jit"\nseeds=1\noptions=3\n[grid]\na=1')
        change = "seeds=2"
    arguments = ["sweep", str(tmp_path / "spec.toml"), "--store", str(tmp_path / "x.zarr")]
    assert cli.run([*arguments, "--override", change]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.zarr").exists()


def test_help_lists_every_field(capsys):
    assert cli.run(["sweep", "--help"]) == 0
    printed = capsys.readouterr().out
    for name in spec.FIELDS:
        assert f"- {name}: " in printed


def test_the_largest_hash_still_gives_the_last_choice(monkeypatch):
    class Largest:
        def digest(self):
            return b"\xff" * 8

    monkeypatch.setattr("negmaml.sweeps.points.hashlib.blake2b", lambda *_, **__: Largest())
    point = random_points(1, choice=[1, 2], size={"low": 0, "high": 3, "integer": True})[0]
    assert point == {"choice": 2, "size": 3}
