"""All methods agree, and disagree when one of them is made wrong."""

import jax
import numpy as np
import pytest

import negmaml as nm
from tests.internals import MethodResult, Verification
from tests.internals import cross_check as module

OVER = nm.MixedLinearRegression(
    p=20, m=2, n_t=20, n_v=1, n_r=6, sigma=0.5, nu=0.7, w0=0.1, omega0=0.3
)
UNDER = nm.MixedLinearRegression(p=4, m=12, n_t=6, n_v=4, n_r=6, sigma=0.5, nu=0.7)
RULES = nm.GradientDescent(-0.2), nm.GradientDescent(0.2)
NAMES = (
    "exact solve, expected",
    "theory, proportional",
    "theory, expansion",
    "exact solve, sampled",
    "meta-training (optax)",
    "meta-gradient, autodiff",
)


def methods_of(problem, train, adapt=RULES[1]):
    result = nm.verify(problem, train, adapt, runs=200)
    return result, {method.name: method for method in result.methods}


@pytest.fixture(scope="module")
def verified():
    return methods_of(UNDER, RULES[0])


class TestAgreement:
    @pytest.mark.slow
    def test_all_methods_agree_below_the_threshold(self, verified):
        result, methods = verified
        assert result.agrees, str(result)
        assert tuple(methods) == NAMES
        assert all(method.kind in ("z", "relative") for method in methods.values())

    @pytest.mark.slow
    def test_all_methods_agree_above_the_threshold(self):
        result, methods = methods_of(OVER, RULES[0])
        assert result.agrees, str(result)
        assert all(method.kind in ("z", "relative") for method in methods.values())

    @pytest.mark.slow
    def test_two_steps_agree_without_the_expansion(self):
        result, methods = methods_of(UNDER, nm.GradientDescent(-0.2, steps=2))
        assert result.agrees, str(result)
        assert [name for name in NAMES if methods[name].kind == "skipped"] == ["theory, expansion"]

    @pytest.mark.slow
    def test_a_rule_without_steps_leaves_the_two_solves(self):
        result, methods = methods_of(UNDER, nm.Proximal(1.0))
        assert result.agrees, str(result)
        assert [name for name in NAMES if methods[name].kind == "skipped"] == [
            "theory, expansion",
            "meta-training (optax)",
            "meta-gradient, autodiff",
        ]


class TestTable:
    def test_it_has_a_line_for_each_method_and_the_verdict(self, verified):
        lines = str(verified[0]).splitlines()
        assert lines[0].split() == ["method", "value", "error", "reference", "deviation"]
        assert [line.split("  ")[0] for line in lines[1:-1]] == list(NAMES)
        assert lines[-1] == "all methods agree"

    def test_it_marks_the_method_that_disagrees_and_no_other(self, verified):
        wrong = verified[0].methods[3]._replace(deviation=-4.1)
        result = Verification((*verified[0].methods[:2], wrong))
        assert not result.agrees
        lines = str(result).splitlines()
        assert ["disagrees" in line for line in lines[1:-1]] == [False, False, True]
        assert lines[-1] == "the methods disagree"


@pytest.mark.parametrize(
    ("kind", "deviation", "agrees"),
    [
        ("z", 3.9, True),
        ("z", -3.9, True),
        ("z", 4.1, False),
        ("z", -4.1, False),
        ("relative", np.nan, False),
        ("relative", np.inf, False),
        ("skipped", 0.0, True),
    ],
)
def test_a_method_agrees_within_its_limit(kind, deviation, agrees):
    assert MethodResult("method", 1.0, 0.1, 1.0, kind, deviation, 4.0).agrees == agrees


class TestSabotage:
    """Each computation made wrong in turn: only the methods that use it must disagree."""

    def broken_methods(self, monkeypatch, name, wrong):
        monkeypatch.setattr(module, name, wrong(getattr(module, name)))
        module._descents.clear_cache()
        try:
            result, methods = methods_of(UNDER, RULES[0])
        finally:
            module._descents.clear_cache()
        assert not result.agrees
        return {name for name, method in methods.items() if not method.agrees}

    def test_a_wrong_theory(self, monkeypatch):
        distance = module.theory.weight_error
        monkeypatch.setattr(
            module.theory, "weight_error", lambda *args, **options: 3 * distance(*args, **options)
        )
        result, methods = methods_of(UNDER, RULES[0])
        assert not result.agrees
        assert [name for name in NAMES if not methods[name].agrees] == ["theory, expansion"]

    @pytest.mark.slow
    def test_a_wrong_proportional_theory(self, monkeypatch):
        def scaled(evaluate):
            return lambda *args: jax.tree.map(lambda x: 1.5 * x, evaluate(*args))

        assert self.broken_methods(monkeypatch, "evaluate", scaled) == {"theory, proportional"}

    def test_a_wrong_meta_gradient(self, monkeypatch):
        def at_another_rate(maml):
            return lambda loss, rule: maml(loss, nm.GradientDescent(1.001 * rule.rate))

        broken = self.broken_methods(monkeypatch, "maml", at_another_rate)
        assert broken == {"meta-training (optax)", "meta-gradient, autodiff"}

    @pytest.mark.slow
    def test_a_wrong_exact_solve(self, monkeypatch):
        def shifted(minimiser):
            def wrong(*args):
                solution = minimiser(*args)
                return solution._replace(omega=solution.omega * (1 + 1e-4))

            return wrong

        assert self.broken_methods(monkeypatch, "minimiser", shifted) == {"meta-training (optax)"}

    @pytest.mark.slow
    def test_a_wrong_test_set(self, monkeypatch):
        def scaled(simulate):
            def wrong(*args, evaluation, **options):
                result = simulate(*args, evaluation=evaluation, **options)
                factor = 1.1 if evaluation == "sampled" else 1.0
                return result._replace(test_loss=factor * result.test_loss)

            return wrong

        assert self.broken_methods(monkeypatch, "simulate", scaled) == {"exact solve, sampled"}


def test_lowering_outside_is_left_as_it_was(verified):
    assert not jax.config.jax_enable_x64


@pytest.mark.slow
def test_every_method_but_the_expansion_agrees_for_inputs_with_a_spectrum():
    spectrum = np.asarray(nm.problem.named_spectrum("power", 12, exponent=0.8))
    problem = nm.MixedLinearRegression(
        p=12, m=2, n_t=8, n_v=2, n_r=6, sigma=0.5, nu=0.7, omega0=0.2, input_covariance=spectrum
    )
    result, methods = methods_of(problem, RULES[0], nm.GradientDescent(0.1))
    assert result.agrees, str(result)
    assert [name for name in NAMES if methods[name].kind == "skipped"] == ["theory, expansion"]
    assert "covariances" in methods["theory, expansion"].note
