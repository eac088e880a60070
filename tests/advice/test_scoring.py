"""Scores in scikit-learn are those of what a user will do: each new group adapts, then counts."""

import io

import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
from sklearn.base import clone
from sklearn.compose import TransformedTargetRegressor, make_column_transformer
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    LeaveOneGroupOut,
    cross_val_score,
    cross_validate,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from negmaml.advice import AdaptiveGroupKFold, AdaptiveScorer, MetaRegressor, adapted
from tests.advice.conftest import grouped_rows

X, Y, GROUPS = grouped_rows(groups=12, rows=10, p=3)
LABELS = np.array([f"school {g:02d}" for g in GROUPS], object)
FOLDS = GroupKFold(3)


@pytest.fixture
def routing():
    with sklearn.config_context(enable_metadata_routing=True):
        yield


def scaled_model(**parameters):
    return make_pipeline(StandardScaler(), MetaRegressor(**parameters))


def by_hand(rates, n_adapt=4, **parameters):
    """The mean squared error of each fold, by a loop over folds and groups; (folds, rates)."""
    scores = []
    for train, test in FOLDS.split(X, Y, GROUPS):
        scale = StandardScaler().fit(X[train])
        for rate in rates:
            model = MetaRegressor(adapt_rate=rate, **parameters)
            model.fit(scale.transform(X[train]), Y[train], GROUPS[train])
            errors = []
            for group in np.unique(GROUPS[test]):
                rows = np.flatnonzero(group == GROUPS)
                x, y = scale.transform(X[rows]), Y[rows]
                new = model.adapt(x[:n_adapt], y[:n_adapt])
                errors.append(np.mean((y[n_adapt:] - new.predict(x[n_adapt:])) ** 2))
            scores.append(np.mean(errors))
    return np.reshape(scores, (3, -1))


@pytest.mark.usefixtures("routing")
def test_a_score_is_that_of_a_loop_over_held_out_groups():
    scores = cross_val_score(
        scaled_model(adapt_rate=0.3, meta_ridge=2.0), X, Y, cv=FOLDS, scoring=AdaptiveScorer(4),
        params={"groups": LABELS},
    )  # fmt: skip
    np.testing.assert_allclose(-scores, by_hand([0.3], meta_ridge=2.0)[:, 0], rtol=1e-12)


@pytest.mark.usefixtures("routing")
def test_a_search_finds_the_rate_that_a_loop_finds():
    rates = [-0.3, 0.0, 0.3, 0.6]
    grid = {"metaregressor__adapt_rate": rates, "metaregressor__meta_ridge": [0.0, 5.0]}
    search = GridSearchCV(scaled_model(), grid, cv=FOLDS, scoring=AdaptiveScorer(4))
    search.fit(X, Y, groups=LABELS)
    expected = np.stack([by_hand(rates, meta_ridge=ridge).mean(0) for ridge in (0.0, 5.0)], 1)
    found = -search.cv_results_["mean_test_score"].reshape(4, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert search.best_params_["metaregressor__adapt_rate"] > 0
    new = adapted(search, X[:4], Y[:4])
    np.testing.assert_allclose(
        new.predict(X), adapted(search.best_estimator_, X[:4], Y[:4]).predict(X)
    )


@pytest.mark.usefixtures("routing")
def test_known_groups_are_scored_by_their_labels():
    """Held-out groups have four rows in training, which are too few to train and only adapt."""
    cv, options = AdaptiveGroupKFold(3, n_adapt=4), dict(adapt_rate=0.3, n_t=3, n_v=3)
    scores = cross_val_score(scaled_model(**options), X, Y, cv=cv, params={"groups": LABELS})
    expected = []
    for train, test in cv.split(X, Y, LABELS):
        held = np.unique(GROUPS[test])
        assert len(held) == 4 and len(test) == 4 * 6
        assert sorted([*train, *test]) == list(range(len(Y)))
        scale = StandardScaler().fit(X[train])
        x, other = scale.transform(X), ~np.isin(GROUPS, held)
        model = MetaRegressor(**options).fit(x[train], Y[train], GROUPS[train])
        assert model.n_groups_left_out_ == 4
        # Without their rows the meta-training is the same.
        np.testing.assert_allclose(
            MetaRegressor(**options, unit="raw").fit(x[train], Y[train], GROUPS[train]).weights_,
            MetaRegressor(**options, unit="raw").fit(x[other], Y[other], GROUPS[other]).weights_,
        )
        predicted = np.concatenate([
            model.adapt(x[g == GROUPS][:4], Y[g == GROUPS][:4]).predict(x[g == GROUPS][4:])
            for g in held
        ])  # fmt: skip
        expected.append(r2_score(np.concatenate([Y[g == GROUPS][4:] for g in held]), predicted))
    np.testing.assert_allclose(scores, expected, rtol=1e-12)


def test_one_group_at_a_time_needs_no_metadata_routing():
    scores = cross_val_score(
        scaled_model(adapt_rate=0.3), X, Y, groups=GROUPS, cv=LeaveOneGroupOut(),
        scoring=AdaptiveScorer(4, one_group=True), params={"metaregressor__groups": LABELS},
    )  # fmt: skip
    train, test = GROUPS != 5, GROUPS == 5
    pipe = scaled_model(adapt_rate=0.3).fit(X[train], Y[train], metaregressor__groups=GROUPS[train])
    new = adapted(pipe, X[test][:4], Y[test][:4])
    assert -scores[5] == pytest.approx(np.mean((new.predict(X[test][4:]) - Y[test][4:]) ** 2))
    assert not np.isnan(scores).any()


@pytest.mark.usefixtures("routing")
def test_adapting_scores_better_than_not_adapting_and_any_metric_serves():
    x, y, groups = grouped_rows(groups=60, rows=10, p=3)
    options = dict(cv=FOLDS, params={"groups": groups})
    mean = {}
    for rate in (0.0, "auto"):
        scorer = {
            "mse": AdaptiveScorer(4), "r2": AdaptiveScorer(4, scoring="r2"),
            "mae": AdaptiveScorer(4, scoring="neg_mean_absolute_error"),
        }  # fmt: skip
        found = cross_validate(
            MetaRegressor(adapt_rate=rate, n_r=4), x, y, scoring=scorer, **options
        )
        mean[rate] = {name: found[f"test_{name}"].mean() for name in scorer}
    for name in ("mse", "r2", "mae"):
        assert mean["auto"][name] > mean[0.0][name]


@pytest.mark.usefixtures("routing")
def test_frames_with_texts_pass_through_pipelines_in_parallel_and_from_disk():
    frame = pd.DataFrame(X, columns=list("abc")).assign(kind=np.tile(["u", "v"], 60))
    columns = make_column_transformer(
        (StandardScaler(), ["a", "b", "c"]),
        (OneHotEncoder(drop="first", sparse_output=False), ["kind"]),
    )
    pipe = make_pipeline(columns, MetaRegressor()).set_output(transform="pandas")
    options = dict(cv=FOLDS, params={"groups": pd.Series(LABELS)}, scoring=AdaptiveScorer(4))
    one = cross_val_score(pipe, frame, pd.Series(Y), **options)
    with joblib.parallel_backend("threading", n_jobs=2):
        two = cross_val_score(clone(pipe), frame, pd.Series(Y), n_jobs=2, **options)
    np.testing.assert_array_equal(one, two)
    pipe.fit(frame, Y, groups=LABELS)
    assert list(pipe[-1].feature_names_in_)[-1] == "onehotencoder__kind_v"
    saved = io.BytesIO()
    joblib.dump((pipe, AdaptiveScorer(4)), saved)
    saved.seek(0)
    again, scorer = joblib.load(saved)
    known = again.predict(frame, groups=LABELS)
    np.testing.assert_array_equal(known, pipe.predict(frame, groups=LABELS))
    assert np.mean((known - Y) ** 2) < np.mean((pipe.predict(frame) - Y) ** 2)
    assert scorer(again, frame, Y, groups=LABELS) == AdaptiveScorer(4)(pipe, frame, Y, GROUPS)


def test_a_transformed_target_adapts_in_its_own_units():
    model = MetaRegressor(adapt_rate=0.3)
    wrapped = TransformedTargetRegressor(model, transformer=StandardScaler())
    wrapped.fit(X, 100 * Y + 7, groups=GROUPS)
    plain = clone(model).fit(X, Y, GROUPS)
    new, expected = adapted(wrapped, X[:5], 100 * Y[:5] + 7), plain.adapt(X[:5], Y[:5])
    np.testing.assert_allclose(new.predict(X), 100 * expected.predict(X) + 7)


def test_wrong_uses_are_errors_that_help():
    model = MetaRegressor().fit(X, Y, GROUPS)
    with pytest.raises(ValueError, match="enable_metadata_routing=True"):
        AdaptiveScorer(4)(model, X, Y)
    with pytest.raises(ValueError, match=r"n_adapt must be less .* got 10 with at most 10 rows"):
        AdaptiveScorer(10)(model, X, Y, GROUPS)
    with pytest.raises(TypeError, match="a method adapt, as MetaRegressor has, got Ridge"):
        AdaptiveScorer(4)(Ridge().fit(X, Y), X, Y, GROUPS)
    with pytest.raises(ValueError, match="got 10 with at most 10 rows in one fold"):
        list(AdaptiveGroupKFold(3, n_adapt=10).split(X, Y, GROUPS))
    with pytest.raises(ValueError, match="groups must be given"):
        list(AdaptiveGroupKFold(3, n_adapt=4).split(X, Y))
    for wrong in (0, -1, 1.5, "a", None):
        with pytest.raises((TypeError, ValueError), match="n_adapt"):
            AdaptiveScorer(wrong)
        with pytest.raises((TypeError, ValueError), match="n_adapt"):
            AdaptiveGroupKFold(3, n_adapt=wrong)
