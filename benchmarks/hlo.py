"""Kernel launches, bytes and memory of a program, from the text that XLA compiles for a device.

An accelerator starts one kernel for each instruction of the entry computation and of the bodies of
its loops. A loop counts as often as XLA knows that it runs, or once if it does not know. Bytes are
those of the operands and results of the kernels, an upper bound of the traffic to memory.

The compilers of CUDA (an H100) and of TPU (v5e) also run on a machine without these devices:

    pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12 libtpu

in the versions that belong to the installed jax. CUDA graphs and the autotuner are not modelled.
"""

import math
import re
from functools import cache
from typing import NamedTuple

import jax

# A description of an H100 as XLA's CUDA compiler takes it in place of a device.
H100 = """
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 } device_memory_size: 84978434048 core_count: 132
  clock_rate_ghz: 1.98 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_block_limit: 65536 registers_per_core_limit: 65536
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 }
"""
KINDS = ("h100", "v5e")
BITS = re.compile(r"\d+")
# Instructions that name or regroup values and start no kernel.
FREE = {"parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all",
        "partition-id", "replica-id"}  # fmt: skip
COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\w+\[[\d,]*\]\S*) "
    r"(?P<kind>[\w\-]+)\((?P<rest>.*)$"
)
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Counts(NamedTuple):
    """Kernel launches, and bytes that the kernels read and write."""

    launches: int
    bytes: int

    def plus(self, other: "Counts", times: int = 1) -> "Counts":
        return Counts(self.launches + times * other.launches, self.bytes + times * other.bytes)


@cache
def device_of(kind: str):
    """A device of a kind in `KINDS` of which only the compiler is present."""
    from jax.experimental import topologies

    if kind == "h100":
        described = topologies.get_topology_desc(
            platform="cuda", topology_name="x", topology="1x1x1", target_config=H100
        )
    else:
        described = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return described.devices[0]


def compile_for(kind: str, function, arguments):
    """Compile a function of arrays for a device that need not be present."""
    place = jax.sharding.SingleDeviceSharding(device_of(kind))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
    )
    # A new function, since a program that is jitted for the host has no place on the device.
    jitted = jax.jit(lambda *given: function(*given), in_shardings=place, out_shardings=place)
    return jitted.lower(*shapes).compile()


def counts(text: str) -> Counts:
    """Kernel launches and bytes of an optimised module, loops as often as they run."""
    computations: dict[str, list[re.Match]] = {}
    entry, own = "", []
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            own = computations.setdefault(head["name"], [])
            entry = head["name"] if head["entry"] else entry
        elif row := INSTRUCTION.match(line):
            own.append(row)

    @cache
    def of(name: str) -> Counts:
        shapes = {row["name"]: row["shape"] for row in computations[name]}
        total = Counts(0, 0)
        for row in computations[name]:
            if row["kind"] in FREE:
                continue
            called = _called(row)
            if row["kind"] == "while":
                total = total.plus(of(called[0]), _trips(row["rest"]))
            elif row["kind"] == "conditional":
                total = total.plus(max(map(of, called)))
            elif row["kind"] == "call":
                total = total.plus(of(called[0]))
            else:
                operands = re.findall(r"%([\w.\-]+)", row["rest"].split("), ")[0])
                read = sum(nbytes(shapes.get(operand, "")) for operand in operands)
                total = total.plus(Counts(1, read + nbytes(row["shape"])))
        return total

    return of(entry)


def _called(row: re.Match) -> list[str]:
    """Names of the computations that a loop, a conditional or a call runs."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", row["rest"])
    if listed:
        return re.findall(r"[\w.\-]+", listed[1])
    pattern = r"\b(?:body|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    return re.findall(pattern, row["rest"])


def _trips(text: str) -> int:
    known = re.search(r'known_trip_count"?:\{"n":"?(\d+)', text)
    return int(known[1]) if known else 1


def nbytes(shape: str) -> int:
    """Bytes of all arrays in the text of a shape."""
    total = 0
    for kind, sizes in ARRAY.findall(shape):
        bits = BITS.search(kind)
        width = -(-int(bits[0]) // 8) if bits else 1  # pred has no number
        total += width * math.prod(int(size) for size in sizes.split(",") if size)
    return total
