"""Problems, rates and checks that several test modules share, and which cases are slow ones."""

import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import negmaml as nm
from tests.internals import SAFE_WORK

OVER = nm.MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
UNDER = nm.MixedLinearRegression(p=30, m=40, n_t=5, n_v=25, n_r=10, sigma=0.2, nu=0.2)

# Both signs, zero, and far out.
RATES = (-2.5, -0.4, -1e-3, 0.0, 0.3, 1.7)


def mostly_slow(cases, *quick):
    """Cases for parametrize: those at the positions `quick` by default, the rest with -m slow."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if i in quick else pytest.mark.slow,
        )
        for i, case in enumerate(cases)
    ]


def z_score(values, predicted):
    """Distance of a sample's mean from a prediction in standard errors."""
    return (values.mean() - predicted) / (values.std(ddof=1) / values.size**0.5)


def assert_no_call_waits(function, *arguments):
    """No call of CPU's linear algebra has a batch so large that it can wait for others for ever."""
    text = jax.jit(function).lower(*arguments).as_text()
    calls = [line for line in text.splitlines() if re.search("@(lapack|blas)", line)]
    assert calls
    for call in calls:
        shape = [int(n) for n in re.search(r": \(tensor<([\dx]+)x[a-z]", call).group(1).split("x")]
        work = math.prod(shape) if "trsm" in call else math.prod(shape) * shape[-1] / 3
        work *= 60 if "syevd" in call else 1
        assert math.prod(shape[:-2]) == 1 or work <= SAFE_WORK, call


def python(code, *arguments):
    """A process that runs Python code at the root of the repository, with its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
