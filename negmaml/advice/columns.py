"""Columns of a data frame as features: numbers, days, and 0/1 columns of texts.

`plan_columns` decides on each column from the data, with a note on every column that is left out.
`encode_columns` then turns these rows, or later ones, into the same features.
"""

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from negmaml._core.checks import short_repr
from negmaml._core.extras import require
from negmaml.advice.labels import label_text, listed

LEVELS = 50  # texts of a column that become 0/1 columns
MANY_MISSING = 0.02  # of the rows, from which a column of its own says where values are missing
NEARLY_UNIQUE = 0.95  # of the rows: distinct whole numbers of an identifier
MINUS = str.maketrans({"\u2212": "-"})  # the minus sign of typography
UNITS = "%$\u20ac\u00a3\u00a5"  # a column of numbers may have one of these with each
MARKS = " '\u2019\u00a0\u202f\u2009"  # thousands separators of any locale
ID_NAME = re.compile(
    r"(^|[\W_])(id|nr|no|idx|index|key|code|number|uuid|row)([\W_]|\d*$)|[a-z]I[Dd]$"
)
DATE = re.compile(
    r"(\d{4}-\d{1,2}(-\d{1,2})?|\d{4}/\d{1,2}/\d{1,2}|\d{1,2}[./-]\d{1,2}[./-]\d{4})"
    r"([ T]\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?)?( ?(Z|UTC|[+-]\d{2}:?\d{2}))?"
)
DAY_OR_MONTH = re.compile(r"\s*(\d{1,2})([./-])(\d{1,2})[./-](\d{4})")


class Wishes(NamedTuple):
    """The user's decisions on columns, which replace those of `plan_columns`.

    features: columns to use; None: all.
    drop, numeric, categorical: columns to leave out, to read as numbers, and as texts.
    decimal: the decimal mark of numbers that are texts.
    """

    features: tuple[str, ...] | None = None
    drop: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    decimal: str = "."


class Parsed(NamedTuple):
    """A column as read: "number", "date" or "text", its values, and NaN or None for missing ones.

    start: of dates, the day from which they count.
    """

    kind: str
    values: np.ndarray
    start: Any = None

    @property
    def missing(self) -> np.ndarray:
        """True where a value is missing, (rows,)."""
        if self.kind == "text":
            return np.array([value is None for value in self.values])
        return ~np.isfinite(self.values)


@dataclass(frozen=True)
class FeatureColumn:
    """How a column becomes features.

    Attributes:
        name: of the column.
        kind: "number", "date" or "text".
        fill: the value in place of missing numbers, their mean.
        start: the day from which dates count.
        levels: the texts that have a 0/1 column. Another text has zeros in all of them.
        others: True if rarer texts share the zeros on purpose.
        indicator: True for a 0/1 column of the missing values.
        decimal: the decimal mark of numbers that are texts.
    """

    name: str
    kind: str
    fill: float = 0.0
    start: Any = None
    levels: tuple[str, ...] = ()
    first: str | None = None
    others: bool = False
    indicator: bool = False
    decimal: str = "."

    @property
    def names(self) -> list[str]:
        """Names of the features."""
        own = [f"{self.name}_{level}" for level in self.levels] if self.kind == "text" else []
        own = own or ([] if self.kind == "text" else [self.name])
        return own + [f"{self.name}_missing"] * self.indicator

    def encode(self, series: Any) -> tuple[list[np.ndarray], str | None]:
        """Return the features of a column, and a sentence on texts that are new."""
        parsed = parse(series, self.decimal, self.kind, self.start)
        missing, note = parsed.missing, None
        if self.kind == "text":
            columns = [parsed.values == level for level in self.levels]
            known = {*self.levels, self.first, None}
            if not self.others and (new := sorted(set(parsed.values) - known)):
                count = int(np.isin(parsed.values.astype(str), new).sum())
                note = (
                    f"column {self.name!r} has texts that were not in training, {listed(new)}, in "
                    f"{count} rows: zeros in all of its columns, as for {self.first!r}"
                )
        else:
            columns = [np.where(missing, self.fill, parsed.values)]
        return columns + [missing] * self.indicator, note


def encode_columns(frame, plan: Sequence[FeatureColumn]):
    """Return the features as a frame of floats, and sentences on texts that are new."""
    pandas = require("pandas", "advice")
    names = [name for column in plan for name in column.names]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(
            "features must have a name for each column (texts become columns NAME_VALUE), got "
            f"{sorted(twice)[0]!r} twice; rename, or leave one out with --drop"
        )
    # Filled in place, since lists of columns would double the memory.
    x: np.ndarray = np.empty((len(frame), len(names)), _precision(frame, plan), order="F")
    at, notes = 0, []
    for column in plan:
        columns, note = column.encode(frame[column.name])
        notes += [note] if note else []
        for values in columns:
            x[:, at] = values
            at += 1
    return pandas.DataFrame(x, frame.index, names, copy=False), notes


def _precision(frame, plan: Sequence[FeatureColumn]) -> type:
    """Single precision if it holds all columns exactly, which halves the memory."""
    exact = ("float32", "float16", "int16", "int8", "uint16", "uint8", "bool")
    single = all(c.kind == "text" or str(frame[c.name].dtype) in exact for c in plan)
    return np.float32 if single else np.float64


def plan_columns(frame, wishes: Wishes, codes: np.ndarray) -> tuple[list[FeatureColumn], list[str]]:
    """Decide how each column of a frame becomes features; return notes on every decision.

    codes: the group of each row, (rows,).
    """
    plan: list[FeatureColumn] = []
    notes: list[str] = []
    filled: list[str] = []
    for name in frame.columns:
        kind, series = _wished_kind(name, wishes), frame[name]
        if kind is None and (code := first_code(_present_texts(series))):
            kind = "text"
            notes.append(
                f"Column {name!r} read as texts, since {code!r} has a leading zero; --numeric "
                "reads it as numbers."
            )
        try:
            parsed = parse(series, wishes.decimal, kind)
        except (TypeError, ValueError) as error:
            raise ValueError(f"column {name!r} {error}") from error
        count = int(parsed.missing.sum())
        reason = None if _is_wanted(name, wishes) else _useless(name, parsed, codes, len(frame))
        if count == len(frame):
            reason = "it has no values"
        if reason:
            notes.append(f"Column {name!r} left out: {reason}.")
            continue
        column, note = _feature_column(name, parsed, count, wishes)
        plan.append(column)
        notes += [note] if note else []
        filled += [f"{name} {count}"] if count and parsed.kind != "text" else []
    if filled:
        notes.append(
            f"Missing or infinite values filled with the mean of their column, of {len(frame)} "
            f"rows: {', '.join(filled)}."
        )
    if not plan:
        raise ValueError(
            "--features must name a column: the data have none to use besides group and target; "
            + (" ".join(notes) or "--drop names all of them")
        )
    return plan, notes


def first_code(values: Sequence[Any]) -> str | None:
    """Return the first text such as 01, if all values are texts of digits.

    >>> first_code(["2139", "01001"]), first_code(["10", "0"]), first_code(["01", "1.5"])
    ('01001', None, None)
    """
    if not all(isinstance(value, str) and value.strip().isdecimal() for value in values):
        return None
    return next((text for text in values if len(text.strip()) > 1 and text.strip()[0] == "0"), None)


def _present_texts(series) -> list[Any]:
    """The distinct values of a column of objects; none of other columns, which have no texts."""
    pandas = require("pandas", "advice")
    types = pandas.api.types
    if not (types.is_object_dtype(series) or types.is_string_dtype(series)):
        return []
    try:
        return list(pandas.factorize(series.to_numpy(object))[1])
    except TypeError:  # such as lists, which `parse` refuses
        return []


def _wished_kind(name: str, wishes: Wishes) -> str | None:
    if name in wishes.numeric:
        return "number"
    return "text" if name in wishes.categorical else None


def _is_wanted(name: str, wishes: Wishes) -> bool:
    """True if the user named the column, which is then used whatever it looks like."""
    return name in (*(wishes.features or ()), *wishes.numeric, *wishes.categorical)


def _useless(name: str, parsed: Parsed, codes: np.ndarray, rows: int) -> str | None:
    """The reason to leave out a column that predicts nothing for new groups; None to use it."""
    present = parsed.values[~parsed.missing]
    if len(present) == rows and np.all(present == present[0]):
        same = _plain(present[0])
        # Numbers are read as floats: the year 2024 should not become 2024.0.
        whole = isinstance(same, float) and same.is_integer() and abs(same) < 1e15
        return f"it is {short_repr(int(same) if whole else same)} in every row"
    if _names_groups(parsed, codes):
        return "its values name the groups; a new group would have a new one"
    if parsed.kind == "text":
        if (count := len(set(present))) <= LEVELS:
            return None
        return (
            f"text of {count} values, such as {short_repr(_plain(present[0]))}; --categorical "
            f"makes columns of the {LEVELS} most frequent"
        )
    # Most columns of numbers are no integers, which is quick to see.
    if parsed.kind == "date" or not len(present) or np.any(present != np.round(present)):
        return None
    if len(present) > 2 and np.all(np.diff(present) == 1):
        return "it numbers the rows"
    distinct = len(np.unique(present))
    consecutive = np.ptp(present) + 1 < 1.1 * rows and distinct >= NEARLY_UNIQUE * len(present)
    if distinct > LEVELS and (consecutive or ID_NAME.search(name)):
        return (
            f"{distinct} whole numbers such as {present[0]:.0f} look like an identifier; --numeric "
            "uses it as a number"
        )
    return None


def _names_groups(parsed: Parsed, codes: np.ndarray) -> bool:
    """True for texts of which each belongs to one group and each group has one."""
    if parsed.kind != "text" or parsed.missing.any():
        return False
    texts, values = np.unique(parsed.values.astype(str), return_inverse=True)
    groups = int(codes.max()) + 1
    return len(texts) == groups == len(np.unique(values * groups + codes))


def _feature_column(name: str, parsed: Parsed, missing: int, wishes: Wishes):
    """The encoding of a column, and a note on it."""
    if parsed.kind == "text":
        return _text_column(name, parsed, missing, wishes)
    present = parsed.values[~parsed.missing]
    # In units of the largest value, since a sum of large ones may overflow.
    largest = float(np.abs(present).max()) or 1.0
    column = FeatureColumn(
        name, parsed.kind, fill=largest * float(np.mean(present / largest, dtype=float)),
        start=parsed.start, indicator=missing >= MANY_MISSING * len(parsed.values) and missing > 0,
        decimal=wishes.decimal,
    )  # fmt: skip
    note = f"Column {name!r}: days since {parsed.start}." if parsed.kind == "date" else None
    return column, note


def _text_column(name: str, parsed: Parsed, missing: int, wishes: Wishes):
    present = parsed.values[~parsed.missing].astype(str)
    texts, counts = np.unique(present, return_counts=True)
    # The first text has no column: with all of them, the columns would add up to one.
    first, levels, others = str(texts[0]), texts[1:], False
    note = f"Text column {name!r}: a 0/1 column for each value but {first!r}."
    if len(texts) > LEVELS:
        if name not in wishes.categorical:
            raise ValueError(
                f"--features must have at most {LEVELS} different texts a column, got {len(texts)} "
                f"in {name!r}; add --categorical {name!r} to use the {LEVELS} most frequent"
            )
        levels, others = np.sort(texts[np.argsort(-counts, kind="stable")[:LEVELS]]), True
        note = f"Text column {name!r}: a 0/1 column for each of the {LEVELS} most frequent values."
    if missing:
        note = note[:-1] + f", and one for {missing} rows without a value."
    column = FeatureColumn(
        name, "text", levels=tuple(levels.tolist()), first=first, others=others,
        indicator=missing > 0, decimal=wishes.decimal,
    )  # fmt: skip
    return column, note


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def parse(series, decimal: str = ".", kind: str | None = None, start: Any = None) -> Parsed:
    """Read a column as numbers, dates or texts.

    kind: "number" or "text" instead of what the column looks like.
    start: the day from which dates count; None: their first.

    Raises ValueError or TypeError for a mixture, complex numbers, lists, and dates whose order of
    day and month is unclear.
    """
    pandas = require("pandas", "advice")
    if isinstance(series.dtype, pandas.CategoricalDtype):
        kind = kind or "text"  # the user has said that its values are names
        series = series.astype(series.cat.categories.dtype)
    types = pandas.api.types
    if kind == "text":
        return Parsed("text", _texts(series))
    if types.is_complex_dtype(series):
        raise TypeError(f"must hold real numbers, got {_first(series)!r}; take its real part")
    if types.is_bool_dtype(series) or types.is_numeric_dtype(series):
        values = series.to_numpy(float, na_value=np.nan)
        # pandas counts only NaN as missing.
        finite = np.isfinite(values)
        return Parsed("number", values if finite.all() else np.where(finite, values, np.nan))
    if types.is_datetime64_any_dtype(series) or isinstance(series.dtype, pandas.PeriodDtype):
        return _days(pandas, series, start)
    if types.is_timedelta64_dtype(series):
        return Parsed("number", (series / pandas.Timedelta(days=1)).to_numpy(float))
    return _parsed_objects(pandas, series, decimal, kind, start)


def _parsed_objects(pandas, series, decimal: str, kind: str | None, start: Any) -> Parsed:
    """Read a column of objects, most often texts."""
    # Few distinct values stand for many rows.
    try:
        codes, distinct = pandas.factorize(series.to_numpy(object))
    except TypeError as error:
        raise TypeError(
            f"must hold numbers or texts, got {short_repr(_first(series))}; --drop leaves it out"
        ) from error
    if not len(distinct):
        return Parsed("number", np.full(len(series), np.nan))
    if kind != "number" and all(isinstance(v, datetime.date) for v in distinct):
        return _days(pandas, pandas.Series(series.to_numpy(object)), start)
    if any(isinstance(value, complex | tuple | bytes) for value in distinct):
        raise TypeError(
            f"must hold numbers or texts, got {short_repr(_first(series))}; --drop leaves it out"
        )
    numbers = np.array([number_of(value, decimal) for value in distinct])
    if np.isnan(numbers).all():  # all of them: next to plain numbers, 5% may be 0.05
        numbers = _numbers_with_unit(distinct, decimal)
    bad = np.isnan(numbers)
    rows = np.bincount(codes[codes >= 0], minlength=len(distinct))
    if kind == "number" or not bad.any():
        if bad.all():
            raise ValueError(
                f"has no numbers, its first text is {_first(series)!r}; leave out --numeric"
            )
        values = np.append(numbers, np.nan)[codes]
        return Parsed("number", np.where(np.isfinite(values), values, np.nan))
    share = rows[bad].sum() / rows.sum()
    # Mostly numbers: the texts are probably errors in the file.
    if share < 0.5:
        row = int(np.argmax(np.isin(codes, np.flatnonzero(bad))))
        text = series.iloc[row]
        raise ValueError(
            f"must be numbers or text, got the text {text!r} (data row {_row(series, row)}) in "
            f"{rows[bad].sum()} rows among numbers; --na {text!r} takes it as missing, --numeric "
            "all such texts, --categorical makes 0/1 columns"
        )
    texts = [value for value in distinct if isinstance(value, str)]
    if len(texts) == len(distinct) and all(DATE.fullmatch(text.strip()) for text in texts):
        return _dates_of_texts(pandas, codes, texts, start)
    return Parsed("text", _texts(series))


def _row(series, row: int) -> int:
    """The number of a row as in the file, from 1."""
    label = series.index[row]
    return int(label) + 1 if isinstance(label, int | np.integer) else row + 1


def _first(series) -> Any:
    present = series[series.notna()]
    return present.iloc[0] if len(present) else None


def _texts(series) -> np.ndarray:
    """The text of every value without surrounding blanks, None where it is missing."""
    codes, distinct = require("pandas", "advice").factorize(series.to_numpy(object))
    texts = [label_text(value) for value in distinct]
    stripped = [None if text is None else text.strip() for text in texts]
    return np.array([*stripped, None], object)[codes]


def _numbers_with_unit(distinct, decimal: str) -> np.ndarray:
    """Numbers such as 5% or -$1,200 without their sign, NaN for other values."""
    texts = [value if isinstance(value, str) else "" for value in distinct]
    units = {unit for text in texts for unit in UNITS if unit in text}
    # Amounts in two currencies are no numbers of one column.
    if len(units) != 1:
        return np.full(len(texts), np.nan)
    unit = re.escape(units.pop())
    around = re.compile(rf"^\s*([-+\u2212]?)\s*{unit}\s*|\s*{unit}\s*$")
    return np.array([number_of(around.sub(r"\1", text), decimal) for text in texts])


def number_of(value: Any, decimal: str = ".") -> float:
    """Return the number that a text stands for, NaN for other texts.

    >>> number_of("1,234.5"), number_of("1.234,5", ","), number_of("1 234"), number_of("12,34")
    (1234.5, 1234.5, 1234.0, nan)
    """
    if not isinstance(value, str):
        return float(value)
    text = value.strip().translate(MINUS)
    match = _number_pattern(decimal).fullmatch(text)
    if not match:
        return np.nan
    whole, rest = match.group("whole"), match.group("rest") or ""
    return float(re.sub(r"[^\d+-]", "", whole) + rest.replace(decimal, "."))


@lru_cache
def _number_pattern(decimal: str) -> re.Pattern:
    """A number with any thousands separator besides the decimal mark, each before three digits."""
    mark = re.escape(MARKS + ("," if decimal == "." else "."))
    point = re.escape(decimal)
    return re.compile(
        rf"(?=[+-]?{point}?\d)(?P<whole>[+-]?(?:\d{{1,3}}(?P<mark>[{mark}])\d{{3}}"
        rf"(?:(?P=mark)\d{{3}})*|\d*))(?P<rest>(?:{point}\d*)?(?:[eE][+-]?\d+)?)"
    )


def _dates_of_texts(pandas, codes, texts: list[str], start: Any) -> Parsed:
    """Read dates; whether 01/02/2020 starts with the day follows from other dates of the column."""
    # Dates with dots start with the day; dates that start with the year are not in question.
    orders = (True, False) if any(DAY_OR_MONTH.match(text) for text in texts) else (False,)
    readings = []
    for day_first in orders:
        try:
            found = pandas.Series([_date(pandas, text, day_first) for text in texts])
        except (ValueError, OverflowError):
            continue
        readings.append(found)
    if len(readings) == 2 and not readings[0].equals(readings[1]):
        raise ValueError(
            f"must hold dates with a clear order of day and month, got {texts[0]!r} and none that "
            "decides; write them as YEAR-MONTH-DAY, or leave the column out with --drop"
        )
    if not readings:
        return Parsed("text", np.array([*texts, None], object)[codes])
    known = pandas.concat([readings[0], pandas.Series([pandas.NaT])], ignore_index=True)
    return _days(pandas, known.iloc[codes].reset_index(drop=True), start)


def _date(pandas, text: str, day_first: bool):
    """Read one date in this order of day and month; raise ValueError for other texts."""
    if match := DAY_OR_MONTH.match(text):
        one, mark, two, year = match.groups()
        if mark == "." and not day_first:
            raise ValueError(text)
        day, month = (one, two) if day_first else (two, one)
        text = f"{year}-{month:0>2}-{day:0>2}" + text[match.end() :]
    date = pandas.Timestamp(text.strip())
    return date.tz_convert(None) if date.tzinfo is not None else date


def _days(pandas, series, start: Any) -> Parsed:
    """Days since the first date of a column of dates."""
    if isinstance(series.dtype, pandas.PeriodDtype):
        series = series.dt.start_time
    dates = pandas.to_datetime(series, utc=True, errors="raise").dt.tz_localize(None)
    start = dates.min().date() if start is None else start
    days = (dates - pandas.Timestamp(start)) / pandas.Timedelta(days=1)
    return Parsed("date", days.to_numpy(float), start)
