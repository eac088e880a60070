"""Labels of groups: any type names the same group, and no two groups become one."""

import datetime
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from tests.internals import unique_labels

DAY = datetime.datetime(2020, 1, 2)
SAME = {
    "1": [1, 1.0, np.int8(1), np.float32(1), Decimal("1.00"), "1", b"1"],
    "0.1": [0.1, np.float32(0.1), Decimal("0.1"), "0.1"],
    "True": [True, np.True_, "True"],
    "9007199254740993": [2**53 + 1, np.int64(2**53 + 1), Decimal(2**53 + 1)],
    "2020-01-02": [DAY, DAY.date(), np.datetime64("2020-01-02", "ns"), pd.Timestamp(DAY)],
    "2020-01-02Z": [DAY.replace(tzinfo=datetime.UTC),
                    pd.Timestamp("2020-01-02 09:00", tz="Asia/Tokyo")],
    "2020-01": [pd.Period("2020-01")],
    "('a', '1')": [("a", 1), ("a", 1.0)],
}  # fmt: skip


@pytest.mark.parametrize("text", SAME)
def test_a_label_has_one_text_in_every_type(text):
    for label in SAME[text]:
        _, names, codes = unique_labels([label, "other", label], 3)
        assert sorted(names) == sorted([text, "other"])
        assert codes[0] == codes[2] != codes[1]


@pytest.mark.parametrize(
    "labels",
    [
        pd.Series([3, 1, 3, 20]), pd.Series([3, 1, 3, 20], dtype="Int64"),
        pd.Series([3.0, 1, 3, 20]), pd.Series([3, 1, 3, 20], dtype="category"),
        pd.Series(["3", "1", "3", "20"], dtype="string"), np.array(["3", "1", "3", "20"]),
        np.array(["3", 1, 3.0, b"20"], object), [3, 1, 3, 20], pd.Index([3, 1, 3, 20]),
    ],
    ids=lambda labels: f"{type(labels).__name__} {getattr(labels, 'dtype', '')}",
)  # fmt: skip
def test_columns_of_any_dtype_have_the_same_groups_in_the_same_order(labels):
    given, names, codes = unique_labels(labels, 4)
    assert names == ["1", "3", "20"]
    assert codes.tolist() == [1, 0, 1, 2]
    assert len(given) == 3


def test_labels_that_differ_stay_apart():
    labels = ["1", "01", "NA", "None", "nan", "1.0", " 1", "true", 2**53, 2**53 + 1]
    _, names, codes = unique_labels(labels, len(labels))
    assert len(names) == len(set(codes)) == len(labels)


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT, " ", "", np.datetime64("NaT"),
                                     Decimal("NaN")])  # fmt: skip
def test_a_missing_label_is_refused_with_its_row(missing):
    with pytest.raises(ValueError, match="a missing label in row 1 and 0 more"):
        unique_labels(["a", missing, "b"], 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([2.0**53, 1.0, 2.0], "float64 9007199254740992: from 9007199254740992 on"),
        (np.array([1, 2, 2**24], np.float32), "float32 16777216"),
        ([np.inf, 1.0, 2.0], "float64 inf"),
        ([1 + 1j, 2, 3], "must hold texts or numbers"),
        ([[1], [2], [3]], "got shape (3, 1)"),
        (pd.DataFrame({"a": [1, 2, 3]}), "pass one of its columns"),
        ([{"a": 1}, 2, 3], "got {'a': 1}"),
        ([1, 2], "a label for each of 3 rows"),
        ("abc", "got 'abc'"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(labels, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        unique_labels(labels, 3)
    assert message in str(caught.value)
