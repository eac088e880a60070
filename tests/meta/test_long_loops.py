"""Derivatives of long inner loops: segments leave them as they are, truncation as documented."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import negmaml as nm
from negmaml.rules import combine, separate

STEPS = 5
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


PARAMS = {"w": normal(2, 3), "v": normal(3)}
TASKS = nm.Tasks((normal(2, 4, 2), normal(2, 4)), (normal(2, 4, 2), normal(2, 4)))
HEAD = {"w": False, "v": True}
RATES = nm.Schedule(np.array([0.3, -0.1, 0.2, 0.05]))  # the last one is repeated
RULES = {
    "gradient descent": nm.GradientDescent(RATES, STEPS),
    "momentum": nm.Momentum(RATES, 0.4, STEPS),
    "adam": nm.InnerOptimizer(optax.adam(0.1, eps_root=1e-8), STEPS),
}
slow = pytest.mark.slow


def loss(params, data):
    x, y = data
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)


def counting(params, state, data):
    """A loss whose state changes it from step to step, and depends on the parameters."""
    shift = jnp.mean(params["v"])
    return loss(params, data) * (1 + state), 0.9 * state + 0.1 * shift


def value_and_grad(rule, **options):
    return jax.jit(nm.maml_value_and_grad(loss, rule, mask=HEAD, **options))(PARAMS, TASKS)


def assert_close(found, expected, rtol=2e-5):
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def stepwise(params, rule, truncate=None):
    """The objective by a Python loop over tasks and steps."""

    def constant(tree):
        return tree if truncate is None else lax.stop_gradient(tree)

    def one_task(support, query):
        theta, frozen = {"v": params["v"]}, {"w": params["w"]}
        state = rule.init(theta)
        stepped, fixed = separate(rule)
        for k in range(STEPS):
            before = truncate is not None and k < STEPS - truncate
            read = lax.stop_gradient((theta, frozen, state)) if before else (theta, frozen, state)
            own = combine(jax.tree.map(lambda x, k=k: x[k], stepped), fixed)
            own = lax.stop_gradient(own) if before else own
            gradient = jax.grad(lambda t, f: loss({**t, **f}, support))(*read[:2])
            theta, state = own.update(gradient, read[2], read[0])
            if before:  # the value, with the derivative of the start
                theta, state = lax.stop_gradient((theta, state))
                start = params["v"]
                theta = {"v": theta["v"] + start - lax.stop_gradient(start)}
        return loss({**theta, **frozen}, query)

    tasks = [jax.tree.map(lambda x, i=i: x[i], TASKS) for i in range(2)]
    return sum(one_task(*task) for task in tasks) / 2


@pytest.mark.parametrize(
    ("name", "method", "segment"),
    [
        ("gradient descent", "mixed", 2),
        ("gradient descent", "remat", 2),
        ("momentum", "mixed", "sqrt"),
        pytest.param("momentum", "reverse", 2, marks=slow),
        pytest.param("momentum", "remat", 1, marks=slow),
        pytest.param("adam", "mixed", 2, marks=slow),
        pytest.param("adam", "reverse", 2, marks=slow),
        pytest.param("gradient descent", "mixed", STEPS, marks=slow),
        pytest.param("gradient descent", "mixed", 9, marks=slow),
        pytest.param("gradient descent", "reverse", STEPS, marks=slow),
    ],
)
def test_segments_leave_the_gradient_as_it_is(name, method, segment):
    expected = jax.value_and_grad(stepwise)(PARAMS, RULES[name])
    assert_close(value_and_grad(RULES[name], method=method, segment=segment), expected)


@pytest.mark.parametrize(
    ("name", "method", "segment", "last"),
    [
        ("gradient descent", "mixed", None, 2),
        ("gradient descent", "low-rank", None, 2),
        ("momentum", "mixed", 2, 3),
        ("momentum", "reverse", None, 1),
        pytest.param("momentum", "remat", 2, 3, marks=slow),
        pytest.param("adam", "mixed", None, 3, marks=slow),
        pytest.param("adam", "reverse", 2, 3, marks=slow),
        pytest.param("gradient descent", "reverse", None, STEPS + 1, marks=slow),
    ],
)
def test_truncated_derivative_is_that_of_a_loop_with_constant_first_steps(
    name, method, segment, last
):
    expected = jax.value_and_grad(stepwise)(PARAMS, RULES[name], truncate=min(last, STEPS))
    options = {"method": method, "segment": segment, "truncate": last}
    assert_close(value_and_grad(RULES[name], **options), expected)


@pytest.mark.parametrize("method", ["mixed", pytest.param("reverse", marks=slow)])
@pytest.mark.parametrize("last", [3, pytest.param(None, marks=slow)])
def test_gradient_in_the_rule_passes_through_segments_and_truncation(method, last):
    rule = nm.Momentum(RATES, jnp.float32(0.4), STEPS)
    expected = jax.grad(lambda rule: stepwise(PARAMS, rule, truncate=last))(rule)
    options = {"method": method, "segment": 2, "truncate": last}
    assert_close(value_and_grad(rule, wrt="rule", **options)[1], expected)


def test_truncation_of_maml_and_adapt_ignores_numbers_of_the_first_steps():
    def total(rates):
        rule = nm.GradientDescent(nm.Schedule(rates), STEPS)
        return nm.maml(loss, rule, mask=HEAD, truncate=2, segment=1)(PARAMS, TASKS)

    rates = jnp.linspace(0.3, -0.1, STEPS)
    found = jax.grad(total)(rates)
    whole = jax.grad(lambda r: stepwise(PARAMS, nm.GradientDescent(nm.Schedule(r), STEPS)))(rates)
    np.testing.assert_array_equal(found[: STEPS - 2], 0)
    np.testing.assert_allclose(found[STEPS - 2 :], whole[STEPS - 2 :], rtol=2e-5)

    def reached(scale, start):
        square = lambda w, target: scale * (w - target) ** 2 / 2  # noqa: E731
        return nm.adapt(square, start, 1.0, nm.GradientDescent(0.5, steps=3), truncate=1)

    # theta_2 = 3/4 is a constant; theta_3 = theta_2 - scale/2 (theta_2 - 1).
    of_scale, of_start = jax.grad(reached, (0, 1))(1.0, 0.0)
    assert (float(of_scale), float(of_start)) == (0.125, 0.5)


@pytest.mark.parametrize("segment", [2, pytest.param(None, marks=slow)])
def test_states_of_models_pass_through_segments(segment):
    model = nm.Stateful(PARAMS, jnp.float32(0.3))

    def of(**options):
        rule = RULES["gradient descent"]
        function = nm.maml_value_and_grad(counting, rule, **options)
        return jax.jit(function)(model, TASKS)

    assert_close(of(segment=segment, method="remat"), of())


def test_ten_thousand_steps_store_few_parameters():
    size, steps = 1000, 10_000
    square = lambda w, x: jnp.sum(jnp.sin(w) * x)  # noqa: E731
    tasks = nm.Tasks(*(jnp.ones((1, size)) for _ in range(2)))

    def bytes_of(**options):
        function = nm.maml_value_and_grad(square, nm.GradientDescent(0.1, steps), **options)
        program = jax.jit(function).lower(jnp.ones(size), tasks).compile()
        return program.memory_analysis().temp_size_in_bytes

    parameters = 4 * size
    assert bytes_of(method="mixed") > steps * parameters
    for method in ("mixed", "remat", "reverse"):
        # 100 before the segments, 100 in one, and at most 4 intermediate results a step.
        assert bytes_of(method=method, segment="sqrt") < 700 * parameters


def test_truncated_steps_store_nothing():
    size = 1000
    square = lambda w, x: jnp.sum(jnp.sin(w) * x)  # noqa: E731
    function = jax.grad(
        lambda w, x: jnp.sum(nm.adapt(square, w, x, nm.GradientDescent(0.1, 1000), truncate=3)),
        argnums=(0, 1),
    )
    program = jax.jit(function).lower(jnp.ones(size), jnp.ones(size)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 30 * 4 * size
