"""Tables as people have them: each gives the rows that were meant, or an error that helps."""

import datetime
import decimal
import gzip

import numpy as np
import pandas as pd
import pytest

from negmaml.advice import read_table
from tests.internals import columns

RANDOM = np.random.default_rng(0)
ROWS = 24
SCORE = np.round(RANDOM.normal(size=ROWS), 2)
SES = np.round(1500 * RANDOM.normal(size=ROWS), 2)
SCHOOLS = np.repeat(["Köln", "Zürich", "NA", "None", "nan", "01", "1", "9007199254740993"], 3)


def lines(header="school{s}ses{s}score", s=",", comma=".", ses=str, school=str):
    """A text of the table in this format."""
    numbers = [str(v).replace(".", comma) for v in SCORE]
    rows = [s.join((school(g), ses(v).replace("|", comma), n))
            for g, v, n in zip(SCHOOLS, SES, numbers, strict=True)]  # fmt: skip
    return "\n".join([header.format(s=s), *rows]) + "\n"


def with_comma(value):
    return str(value).replace(".", ",")


def german(value):
    """1234.5 as 1.234,50."""
    return f"{value:,.2f}".translate(str.maketrans(",.", ".,"))


def read(content, folder, name="data.csv", **options):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path, **{"group": "school", "target": "score"} | options)


MESSY = {
    "plain": (lines(), "utf-8", ""),
    "semicolon and decimal comma": (lines(s=";", comma=",", ses=with_comma), "utf-8",
                                    "separator semicolon and the decimal mark ','"),
    "tab": (lines(s="\t"), "utf-8", "separator tab"),
    "bar": (lines(s="|"), "utf-8", "separator bar"),
    "spaces": (lines(s="   "), "utf-8", "separator space"),
    "blanks after commas": (lines(s=", "), "utf-8", ""),
    "cp1252": (lines(), "cp1252", "Read as cp1252"),
    "byte-order mark": (lines(), "utf-8-sig", ""),
    "UTF-16": (lines(s="\t"), "utf-16", "separator tab"),
    "UTF-16 without a mark": (lines(s="\t"), "utf-16-le", "Read as utf-16-le"),
    "UTF-32": (lines(), "utf-32", ""),
    "Windows line ends": (lines().replace("\n", "\r\n"), "utf-8", ""),
    "comment lines": ("# a survey\n# of 2020, in May, and June\n" + lines().replace(
        "01,", "# checked\n01,", 1), "utf-8", "Comment lines skipped: 1"),
    "comments above the header only": ("# of 2020\n" + lines(s=";", comma=",", ses=with_comma),
                                       "utf-8", "Lines above the header skipped: 1"),
    "text above the header": ("Export;of;2020\n\nsep=,\n" + lines(), "utf-8",
                              "Lines above the header skipped: 2"),
    "thousands commas": (lines(ses=lambda v: f'"{v:,}"'), "utf-8", ""),
    "thousands points": (lines(s=";", comma=",", ses=german), "utf-8", "decimal mark ','"),
    "thousands blanks": (lines(s=";", ses=lambda v: f"{v:,}".replace(",", "\u202f")), "utf-8",
                         "separator semicolon"),
    "minus of typography": (lines(ses=lambda v: str(v).replace("-", "\u2212")), "utf-8", ""),
    "separator at line ends": (lines().replace("\n", ",\n"), "utf-8", ""),
    "separator at line ends but the header": (lines().replace("\n", ",\n").replace(
        "score,", "score"), "utf-8", ""),
    "quotes": (lines(school=lambda g: f'"{g}"'), "utf-8", ""),
    "blanks around labels": (lines(school=lambda g: f" {g} "), "utf-8", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", MESSY)
def test_the_format_of_a_text_file_is_recognised(kind, tmp_path):
    content, encoding, note = MESSY[kind]
    table = read(content.encode(encoding), tmp_path)
    np.testing.assert_array_equal(table.groups, SCHOOLS)
    np.testing.assert_array_equal(table.y, SCORE)
    assert list(table.x.columns) == ["ses"]
    np.testing.assert_array_equal(table.x["ses"], SES)
    assert note in " ".join(table.notes)
    assert bool(table.notes) == bool(note)


def test_row_names_of_r_and_compressed_files_are_read(tmp_path):
    rows = lines().splitlines()
    named = "\n".join([rows[0], *(f"{i + 1},{row}" for i, row in enumerate(rows[1:]))])
    table = read(gzip.compress(named.encode()), tmp_path, "data.csv.gz")
    assert table.notes == ("Column 'row name' left out: it numbers the rows.",)
    np.testing.assert_array_equal(table.y, SCORE)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "is empty"),
        ("\n \n", {}, "is empty"),
        ("school,ses,score\n", {}, "has only the header"),
        (b"PK\x03\x04..", {}, "zip archive or Excel workbook; save it as CSV"),
        (b"\x00\x01\x02binary\xff", {}, "is binary"),
        (b"PAR1 and no more", {}, "is not a whole Parquet file"),
        (lines("schol{s}ses{s}score"), {}, "--group must be a column of the data, got 'school'; "
                                           "did you mean 'schol'?"),
        (lines("ses{s}ses{s}score"), {"group": "ses"}, "'ses' twice; rename"),
        (lines(), {"sep": ";"}, "if that is a whole line, give --sep"),
        (lines(s=";", comma=",", ses=with_comma), {"sep": ","}, "header ['school;ses;score'], 1"),
        (lines(), {"sep": "semi"}, "--sep must be one character"),
        ("one\ntwo\nthree\n", {}, "--sep must be given: no separator splits the first line 'one'"),
        (lines().encode("cp1252"), {"encoding": "utf-8"}, r"--encoding must be that of the file"),
        (lines(), {"encoding": "klingon"}, "--encoding must be an encoding such as utf-8"),
        (b"school,ses,score\n\x81,1,2\n", {}, r"--encoding must be given"),
        (lines(), {"decimal": ";"}, "--decimal must be . or , got ';'"),
        ("school;ses;score\na;1,234;1\nb;2,345;2\n", {}, "--decimal must be given: '1,234' in col"),
        ("school;ses;score\na;1.234;1\nb;2.345;2\n", {}, "--decimal must be given: '1.234' in col"),
        ("school;ses;score\na;1,5;1\nb;2.5;2\n", {}, "'1,5' in column 'ses' and '2.5' in column"),
        (lines(comma=","), {}, "got 4 in '"),
        (lines() + "a,1,2,3\n", {}, "['school', 'ses', 'score'], 3, got 4 in 'a,1,2,3'"),
        (lines() + "a,n/k,2\n", {}, "column 'ses' must be numbers or text, got the text 'n/k' "
                                    r"(data row 25) in 1 rows among numbers; --na 'n/k'"),
        (lines() + "a,3,high\n", {}, "--target column 'score' must be numbers"),
        (lines(school="s{}".format), {"target": "school", "group": "ses"},
         "--target must be a column of numbers, got 'school' with the text 'sKöln'"),
        (lines(), {"drop": ["ses"]}, "--features must name a column"),
        (lines(), {"drop": ["score"]}, "--drop must name columns that no other option does"),
        (lines(), {"numeric": ["ses"], "categorical": ["ses"]}, "got 'ses' in both"),
        (lines(), {"features": "ses"}, "features must be a list of texts"),
        (lines(), {"missing": "ignore"}, "missing must be one of 'fill', 'drop'"),
        ("school,s,t,score\na,,1,1\nb,2,,2\n", {"missing": "drop"}, "all have some value missing"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_quoted_with_the_option_to_try(content, options, message, tmp_path):
    with pytest.raises((ValueError, TypeError)) as caught:
        read(content, tmp_path, **options)
    assert message in str(caught.value)


def test_texts_with_line_ends_and_comment_signs_are_data(tmp_path):
    table = read('school,kind,score\n"a\n#b",#1,1\nc,"#2\n#",2\nc,#1,3\n', tmp_path)
    assert table.groups.tolist() == ["a\n#b", "c", "c"]
    assert list(table.x.columns) == ["kind_#2\n#"]
    assert table.x.iloc[:, 0].tolist() == [0, 1, 0]


def test_columns_of_one_name_are_refused_unless_left_out(tmp_path):
    content = "school,ses,ses,age,score\na,1,2,3,4\nb,3,3,5,6\n"
    with pytest.raises(ValueError, match="got 'ses' twice"):
        read(content, tmp_path)
    assert list(read(content, tmp_path, drop=["ses"]).x.columns) == ["age"]


# A table with a column of every kind, as CSV and as Parquet.
DAYS = pd.date_range("2020-01-30", periods=ROWS, freq="7D")
KINDS = pd.DataFrame({
    "school": np.repeat([2**53, 2**53 + 1, 2**53 + 2, 7], 6),
    "pupil_id": RANDOM.permutation(900)[:ROWS],
    "number": np.arange(ROWS) + 5,
    "day": DAYS,
    "sex": np.tile(["f", "m", "m"], 8),
    "city": np.repeat(["A", "B", "C", "D"], 6),
    "note": [f"text {i}" for i in range(ROWS)],
    "always": 3.0,
    "ses": np.where(np.arange(ROWS) % 4 == 0, np.nan, SES),
    "income": 100 * np.arange(ROWS)[::-1],
    "often": np.where(np.arange(ROWS) == 2, None, np.tile([True, False, False], 8)),
    "score": np.where(np.arange(ROWS) == 5, np.nan, SCORE),
})  # fmt: skip


@pytest.mark.parametrize("ending", ["csv", "parquet", "frame"])
def test_every_column_becomes_features_or_is_left_out_with_a_reason(ending, tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "LEVELS", 15)
    data = KINDS
    if ending != "frame":
        data = tmp_path / f"data.{ending}"
        KINDS.to_csv(data, index=False) if ending == "csv" else KINDS.to_parquet(data)
    table = read_table(data, group="school", target="score")
    names = ["day", "sex_m", "ses", "ses_missing", "income", "often", "often_missing"]
    assert list(table.x.columns) == names
    keep = np.arange(ROWS) != 5
    assert table.groups[0] == "9007199254740992" and len(set(table.groups)) == 4
    np.testing.assert_allclose(table.y, SCORE[keep])
    np.testing.assert_allclose(table.x["day"], 7 * np.arange(ROWS)[keep])
    mean = np.nanmean(KINDS["ses"][keep])
    np.testing.assert_allclose(table.x["ses"], KINDS["ses"].fillna(mean)[keep])
    assert table.x["ses_missing"].sum() == 6
    said = " ".join(table.notes)
    for note in (
        "Rows without a label or a target dropped: 1 of 24 (score 1).",
        "'pupil_id' left out: 23 whole numbers such as",
        "'number' left out: 23 whole numbers such as 5 look like an identifier",
        "'city' left out: its values name the groups",
        "'note' left out: text of 23 values, such as 'text 0'",
        "'always' left out: it is 3 in every row",
        "'day': days since 2020-01-30",
        "filled with the mean of their column, of 23 rows: ses 6",
    ):
        assert note in said


def test_options_replace_what_is_recognised(monkeypatch):
    monkeypatch.setattr(columns, "LEVELS", 5)
    options = dict(group="school", target="score")
    table = read_table(KINDS, **options, features=["pupil_id", "always", "ses"], missing="drop")
    assert list(table.x.columns) == ["pupil_id", "always", "ses"]
    assert len(table.x) == 17
    assert "dropped: 6 of 23 (ses 6)" in " ".join(table.notes)
    with pytest.raises(ValueError, match=r"at most 5 different texts .* add --categorical 'note'"):
        read_table(KINDS, **options, features=["note"])
    texts = read_table(KINDS, **options, features=["note"], categorical=["note"]).x
    assert texts.shape == (23, 5)
    numeric = KINDS.assign(ses=["?", *SES[1:].astype(str)])
    table = read_table(numeric, **options, features=["ses"], numeric=["ses"])
    assert table.x["ses_missing"].sum() == 1
    for na in (["?"], ["?", "8"]):
        assert read_table(numeric, **options, features=["ses"], na=na).x.shape == (23, 2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["01.02.2020", "05.03.2020"], [0, 33]),
        (["2/13/2020", "3/1/2020"], [0, 17]),
        (["13/2/2020", "1/3/2020"], [0, 17]),
        (["2020-02-13T12:00:00Z", "2020-02-14"], [0.5, 1]),
        (["2020-02", "2020-03"], [0, 29]),
        ([datetime.date(2020, 2, 1), datetime.date(2020, 2, 3)], [0, 2]),
        (pd.to_datetime(["2020-02-02", "2020-02-04"]).tz_localize("Asia/Tokyo"), [5 / 8, 21 / 8]),
        (pd.period_range("2020-02", periods=2, freq="M"), [0, 29]),
        (pd.to_timedelta([1, 36], unit="h"), [1 / 24, 1.5]),
        ([decimal.Decimal("1.50"), decimal.Decimal("2")], [1.5, 2]),
        ([True, False], [1, 0]),
        (pd.array([1, 2], "Int64"), [1, 2]),
        (["1,234.5", "7"], [1234.5, 7]),
    ],
)  # fmt: skip
def test_dates_and_numbers_of_any_type_are_read(values, expected):
    frame = pd.DataFrame({"g": [0, 1, 0, 1], "y": [1.0, 2, 4, 5]})
    frame["v"] = pd.Series(values).take([0, 1, 0, 1]).to_numpy() if isinstance(
        values, list) else pd.Series(values).take([0, 1, 0, 1]).reset_index(drop=True)  # fmt: skip
    x = read_table(frame, group="g", target="y").x
    np.testing.assert_allclose(x["v"], [*expected, *expected])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1/2/2020", "3/4/2020"], "a clear order of day and month, got '1/2/2020'"),
        ([1 + 2j, 3.0], "must hold real numbers"),
        ([[1, 2], [3]], "must hold numbers or texts, got [1, 2]; --drop leaves it out"),
        ([{"a": 1}, {"a": 2}], "must hold numbers or texts, got {'a': 1}"),
    ],
)
def test_columns_that_cannot_be_used_are_named(values, message):
    frame = pd.DataFrame({"g": [0, 1], "y": [1.0, 2], "v": values})
    with pytest.raises(ValueError) as caught:
        read_table(frame, group="g", target="y")
    assert message in str(caught.value) and "column 'v'" in str(caught.value)


def test_parquet_files_with_indices_and_categories(tmp_path):
    frame = pd.DataFrame({"g": pd.Categorical(SCHOOLS), "y": SCORE,
                          "kind": pd.Categorical(np.tile(["1", "2", "3"], 8))})  # fmt: skip
    for index in ("g", None):
        data = frame.set_index("g") if index else frame[::2]
        data.to_parquet(tmp_path / "a.parquet")
        table = read_table(tmp_path / "a.parquet", group="g", target="y")
        assert table.groups.tolist() == list(SCHOOLS if index else SCHOOLS[::2])
        assert list(table.x.columns) == ["kind_2", "kind_3"]  # categories are no numbers
    ids = pd.array([2**53, 2**53 + 1, None, 5] * 6, "Int64")
    frame.assign(g=ids, z=SES).to_parquet(tmp_path / "b.parquet")
    table = read_table(tmp_path / "b.parquet", group="g", target="y")
    assert set(table.groups) == {"9007199254740992", "9007199254740993", "5"}
    assert "no label 6" in " ".join(table.notes)


def test_later_rows_are_encoded_as_the_first_ones():
    table = read_table(KINDS, group="school", target="score")
    later = KINDS.iloc[:2].assign(sex=["f", "x"], ses=[np.nan, 1.0], day=DAYS[:1].repeat(2))
    with pytest.warns(UserWarning, match="'sex' has texts that were not in training, 'x', in 1"):
        x = table.encode(later)
    assert list(x.columns) == list(table.x.columns)
    assert x["sex_m"].tolist() == [0, 0]
    assert x["ses"].tolist() == pytest.approx([table.x["ses"].mean(), 1.0])
    assert x["day"].tolist() == [0, 0]
    with pytest.raises(ValueError, match="frame must have the column 'sex'"):
        table.encode(later.drop(columns="sex"))


@pytest.mark.parametrize(
    ("label", "value", "is_total"),
    [
        ("Total", 3.0, True),
        ("gesamt", 3.0, True),
        ("Σ", SCORE.sum(), True),
        ("total recall", 3.0, False),
        ("last", SCORE.mean(), False),
        ("1", SCORE.sum(), False),  # a group with other rows
    ],
)
def test_a_last_row_of_totals_is_no_group(label, value, is_total, tmp_path):
    table = read(lines() + f"{label},{SES.sum()},{value}\n", tmp_path)
    assert len(table.y) == ROWS + (not is_total)
    assert any(f"Row {label!r} left out" in note for note in table.notes) == is_total


def test_a_last_row_of_zeros_or_of_groups_of_one_row_is_kept():
    frame = pd.DataFrame({"school": list("aabc"), "x": [1.0, 2, 4, 3], "score": [1.0, -1, 0, 0]})
    assert len(read_table(frame, group="school", target="score").y) == 4
    frame = pd.DataFrame({"school": list("abc"), "x": [1.0, 2, 4], "score": [1.0, 2, 3]})
    assert len(read_table(frame, group="school", target="score").y) == 3


@pytest.mark.parametrize("ending", ["csv", "parquet", "frame"])
def test_numbers_with_leading_zeros_are_texts(ending, tmp_path):
    data = frame = pd.DataFrame({
        "school": SCHOOLS, "zip": np.tile(["01001", "1001", "2139"], 8), "ses": SES, "score": SCORE,
    })  # fmt: skip
    frame.loc[4, "zip"] = None
    if ending != "frame":
        data = tmp_path / f"data.{ending}"
        frame.to_csv(data, index=False, na_rep="NA") if ending == "csv" else frame.to_parquet(data)
    options = dict(group="school", target="score")
    table = read_table(data, **options)
    assert list(table.x.columns) == ["zip_1001", "zip_2139", "zip_missing", "ses"]
    assert any("'zip' read as texts, since '01001'" in note for note in table.notes)
    assert list(table.encode(frame.iloc[:2])["zip_1001"]) == [0, 1]
    numeric = read_table(data, **options, numeric=["zip"])
    assert list(numeric.x["zip"][:3]) == [1001, 1001, 2139]


def test_percentages_are_numbers_unless_plain_numbers_stand_beside_them(tmp_path):
    text = lines(s=";", comma=",", ses=lambda v: with_comma(v) + " %")
    table = read(text, tmp_path)
    np.testing.assert_allclose(table.x["ses"], SES)
    np.testing.assert_allclose(read(text, tmp_path, target="ses").y, SES)
    mixed = pd.DataFrame({"g": [0, 1, 0, 1], "x": ["5%", "0.05", "7%", "9%"], "y": [1.0, 2, 4, 5]})
    assert "x_0.05" not in read_table(mixed, group="g", target="y").x
    assert "x_5%" in read_table(mixed, group="g", target="y").x


def test_amounts_of_one_currency_are_numbers():
    def read_amounts(*amounts, **options):
        frame = pd.DataFrame({"g": [0, 1, 0, 1], "x": amounts, "y": [1.0, 2, 4, 5]})
        return read_table(frame, group="g", target="y", **options).x

    amounts = read_amounts("$1,200.5", "-$3", "$-4", "$ 5")
    assert amounts["x"].tolist() == [1200.5, -3, -4, 5]
    amounts = read_amounts("1.200,5 €", "-3 €", "4€", "5 €", decimal=",")
    assert amounts["x"].tolist() == [1200.5, -3, 4, 5]
    assert "x_€6" in read_amounts("$5", "€6", "$7", "$8")


def test_a_target_with_the_other_decimal_mark_names_the_option(tmp_path):
    with pytest.raises(ValueError, match="--decimal , reads it"):
        read(lines(s=";", ses=with_comma), tmp_path, target="ses", sep=";", decimal=".")


def test_a_table_prints_its_sizes_and_features():
    table = read_table(KINDS, group="school", target="score")
    assert repr(table).startswith(f"GroupedTable({len(table.y)} rows in ")
    assert "sex_m" in repr(table)


def test_a_frame_without_rows_is_refused():
    with pytest.raises(ValueError, match="data must have rows"):
        read_table(KINDS.iloc[:0], group="school", target="score")


def test_numeric_refuses_a_column_without_numbers(tmp_path):
    with pytest.raises(ValueError, match=r"column 'ses' has no numbers, its first text is 'v"):
        read(lines(ses=lambda v: f"v{v}"), tmp_path, numeric=["ses"])
