"""Texts of users are printed as they are: no markup, no emoji codes, no control of the terminal.

And every path on the command line may begin with the folder of a user.
"""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import negmaml as nm
from tests.advice.conftest import grouped_rows
from tests.helpers import mostly_slow
from tests.internals import figures, output, paper, plotting
from tests.internals import main as cli

MARKUP = ["[/b]", "[red]", "[bold]x[/bold]", "[link=http://a]b", "[/]", ":cat:", "[b", "$x$",
          "\\[b]"]  # fmt: skip
ESCAPES = ["\x1b[31mred", "\x1b]0;title\x07", "a\rb", "a\x9bb", "a\u202eb"]
FUNCTION = """
def values(key, a, kind):
    return {NAME: a * (1.0 if kind == "one" else 2.0)}
"""


def short_repr(text):
    """As a terminal gets it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def assert_printed(text, capsys):
    """A text appears as it is, with its control characters spelled out, on any number of lines."""
    out, err = capsys.readouterr()
    assert short_repr(text) in "".join((out + err).split("\n")).replace("│", "").replace(" ", "")
    assert all(c.isprintable() or c == "\n" for c in out + err)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def stored(path, name="y"):
    def function(key, a, b):
        return {name: a * b}

    nm.sweep(function, {"a": [1.0, 2.0], "b": [0.5, 1.0]}, 2, store=path)


@pytest.mark.parametrize("name", mostly_slow([*MARKUP, *ESCAPES], 0, 1, len(MARKUP)))
def test_a_store_of_any_name_is_looked_at_merged_and_drawn(name, folder, capsys):
    store = f"{name}x.zarr".replace("://", "~")  # which would be a URL
    stored(f"./{store}", "[bold]y$")
    for command in (["status", store], ["merge", store, "--store", f"m{store}"]):
        assert cli.run(command) == 0, capsys.readouterr().err
        assert_printed(store, capsys)
    assert cli.run(["curves", store, "--x", "a", "--hue", "b"]) == 0
    assert_printed(f"{store.removesuffix('.zarr')}-curves.png", capsys)
    assert cli.run(["status", f"none{store}"]) == 2
    assert capsys.readouterr().err.count("\x1b") == 0


@pytest.mark.parametrize("name", ["[/b]", "\x1b[31m"])
def test_folders_and_files_may_have_any_name(name, folder, capsys):
    stored(f"{name}/x.zarr")
    assert cli.run(["status", f"{name}/x.zarr"]) == 0
    assert_printed(f"{name}/x.zarr", capsys)
    assert cli.run(["heatmap", f"{name}/x.zarr", "--x", "a", "--y", "b", "--out", f"{name}/m"]) == 0
    assert_printed(f"{name}/m.png", capsys)
    assert cli.run(["sweep", f"{name}/none.toml", "--dry-run"]) == 2
    assert capsys.readouterr().err.count("\x1b") == 0


@pytest.mark.parametrize("name", mostly_slow(["[bold]y", "$y", ":cat:", "[]"], 0, 1))
def test_a_sweep_prints_and_draws_outputs_and_functions_of_any_name(
    name, folder, capsys, monkeypatch
):
    module = f"markup_{abs(hash(name))}"
    (folder / f"{module}.py").write_text(FUNCTION.replace("NAME", repr(name)))
    monkeypatch.syspath_prepend(str(folder))
    (folder / "spec.toml").write_text(
        f'function = "{module}:values"\nseeds = 2\n[grid]\na = [1.0, 2.0]\nkind = ["one", "[/b]"]\n'
    )
    command = ["sweep", "spec.toml", "--dry-run"]
    assert cli.run(command) == 0
    assert_printed(f"result{name}", capsys)
    if ":" in name:  # a name for memory only
        return
    assert cli.run(["sweep", "~/spec.toml", "--store", "~/x.zarr"]) == 0
    assert_printed(f"{name},mean", capsys)
    drawing = ["curves", "~/x.zarr", "--x", "a", "--hue", "kind", "--value", name, "--out", "~/c"]
    assert cli.run(drawing) == 0
    svg = (folder / "c.svg").read_text()
    assert name in svg and "kind = [/b]" in svg
    assert not (folder / "~").exists()


def test_what_workers_say_of_themselves_cannot_steer_a_terminal(folder, capsys):
    stored("x.zarr")
    (folder / ".x.zarr.workers").mkdir()
    text = "1/2 | 3 | 1.000 | [/b]\x1b[31m:cat: on a machine"
    (folder / ".x.zarr.workers" / "worker-1").write_text(text)
    assert cli.run(["status", "x.zarr"]) == 0
    assert_printed("[/b]\x1b[31m:cat:", capsys)
    assert "\x1b" not in repr(nm.sweeps.status("x.zarr"))


COLUMNS = ["[/bold]", "[red]", ":cat:", "a\x1b[31m"]


def test_a_table_with_columns_of_any_name_is_advised_on(folder, capsys):
    x, y, groups = grouped_rows(groups=16, rows=10, p=2)
    kind = np.where(np.arange(len(y)) % 2 == 0, "[/b]", "[/i]")
    number = np.arange(len(y))
    data = dict(zip(COLUMNS, (groups, x[:, 0], kind, x[:, 1]), strict=True))
    data |= {"[link=a]": np.where(number == 3, np.nan, y), "[/row]": number, "[/one]": 1.0}
    pd.DataFrame(data).to_csv("[b].csv", index=False)
    command = ["advise", "~/[b].csv", "--group", "[/bold]", "--out", "~/[/]o", "--target"]
    assert cli.run([*command, "[link=a]", "--quick"]) == 0
    out = capsys.readouterr().out
    for text in ("'[/row]' left out", "':cat:': a 0/1 column for each value but '[/b]'",
                 "160 ([link=a] 1)", "'[/one]' left out", "[/]o/advice.png"):  # fmt: skip
        assert text in out
    assert "\x1b" not in out
    assert (folder / "[" / "]o" / "advice.txt").read_text().count("\x1b") == 0
    assert cli.run([*command, "[link=b]"]) == 2
    err = capsys.readouterr().err
    assert "did you mean '[link=a]'" in err
    assert cli.run([*command, "nothing-like-it"]) == 2
    err = capsys.readouterr().err
    assert "[/bold], [red], :cat:, a\\x1b[31m" in err and "\x1b" not in err


PANEL = SimpleNamespace(theory=np.ones(2), mean=np.ones(2), found=0.1, found_error=0.01,
                        predicted=0.1)  # fmt: skip


@pytest.mark.parametrize("command", ["reproduce", "phases", "gain-map"])
def test_commands_of_figures_write_into_any_folder(command, folder, capsys, monkeypatch):
    """The computations are replaced by constants."""
    from tests.internals import gain_map as payoff
    from tests.internals import netcdf
    from tests.internals import paper_phases as phases

    def save(figure, out, stem):
        (out / f"{stem}.png").touch()
        return [out / f"{stem}.png"]

    maps = {f"{what}_{name}": (("ridge",), np.ones(2))
            for what in ("over_zero", "over_same") for name in ("noise", "data")}  # fmt: skip
    nothing = {name: ((), np.zeros(())) for name in ("best_by_data", "best_by_noise")}
    results = [("[/b]", {"a": PANEL, "b": PANEL})]
    monkeypatch.setattr(paper, "experiments", lambda *_: results)
    monkeypatch.setattr(paper, "PROBLEMS", {"[/b]": nm.MixedLinearRegression(4, 2, 3, 2, 3, 1, 1)})
    monkeypatch.setattr(paper, "_write", lambda _, out, *__: save(None, out, "reproduction"))
    monkeypatch.setattr(phases, "contents", lambda *_: (nothing, {}))
    monkeypatch.setattr(payoff, "payoff", lambda *_: xr.Dataset(maps, {"ridge": ["none", "best"]}))
    monkeypatch.setattr(netcdf, "write", lambda path, *_: path.touch())
    monkeypatch.setattr(plotting, "save", save)
    for drawing in ("phases", "payoff"):
        monkeypatch.setattr(figures, drawing, lambda *_: None)
    for out in ("~/a", "[/b]:cat:", "\x1b[31m"):
        assert cli.run([command, f"--out={out}"]) == 0
        assert_printed(f"{out.replace('~', str(folder))}/", capsys)
    assert list((folder / "a").iterdir()) and not (folder / "~").exists()


def test_tables_and_lines_have_no_markup_in_any_part(capsys):
    for text in [*MARKUP, *ESCAPES]:
        output.say(text)
        output.print_table((text, "b"), [(text, text)], text, short_repr(text))
        out = capsys.readouterr().out
        assert out.count(short_repr(text)) == 6
        assert all(c.isprintable() or c == "\n" for c in out)


@pytest.mark.parametrize("name", [*MARKUP, *ESCAPES])
def test_errors_of_any_text_are_printed_as_they_are(name, capsys, monkeypatch):
    def fail():
        raise ValueError(f"got {name}")

    monkeypatch.setattr(cli, "_command", lambda _: fail)
    assert cli.run(["info"]) == 2
    assert capsys.readouterr().err == f"negmaml: got {short_repr(name)}\n"


@pytest.mark.parametrize("name", ["[/b]", "\x1b[31m"])
def test_unknown_options_of_any_name_end_as_others_do(name):
    assert cli.run([name]) == 2
    for arguments in (["status", "x", f"--{name}", name], ["predict", "--p", name]):
        assert cli.run(arguments) == 2
