"""Fast compilation on CPU, where the first call often costs more than the work."""

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache, update_wrapper, wraps
from typing import Any

import jax
import numpy as np

from negmaml._core.arrays import working_dtype
from negmaml._core.platform import device_platform, is_tracing, lowered_for, traced_platform
from negmaml._core.settings import own_settings

# LLVM at its first level takes two thirds of the time of the default, and programs run as fast: the
# work of this package is in library calls (products, factorisations) and in simple loops that
# vectorise at any level.
_OPTIONS: dict[str, Any] = {
    "xla_backend_optimization_level": 1,
    "xla_llvm_disable_expensive_passes": True,
}
# The older of two code generators, missing in later versions, halves the remaining compile time,
# but in rare cases it makes a loop half as fast.
_LIGHT: dict[str, Any] = {"xla_cpu_use_fusion_emitters": False}
_PROFILES: dict[str, dict[str, Any]] = {
    "heavy": {},  # runs for longer than it compiles
    "light": _LIGHT,
    # Negligible run time: without optimisation it compiles in a third of the time, and runs at a
    # tenth of the speed.
    "trivial": _LIGHT | {"xla_backend_optimization_level": 0},
}


@cache
def compiler_options(platform: str, profile: str) -> dict[str, Any] | None:
    """Options for `lowered.compile` that this version of XLA accepts; None for its defaults.

    profile: of the program, "heavy", "light" or "trivial".
    """
    # Accelerators keep the defaults of XLA.
    if platform != "cpu":
        return None
    # Tried on an empty program, since XLA rejects unknown options only when it compiles.
    trivial = jax.jit(lambda: 0).lower()
    wanted = _OPTIONS | _PROFILES[profile]
    if _takes(trivial, wanted):
        return wanted
    return {name: value for name, value in wanted.items() if _takes(trivial, {name: value})}


@cache
def one_thread(platform: str | None) -> dict[str, Any] | None:
    """The option to compile a program in one thread, for programs that compile in parallel.

    It saves an eighth of the CPU time.
    """
    option = {"xla_cpu_parallel_codegen_split_count": 1}
    known = platform == "cpu" and _takes(jax.jit(lambda: 0).lower(), option)
    return option if known else None


def _takes(lowered, options: dict[str, Any]) -> bool:
    try:
        lowered.compile(options)
    except jax.errors.JaxRuntimeError:
        return False
    return True


registered: list[
    "FastCompileJit"
] = []  # every one, for the test that compares it with XLA's defaults


class FastCompileJit:
    """`jax.jit` with the `compiler_options` of its profile, which compile fast.

    Within a trace it is a plain `jax.jit`. The function is traced with the package's
    `own_settings`, for the platform that the arguments are on (`negmaml._core.platform.with_plan`).
    """

    def __init__(self, function: Callable, static_argnames=(), profile: str = "light"):
        self.function = own_settings(function)
        self.static_argnames, self.profile = static_argnames, profile
        self.programs: dict[tuple[str | None, bool], Any] = {}
        self.plain = self._program(None, with_options=False)
        # The attributes of a function may be those of another `FastCompileJit`, as jax.grad copies
        # them from the function that it differentiates.
        update_wrapper(self, function, updated=())
        registered.append(self)

    def __call__(self, *arguments, **keywords):
        return self._for(arguments, keywords)(*arguments, **keywords)

    def lower(self, *arguments, **keywords):
        """Lower as `jax.jit` does, with the options."""
        return self._for(arguments, keywords).lower(*arguments, **keywords)

    def clear_cache(self) -> None:
        """Clear the caches as `jax.jit` does: the next call traces again."""
        for program in self.programs.values():
            program.clear_cache()

    def _for(self, *arguments):
        if is_tracing(arguments):
            return self._program(traced_platform(), with_options=False)
        return self._program(device_platform(arguments), with_options=True)

    def _program(self, platform: str | None, with_options: bool):
        # Options depend on the platform, which the user may choose after the import.
        if (platform, with_options) not in self.programs:
            function, options = self.function, None
            if platform is not None:
                function = lowered_for(platform)(function)
            if platform is not None and with_options:
                options = compiler_options(platform, self.profile)
            self.programs[platform, with_options] = jax.jit(
                function, static_argnames=self.static_argnames, compiler_options=options
            )
        return self.programs[platform, with_options]


def is_concrete(tree) -> bool:
    """True if every value of the tree is known: no leaf is traced."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


_WITHIN: ContextVar[bool] = ContextVar("within", default=False)  # a function that is `on_host`


def on_host(function: Callable) -> Callable:
    """Run `function`, written over `arrays.namespace`, by NumPy if its arguments are known.

    A single number then costs no compilation. It is computed in float64 and returned as JAX arrays
    in the type of the arguments. Keywords are passed on unchanged. Decorated functions that it
    calls stay with NumPy.
    """

    @wraps(function)
    def call(*arguments, **keywords):
        if _WITHIN.get() or not is_concrete(arguments):
            return function(*arguments, **keywords)
        dtype = working_dtype(arguments)
        known = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), arguments)
        # Nested calls see this flag and stay with NumPy.
        outside = _WITHIN.set(True)
        try:
            with np.errstate(all="ignore"):
                found = function(*known, **keywords)
        finally:
            _WITHIN.reset(outside)
        with jax.ensure_compile_time_eval():  # a constant even inside a trace
            return jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf, dtype), found))

    return call


def jit_fast_compile(
    function: Callable, static_argnames=(), profile: str = "light"
) -> FastCompileJit:
    """`function` as a `FastCompileJit`; a decorator."""
    return FastCompileJit(function, static_argnames, profile)
