"""Equal optimizers, and a bound on the compiled programs that `fit` keeps.

`optax.adam(1e-2)` makes two new closures at every call, and `jax.jit` compiles anew for new
functions. Two optimizers are equal if JAX traces the same program from them, with the same
constants; `fit` then uses the earlier one, whose program is compiled already.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from negmaml._core.fingerprint import identify
from negmaml.training.state import Run, advance, start

MAX_PROGRAMS = 64  # small models take about 9 MB each

_optimizers: dict[Any, optax.GradientTransformation] = {}
_structures: dict[Any, None] = {}


def known_optimizer(optimizer, params):
    """An earlier optimizer with the same program on these parameters, else `optimizer`."""
    if any(optimizer is known for known in _optimizers.values()):
        return optimizer
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        return optimizer
    structures = []

    def program(params, value):
        state = optimizer.init(params)
        updates, new = optax.with_extra_args_support(optimizer).update(
            params, state, params, value=value, grad=params, value_fn=_sum_of_squares
        )
        structures.append(jax.tree.structure((state, updates, new)))
        return state, updates, new

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    try:
        digest = identify(program, shapes, jax.ShapeDtypeStruct((), jnp.float32)).digest
    except Exception:  # a program that cannot be compared, or an error that the run itself reports
        return optimizer
    if len(_optimizers) == MAX_PROGRAMS:
        _optimizers.clear()
    return _optimizers.setdefault((digest, structures[-1]), optimizer)


def _sum_of_squares(tree):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))


def bound_programs(run: Run) -> None:
    """Forget all programs before one too many is compiled."""
    structure = jax.tree.structure(run)
    if structure not in _structures and len(_structures) == MAX_PROGRAMS:
        advance.clear_cache()  # type: ignore[attr-defined]
        start.clear_cache()  # type: ignore[attr-defined]
        _structures.clear()
    _structures[structure] = None
