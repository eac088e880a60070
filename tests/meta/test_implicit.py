"""Meta-gradients of rules that solve, and their warnings where a problem was not solved."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import negmaml as nm
from tests.helpers import mostly_slow

KEY = jax.random.key(2)
TASKS = nm.tasks.Sinusoid(m=12, n_t=10, n_v=10)


def loss(params, data):
    x, y = data
    return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2)


def drawn():
    keys = jax.random.split(KEY, 2)
    params = {"in": jax.random.normal(keys[0], (1, 8)), "out": jax.random.normal(keys[1], (8, 1))}
    return params, TASKS(jax.random.key(3))


def warned(call):
    """The result, and the number of warnings of convergence."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = jax.block_until_ready(call())
        jax.effects_barrier()
    return result, sum(issubclass(w.category, nm.ConvergenceWarning) for w in seen)


@pytest.mark.parametrize("strength", mostly_slow((0.3, 5.0), 1))
def test_implicit_maml_is_that_of_newtons_points_and_a_dense_solve(strength, x64):
    params, tasks = drawn()
    start, unravel = ravel_pytree(params)
    inner = lambda w, data: loss(unravel(w), data)  # noqa: E731

    @jax.jit
    @jax.vmap
    def exact(support, query, theta):
        whole = lambda w: inner(w, support) + strength / 2 * jnp.sum((w - start) ** 2)  # noqa: E731
        for _ in range(3):  # polished by Newton's method in dense form
            theta = theta - jnp.linalg.solve(jax.hessian(whole)(theta), jax.grad(whole)(theta))
        value, slope = jax.value_and_grad(inner)(theta, query)
        gradient = strength * jnp.linalg.solve(jax.hessian(whole)(theta), slope)
        return value, gradient, theta

    rule = nm.Proximal(strength)
    adapted = jax.jit(jax.vmap(lambda data: nm.adapt(loss, params, data, rule)))(tasks.support)
    flat = jax.vmap(lambda p: ravel_pytree(p)[0])(adapted)
    values, gradients, theta = exact(*tasks, flat)
    np.testing.assert_allclose(flat, theta, rtol=1e-7, atol=1e-9)
    value, gradient = jax.jit(nm.imaml(loss, rule))(params, tasks)
    assert float(value) == pytest.approx(float(values.mean()), rel=1e-9)
    expected = gradients.mean(0)
    gap = jnp.linalg.norm(ravel_pytree(gradient)[0] - expected)
    assert float(gap / jnp.linalg.norm(expected)) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("mask", mostly_slow((None, {"in": False, "out": True}), 1))
def test_implicit_maml_is_the_gradient_of_its_objective_with_frozen_leaves_too(mask, x64):
    params, tasks = drawn()
    rule, options = nm.Proximal(2.0), {"mask": mask, "batch_size": 5}
    value, gradient = jax.jit(nm.imaml(loss, rule, **options))(params, tasks)
    expected = jax.jit(jax.value_and_grad(nm.maml(loss, rule, mask=mask)))(params, tasks)
    assert float(value) == pytest.approx(float(expected[0]), rel=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9),
                 gradient, expected[1])  # fmt: skip


BAD, GOOD = nm.Proximal(1.0, max_steps=1), nm.Proximal(1.0)


@pytest.mark.parametrize("make", mostly_slow((nm.maml, nm.imaml, nm.fomaml), 1))
def test_a_point_that_is_not_stationary_warns_once(make):
    params, tasks = drawn()
    assert warned(lambda: jax.jit(make(loss, BAD))(params, tasks))[1] == 1
    assert warned(lambda: jax.jit(make(loss, GOOD))(params, tasks))[1] == 0


@pytest.mark.slow
def test_gradients_through_adaptation_and_under_vmap_warn_too():
    params, tasks = drawn()

    def of_task(params, support, query):
        return loss(nm.adapt(loss, params, support, BAD), query)

    gradient = jax.jit(jax.vmap(jax.grad(of_task), (None, 0, 0)))
    assert 1 <= warned(lambda: gradient(params, *tasks))[1] <= 2  # the point, the linear system
    seeds = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    mapped = jax.jit(jax.vmap(nm.imaml(loss, BAD), (0, None)))
    assert warned(lambda: mapped(seeds, tasks))[1] == 1


def test_return_info_reports_convergence_without_a_warning():
    params, tasks = drawn()
    support = jax.tree.map(lambda x: x[0], tasks.support)
    (_, info), count = warned(lambda: nm.adapt(loss, params, support, BAD, return_info=True))
    assert count == 0 and not bool(info.converged) and int(info.steps) == 1
    assert warned(lambda: nm.adapt(loss, params, support, BAD))[1] == 1
    step = nm.GradientDescent(0.1, steps=3)
    _, info = nm.adapt(loss, params, support, step, return_info=True)
    assert info == (True, 0.0, 3, False)


class Mine(nm.InnerRule):
    """A solver of a user's own that returns parameters only, or a solution with its info."""

    def __init__(self, info=None):
        self.info = info

    def solve(self, loss, start):
        found = jax.tree.map(lambda w, g: w - 0.1 * g, start, jax.grad(loss)(start))
        return found if self.info is None else nm.rules.Solution(found, self.info)


jax.tree_util.register_pytree_node(Mine, lambda rule: ((), rule.info), lambda info, _: Mine(info))


@nm.pytree
class TowardsTheTargets(nm.InnerRule):
    """A rule whose `solve` sees the support and calls functions of the model."""

    rate: float

    def solve(self, loss, start, *, support, apply, **others):
        targets = apply(lambda params, x: params + 0 * x, start, support[1]).mean()
        return start + self.rate * (support[1].mean() - targets)


def test_defining_solve_is_enough_and_it_may_take_the_support():
    def square(w, data):
        return jnp.mean((data[0] * w - data[1]) ** 2)

    assert TowardsTheTargets(0.5).implicit and Mine().implicit
    assert nm.GradientDescent(0.1).implicit is False
    tasks = nm.Tasks((jnp.ones((2, 3)), jnp.full((2, 3), 4.0)), (jnp.ones((2, 1)),) * 2)
    rule, start = TowardsTheTargets(0.5), jnp.asarray(2.0)
    assert float(nm.adapt(square, start, jax.tree.map(lambda x: x[0], tasks.support), rule)) == 3
    assert float(nm.evaluate(jax.random.key(0), start, square, rule, tasks).mean) == 4
    for make in (nm.maml_value_and_grad, nm.imaml):
        value, gradient = make(square, rule)(start, tasks)
        assert (float(value), float(gradient)) == (4.0, 2.0)
    assert float(nm.fomaml(square, rule)(start, tasks)[1]) == 4


@pytest.mark.slow
def test_a_user_defined_solver_may_report_convergence_and_is_differentiated():
    params, tasks = drawn()
    expected = nm.maml_value_and_grad(loss, nm.GradientDescent(0.1))(params, tasks)
    for rule, count in ((Mine(), 0), (Mine(nm.rules.SolveInfo(False, 1.0, 3)), 1)):
        (value, gradient), seen = warned(lambda rule=rule: nm.imaml(loss, rule)(params, tasks))
        assert seen == count and float(value) == pytest.approx(float(expected[0]), rel=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                     gradient, expected[1])  # fmt: skip


@pytest.mark.slow
def test_convergence_includes_the_linear_system_of_the_derivative(x64):
    """A saddle of theta_1^2/2 - theta_2^4: solved at the start, where H + strength is singular."""

    def saddle(w, data):
        return w[0] ** 2 / 2 - (w[1] - data) ** 2 / 2

    start = jnp.zeros(2)
    tasks = nm.Tasks(jnp.zeros(1), jnp.ones(1))
    rule = nm.Proximal(1.0)
    _, info = nm.adapt(saddle, start, 0.0, rule, return_info=True)
    assert bool(info.converged)
    _, count = warned(lambda: nm.imaml(saddle, rule)(start, tasks))
    assert count == 1
    assert warned(lambda: jax.grad(nm.maml(saddle, rule))(start, tasks))[1] == 1


@pytest.mark.slow
def test_training_and_evaluation_report_the_unconverged_fraction():
    params, _ = drawn()

    def fitted(rule, **options):
        return nm.fit(KEY, params, nm.imaml(loss, rule), TASKS, optax.sgd(1e-3), 3, **options)

    result, count = warned(lambda: fitted(BAD))
    assert result.unconverged.shape == (3,) and float(result.unconverged.min()) > 0.5
    assert count == 1 and "not converged" in repr(result)
    with_mesh, _ = warned(lambda: fitted(BAD, mesh=jax.devices()))
    np.testing.assert_allclose(with_mesh.unconverged, result.unconverged)
    called, _ = warned(lambda: fitted(BAD, callback=lambda *_: None))
    np.testing.assert_allclose(called.unconverged, result.unconverged)
    result, count = warned(lambda: fitted(GOOD))
    assert count == 0 and not np.any(result.unconverged) and "converged" not in repr(result)
    steps = nm.fit(KEY, params, nm.fomaml(loss, nm.GradientDescent(0.1)), TASKS, optax.sgd(1e-3), 2)
    assert steps.unconverged is None

    tested, count = warned(lambda: nm.evaluate(KEY, params, loss, BAD, TASKS, episodes=18))
    assert count == 1 and float(tested.unconverged) > 0.5 and "not converged" in repr(tested)
    tested, count = warned(lambda: nm.evaluate(KEY, params, loss, GOOD, TASKS, episodes=18))
    assert count == 0 and float(tested.unconverged) == 0 and "converged" not in repr(tested)
    tested = nm.evaluate(KEY, params, loss, nm.GradientDescent(0.1), TASKS, episodes=18)
    assert tested.unconverged == 0
