"""Sums over tasks and rows are products over one axis, with equal values and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np

import negmaml as nm
from negmaml.meta.flat_products import with_flat_products

X = jax.random.normal(jax.random.key(0), (3, 4, 5))
W = jax.random.normal(jax.random.key(1), (5, 2))


def products(function, *arguments):
    """The numbers of axes that each product of a program sums over."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    found = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    return [len(e.params["dimension_numbers"][0][0]) for e in found]


@jax.jit
def weight_gradient(w, x):
    """The gradient of a sum over tasks, within a call of jit."""
    return jax.grad(lambda w: jnp.sum(jnp.tanh(jax.vmap(lambda x: x @ w)(x)) ** 2))(w)


def test_products_over_two_axes_become_products_over_one():
    flat = with_flat_products(weight_gradient)
    assert 2 in products(lambda w, x: weight_gradient.__wrapped__(w, x), W, X)
    assert set(products(flat, W, X)) == {1}
    np.testing.assert_allclose(jax.jit(flat)(W, X), weight_gradient(W, X), rtol=1e-5, atol=1e-6)
    derivatives = (
        jax.jit(jax.jacfwd(f))(W, X) for f in (flat, weight_gradient)
    )  # the result can be differentiated further
    np.testing.assert_allclose(*derivatives, rtol=1e-4, atol=1e-5)


def test_products_over_other_axes_are_left_alone():
    def crossed(x, y):
        return jnp.einsum("tni,nto->io", x, y), jnp.einsum("tni,tno->tio", x, y.swapaxes(0, 1))

    y = jax.random.normal(jax.random.key(2), (4, 3, 2))
    assert products(with_flat_products(crossed), X, y) == products(crossed, X, y)
    found = jax.jit(with_flat_products(crossed))(X, y)
    jax.tree.map(np.testing.assert_allclose, found, jax.jit(crossed)(X, y))


def test_meta_gradients_have_no_product_over_two_axes():
    def loss(w, data):
        return jnp.mean((jnp.tanh(data[0] @ w["a"]) @ w["b"] - data[1]) ** 2)

    params = {"a": jnp.ones((1, 8)), "b": jnp.ones((8, 1))}
    tasks = nm.tasks.Sinusoid(m=3, n_t=4, n_v=4)(jax.random.key(0))
    algorithm = nm.maml_value_and_grad(loss, nm.GradientDescent(-0.1), method="reverse")
    assert set(products(algorithm, params, tasks)) == {1}
