"""Programs compiled with options of our own have the values of those compiled with XLA's defaults.

Every `FastCompileJit` of the package registers itself and needs an entry here: a call of the public
interface that runs it.
"""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml import theory
from tests.internals import FastCompileJit, compiler_options, is_concrete, lowered_for
from tests.internals import jit_registered as registered

KEY = jax.random.key(3)
ADAPT = nm.GradientDescent(0.2)
STEPS = nm.GradientDescent(np.linspace(-0.4, 0.3, 4))
FLAT = nm.MixedLinearRegression(p=12, m=3, n_t=9, n_v=3, n_r=8, sigma=0.4, nu=1.0, omega0=0.2)
COLOURED = nm.MixedLinearRegression(
    p=12, m=3, n_t=9, n_v=3, n_r=8, sigma=0.4, nu=1.0, omega0=0.2,
    input_covariance=1.0 / np.arange(1, 13),
)  # fmt: skip


def few():
    return nm.tasks.Quadratic(p=4, m=5, n_t=6, n_v=3, sigma=0.3, nu=1.0)(KEY)


def network():
    return nm.kernels.relu_network(2, bias_variance=0.5)


def kernel_model():
    return nm.kernels.meta_train(network(), few(), STEPS, meta_ridge=jnp.array([0.1, 1.0]))


def left_out():
    return nm.kernels.leave_one_task_out(network(), few(), STEPS, meta_ridge=0.1)


def many(function):
    return lambda: function(FLAT, nm.GradientDescent(np.linspace(-0.5, 0.5, 5000)))


def spread(problem, rates):
    return theory.standard_deviation(problem, rates, ADAPT)


LONG = nm.MixedLinearRegression(p=12, m=9, n_t=9, n_v=3, n_r=8, sigma=0.4, nu=1.0)
RATE = nm.GradientDescent(-0.2)


def phase_diagram(**options):
    n_t, n_v = np.array([50.0, 200.0]), np.array([3.0, 40.0])
    return theory.phase_diagram(100.0, 10.0, n_t[:, None], n_v, 0.5, 1.0, **options)


def payoff():
    from tests.internals import _map

    return _map(1.0, 0.5, 10.0, 3.0)


def normals():
    from tests.internals import _data

    return _data(KEY, 0, 2)


def coloured_phases():
    return phase_diagram(input_covariance=np.array([4.0, 0.5]))


def simulation(rule, runs):
    return lambda: nm.simulate(KEY, FLAT, rule, ADAPT, runs=runs)


def heavy_simulation():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("negmaml.linear.simulation.LIGHT_NORMALS", 0)
        return nm.simulate(KEY, FLAT, STEPS, ADAPT, runs=4)


def allocation(problem):
    return lambda: theory.best_allocation(200.0, problem, RATE)


def expanded():
    return theory.best_train_rate(LONG, method="expansion")


def adapt_rate():
    return theory.best_adapt_rate(COLOURED, RATE, nm.Proximal(0.0))


def meta_ridge():
    return theory.best_meta_ridge(COLOURED, RATE)


def train_rate():
    return theory.best_train_rate(COLOURED)


slow = pytest.mark.slow
# (module, function, work), the call, and marks: programs of thousands of operations are slow.
ENTRIES = [
    ("kernels.analytic", "_kernel_matrix", "light", kernel_model),
    ("kernels.model", "_train_all", "heavy", kernel_model),
    ("kernels.leave_one_out", "_leave_out_all", "heavy", left_out, slow),
    (
        "linear.simulation",
        "_simulate",
        "light",
        simulation(STEPS, 4),
    ),
    (
        "linear.simulation",
        "_simulate",
        "heavy",
        heavy_simulation,
    ),
    (
        "paper.cross_check",
        "_descents",
        "trivial",
        lambda: nm.verify(FLAT, RATE, ADAPT, runs=4),
        slow,
    ),
    ("paper.phases", "_normals", "light", normals),
    ("paper.gain_map", "_cells", "light", payoff, slow),
    ("theory.allocation", "_losses", "light", allocation(FLAT), slow),
    (
        "theory.allocation",
        "_losses",
        "light",
        allocation(COLOURED),
        slow,
    ),
    (
        "theory.optima",
        "_search_expansion",
        "light",
        expanded,
    ),
    ("theory.phases", "_phases", "light", phase_diagram, slow),
    (
        "theory.phases",
        "_phases",
        "light",
        coloured_phases,
        slow,
    ),
    ("theory.isotropic.model", "_compiled", "light", many(theory.weight_error), slow),
    ("theory.isotropic.variance", "_in_blocks", "light", many(spread), slow),
    (
        "theory.anisotropic.inputs",
        "_predict_single",
        "trivial",
        lambda: theory.weight_error(COLOURED, RATE),
        slow,
    ),
    (
        "theory.anisotropic.inputs",
        "_predict_batch",
        "light",
        lambda: theory.weight_error(COLOURED, STEPS),
        slow,
    ),
    (
        "theory.optima",
        "_search",
        "light",
        adapt_rate,
        slow,
    ),
    (
        "theory.optima",
        "_search_log_ridge",
        "light",
        meta_ridge,
        slow,
    ),
    (
        "theory.optima",
        "_search",
        "light",
        train_rate,
        slow,
    ),
    ("theory.anisotropic.variance", "covariances", "light", lambda: spread(COLOURED, RATE), slow),
]


# XLA's defaults: the flags of tests/conftest.py ask for less optimisation.
DEFAULTS = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}


def xla_defaults():
    """XLA's defaults for the options that its version knows."""
    known = compiler_options("cpu", "light")
    return {name: value for name, value in DEFAULTS.items() if name in known}


def named(program: FastCompileJit) -> tuple[str, str, str]:
    function = program.function
    return function.__module__.removeprefix("negmaml."), function.__qualname__, program.profile


def test_every_program_with_options_has_an_entry():
    for module in pkgutil.walk_packages(nm.__path__, "negmaml."):
        if not module.name.startswith(("negmaml.examples", "negmaml.cli", "negmaml.__main__")):
            importlib.import_module(module.name)
    ours = [x for x in registered if x.function.__module__.startswith("negmaml.")]
    assert sorted(map(named, ours)) == sorted({entry[:3] for entry in ENTRIES})


class Reached(Exception):
    """The call of a program: the program, its arguments and keywords."""


def varied(tree, seed: int):
    """Every floating number by up to 5% larger or smaller."""
    rng = np.random.default_rng(seed)

    def vary(leaf):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return leaf
        factor = 1 + 0.05 * rng.uniform(-1, 1, np.shape(leaf))
        return np.asarray(leaf) * factor.astype(np.asarray(leaf).dtype)

    return jax.tree.map(vary, tree)


@pytest.mark.parametrize(
    ("module", "function", "work", "call"),
    [pytest.param(*entry[:4], marks=entry[4:], id=".".join(entry[:3])) for entry in ENTRIES],
)
def test_options_of_the_compiler_change_nothing(
    module, function, work, call, monkeypatch, shipped_options, x64
):
    """To rounding, on the call's inputs and two random ones."""
    run = FastCompileJit.__call__

    def recording(self, *arguments, **keywords):
        if named(self) == (module, function, work) and is_concrete(arguments):
            raise Reached(self, arguments, keywords)
        return run(self, *arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(Reached) as reached:
        patch.setattr(FastCompileJit, "__call__", recording)
        call()
    program, arguments, keywords = reached.value.args
    plain = jax.jit(
        lowered_for("cpu")(program.function),
        static_argnames=program.static_argnames,
        compiler_options=xla_defaults(),
    )
    for seed in range(3):
        inputs = varied(arguments, seed) if seed else arguments
        ours, expected = program(*inputs, **keywords), plain(*inputs, **keywords)
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            # A search is good to the root of the precision.
            digits = float(jnp.finfo(one.dtype).eps) ** 0.5 if one.dtype.kind == "f" else 0
            np.testing.assert_allclose(one, other, rtol=3 * digits, atol=digits / 100)


@pytest.mark.slow
@pytest.mark.parametrize(
    "few", (True, pytest.param(False, marks=pytest.mark.slow)), ids=("light", "heavy")
)
def test_options_of_sweeps_of_the_linear_model_change_nothing(few, monkeypatch, shipped_options):
    """Both kinds of options, on random cells."""
    rng = np.random.default_rng(4)
    grid = dict(p=12, m=3, n_t=9, n_v=6, n_r=8, adapt_rate=0.2) | {
        "sigma": rng.uniform(0.1, 1, 3), "nu": 0.7, "train_rate": rng.uniform(-0.5, 0.5, 5),
    }  # fmt: skip
    if not few:
        monkeypatch.setattr(type(nm.sweeps.linear), "batch_cells", lambda *_, **__: 2)
    ours = nm.sweep(nm.sweeps.linear, grid, 3)
    monkeypatch.setattr(type(nm.sweeps.linear), "compiler_options", lambda *_, **__: xla_defaults())
    expected = nm.sweep(nm.sweeps.linear, grid, 3)
    for name in ("test_loss", "weight_error"):
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-4)
