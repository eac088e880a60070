"""Settings of JAX: those that the package computes with, and those that a stored result depends on.

What feeds a statistic or a prediction is traced with products at full precision, which accelerators
round to ten bits by default, and without the settings that make JAX raise where it would otherwise
broadcast, promote or move an array. An explicit `precision=` of a product holds all the same.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import wraps
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])
GUARDS = tuple(
    f"jax_transfer_guard_{way}" for way in ("host_to_device", "device_to_host", "device_to_device")
)


def own_settings(function: F) -> F:
    """The function, run or traced with the settings of the package whatever those of the caller.

    A derivative of a product keeps its precision. A rule of a `custom_jvp` or a `custom_vmap` may
    be traced later, outside of the function that it belongs to: it needs the decorator as well.
    """

    @wraps(function)
    def call(*arguments, **keywords):
        with ExitStack() as within:
            for setting in _to_change():
                within.enter_context(setting)
            return function(*arguments, **keywords)

    return call  # type: ignore[return-value]


def _to_change() -> Iterator[Any]:
    """What has to be set: entering all of them takes longer than a small program."""
    held: Any = jax.config
    if held.jax_default_matmul_precision not in ("highest", "float32"):
        yield jax.default_matmul_precision("highest")
    if held.jax_numpy_rank_promotion != "allow":
        yield jax.numpy_rank_promotion("allow")
    if str(held.jax_numpy_dtype_promotion) != "standard":
        yield jax.numpy_dtype_promotion("standard")
    if any(getattr(held, guard) not in (None, "allow") for guard in GUARDS):
        yield jax.transfer_guard("allow")
