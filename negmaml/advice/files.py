"""Reads grouped rows from a CSV file, a Parquet file or a data frame."""

import difflib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from negmaml._core.checks import check_choice, short_repr
from negmaml._core.extras import require
from negmaml._core.paths import expanded
from negmaml.advice import textfile
from negmaml.advice.columns import (
    FeatureColumn,
    Wishes,
    encode_columns,
    number_of,
    parse,
    plan_columns,
)
from negmaml.advice.labels import label_text, unique_labels

MISSING = ("fill", "drop")
# Cells without a value in columns of numbers and of texts. Labels of groups are missing only if
# they are blank: a group may be called NA.
NO_VALUE = (
    "", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "-nan", "NULL", "null", "None", "<NA>", ".", "-",
)  # fmt: skip
TOTAL = re.compile(
    r"(grand |sub)?total|sum(me|ma)?|(ins)?gesamt(summe)?|somme|suma|mean|average|mittel(wert)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class GroupedTable:
    """Grouped rows of a file as `advise` takes them.

    Attributes:
        x: features, a data frame of numbers, (rows, features).
        y: targets, (rows,).
        groups: labels of the groups, texts, (rows,).
        notes: sentences on everything that was recognised, filled in or left out.
        plan: how each column became features.

    >>> import negmaml as nm, pandas
    >>> frame = pandas.DataFrame({"school": ["a", "a", "b"], "age": [9, 8, 9], "mark": [1, 2, 4]})
    >>> table = nm.advice.read_table(frame, group="school", target="mark")
    >>> table.x.shape, table.y.tolist(), table.groups.tolist()
    ((3, 1), [1.0, 2.0, 4.0], ['a', 'a', 'b'])
    """

    x: Any
    y: np.ndarray
    groups: np.ndarray
    notes: tuple[str, ...]
    plan: tuple[FeatureColumn, ...]

    def __repr__(self) -> str:
        """Return the sizes and the names of the features."""
        rows, groups = len(self.y), len(set(self.groups))
        features = ", ".join(map(str, self.x.columns))
        return f"GroupedTable({rows} rows in {groups} groups; features: {features})"

    def encode(self, frame: Any) -> Any:
        """Return the same features of other rows, a data frame with the columns of the file.

        Missing numbers are filled with the means of the file. A text that the file does not have
        has zeros in all of its columns, with a warning.

        Raises ValueError for a missing column.
        """
        import warnings

        for column in self.plan:
            if column.name not in frame.columns:
                raise ValueError(
                    f"frame must have the column {column.name!r} of the file, got "
                    f"{', '.join(map(str, frame.columns[:20]))}; add it, empty if it is unknown"
                )
        x, notes = encode_columns(frame, self.plan)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return x


def read_table(
    data: str | PathLike[str] | Any,
    *,
    group: str,
    target: str,
    features: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    numeric: Sequence[str] = (),
    categorical: Sequence[str] = (),
    missing: str = "fill",
    na: Sequence[str] = (),
    sep: str | None = None,
    decimal: str | None = None,
    encoding: str | None = None,
) -> GroupedTable:
    """Read grouped rows from a CSV file, a Parquet file or a data frame.

    Encoding, separator, decimal mark, thousands separators and comment lines are recognised. Texts
    become 0/1 columns and dates days. Identifiers, row numbers, constants and texts of more than 50
    values are left out, unless an option names them. Labels of groups are texts: 1 and 01 differ,
    and a group may be called NA. A column with a number such as 01 is one of texts. A last row of
    totals is left out. Rows without a label or a target are dropped.

    Arguments:
        data: path of a file, or a data frame.
        group, target: the columns of labels and of targets.
        features: the columns to predict from; None: all others.
        drop: columns to leave out.
        numeric, categorical: columns to read as numbers, or as texts.
        missing: "fill" replaces missing numbers by the mean of their column and adds a 0/1 column
            if 2% or more are missing; "drop" leaves out rows with a missing value.
        na: further texts that stand for a missing value.
        sep, decimal, encoding: of a CSV file; None: recognised.

    Raises ValueError or TypeError for a file or columns that cannot be used; the message quotes
    them and names the option of `negmaml advise` that helps, which is the argument here.

    >>> import pandas
    >>> frame = pandas.DataFrame({"school": ["1", "01", "NA"], "age": [9, 8, 9], "mark": [1, 2, 4]})
    >>> table = read_table(frame, group="school", target="mark")
    >>> table.groups.tolist(), table.x.columns.tolist()
    (['1', '01', 'NA'], ['age'])
    """
    check_choice("missing", missing, MISSING)
    if decimal not in (None, ".", ","):
        raise ValueError(f"--decimal must be . or , got {decimal!r}")
    for name, text in (("group", group), ("target", target)):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be the name of a column, got {short_repr(text)}")
    lists = {"features": features, "drop": drop, "numeric": numeric, "categorical": categorical,
             "na": na}  # fmt: skip
    for name, names in lists.items():
        if names is None and name == "features":
            continue
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise TypeError(f"{name} must be a list of texts, got {short_repr(names)}")
    if features is not None and not features:
        raise ValueError("features must name at least one column, got an empty list")
    pandas = require("pandas", "advice")
    wishes = Wishes(
        None if features is None else tuple(features), tuple(drop), tuple(numeric),
        tuple(categorical), decimal or ".",
    )  # fmt: skip
    if isinstance(data, pandas.DataFrame):
        source: Any = _FrameSource(pandas, data)
    elif not isinstance(data, str | PathLike):
        raise TypeError(f"data must be a path or a data frame, got {short_repr(data)}")
    else:
        path = expanded("data", data)
        if not path.is_file():
            raise ValueError(f"data must be a CSV or Parquet file, got no file at {str(path)!r}")
        if _is_parquet(path):
            source = _ParquetSource(path)
        else:
            source = _TextSource(pandas, path, group, target, wishes, sep, decimal, encoding)
            wishes = wishes._replace(decimal=source.format.decimal)
    names = _chosen(source.names, group, target, wishes)
    return _table(
        lambda: source.read([*names, target], group, tuple(na), wishes), names, target, wishes,
        missing, source.notes,
    )  # fmt: skip


def _is_parquet(path: Path) -> bool:
    """True for a Parquet file, by its name or its first bytes."""
    with path.open("rb") as file:
        return path.suffix.lower() in (".parquet", ".pq") or file.read(4) == b"PAR1"


class _FrameSource:
    """The columns of a data frame."""

    def __init__(self, pandas, frame):
        self.pandas, self.frame, self.notes = pandas, frame, []
        # Frames may name columns by numbers, which no option could match.
        self.names = [str(name) for name in frame.columns]
        if not len(frame):
            raise ValueError(f"data must have rows, the frame has only the columns {self.names}")

    def read(self, names: list[str], group: str, na: tuple[str, ...], wishes: Wishes):
        """Return these columns, and the label of each row or None."""
        place = [self.names.index(name) for name in (*names, group)]
        frame = self.frame.iloc[:, place[:-1]].set_axis(names, axis=1)
        labels = self.frame.iloc[:, place[-1]].to_numpy(object)
        return frame.replace(list(na), None) if na else frame, _label_texts(labels, na)


class _ParquetSource:
    """The columns of a Parquet file."""

    def __init__(self, path: Path):
        require("pyarrow", "parquet")
        import pyarrow
        from pyarrow import parquet

        try:
            self.file = parquet.ParquetFile(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ValueError(
                f"data must be a CSV or Parquet file, {str(path)!r} is not a whole Parquet file: "
                f"{error}"
            ) from error
        self.notes: list[str] = []
        # The index of pandas is a column of the file, unnamed if it had no name.
        self.names = [n for n in self.file.schema_arrow.names if not n.startswith("__index_level_")]
        if not self.file.metadata.num_rows:
            raise ValueError(
                f"data must have rows, {str(path)!r} has only the columns {self.names}"
            )

    def read(self, names: list[str], group: str, na: tuple[str, ...], wishes: Wishes):
        """Return these columns, and the label of each row or None."""
        # As distinct values: a missing label would turn large integers into floats.
        labels = self.file.read([group]).column(0).combine_chunks().dictionary_encode()
        texts = _label_texts(labels.dictionary.to_pylist(), na)
        codes = labels.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False)
        columns = _ParquetColumns(self.file, names, na, np.arange(len(codes)))
        return columns, np.array([*texts, None], object)[codes]


class _ParquetColumns:
    """A data frame whose columns are read when they are used, so that it takes no memory.

    index: the rows that are left.
    """

    def __init__(self, file, names: list[str], na: tuple[str, ...], index: np.ndarray):
        self.file, self.columns, self.na, self.index = file, names, na, index

    def __len__(self):
        return len(self.index)

    def __getitem__(self, key):
        if isinstance(key, list):
            return _ParquetColumns(self.file, key, self.na, self.index)
        if not isinstance(key, str):
            return _ParquetColumns(self.file, self.columns, self.na, self.index[key])
        series = self.file.read([key]).to_pandas(ignore_metadata=True)[key]
        series = series if len(series) == len(self) else series.iloc[self.index]
        return series.replace(list(self.na), None) if self.na else series


class _TextSource:
    """The columns of a text file."""

    def __init__(self, pandas, path: Path, group: str, target: str, wishes: Wishes, sep, decimal,
                 encoding):  # fmt: skip
        self.pandas, self.path = pandas, path
        wanted = [group, target, *(wishes.features or ())]
        ignored = {group, *wishes.drop, *wishes.categorical}
        self.format = textfile.recognise(
            path, wanted, ignored, sep=sep, decimal=decimal, encoding=encoding
        )
        self.notes = self.format.notes
        self.names = self.format.names

    def read(self, names: list[str], group: str, na: tuple[str, ...], wishes: Wishes):
        """Return these columns, and the label of each row or None."""
        given, count = self.format, 0
        texts = (group, *wishes.categorical, *{*given.codes} - {*wishes.numeric, names[-1]})
        values = {name: [*NO_VALUE, *na] for name in self.names} | {group: ["", *na]}
        # Columns that are left out may have names that occur twice, which pandas refuses.
        unique = [n if n in values and self.names.count(n) == 1 else f"{n} ({i})"
                  for i, n in enumerate(self.names)]  # fmt: skip
        # newline="": line ends within quotes are part of a text.
        with io.TextIOWrapper(textfile.open_bytes(self.path), given.encoding, newline="") as text:
            for _ in range(given.lines):
                text.readline()
            source: Any = text
            if given.has_comments:
                source, count = textfile.without_comments(text, self.names, given.separator)
            try:
                # With low_memory pandas reads in pieces and may infer another type for each.
                frame = self.pandas.read_csv(
                    source, sep=given.separator, decimal=given.decimal,
                    header=None, names=unique, index_col=False, low_memory=False,
                    keep_default_na=False, na_values={n: values.get(n, []) for n in unique},
                    dtype={n: str for n in texts if n in unique},
                    skipinitialspace=given.separator != "\t",
                )  # fmt: skip
            except (self.pandas.errors.ParserError, self.pandas.errors.EmptyDataError) as error:
                said = " ".join(str(error).split())
                raise ValueError(
                    f"data must be a table, {str(self.path)!r} is not ({said}, below line "
                    f"{given.lines}); a text with a separator needs quotes, or give --sep"
                ) from error
        if count:
            self.notes.append(f"Comment lines skipped: {count}.")
        return frame[names], _label_texts(frame[group].to_numpy(object), na)


def _label_texts(labels, na: tuple[str, ...]) -> np.ndarray:
    """The text of each label without surrounding blanks, None where it is missing."""
    # Not by distinct values, of which True and 1 would be one.
    texts = [label_text(label) for label in labels]
    stripped = [None if text is None or text in na else text.strip() for text in texts]
    return np.array(stripped, object)


def _chosen(names: list[str], group: str, target: str, wishes: Wishes) -> list[str]:
    """The columns to use as features; ValueError for a wrong choice."""
    given = {"group": [group], "target": [target], "features": list(wishes.features or ()),
             "drop": list(wishes.drop), "numeric": list(wishes.numeric),
             "categorical": list(wishes.categorical)}  # fmt: skip
    for option, asked in given.items():
        for name in asked:
            _check_column(names, f"--{option}", name)
    asked = [group, target, *given["features"]]
    if twice := [name for name in asked if asked.count(name) > 1]:
        raise ValueError(
            f"--group, --target and --features must name a column once, got {twice[0]!r} twice"
        )
    if both := set(wishes.drop) & {*asked, *wishes.numeric, *wishes.categorical}:
        raise ValueError(f"--drop must name columns that no other option does, got {min(both)!r}")
    if both := set(wishes.numeric) & set(wishes.categorical):
        raise ValueError(f"--numeric and --categorical must differ, got {min(both)!r} in both")
    unused = {group, target, "", *wishes.drop}
    used = given["features"] or [name for name in names if name not in unused]
    for name in (group, target, *used):
        if names.count(name) > 1:
            raise ValueError(
                f"data must have a name for each column, got {name!r} twice; rename, or leave both "
                "out with --drop"
            )
    return used


def _check_column(names: list[str], option: str, name: str) -> None:
    if name in names:
        return
    # Reversed, so that the first of several names that differ in case wins.
    lower = {str(n).lower(): n for n in reversed(names)}
    near = difflib.get_close_matches(name.lower(), lower, 1, 0.5)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    hint = f"did you mean {lower[near[0]]!r}?" if near else (
        f"it has {', '.join(map(str, names[:20]))}{more}"
    )  # fmt: skip
    if len(names) == 1:
        hint += "; if that is a whole line, give --sep"
    raise ValueError(f"{option} must be a column of the data, got {name!r}; {hint}")


def _table(read, names, target, wishes, missing, notes) -> GroupedTable:
    """Drop rows that cannot be used, and encode the columns."""
    # Read here, so that no caller holds the frame: its memory is free once it is encoded.
    frame, labels = read()
    y = _targets(frame[target], wishes.decimal)
    if (total := _total_row(labels, y)) is not None:
        notes.append(f"Row {labels[total]!r} left out: it sums up the other rows.")
        keep = np.arange(len(y)) != total
        frame, labels, y = frame[keep], labels[keep], y[keep]
    without = {"no label": np.array([label is None for label in labels]),
               target: ~np.isfinite(y)}  # fmt: skip
    frame, labels, y = _complete(frame, labels, y, without, "without a label or a target", notes)
    _, _, codes = unique_labels(labels, len(labels))
    plan, said = plan_columns(frame[names], wishes, codes)
    if missing == "drop":
        without = {column.name: parse(frame[column.name], column.decimal, column.kind).missing
                   for column in plan}  # fmt: skip
        frame, labels, y = _complete(
            frame, labels, y, without, "with missing or infinite values", notes
        )
        _, _, codes = unique_labels(labels, len(labels))
        plan, said = plan_columns(frame[names], wishes, codes)
    x, _ = encode_columns(frame, plan)
    return GroupedTable(x, y, labels, (*notes, *said), tuple(plan))


def _total_row(labels: np.ndarray, y: np.ndarray) -> int | None:
    """The index of a last row that sums up all others, as below an exported table; or None."""
    *others, label = labels
    # If all labels differ, so does that of a last row of data.
    if label is None or label in others or len({*others}) == len(others):
        return None
    total = y[:-1][np.isfinite(y[:-1])].sum()
    is_total = TOTAL.fullmatch(label) or (y[-1] != 0 and np.isclose(y[-1], total, 1e-6, 0))
    return len(y) - 1 if is_total else None


def _targets(series, decimal: str) -> np.ndarray:
    try:
        parsed = parse(series, decimal)
    except (TypeError, ValueError) as error:
        said = str(error).split("; ")[0]
        raise ValueError(
            f"--target column {series.name!r} {said}; --na takes a text as missing"
        ) from error
    if parsed.kind == "text":
        text = next((value for value in parsed.values if value is not None), None)
        other = "," if decimal == "." else "."
        other = other if np.isfinite(number_of(text, other)) else ""
        raise ValueError(
            f"--target must be a column of numbers, got {series.name!r} with the text {text!r}; "
            + (
                f"--decimal {other} reads it"
                if other
                else "encode it first, for example as 0 and 1"
            )
        )
    return parsed.values


def _complete(frame, labels, y, without: dict[str, np.ndarray], said: str, notes: list[str]):
    """The rows in which nothing is missing; a note on the others."""
    lost = np.logical_or.reduce([*without.values()])
    count = int(lost.sum())
    if not count:
        return frame, labels, y
    where = ", ".join(f"{name} {int(rows.sum())}" for name, rows in without.items() if rows.any())
    notes.append(f"Rows {said} dropped: {count} of {len(frame)} ({where}).")
    if count == len(frame):
        raise ValueError(
            f"data must have rows with a label, a target and the columns used, all have some value "
            f"missing ({where})"
        )
    return frame[~lost], labels[~lost], y[~lost]
