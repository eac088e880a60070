"""Which functions have a gradient whose derivative is symmetric, whatever they are wrapped in."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.experimental.ode import odeint
from jax.extend.core import Primitive
from jax.interpreters import ad

from tests.internals import asymmetry

X = jnp.linspace(0.1, 0.9, 6)


def found(function, x=X):
    """Return the operation that may break the symmetry of x -> sum function(x)^2."""
    program = jax.make_jaxpr(lambda x: jnp.sum(jnp.asarray(function(x)) ** 2))(x)
    return asymmetry(program, len(jax.tree.leaves(x)))


def with_vjp(function, backward):
    """A function with a backward rule; its forward rule returns (function(x), x)."""
    own = jax.custom_vjp(function)
    own.defvjp(lambda x: (function(x), x), backward)
    return own


def with_jvp(function, rule):
    """A function with rule(own, primals, tangents), in which own is the function with its rule."""
    own = jax.custom_jvp(function)
    own.defjvp(lambda primals, tangents: rule(own, primals, tangents))
    return own


def identity(x):
    return x


reverse = with_vjp(identity, lambda x, g: (-g,))
straight = with_jvp(lambda x: jnp.round(x), lambda f, x, t: (f(*x), t[0]))


def matrix(x):
    return 2 * jnp.eye(6) + jnp.outer(x, x)


SYMMETRIC = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "softplus": jax.nn.softplus,
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "logaddexp of two": lambda x: jnp.logaddexp(x, x[::-1]),
    "xlogy of two": lambda x: jax.scipy.special.xlogy(x, x[::-1]),
    "slogdet": lambda x: jnp.linalg.slogdet(matrix(x))[1],
    "solve": lambda x: jnp.linalg.solve(matrix(x), x),
    "rounding": lambda x: jnp.round(x) + x.astype(int) + jnp.floor(x),
    "random": lambda x: x * jax.random.normal(jax.random.split(jax.random.key(0))[0], (6,)),
    "a loss of optax": lambda x: optax.losses.safe_softmax_cross_entropy(x, X[2] == X),
    "a product with a stopped factor": lambda x: x * lax.stop_gradient(jnp.sin(x)),
    "relu in jit, scan, vmap, checkpoint, cond": lambda x: sum([
        jax.jit(jax.nn.relu)(x), jax.vmap(jax.nn.relu)(x), jax.checkpoint(jax.nn.relu)(x),
        lax.cond(x[0] > 0, jax.nn.relu, identity, x),
        lax.scan(lambda c, _: (jax.nn.relu(c), None), x, None, length=2)[0],
    ]),
    "straight-through by custom_jvp, entry by entry": straight,
    "it of a constant and an array": lambda x: with_jvp(
        lambda x, y: x * y, lambda f, x, t: (f(*x), 3 * t[0]))(x, 2.0),
    "a rule entry by entry of a function that is not": with_jvp(
        lambda x: jax.nn.softmax(x), lambda f, x, t: (f(*x), jnp.sin(f(*x)) * t[0])),
    "a rule of data only": lambda x: x * reverse(X),
    "a rule of what is stopped": lambda x: x * jax.jit(reverse)(lax.stop_gradient(x)),
    "a rule of integers": lambda x: x * reverse(1.0 * jnp.argmax(x)),
    "the gradient of a rule": lambda x: jax.grad(lambda y: jnp.sum(reverse(jnp.sin(y)) * y))(x),
}  # fmt: skip


@pytest.mark.parametrize("name", SYMMETRIC)
def test_operations_of_jax_and_rules_entry_by_entry_are_symmetric(name):
    assert found(SYMMETRIC[name]) == ""


def user_primitive(x):
    """Twice x by an operation of the user's own."""
    double = Primitive("double_of_a_user")
    double.def_abstract_eval(lambda x: x)
    ad.deflinear(double, lambda g: [g])
    return double.bind(x)


RULED = {
    "custom_vjp": (reverse, r"jax.custom_vjp"),
    "custom_gradient": (jax.custom_gradient(lambda x: (x**2, lambda g: g)), "jax.custom_vjp"),
    "in jit": (jax.jit(reverse), "jax.custom_vjp"),
    "in vmap": (jax.vmap(reverse), "jax.custom_vjp"),
    "in checkpoint": (jax.checkpoint(reverse), "jax.custom_vjp"),
    "in cond": (lambda x: lax.cond(x[0] > 0, reverse, identity, x), "jax.custom_vjp"),
    "in scan": (
        lambda x: lax.scan(lambda c, _: (reverse(c), None), x, None, length=2)[0], "jax.custom_vjp",
    ),
    "in while_loop": (
        lambda x: lax.while_loop(
            lambda c: c[0] < 2, lambda c: (c[0] + 1, reverse(c[1])), (0, x))[1],
        "jax.custom_vjp",
    ),
    "in a rule": (
        with_jvp(identity, lambda f, x, t: (f(*x), reverse(x[0]) * t[0])), "jax.custom_jvp",
    ),
    "a value that is not the function": (
        with_jvp(identity, lambda f, x, t: (x[0], -t[0])), "jax.custom_jvp",
    ),
    "a rule that JAX makes of another function": (lambda x: as_sigmoid(x), "jax.custom_jvp"),
    "a rule across entries": (
        with_jvp(identity, lambda f, x, t: (f(*x), jnp.cumsum(t[0]))), "jax.custom_jvp",
    ),
    "a rule of two arrays": (
        lambda x: with_jvp(lambda x, y: x * y, lambda f, x, t: (f(*x), t[0] * x[1]))(x, x[::-1]),
        "jax.custom_jvp",
    ),
    "scale_gradient of optax": (lambda x: optax.scale_gradient(x, 0.3), "_scale_gradient"),
    "odeint": (lambda x: odeint(lambda y, t: -y, x, jnp.array([0.0, 1.0]))[-1], "_odeint"),
    "a root": (
        lambda x: lax.custom_root(
            lambda y: y**3 - x, x, lambda f, y: lax.fori_loop(0, 9, lambda i, y: y - f(y) / 3, y),
            lambda g, b: b / g(jnp.ones_like(b))),
        "_custom_root",
    ),
    "conjugate gradients": (
        lambda x: jax.scipy.sparse.linalg.cg(lambda v: matrix(x) @ v, x, maxiter=2)[0],
        "a linear solve that iterates",
    ),
    "custom_vmap": (lambda x: batched(x), "custom_vmap"),
    "an operation of a user": (user_primitive, "the operation double_of_a_user, which is not JAX"),
}  # fmt: skip

as_sigmoid = jax.custom_jvp(lambda x: jnp.where(x > 0.5, 1.0, 0.0))
as_sigmoid.defjvp(partial(jax.jvp, jax.nn.sigmoid))
batched = jax.custom_batching.custom_vmap(lambda x: jnp.sin(x))
batched.def_vmap(lambda size, of_batch, x: (jnp.sin(x), True))


@pytest.mark.parametrize("name", RULED)
def test_rules_that_may_not_be_derivatives_are_found_wherever_they_are(name):
    function, message = RULED[name]
    assert message in found(function)


@pytest.mark.parametrize(
    ("name", "symmetric"),
    [("straight-through by custom_jvp, entry by entry", True), ("relu", True),
     ("a product with a stopped factor", True),
     ("a rule entry by entry of a function that is not", True),
     ("it of a constant and an array", True),
     ("a value that is not the function", False), ("a rule of two arrays", False)],
)  # fmt: skip
def test_the_derivative_of_the_gradient_is_symmetric_where_it_is_found_to_be(name, symmetric, x64):
    """Two layers, so that the rule acts between others."""
    function = SYMMETRIC[name] if symmetric else RULED[name][0]
    rng = np.random.default_rng(0)
    x, a, b = (jnp.asarray(rng.standard_normal(s)) for s in ((5,), (6, 5), (3, 6)))

    def loss(x):
        return jnp.sum(jnp.sin(b @ function(2 * jnp.tanh(a @ x) * x[0])) * x[:3])

    jacobian = jax.jit(jax.jacrev(jax.grad(loss)))(x)
    np.testing.assert_equal(np.allclose(jacobian, jacobian.T, rtol=1e-10, atol=1e-12), symmetric)
