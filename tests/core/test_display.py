"""Results print a few lines, whatever they hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
