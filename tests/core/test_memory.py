"""The estimate of memory from a jaxpr, on programs whose memory is known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.internals import peak_bytes

N = 100
VECTOR = 4 * N  # bytes
MATRIX = 4 * N * N


def bytes_of(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return peak_bytes(jax.make_jaxpr(function)(*arguments))


def chain(a, x):
    return jnp.sum(jnp.tanh(a @ (a @ jnp.sin(x))))


def stacked(x):
    return lax.scan(lambda c, _: (jnp.sin(c), c), x, length=7)[1].max(0)


def carried(x):
    return lax.scan(lambda c, _: (jnp.sin(c), c), x, length=7)[0]


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        # Operations entry by entry are joined with the sum that reads them.
        (lambda x: jnp.sum(2 * jnp.sin(x) + 1), [(N, N)], 0),
        # A product reads whole operands: sin(x) or the first product, and the product after it.
        (chain, [(N, N), (N,)], 2 * VECTOR),
        # A value that is read again is held until then.
        (lambda a: (lambda b: a @ (b @ b))(a @ a), [(N, N)], 2 * MATRIX),
        # A scan holds its stacked results and its carry.
        (stacked, [(N,)], 8 * VECTOR),
        # Results that are not used are not computed; the carry is the result.
        (carried, [(N,)], 0),
        (jax.jit(chain), [(N, N), (N,)], 2 * VECTOR),
        (jax.checkpoint(chain), [(N, N), (N,)], 2 * VECTOR),
    ],
)
def test_bytes_are_those_of_values_held_at_once(function, shapes, expected):
    assert abs(bytes_of(function, *shapes) - expected) <= 16  # a few scalars


def test_a_branch_counts_by_the_larger_one():
    def choose(flag, a):
        return lax.cond(flag[0] > 0, lambda a: a, lambda a: (a @ a) @ a, a)

    # The product in the branch, which becomes the result, is held beside the first.
    assert MATRIX <= bytes_of(choose, (1,), (N, N)) <= 2 * MATRIX + 16
