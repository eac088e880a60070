"""The memory plan: estimates near those of the compiler, and the choice for a budget."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from tests.internals import check_bytes

RNG = np.random.default_rng(0)
slow = pytest.mark.slow


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def tasks_of(count, rows, inputs, outputs=1):
    parts = [(normal(count, rows, inputs), normal(count, rows, outputs)) for _ in range(2)]
    return nm.Tasks(*parts)


def network(params, data):
    x, y = data
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return jnp.mean((x @ params[-1] - y) ** 2)


def convolutional(params, data):
    x, labels = data
    for kernel in params["kernels"]:
        x = jax.nn.relu(nm.im2col_convolution(x, kernel))
    logits = x.mean((1, 2)) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def sines(w, x):
    return jnp.sum(jnp.sin(w) * x)


def images():
    return normal(2, 10, 14, 14, 1), RNG.integers(0, 5, (2, 10))


KERNELS = {"kernels": [normal(3, 3, 1, 8), normal(3, 3, 8, 8)], "head": normal(8, 5)}
ADAM = optax.adam(1e-3, eps_root=1e-8)
MODELS = {
    "few numbers, many steps": (
        sines, normal(1000), nm.Tasks(normal(2, 1000), normal(2, 1000)),
        nm.GradientDescent(0.1, steps=1000),
    ),
    "few rows": (
        network, [normal(1, 40), normal(40, 40), normal(40, 1)], tasks_of(25, 10, 1),
        nm.GradientDescent(0.01, steps=5),
    ),
    "many rows": (
        network, [normal(16, 64), normal(64, 64), normal(64, 1)], tasks_of(4, 500, 16),
        nm.Momentum(0.01, 0.5, steps=5),
    ),
    "wide layers": (
        network, [normal(64, 256), normal(256, 256), normal(256, 10)], tasks_of(4, 8, 64, 10),
        nm.GradientDescent(0.01, steps=10),
    ),
    "convolutions": (
        convolutional, KERNELS, nm.Tasks(images(), images()), nm.InnerOptimizer(ADAM, steps=4),
    ),
}  # fmt: skip
LONG = MODELS["few numbers, many steps"]
NUMBER = 4 * 1000  # bytes of its parameters


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("few numbers, many steps", {"method": "reverse"}),
        ("few numbers, many steps", {"method": "mixed", "segment": "sqrt"}),
        ("few numbers, many steps", {"method": "mixed", "batch_size": 1}),
        ("few rows", {"method": "mixed"}),
        ("many rows", {"method": "reverse"}),
        *(
            pytest.param(name, {"method": method, "segment": segment}, marks=slow)
            for name in MODELS
            for method, segment in (
                ("reverse", None), ("remat", None), ("mixed", None), ("reverse", "sqrt"),
                ("mixed", "sqrt"),
            )
        ),
        pytest.param("wide layers", {"method": "low-rank"}, marks=slow),
    ],
)  # fmt: skip
def test_estimates_are_within_a_factor_of_two_of_the_compiler(name, options):
    loss, params, tasks, rule = MODELS[name]
    function = nm.maml_value_and_grad(loss, rule, **options)
    estimate = nm.memory_plan(function, params, tasks).options[0]
    program = jax.jit(function).lower(params, tasks).compile()
    assert 0.5 < estimate.bytes / program.memory_analysis().temp_size_in_bytes < 2


def test_plan_lists_the_options_by_work():
    plan = nm.memory_plan(nm.maml_value_and_grad(sines, LONG[3]), *LONG[1:3])
    assert [option[:3] for option in plan.options] == [
        ("mixed", None, 2), ("reverse", None, 2), ("remat", None, 2), ("mixed", "sqrt", 2),
        ("reverse", "sqrt", 2), ("remat", "sqrt", 2),
    ]  # fmt: skip
    assert plan.chosen == plan.options[0]
    lines = repr(plan).splitlines()
    assert lines[0] == "Estimated memory beside parameters, tasks and results"
    assert lines[2].split() == ["mixed", "-", "2", "8.02", "MB", "chosen"]


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        ("1GiB", ("mixed", None, 2)),
        ("5MB", ("mixed", None, 1)),  # fewer tasks at once, before steps are taken twice
        (150 * 2 * NUMBER, ("mixed", "sqrt", 2)),
        (80 * NUMBER, ("mixed", "sqrt", 1)),
        (10 * NUMBER, None),
    ],
)
def test_budget_chooses_the_least_work_that_fits(budget, chosen):
    plan = nm.memory_plan(nm.maml_value_and_grad(sines, LONG[3]), *LONG[1:3], budget=budget)
    assert (plan.chosen and plan.chosen[:3]) == chosen


def test_options_of_the_user_are_kept():
    function = nm.maml_value_and_grad(sines, LONG[3], segment=10, batch_size=2, method="reverse")
    plan = nm.memory_plan(function, *LONG[1:3], budget=80 * NUMBER)
    assert [option[:3] for option in plan.options] == [("reverse", 10, 2)]
    assert plan.chosen is None


def test_methods_that_are_not_exact_are_no_options():
    @jax.custom_vjp
    def clipped(x):
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))
    function = nm.maml_value_and_grad(lambda w, x: sines(clipped(w), x), LONG[3])
    plan = nm.memory_plan(function, *LONG[1:3])
    assert {option.method for option in plan.options} == {"reverse", "remat"}


def test_budget_of_the_algorithm_is_kept_and_explained(capsys):
    budget = 150 * 2 * NUMBER
    function = nm.maml_value_and_grad(sines, LONG[3], memory_budget=budget, explain=True)
    program = jax.jit(function).lower(*LONG[1:3]).compile()
    assert program.memory_analysis().temp_size_in_bytes < budget
    shown = capsys.readouterr().out
    assert shown.startswith("Estimated memory") and "at most 1.2 MB" in shown
    expected = nm.maml_value_and_grad(sines, LONG[3], method="reverse")(*LONG[1:3])
    for a, b in zip(program(*LONG[1:3]), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


def test_budget_that_nothing_keeps_to_raises_before_anything_is_computed():
    function = nm.maml_value_and_grad(sines, LONG[3], memory_budget="40kB")
    with pytest.raises(ValueError, match=r"memory_budget must be at least \d+ kB .* got 40000 B"):
        function(*LONG[1:3])


def test_nothing_is_compiled_or_computed():
    def compiles(w, x):
        jax.debug.callback(lambda: pytest.fail("computed"))
        return sines(w, x)

    with jax.log_compiles(False), jax.transfer_guard("disallow"):
        function = nm.maml_value_and_grad(compiles, nm.GradientDescent(0.1, steps=9))
        params, tasks = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), LONG[1:3])
        assert nm.memory_plan(function, params, tasks, budget="1MB").chosen.method


def test_other_algorithms_have_a_batch_size():
    function = nm.fomaml(sines, LONG[3])
    plan = nm.memory_plan(function, *LONG[1:3], budget=4 * NUMBER)
    assert plan.options[0][:2] == (None, None)


@pytest.mark.parametrize(
    ("given", "size"), [(3, 3), ("3", 3), ("1.5kB", 1500), ("2 GiB", 2**31), ("1MiB", 2**20)]
)
def test_bytes(given, size):
    assert check_bytes("budget", given) == size


@pytest.mark.parametrize("wrt", ["rule", "both"])
def test_gradients_in_the_rule_have_a_plan(wrt):
    function = nm.maml_value_and_grad(sines, LONG[3], wrt=wrt)
    chosen = nm.memory_plan(function, *LONG[1:3], budget=150 * 2 * NUMBER).chosen
    assert chosen[:3] == ("mixed", "sqrt", 2)
