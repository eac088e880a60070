"""Inner rules as spectral filters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import negmaml as nm
from tests.helpers import OVER, RATES

KINDS = {
    "one step": lambda strength: nm.GradientDescent(strength),
    "four steps": lambda strength: nm.GradientDescent(strength, 4),
    "seven steps": lambda strength: nm.GradientDescent(strength, steps=7),
    "flow": nm.GradientFlow,
    "proximal": nm.Proximal,
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@given(strength=st.floats(-2.5, 2.5), x=st.floats(0, 4))
def test_the_filters_satisfy_b_equals_one_minus_x_q(kind, strength, x):
    if kind == "proximal":
        assume(abs(x + strength) > 1e-2)
    with jax.enable_x64(True):
        rule = KINDS[kind](strength)
        b, xq = float(rule.init_filter(x)), x * float(rule.label_filter(x))
    assert b == pytest.approx(1 - xq, rel=1e-12, abs=1e-12 * (1 + abs(xq)))


@pytest.mark.parametrize("strength", [rate for rate in RATES if rate])
@pytest.mark.parametrize(
    ("kind", "limit"),
    (
        ("one step", lambda s: s),
        ("four steps", lambda s: 4 * s),
        ("seven steps", lambda s: 7 * s),
        ("flow", lambda s: s),
        ("proximal", lambda s: 1 / s),
    ),
)
def test_the_filters_have_their_limits_at_zero(kind, limit, strength, x64):
    rule = KINDS[kind](strength)
    assert float(rule.label_filter(0.0)) == pytest.approx(limit(strength), rel=1e-15)
    assert float(rule.init_filter(0.0)) == 1.0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "proximal"])
def test_a_rule_of_strength_zero_keeps_the_parameters(kind):
    rule, x = KINDS[kind](0.0), jnp.array([0.0, 0.3, 2.0])
    np.testing.assert_array_equal(rule.label_filter(x), np.zeros(3))
    np.testing.assert_array_equal(rule.init_filter(x), np.ones(3))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("steps", (1, 2, 3, 5, 8))
def test_the_filters_sum_up_the_steps_of_the_scalar_recursion(rate, steps, x64):
    omega, y = -1.3, 0.8
    for x in (0.0, 0.2, 1.0, 3.7):
        theta = omega
        for _ in range(steps):
            theta = theta - rate * (x * theta - y)
        rule = nm.GradientDescent(rate, steps)
        assert float(rule.init_filter(x) * omega + rule.label_filter(x) * y) == pytest.approx(
            theta, rel=1e-12
        )


@pytest.mark.parametrize("time", (-1.2, -0.3, 0.5, 1.1))
def test_many_small_steps_approach_the_flow_at_first_order(time, x64):
    x = jnp.array([0.1, 0.9, 2.3])
    flow = nm.GradientFlow(time)
    errors = []
    for steps in (2**10, 2**11):
        small = nm.GradientDescent(time / steps, steps)
        errors.append(
            jnp.stack(
                [
                    small.label_filter(x) - flow.label_filter(x),
                    small.init_filter(x) - flow.init_filter(x),
                ]
            )
        )
    np.testing.assert_allclose(errors[0] / errors[1], 2.0, rtol=1e-2)


def flow_filter(time, x):
    return nm.GradientFlow(time).label_filter(x)


flow_slope, flow_slope_in_x = (jax.jit(jax.grad(flow_filter, i)) for i in (0, 1))
flow_curvature, flow_curvature_in_x = (
    jax.jit(jax.grad(jax.grad(flow_filter, i), i)) for i in (0, 1)
)

# Around zero, and on both sides of where the Taylor polynomial hands over to expm1.
PRODUCTS = (0.0, 1e-9, 1e-3, 0.0999999, 0.1000001, 0.7, -1e-3, -0.0999999, -0.1000001, -0.7)


@pytest.mark.parametrize("x", (0.4, 3.0))
@pytest.mark.parametrize("product", PRODUCTS)
def test_the_flow_filter_has_exact_derivatives_in_time(product, x, x64):
    time = product / x
    assert float(flow_slope(time, x)) == pytest.approx(math.exp(-product), rel=1e-12)
    assert float(flow_curvature(time, x)) == pytest.approx(-x * math.exp(-product), rel=1e-10)


@pytest.mark.parametrize("time", (0.5, -2.0))
@pytest.mark.parametrize("product", PRODUCTS)
def test_the_flow_filter_has_exact_derivatives_in_the_eigenvalue(product, time, x64):
    def exact(order):  # of sum_k (-x)^k time^(k+1) / (k+1)!, term by term
        return math.fsum(
            (-1) ** k
            * time ** (k + 1)
            * math.perm(k, order)
            * x ** (k - order)
            / math.factorial(k + 1)
            for k in range(order, 40)
        )

    x = product / time
    assert float(nm.GradientFlow(time).label_filter(x)) == pytest.approx(exact(0), rel=1e-14)
    assert float(flow_slope_in_x(time, x)) == pytest.approx(exact(1), rel=1e-11)
    assert float(flow_curvature_in_x(time, x)) == pytest.approx(exact(2), rel=1e-9)


@kinds
@pytest.mark.parametrize("x_shape", ((), (4,), (4, 5)))
@pytest.mark.parametrize("shape", ((), (2,), (2, 3)))
def test_filters_have_the_shape_of_the_rule_and_then_of_x(kind, shape, x_shape):
    rule = KINDS[kind](jnp.full(shape, 0.3))
    for function in (rule.label_filter, rule.init_filter):
        assert jax.eval_shape(function, jnp.ones(x_shape)).shape == shape + x_shape


@kinds
def test_a_batched_rule_gives_each_single_rule(kind):
    strengths, x = np.array([-0.7, 0.2, 1.5], np.float32), jnp.array([0.3, 1.1])
    single = np.stack([KINDS[kind](float(s)).label_filter(x) for s in strengths])
    np.testing.assert_allclose(KINDS[kind](strengths).label_filter(x), single, rtol=1e-6)


@kinds
@pytest.mark.parametrize("strength", (float("nan"), float("inf"), np.array([0.1, -np.inf])))
def test_a_strength_that_is_not_finite_is_rejected(kind, strength):
    with pytest.raises(ValueError, match=r"(rate|time|strength) must be finite"):
        KINDS[kind](strength)


@kinds
@pytest.mark.parametrize("strength", (1j, "0.1", True, None))
def test_a_strength_that_is_no_real_number_is_rejected(kind, strength):
    with pytest.raises(TypeError, match=r"(rate|time|strength) must hold real numbers"):
        KINDS[kind](strength)


def test_one_bad_leaf_of_a_rate_pytree_is_rejected():
    with pytest.raises(ValueError, match=r"rate must be finite"):
        nm.GradientDescent({"w": 0.1, "b": float("nan")})


@kinds
@pytest.mark.parametrize("strength", (*RATES, -1e6, 1e6, -3))
def test_no_real_strength_is_rejected_or_changed(kind, strength):
    assert jax.tree.leaves(KINDS[kind](strength)) == [strength]


@pytest.mark.parametrize("steps", (0, -1))
def test_fewer_than_one_step_is_rejected(steps):
    with pytest.raises(ValueError, match=r"steps .* at least 1"):
        nm.GradientDescent(0.1, steps)


@pytest.mark.parametrize("steps", (1.0, True, "2", None))
def test_steps_that_are_no_integer_are_rejected(steps):
    with pytest.raises(TypeError, match=r"steps must be an integer"):
        nm.GradientDescent(0.1, steps)


def test_steps_are_static_and_the_rate_is_traced():
    traced = []

    @jax.jit
    def function(rule):
        traced.append(rule.steps)
        return rule.label_filter(1.0)

    for rate, steps in ((0.1, 1), (-0.4, 1), (0.1, 2), (3.0, 2)):
        function(nm.GradientDescent(rate, steps))
    assert traced == [1, 2]


@nm.pytree
class Decay(nm.InnerRule):
    """Gradient descent with weight decay, which no filter describes."""

    rate: float
    decay: float
    linear = True

    def update(self, gradient, state, params):
        return (1 - self.decay) * params - self.rate * gradient, state


@nm.pytree
class Flat(nm.InnerRule):
    """A filter without the axes of its batch."""

    rate: float

    def label_filter(self, x):
        return jnp.ones_like(x)


def test_weight_decay_is_refused_on_the_linear_model_and_serves_general_models():
    with pytest.raises(ValueError, match="train must leave parameters unchanged where the gradie"):
        nm.theory.test_loss(OVER, Decay(-0.2, 0.1), nm.GradientDescent(0.2))
    with pytest.raises(ValueError, match="adapt must leave parameters unchanged where the gradie"):
        nm.simulate(jax.random.key(0), OVER, nm.GradientDescent(0.2), Decay(0.2, 0.1), runs=2)
    without = nm.theory.test_loss(OVER, Decay(-0.2, 0.0), nm.GradientDescent(0.2))
    expected = nm.theory.test_loss(OVER, nm.GradientDescent(-0.2), nm.GradientDescent(0.2))
    assert without == pytest.approx(float(expected), rel=1e-4)
    adapted = nm.adapt(lambda w, y: (w - y) ** 2 / 2, jnp.array(1.0), 2.0, Decay(0.5, 0.1))
    assert adapted == pytest.approx(0.9 + 0.5)


def test_a_filter_of_another_shape_is_refused_by_name():
    rule = Flat(jnp.array([-0.1, 0.1]))
    with pytest.raises(ValueError, match=r"label_filter of train must return shape .* \(2, 2\)"):
        nm.theory.test_loss(OVER, rule, nm.GradientDescent(0.2))
