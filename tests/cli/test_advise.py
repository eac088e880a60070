"""The command advise: a table in, files and a report out; bad tables are one clear line."""

import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from tests.advice.conftest import grouped_rows
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
    assert "Use " in said and "explains" in said
    names = {path.name for path in (tmp_path / "out").iterdir()}
    kinds = ("png", "svg", "nc", "txt", "html", "json")
    assert names == {f"advice.{kind}" for kind in kinds}
    assert "predicts score with an RMSE of" in (tmp_path / "out" / "advice.html").read_text()
    stored = xr.open_dataset(tmp_path / "out" / "advice.nc", engine="scipy")
    assert stored.attrs["features"] == "ses, size, sex_girl"
    assert stored.attrs["groups"] == 16


def test_json_is_all_that_is_printed_for_a_script_and_quiet_leaves_notes_out(
    table, tmp_path, capsys
):
    path = saved(table.assign(big=1e9 * table.ses), tmp_path)
    assert advise(path, "--quick", "--json", "--features", "ses,big", out=tmp_path / "out") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "advice.json").read_text())
    assert printed["groups"] == 16 and printed["features"] == ["ses", "big"]
    assert printed["rmse_gain"]["shared rate"]["value"] > 0
    assert printed["gain"]["shared rate"]["low"] < printed["gain"]["shared rate"]["high"]
    assert printed["recommended"] in printed["rmse"]
    assert 0.1 < printed["unit_size"] < 1  # standardised, so no rate is tiny
    assert advise(path, "--quick", "--quiet", out=tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "left out" not in said and "Use " in said


def test_names_of_columns_may_hold_commas(table, tmp_path):
    named = table.rename(columns={"ses": "a, b"})
    options = ["--features", '"a, b",size', "--quick", "--no-standardise", "--json"]
    assert advise(saved(named, tmp_path), *options, out=tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, ["--features", "sess"], "got 'sess'; did you mean 'ses'?"),
        ({}, ["--group", "School"], "did you mean 'school'?"),
        ({}, ["--features", "nothing-like-it"], "it has school, ses"),
        ({}, ["--features", "ses,ses"], "got 'ses' twice"),
        ({}, ["--target", "sex"], "--target must be a column of numbers"),
        ({"ses": lambda t: np.where(t.index == 4, "n/k", t.ses.astype(str))}, [],
         "got the text 'n/k' (data row 5)"),
        ({"school": lambda t: 1}, [], "at least 4"),
        ({"school": lambda t: t.index}, [], "at least 4"),
        ({"score": lambda t: 2.0}, [], "y must vary"),
        ({"ses": lambda t: np.nan}, ["--missing", "drop", "--drop", "size,sex,row"], "no values"),
        ({}, ["--drop", "ses,,size"], "--drop must be names separated by commas, got 'ses,,size'"),
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
    assert not (tmp_path / "out").exists()


def test_missing_files_and_closed_folders_are_refused(table, tmp_path, capsys):
    assert advise(str(tmp_path / "none.csv"), out=tmp_path / "out") == 2
    assert "got no file at" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert advise(saved(table, tmp_path), out=tmp_path / "file") == 2
    assert "--out must be a folder that can be written" in capsys.readouterr().err
    (tmp_path / "kept").mkdir()
    for out in ("new/folder", "kept"):
        (tmp_path / "empty.csv").write_text("")
        assert advise(str(tmp_path / "empty.csv"), out=tmp_path / out) == 2
    assert not (tmp_path / "new").exists() and (tmp_path / "kept").exists()
