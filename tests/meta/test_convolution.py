"""The convolution by patches is XLA's."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import negmaml as nm
from tests.helpers import mostly_slow

CASES = list(product(((3, 3), (2, 5), (1, 1)), (1, 2, 3), ("SAME", "VALID")))


@pytest.mark.parametrize(("window", "stride", "padding"), mostly_slow(CASES, 0, 9, 10, 12, 15))
def test_im2col_convolution_is_the_native_convolution(window, stride, padding, x64):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 9, 10, 3)))
    kernel = jnp.asarray(rng.standard_normal((*window, 3, 4)))

    def native(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def patches(x, kernel):
        return nm.im2col_convolution(x, kernel, stride=stride, padding=padding)

    def slopes(f):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1))

    @jax.jit
    def both(*a):
        return [(f(*a), slopes(f)(*a)) for f in (patches, native)]

    (value, slope), (expected, expected_slope) = both(x, kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(slope, expected_slope, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_invalid_arguments_raise_with_their_names():
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 1))
    with pytest.raises(ValueError, match=r"got \(1, 4, 4, 2\) and \(3, 3, 1, 1\)"):
        nm.im2col_convolution(x, jnp.ones((3, 3, 1, 1)))
    with pytest.raises(ValueError, match="padding must be 'SAME' or 'VALID', got 'same'"):
        nm.im2col_convolution(x, kernel, padding="same")
    with pytest.raises(ValueError, match="stride must be an integer of at least 1"):
        nm.im2col_convolution(x, kernel, stride=0)
