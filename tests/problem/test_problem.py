"""The problem: its checks at the boundary, and its behaviour as a pytree."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm

VALID = dict(p=4, m=2, n_t=3, n_v=5, n_r=6, sigma=0.5, nu=0.7)
SIZES = ("p", "m", "n_t", "n_v", "n_r")


def build(**changes):
    return nm.MixedLinearRegression(**{**VALID, **changes})


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("size", (0, -1, np.int64(-7)))
def test_a_size_below_one_is_rejected_by_name(name, size):
    with pytest.raises(ValueError, match=rf"^{name} must be an integer"):
        build(**{name: size})


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("size", (True, 3.0, np.float64(3), "3", None, np.array([3])))
def test_a_size_that_is_no_integer_is_rejected_by_name(name, size):
    with pytest.raises(TypeError, match=rf"^{name} must be an integer"):
        build(**{name: size})


def test_numpy_integers_are_sizes_and_become_python_integers():
    problem = build(**{name: np.int32(8) for name in SIZES})
    assert [type(getattr(problem, name)) for name in SIZES] == [int] * 5


@pytest.mark.parametrize("name", ("sigma", "nu"))
@pytest.mark.parametrize("value", (-1e-9, -1, float("nan"), float("inf"), [0.5], np.ones((2, 2))))
def test_a_variance_that_is_negative_not_finite_or_not_scalar_is_rejected_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name} "):
        build(**{name: value})


@pytest.mark.parametrize("name", ("sigma", "nu", "w0", "omega0"))
@pytest.mark.parametrize("value", ("1", 1j, True, None))
def test_a_variance_or_offset_that_is_no_real_number_is_rejected_by_name(name, value):
    with pytest.raises(TypeError, match=rf"^{name} "):
        build(**{name: value})


@pytest.mark.parametrize("name", ("sigma", "nu"))
@pytest.mark.parametrize("value", (0, 0.0, np.float32(2), jnp.float32(3)))
def test_zero_and_any_real_scalar_type_are_variances(name, value):
    assert getattr(build(**{name: value}), name) == value


@pytest.mark.parametrize("name", ("w0", "omega0"))
@pytest.mark.parametrize("shape", ((1,), (5,), (4, 1), (1, 4)))
def test_an_offset_of_another_shape_is_rejected_by_name(name, shape):
    with pytest.raises(ValueError, match=rf"^{name} must be a scalar .* shape \(4,\)"):
        build(**{name: np.zeros(shape)})


@pytest.mark.parametrize("name", ("w0", "omega0"))
@pytest.mark.parametrize("value", (float("nan"), float("-inf"), np.array([0, 1, np.nan, 2])))
def test_an_offset_that_is_not_finite_is_rejected_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be finite"):
        build(**{name: value})


def test_fields_cannot_be_assigned():
    with pytest.raises(dataclasses.FrozenInstanceError):
        build().sigma = 1.0


def test_replace_runs_the_checks_again():
    with pytest.raises(ValueError, match=r"sigma"):
        dataclasses.replace(build(), sigma=-1.0)


@pytest.mark.parametrize(
    ("p", "m", "n_v", "rows", "over"),
    ((7, 2, 3, 6, True), (6, 2, 3, 6, False), (5, 2, 3, 6, False)),
)
def test_rows_and_regime_follow_from_the_sizes(p, m, n_v, rows, over):
    problem = build(p=p, m=m, n_v=n_v)
    assert (problem.rows, problem.overparameterized) == (rows, over)


def test_only_variances_and_offsets_are_leaves():
    problem = build(w0=np.arange(4.0), omega0=2.0)
    leaves = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(problem)}
    assert list(leaves) == [".sigma", ".nu", ".w0", ".omega0"]
    assert leaves[".sigma"] == 0.5
    assert leaves[".nu"] == 0.7


def test_flatten_and_unflatten_give_back_every_field():
    problem = build(w0=1.5)
    leaves, structure = jax.tree.flatten(problem)
    assert jax.tree.unflatten(structure, leaves) == problem


def test_new_variances_and_offsets_do_not_retrace():
    chex.clear_trace_counter()
    function = jax.jit(chex.assert_max_traces(lambda q: q.sigma + q.nu + q.w0, n=1))
    values = [
        float(function(build(sigma=sigma, nu=nu, w0=w0)))
        for sigma, nu, w0 in ((0.0, 0.0, 0.0), (1.0, 2.0, -3.5), (0.5, 0.25, 4.0))
    ]
    assert values == [0.0, -0.5, 4.75]


def test_a_new_size_retraces():
    traced = []

    @jax.jit
    def function(problem):
        traced.append(problem.n_t)
        return problem.sigma * problem.n_t

    assert [float(function(build(n_t=n))) for n in (3, 4, 3)] == [1.5, 2.0, 1.5]
    assert traced == [3, 4]


def test_a_gradient_is_a_problem_and_may_hold_negative_variances():
    gradient = jax.grad(lambda q: -3.0 * q.sigma - q.nu**2 + 2 * q.w0)(build())
    assert isinstance(gradient, nm.MixedLinearRegression)
    assert gradient.p == 4
    np.testing.assert_allclose(
        [gradient.sigma, gradient.nu, gradient.w0, gradient.omega0],
        [-3.0, -1.4, 2.0, 0.0],
        rtol=1e-6,
    )


def test_vmap_over_sigma_inside_a_problem():
    sigmas = jnp.array([0.0, 0.5, 2.0])
    values = jax.vmap(lambda sigma: build(sigma=sigma).sigma ** 2)(sigmas)
    np.testing.assert_allclose(values, [0.0, 0.25, 4.0])


def test_vmap_over_a_stacked_problem():
    problems = [build(sigma=s, nu=v) for s, v in ((0.1, 1.0), (0.2, 2.0))]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *problems)
    values = jax.vmap(lambda q: q.p * q.sigma + q.nu)(stacked)
    np.testing.assert_allclose(values, [1.4, 2.8], rtol=1e-6)


VECTOR = np.array([1.0, -2.0, 0.0, 3.0])


@pytest.mark.parametrize(
    ("w0", "omega0", "expected"),
    (
        (0.0, 0.0, 0.0),
        (1.0, -1.0, 16.0),  # a scalar stands for each of the four coordinates
        (VECTOR, 0.0, 14.0),
        (0.0, VECTOR, 14.0),
        (1.0, VECTOR, 14.0),  # 0 + 9 + 1 + 4
        (VECTOR, VECTOR, 0.0),
        (VECTOR, -VECTOR, 56.0),
    ),
)
def test_offset_squared_treats_a_scalar_as_every_coordinate(w0, omega0, expected):
    assert float(build(w0=w0, omega0=omega0).offset_squared) == pytest.approx(expected)


def test_offset_squared_is_differentiable_in_the_starting_point():
    gradient = jax.grad(lambda omega0: build(w0=1.0, omega0=omega0).offset_squared)(
        jnp.array(VECTOR)
    )
    np.testing.assert_allclose(gradient, 2 * (VECTOR - 1.0), rtol=1e-6)
