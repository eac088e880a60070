"""The examples run, and have the same conclusions at small size as at full size."""

import importlib

import numpy as np
import pytest

import negmaml as nm
from tests.internals import spec

pytest.importorskip("sklearn")
pytest.importorskip("flax")
pytest.importorskip("equinox")


def example(name):
    return importlib.import_module(f"negmaml.examples.{name}")


@pytest.mark.slow
def test_sinusoid_compares_training_rates_of_both_signs():
    module = example("sinusoid")
    result = module.main(steps=300, seeds=2, test_tasks=100)
    assert result.test_loss.shape == (3, 2)
    assert np.isfinite(result.test_loss).all()
    assert result.train_rates.tolist() == [-0.02, 0.0, 0.01]
    assert (result.test_loss[2] < 5).all()  # a network that says zero has 3.4 and more untrained
    assert len(np.unique(result.test_loss)) == 6
    assert "-0.02" in module.report(result)


@pytest.mark.slow
def test_learned_rates_change_sign_and_help():
    result = example("learned_rates").main(steps=400, test_tasks=200)
    assert result.learned < result.fixed
    assert 0.1 < result.negative["[1][0]"] < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("ridge", (None, 0.1))
def test_digits_are_classified_better_after_adapting(ridge):
    result = example("digits").main(steps=150, test_episodes=60, ridge=ridge)
    assert result.after > 0.8 > 0.45 > result.before
    assert result.after > result.untrained


@pytest.mark.slow
def test_a_random_search_over_training_distinguishes_points():
    module = example("training_sweep")
    result = module.main(n=3, steps=40, seeds=1)
    assert dict(result.curve.sizes) == {"point": 3, "seed": 1, "curve_0": 10}
    assert len(np.unique(result.test_loss)) == 3
    assert len(module.report(result).splitlines()) == 4


@pytest.mark.slow
def test_the_spec_of_the_random_search_is_its_main():
    result = example("training_sweep").main(n=3, steps=40, seeds=1)
    shipped = spec.read("training_sweep", ["grid.steps=40", "random.n=3", "seeds=1"])
    again = nm.sweep(shipped["function"], shipped["grid"], 1, common=shipped["common"])
    np.testing.assert_array_equal(again.test_loss, result.test_loss)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("flax_model", "equinox_model"))
def test_models_of_other_libraries_train(name):
    before, after = example(name).main(steps=300)
    assert after < 0.9 * before


@pytest.mark.slow
def test_maml_plus_plus_learns_and_its_steps_help():
    before, after, rates = example("maml_plus_plus").main(steps=300)
    assert float(after.mean[-1]) < float(after.mean[0]) < float(before.mean[0])
    assert len(rates) == 3 and len(np.unique(np.round(np.concatenate(rates), 6))) == 9


@pytest.mark.slow
def test_learned_inner_losses_do_no_worse_than_none():
    result = example("learned_loss").main(steps=300)
    assert set(result) == {"plain", "loss", "regulariser", "preconditioner"}
    assert all(value < 1.02 * result["plain"] for value in result.values())


def test_advice_for_real_schools_reports_the_gain_of_adapting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = example("schools").main()
    assert result.few.gain["shared rate"].significantly_better
    assert result.few.train_rate_interval[1] < 0 < result.many.train_rate_interval[1]
    assert result.many.gain["pooled ridge"].significantly_better
    assert result.after < result.before
    assert (tmp_path / "schools.csv").exists()


@pytest.mark.slow
def test_rates_chosen_by_leaving_tasks_out_do_on_new_tasks_what_they_did_on_the_old():
    result = example("kernel_rates").main(tasks=15, test_tasks=200)
    assert 0.5 < result.chosen / result.left_out < 2
    assert result.chosen < 3  # half the variance of a sinusoid's values is about 2 to 3


@pytest.mark.slow
def test_a_wide_network_ends_where_its_kernel_says():
    lazy = example("lazy_network").main(width=512, steps=150)
    np.testing.assert_allclose(lazy.network, lazy.kernel, rtol=0.1)
    np.testing.assert_allclose(lazy.kernel, lazy.limit, rtol=0.25)


@pytest.mark.slow
def test_a_learning_network_ends_elsewhere():
    learning = example("lazy_network").main(width=512, steps=150, output=0.1)
    assert np.abs(learning.network / learning.kernel - 1).max() > 0.1


@pytest.mark.slow
def test_a_learned_optimizer_learns_with_the_gradient_of_reverse_mode_in_less_memory():
    result = example("learned_optimizer").main(meta_steps=20, steps=200)
    assert result.learned < 0.5 * result.untrained
    assert result.gradient_error < 1e-3
    assert 5 * result.memory["mixed"] < result.memory["reverse"]


@pytest.mark.slow
def test_hypergradients_are_those_of_other_methods_and_lower_the_outer_loss():
    result = example("bilevel").main()
    assert all(one.gradient_error < 1e-4 and one.after < one.before for one in result.values())
    decay = result["decays"].hyperparameters  # of four relevant inputs, and sixteen others
    assert decay[:4].max() < decay[4:].mean()
    weights = result["reweighting"].hyperparameters  # random labels, then true ones
    assert weights[:50].mean() + 2 < weights[50:].mean()


@pytest.mark.slow
def test_distilled_images_train_a_classifier_better_than_real_ones():
    result = example("distillation").main(steps=60, inner_steps=30)
    assert result.gradient_error < 1e-4  # against the closed form of the inner steps
    assert result.distilled > result.real + 0.1
