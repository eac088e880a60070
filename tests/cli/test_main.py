"""The command line: exit status, output, and failures that leave no files."""

import importlib
import subprocess
import sys

import pytest

import negmaml as nm
from tests.internals import main as cli
from tests.internals import paper


def test_info_names_versions_and_devices(capsys):
    assert cli.run(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("jax", "devices", "dtype", "precision"):
        assert word in printed


def test_predict_takes_negative_rates_in_any_notation(capsys):
    assert cli.run(["predict", "--train-rate", "-1e-3", "--adapt-rate", "-0.2"]) == 0
    assert "-0.001" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["predict", "--sigma", "-1"], "sigma"),
        (["predict", "--p", "0"], "p must be"),
        (["predict", "--m", "30"], "p = n_v m"),
        (["predict", "--train-rate", "nan"], "rate must be finite"),
        (["verify", "--runs", "1"], "runs"),
        (["reproduce", "--runs", "5"], "runs"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.run(arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["predict", "--trainrate", "1"],
            "Unrecognized options: --trainrate, 1\nPerhaps you meant:",
        ),
        (["predict", "--p", "x"], "Error parsing --p: invalid literal for int()"),
        (["sweep"], "SPEC"),
    ],
)
def test_errors_of_the_parser_are_plain_lines(arguments, said, capsys):
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"negmaml {arguments[0]}: ") and said in err
    assert err.isascii() and "\n\n" not in err


@pytest.mark.slow
def test_verify_fails_where_they_do_not(monkeypatch, capsys):
    from negmaml import theory

    right = theory.weight_error
    monkeypatch.setattr(theory, "weight_error", lambda *a, **k: right(*a, **k) * 3)
    assert cli.run(["verify", "--runs", "60"]) == 1  # the paper's problem: a good expansion
    assert "methods disagree" in capsys.readouterr().out


def test_unwritable_folder_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    def never(*_):
        raise AssertionError("computed before the check")

    monkeypatch.setattr(paper, "experiments", never)
    (tmp_path / "file").write_text("in the way")
    assert cli.run(["reproduce", "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "in the way"


def test_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    import matplotlib.figure  # noqa: F401  waits for the thread of an earlier command

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.run(["reproduce", "--out", str(tmp_path)]) == 2
    assert "negmaml[figures]" in capsys.readouterr().err


def test_interruption_leaves_no_file(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(paper, "experiments", interrupt)
    assert cli.run(["reproduce", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_failing_to_draw_leaves_earlier_results_whole(tmp_path, monkeypatch):
    from tests.internals import figures

    arguments = ["reproduce", "--runs=20", "--figure=overparameterized", "--out", str(tmp_path)]
    assert cli.run(arguments) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"reproduction.nc", "reproduction.png", "reproduction.svg"}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(figures, "reproduction", interrupt)
    assert cli.run(arguments) == 130
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_typo_costs_the_import_of_its_command_alone():
    code = """
import sys
from negmaml.cli import run
assert run(["predict", "--p", "-3"]) == 2
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "p must be" in done.stderr and "negmaml.cli.problem" in loaded
    heavy = {"optax", "xarray", "matplotlib", "scipy", "negmaml.linear", "negmaml.cli.sweeps"}
    assert not heavy & loaded


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("predict --level=3", "--level", "--spectrum.level"),  # of isotropic inputs: no program
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("predict --exponent 2 --spectrum power", "--exponent", "--spectrum.exponent"),
                ("predict --level=3 --spectrum spikes", "--level", "--spectrum.level"),
            )
        ),
        ("sweep phase_map --dry-run --set grid.q=1", "--set", "--override"),
        ("sweep phase_map --part x --store y", "--part", "--worker"),
        ("sweep none --accept-changes", "--accept-changes", "--allow-code-change"),
        ("heatmap none.zarr --x a --y b --best c", "--best", "--argmin"),
        ("curves none.zarr --x a --by c", "--by", "--hue"),
        ("payoff --out /dev/null/x", "payoff", "gain-map"),
    ],
)
def test_old_commands_and_flags_warn_on_stderr_and_work(command, old, new, capsys):
    status = cli.run(command.split())
    error = capsys.readouterr().err.splitlines()
    assert error[0] == (
        f"negmaml: warning: {old} was renamed: use {new}. "
        "The old name will be removed in the next release."
    )
    assert status == (0 if command.startswith("predict") else 2)
    assert len(error) == (1 if command.startswith("predict") else 2)


def test_help_lists_every_command_on_one_screen(capsys):
    assert cli.run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 24 and max(map(len, shown.splitlines())) <= 80
    for command, (module, summary) in cli.COMMANDS.items():
        assert f"  {command:11}{summary}\n" in shown
        functions = importlib.import_module(f"negmaml.cli.{module}")
        function = getattr(functions, command.replace("-", "_"))
        assert function.__doc__
    assert cli.run([]) == 2 and capsys.readouterr().out == shown


def test_the_version_is_that_of_the_package(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"negmaml {nm.__version__}\n"


def test_an_unknown_command_names_the_nearest(capsys):
    assert cli.run(["advize", "x.csv"]) == 2
    assert "no command 'advize'; did you mean 'advise'?" in capsys.readouterr().err


def test_completions_know_the_commands(capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(["--tyro-print-completion", "bash"])
    assert not end.value.code and "gain-map" in capsys.readouterr().out
