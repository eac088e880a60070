"""Settings of JAX: those that the package computes with, and those that a stored result depends on.

Statistics and predictions are traced with products at full precision, which accelerators may round
to ten bits by default. The settings that make JAX raise where it would broadcast, promote or move
an array are off there. An explicit `precision=` of a product is kept.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from enum import Enum
from functools import wraps
from typing import Any, TypeVar

import jax

from negmaml._core.calls import reject_wrong_call

F = TypeVar("F", bound=Callable[..., Any])
GUARDS = tuple(
    f"jax_transfer_guard_{way}" for way in ("host_to_device", "device_to_host", "device_to_device")
)


def own_settings(function: F) -> F:
    """Run or trace the function with the settings of the package in place of the caller's.

    A derivative of a product keeps its precision. A rule of a `custom_jvp` or a `custom_vmap` may
    be traced later, outside of the function that it belongs to: it needs the decorator as well.
    """

    @wraps(function)
    def call(*arguments, **keywords):
        with ExitStack() as within:
            for setting in _to_change():
                within.enter_context(setting)
            try:
                return function(*arguments, **keywords)
            except TypeError as error:
                reject_wrong_call(error, function, arguments, keywords)
                raise

    return call  # type: ignore[return-value]


def own_transfers(function: F) -> F:
    """Run the function without the caller's transfer guard, so that it may move its own numbers.

    Use it for functions that run user code, whose precision and promotion are the user's choice.
    """

    @wraps(function)
    def call(*arguments, **keywords):
        # Entering the context takes longer than the check.
        with jax.transfer_guard("allow") if _guarded() else nullcontext():
            try:
                return function(*arguments, **keywords)
            except TypeError as error:
                reject_wrong_call(error, function, arguments, keywords)
                raise

    return call  # type: ignore[return-value]


def _guarded() -> bool:
    return any(getattr(jax.config, guard) not in (None, "allow") for guard in GUARDS)


def _to_change() -> Iterator[Any]:
    """The contexts to enter, only those needed: all take longer than a small program."""
    held: Any = jax.config
    if held.jax_default_matmul_precision not in ("highest", "float32"):
        yield jax.default_matmul_precision("highest")
    if held.jax_numpy_rank_promotion != "allow":
        yield jax.numpy_rank_promotion("allow")
    if str(held.jax_numpy_dtype_promotion) != "standard":
        yield jax.numpy_dtype_promotion("standard")
    if _guarded():
        yield jax.transfer_guard("allow")


# Every setting of `jax.config` that changes random numbers, or results by more than rounding, with
# the value that JAX has by default. The others place, compile, debug or print a program.
DEFAULTS = {
    "jax_default_matmul_precision": "None",
    "jax_threefry_partitionable": "True",
    "jax_default_prng_impl": "threefry2x32",
    "jax_random_seed_offset": "0",
    "jax_high_dynamic_range_gumbel": "False",
    "jax_enable_x64": "False",
    "jax_explicit_x64_dtypes": "warn",
    "jax_numpy_dtype_promotion": "standard",
    "jax_softmax_custom_jvp": "False",
    "jax_allow_f16_reductions": "True",
}


def result_settings() -> dict[str, str]:
    """The settings that results depend on, by name, as text."""
    return {name: _text(getattr(jax.config, name, default)) for name, default in DEFAULTS.items()}


def other_settings(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Describe how settings differ; a missing one had its default."""
    found = []
    # Records of older versions leave out settings that they did not know.
    for name in DEFAULTS:
        old, new = (held.get(name, DEFAULTS[name]) for held in (then, now))
        if old != new:
            found.append(f"{name} was {old}, is {new}")
    return found


def unusual_settings() -> dict[str, str]:
    """The settings that results depend on and that differ from their defaults."""
    return {k: v for k, v in result_settings().items() if v != DEFAULTS[k]}


@contextmanager
def settings_of(values: Mapping[str, str]) -> Iterator[None]:
    """Compute with the settings of another process, from its `result_settings`."""
    # Only settings that differ are changed: after a change JAX traces programs again.
    before = {name: getattr(jax.config, name) for name in values if hasattr(jax.config, name)}
    changed = {name: held for name, held in before.items() if _text(held) != values[name]}
    for name, held in changed.items():
        jax.config.update(name, _value(values[name], held))
    try:
        yield
    finally:
        for name, held in changed.items():
            jax.config.update(name, held if not isinstance(held, Enum) else _text(held))


def _text(value) -> str:
    return value.name.lower() if isinstance(value, Enum) else str(value)


def _value(text: str, like) -> Any:
    """The value of a setting from its text."""
    if isinstance(like, bool):
        return text == "True"
    if isinstance(like, int):
        return int(text)
    return None if text == "None" else text
