"""Settings and globals that results depend on are part of what a store is a sweep of."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml.sweeps import StoreError
from tests.internals import DEFAULTS, result_settings, settings_of
from tests.internals import store_MANIFEST as MANIFEST

SETTINGS = {
    "jax_random_seed_offset": 5,
    "jax_default_prng_impl": "rbg",
    "jax_threefry_partitionable": False,
    "jax_default_matmul_precision": "highest",
    "jax_numpy_dtype_promotion": "strict",
    "jax_high_dynamic_range_gumbel": True,
    "jax_softmax_custom_jvp": True,
}
SCALE = 1.0


def function(key, x):
    return {"y": x * jax.random.normal(key)}


def scaled(key, n):
    return {"y": SCALE * jax.random.normal(key, (n,)).sum()}


@pytest.mark.parametrize("label", [None, "1"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_store_of_other_settings_is_refused_by_name(name, label, tmp_path):
    store = tmp_path / "x.zarr"
    nm.sweep(function, {"x": [1.0, 2.0]}, 2, store, code_version=label)
    said = rf"{name} was {DEFAULTS[name]}, is {SETTINGS[name]}"
    other = settings_of(result_settings() | {name: str(SETTINGS[name])})
    with other, pytest.raises(StoreError, match=said):
        nm.sweep(function, {"x": [1.0, 2.0]}, 2, store, code_version=label)
    nm.sweep(function, {"x": [1.0, 2.0]}, 2, store, code_version=label)


def test_a_store_that_does_not_record_a_setting_had_its_default(tmp_path):
    store = tmp_path / "x.zarr"
    expected = nm.sweep(function, {"x": [1.0, 2.0]}, 2, store)
    root = json.loads((store / "zarr.json").read_text())
    manifest = json.loads(root["attributes"][MANIFEST])
    for identity in manifest["described"].values():
        identity["settings"] = dict(list(identity["settings"].items())[:2])
    root["attributes"][MANIFEST] = json.dumps(manifest)
    (store / "zarr.json").write_text(json.dumps(root))
    np.testing.assert_array_equal(nm.sweep(function, {"x": [1.0, 2.0]}, 2, store).y, expected.y)
    other = settings_of(result_settings() | {"jax_random_seed_offset": "3"})
    with other, pytest.raises(StoreError, match="jax_random_seed_offset was 0, is 3"):
        nm.sweep(function, {"x": [1.0, 2.0]}, 2, store)


def test_settings_of_another_process_hold_within_and_are_put_back():
    before = result_settings()
    wanted = before | {"jax_enable_x64": "True", "jax_numpy_dtype_promotion": "strict",
                       "jax_default_matmul_precision": "highest"}  # fmt: skip
    with settings_of(wanted):
        assert result_settings() == wanted
        assert jnp.ones(1).dtype == jnp.float64
    assert result_settings() == before


def test_a_global_that_changes_while_a_sweep_runs_stops_it(tmp_path, monkeypatch):
    store, grid = tmp_path / "x.zarr", {"n": list(range(1, 9))}

    def change(done, _):
        if done:
            monkeypatch.setitem(globals(), "SCALE", 2.0)

    with pytest.raises(StoreError, match=r"changed while the sweep ran.*1\.0 became 2\.0"):
        nm.sweep(scaled, grid, 2, store, block=2, progress=change)
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    np.testing.assert_array_equal(nm.sweep(scaled, grid, 2, store).y, nm.sweep(scaled, grid, 2).y)


@pytest.mark.parametrize("stored", [False, True])
def test_a_setting_that_changes_while_a_sweep_runs_stops_it(stored, tmp_path):
    store = tmp_path / "x.zarr" if stored else None

    def change(done, _):
        if done:
            jax.config.update("jax_random_seed_offset", 7)

    try:
        with pytest.raises(ValueError, match="jax_random_seed_offset was 0, is 7"):
            nm.sweep(scaled, {"n": list(range(1, 9))}, 2, store, block=2, progress=change)
    finally:
        jax.config.update("jax_random_seed_offset", 0)
