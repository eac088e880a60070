"""One accelerator for each process of a node that shares its accelerators among processes."""

import os
from collections.abc import Mapping

import jax

# The number of a process within its node, by the program that started it.
LOCAL_RANKS = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "LOCAL_RANK")
# The lists of devices that a scheduler gave to the process, and JAX's own choice among these.
VISIBLE = {
    "CUDA_VISIBLE_DEVICES": "jax_cuda_visible_devices",
    "ROCR_VISIBLE_DEVICES": "jax_rocm_visible_devices",
}


def use_local_device(environment: Mapping[str, str] = os.environ) -> str | None:
    """Restrict JAX to the GPU of this process's number in its node; return its number, if any.

    It has to be called before JAX starts. The others stay free, also of the memory that JAX
    allocates at its start. Nothing is changed where the scheduler gave this process one GPU only.
    Raises ValueError if no variable says the number of the process.
    """
    given = [environment[name].split(",") for name in VISIBLE if environment.get(name)]
    if any(len(devices) == 1 for devices in given):
        return None
    rank = next((environment[name] for name in LOCAL_RANKS if environment.get(name)), None)
    if rank is None or not rank.isdecimal():
        raise ValueError(
            "--device local needs the number of the process in its node, "
            f"{' or '.join(LOCAL_RANKS)}, which srun and mpirun set; got {rank!r}; leave it out to "
            "use all devices"
        )
    if given and int(rank) >= len(given[0]):
        raise ValueError(
            f"--device local: process {rank} of this node has no GPU of its own, of "
            f"{len(given[0])}; start one process for each"
        )
    for option in VISIBLE.values():
        jax.config.update(option, rank)
    return rank
