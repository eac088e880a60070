"""Inner problems by any solver: the derivative is that of the solution, whatever the solver."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads

import negmaml as nm
from tests.helpers import mostly_slow
from tests.internals import LinearSettings
from tests.meta.test_implicit import warned

KEYS = jax.random.split(jax.random.key(4), 6)
X, Y = jax.random.normal(KEYS[0], (12, 4)), jax.random.normal(KEYS[1], (12,))
QUERY = jax.random.normal(KEYS[2], (9, 4)), jax.random.normal(KEYS[3], (9,))
START = jax.random.normal(KEYS[4], (4,))
S = X.T @ X / len(Y)
TASKS = jax.tree.map(lambda x: jnp.stack([x, 0.8 * x]), nm.Tasks((X, Y), QUERY))


def ridge(w, data):
    X, y = data
    return jnp.mean((X @ w - y) ** 2) / 2


def logistic(w, data):
    X, y = data
    return jnp.mean(jnp.logaddexp(0, -jnp.sign(y) * (X @ w))) + 0.05 * jnp.sum(w**4)


def newton(objective, start, steps=1):
    """Newton's method, which reaches any stationary point; one step if the gradient is linear."""
    w, unravel = ravel_pytree(start)
    flat = lambda w: objective(unravel(w))  # noqa: E731
    step = lambda _, w: w - jnp.linalg.solve(jax.hessian(flat)(w), jax.grad(flat)(w))  # noqa: E731
    return unravel(jax.lax.fori_loop(0, steps, step, w))


def many_newton_steps(objective, start):
    return newton(objective, start, 15)


def double(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


SOLVERS = {
    "gradient descent": nm.GradientDescent(0.3, steps=4000),
    "schedule": nm.GradientDescent(nm.Schedule([0.5, 0.3]), steps=4000),
    "momentum": nm.Momentum(0.2, 0.8, 3000),
    "newton": many_newton_steps,
    "optax": optax.sgd(0.3, momentum=0.5),
    "lbfgs": optax.lbfgs(),
}


@pytest.mark.parametrize("name", mostly_slow(list(SOLVERS), 0, 3))
def test_any_solver_gives_the_point_and_meta_gradient_of_proximal(name, x64):
    start, tasks = double((START, TASKS))
    rule, same = nm.Implicit(SOLVERS[name], 0.4, tolerance=1e-9), nm.Proximal(0.4)
    expected = jax.jit(nm.imaml(logistic, same))(start, tasks)
    found, count = warned(lambda: jax.jit(nm.imaml(logistic, rule))(start, tasks))
    assert count == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    adapted, info = nm.adapt(logistic, start, (X, Y), rule, return_info=True)
    np.testing.assert_allclose(adapted, nm.adapt(logistic, start, (X, Y), same), rtol=1e-7)
    assert bool(info.converged) and int(info.steps) < 4000 and float(info.residual) < 1e-8


# H + strength I is indefinite for a strength of -0.9.
CASES = [(-0.9, jnp.float64, "minres"), (-0.9, jnp.float32, "dense"),
         (0.6, jnp.float64, "dense"), (0.6, jnp.float32, "minres")]  # fmt: skip


@pytest.mark.parametrize(("strength", "dtype", "linear_solver"), mostly_slow(CASES, 1, 3))
def test_both_signs_of_the_strength_have_the_closed_form(strength, dtype, linear_solver, x64):
    eigenvalues = np.linalg.eigvalsh(S)
    assert strength > 0 or eigenvalues[0] < -strength < eigenvalues[-1]
    start, tasks = jax.tree.map(lambda x: x.astype(dtype), (START, TASKS))
    rule = nm.Implicit(newton, strength, linear_solver=linear_solver)

    def closed_form(start):
        def one(support, query):
            A = support[0].T @ support[0] / len(Y) + strength * jnp.eye(4)
            right = support[0].T @ support[1] / len(Y) + strength * start
            return ridge(jnp.linalg.solve(A, right), query)

        return jnp.mean(jax.vmap(one)(*tasks))

    expected = jax.value_and_grad(closed_form)(start)
    tolerance = 2e-4 if dtype == jnp.float32 else 1e-10
    for make in (nm.imaml, lambda *a: jax.value_and_grad(nm.maml(*a))):
        (value, gradient), count = warned(
            lambda make=make: jax.jit(make(ridge, rule))(start, tasks)
        )
        assert gradient.dtype == dtype and count == 0
        np.testing.assert_allclose(value, expected[0], rtol=tolerance)
        np.testing.assert_allclose(gradient, expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("solver", ("cg", "neumann", "dense", "minres", "function"))
@pytest.mark.parametrize("sign", (1, -1))
def test_linear_solvers_solve_definite_systems_and_report_when_they_do_not(solver, sign, x64):
    A, b = sign * double(S + 0.3 * jnp.eye(4)), double(START)

    def library(matvec, b):  # of JAX, as one of lineax or another library would be
        return jax.scipy.sparse.linalg.bicgstab(matvec, b, tol=1e-12)[0]

    def solve(steps, apply=lambda v: A @ v, transposed=lambda v: A @ v):
        settings = LinearSettings(library if solver == "function" else solver, steps, None)
        return settings.solve_linear(1e-16, apply, transposed, b)

    found = solve(1000)
    assert bool(found.converged)
    np.testing.assert_allclose(found.x, np.linalg.solve(A, b), rtol=1e-8)
    assert solver in ("dense", "function", "minres") or not bool(solve(2).converged)
    # The transpose reveals a matrix that is not symmetric.
    assert not bool(solve(1000, transposed=lambda v: A @ v + v[::-1]).converged)


def test_the_variant_of_the_paper_is_near_and_warns_by_its_tolerances():
    options = {"strength": 2.0, "linear_solver": "cg", "linear_steps": 5}
    inner = nm.GradientDescent(0.1, steps=16)
    rough = nm.Implicit(inner, tolerance=0.1, linear_tolerance=0.1, **options)
    found, count = warned(lambda: jax.jit(nm.imaml(ridge, rough))(START, TASKS))
    assert count == 0
    expected = jax.jit(nm.imaml(ridge, nm.Implicit(newton, 2.0)))(START, TASKS)
    np.testing.assert_allclose(found[1], expected[1], atol=0.03)
    strict = jax.jit(nm.imaml(ridge, nm.Implicit(inner, **options)))
    assert warned(lambda: strict(START, TASKS))[1] == 1


def test_an_unsolved_linear_system_warns():
    rule = nm.Implicit(newton, 1.0, linear_solver="cg", linear_steps=1)
    assert warned(lambda: nm.adapt(ridge, START, (X, Y), rule))[1] == 0
    gradient = jax.jit(jax.grad(lambda w: ridge(nm.adapt(ridge, w, (X, Y), rule), QUERY)))
    assert warned(lambda: gradient(START))[1] == 1
    result, count = warned(lambda: nm.fit(KEYS[5], START, nm.imaml(ridge, rule), TASKS,
                                          optax.sgd(0.1), 2))  # fmt: skip
    assert count == 1 and float(result.unconverged.min()) == 1


def test_a_linear_solver_that_returns_another_shape_is_named():
    rule = nm.Implicit(newton, 1.0, linear_solver=lambda matvec, b: b[:1])
    with pytest.raises(ValueError, match="linear_solver must return a vector like b"):
        jax.eval_shape(jax.grad(lambda w: ridge(nm.adapt(ridge, w, (X, Y), rule), QUERY)), START)


def test_conjugate_gradients_warn_of_an_indefinite_system():
    rule = nm.Implicit(newton, -0.9, linear_solver="cg")
    assert np.linalg.eigvalsh(S)[0] < 0.9 < np.linalg.eigvalsh(S)[-1]
    gradient = jax.jit(jax.grad(lambda w: ridge(nm.adapt(ridge, w, (X, Y), rule), QUERY)))
    with pytest.warns(nm.ConvergenceWarning, match="curvatures of both signs"):
        jax.block_until_ready(gradient(START))
        jax.effects_barrier()


@pytest.mark.parametrize("name", ("GMRES", "CG", "LU"))
def test_linear_solvers_of_lineax_give_the_same_derivative(name):
    lineax = pytest.importorskip("lineax")
    solver = lineax.LU() if name == "LU" else getattr(lineax, name)(1e-6, 1e-6)
    options = {"strength": 0.6, "linear_tolerance": 1e-3}
    rules = [nm.Implicit(newton, linear_solver=s, **options) for s in (solver, "minres")]
    found, count = warned(lambda: jax.jit(nm.imaml(ridge, rules[0]))(START, TASKS))
    expected = jax.jit(nm.imaml(ridge, rules[1]))(START, TASKS)
    assert count == 0
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4)
    if name == "CG":  # it stops at its own tolerance, which may be too large for the rule
        rough = nm.Implicit(newton, linear_solver=lineax.CG(0.9, 0.9), **options)
        assert warned(lambda: jax.jit(nm.imaml(ridge, rough))(START, TASKS))[1] == 1


def test_a_solver_of_optimistix_fits_in_one_line():
    optimistix = pytest.importorskip("optimistix")
    bfgs = optimistix.BFGS(rtol=1e-5, atol=1e-5)

    def solve(objective, start):
        return optimistix.minimise(lambda w, _: objective(w), bfgs, start, throw=False).value

    rules = nm.Implicit(solve, 0.6, tolerance=1e-3), nm.Implicit(newton, 0.6)
    found, expected = (jax.jit(nm.imaml(ridge, rule))(START, TASKS) for rule in rules)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-3)


CURVED = {
    "minimum": nm.Proximal(0.5), "maximum": nm.Proximal(-2.0),
    "saddle": nm.Implicit(many_newton_steps, 0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", CURVED)
@pytest.mark.parametrize("size", (3, 80))  # with and without the whole Hessian
def test_information_on_a_solution_says_whether_it_is_a_minimum(name, size, x64):
    """sum cos w has minima and maxima; from 0 Newton's method stays at the maximum."""
    rule = CURVED[name]
    start = jnp.full(size, 2.0).at[0].set(0.0 if name == "saddle" else 2.0)

    def loss(w, shift):
        return jnp.sum(jnp.cos(w)) + 0.05 * jnp.sum(w**2) + shift * w[0]

    @jax.jit
    def solved(start):
        return nm.adapt(loss, start, 0.0, rule, return_info=True)

    adapted, info = solved(start)
    smallest = float(jnp.min(-jnp.cos(adapted) + 0.1 + rule.strength))  # H is diagonal
    assert bool(info.converged) and bool(info.negative_curvature) == (smallest < 0)
    assert (smallest < 0) == (name != "minimum")


def test_a_singular_minimum_has_no_negative_curvature_and_programs_without_it_do_not_look():
    flat = lambda w, data: jnp.sum((w[:2] - data) ** 2)  # noqa: E731  no curvature in two of four
    info = nm.adapt(flat, START, 1.0, nm.Implicit(newton_of_two), return_info=True)[1]
    assert bool(info.converged) and not bool(info.negative_curvature)

    def loops(result):
        adapted = jax.jit(lambda w: result(nm.adapt(flat, w, 1.0, nm.Proximal(1.0),
                                                    return_info=True)))  # fmt: skip
        return adapted.lower(START).compile().as_text().count(" while(")

    assert loops(lambda found: (found[0], found[1].converged)) < loops(lambda found: found)


def newton_of_two(objective, start):
    """The minimum in the first two entries of a quadratic objective."""
    return start.at[:2].add(-jax.grad(objective)(start)[:2] / 2)


def test_hyperparameters_that_the_loss_closes_over_have_finite_differences(x64):
    start, support, query = double((START, (X, Y), QUERY))
    rule = nm.Implicit(many_newton_steps)

    def outer(hyper):
        def inner(w, data):
            decay = jnp.sum(jnp.exp(hyper["decay"]) * w**2)
            return logistic(w, (data[0] * hyper["scale"], data[1])) + decay

        return logistic(nm.adapt(inner, start, support, rule), query)

    hyper = {"decay": jnp.array([-3.0, -1.0, 0.0, -2.0]), "scale": jnp.array(1.3)}
    check_grads(jax.jit(outer), (hyper,), order=1, rtol=1e-6)
    check_grads(jax.jit(jax.grad(outer)), (hyper,), order=1, modes=["rev"], rtol=1e-6)


def test_strength_zero_trains_frozen_leaves_and_ignores_the_start():
    params = {"w": START, "decay": jnp.full(4, -1.0)}
    mask = {"w": True, "decay": False}

    def inner(params, data):
        return ridge(params["w"], data) + jnp.sum(jnp.exp(params["decay"]) * params["w"] ** 2) / 2

    def outer(params, data):
        return ridge(params["w"], data)

    def closed_form(decay):
        def one(support, query):
            A = support[0].T @ support[0] / len(Y) + jnp.diag(jnp.exp(decay))
            return ridge(jnp.linalg.solve(A, support[0].T @ support[1] / len(Y)), query)

        return jnp.mean(jax.vmap(one)(*TASKS))

    rule = nm.Implicit(newton)
    algorithm = jax.jit(nm.imaml(outer, rule, inner_loss=inner, mask=mask))
    value, gradient = algorithm(params, TASKS)
    expected = jax.value_and_grad(closed_form)(params["decay"])
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient["decay"], expected[1], rtol=1e-4, atol=1e-6)
    assert not np.any(gradient["w"])
    for make in (nm.imaml, nm.maml_value_and_grad, nm.fomaml):
        with pytest.raises(ValueError, match="rule must depend on the start"):
            make(ridge, rule)
    assert not np.any(jax.jit(jax.grad(nm.maml(ridge, rule)))(START, TASKS))


def test_first_order_evaluation_and_state():
    rule = nm.Implicit(nm.GradientDescent(0.3, steps=500), 1.0, tolerance=1e-4)
    slope = jax.jit(nm.fomaml(ridge, rule))(START, TASKS)[1]
    adapted = jax.jit(jax.vmap(lambda s: nm.adapt(ridge, START, s, rule)))(TASKS.support)
    expected = jax.vmap(jax.grad(ridge))(adapted, TASKS.query).mean(0)
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)
    tested = nm.evaluate(KEYS[5], START, ridge, rule, TASKS)
    np.testing.assert_allclose(tested.values, jax.vmap(ridge)(adapted, TASKS.query), rtol=1e-4)
    assert float(tested.unconverged) == 0

    def counted(w, state, data):  # the state shifts the labels, and is fixed during the solution
        return ridge(w, (data[0], data[1] + state)), state + 1.0

    model = nm.Stateful(START, jnp.zeros(()))
    result = [jax.jit(nm.imaml(counted, r))(model, TASKS) for r in (rule, nm.Implicit(newton, 1.0))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *result)


@jax.custom_vjp
def reverse(x):
    return x


reverse.defvjp(lambda x: (x, None), lambda _, g: (-g,))


def players(w, data):
    """One player descends, the other ascends: the gradient is no gradient of a function."""
    return jnp.sum(jnp.sin(w[:2]) * reverse(w[2:])) + jnp.sum(w**2 * jnp.array([1, 1, 0.5, 0.5]))


def test_a_field_is_solved_and_differentiated_with_the_transpose(x64):
    start, slope = double((START, X[0]))
    inner = nm.GradientDescent(0.1, steps=2000)
    found, expected = (
        jax.jit(jax.grad(lambda w, rule=rule: slope @ nm.adapt(players, w, None, rule)))(start)
        for rule in (nm.Implicit(inner, 2.0), nm.Proximal(2.0))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    _, info = nm.adapt(players, start, None, nm.Implicit(inner, 2.0), return_info=True)
    assert bool(info.converged) and 10 < int(info.steps) < 2000


def test_half_precision_and_a_start_at_the_solution_converge():
    params = {"w": START.astype(jnp.bfloat16), "b": jnp.zeros((), jnp.float32)}
    loss = lambda p, data: ridge(p["w"].astype(jnp.float32), data) + p["b"] ** 2  # noqa: E731
    rule = nm.Implicit(nm.GradientDescent(0.3, steps=300), 1.0)
    adapted, info = nm.adapt(loss, params, (X, Y), rule, return_info=True)
    assert adapted["w"].dtype == jnp.bfloat16 and bool(info.converged)
    solved = jnp.linalg.solve(S, X.T @ Y / len(Y))
    _, info = nm.adapt(ridge, solved, (X, Y), nm.Implicit(newton), return_info=True)
    assert bool(info.converged)


class Descends(nm.InnerRule):
    """A user's solver with a `solve` of its own."""

    def solve(self, loss, start, *, remat=False):
        return nm.rules.Solution(newton(loss, start), nm.rules.SolveInfo(True, 0.0, 1))


jax.tree_util.register_pytree_node(Descends, lambda rule: ((), None), lambda *_: Descends())


def test_a_rule_with_its_own_solve_serves_as_solver():
    found = nm.adapt(ridge, START, (X, Y), nm.Implicit(Descends(), 0.5))
    expected = nm.adapt(ridge, START, (X, Y), nm.Implicit(newton, 0.5))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_memory_does_not_grow_with_the_steps():
    def bytes_of(steps):
        rule = nm.Implicit(nm.GradientDescent(0.1, steps=steps), 1.0)
        compiled = jax.jit(nm.imaml(ridge, rule)).lower(START, TASKS).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_of(10) == bytes_of(10_000)


def test_a_new_strength_or_rate_does_not_compile_again():
    @jax.jit
    def adapted(rule):
        return nm.adapt(ridge, START, (X, Y), rule)

    for rate, strength in ((0.1, 1.0), (0.2, -0.1), (-0.1, 0.0)):
        adapted(nm.Implicit(nm.GradientDescent(rate, steps=5), strength, tolerance=10.0))
    assert adapted._cache_size() == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nm.Implicit(nm.Proximal(1.0)), "inner must be a solver without a proximal term"),
        (lambda: nm.Implicit(nm.GradientDescent(0.1), steps=3), "steps must be left out"),
        (lambda: nm.Implicit(newton, linear_solver="lu"), "linear_solver must be"),
        (
            lambda: nm.adapt(ridge, START, (X, Y), nm.Implicit(lambda f, w: (w, 3))),
            "inner must return parameters like start",
        ),
        (
            lambda: nm.adapt(ridge, START, (X, Y), nm.Implicit(newton, jnp.ones(2))),
            "strength must be one number",
        ),
        (
            lambda: nm.adapt(ridge, START, (X, Y), nm.Implicit(nm.GradientDescent([0.1, 0.2]))),
            "rate must be",
        ),
        (lambda: nm.reptile(ridge, nm.Implicit(newton, 1.0))(START, TASKS), "needs a rule that"),
    ],
)
def test_wrong_arguments_raise(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
