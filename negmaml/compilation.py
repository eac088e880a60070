"""How programs compile on CPU, where the first call often costs more than the work."""

from functools import cache
from typing import Any

import jax

# LLVM at its first level takes half the time of the default and the older of two code generators a
# third less again, and programs run as fast: the work of this package is in library calls
# (products, factorisations) and in straight loops that vectorise anyway.
_OPTIONS = {
    "xla_backend_optimization_level": 1,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


@cache
def compiler_options(platform: str) -> dict[str, Any] | None:
    """Options for `lowered.compile`, as far as this version of XLA knows them; None for its own."""
    if platform != "cpu":
        return None
    trivial = jax.jit(lambda: 0).lower()
    return {name: value for name, value in _OPTIONS.items() if _takes(trivial, {name: value})}


def _takes(lowered, options: dict[str, Any]) -> bool:
    try:
        lowered.compile(options)
    except jax.errors.JaxRuntimeError:
        return False
    return True
