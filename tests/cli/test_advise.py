"""The command advise: a table in, files and a report out; bad tables are one clear line."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from tests.advice.conftest import grouped_rows
from tests.internals import advise as command
from tests.internals import main as cli


@pytest.fixture(scope="module")
def table():
    x, y, groups = grouped_rows(groups=16, rows=10, p=2)
    sex = np.where(np.arange(len(y)) % 2 == 0, "girl", "boy")
    columns = {"school": groups, "ses": x[:, 0], "size": x[:, 1], "sex": sex, "score": y}
    return pd.DataFrame(columns | {"row": np.arange(len(y))})


def saved(table, folder, name="data.csv"):
    path = folder / name
    table.to_parquet(path) if name.endswith("parquet") else table.to_csv(path, index=False)
    return str(path)


def advise(path, *options, out):
    arguments = ["advise", path, "--group", "school", "--target", "score", "--out", str(out)]
    return cli.run([*arguments, *options])


def test_report_figure_and_data_are_written(table, tmp_path, capsys):
    assert advise(saved(table, tmp_path), "--quick", out=tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "Column 'row' left out: it numbers the rows." in said
    assert "Text column 'sex': a 0/1 column for each value but 'boy'." in said
    assert "Use training rate" in said
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"advice.png", "advice.svg", "advice.nc", "advice.txt"}
    stored = xr.open_dataset(tmp_path / "out" / "advice.nc", engine="scipy")
    assert stored.attrs["features"] == "ses, size, sex_girl"
    assert stored.attrs["groups"] == 16


def test_parquet_gives_what_csv_gives_and_missing_values_are_counted(table, tmp_path):
    holes = table.copy()
    holes.loc[[3, 5], "ses"] = np.nan
    holes.loc[5, "size"] = np.inf
    for name in ("data.csv", "data.parquet"):
        path = tmp_path / name
        saved(holes, tmp_path, name)
        x, y, groups, notes = command.read(path, "school", "score", "ses,size")
        assert len(x) == len(y) == len(groups) == 158
        assert any("dropped: 2 of 160 (ses 2, size 1)" in note for note in notes)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, ["--features", "sess"], "got 'sess'; did you mean 'ses'?"),
        ({}, ["--group", "School"], "did you mean 'school'?"),
        ({}, ["--features", "nothing-like-it"], "it has school, ses"),
        ({}, ["--features", "ses,ses"], "each once"),
        ({}, ["--target", "sex"], "--target must be a column of numbers"),
        ({"ses": lambda t: np.where(t.index == 4, "n/k", t.ses.astype(str))}, [],
         "got the text 'n/k' (data row 5)"),
        ({"school": lambda t: 1}, [], "at least 4"),
        ({"school": lambda t: t.index}, [], "at least 4"),
        ({"score": lambda t: 2.0}, [], "y must vary"),
        ({"ses": lambda t: np.nan}, [], "all have some"),
        ({"sex": lambda t: t.index.astype(str) + "x"}, ["--features", "sex"], "at most 50"),
        ({}, ["--n-t", "9", "--n-v", "9"], "at least 4 of 18 rows"),
        ({}, ["--m", "99"], "m must be at most"),
        ({"sex_girl": lambda t: t.ses}, [], "got 'sex_girl' twice"),
    ],
)  # fmt: skip
def test_bad_tables_are_one_clear_line(table, tmp_path, capsys, change, options, message):
    changed = table.assign(**change)
    if "--group" in options or "--target" in options:
        path = saved(changed, tmp_path)
        name = options[0]
        rest = ["--target", "score"] if name == "--group" else ["--group", "school"]
        status = cli.run(["advise", path, *options, *rest, "--out", str(tmp_path / "out")])
    else:
        status = advise(saved(changed, tmp_path), *options, out=tmp_path / "out")
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


def test_missing_files_and_closed_folders_are_refused(table, tmp_path, capsys):
    assert advise(str(tmp_path / "none.csv"), out=tmp_path / "out") == 2
    assert "found none at" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert advise(saved(table, tmp_path), out=tmp_path / "file") == 2
    assert "--out must be a folder that can be written" in capsys.readouterr().err
    (tmp_path / "empty.csv").write_text("")
    assert advise(str(tmp_path / "empty.csv"), out=tmp_path / "out") == 2


def test_columns_of_one_name_are_refused_and_numbers_name_columns(table, tmp_path, monkeypatch):
    twice = table.set_axis(["school", "ses", "ses", "sex", "score", "row"], axis=1)
    monkeypatch.setattr(pd, "read_parquet", lambda path: twice)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(ValueError, match="data must have a name for each column, got 'ses' twice"):
        command.read(tmp_path / "x.parquet", "school", "score", None)
    numbered = table.set_axis(range(6), axis=1)
    monkeypatch.setattr(pd, "read_parquet", lambda path: numbered)
    x, y, _, _ = command.read(tmp_path / "x.parquet", "0", "4", "1,2")
    assert list(x.columns) == ["1", "2"] and len(y) == 160
