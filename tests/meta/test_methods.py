"""The method of a meta-gradient is exact for custom derivative rules, or raises."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import flatten_util, lax
from jax.experimental.ode import odeint

import negmaml as nm
from negmaml.rules import combine, run, separate
from tests.helpers import mostly_slow
from tests.internals import Algorithm, choose, second_order

RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.standard_normal((2, 3)), "b": np.array([0.1, -0.2, 0.3]),
          "v": RNG.standard_normal(3)}  # fmt: skip
TASKS = nm.Tasks(*((RNG.standard_normal((2, 4, 2)), RNG.standard_normal((2, 4))) for _ in range(2)))
HEAD = {"w": False, "b": False, "v": True}


def with_vjp(function, forward, backward):
    """A function with a rule; forward(own, x) is given the function that has it."""
    own = jax.custom_vjp(function)
    own.defvjp(partial(forward, own), backward)
    return own


def with_jvp(function, rule):
    own = jax.custom_jvp(function)
    own.defjvp(lambda primals, tangents: rule(own, primals[0], tangents[0]))
    return own


def identity(x):
    return x


def nothing_saved(own, x):
    """A forward rule that computes the value itself."""
    return x, None


def documented(own, x):
    """A forward rule that calls the function, as in JAX's documentation."""
    return own(x), x


def quantise(x):
    return jnp.round(4 * x) / 4


def spike(x):
    return jnp.where(x > 0, 1.0, 0.0)


def surrogate(x):
    return 1 / (1 + jnp.abs(x)) ** 2


def host_sine(x):
    return jax.pure_callback(np.sin, x, x, vmap_method="sequential")


reverse = with_vjp(identity, nothing_saved, lambda _, g: (-g,))
CLIPPED = lambda _, g: (jnp.clip(g, -0.05, 0.05),)  # noqa: E731

# Activations by whether forward over reverse is exact for them.
FUNCTIONS = {
    "reversal": (reverse, False),
    "reversal as documented": (with_vjp(identity, documented, lambda _, g: (-g,)), False),
    "scaling": (with_vjp(identity, nothing_saved, lambda _, g: (0.3 * g,)), False),
    "clipping": (with_vjp(identity, nothing_saved, CLIPPED), False),
    "clipping as documented": (with_vjp(identity, documented, CLIPPED), False),
    "straight-through by stop_gradient": (lambda x: x + lax.stop_gradient(quantise(x) - x), True),
    "straight-through by custom_vjp": (with_vjp(quantise, documented, lambda _, g: (g,)), False),
    "straight-through by custom_jvp": (with_jvp(quantise, lambda f, x, t: (f(x), t)), True),
    "straight-through, value computed": (
        with_jvp(quantise, lambda f, x, t: (quantise(x), t)), False,
    ),
    "surrogate spike": (with_vjp(spike, documented, lambda x, g: (g * surrogate(x),)), False),
    "surrogate spike by custom_jvp": (
        with_jvp(spike, lambda f, x, t: (f(x), t * surrogate(x))), True,
    ),
    "custom_jvp, wrong": (with_jvp(jnp.sin, lambda f, x, t: (jnp.sin(x), x**2 * t)), False),
    "custom_jvp across entries": (
        with_jvp(identity, lambda f, x, t: (f(x), jnp.cumsum(x * t, -1))), False,
    ),
    "semi-gradient": (lambda x: x * lax.stop_gradient(jnp.sin(x)), True),
    "callback": (with_jvp(host_sine, lambda f, x, t: (f(x), jnp.cos(x) * t)), True),
    "callback with a backward rule": (
        with_vjp(host_sine, documented, lambda x, g: (jnp.cos(x) * g,)), False,
    ),
    "odeint": (
        lambda x: odeint(lambda y, t: jnp.sin(y), x, jnp.array([0.0, 0.5]))[-1], False,
    ),
    "relu": (jax.nn.relu, True),
    "softmax": (jax.nn.softmax, True),
    "optax.scale_gradient": (lambda x: optax.scale_gradient(x, 0.2), False),
    "in jit": (jax.jit(lambda x: x * reverse(x)), False),
    "in scan": (
        lambda x: lax.scan(lambda c, _: (jnp.sin(reverse(c) * c), None), x, None, length=2)[0],
        False,
    ),
    "in cond": (lambda x: lax.cond(x[0, 0] > 0, reverse, jnp.sin, x), False),
    "in checkpoint": (jax.checkpoint(lambda x: x * reverse(x)), False),
    "custom_vjp in custom_jvp": (
        with_jvp(jnp.square, lambda f, x, t: (f(x), reverse(x) * t)), False,
    ),
}  # fmt: skip
QUICK = "clipping as documented", "semi-gradient"
positions = [list(FUNCTIONS).index(name) for name in QUICK]
each_function = pytest.mark.parametrize("name", FUNCTIONS)
some_functions = pytest.mark.parametrize("name", mostly_slow(FUNCTIONS, *positions))


def loss_with(function):
    """The loss of a network with this activation behind a tanh."""

    def loss(p, data):
        hidden = function(jnp.tanh(data[0] @ p["w"] + p["b"]))
        return jnp.mean((hidden @ p["v"] - data[1]) ** 2)

    return loss


plain = loss_with(jnp.sin)


def nested(loss, inner, rule, mask=None, stop=identity):
    """The objective as it is defined, with a loop over steps and the updates of the rule."""
    mask = mask or dict.fromkeys(PARAMS, True)

    def objective(params):
        def one(support, query):
            theta = params
            state = rule.init({k: theta[k] for k in theta if mask[k]})
            stepped, fixed = separate(rule)
            for k in range(rule.steps):
                own = combine(jax.tree.map(lambda x, k=k: x[k], stepped), fixed)
                moving = {k: theta[k] for k in theta if mask[k]}
                g = stop(jax.grad(lambda m, t=theta: inner(t | m, support))(moving))
                moved, state = own.update(g, state, moving)
                theta = theta | moved
            return loss(theta, query)

        return jnp.mean(jax.vmap(one)(*jax.tree.map(jnp.asarray, TASKS)))

    return objective


def same(computed, expected, rtol=1e-9):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12), computed, expected
    )


def params():
    return jax.tree.map(jnp.asarray, PARAMS)


def traced(algorithm):
    """The algorithm, traced and not computed."""
    return jax.eval_shape(algorithm, params(), TASKS)


@some_functions
def test_the_default_is_nested_autodiff_for_rules_of_the_user(name, x64):
    loss, rule = loss_with(FUNCTIONS[name][0]), nm.GradientDescent(-0.3, 2)

    @jax.jit
    def both(params):
        computed = nm.maml_value_and_grad(loss, rule)(params, TASKS)
        return computed, jax.value_and_grad(nested(loss, loss, rule))(params)

    same(*both(params()))


@pytest.mark.slow
@pytest.mark.parametrize("steps", (1, 2, 3))
@each_function
def test_every_exact_method_is_nested_autodiff(name, steps, x64):
    function, symmetric = FUNCTIONS[name]
    loss = loss_with(function)
    methods = ("mixed", "reverse", "remat", "low-rank", None)[not symmetric :]

    @jax.jit
    def all_of_them(params, rate):
        rule = nm.GradientDescent(rate, steps)
        results = [nm.maml_value_and_grad(loss, rule, method=m)(params, TASKS) for m in methods]
        results.append(jax.value_and_grad(nm.maml(loss, rule))(params, TASKS))
        learned = nm.meta_sgd(loss, steps=steps)(nm.MetaSGDParams(params, rate), TASKS)
        results.append((learned[0], learned[1].params))
        return results, jax.value_and_grad(nested(loss, loss, rule))(params)

    for rate in (-0.3, 0.4):
        results, expected = all_of_them(params(), rate)
        for result in results:
            same(result, expected)


def method_of(loss, rule, inner_loss=None):
    """The method that is chosen, and the weights that it keeps factored."""
    losses = Algorithm(second_order, loss, inner_loss).losses(nm.variables(params()).form)
    return choose(losses, rule, params(), (), TASKS)


@each_function
def test_forward_over_reverse_is_chosen_where_it_is_exact_and_raises_elsewhere(name):
    function, symmetric = FUNCTIONS[name]
    loss = loss_with(function)
    for steps in (1, 2):
        rule = nm.GradientDescent(0.1, steps)
        chosen, wide = method_of(loss, rule)
        assert chosen == ("mixed" if symmetric and steps > 1 else "reverse") and not wide
        mixed = nm.maml_value_and_grad(loss, rule, method="mixed")
        if symmetric:
            traced(mixed)
        else:
            with pytest.raises(ValueError, match=r"method 'mixed'.*holds a .*method='reverse'"):
                traced(mixed)


def test_a_rule_in_the_loss_on_the_query_only_does_not_slow_the_inner_steps(x64):
    loss, rule = loss_with(FUNCTIONS["clipping as documented"][0]), nm.GradientDescent(0.4, 2)
    assert method_of(loss, rule, plain)[0] == "mixed"
    assert method_of(plain, rule, loss)[0] == "reverse"

    @jax.jit
    def both(params):
        computed = nm.maml_value_and_grad(loss, rule, inner_loss=plain)(params, TASKS)
        return computed, jax.value_and_grad(nested(loss, plain, rule))(params)

    same(*both(params()))


def test_a_backward_rule_that_is_not_linear_gets_the_gradient_of_the_mean(x64):
    """sign(g) does not scale with one over the number of tasks, in blocks of tasks either."""
    sign = with_vjp(identity, documented, lambda _, g: (jnp.sign(g),))
    loss, rule = loss_with(sign), nm.GradientDescent(-0.1)

    @jax.jit
    def everything(params):
        makers = nm.maml_value_and_grad, partial(nm.maml_value_and_grad, batch_size=1)
        whole = [make(loss, rule)(params, TASKS) for make in makers]
        first = nm.fomaml(loss, rule)(params, TASKS)
        stopped = nested(loss, loss, rule, stop=lax.stop_gradient)
        return (
            whole,
            jax.value_and_grad(nested(loss, loss, rule))(params),
            first,
            (jax.value_and_grad(stopped)(params)),
        )

    whole, expected, first, stopped = everything(params())
    for result in whole:
        same(result, expected)
    same(first, stopped)


@nm.pytree
class Signed(nm.InnerRule):
    """A step linear in nothing, with an integer, a key, and a state that starts from params."""

    rate: float
    power: int
    key: jax.Array
    steps: int = nm.static(default=2)

    def init(self, params):
        return jax.tree.map(jnp.sin, params)

    def update(self, gradient, state, params):
        def move(w, g, s):
            noise = jax.random.uniform(self.key, w.shape, w.dtype)
            return w * (1 + 0.1 * w) - self.rate * noise * g * jnp.abs(g) ** (self.power // 2) + s

        state = jax.tree.map(lambda s, g: 0.5 * s + 0.1 * jnp.cumsum(g, -1), state, gradient)
        return jax.tree.map(move, params, gradient, state), state


INNER_RULES = {
    "own": Signed(-0.3, 2, jax.random.key(0)),
    "momentum": nm.Momentum(nm.Schedule([-0.2, 0.3]), 0.9, 2, nesterov=True),
    "preconditioned": nm.Preconditioned(
        0.2, {"w": 1.5, "b": np.arange(9.0).reshape(3, 3) / 9, "v": np.array([1.0, -1.0, 2.0])}, 2
    ),
    "adamw": nm.InnerOptimizer(optax.adamw(0.05, eps_root=1e-8, weight_decay=0.5), 2),
}


@pytest.mark.parametrize("function", mostly_slow(("relu", "reversal"), 0))
@pytest.mark.parametrize("name", mostly_slow(INNER_RULES, 0))
def test_other_inner_rules_have_the_gradients_of_their_updates(name, function, x64):
    """Second order, with frozen leaves too, and first order."""
    loss, rule = loss_with(FUNCTIONS[function][0]), INNER_RULES[name]
    mask = None if name == "preconditioned" else HEAD  # P of frozen leaves must not be there

    @jax.jit
    def everything(params):
        return (
            nm.maml_value_and_grad(loss, rule, mask=mask)(params, TASKS),
            jax.value_and_grad(nested(loss, loss, rule, mask))(params),
            nm.fomaml(loss, rule)(params, TASKS),
            jax.value_and_grad(nested(loss, loss, rule, stop=lax.stop_gradient))(params),
        )

    second, expected, first, stopped = everything(params())
    same(second, expected)
    same(first, stopped)


def test_anil_and_learned_rates_are_exact_with_a_rule_of_the_user(x64):
    loss = loss_with(reverse)

    @jax.jit
    def everything(params, rate):
        rule = nm.GradientDescent(rate, 2)
        meta = nm.MetaSGDParams(params, rate)
        learned = nm.meta_sgd(loss, steps=2)(meta, TASKS)

        def objective(meta):
            return nested(loss, loss, nm.GradientDescent(meta.rate, 2))(meta.params)

        anil = nm.anil(loss, rule, HEAD)(params, TASKS)
        expected = jax.value_and_grad(nested(loss, loss, rule, HEAD))(params)
        return (learned, jax.value_and_grad(objective)(meta)), (anil, expected)

    for computed, expected in everything(params(), jnp.asarray(-0.3)):
        same(computed, expected)


@pytest.mark.parametrize("method", (None, pytest.param("remat", marks=pytest.mark.slow)))
def test_a_model_with_a_state_is_exact_with_a_rule_of_the_user(method, x64):
    """First order takes the states after inner steps for constants, besides the gradients."""
    inner, rule = loss_with(reverse), nm.GradientDescent(-0.3, 2)

    def loss(p, state, data):
        return inner(p, data) * (1 + state), state + jnp.sum(p["v"] ** 2)

    def defined(params, stop=identity):
        def one(support, query):
            theta, state = params, 0.5
            for _ in range(2):
                g, state = stop(jax.grad(loss, has_aux=True)(theta, state, support))
                theta = jax.tree.map(lambda t, d: t + 0.3 * d, theta, g)
            return loss(theta, state, query)[0]

        return jnp.mean(jax.vmap(one)(*jax.tree.map(jnp.asarray, TASKS)))

    @jax.jit
    def everything(params):
        start = nm.Stateful(params, jnp.asarray(0.5))
        results = [
            nm.maml_value_and_grad(loss, rule, method=method)(start, TASKS),
            nm.fomaml(loss, rule)(start, TASKS),
        ]
        stopped = partial(defined, stop=lax.stop_gradient)
        return results, [jax.value_and_grad(f)(params) for f in (defined, stopped)]

    for (value, gradient), expected in zip(*everything(params()), strict=True):
        same((value, gradient.params), expected)


@nm.pytree
class Halfway(nm.InnerRule):
    """Steps of a rule, then back half the way."""

    rule: nm.InnerRule

    def solve(self, loss, start, *, remat=False):
        theta, _ = run(self.rule, jax.grad(loss), start, remat)
        return jax.tree.map(lambda a, b: (a + b) / 2, start, theta)


def test_a_rule_with_a_solve_of_its_own_is_differentiated_through_it(x64):
    rule = Halfway(nm.GradientDescent(-0.3, 2))

    def defined(params):
        def one(support, query):
            theta = params
            for _ in range(2):
                g = jax.grad(plain)(theta, support)
                theta = jax.tree.map(lambda t, d: t + 0.3 * d, theta, g)
            return plain(jax.tree.map(lambda a, b: (a + b) / 2, params, theta), query)

        return jnp.mean(jax.vmap(one)(*jax.tree.map(jnp.asarray, TASKS)))

    @jax.jit
    def both(params):
        computed = nm.maml_value_and_grad(plain, rule)(params, TASKS)
        return computed, jax.value_and_grad(defined)(params)

    same(*both(params()))
    for method in ("mixed", "low-rank"):
        with pytest.raises(ValueError, match=rf"'{method}'.*Halfway has a solve of its own"):
            traced(nm.maml_value_and_grad(plain, rule, method=method))
    with pytest.raises(TypeError, match="reptile needs a rule that steps"):
        traced(nm.reptile(plain, rule))


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="older JAX fails in its own error for nested loops"
)
def test_a_loop_without_a_reverse_mode_derivative_raises():
    def looped(x):
        return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, x))[1]

    loss, rule = loss_with(looped), nm.GradientDescent(0.1)
    message = r"a lax.while_loop.*lax.scan"
    for make in (nm.maml, nm.maml_value_and_grad, nm.fomaml, nm.reptile):
        with pytest.raises(ValueError, match=message):
            traced(make(loss, rule))
    task = jax.tree.map(lambda x: x[0], TASKS.support)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p: nm.adapt(loss, p, task, rule), params())
    second = with_vjp(jnp.sin, documented, lambda x, g: (g * looped(x),))
    with pytest.raises(ValueError, match=r"second derivatives fail, use fomaml"):
        traced(nm.maml_value_and_grad(loss_with(second), rule))
    traced(nm.fomaml(loss_with(second), rule))


def field(loss, support, strength, at, start):
    """(F, its derivative J + strength) of the proximal problem of a flat vector."""
    slope = jax.grad(lambda w: loss(w, support))
    return slope(at) + strength * (at - start), jax.jacrev(slope)(at) + strength * jnp.eye(len(at))


def players(w, data):
    """One player descends and the other ascends, as with gradient reversal."""
    return (
        jnp.mean((data @ jnp.tanh(w[:2])) ** 2)
        + jnp.sum(jnp.sin(w[:2]) * reverse(w[2:]))
        + (0.5 * jnp.sum(w[2:] ** 2))
    )


@pytest.mark.parametrize("strength", (2.0, pytest.param(-3.0, marks=pytest.mark.slow)))
def test_implicit_gradients_of_a_field_solve_with_the_transpose(strength, x64):
    """strength (J^T + strength)^{-1} grad loss(theta*), for J that is not symmetric."""
    start, rule = jnp.array([0.3, -0.5, 0.4, 0.2]), nm.Proximal(strength)
    tasks = jax.tree.map(lambda x: jnp.asarray(x), nm.Tasks(TASKS.support[0], TASKS.query[0]))

    @jax.jit
    def both(start):
        def one(support, query):
            at = nm.adapt(players, start, support, rule)
            F, J = field(players, support, strength, at, start)
            slope = jax.grad(players)(at, query)
            return F, J, strength * jnp.linalg.solve(J.T, slope)

        return nm.imaml(players, rule)(start, tasks)[1], jax.vmap(one)(*tasks)

    gradient, (F, J, expected) = both(start)
    np.testing.assert_allclose(F, 0, atol=1e-10)
    assert np.max(np.abs(J - np.swapaxes(J, 1, 2))) > 0.1
    np.testing.assert_allclose(gradient, np.mean(expected, 0), rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("reversal as documented", "odeint", "in scan"))
def test_implicit_gradients_need_no_forward_mode(name, x64):
    # A strength at which the reversed field has a root, too.
    loss, rule = loss_with(FUNCTIONS[name][0]), nm.Proximal(30.0)

    @jax.jit
    def both(params):
        flat, unravel = flatten_util.ravel_pytree(params)

        def of_flat(w, data):
            return loss(unravel(w), data)

        def one(support, query):
            at = nm.adapt(of_flat, flat, support, rule)
            F, J = field(of_flat, support, 30.0, at, flat)
            return F, 30 * jnp.linalg.solve(J.T, jax.grad(of_flat)(at, query))

        gradient = nm.imaml(loss, rule)(params, TASKS)[1]
        return flatten_util.ravel_pytree(gradient)[0], jax.vmap(one)(*TASKS)

    gradient, (F, expected) = both(params())
    np.testing.assert_allclose(F, 0, atol=1e-9)
    np.testing.assert_allclose(gradient, np.mean(expected, 0), rtol=1e-6)
