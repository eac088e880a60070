"""The GPU of a process among those of its node."""

import jax
import pytest

from tests.internals import use_local_device


@pytest.fixture
def chosen(monkeypatch):
    """The settings by which JAX is restricted to some devices."""
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    return found


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({"SLURM_LOCALID": "3"}, "3"),
        ({"SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "4,5"}, "1"),  # the second of those given
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "0", "SLURM_PROCID": "8"}, "0"),
        ({"SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "0"}, None),
        ({"CUDA_VISIBLE_DEVICES": "GPU-5f"}, None),
    ],
)
def test_a_process_takes_the_gpu_of_its_number(chosen, environment, rank):
    assert use_local_device(environment) == rank
    assert set(chosen.values()) == ({rank} if rank else set())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "needs the number of the process.*SLURM_LOCALID.*got None"),
        ({"LOCAL_RANK": "first"}, "got 'first'"),
        (
            {"LOCAL_RANK": "2", "CUDA_VISIBLE_DEVICES": "0,1"},
            "2 of .* no GPU of its own, of 2",
        ),
    ],
)
def test_a_process_without_a_gpu_of_its_own_is_refused(chosen, environment, message):
    with pytest.raises(ValueError, match=message):
        use_local_device(environment)
    assert not chosen


def test_a_cpu_is_used_as_before(monkeypatch):
    monkeypatch.setenv("SLURM_LOCALID", "0")
    assert use_local_device() == "0" and float(jax.numpy.ones(())) == 1
    jax.config.update("jax_cuda_visible_devices", "all")
    jax.config.update("jax_rocm_visible_devices", "all")
