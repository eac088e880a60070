"""Sizes of blocks and of written-out programs, in one table by platform.

A CPU wants blocks that stay in its caches. An accelerator wants few launches, each of which fills
it: its blocks are as large as a few GiB of memory allow.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class DeviceSizes(NamedTuple):
    """Sizes of the blocks of loops, and of the longest programs that are written out.

    block_numbers: numbers that one step of a loop over simulated runs draws or keeps.
    systems_kept: times that the matrices of a run count among them.
    tests_kept: share of the numbers of simulated test tasks that exist at once.
    steps_in_call: steps of such a loop in one call of a sweep.
    draws: pieces in which a step draws its numbers.
    lanes: a step takes a multiple of as many runs, if there are several steps.
    unrolled: the largest linear system whose solution is written out entry by entry.
    unrolled_few: the same for a few systems, which repay only programs that compile fast.
    paneled: the largest whose solution is written out by panels of columns.
    phase_cells, phase_pencils: cells of a phase diagram at once, without and with a covariance.
    rules, pencils: rules at once in a prediction, without and with a covariance.
    variances, pencil_variances: rules at once in a standard deviation, likewise.
    pencil_numbers: numbers of all pencils at once, one for each eigenvalue, at most.
    """

    block_numbers: int
    systems_kept: int
    tests_kept: float
    steps_in_call: int
    draws: int
    lanes: int
    unrolled: int
    unrolled_few: int
    paneled: int
    phase_cells: int
    phase_pencils: int
    rules: int
    pencils: int
    variances: int
    pencil_variances: int
    pencil_numbers: int

    def pencils_at_once(self, most: int, numbers: int) -> int:
        """`most`, or fewer if each has this many numbers."""
        return max(1, min(most, self.pencil_numbers // numbers))


# 2^19 numbers use vector units and threads of a CPU and stay in its cache: 2^16 and 2^21 are both
# 10 to 20% slower. Its matrices are in the cache in any case. On a GPU a step may take 4 GiB, so
# that launches take less time than the memory. A TPU pads short axes, which takes several times
# the memory, and reshapes by programs that compile for 40 s unless blocks are multiples of lanes.
CPU = DeviceSizes(
    block_numbers=2**19, systems_kept=0, tests_kept=1.0, steps_in_call=16, draws=2, lanes=1,
    unrolled=8, unrolled_few=0, paneled=0, phase_cells=64, phase_pencils=16, rules=256, pencils=64,
    variances=64, pencil_variances=16, pencil_numbers=2**62,
)  # fmt: skip
GPU = DeviceSizes(
    block_numbers=2**30, systems_kept=3, tests_kept=0.7, steps_in_call=1, draws=1, lanes=128,
    unrolled=12, unrolled_few=8, paneled=32, phase_cells=2**16, phase_pencils=2**12, rules=2**16,
    pencils=2**14, variances=2**14, pencil_variances=2**12, pencil_numbers=2**25,
)  # fmt: skip
TPU = GPU._replace(block_numbers=2**26)
TABLE = {"cpu": CPU, "tpu": TPU}


def sizes_for(platform: str) -> DeviceSizes:
    """The sizes for a platform, named as by `jax.Device.platform`."""
    return TABLE.get(platform, GPU)


def is_tracing(*trees: Any) -> bool:
    """True while JAX traces: some leaf is traced, or a call without arguments would be."""
    return any(isinstance(x, jax.core.Tracer) for x in (jnp.zeros(()), *jax.tree.leaves(trees)))


def device_platform(*trees: Any) -> str:
    """The platform of the device on which a program with these arguments runs."""
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.Array) and leaf.committed:
            return next(iter(leaf.devices())).platform
    # Outside of arrays the user's default decides, a device or the name of a platform.
    default = getattr(jax.config, "jax_default_device", None)
    return getattr(default, "platform", default) or jax.default_backend()


_LOWERED_FOR: ContextVar[str | None] = ContextVar("lowered_for", default=None)


@contextmanager
def lowered_for(platform: str) -> Iterator[None]:
    """Trace programs for one platform only, which takes less time than for all.

    Use it where the package itself traces and compiles a program for known devices. Functions that
    keep traces of programs with `with_plan` keep one for each `traced_platform`.
    """
    token = _LOWERED_FOR.set(platform)
    try:
        yield
    finally:
        _LOWERED_FOR.reset(token)


def traced_platform() -> str | None:
    """The platform that programs are traced for; None if it is not known."""
    return _LOWERED_FOR.get()


def with_plan(plan: Callable[[DeviceSizes], Any], function: Callable[[Any], Any]) -> Any:
    """Return function(plan(sizes)) with the sizes of the platform that the program is for.

    If that is not known, the program has a branch for every different plan, and is compiled with
    the one of its platform.
    """
    platform = traced_platform() if is_tracing() else device_platform()
    if platform is not None:
        return function(plan(sizes_for(platform)))
    default = plan(GPU)
    others = {name: plan(sizes) for name, sizes in TABLE.items()}
    branches = {name: partial(function, x) for name, x in others.items() if x != default}
    if not branches:
        return function(default)
    return lax.platform_dependent(**branches, default=partial(function, default))
