"""Speed on a GPU or TPU, each row beside what the device allows.

    python benchmarks/accelerator.py                     all rows, sized for ten minutes on one GPU
    python benchmarks/accelerator.py --rows fit,sweep    rows whose names begin so
    python benchmarks/accelerator.py --size 0.01         a hundredth of the work, as for a CPU
    python benchmarks/accelerator.py --compile-only h100 no device: launches, bytes, memory

The limit of a row is the largest of three times: its random numbers at the rate of
`jax.random.normal`, its products at that of a large float32 product at full precision, and its
arguments and results at that of a copy. All three rates are measured first, on the same device.
The work is counted in the traced program, where loops of known length count as often as they run.

Sweeps report the time of a further cell, and the share of it in which the device computed: the time
of one run in a `simulate` over that of the cell.

--compile-only needs the compilers named in `hlo.py`, and compiles the same programs.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import harness
import hlo
import jax
import jax.numpy as jnp
import meta_gradients
import numpy as np
import optax

import negmaml as nm
from negmaml.examples import mlp

RATES = np.linspace(-0.6, 0.6, 25, dtype=np.float32)
REPEATS = 3
OVER = dict(p=60, m=3, n_t=30, n_v=2, n_r=20)
SQUARE = dict(p=20, m=10, n_t=20, n_v=2, n_r=20)  # n_v m = p
UNDER = dict(p=20, m=20, n_t=10, n_v=5, n_r=20)
LARGE = dict(p=200, m=5, n_t=50, n_v=8, n_r=20)


class Row(NamedTuple):
    """A program with its arguments; `count` of `unit` is the work of one call."""

    function: Callable
    arguments: tuple
    count: int
    unit: str


class Work(NamedTuple):
    """Random numbers, floating point operations of products, bytes of arguments and results."""

    draws: float
    flops: float
    bytes: float


class Rates(NamedTuple):
    """The amounts of `Work` that the device does per second."""

    draws: float
    flops: float
    bytes: float

    def limit(self, work: Work) -> float:
        """Seconds that the work takes at least."""
        return max(amount / rate for amount, rate in zip(work, self, strict=True))


# The rows.


def simulation(sizes: dict, runs: int, steps: int = 1, **options) -> Row:
    def simulate(key, rates):
        problem = nm.MixedLinearRegression(**sizes, sigma=0.5, nu=0.5)
        train, adapt = nm.GradientDescent(rates, steps), nm.GradientDescent(0.2)
        return nm.simulate(key, problem, train, adapt, runs=runs, **options).test_loss

    return Row(simulate, (jax.random.key(0), jnp.asarray(RATES)), runs, "runs")


def phase_diagram(side: int) -> Row:
    def phases(n_t, n_v):
        found = nm.theory.phase_diagram(20.0, 10.0, n_t[:, None], n_v, 0.5, 1.0)
        return tuple(found)

    axis = jnp.linspace(2, 60, side)
    return Row(phases, (axis, axis), side**2, "cells")


def kernel_training(tasks: int) -> Row:
    """Exact meta-training on 10 points of each task, at 25 rates."""
    kernel = nm.kernels.relu_network(2, bias_variance=0.5)

    def train(drawn, rates):
        rule = nm.GradientDescent(rates)
        return nm.kernels.meta_train(kernel, drawn, rule, meta_ridge=0.1).weights

    drawn = nm.tasks.Quadratic(8, tasks, 5, 5, 0.3, 1.0)(jax.random.key(0))
    return Row(train, (drawn, jnp.asarray(RATES)), 10 * tasks, "points")


def sinusoid(seeds: int, steps: int) -> Row:
    """`fit` of the network 1-40-40-1 of Finn et al. on 25 tasks of 10 and 10 points, with Adam."""
    value_and_grad = nm.maml_value_and_grad(mlp.loss, nm.GradientDescent(0.01))
    tasks, optimizer = nm.tasks.Sinusoid(m=25, n_t=10, n_v=10), optax.adam(1e-3)

    def train(keys, params):
        def one(key):
            return nm.fit(key, params, value_and_grad, tasks, optimizer, steps).params

        return jax.vmap(one)(keys) if seeds > 1 else one(keys[0])

    keys = jax.random.split(jax.random.key(1), seeds)
    return Row(train, (keys, mlp.init(jax.random.key(0))), seeds * steps, "meta-steps")


def meta_gradient(workload: str, tasks: int) -> Row:
    """One meta-gradient of `meta_gradients.py`."""
    rng, conv = np.random.default_rng(0), workload == "conv4"
    parameters = meta_gradients.DATA[workload](rng)[0]
    draw = meta_gradients.image_tasks if conv else meta_gradients.sinusoid_tasks
    data = draw(rng, tasks)
    x = {part: np.moveaxis(data[f"{part}_x"], 2, -1) if conv else data[f"{part}_x"]
         for part in ("support", "query")}  # fmt: skip
    drawn = nm.Tasks(*((x[part], data[f"{part}_y"]) for part in ("support", "query")))
    params = [p.transpose(2, 3, 1, 0) if p.ndim == 4 else p.T for p in parameters]
    loss = meta_gradients.LOSSES[workload]
    value_and_grad = nm.maml_value_and_grad(loss, nm.GradientDescent(0.01))
    params, drawn = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else None), (params, drawn)
    )
    return Row(value_and_grad, (params, drawn), tasks, "tasks")


def theory_of_rates(count: int) -> Row:
    spectrum = jnp.arange(1, 61, dtype=jnp.float32) ** -1.0

    def losses(rates):
        def one(rate):
            problem = nm.MixedLinearRegression(**OVER, sigma=0.5, nu=0.5, input_covariance=spectrum)
            rule, adapt = nm.GradientDescent(rate), nm.GradientDescent(0.2)
            return nm.theory.test_loss(problem, rule, adapt)

        return jax.vmap(one)(rates)

    return Row(losses, (jnp.linspace(-0.6, 0.6, count),), count, "rates")


def rows_of(size: float) -> dict[str, Callable[[], Row]]:
    """All rows, with a fraction `size` of the work of a GPU."""

    def n(count: int) -> int:
        return max(1, round(count * size))

    return {
        "simulate p=60": lambda: simulation(OVER, n(10**6)),
        "simulate p=20=n_v*m": lambda: simulation(SQUARE, n(10**6)),
        "simulate underparameterized": lambda: simulation(UNDER, n(10**5)),
        "simulate 5 steps": lambda: simulation(OVER, n(10**5), steps=5),
        "simulate p=200": lambda: simulation(LARGE, n(10**5)),
        "simulate sampled": lambda: simulation(OVER, n(10**5), evaluation="sampled"),
        "theory vmap of rates": lambda: theory_of_rates(n(10**4)),
        "phase diagram": lambda: phase_diagram(max(2, round(200 * math.sqrt(size)))),
        "kernels": lambda: kernel_training(max(2, round(50 * math.sqrt(size)))),
        "fit 1 seed": lambda: sinusoid(1, n(2000)),
        "fit 32 seeds": lambda: sinusoid(32, n(2000)),
        "fit 1024 seeds": lambda: sinusoid(1024, n(200)),
        "conv4 8 tasks": lambda: meta_gradient("conv4", 8),
        "conv4 64 tasks": lambda: meta_gradient("conv4", max(8, n(64))),
        "wide": lambda: meta_gradient("wide", 25),
    }


# Counting.


def work_of(function: Callable, arguments: tuple) -> Work:
    """The work of a program, counted in its trace."""
    traced = jax.make_jaxpr(function)(*arguments)
    draws, flops = _counted(traced.jaxpr)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments))
    size += sum(math.prod(x.shape) * x.dtype.itemsize for x in traced.out_avals)
    return Work(draws, flops, size)


def _counted(jaxpr) -> np.ndarray:
    """(random numbers, operations of products) of a program."""
    total = np.zeros(2)
    for equation in jaxpr.eqns:
        inner = [x for x in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr) if _is_jaxpr(x)]
        if inner:
            parts = [_counted(getattr(x, "jaxpr", x)) for x in inner]
            branches = equation.primitive.name in ("cond", "platform_index")
            part = max(parts, key=sum) if branches else sum(parts)
            total += equation.params.get("length", 1) * part
        elif equation.primitive.name == "random_bits":
            total[0] += math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            summed = math.prod(equation.invars[0].aval.shape[i] for i in left)
            total[1] += 2 * summed * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "conv_general_dilated":
            layout = equation.params["dimension_numbers"]
            kernel = equation.invars[1].aval.shape
            each = math.prod(kernel) / kernel[layout.rhs_spec[0]]  # products of an output number
            total[1] += 2 * each * math.prod(equation.outvars[0].aval.shape)
    return total


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


# Measuring.


def measured_rates(size: float) -> Rates:
    """Normals, operations of a float32 product at full precision, and bytes copied per second."""
    count, side = max(2**16, round(2**28 * size)), max(256, round(8192 * size ** (1 / 3)))
    draw = jax.jit(lambda key: jax.random.normal(key, (count,)))
    square = jnp.ones((side, side))
    product = jax.jit(partial(jnp.matmul, precision="highest"))
    copy, array = jax.jit(lambda x: x + 1), jnp.zeros(count)
    seconds = harness.best_seconds(
        lambda: draw(jax.random.key(0)), lambda: product(square, square), lambda: copy(array),
        repeats=REPEATS,
    )  # fmt: skip
    return Rates(count / seconds[0], 2 * side**3 / seconds[1], 8 * count / seconds[2])


def measure(report, rows: dict[str, Callable[[], Row]], rates: Rates) -> None:
    """Add the time and the limit of each row."""
    report.table("program", "unit", "work", "compile, s", "run, s", "per s", "limit, s",
                 "run / limit", texts=2)  # fmt: skip
    for name, make in rows.items():
        row = make()
        start = time.perf_counter()
        program = jax.jit(row.function).lower(*row.arguments).compile()
        compiling = time.perf_counter() - start
        (seconds,) = harness.best_seconds(lambda p=program, r=row: p(*r.arguments), repeats=REPEATS)
        limit = rates.limit(work_of(row.function, row.arguments))
        report.row(
            name, row.unit, row.count, f"{compiling:.1f}", f"{seconds:.4g}",
            f"{row.count / seconds:.4g}", f"{limit:.4g}", f"{seconds / limit:.3g}",
        )  # fmt: skip


def compile_only(report, rows: dict[str, Callable[[], Row]], kind: str) -> None:
    """Add what the compiler makes of each row for a device that need not be present."""
    report.table("program", "unit", "work", "compile, s", "launches", "GB", "temporaries, MiB",
                 texts=2)  # fmt: skip
    for name, make in rows.items():
        row = make()
        start = time.perf_counter()
        try:
            program = hlo.compile_for(kind, row.function, row.arguments)
        except jax.errors.JaxRuntimeError as error:
            report.row(name, row.unit, row.count, str(error).splitlines()[0][:60], "", "", "")
            continue
        seconds, found = time.perf_counter() - start, hlo.counts(program.as_text())
        held = program.memory_analysis().temp_size_in_bytes / 2**20
        report.row(name, row.unit, row.count, f"{seconds:.1f}", found.launches,
                   f"{found.bytes / 1e9:.3g}", f"{held:.0f}")  # fmt: skip


def sweeps(report, cells: int) -> None:
    """Add the time of a sweep of the linear model at 25 rates, with and without `reduce`."""
    row = simulation(OVER, cells)
    program = jax.jit(row.function)
    (alone,) = harness.best_seconds(lambda: program(*row.arguments), repeats=1)
    grid = OVER | {"sigma": 0.5, "nu": 0.5, "train_rate": RATES, "adapt_rate": 0.2}
    report.table("sweep", "cells", "s, with compilation", "s per cell more", "busy")
    for name, reduce in (("cells", None), ("mean and sem", {"seed": ["mean", "sem"]})):
        sweep = partial(nm.sweep, nm.sweeps.linear, grid, reduce=reduce)
        first, second = (harness.timed(partial(sweep, seeds=n)) for n in (cells, 2 * cells))
        # The difference has no compilation, planning or probe in it.
        more = (second - first) / cells
        report.row(name, cells, f"{first:.3g}", f"{more:.3g}", f"{alone / cells / more:.0%}")


def main(options, report):
    begun = time.perf_counter()
    begins = tuple(options.rows.split(","))
    rows = {name: row for name, row in rows_of(options.size).items() if name.startswith(begins)}
    if options.compile_only:
        compile_only(report, rows, options.compile_only)
        return
    rates = measured_rates(options.size)
    report.note(
        f"{jax.devices()[0].device_kind}: {rates.draws:.3g} normals, {rates.flops:.3g} operations "
        f"of products, {rates.bytes:.3g} bytes copied per second"
    )
    measure(report, rows, rates)
    if "sweep".startswith(begins):
        sweeps(report, max(100, round(10**7 * options.size)))
    report.note(f"{time.perf_counter() - begun:.0f} s in all")


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    harness.run(
        main, __doc__,
        harness.option("--rows", default="", help="beginnings of names, separated by commas"),
        harness.option("--size", type=positive, default=1.0, help="fraction of the work of a GPU"),
        harness.option("--compile-only", choices=hlo.KINDS, help="a device that need not be here"),
    )  # fmt: skip
