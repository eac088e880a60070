"""Models of all methods agree with plain code, and predict and adapt alike."""

import jax
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import Ridge

import negmaml as nm
from negmaml.advice import MixedModel, PerGroupRidge, PooledRidge, random_coefficients
from tests.advice.conftest import grouped_rows

MODELS = {
    "pooled ridge": PooledRidge(2.0),
    "joint training": PooledRidge(2.0, 0.4),
    "per-group ridge": PerGroupRidge(2.0),
    "mixed model": MixedModel("equal"),
}


@pytest.fixture(scope="module")
def advice():
    return nm.advise(*grouped_rows(p=2), splits=10, key=jax.random.key(0))


def test_advice_fits_every_method_with_its_own_settings(advice):
    x, y, groups = grouped_rows(p=2)
    for method in advice.loss:
        model = advice.model(method)
        given = model.get_params()
        for name, value in advice.settings(method).items():
            assert given[name] == value
        new = model.adapt(x[:5], y[:5])
        assert new.predict(x[5:9]).shape == (4,)
        np.testing.assert_allclose(clone(model).fit(x, y, groups).predict(x), model.predict(x))
    assert type(advice.model()) is type(advice.model(advice.recommended))


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_known_group_are_predicted_by_the_model_adapted_to_it(rows, name):
    x, y, groups = rows
    model = clone(MODELS[name]).fit(x, y, groups)
    mine = groups == 7
    np.testing.assert_allclose(
        model.predict(x, groups)[mine], model.adapt(x[mine], y[mine]).predict(x[mine])
    )


@pytest.mark.parametrize("name", MODELS)
def test_several_targets_are_fitted_as_each_alone(rows, name):
    x, y, groups = rows
    both = np.stack([y, x[:, 0] - y], 1)
    fitted = clone(MODELS[name]).fit(x, both, groups)
    for column in range(2):
        one = clone(MODELS[name]).fit(x, both[:, column], groups)
        np.testing.assert_allclose(fitted.predict(x)[:, column], one.predict(x))
        adapted = fitted.adapt(x[:6], both[:6]).predict(x)[:, column]
        np.testing.assert_allclose(adapted, one.adapt(x[:6], both[:6, column]).predict(x))


def test_ridges_are_those_of_scikit_learn(rows):
    x, y, groups = rows
    pooled, single = PooledRidge(3.0).fit(x, y, groups), PerGroupRidge(3.0).fit(x, y, groups)
    np.testing.assert_allclose(pooled.predict(x), Ridge(3.0).fit(x, y).predict(x))
    np.testing.assert_array_equal(pooled.adapt(x[:9], y[:9]).predict(x), pooled.predict(x))
    np.testing.assert_allclose(
        single.adapt(x[:9], y[:9]).predict(x), Ridge(3.0).fit(x[:9], y[:9]).predict(x)
    )
    np.testing.assert_allclose(single.predict(x), y.mean())


def test_joint_training_takes_one_step_from_the_pooled_ridge(rows):
    x, y, groups = rows
    model = PooledRidge(3.0, -0.3, unit="raw").fit(x, y, groups)
    few, z = slice(0, 9), np.hstack([np.ones((len(x), 1)), x])
    omega = np.append(model.intercept_, model.coef_)
    theta = omega + 0.3 / 9 * z[few].T @ (z[few] @ omega - y[few])
    np.testing.assert_allclose(model.adapt(x[few], y[few]).predict(x), z @ theta)


@pytest.mark.parametrize("structure", ["intercept", "equal", "full"])
def test_a_mixed_model_predicts_the_mean_of_coefficients_given_the_rows(rows, structure):
    """The prior is normal with the estimated moments; the mean is by inverse covariances."""
    x, y, groups = rows
    z = np.hstack([np.ones((len(x), 1)), x])
    both = np.hstack([z, y[:, None]]).reshape(40, 24, -1)
    gram = np.swapaxes(both, 1, 2) @ both
    w0, omega, noise = random_coefficients(gram, np.full(40, 24), structure=structure)
    prior = np.linalg.inv(omega + 1e-9 * np.eye(5))
    few = slice(0, 6)
    mean = np.linalg.solve(
        z[few].T @ z[few] / noise + prior, z[few].T @ y[few] / noise + prior @ w0
    )
    model = MixedModel(structure).fit(x, y, groups)
    np.testing.assert_allclose(model.adapt(x[few], y[few]).predict(x), z @ mean, atol=1e-5)


def test_units_of_standardised_models_are_the_users(rows):
    x, y, groups = rows
    for name, model in MODELS.items():
        one = clone(model).set_params(standardise=True)
        predicted = one.fit(x, y, groups).adapt(x[:6], y[:6]).predict(x)
        scaled = (
            clone(one).fit(100 * x - 3, 7 * y + 2, groups).adapt(100 * x[:6] - 3, 7 * y[:6] + 2)
        )
        np.testing.assert_allclose(scaled.predict(100 * x - 3), 7 * predicted + 2, err_msg=name)


@pytest.mark.parametrize("model", [*MODELS.values(), nm.MetaRegressor(adapt_rate=0.3)])
def test_a_group_has_the_targets_of_training(rows, model):
    x, y, groups = rows
    both = np.stack([y, -y], 1)
    for fitted, given in ((y, both), (both, y), (both, both[:, :1])):
        model = clone(model).fit(x, fitted, groups)
        with pytest.raises(ValueError, match=r"y must have the \d target\(s\) of training"):
            model.adapt(x[:6], given[:6])
    one = clone(model).fit(x, y, groups)
    np.testing.assert_array_equal(
        one.adapt(x[:6], y[:6, None]).predict(x), one.adapt(x[:6], y[:6]).predict(x)
    )
