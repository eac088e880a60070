"""The estimators: exact, and with the conventions of scikit-learn."""

import pickle

import jax
import numpy as np
import optax
import pandas as pd
import pytest
import sklearn
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

import negmaml as nm
from negmaml.advice import MetaRegressor, MetaRegressorCV
from tests.internals import meta_system

# Arrays of other libraries are not taken.
NOT_APPLICABLE = {"check_array_api_input"}


@pytest.mark.parametrize(
    ("estimator", "check"),
    [
        pytest.param(estimator, check, id=f"{model}-{check.func.__name__}")
        for model in (MetaRegressor(0.2, 0.1), MetaRegressor())
        for estimator, check in estimator_checks_generator(model)
        if check.func.__name__ not in NOT_APPLICABLE
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


def test_fit_is_what_gradient_meta_training_converges_to(x64, rows):
    x, y, groups = rows
    m, size = 40, 24
    model = MetaRegressor(
        -0.3, 0.4, 1.5, unit="raw", n_t=10, n_v=14, repeats=1, fit_intercept=False
    ).fit(x, y, groups)
    random = np.random.default_rng(0)  # the estimator's own splits
    order = np.stack([random.permutation(np.arange(g * size, (g + 1) * size)) for g in range(m)])
    tasks = nm.Tasks(
        support=(x[order[:, :10]], y[order[:, :10]]), query=(x[order[:, 10:]], y[order[:, 10:]])
    )

    def loss(omega, data):
        inputs, targets = data
        return jax.numpy.mean((inputs @ omega - targets) ** 2) / 2

    meta = nm.maml_value_and_grad(loss, nm.GradientDescent(-0.3))

    def with_ridge(omega, tasks):
        value, gradient = meta(omega, tasks)
        scale = 1.5 / (m * 14)
        return value + scale / 2 * jax.numpy.sum(omega**2), gradient + scale * omega

    fitted = nm.fit(jax.random.key(0), jax.numpy.zeros(4), with_ridge, tasks, optax.sgd(0.3), 400)
    np.testing.assert_allclose(model.coef_, fitted.params, rtol=1e-8)
    new = (x[:7], y[:7])
    adapted = nm.adapt(loss, fitted.params, new, nm.GradientDescent(0.4))
    np.testing.assert_allclose(model.adapt(*new).coef_, adapted, rtol=1e-8)


def test_predictions_before_adaptation_after_it_and_for_known_groups(rows):
    x, y, groups = rows
    model = MetaRegressor(-0.2, 0.4, 0.5).fit(x, y, groups)
    np.testing.assert_allclose(model.predict(x), x @ model.coef_ + model.intercept_)
    third = groups == 3
    adapted = model.adapt(x[third], y[third])
    known = model.predict(x, groups=groups)
    np.testing.assert_allclose(known[third], adapted.predict(x[third]))
    assert not np.allclose(known[third], model.predict(x[third]))
    with pytest.warns(UserWarning, match=r"1 of 1 groups were not in training \('999'\)"):
        stranger = model.predict(x[:5], groups=np.full(5, 999))
    np.testing.assert_allclose(stranger, model.predict(x[:5]))
    assert model.score(x, y) < np.corrcoef(known, y)[0, 1] ** 2


def test_the_default_rate_is_the_best_for_groups_that_did_not_train(rows):
    """Against a loop over five folds and a fine grid of rates."""
    x, y, groups = (a[:240] for a in rows)
    parameters = dict(train_rate=-0.2, meta_ridge=1.0, unit="raw", repeats=2, n_t=10, n_v=14)
    model = MetaRegressor(**parameters, n_r=6).fit(x, y, groups)
    random = np.random.default_rng(0)
    orders = [[random.permutation(np.arange(24 * g, 24 * g + 24)) for g in range(10)]
              for _ in range(2)]  # fmt: skip
    fold = np.random.default_rng(0).permutation(10) % 5
    features, rates, loss = np.c_[np.ones(240), x], np.linspace(-1, 2, 3001), 0
    for k in range(5):
        systems = []
        for order in (repeat[g] for repeat in orders for g in range(10) if fold[g] != k):
            (xt, yt), (xv, yv) = ((features[i], y[i]) for i in (order[:10], order[10:]))
            inner = -0.2 / 10 * xv @ xt.T
            systems.append(np.c_[xv - inner @ xt, yv - inner @ yt] / 2**0.5)
        system = np.vstack(systems)
        gram = system[:, :5].T @ system[:, :5] + np.diag([0, 1, 1, 1, 1])
        omega = np.linalg.solve(gram, system[:, :5].T @ system[:, 5])
        for order in (repeat[g] for repeat in orders for g in np.flatnonzero(fold == k)):
            (xr, yr), (xe, ye) = ((features[i], y[i]) for i in (order[:6], order[6:]))
            new = omega[:, None] + rates * (xr.T @ (yr - xr @ omega))[:, None] / 6
            loss = loss + np.sum((ye[:, None] - xe @ new) ** 2, 0)
    assert model.adapt_rate_ == pytest.approx(rates[np.argmin(loss)], abs=1e-3)
    given = MetaRegressor(**parameters, adapt_rate=model.adapt_rate_).fit(x, y, groups)
    np.testing.assert_allclose(given.weights_, model.weights_)
    np.testing.assert_allclose(given.predict(x, groups), model.predict(x, groups))


@pytest.mark.parametrize("rate", [-0.7, 0.0, 0.4])
def test_a_given_rate_is_kept(rows, rate):
    assert MetaRegressor(adapt_rate=rate).fit(*rows).adapt_rate_ == rate


def test_fit_without_groups_warns_and_does_not_adapt(rows):
    x, y, _ = rows
    with pytest.warns(UserWarning, match="fit without groups takes all rows as one group"):
        model = MetaRegressor().fit(x, y)
    assert model.adapt_rate_ == 0
    with pytest.warns(UserWarning, match="one group"):
        assert MetaRegressor(adapt_rate=0.3).fit(x, y).adapt_rate_ == 0.3
    with pytest.raises(ValueError, match="n_r must leave rows of a group to measure on, got 24"):
        MetaRegressor(n_r=24).fit(*rows)


@pytest.mark.parametrize("size", [4, 60])
def test_the_meta_system_of_many_rows_is_that_of_few(rows, monkeypatch, size):
    """Blocks of rows, and moments of the support in place of its products with the query."""
    x, y, groups = rows
    groups = np.where(np.arange(len(y)) < 800, 0, groups)  # one group with most rows
    parameters = dict(train_rate=0.4, meta_ridge=1.0, adapt_rate=0.3)
    whole = MetaRegressor(**parameters).fit(x, y, groups)
    monkeypatch.setattr(meta_system, "BLOCK", size)
    blocks = MetaRegressor(**parameters).fit(x, y, groups)
    np.testing.assert_allclose(blocks.weights_, whole.weights_, rtol=1e-9)
    wide = np.hstack([x, np.zeros((len(x), 900))])  # more columns than rows: no moments
    np.testing.assert_allclose(
        MetaRegressor(**parameters).fit(wide, y, groups).weights_[:5], whole.weights_, rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["category", "string", "Int64", object, float])
def test_labels_of_any_dtype_name_the_same_groups_in_fit_and_predict(rows, kind):
    x, y, groups = (a[:240] for a in rows)
    model = MetaRegressor().fit(x, y, groups)
    labels = pd.Series(groups).astype(kind)
    np.testing.assert_array_equal(model.predict(x, labels), model.predict(x, groups))
    other = MetaRegressor().fit(x, y, labels)
    np.testing.assert_array_equal(other.predict(x, groups), model.predict(x, groups))


def test_the_score_with_labels_is_that_of_adapted_predictions(rows):
    from sklearn.metrics import r2_score

    x, y, groups = rows
    model = MetaRegressor().fit(x, y, groups)
    assert model.score(x, y, groups=groups) == r2_score(y, model.predict(x, groups=groups))
    assert model.score(x, y, groups=groups) > model.score(x, y) == r2_score(y, model.predict(x))


def test_the_meta_loss_is_a_mean_over_repeats(rows):
    """Where all rows of a group are the same its splits are, too, and their number is nothing."""
    x, y, groups = rows
    _, first = np.unique(groups, return_index=True)
    options = dict(train_rate=-0.4, meta_ridge=3.0, n_t=10, n_v=14)
    once, often = (
        MetaRegressor(**options, repeats=repeats).fit(x[first][groups], y[first][groups], groups)
        for repeats in (1, 7)
    )
    np.testing.assert_allclose(often.coef_, once.coef_, rtol=1e-9)
    assert often.intercept_ == pytest.approx(once.intercept_)


def test_rate_zero_is_a_ridge_regression_on_the_query_rows(rows):
    from sklearn.linear_model import Ridge

    x, y, groups = rows
    model = MetaRegressor(0.0, 0.0, 2.0, n_t=4, n_v=20, repeats=1).fit(x, y, groups)
    random = np.random.default_rng(0)
    query = np.concatenate(
        [random.permutation(np.arange(g * 24, (g + 1) * 24))[4:] for g in range(40)]
    )
    ridge = Ridge(alpha=2.0).fit(x[query], y[query])
    np.testing.assert_allclose(model.coef_, ridge.coef_, rtol=1e-9)
    assert model.intercept_ == pytest.approx(ridge.intercept_)


def test_parameters_clones_pickles_and_pipelines(rows):
    x, y, groups = rows
    model = MetaRegressor(-0.5, 0.3, 1.0, n_t=5)
    assert clone(model).get_params() == model.get_params()
    assert model.set_params(train_rate=0.7).train_rate == 0.7
    model.fit(x, y, groups)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(x, groups=groups), model.predict(x, groups=groups))
    line = make_pipeline(StandardScaler(), MetaRegressor(-0.5, 0.3))
    line.fit(x, y, metaregressor__groups=groups)
    assert line.predict(x).shape == y.shape


def test_groups_are_routed_through_cross_validation(rows):
    from sklearn.model_selection import GroupKFold, cross_validate

    x, y, groups = rows
    with sklearn.config_context(enable_metadata_routing=True):
        model = MetaRegressor(0.1, 0.2)
        # A plain score of groups that are held out is one without adaptation.
        with pytest.warns(UserWarning, match="10 of 10 groups were not in training"):
            found = cross_validate(model, x, y, cv=GroupKFold(4), params={"groups": groups},
                                   return_estimator=True)  # fmt: skip
    assert all(len(fitted.groups_) == 30 for fitted in found["estimator"])


def test_frames_text_labels_and_several_targets(rows):
    x, y, groups = rows
    frame = pd.DataFrame(x, columns=list("abcd"))
    labels = pd.Series(groups).map(lambda g: f"school {g}")
    model = MetaRegressor(-0.2, 0.3, fit_intercept=False).fit(frame, pd.Series(y), labels)
    assert list(model.feature_names_in_) == list("abcd")
    both = MetaRegressor(-0.2, 0.3, fit_intercept=False).fit(frame, np.c_[y, -y], labels)
    assert both.predict(frame).shape == (len(y), 2)
    np.testing.assert_allclose(both.coef_[0], model.coef_)
    np.testing.assert_allclose(both.coef_[1], -model.coef_)
    known = model.predict(frame, groups=labels)
    assert np.mean((known - y) ** 2) < np.mean((model.predict(frame) - y) ** 2)


def test_standardising_changes_no_prediction_of_rate_zero(rows):
    x, y, groups = rows
    far = 100 * x + 7
    plain = MetaRegressor(n_t=4).fit(far, y, groups)
    scaled = MetaRegressor(n_t=4, standardise=True).fit(far, y, groups)
    np.testing.assert_allclose(scaled.predict(far), plain.predict(far), rtol=1e-8)
    np.testing.assert_allclose(scaled.coef_, plain.coef_, rtol=1e-6)
    assert scaled.intercept_ == pytest.approx(plain.intercept_, rel=1e-6)


@pytest.mark.parametrize("intercept", [False, True])
def test_a_standardised_model_has_no_units(rows, intercept):
    x, y, groups = rows
    options = dict(train_rate=-0.4, adapt_rate=0.3, meta_ridge=2.0, n_t=5, fit_intercept=intercept)
    one = MetaRegressor(standardise=True, **options).fit(x, y, groups)
    centred, target = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    by_hand = MetaRegressor(**options).fit(centred, target, groups)
    np.testing.assert_allclose(one.predict(x), by_hand.predict(centred) * y.std() + y.mean())
    far = MetaRegressor(standardise=True, **options).fit(100 * x + 7, 3 * y - 2, groups)
    for known in (None, groups):
        predicted = one.predict(x, groups=known)
        np.testing.assert_allclose(
            far.predict(100 * x + 7, groups=known), 3 * predicted - 2, rtol=1e-8, atol=1e-8
        )


def linear_kernel(a, b):
    return a @ b.T


def test_the_linear_kernel_is_the_linear_model(rows):
    x, y, groups = (a[:240] for a in rows)
    options = dict(unit="raw", fit_intercept=False)
    line = MetaRegressor(-0.3, 0.3, 2.0, **options).fit(x, y, groups)
    kernel = MetaRegressor(-0.3, 0.3, 2.0, kernel=linear_kernel, **options).fit(x, y, groups)
    new = x[:6] + 0.1
    np.testing.assert_allclose(kernel.predict(new), line.predict(new), rtol=1e-6)
    one, two = (m.adapt(x[:9], y[:9]).predict(new) for m in (kernel, line))
    np.testing.assert_allclose(one, two, rtol=1e-6)
    with pytest.raises(AttributeError, match="no coefficients"):
        kernel.coef_  # noqa: B018


def test_a_kernel_model_is_that_of_kernels(x64, rows):
    x, y, _ = (a[:96] for a in rows)
    kernel = nm.kernels.relu_network(2)
    options = dict(kernel=kernel, unit="raw", n_t=10, n_v=14, repeats=1, fit_intercept=False)
    model = MetaRegressor(-0.05, 0.1, 0.7, **options).fit(x, y, np.repeat(np.arange(4), 24))
    random = np.random.default_rng(0)
    order = np.stack([random.permutation(np.arange(g * 24, (g + 1) * 24)) for g in range(4)])
    tasks = nm.Tasks(*((x[i], y[i]) for i in (order[:, :10], order[:, 10:])))
    exact = nm.kernels.meta_train(kernel, tasks, nm.GradientDescent(-0.05), meta_ridge=0.7)
    # All rows at once: other shapes would compile the kernel again.
    np.testing.assert_allclose(model.predict(x), exact(x), rtol=1e-6)
    adapted = exact.adapt((x, y), nm.GradientDescent(0.1))
    np.testing.assert_allclose(model.adapt(x, y).predict(x), adapted(x), rtol=1e-6)


def test_cross_validated_estimator_takes_what_advise_advises(rows):
    x, y, groups = rows
    model = MetaRegressorCV(n_t=8, n_v=8, n_r=8, splits=20).fit(x, y, groups)
    advice = nm.advise(x, y, groups, n_t=8, n_v=8, n_r=8, splits=20, key=jax.random.key(0))
    assert model.adapt_rate_ == advice.adapt_rate
    np.testing.assert_allclose(model.predict(x), advice.model("meta-learning").predict(x))
    assert clone(model).get_params() == model.get_params()


def test_small_groups_are_counted(rows):
    x, y, groups = rows
    groups = np.where(np.arange(len(y)) == 0, 77, groups)
    model = MetaRegressor(n_t=12, n_v=12).fit(x, y, groups)
    assert model.n_groups_left_out_ == 2  # the single row, and the group that lost it
