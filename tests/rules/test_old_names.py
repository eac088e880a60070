"""Old names of rules, of what rules define, and of kernels: each works and warns."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm

X = np.array([0.0, 0.5, 2.0])


def deprecated(old):
    return pytest.warns(DeprecationWarning, match=f"{old}.* was renamed")


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [(nm, "Rule", "InnerRule"), (nm.rules, "Rule", "InnerRule"),
     (nm.kernels, "neural_tangent", "empirical_ntk"),
     (nm.linear, "Solution", "MetaSolution")],
)  # fmt: skip
def test_an_old_export_is_the_new_one(module, old, new):
    with deprecated(old):
        assert getattr(module, old) is getattr(module, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tuned", lambda rule: rule.tunable),
        ("q", lambda rule: rule.label_filter(X)),
        ("b", lambda rule: rule.init_filter(X)),
        ("one_step", lambda rule: rule.spectral().constant_filter),
        ("metric", lambda rule: rule.spectral().preconditioner),
        ("growth", lambda rule: rule.spectral().exponential_type),
        ("crossing", lambda rule: rule.spectral().zero_indicator(X)),
        ("pole", lambda rule: rule.spectral().pole_indicator(X)),
        ("degree", lambda rule: rule.spectral().degree),
    ],
)
@pytest.mark.parametrize(
    "rule", [nm.GradientDescent(0.3), nm.GradientFlow(0.3), nm.Proximal(0.3)], ids=lambda r: f"{r}"
)
def test_an_old_attribute_of_a_rule_has_the_new_value(rule, old, new):
    with deprecated(old):
        found = getattr(rule, old)
    np.testing.assert_equal(found(X) if callable(found) else found, new(rule))


def test_a_rule_with_filters_by_their_old_names_serves():
    with deprecated(r"Old\.") as seen:

        @nm.pytree
        class Old(nm.InnerRule):
            strength: Any
            tuned = "strength"
            growth = 0.0

            def q(self, x):
                return 1 / (jnp.asarray(x) + self.strength)

            @property
            def degree(self):
                return None

            def pole(self, x):
                return x + self.strength

    assert {str(w.message).split()[0] for w in seen} == {"Old.tuned", "Old.q", "Old.degree,"}
    old, new = Old(0.4), nm.Proximal(0.4)
    assert old.with_tunable(0.5).strength == 0.5
    np.testing.assert_allclose(old.init_filter(X), new.init_filter(X), rtol=1e-6)
    np.testing.assert_array_equal(old.spectral().pole_indicator(X), X + 0.4)
    problem = nm.MixedLinearRegression(p=6, m=2, n_t=4, n_v=2, n_r=4, sigma=0.6, nu=0.9)
    losses = [nm.theory.test_loss(problem, r, nm.GradientDescent(0.2)) for r in (old, new)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


def test_a_field_may_have_an_old_name():
    @nm.pytree
    class Field(nm.InnerRule):
        q: float = 0.5
        metric: float = 1.0

    assert (Field().q, Field(metric=2.0).metric) == (0.5, 2.0)


def test_a_rule_of_the_package_is_final():
    with pytest.raises(TypeError, match="must not derive from GradientDescent"):

        class Changed(nm.GradientDescent):
            pass


def test_old_kinds_of_a_network(x64):
    for old, new in (("tangent", "ntk"), ("process", "nngp")):
        with deprecated(f"kind='{old}'"):
            assert nm.kernels.relu_network(1, kind=old) == nm.kernels.relu_network(1, kind=new)


@pytest.mark.parametrize(
    "result",
    [nm.Simulation(*jnp.zeros((2, 3)), jnp.array([True])),
     nm.linear.MetaSolution(jnp.zeros(3), jnp.array([True]))],
    ids=["Simulation", "MetaSolution"],
)  # fmt: skip
def test_an_old_attribute_of_a_result(result):
    with deprecated("reliable"):
        assert result.reliable is result.well_conditioned
