"""Settings and globals that a run depends on are part of the identity of its checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from tests.helpers import mostly_slow
from tests.internals import result_settings, settings_of

pytest.importorskip("orbax.checkpoint")
SGD = optax.sgd(0.1)
SCALE = 1.0


def value_and_grad(params, tasks):
    return jax.value_and_grad(lambda w: jnp.mean((SCALE * w - tasks.support) ** 2))(params)


def sample(key):
    return nm.Tasks(jax.random.uniform(key, (4,)), jnp.zeros(4))


def run(steps, directory=None, **options):
    return nm.fit(jax.random.key(0), 0.5, value_and_grad, sample, SGD, steps,
                  checkpoint=directory, **options)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    mostly_slow(
        [
            ("jax_random_seed_offset", "5"),
            ("jax_default_matmul_precision", "highest"),
            ("jax_default_prng_impl", "rbg"),
            ("jax_threefry_partitionable", "False"),
            ("jax_enable_x64", "True"),
        ],
        0,
        4,
    ),
)
def test_a_checkpoint_of_other_settings_raises_with_their_names(name, value, tmp_path):
    run(2, tmp_path)
    before = result_settings()[name]
    said = rf"settings \({name} was {before}, is {value}\)"
    with settings_of(result_settings() | {name: value}), pytest.raises(ValueError, match=said):
        run(4, tmp_path)


def test_a_checkpoint_records_the_functions_as_they_are_now(tmp_path, monkeypatch):
    """A program of an earlier call, with another value of a global, is not run again."""
    run(3, tmp_path / "one")
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    found = run(3, tmp_path / "two")
    with pytest.raises(ValueError, match=r"value_and_grad .*1\.0 became 3\.0|value_and_grad"):
        run(4, tmp_path / "one")
    jax.clear_caches()
    np.testing.assert_array_equal(found.loss, run(3).loss)


def test_a_setting_that_changes_during_a_run_with_checkpoints_raises(tmp_path):
    def change(step, metrics, params):
        jax.config.update("jax_random_seed_offset", 7)

    try:
        with pytest.raises(ValueError, match="must not change while it runs"):
            run(4, tmp_path, checkpoint_every=1, callback=change)
    finally:
        jax.config.update("jax_random_seed_offset", 0)
    np.testing.assert_array_equal(run(4, tmp_path).loss, run(4).loss)
