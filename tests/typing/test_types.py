"""Annotations are complete for a user in strict mode, and match the returned values."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_public import PUBLIC

SCRIPT = Path(__file__).with_name("user_script.py")
STRICT = {"typeCheckingMode": "strict", "reportMissingTypeStubs": False}
# Functions of other packages with incomplete annotations.
THEIRS = ("linspace", "normal", "zeros")


def test_a_users_script_has_no_unknown_types_from_this_package(tmp_path):
    pytest.importorskip("basedpyright")  # 260 MB, in the extra `dev`
    root = SCRIPT.parents[2]
    settings = STRICT | {"include": [str(SCRIPT)], "extraPaths": [str(root)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [
            sys.executable, "-m", "basedpyright", "--outputjson", "-p", str(tmp_path),
            "--pythonpath", sys.executable,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert json.loads(done.stdout)["summary"]["filesAnalyzed"] == 1
    ours = [
        f"{one['range']['start']['line'] + 1}: {one['message']}"
        for one in found
        if one["severity"] == "error"
        and not any(f'of "{name}"' in one["message"] for name in THEIRS)
    ]
    assert not ours, "\n".join(ours)


@pytest.mark.slow
def test_types_of_public_names_are_complete(tmp_path):
    """All but the base classes of estimators, since scikit-learn has no annotations."""
    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--verifytypes", "negmaml", "--ignoreexternal",
         "--outputjson"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]),
                          "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    symbols = json.loads(done.stdout)["typeCompleteness"]["symbols"]
    public = {f"{found.__module__}.{found.__qualname__}" for found in PUBLIC.values()}
    public = {name for name in public if "._core." not in name}  # a private module is not listed
    assert public < {symbol["name"] for symbol in symbols}
    unknown = {
        f"{symbol['name']}: {one['message']}"
        for symbol in symbols
        for one in symbol["diagnostics"]
        if symbol["name"].rpartition(".")[0] in public or symbol["name"] in public
        if not symbol["isTypeKnown"] and not re.search("base class|metaclass", one["message"])
    }
    assert not unknown, "\n".join(sorted(unknown))


@pytest.mark.slow
def test_the_users_script_runs():
    assert runpy.run_path(str(SCRIPT))["losses"].shape == (25, 200)


@pytest.mark.slow
def test_shapes_in_annotations_are_those_of_what_is_returned():
    """A script of public calls with every annotation of theory and linear checked by beartype."""
    code = """
import jaxtyping
hook = jaxtyping.install_import_hook(["negmaml.theory", "negmaml.linear", "negmaml.problem"],
                                     "beartype.beartype")
with hook:
    import negmaml as nm
    from negmaml import *
import jax, numpy as np, pytest
problem = nm.MixedLinearRegression(p=6, m=2, n_t=4, n_v=2, n_r=4, sigma=0.5, nu=1.0)
key, rates = jax.random.key(0), nm.GradientDescent(np.linspace(-0.3, 0.3, 3))
adapt = nm.GradientDescent(np.zeros(2))
found = nm.simulate(key, problem, rates, adapt, runs=5)
assert found.test_loss.shape == (3, 2, 5)
data = nm.linear.sample(key, problem)
nm.linear.minimiser(*nm.linear.meta_system(data, rates))
nm.theory.test_loss(problem, rates, adapt, meta_ridge=0.1)
nm.theory.best_adapt_rate(problem, rates)
nm.theory.best_rates(problem)
nm.theory.standard_deviation(problem, rates, adapt)
with pytest.raises(jaxtyping.TypeCheckError):
    nm.linear.minimiser(np.ones((4, 6)), np.ones(3))  # N differs
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
