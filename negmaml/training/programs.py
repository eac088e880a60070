"""Reuse of equal optimizers, and a bound on the compiled programs that `fit` keeps.

`optax.adam(1e-2)` makes two new closures at every call, and `jax.jit` compiles again for new
functions. Two optimizers are equal if JAX traces the same program from them, with the same
constants. `fit` then uses the earlier one, whose program is already compiled.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from negmaml._core.fingerprint import identify
from negmaml._core.platform import is_tracing
from negmaml.training.state import TrainSetup, advance, advance_in_place, init_state

MAX_PROGRAMS = 64  # about 9 MB each for a small model

_optimizers: dict[Any, optax.GradientTransformation] = {}
_structures: dict[Any, None] = {}


def known_optimizer(optimizer, params):
    """Return an earlier optimizer with the same program on these parameters, else `optimizer`."""
    if any(optimizer is known for known in _optimizers.values()):
        return optimizer
    if is_tracing():
        return optimizer
    structures = []

    def program(params, value):
        state = optimizer.init(params)
        updates, new = update_with_extra_args(optimizer, params, state, params, value)
        structures.append(jax.tree.structure((state, updates, new)))
        return state, updates, new

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    try:
        digest = identify(program, shapes, jax.ShapeDtypeStruct((), jnp.float32)).digest
    except Exception:  # it cannot be compared, or has an error that the run itself will report
        return optimizer
    if len(_optimizers) == MAX_PROGRAMS:
        _optimizers.clear()
    # The structure of the state is not in the program, and JAX compiles again for another one.
    return _optimizers.setdefault((digest, structures[-1]), optimizer)


def update_with_extra_args(optimizer, gradient, state, params, value):
    """Return (updates, new state) with stand-ins for the loss, for the identity of an optimizer."""

    def sum_of_squares(tree):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))

    return optax.with_extra_args_support(optimizer).update(
        gradient, state, params, value=value, grad=gradient, value_fn=sum_of_squares
    )


def bound_programs(setup: TrainSetup) -> None:
    """Drop all compiled programs before one more than `MAX_PROGRAMS` is compiled."""
    structure = jax.tree.structure(setup)
    if structure not in _structures and len(_structures) == MAX_PROGRAMS:
        advance.clear_cache()  # type: ignore[attr-defined]
        advance_in_place.clear_cache()  # type: ignore[attr-defined]
        init_state.clear_cache()  # type: ignore[attr-defined]
        _structures.clear()
    _structures[structure] = None
