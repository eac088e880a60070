"""Two thousand wrong calls of public functions, which raise before any work, and right calls.

Each area has a table. Wrong calls are generated: every argument of a kind gets every value that is
wrong for its kind. The last tests draw arbitrary values.
"""

import contextlib
import re
import traceback
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import negmaml as nm
from negmaml.cli import run
from tests.calls import advice, kernels, meta, paper, problem, rules, sweeps, theory
from tests.calls.form import PATH
from tests.internals import Experiment, Phase, phase_diagram
from tests.internals import theory_phases as phases

AREAS = (rules, problem, theory, meta, kernels, advice, sweeps, paper)
WRONG = [row for area in AREAS for row in area.WRONG]
RIGHT = [row for area in AREAS for row in area.RIGHT]
BY_FUNCTION: dict[str, list] = {}
for row in WRONG:
    BY_FUNCTION.setdefault(getattr(row.function, "__qualname__", "distribution"), []).append(row)
# Operations that are compiled for a user's function called without jit, for constructors of arrays,
# and to check that the values of a kernel are symmetric and positive.
OPERATIONS = {*dir(jnp), *dir(jax.lax), "stage", "threefry_fold_in", "reduce_max", "symmetric",
              "eigvalsh"}  # fmt: skip
GIVEN = r"\bgot\b|holds|without|missing|=True|returns|\bno\b|needs?\b|= \d|pass store|be given"
compiled: list[str] = []


@jax.monitoring.register_event_duration_secs_listener
def _note(event, _, **facts):
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(facts.get("fun_name", ""))


def programs() -> list[str]:
    """Names of compiled programs, except single operations."""
    names = [re.sub(r"^jit\(|\)$", "", name).lstrip("_") for name in compiled]
    return [name for name in names if name not in OPERATIONS]


def assert_ours(caught, said: str):
    """Check that our code raised, and that the message names the argument and its value."""
    message = str(caught.value)
    last = traceback.extract_tb(caught.tb)[-1].filename
    assert "/negmaml/" in last and "site-packages" not in last, f"raised in {last}: {message}"
    assert re.search(said, message), message
    assert re.search(GIVEN, message), message


def test_there_are_enough_calls():
    assert len(WRONG) >= 2000 and len(RIGHT) >= 80


def failures(rows, check) -> str:
    """Rows that fail a check, with the reason: thousands of tests would be slow to collect."""
    found = []
    for row in rows:
        try:
            check(row)
        except (Exception, pytest.fail.Exception) as failure:
            found.append(f"{row}: {str(failure).splitlines()[0]}")
    return "\n".join(found)


@pytest.mark.parametrize("name", BY_FUNCTION)
def test_wrong_calls_raise_our_errors(name, tmp_path):
    def check(row):
        store = tmp_path / "x.zarr"
        arguments = {n: store if v is PATH else v for n, v in row.arguments.items()}
        compiled.clear()
        with pytest.raises(row.error) as caught:
            row.function(**arguments)
        assert_ours(caught, row.said)
        assert not programs(), f"compiled {programs()}"
        assert not list(tmp_path.iterdir())

    assert not failures(BY_FUNCTION[name], check)


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS, ids=lambda area: area.__name__.rsplit(".", 1)[-1])
def test_right_calls_are_right(area):
    def check(row):
        found, expected = row.call(), row.same_as()
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-7), found, expected)

    assert not failures(area.RIGHT, check)


@pytest.mark.parametrize("line", paper.COMMANDS)
def test_a_wrong_command_reports_the_error(line, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    filled = line.format(path=tmp_path, file=tmp_path / "file")
    compiled.clear()
    with contextlib.suppress(SystemExit):  # of the parser of options
        assert run(filled.split()) == 2
    said = capsys.readouterr()
    assert paper.COMMANDS[line] in said.err + said.out
    assert "Traceback" not in said.err + said.out
    assert not programs()


PLAIN = st.one_of(
    st.floats(), st.integers(-(2**70), 2**70), st.booleans(), st.none(), st.text(max_size=3),
    st.complex_numbers(), st.fractions(), st.decimals(), st.binary(max_size=3),
    arrays.arrays(st.sampled_from([np.float32, np.float64, np.int8, bool, complex, "U2", object]),
                  arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)),
)  # fmt: skip
ANYTHING = st.recursive(
    PLAIN,
    lambda some: (
        st.lists(some, max_size=3)
        | st.dictionaries(st.text(max_size=2), some, max_size=2)
        | st.tuples(some, some)
    ),
    max_leaves=4,
)


def taken(function, name: str, value):
    """The result of a function for an argument; None if it raises one of our errors."""
    try:
        return function(value)
    except (TypeError, ValueError):
        with pytest.raises((TypeError, ValueError)) as caught:
            function(value)
        assert_ours(caught, rf"\b{name}\b")
        return None


def is_finite(tree) -> bool:
    leaves = [np.asarray(leaf, float) for leaf in jax.tree.leaves(tree)]
    return sum(leaf.size for leaf in leaves) > 0 and all(np.isfinite(x).all() for x in leaves)


@settings(max_examples=100)
@given(ANYTHING)
def test_whatever_is_given_as_a_rate_is_finite_or_refused(value):
    rule = taken(nm.GradientDescent, "rate", value)
    assert rule is None or is_finite(rule.rate)


@settings(max_examples=100)
@given(ANYTHING, st.sampled_from(["sigma", "nu", "w0", "omega0", "input_covariance", "p", "m"]))
def test_whatever_is_given_to_a_problem_has_a_prediction_or_is_refused(value, name):
    def make(value):
        return nm.MixedLinearRegression(**problem.GIVEN | {name: value})

    made = taken(make, name, value)
    if made is not None:
        sizes = made.p * made.m * made.n_v < 1e6
        given = getattr(made, name)
        assert given is None or is_finite(given)
        if made.isotropic and sizes and np.all(np.abs(given) < 1e12):
            assert not np.isnan(nm.theory.weight_error(made, problem.ONE))


@settings(max_examples=100)
@given(ANYTHING, st.sampled_from(["key", "runs", "meta_ridge", "split", "evaluation", "train"]))
def test_whatever_is_given_to_a_simulation_is_checked_before_it_runs(value, name):
    def check(value):
        arguments = problem.SIMULATED | {"runs": 2, "meta_ridge": 0.0, "evaluation": "expected",
                                         "split": "train-validation"} | {name: value}  # fmt: skip
        return Experiment.checked(**arguments)

    compiled.clear()
    made = taken(check, name, value)
    assert made is None or name in ("runs", "meta_ridge")
    assert not programs()


@settings(max_examples=100)
@given(ANYTHING, st.sampled_from(["p", "m", "n_t", "n_v", "sigma", "nu", "offset", "meta_ridge"]))
def test_whatever_is_given_to_a_phase_diagram_is_checked(value, name):
    compiled.clear()
    with mock.patch.object(phases, "_phases", lambda settings, *_, mesh: Phase(*[settings.p] * 3)):
        found = taken(lambda v: phase_diagram(**theory.PHASE | {name: v}), name, value)
    assert found is None or is_finite(found)
    assert not programs()
