"""Results print a few lines, whatever they hold."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from negmaml import theory
from negmaml.linear import Data
from negmaml.rules import Solution, SolveInfo
from tests.internals import (
    Table,
    add_table_repr,
    check_key,
    mean_range_text,
    mean_text,
    shape_text,
    tree_text,
)


def test_a_table_is_aligned_and_escaped():
    table = Table("Title", [("loss", "1"), ("a<b", "22")], ("what", "how much"))
    assert table.text().splitlines() == [
        "Title", "  what  how much", "  loss  1", "  a<b   22",
    ]  # fmt: skip
    assert "<b>Title</b>" in table.html() and "a&lt;b" in table.html()
    assert Table("Empty", []).text() == "Empty"


def test_a_class_prints_its_summary():
    @add_table_repr
    class Thing:
        def _summary(self):
            return Table("Thing", [("size", "3")])

    assert repr(Thing()) == "Thing\n  size  3"
    assert "<td" in Thing()._repr_html_()


@pytest.mark.parametrize(
    ("value", "text"),
    (
        (np.zeros((2, 3), np.float32), "float32[2,3]"),
        (jnp.zeros(()), "float32[]"),
        (3, "3"),
        (print, "builtin_function_or_method"),
    ),
)
def test_arrays_print_as_type_and_shape(value, text):
    assert shape_text(value) == text


def test_pytrees_print_as_their_first_leaves():
    assert tree_text(jnp.zeros(2)) == "float32[2]"
    assert tree_text({"a": jnp.zeros(2), "b": 1}) == "['a'] float32[2], ['b'] 1"
    assert tree_text([0] * 9).endswith("and 5 more")
    assert tree_text(None) == "nothing"


def test_means_have_errors_and_count_values_that_are_not_finite():
    assert mean_text([1.0, 3.0]) == "2 ± 1 (n = 2)"
    assert mean_text([1.0, np.nan]) == "1 (n = 1, 1 not finite)"
    assert mean_text([np.nan]) == "none finite (n = 1)"
    assert jax.eval_shape(lambda x: (mean_text(x) == "traced") * x, 1.0).shape == ()


def test_means_that_may_share_random_numbers_are_not_pooled():
    text = "2 ± 1 to 5 ± 2 over 3 rates (n = 2 runs each)"
    assert mean_range_text([[3.0, 7.0], [1.0, 3.0], [2.5, 3.5]], "runs") == text
    assert mean_range_text(np.ones((1, 1, 4)), "runs") == "1 ± 0 (n = 4)"
    assert mean_range_text([1.0, 3.0], "runs") == "2 ± 1 (n = 2)"
    lost = mean_range_text([[3.0, np.nan], [1.0, 3.0]], "runs")
    assert lost == "2 ± 1 to 3 over 2 rates (n = 2 runs each, 1 values not finite)"
    assert mean_range_text([[np.nan], [np.inf]], "runs").startswith("none finite (n = 1 runs each")


@pytest.mark.parametrize("key", (jax.random.key(0), jax.random.PRNGKey(0), np.zeros(2, np.uint32)))
def test_keys_of_either_kind_pass(key):
    check_key("key", key)
    jax.vmap(lambda k: check_key("key", k))(jnp.stack([key, key]))


@pytest.mark.parametrize("key", (3, None, 0.5, jnp.zeros(2), "seed"))
def test_a_value_that_is_no_key_raises_and_names_the_remedy(key):
    with pytest.raises(TypeError, match=r"key must be a random key.*jax\.random\.key\("):
        check_key("key", key)
    with pytest.raises(ValueError, match="vmap for several"):
        check_key("key", jax.random.split(jax.random.key(0), 3))


LONG = jnp.linspace(-1.0, 1.0, 1000)
PROBLEM = nm.MixedLinearRegression(p=6, m=2, n_t=3, n_v=2, n_r=3, sigma=0.5, nu=1.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (nm.GradientDescent(0.1), "GradientDescent(0.1)"),
        (nm.GradientDescent(jnp.float32(-0.2), steps=3), "GradientDescent(-0.2, steps=3)"),
        (nm.GradientDescent(np.array([0.5, -1])), "GradientDescent(array([0.5, -1.0]))"),
        (nm.GradientDescent(LONG), "GradientDescent(<float32[1000], -1 to 1>)"),
        (
            nm.GradientDescent(nm.Schedule([0.1, 0.2]), 2),
            "GradientDescent(Schedule(array([0.1, 0.2])), steps=2)",
        ),
        (
            nm.GradientDescent({"a": jnp.ones((2, 3)), "b": 0.1}),
            "GradientDescent({'a': <float32[2,3], 1 to 1>, 'b': 0.1})",
        ),
        (nm.Momentum(0.1, 0.9, 3), "Momentum(rate=0.1, momentum=0.9, steps=3)"),
        (nm.Proximal(1.0, max_steps=9), "Proximal(1.0, max_steps=9)"),
        (nm.InnerOptimizer(optax.sgd(0.1), 3), "InnerOptimizer(<optax.chain>, steps=3)"),
        (
            nm.Implicit(nm.GradientDescent(0.1), strength=2.0, linear_solver="cg"),
            "Implicit(GradientDescent(0.1), strength=2.0, linear_solver='cg')",
        ),
        (PROBLEM, "MixedLinearRegression(p=6, m=2, n_t=3, n_v=2, n_r=3, sigma=0.5, nu=1.0)"),
        (SolveInfo(True, 0.0, 3), "SolveInfo(converged=True, residual=0.0, steps=3, "
         "negative_curvature=False)"),
        (nm.ParamsAndRule({"w": LONG}, nm.GradientDescent(0.1)),
         "ParamsAndRule(params={'w': <float32[1000], -1 to 1>}, rule=GradientDescent(0.1))"),
        (theory.RatePair(jnp.float32(-0.5), jnp.float32(0.25)), "RatePair(train=-0.5, adapt=0.25)"),
    ],
)  # fmt: skip
def test_objects_print_as_the_call_that_makes_them(value, text):
    assert repr(value) == text


def test_a_printed_call_without_long_arrays_can_be_evaluated():
    names = {**vars(nm), "GradientDescent": nm.GradientDescent, "Proximal": nm.Proximal}
    names |= {"Schedule": nm.Schedule, "array": np.array, "Momentum": nm.Momentum}
    names["MixedLinearRegression"] = nm.MixedLinearRegression
    rules = [nm.GradientDescent(nm.Schedule([0.1, -0.2]), 2), nm.Momentum(0.1, -0.5, 3, True)]
    for value in (PROBLEM, nm.Proximal(0.5, tolerance=1e-3), *rules):
        jax.tree.map(np.testing.assert_array_equal, eval(repr(value), names), value)


def test_results_print_shapes_and_ranges_and_a_table_in_a_notebook():
    data = Data(*(jnp.ones((40, 50, 6)) * i for i in range(4)))
    assert repr(data).splitlines()[:2] == ["Data", "  X_t  <float32[40,50,6], 0 to 0>"]
    solved = Solution({"w": LONG, "b": LONG}, SolveInfo(True, 0.0, 3))
    assert len(repr(solved)) < 300 and "1000" in repr(solved)
    pair = theory.RatePair(jnp.float32(-0.5), jnp.float32(0.25))
    for value in (data, solved, pair):
        assert value._repr_html_().count("<tr>") == len(value)
    train, adapt = pair
    assert (float(train), float(adapt)) == (-0.5, 0.25)


def test_everything_prints_inside_a_trace_and_without_its_numbers():
    def printed(x):
        for make in (nm.GradientDescent, nm.Schedule, nm.Proximal, lambda x: theory.Phase(x, x, x)):
            assert "<float32[3], traced>" in repr(make(x))
        return x

    jax.eval_shape(printed, jnp.ones(3))
    deleted = nm.GradientDescent(jnp.ones(9))
    deleted.rate.delete()
    assert repr(deleted) == "GradientDescent(<float32[9]>)"
    assert "key<fry>[]" in repr(nm.Stateful(jax.random.key(0), {}))
    assert (
        repr(nm.MetaSGDParams(object(), None)) == "MetaSGDParams(params=<object object>, rate=None)"
    )
    assert repr(nm.GradientDescent(np.array([0.1] * 7 + [2]))).endswith("0.1 to 2>)")
