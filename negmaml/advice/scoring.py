"""Cross-validation in scikit-learn of models that adapt: each held-out group adapts, then counts.

`AdaptiveScorer` is for new groups that come after training, `AdaptiveGroupKFold` for new groups of
which some rows are in the training data.
"""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np

from negmaml._core.checks import check_count, check_flag
from negmaml._core.extras import require
from negmaml.advice.labels import unique_labels

require("sklearn", "advice")
from sklearn.metrics import get_scorer  # noqa: E402
from sklearn.model_selection import GroupKFold  # noqa: E402
from sklearn.pipeline import Pipeline  # noqa: E402
from sklearn.utils.metadata_routing import MetadataRequest  # noqa: E402


def adapted(estimator: Any, X: Any, y: Any) -> Any:
    """Return a fitted estimator adapted to rows of a new group, also within a pipeline.

    Arguments:
        estimator: with a method `adapt`, or a pipeline, a search such as GridSearchCV, or a
            TransformedTargetRegressor around one. Fitted transformers stay as they are.
        X, y: rows of the new group.

    Raises TypeError for any other estimator.

    >>> import numpy as np
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> from negmaml import MetaRegressor
    >>> X, school = np.random.default_rng(0).normal(size=(60, 2)), np.repeat(np.arange(6), 10)
    >>> y = X[:, 0] + school
    >>> pipe = make_pipeline(StandardScaler(), MetaRegressor())
    >>> pipe = pipe.fit(X, y, metaregressor__groups=school)
    >>> adapted(pipe, X[:5], y[:5]).predict(X[5:10]).shape
    (5,)
    """
    if hasattr(estimator, "adapt"):
        return estimator.adapt(X, y)
    if isinstance(estimator, Pipeline):
        *before, (name, last) = estimator.steps
        found = copy.copy(estimator)
        found.steps = [*before, (name, adapted(last, estimator[:-1].transform(X), y))]
        return found
    if hasattr(estimator, "best_estimator_"):
        return adapted(estimator.best_estimator_, X, y)
    if hasattr(estimator, "regressor_"):
        target = np.asarray(y, float)
        scaled = estimator.transformer_.transform(target.reshape(len(target), -1))
        found = copy.copy(estimator)
        found.regressor_ = adapted(estimator.regressor_, X, scaled.reshape(target.shape))
        return found
    raise TypeError(
        f"estimator must have a method adapt, as MetaRegressor has, got {type(estimator).__name__}"
    )


class AdaptiveScorer:
    """A scorer that adapts the model to the first rows of each held-out group.

    The score is that of the adapted model on the group's other rows, averaged over groups. Groups
    without other rows do not count. It serves `cross_val_score`, `GridSearchCV` and all other tools
    that take `scoring=`. With metadata routing enabled, the labels reach it with
    `params={"groups": groups}`, in a search with `fit(X, y, groups=groups)`.

    Arguments:
        n_adapt: number of rows that each group adapts on.
        scoring: the score of an adapted model, a name or scorer of scikit-learn.
        one_group: True if the splitter holds out one group at a time, as LeaveOneGroupOut does. No
            labels are then needed, nor metadata routing.

    Calling it raises ValueError without labels, and if no group has more rows than `n_adapt`.

    >>> import numpy as np, negmaml as nm
    >>> X, groups = np.arange(8.0)[:, None], np.repeat(["up", "down"], 4)
    >>> y = np.where(groups == "up", X[:, 0], -X[:, 0])
    >>> model = nm.advice.PerGroupRidge().fit(X, y, groups)
    >>> scorer = nm.advice.AdaptiveScorer(2)  # it adapts to two rows of each group
    >>> abs(round(scorer(model, X, y, groups), 6))
    0.0
    """

    def __init__(
        self, n_adapt: int, *, scoring: Any = "neg_mean_squared_error", one_group: bool = False
    ) -> None:
        self.n_adapt: int = check_count("n_adapt", n_adapt)
        self.scoring: Any = get_scorer(scoring)
        self.one_group: bool = check_flag("one_group", one_group)

    def __repr__(self) -> str:
        return f"AdaptiveScorer({self.n_adapt}, scoring={self.scoring})"

    def __call__(self, estimator: Any, X: Any, y: Any, groups: Any = None) -> float:
        size = len(y)
        if groups is None and not self.one_group:
            raise ValueError(
                "groups must be given to AdaptiveScorer, got None: enable metadata routing with "
                "sklearn.set_config(enable_metadata_routing=True) and pass params={'groups': ...}, "
                "or hold out one group at a time with LeaveOneGroupOut and one_group=True"
            )
        codes = np.zeros(size, int) if self.one_group else unique_labels(groups, size)[2]
        scores = []
        for rows in _rows_of(codes):
            first, rest = rows[: self.n_adapt], rows[self.n_adapt :]
            if len(rest):
                model = adapted(estimator, _take(X, first), _take(y, first))
                scores.append(self.scoring(model, _take(X, rest), _take(y, rest)))
        if not scores:
            raise ValueError(
                f"n_adapt must be less than the rows of a held-out group, got {self.n_adapt} with "
                f"at most {np.bincount(codes).max()} rows"
            )
        return float(np.mean(scores))

    def get_metadata_routing(self) -> Any:
        """Ask for labels, as scikit-learn expects of a scorer."""
        request = MetadataRequest(owner=type(self).__name__)
        request.score.add_request(param="groups", alias=True)
        return request


class AdaptiveGroupKFold(GroupKFold):
    """`GroupKFold` with the first rows of each held-out group in the training part.

    The other rows of these groups are the test part. A model that predicts known groups by their
    labels is then scored as for groups that have a few labelled rows when it is fitted. With
    metadata routing enabled,

        cross_val_score(model, X, y, cv=AdaptiveGroupKFold(5, n_adapt=4), params={"groups": groups})

    passes labels to `fit` and `score`. The first rows of a held-out group also train if they are
    n_t + n_v or more; with larger n_t + n_v they only adapt.

    Arguments:
        n_splits: number of folds of the groups.
        n_adapt: number of rows that each held-out group adapts on; groups with no more rows do
            not count.
        shuffle, random_state: assign groups to folds at random.

    >>> import numpy as np, negmaml as nm
    >>> X, groups = np.zeros((12, 1)), np.repeat(["a", "b", "c"], 4)
    >>> folds = nm.advice.AdaptiveGroupKFold(3, n_adapt=1).split(X, groups=groups)
    >>> [(len(train), len(test)) for train, test in folds]
    [(9, 3), (9, 3), (9, 3)]
    """

    def __init__(
        self,
        n_splits: int = 5,
        *,
        n_adapt: int,
        shuffle: bool = False,
        random_state: int | None = None,
    ) -> None:
        super().__init__(n_splits, shuffle=shuffle, random_state=random_state)
        self.n_adapt: int = check_count("n_adapt", n_adapt)

    def split(
        self, X: Any, y: Any = None, groups: Any = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the training and the test rows of each fold."""
        if groups is None:
            raise ValueError("groups must be given, a label for each row, got None")
        # As numbers, since the base class refuses labels of mixed types.
        codes = unique_labels(groups, len(X) if hasattr(X, "__len__") else X.shape[0])[2]
        for train, test in super().split(X, y, codes):
            held = [test[rows] for rows in _rows_of(codes[test])]
            first = np.concatenate([rows[: self.n_adapt] for rows in held])
            rest = np.concatenate([rows[self.n_adapt :] for rows in held])
            if not len(rest):
                raise ValueError(
                    f"n_adapt must be less than the rows of a held-out group, got {self.n_adapt} "
                    f"with at most {max(map(len, held))} rows in one fold"
                )
            yield np.sort(np.concatenate([train, first])), np.sort(rest)


def _rows_of(codes) -> list[np.ndarray]:
    """The rows of each group in their order, for groups that occur."""
    order = np.argsort(codes, kind="stable")
    return [rows for rows in np.split(order, np.cumsum(np.bincount(codes))[:-1]) if len(rows)]


def _take(values, rows):
    """Rows of an array, a data frame or a list."""
    if hasattr(values, "iloc"):
        return values.iloc[rows]
    return values[rows] if hasattr(values, "shape") else [values[row] for row in rows]
