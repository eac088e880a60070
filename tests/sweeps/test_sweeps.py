"""Sweeps in memory: labels, draws by address, groups of shapes, whole axes, bad input."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import negmaml as nm
from negmaml.sweeps import SweepFunction
from tests.helpers import mostly_slow
from tests.internals import chunk_shape, parse_grid, regions

POINT = {"p": 6, "m": 3, "n_t": 4, "n_v": 5, "n_r": 3, "sigma": 0.5, "nu": 1.0}


def draws(key, size, scale=1.0):
    """Random numbers that tell cells apart."""
    return {"first": scale * jax.random.normal(key), "drawn": jnp.float32(size)}


def test_every_cell_is_labelled_with_its_own_value():
    grid = {"size": [3, 1], "scale": [-2.0, 0.0, 0.5]}
    result = nm.sweep(draws, grid, seeds=[4, 9])
    assert result["first"].dims == ("size", "scale", "seed")
    np.testing.assert_array_equal(result["drawn"].sel(size=3), 3.0)
    assert result["size"].dtype.kind == "i"
    assert list(result["seed"].values) == [4, 9]
    assert not result["first"].sel(scale=0.0).any()
    assert (result["finite"]).all()


@pytest.fixture
def renamed():
    def function(key, size, scale=1.0):
        return {"value": scale * jax.random.normal(key), "squares": jnp.arange(3.0) ** 2 * size}

    return function


def test_draws_depend_on_what_a_cell_is_and_on_nothing_else(renamed):
    grid = {"size": [1, 2, 3], "scale": [-1.0, 0.5, 2.0]}
    whole = nm.sweep(renamed, grid, seeds=5)
    other = nm.sweep(
        renamed, {"scale": [2.0, -1.0], "size": [3, 1]}, seeds=[4, 1], block=3, memory=4000
    )
    picked = whole.sel(scale=other.scale, size=other["size"], seed=other.seed)
    np.testing.assert_array_equal(other["value"], picked["value"].transpose(*other["value"].dims))
    zipped = nm.sweep(renamed, {("size", "scale"): [(2, 0.5), (3, -1.0)]}, seeds=5)
    assert zipped["value"].dims == ("size_scale", "seed")
    for i, (size, scale) in enumerate([(2, 0.5), (3, -1.0)]):
        np.testing.assert_array_equal(
            zipped["value"].isel(size_scale=i), whole["value"].sel(size=size, scale=scale)
        )
    listed = nm.sweep(renamed, [{"size": 1, "scale": [0.5]}, {"size": [2, 3], "scale": -1.0}], 5)
    assert listed["value"].dims == ("point", "seed")
    assert list(listed["size"].values) == [1, 2, 3]
    np.testing.assert_array_equal(
        listed["value"].isel(point=0), whole["value"].sel(size=1, scale=0.5)
    )
    assert len(np.unique(whole["value"])) == whole["value"].size
    assert whole["squares"].dims == ("size", "scale", "seed", "squares_0")


def test_another_root_gives_other_draws_and_common_axes_share_them(renamed):
    grid = {"size": [1, 2], "scale": [1.0, 2.0]}
    first = nm.sweep(renamed, grid, seeds=3)
    assert not np.isin(nm.sweep(renamed, grid, seeds=3, root_seed=1)["value"], first["value"]).any()
    shared = nm.sweep(renamed, grid, seeds=3, common_random_numbers=["scale", "size"])["value"]
    np.testing.assert_allclose(shared.sel(scale=2.0), 2 * shared.sel(scale=1.0), rtol=1e-6)
    np.testing.assert_array_equal(shared.sel(size=1), shared.sel(size=2))


def test_each_shape_is_traced_a_fixed_number_of_times_whatever_the_numbers():
    traced = []

    def function(key, size, scale):
        traced.append(size)
        return {"value": scale * jnp.sum(jax.random.normal(key, (size,)))}

    nm.sweep(function, {"size": [2, 3], "scale": np.linspace(0, 1, 3)}, seeds=4)
    few = len(traced)
    traced.clear()
    nm.sweep(function, {"size": [2, 3], "scale": np.linspace(0, 1, 50)}, seeds=40, block=70)
    assert 0 < len(traced) <= few


def test_cells_that_are_not_finite_are_data():
    def function(key, rate):
        return {"loss": jnp.log(rate), "other": rate}

    result = nm.sweep(function, {"rate": [-1.0, 0.0, 1.0]}, seeds=2)
    assert result["finite"].values.tolist() == [[False] * 2, [False] * 2, [True] * 2]
    assert np.isnan(result["loss"].sel(rate=-1.0)).all()
    assert np.isneginf(result["loss"].sel(rate=0.0)).all()
    np.testing.assert_array_equal(result["other"].sel(rate=-1.0), -1.0)


@pytest.mark.parametrize(
    ("evaluation", "x64"),
    mostly_slow(list(product(("expected", "sampled"), (False, True))), 1, 2),
)
def test_the_linear_function_is_a_run_of_simulate(evaluation, x64):
    with jax.enable_x64(x64):
        rates = jnp.array([-0.7, 0.0, 0.4])
        key, function = jax.random.key(3), nm.linear.LinearModel(evaluation)
        out = function(key, **POINT, train_rate=rates, adapt_rate=0.2)
        problem = nm.MixedLinearRegression(**POINT)
        train, adapt = nm.GradientDescent(rates), nm.GradientDescent(0.2)
        run = nm.simulate(key, problem, train, adapt, runs=1, evaluation=evaluation)
        tolerance = 1e-10 if x64 else 2e-4
        assert out["test_loss"].dtype == (jnp.float64 if x64 else jnp.float32)
        np.testing.assert_allclose(out["test_loss"], run.test_loss[..., 0], rtol=tolerance)
        np.testing.assert_allclose(out["weight_error"], run.weight_error[..., 0], rtol=tolerance)


def test_the_linear_sweep_covers_fields_and_rates_and_meets_the_theory():
    grid = POINT | {"p": [20, 4], "m": 4, "n_v": 2, "sigma": [0.3, 1.0], "omega0": [0.0, 0.2],
                    "train_rate": [-0.3, 0.0, 0.2], "adapt_rate": [0.0, 0.3]}  # fmt: skip
    result = nm.sweep(nm.sweeps.linear, grid, seeds=30)
    assert result["test_loss"].dims == (
        "p", "sigma", "omega0", "seed", "train_rate", "adapt_rate"
    )  # fmt: skip
    assert result["weight_error"].dims == ("p", "sigma", "omega0", "seed", "train_rate")
    small = grid | {"p": 20, "sigma": 1.0, "omega0": 0.2, "train_rate": [0.2, -0.3]}
    again = nm.sweep(nm.sweeps.linear, small, seeds=7, block=5)
    np.testing.assert_allclose(
        again["test_loss"],
        result["test_loss"].sel(p=20, sigma=1.0, omega0=0.2, seed=range(7), train_rate=[0.2, -0.3]),
        rtol=2e-4,
    )
    floor = result["sigma"] ** 2 / 2 + 0.5 * (POINT["nu"] ** 2 + result["weight_error"])
    np.testing.assert_allclose(  # no adaptation: the loss is a constant of the distance
        result["test_loss"].sel(adapt_rate=0.0),
        floor.transpose(*result["weight_error"].dims),
        rtol=1e-4,
    )


@pytest.mark.slow
def test_means_agree_with_simulate_within_their_errors():
    grid = POINT | {"p": 30, "n_v": 2, "train_rate": [-0.4, 0.0, 0.5], "adapt_rate": 0.2}
    swept = nm.sweep(nm.sweeps.linear, grid, seeds=400)["test_loss"]
    problem = nm.MixedLinearRegression(**(POINT | {"p": 30, "n_v": 2}))
    train, adapt = nm.GradientDescent(jnp.array([-0.4, 0.0, 0.5])), nm.GradientDescent(0.2)
    simulated = nm.simulate(jax.random.key(5), problem, train, adapt, runs=400).test_loss
    error = np.hypot(swept.std("seed"), simulated.std(-1)) / 20
    assert (abs(swept.mean("seed").values - simulated.mean(-1)) < 4 * error.values).all()


@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(1, 100))
def test_blocks_cover_every_cell_once(shape, cells):
    *sizes, seeds = shape
    axes = {f"a{i}": list(range(size)) for i, size in enumerate(sizes)}
    static = list(axes)[::2]
    grid = parse_grid(axes or {"a": 1.0}, seeds, None, (), static, (), ())
    shape = grid.shape  # a single value makes no dim
    block = chunk_shape(shape, cells)
    assert np.prod(block) <= max(cells, 1)
    counts = np.zeros(shape, int)
    order = []
    for region in regions(grid, block):
        counts[region] += 1
        order.append(grid.region_groups(region))
    assert (counts == 1).all()
    assert order == sorted(order)


def changing(key, size):
    return {"a" if size > 1 else "b": jnp.zeros(())}


def growing(key, size):
    return {"a": jnp.zeros(size)}


LINEAR = POINT | {"train_rate": [0.1], "adapt_rate": 0.2}


@pytest.mark.parametrize(
    ("function", "grid", "options", "named"),
    [
        (draws, {"sise": [1]}, {}, "did you mean 'size'"),
        (draws, {"size": []}, {}, "'size' is empty"),
        (draws, {"size": [1, 2, 1]}, {}, "got 1 twice"),
        (draws, {"size": [1], "scale": [0.0, -0.0]}, {}, "got -0.0 twice"),
        (draws, {"size": [1], ("scale", "size"): [(1.0, 2)]}, {}, "'size' twice"),
        (draws, {("size", "scale"): [(1, 2.0, 3)]}, {}, "zips 2 axes"),
        (draws, {"size": [1], "scale": [np.nan]}, {}, "finite"),
        (draws, {"scale": [1.0]}, {}, "size missing"),
        (draws, {"size": [1], "seed": [1]}, {}, "reserved"),
        (draws, {"size": [1]}, {"seeds": 0}, "seeds must be"),
        (draws, {"size": [1]}, {"seeds": [1, 1]}, "got 1 twice"),
        (draws, {"size": [1]}, {"seeds": 1.5}, "seeds must be"),
        (draws, {"size": [1]}, {"root_seed": -1}, "root"),
        (draws, {"size": [1]}, {"block": 0}, "block"),
        (draws, {"size": [1]}, {"memory": 0}, "memory"),
        (draws, {"size": [1]}, {"common_random_numbers": ["scael"]}, "did you mean 'scale'"),
        (draws, {"size": [1]}, {"client": "tcp://localhost:1"}, "store"),
        (draws, [], {}, "at least one"),
        (draws, [{"size": 1}, {"size": 2, "scale": 1.0}], {}, "same axes"),
        (changing, {"size": [1, 2]}, {}, "same keys, shapes"),
        (growing, {"size": [1, 2]}, {}, "same keys, shapes"),
        (nm.sweeps.linear, LINEAR | {"sigam": 1.0}, {}, "did you mean 'sigma'"),
        (nm.sweeps.linear, LINEAR | {"sigma": [0.1, -1.0]}, {}, "sigma must be at least 0"),
        (nm.sweeps.linear, LINEAR | {"p": [0]}, {}, "p must be"),
    ],
)  # fmt: skip
def test_bad_input_is_named_before_anything_is_computed(
    function, grid, options, named, monkeypatch
):
    from tests.internals import Runner

    monkeypatch.setattr(Runner, "compute", None)
    monkeypatch.setattr(Runner, "probe", None)
    with pytest.raises(ValueError, match=named):
        nm.sweep(function, grid, **({"seeds": 2} | options))


def test_progress_is_a_bar_or_a_function(capsys):
    told = []
    nm.sweep(draws, {"size": [1, 2]}, 3, progress=lambda *counts: told.append(counts))
    assert told[-1] == (6, 6)
    nm.sweep(draws, {"size": [1, 2]}, 3, progress=True)
    assert capsys.readouterr() == ("", "")  # lines of a log come after seconds
    with pytest.raises(TypeError, match="progress must be True, False or a function"):
        nm.sweep(draws, {"size": [1, 2]}, 3, progress=1)


def test_a_dry_run_says_what_a_sweep_would_be(renamed):
    grid = {"size": [2, 3], "scale": [0.5, 1.0, 2.0]}
    found = nm.sweeps.plan(renamed, grid, 4, block=6)
    assert (found.blocks, found.groups, found.block) == (6, 2, (1, 1, 4))
    assert found.nbytes == 24 * 4 * (1 + 3)
    assert found.seconds > 0 and found.compile_seconds > 0
    lines = repr(found).splitlines()
    for text in ("24 (size 2 x scale 3 x seed 4)", "float32, cells x squares_0 3", "compiling"):
        assert any(text in line for line in lines)
    with pytest.raises(ValueError, match="did you mean 'size'"):
        nm.sweeps.plan(renamed, {"sise": 2}, 4)


@pytest.mark.parametrize(("seconds", "of_block"), [(1e-5, 2.0), (1e-3, 10**3 / 128), (1e-1, 60.0)])
def test_blocks_of_a_long_sweep_are_longer(seconds, of_block, monkeypatch):
    from tests.internals import Runner

    monkeypatch.setattr(Runner, "probe", lambda self, group: seconds)
    found = nm.sweeps.plan(lambda key, x: {"y": x}, {"x": [1.0, 2.0]}, 500_000)
    cells = found.block[0] * found.block[1]
    # Large blocks are round, and as large as memory allows.
    assert cells in (600, found.block[1]) or cells % 1024 == 0
    assert cells * seconds < 1.2 * of_block


class Powers(SweepFunction):
    """Says some of what a sweep asks, and leaves the rest to the defaults."""

    accepts = requires = ("size", "scale", "powers")
    static_axes = ("size",)
    vectorized_axes = ("powers",)

    def __call__(self, key, *, size, scale, powers):
        return {"value": scale * jnp.sum(jax.random.uniform(key, (size,))) ** powers}

    def check(self, **point):
        if point["scale"] < 0:
            raise ValueError("scale must be at least 0")


def test_a_sweep_function_says_what_it_takes():
    grid = {"size": [1, 2], "scale": [0.0, 2.0], "powers": [1.0, 2.0, 3.0]}
    result = nm.sweep(Powers(), grid, 4)["value"]
    assert result.dims == ("size", "scale", "seed", "powers")
    one = result.sel(scale=2.0) / 2
    np.testing.assert_allclose(one.sel(powers=3.0), one.sel(powers=1.0) ** 3, rtol=1e-5)
    with pytest.raises(ValueError, match="scale must be at least 0"):
        nm.sweep(Powers(), grid | {"scale": -1.0}, 4)
    assert isinstance(nm.sweeps.linear, SweepFunction)


def test_a_function_with_some_of_the_attributes_is_told_of_the_protocol():
    def function(key, rates):
        return {"value": rates}

    function.vectorized_axes = ("rates",)
    with pytest.raises(
        TypeError, match=r"vectorized_axes.*subclass negmaml\.sweeps\.SweepFunction"
    ):
        nm.sweep(function, {"rates": [1.0, 2.0]}, 1)


@pytest.mark.parametrize(
    ("function", "grid"),
    [
        (lambda key, a: jnp.zeros(()), {"a": [1.0]}),
        (lambda key, a: {"x": {"y": a}}, {"a": [1.0]}),
        (lambda **point: {}, {"a": [1.0]}),
        (draws, {"size": [1], "scale": [[1.0, 2.0]]}),
        (draws, {"size": [None]}),
        (draws, 3),
        (draws, {3: [1]}),
        (None, {"a": [1.0]}),
    ],
)
def test_wrong_types_are_type_errors(function, grid):
    with pytest.raises(TypeError):
        nm.sweep(function, grid, seeds=1)


def test_memory_budget_bounds_the_program(renamed):
    def function(key, size):
        return {"top": jnp.linalg.norm(jax.random.normal(key, (size, size)), 2)}

    work = nm.sweeps.prepare(function, {"size": [60]}, 200)
    for memory in (200_000, 2_000_000):
        runner = work.runner(work.grid.shape, memory, None)
        program = runner.compiler.program(0)
        assert program.nbytes <= memory
        assert program.batch >= memory // 200_000


def test_the_next_groups_compile_while_one_runs():
    work = nm.sweeps.prepare(draws, {"size": [2, 3, 4, 5]}, 3)
    runner = work.runner((2, 3), None, None)
    runner.compiler.at_once = 2
    runner.expect([(slice(0, 2), slice(0, 3)), (slice(2, 4), slice(0, 3))])
    runner.compiler.program(0)
    assert set(runner.compiler.ready) == {0}
    assert set(runner.compiler.started) == {1, 2}
    runner.compiler.program(3)  # out of order
    runner.compiler.program(1)
    assert set(runner.compiler.ready) == {0, 1, 3}


@pytest.mark.slow
def test_many_groups_keep_few_programs_and_compile_once(monkeypatch):
    from tests.internals import compiler

    compiled = []
    right = compiler.Compiler._fitting

    def fitting(self, group, *arguments):
        assert len(self.ready) <= 2
        compiled.append(group)
        return right(self, group, *arguments)

    monkeypatch.setattr(compiler, "KEPT", 2)
    monkeypatch.setattr(compiler.Compiler, "_fitting", fitting)
    grid = {"scale": [0.5, 1.0, 2.0], "size": [1, 2, 3, 4, 5]}  # groups recur along `scale`
    result = nm.sweep(draws, grid, 2, block=2)
    assert compiled == [4, 0, 1, 2, 3, 4]  # the largest first, to see how long it takes
    monkeypatch.undo()
    assert result["first"].equals(nm.sweep(draws, grid, 2)["first"])


class Declared(SweepFunction):
    """Says that its output has the dim of its whole axis, in every group of sizes."""

    accepts = requires = ("size", "powers")
    vectorized_axes = ("powers",)
    output_dims = {"value": ("powers",)}  # noqa: RUF012
    traced = 0

    def __call__(self, key, *, size, powers):
        type(self).traced += 1
        return {"value": jnp.sum(jax.random.normal(key, (size,))) ** powers}


class Undeclared(Declared):
    output_dims = {}  # noqa: RUF012
    traced = 0


def test_outputs_that_are_declared_are_traced_once_and_others_in_every_group():
    grid = {"size": [2, 3, 4, 5], "powers": [1.0, 2.0]}
    for function, times in ((Declared(), 1), (Undeclared(), 4)):
        work = nm.sweeps.prepare(function, grid, 3)
        assert [o.dims for o in work.outputs] == [("powers",)]
        assert type(function).traced == times
