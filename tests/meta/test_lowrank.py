"""Factored weights: which are chosen, in whose models, and that nothing else changes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from tests.helpers import mostly_slow
from tests.internals import wide_weights

WIDTH, POINTS = 64, 4
RNG = np.random.default_rng(0)
PARAMS = {
    "in": RNG.standard_normal((3, WIDTH)),
    "w": RNG.standard_normal((WIDTH, WIDTH)) / 8,
    "b": RNG.standard_normal(WIDTH) / 8,
    "out": RNG.standard_normal((WIDTH, 2)) / 8,
}
TASKS = nm.Tasks(
    *((RNG.standard_normal((5, POINTS, 3)), RNG.standard_normal((5, POINTS, 2))) for _ in range(2))
)


def error(z, y):
    return jnp.mean((z - y) ** 2)


def plain(p, data):
    return error(jnp.tanh(jnp.tanh(data[0] @ p["in"]) @ p["w"] + p["b"]) @ p["out"], data[1])


def transposed(p, data):
    return error(jnp.tanh(jnp.tanh(data[0] @ p["in"]) @ p["w"].T) @ p["out"] + p["b"][:2], data[1])


def weight_first(p, data):
    hidden = jnp.tanh(p["w"] @ jnp.tanh(p["in"].T @ data[0].T) + p["b"][:, None])
    return error((p["out"].T @ hidden).T, data[1])


def einsum(p, data):
    hidden = jnp.einsum("ni,ih->nh", data[0], p["in"])
    return error(jnp.tanh(jnp.einsum("nh,hk->nk", hidden, p["w"])) @ p["out"] + p["b"][:2], data[1])


def one_point_at_a_time(p, data):
    def model(x):
        return jnp.tanh(jnp.tanh(x @ p["in"]) @ p["w"] + p["b"]) @ p["out"]

    return error(jax.vmap(model)(data[0]), data[1])


def jitted(p, data):
    layer = jax.jit(lambda x, w: jax.nn.silu(x @ w))
    return error(layer(layer(data[0], p["in"]), p["w"]) @ p["out"] + p["b"][:2], data[1])


def used_twice(p, data):
    hidden = jnp.tanh(data[0] @ p["in"])
    return error(jnp.tanh(jnp.tanh(hidden @ p["w"]) @ p["w"] + p["b"]) @ p["out"], data[1])


def decayed(p, data):
    return plain(p, data) + 0.1 * jnp.sum(p["w"] ** 2)


def scanned(p, data):
    hidden, _ = jax.lax.scan(
        lambda h, _: (jnp.tanh(h @ p["w"]), None), data[0] @ p["in"], None, length=2
    )
    return error(hidden @ p["out"] + p["b"][:2], data[1])


def rematerialised(p, data):
    return jax.checkpoint(plain)(p, data)


def returned(p, data):
    return jnp.sum(p["w"] @ p["w"]) * 1e-3 + plain(p, data)


FACTORED = (plain, transposed, weight_first, einsum, one_point_at_a_time, jitted, used_twice)
DENSE = (decayed, scanned, rematerialised, returned)


def chosen(loss, steps=1):
    params = jax.tree.map(jnp.asarray, PARAMS)
    data = jax.tree.map(lambda x: jnp.asarray(x[0]), TASKS.support)
    leaves = wide_weights(loss, params, data, [True] * 4, steps)
    return {sorted(PARAMS)[i] for i in leaves}


@pytest.mark.parametrize("loss", FACTORED)
def test_a_wide_weight_that_only_multiplies_is_factored(loss):
    assert chosen(loss) == {"w"}


@pytest.mark.parametrize("loss", DENSE)
def test_a_weight_with_another_use_stays_dense(loss):
    assert chosen(loss) == set()


def test_many_rows_or_steps_make_a_weight_dense():
    assert chosen(plain, steps=4) == {"w"}
    assert chosen(plain, steps=5) == set()


CASES = [(loss, -0.3, 2) for loss in FACTORED + DENSE] + [(plain, 0.0, 1), (plain, 0.2, 1)]


# A vmap of the user's own, a weight used twice, one that stays dense, and one step.
@pytest.mark.parametrize(("loss", "rate", "steps"), mostly_slow(CASES, 4, 8))
def test_the_meta_gradient_is_that_of_dense_weights(loss, rate, steps, x64):
    rule = nm.GradientDescent(rate, steps)
    params, tasks = jax.tree.map(jnp.asarray, (PARAMS, TASKS))
    factored, dense = (
        jax.jit(nm.maml_value_and_grad(loss, rule, method=method))(params, tasks)
        for method in ("low-rank", "reverse")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), factored, dense
    )


BY_STEP = {
    "of all leaves": nm.Schedule([-0.3, 0.2, 0.1]),
    "of some leaves": {"in": 0.1, "w": nm.Schedule([-0.3, 0.2]), "b": nm.Schedule([0.1, -0.2, 0.3]),
                       "out": -0.1},
}  # fmt: skip


@pytest.mark.parametrize("rate", mostly_slow(BY_STEP.values(), 0))
def test_every_step_of_a_schedule_has_its_own_rate(rate, x64):
    rule = nm.GradientDescent(rate, 3)
    params, tasks = jax.tree.map(jnp.asarray, (PARAMS, TASKS))
    factored, dense = (
        jax.jit(nm.maml_value_and_grad(plain, rule, method=method))(params, tasks)
        for method in ("low-rank", "reverse")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), factored, dense
    )


@jax.custom_vjp
def signed(x):
    return x


signed.defvjp(lambda x: (signed(x), None), lambda _, g: (jnp.sign(g),))


def ruled(p, data):
    """A backward rule that is not linear, between products with a wide weight and its input."""
    return error(
        signed(jnp.tanh(jnp.tanh(data[0] @ p["in"]) @ p["w"] + p["b"])) @ p["out"], data[1]
    )


def test_derivative_rules_of_a_user_are_those_of_dense_weights(x64):
    assert chosen(ruled) == {"w"}
    params, tasks = jax.tree.map(jnp.asarray, (PARAMS, TASKS))
    mask = {"in": True, "w": True, "b": False, "out": True}

    @jax.jit
    def by_method(params):
        make = partial(nm.maml_value_and_grad, ruled, nm.GradientDescent(-0.3, 2), mask=mask)
        return [make(method=method)(params, tasks) for method in (None, "reverse")]

    factored, dense = by_method(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), factored, dense
    )


def temporary_bytes(method):
    tasks = jax.tree.map(lambda x: np.tile(x, (10, 1, 1)), TASKS)
    algorithm = nm.maml_value_and_grad(plain, nm.GradientDescent(0.1), method=method)
    return jax.jit(algorithm).lower(PARAMS, tasks).compile().memory_analysis().temp_size_in_bytes


def test_no_task_gets_weights_of_its_own():
    of_all_tasks = 50 * WIDTH * WIDTH * 4
    assert temporary_bytes("reverse") > of_all_tasks
    assert temporary_bytes("low-rank") < of_all_tasks
    assert temporary_bytes(None) == temporary_bytes("low-rank")  # the default


@pytest.mark.slow
def test_second_derivatives_of_the_meta_loss_exist(x64):
    params, tasks = jax.tree.map(jnp.asarray, (PARAMS, TASKS))

    def slope(rate, method):
        algorithm = nm.maml_value_and_grad(plain, nm.GradientDescent(rate), method=method)
        return jnp.sum(algorithm(params, tasks)[1]["w"] ** 2)

    factored, dense = (
        jax.jit(jax.grad(slope), static_argnums=1)(-0.2, method)
        for method in ("low-rank", "reverse")
    )
    np.testing.assert_allclose(factored, dense, rtol=1e-9)
