"""Factorisations of many matrices on CPU, where a large batch may wait for ever.

What the linear algebra library does with a batch (Cholesky, QR, eigenvectors, and so on, of enough
work in all) waits there for parts of it that it gives to the threads of XLA. So as many batches at
once as there are threads, of programs side by side or of independent parts of one program, wait for
each other for ever (jaxlib 0.10). A call with one matrix, or with little work, gives no parts away.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from negmaml._core.numerics import contract

# Operations of one call. Told from the threads that wake up on two cores, the library shares out
# triangular solutions and QR from twice as many on, and Cholesky from three times as many.
SAFE_WORK = 2**16


def one_by_one(factorise: Callable, matrices):
    """`factorise` of each of the matrices, or of a pytree of stacks; on CPU in a loop.

    A `vmap` around it batches the body of that loop: see `in_small_batches`.
    """
    return lax.platform_dependent(
        matrices, cpu=lambda each: lax.map(factorise, each), default=jax.vmap(factorise)
    )


def in_small_batches(work: Callable[[int, int], float]) -> Callable:
    """A decorator of functions of one matrix and more arrays: `vmap`s are loops of calls on CPU.

    Of calls that are safe, however many `vmap`s are around. It has no derivative: for constants, as
    are those of the solution in a `lax.custom_linear_solve`.

    work: the operations that a matrix of so many rows and columns costs.
    """
    return lambda factorise: _in_small_batches(factorise, work)


def _in_small_batches(factorise: Callable, work: Callable[[int, int], float]) -> Callable:
    @jax.jit
    def on_cpu(stacks):
        count, *shape = stacks[0].shape
        safe = int(SAFE_WORK // max(1, work(*shape)))
        if count <= safe:
            return jax.vmap(factorise)(*stacks)
        return lax.map(lambda one: factorise(*one), stacks, batch_size=safe if safe > 1 else None)

    @custom_vmap
    def many(*stacks):
        return lax.platform_dependent(
            stacks, cpu=on_cpu, default=lambda stacks: jax.vmap(factorise)(*stacks)
        )

    @many.def_vmap
    def flat(size, batched, *stacks):
        stacks = _stacked(size, batched, stacks)
        found = many(*(x.reshape(-1, *x.shape[2:]) for x in stacks))
        shape = stacks[0].shape[:2]
        return _all_batched(jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), found))

    one = custom_vmap(factorise)

    @one.def_vmap
    def batch(size, batched, *arrays):
        return _all_batched(many(*_stacked(size, batched, arrays)))

    return one


def _stacked(size: int, batched, arrays):
    pairs = zip(arrays, batched, strict=True)
    return tuple(x if known else jnp.broadcast_to(x, (size, *x.shape)) for x, known in pairs)


def _all_batched(found):
    return found, jax.tree.map(lambda _: True, found)


@in_small_batches(lambda _, k: 20 * k**3)
def _eigh(A):
    return tuple(jnp.linalg.eigh(A))


@jax.custom_jvp
def eigh(A):
    """(eigenvalues, eigenvectors) of one symmetric matrix, for any number of `vmap`s."""
    return _eigh(A)


@eigh.defjvp
def _eigh_jvp(primals, tangents):
    x, V = eigh(*primals)
    rotated = contract("ji,jk,kl->il", V, tangents[0], V)
    gaps = x - x[:, None]
    inverse = jnp.where(gaps == 0, 0, 1 / jnp.where(gaps == 0, 1, gaps))
    return (x, V), (jnp.diagonal(rotated), contract("ij,jk->ik", V, inverse * rotated))
