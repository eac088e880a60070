"""The command `advise`: rates and a ridge for a table of grouped rows, and their gain."""

import csv
import threading
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from negmaml._core import plotting
from negmaml._core.display import printable
from negmaml._core.extras import require
from negmaml._core.keys import key_of
from negmaml.advice import advise as advise_rows
from negmaml.advice.files import GroupedTable, read_table
from negmaml.cli.output import TALKS, Output, json_text, say, writable_folder

QUICK = 20  # splits with --quick

Table = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]


def advise(
    data: Table,
    group: str,
    target: str,
    features: str | None = None,
    drop: str | None = None,
    numeric: str | None = None,
    categorical: str | None = None,
    missing: str = "fill",
    na: str | None = None,
    sep: str | None = None,
    decimal: str | None = None,
    encoding: str | None = None,
    n_t: int | None = None,
    n_v: int | None = None,
    n_r: int | None = None,
    m: int | None = None,
    standardise: bool = True,
    out: Path = Path("advice"),
    seed: int = 0,
    splits: int | None = None,
    quick: bool = False,
    theory: bool = True,
    output: Output = TALKS,
) -> int:
    """Advise inner rates and a ridge for a table of grouped rows.

    The format of the file and the kind of each column are recognised; every decision is printed.

    Args:
        data: a CSV or Parquet file.
        group: the column that names each row's group.
        target: the column to predict.
        features: comma-separated columns to predict from; by default all other columns.
        drop: comma-separated columns to leave out.
        numeric: comma-separated columns to read as numbers.
        categorical: comma-separated columns to read as texts, a 0/1 column for each value.
        missing: fill puts the mean in place of missing numbers; drop leaves out their rows.
        na: comma-separated texts that stand for a missing value, besides NA and the like.
        sep: separator of a CSV file: one character, or tab, comma, semicolon, bar, space.
        decimal: decimal mark of a CSV file: a point or a comma.
        encoding: encoding of a CSV file, such as utf-8 or cp1252.
        n_t: support rows of a training group; the default depends on the sizes of the groups.
        n_v: query rows of a training group.
        n_r: rows on which a new group adapts.
        m: groups in meta-training; by default half of them.
        standardise: divide features and target by their standard deviations.
        out: folder for advice.png, .svg, .nc, .txt, .html and .json; made if missing.
        seed: seed of all random numbers.
        splits: number of random splits of the groups.
        quick: 20 splits and no theory.
        theory: whether to compare with the theory, also at other sizes.
        output: the form of the output.
    """
    # Before the work: a folder that cannot be written should not cost the result.
    with writable_folder(out, "advice") as folder:
        # A daemon, so that an error in the data ends the command without waiting for imports.
        imports = threading.Thread(target=_import_figures, daemon=True)
        # Imports take about a second, and the splits do not need them.
        imports.start()
        with output.progress("advise", "splits") as progress:
            progress.stage("reading")
            table = read_table(
                data, group=group, target=target, features=_names("features", features),
                drop=_names("drop", drop) or (), numeric=_names("numeric", numeric) or (),
                categorical=_names("categorical", categorical) or (), missing=missing,
                na=_names("na", na) or (), sep=sep, decimal=decimal, encoding=encoding,
            )  # fmt: skip
            for note in table.notes:
                output.note(note)
            progress.stage("splitting")
            series = require("pandas", "advice").Series  # the report names the target
            advice = advise_rows(
                table.x, series(table.y, name=target), table.groups,
                n_t=n_t, n_v=n_v, n_r=n_r, m=m,
                standardise=standardise, key=key_of(seed),
                splits=QUICK if quick and splits is None else splits,
                progress=progress,
            )  # fmt: skip
            progress.stage("drawing")
            imports.join()
            paths, report, record = _saved(advice, table, folder, theory and not quick)
    say(record if output.json else report)
    output.written(paths)
    return 0


def _names(option: str, text: str | None) -> list[str] | None:
    """The names in a list with commas; names with a comma stand in double quotes."""
    if text is None:
        return None
    names = [name.strip() for name in next(csv.reader([text], skipinitialspace=True), [])]
    if not names or not all(names):
        raise ValueError(f"--{option} must be names separated by commas, got {text!r}")
    return names


def _saved(advice, table: GroupedTable, out: Path, theory: bool) -> tuple[list[Path], str, str]:
    """Write all files; return their paths, the report, and the record as JSON."""
    report = advice.report(theory=theory)
    paths = plotting.save(advice.plot(theory=theory), out, "advice")
    stored, said, page, recorded = (
        out / f"advice.{kind}" for kind in ("nc", "txt", "html", "json")
    )
    with plotting.atomic_write(stored) as partial:
        losses = advice.table
        if theory:
            losses = losses.assign(theory_loss=("train_rate", advice.theory.loss))
        # The engine of SciPy needs no C library of netCDF.
        losses.to_netcdf(partial, engine="scipy")
    with plotting.atomic_write(said) as partial:
        text = printable("\n".join([*table.notes, "", report])).lstrip()
        partial.write_text(text, encoding="utf-8")
    with plotting.atomic_write(page) as partial:
        notes = (*(note.rstrip(".") for note in table.notes), *advice.notes)
        html = replace(advice, notes=notes).report(theory=theory, format="html")
        partial.write_text(html, encoding="utf-8")
    paths += [stored, said, page, recorded]
    record = json_text(_record(advice, table, paths))
    with plotting.atomic_write(recorded) as partial:
        partial.write_text(record + "\n", encoding="utf-8")
    return paths, report, record


def _record(advice, table: GroupedTable, paths: list[Path]) -> dict:
    """The result in plain numbers and texts."""
    return {
        "recommended": advice.recommended,
        "settings": advice.settings(),
        "rmse": dict(advice.rmse),
        "rmse_gain": {
            name: gain._asdict() | {"significant": gain.significant}
            for name, gain in advice.rmse_gain.items()
        },
        "explained_variance": dict(advice.explained_variance),
        "train_rate": advice.train_rate,
        "train_rate_interval": list(advice.train_rate_interval),
        "adapt_rate": advice.adapt_rate,
        "meta_ridge": advice.meta_ridge,
        "unit": advice.unit,
        "unit_size": advice.unit_size,
        "significantly_better": advice.significantly_better,
        "loss": dict(advice.loss),
        "gain": {
            name: gain._asdict() | {"significant": gain.significant}
            for name, gain in advice.gain.items()
        },
        "sizes": advice.sizes._asdict(),
        "groups": advice.data.groups,
        "rows": len(advice.data.x),
        "features": list(advice.data.names),
        "notes": [*table.notes, *advice.notes],
        "files": [str(path) for path in paths],
    }


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
