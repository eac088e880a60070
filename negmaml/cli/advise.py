"""The command `advise`: rates and a ridge for a table of grouped rows, and their gain."""

import difflib
import threading
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from negmaml._core.display import printable
from negmaml._core.extras import require
from negmaml._core.keys import key_of
from negmaml._core.paths import expanded
from negmaml.advice import advise as advise_rows
from negmaml.cli.output import check_writable, console, say, say_written
from negmaml.paper import figures

LEVELS = 50  # a text column with more distinct values does not become 0/1 columns
QUICK = 20  # splits with --quick

Table = Annotated[Path, tyro.conf.Positional]


def advise(
    data: Table,
    group: str,
    target: str,
    features: str | None = None,
    n_t: int | None = None,
    n_v: int | None = None,
    n_r: int | None = None,
    m: int | None = None,
    standardise: bool = False,
    out: Path = Path("advice"),
    seed: int = 0,
    splits: int | None = None,
    quick: bool = False,
    theory: bool = True,
) -> int:
    """Advise inner rates and a ridge for a table of grouped rows.

    Args:
        data: a CSV or Parquet file.
        group: the column that names each row's group.
        target: the column to predict.
        features: comma-separated columns to predict from; by default all other columns.
        n_t: support rows of a training group; the default depends on the sizes of the groups.
        n_v: query rows of a training group.
        n_r: rows on which a new group adapts.
        m: groups in meta-training; by default half of them.
        standardise: divide features and target by their standard deviations.
        out: folder for advice.png, .svg, .nc and .txt; made if missing.
        seed: seed of all random numbers.
        splits: number of random splits of the groups.
        quick: 20 splits and no theory.
        theory: whether to compare with the theory, also at other sizes.
    """
    # Before the work: a folder that cannot be written should not cost the result.
    out = check_writable(out, "advice")
    # A daemon, so that an error in the data ends the command without waiting for imports.
    imports = threading.Thread(target=_import_figures, daemon=True)
    # Imports take about a second, and the splits do not need them.
    imports.start()
    x, y, groups, notes = read(data, group, target, features)
    for note in notes:
        say(note)
    columns = TextColumn("{task.description:<9}"), BarColumn(), TimeElapsedColumn()
    # The console of all other output, or lines and the bar would overwrite each other.
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("splitting", total=None)
        advice = advise_rows(
            x, y, groups, n_t=n_t, n_v=n_v, n_r=n_r, m=m, standardise=standardise,
            key=key_of(seed), splits=QUICK if quick and splits is None else splits,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )  # fmt: skip
        progress.update(bar, description="drawing")
        theory = theory and not quick
        table = advice.table
        if theory:
            table = table.assign(theory_loss=("train_rate", advice.theory.loss))
        imports.join()
        paths = figures.save(advice.plot(theory=theory), out, "advice")
        paths += _write(table, advice.report(theory=theory), out, notes)
    say(advice.report(theory=theory))
    say_written(paths)
    return 0


def _import_figures() -> None:
    """Import the modules for drawing and storing in a thread, while the work runs.

    A missing module raises its error later, where it is used.
    """
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
        import scipy.io  # noqa: F401
        import xarray  # noqa: F401
    except ModuleNotFoundError:
        pass


def _write(table, report: str, out: Path, notes: list[str]) -> list[Path]:
    stored, said = out / "advice.nc", out / "advice.txt"
    with figures.atomic_write(stored) as partial:
        # The engine of SciPy needs no C library of netCDF.
        table.to_netcdf(partial, engine="scipy")
    with figures.atomic_write(said) as partial:
        partial.write_text(printable("\n".join([*notes, "", report])).lstrip())
    return [stored, said]


def read(path: Path, group: str, target: str, features: str | None):
    """Features, targets, groups and notes of a file.

    Text becomes 0/1 columns, one for each value but the first. Rows with a missing or infinite
    value in a used column are dropped and counted.

    Raises ValueError for a missing column, for text among the numbers of a column or in the target,
    and for text columns of more than 50 values.
    """
    pandas = require("pandas", "advice")
    frame = _opened(pandas, path)
    # Parquet files may name columns by numbers, which no option could match.
    frame.columns = [str(name) for name in frame.columns]
    _check_distinct(frame, "data")
    given = [name.strip() for name in features.split(",")] if features is not None else None
    for option, names in (("group", [group]), ("target", [target]), ("features", given or [])):
        for name in names:
            _check_column(frame, option, name)
    if len({group, target, *(given or [])}) < 2 + len(given or []):
        raise ValueError("--group, --target and --features must name different columns, each once")
    notes: list[str] = []
    used = given or _others(pandas, frame, {group, target}, notes)
    # Only columns in use count: a gap elsewhere is no reason to drop a row.
    frame = _complete(pandas, frame, [group, target, *used], notes)
    y = _numeric(pandas, frame, target)
    if y is None:
        raise ValueError(
            f"--target must be a column of numbers, got {target!r} with the text "
            f"{frame[target].iloc[0]!r}; encode it first"
        )
    x = pandas.concat([_encoded(pandas, frame, name, notes) for name in used], axis=1)
    # Again, since a new 0/1 column may have the name of an old one.
    _check_distinct(x, "features (texts become columns NAME_VALUE)")
    return x, y.to_numpy(float), frame[group].to_numpy(), notes


def _opened(pandas, path: Path):
    path = expanded("data", path)
    if not path.is_file():
        raise ValueError(f"data must be a CSV or Parquet file, found none at {str(path)!r}")
    if path.suffix.lower() in (".parquet", ".pq"):
        require("pyarrow", "advice")
        return pandas.read_parquet(path)
    try:
        # With low_memory pandas reads in pieces and may infer another type for each.
        frame = pandas.read_csv(path, low_memory=False)
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data must be a CSV or Parquet file, {str(path)!r} is not: {error}"
        ) from error
    if frame.empty:
        raise ValueError(f"data must have rows, {str(path)!r} has none")
    return frame


def _check_distinct(frame, what: str) -> None:
    """Raise ValueError for two columns with the same name."""
    twice = frame.columns[frame.columns.duplicated()]
    if len(twice):
        raise ValueError(f"{what} must have a name for each column, got {twice[0]!r} twice; rename")


def _check_column(frame, option: str, name: str) -> None:
    if name in frame.columns:
        return
    names = [str(column) for column in frame.columns]
    # Reversed, so that the first of several names that differ in case wins.
    lower = {n.lower(): n for n in reversed(names)}
    near = difflib.get_close_matches(name.lower(), lower, 1, 0.5)
    hint = f"did you mean {lower[near[0]]!r}?" if near else f"it has {', '.join(names)}"
    raise ValueError(f"--{option} must be a column of the data, got {name!r}; {hint}")


def _others(pandas, frame, taken: set[str], notes: list[str]) -> list[str]:
    """All other columns, without row numbers and text columns of many values."""
    used = []
    for name in frame.columns.difference(list(taken), sort=False):
        values = frame[name]
        if (
            # A column that counts up by one is an index that was saved with the data.
            pandas.api.types.is_integer_dtype(values)
            and len(values) > 1
            and values.diff()[1:].eq(1).all()
        ):
            notes.append(f"Column {name!r} left out: it numbers the rows.")
        elif (
            _is_text(pandas, values)
            and _numeric(pandas, frame, name) is None
            and values.nunique() > LEVELS
        ):
            notes.append(f"Column {name!r} left out: text of {values.nunique()} values.")
        else:
            used.append(name)
    if not used:
        raise ValueError("--features must name a column: the data have none but group and target")
    return used


def _complete(pandas, frame, names: list[str], notes: list[str]):
    """The rows without missing or infinite values in these columns."""
    # pandas counts only NaN as missing.
    frame = frame[names].replace([np.inf, -np.inf], np.nan)
    missing = frame.isna()
    count = int(missing.any(axis=1).sum())
    if count:
        where = ", ".join(f"{name} {n}" for name, n in missing.sum().items() if n)
        notes.append(
            f"Rows with missing or infinite values dropped: {count} of {len(frame)} ({where})."
        )
    if count == len(frame):
        raise ValueError(
            "data must have rows without missing values in the columns used, all have some"
        )
    return frame[~missing.any(axis=1)]


def _is_text(pandas, values) -> bool:
    return not (pandas.api.types.is_numeric_dtype(values) or pandas.api.types.is_bool_dtype(values))


def _numeric(pandas, frame, name: str):
    """The column as numbers; None if it is text, ValueError if it is a mixture."""
    values = frame[name]
    if not _is_text(pandas, values):
        return values.astype(float)
    # CSV files often hold numbers in a column that pandas reads as text.
    read = pandas.to_numeric(values.astype(str), errors="coerce")
    bad = read.isna() & values.notna()
    if not bad.any():
        return read
    # Mostly numbers: the texts are probably errors in the file.
    if bad.mean() < 0.5:
        row = int(np.argmax(bad))
        raise ValueError(
            f"column {name!r} must be numbers or text, got the text {values.iloc[row]!r} (data row "
            f"{frame.index[row] + 1}) in {int(bad.sum())} rows among numbers; correct or remove it"
        )
    return None


def _encoded(pandas, frame, name: str, notes: list[str]) -> Any:
    """A column as numbers, or as 0/1 columns."""
    numbers = _numeric(pandas, frame, name)
    if numbers is not None:
        return numbers.to_frame(name)
    if frame[name].nunique() > LEVELS:
        raise ValueError(
            f"--features must have at most {LEVELS} different texts a column, got "
            f"{frame[name].nunique()} in {name!r}; leave it out or merge some"
        )
    # The first value has no column: with all of them, the columns would add up to one.
    columns = pandas.get_dummies(frame[name].astype(str), prefix=name, drop_first=True, dtype=float)
    first = sorted(frame[name].astype(str).unique())[0]
    notes.append(f"Text column {name!r}: a 0/1 column for each value but {first!r}.")
    return columns
