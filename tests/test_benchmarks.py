"""Benchmarks run small on a CPU, and that of accelerators counts work and launches correctly."""

import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module", autouse=True)
def scripts():
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


def test_it_runs_small_without_an_accelerator(capsys):
    import accelerator
    import harness

    report = harness.Report()
    accelerator.main(SimpleNamespace(size=5e-4, rows="fit 1 ", compile_only=None), report)
    head, rows = (report.contents["tables"][0][part] for part in ("head", "rows"))
    assert [row[0] for row in rows] == ["fit 1 seed"]
    assert all(len(row) == len(head) and float(row[-1]) > 0 for row in rows)
    assert "run / limit" in capsys.readouterr().out


@pytest.mark.slow
def test_every_row_can_be_traced_and_has_work():
    import accelerator

    for name, make in accelerator.rows_of(1e-3).items():
        if not name.startswith(("theory", "phase", "conv4")):  # these take seconds to trace
            row = make()
            work = accelerator.work_of(row.function, row.arguments)
            assert row.count > 0 and min(work.flops, work.bytes) > 0, name


def test_work_counts_products_draws_and_loops():
    import accelerator

    A = jnp.ones((3, 4))
    x = jnp.ones((2, 8, 8, 3))
    kernel = jnp.ones((5, 5, 3, 7))

    def repeated(A):
        return jax.lax.scan(lambda c, _: (c, A @ A.T), 0, length=6)[1]

    def convolved(x):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

    product = 2 * 3 * 3 * 4
    assert accelerator.work_of(lambda A: A @ A.T, (A,)) == (0, product, 4 * (12 + 9))
    assert accelerator.work_of(jax.jit(repeated), (A,))[1] == 6 * product
    assert accelerator.work_of(convolved, (x,))[1] == 2 * (2 * 8 * 8 * 7) * (5 * 5 * 3)
    draw = lambda key: jax.random.normal(key, (10,))  # noqa: E731
    assert accelerator.work_of(draw, (jax.random.key(0),))[0] == 10


MODULE = """HloModule jit_f

%body (arg: (s32[], f32[8,2])) -> (s32[], f32[8,2]) {
  %arg = (s32[], f32[8,2]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%arg), index=0
  %x = f32[8,2]{1,0} get-tuple-element(%arg), index=1
  %y = f32[8,2]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %m = s32[] add(%n, %n)
  ROOT %out = (s32[], f32[8,2]{1,0}) tuple(%m, %y)
}

ENTRY %main (p: f32[8,2]) -> pred[8] {
  %p = f32[8,2]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,2]{1,0}) tuple(%zero, %p)
  %loop = (s32[], f32[8,2]) while(%start), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %last = f32[8,2]{1,0} get-tuple-element(%loop), index=1
  ROOT %flag = pred[8]{0} fusion(%last), kind=kLoop, calls=%fused
}
"""


def test_launches_and_bytes_are_those_of_kernels_with_loops_multiplied():
    import hlo

    trip = 2 * 64 + 3 * 4  # a fusion of 8 x 2 float32 numbers, and a sum of two integers
    assert hlo.counts(MODULE) == (5 * 2 + 1, 5 * trip + 64 + 8)


def test_launches_of_a_compiled_program_are_counted():
    import hlo

    program = jax.jit(lambda x: jax.lax.map(jnp.sin, x)).lower(np.ones(7, np.float32)).compile()
    assert hlo.counts(program.as_text()).launches >= 7


# iMAML stops after a fixed number of steps.
@pytest.mark.filterwarnings("ignore::negmaml.ConvergenceWarning")
@pytest.mark.parametrize(
    ("part", "methods"),
    [
        ("sinusoid", ["MAML"]),
        pytest.param("sinusoid", ["Meta-SGD", "MAML++"], marks=pytest.mark.slow),
        pytest.param("digits", ["ANIL", "iMAML"], marks=pytest.mark.slow),
        pytest.param("digits", ["prototypes", "ridge head"], marks=pytest.mark.slow),
    ],
)
def test_the_reference_table_has_a_row_for_every_algorithm(part, methods):
    import harness
    import reference

    report = harness.Report()
    sizes = {"steps": 2, "seeds": 2, "episodes": 4, "shots": [5], "search": "ANIL" in methods}
    options = SimpleNamespace(part=part, methods=methods, **sizes)
    reference.main(options, report)
    head, rows = (report.contents["tables"][0][name] for name in ("head", "rows"))
    found = [dict(zip(head, row, strict=True)) for row in rows]
    assert list(dict.fromkeys(row["algorithm"] for row in found)) == methods
    for row in found:
        steps = [row[f"{k} steps"] for k in reference.TEST_STEPS]
        # Gradient descent fills the columns of steps, a solution the one behind them.
        assert all(steps) != bool(row["solved"])
        low, high = map(float, row["range over seeds"].split(" to "))
        value = float((row["solved"] or steps[-1]).split(" ± ")[0])
        assert low - 1e-3 <= value <= high + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("part", ["adapt", "train"])
def test_predicted_rates_of_networks_are_compared_with_measured_ones(part):
    import harness
    import network_rates

    report = harness.Report()
    sizes = {"scale": 0.05, "tasks": 50, "n_r": [4], "tasks_of": ["linear"]}
    network_rates.main(SimpleNamespace(part=part, **sizes), report)
    head, rows = (report.contents["tables"][0][name] for name in ("head", "rows"))
    assert [row[0] for row in rows] == ["linear, last layer", "linear, all"]
    assert all(len(row) == len(head) for row in rows)
    assert not any("nan" in str(cell) for row in rows for cell in row)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["intercepts only", "unlike groups", "ragged groups", "heavy tails", "unequal noise"]
)
def test_intervals_of_the_recommended_method_hold_the_truth(name):
    import advice_coverage as coverage

    population = coverage.POPULATIONS[name]
    pool = coverage.truth(population)
    results = [coverage.advised(population, pool, seed, 50) for seed in range(30)]
    inside = [
        low <= value <= high for result in results for value, low, high in result.gains.values()
    ]
    assert np.mean(inside) >= 0.9
    assert np.mean([result.regret for result in results]) < 0.01
