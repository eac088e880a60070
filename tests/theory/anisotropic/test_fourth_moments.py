"""The term of inputs whose fourth moments are not Gaussian, against autodiff of its equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.internals import FourthMoments, PencilSystem, _slopes_of_F_4, chain, pencil_blocks

pytestmark = pytest.mark.usefixtures("x64")


def test_slopes_are_those_of_the_equation():
    rng, k, m, n_t, n_v = np.random.default_rng(0), 6, 5.0, 16.0, 4.0
    s, count, weights = rng.uniform(0.3, 2, k), rng.uniform(1, 3, k), rng.uniform(0, 1, (3, k))
    C = rng.standard_normal((3, 3))
    moments = FourthMoments(jnp.asarray(weights), jnp.asarray(C + C.T))
    pencil = chain(jnp.array(0.7))
    ones = jnp.ones(k)
    numbers = (jnp.asarray(x) for x in (m, n_t, n_v, 0.5, 0.0))
    system = PencilSystem(
        jnp.asarray(s), jnp.asarray(count), ones, ones, ones[None], *numbers, pencil, moments
    )
    d, a = pencil.constant.shape[0], pencil.active[1] - pencil.active[0]
    T, G = rng.standard_normal((a, a)), rng.standard_normal((d, d, k))
    T, G = jnp.asarray(T + T.T), jnp.asarray(G + G.swapaxes(0, 1))

    def F_4(T, G, log_n_v):
        """(A20): - m sum_ab C_ab {tr T q_a T q_b/n_t + (e^T q_a e)(e^T q_b e)/n_v}/2."""
        inner, _, corner = pencil_blocks(pencil, G)
        q = jnp.einsum("ijk,ak->aij", inner, weights * count * s)
        c = weights @ (count * s * corner)
        pairs = jnp.einsum("ij,ajk,kl,bli->ab", T, q, T, q) / n_t + jnp.outer(c, c) / jnp.exp(
            log_n_v
        )
        return -m / 2 * jnp.sum(moments.covariance * pairs)

    in_T, in_G, in_rows = _slopes_of_F_4(system, moments, T, G, 1 / n_v)
    expected = jax.grad(F_4, argnums=(0, 1, 2))(T, G, jnp.log(n_v))
    np.testing.assert_allclose(in_T, expected[0], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(in_G, expected[1], rtol=1e-10, atol=1e-10)
    # Slopes in rows are kept twice, as those of the other terms of F.
    np.testing.assert_allclose(in_rows, 2 * expected[2], rtol=1e-10)
