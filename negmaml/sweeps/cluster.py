"""Dask: a client submits the blocks of a sweep to the workers of a cluster."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

from negmaml._core.extras import require

WORKERS_WITHIN = 60  # seconds to wait for the first worker
RETRIES = 10  # of a block whose workers die
EXPECTED_WORKERS = 64  # when the blocks are planned; clusters grow and shrink


@contextmanager
def connected(client) -> Iterator[Any]:
    """A Dask client: the given one, or one of the scheduler at an address; None for None."""
    # The caller's client stays open; only a client that is made here is closed here.
    if not isinstance(client, str):
        yield client
        return
    distributed = require("distributed", "cluster")
    try:
        made = distributed.Client(client, timeout=5)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no scheduler answers at {client!r} ({error}); start one with `dask scheduler`, or "
            "omit it to compute in this process"
        ) from error
    with made:
        yield made


def submit(
    client, name: str, store: str, call: Callable[..., int], job: Any, blocks: Sequence[tuple]
) -> Iterator[int]:
    """Submit call(job, *block) for every block; yield the results as they come.

    name: prefix of the keys of the tasks. store: named in errors.
    """
    distributed = require("distributed", "cluster")
    # Without workers, Dask would queue the blocks and wait for ever.
    if not client.scheduler_info()["workers"]:
        try:
            client.wait_for_workers(1, timeout=WORKERS_WITHIN)
        except TimeoutError as error:
            raise ConnectionError(
                f"the scheduler has no workers, and none joined within {WORKERS_WITHIN} s; start "
                "some with `dask worker`"
            ) from error
    # Dask returns the old result for a key that it knows, so `name` has to be new for every call.
    # Retries are safe, because each attempt writes the same chunks.
    futures = [
        client.submit(call, job, *block, key=f"{name}-{i}", retries=RETRIES)
        for i, block in enumerate(blocks)
    ]
    try:
        for future in distributed.as_completed(futures):
            yield future.result()
            # Released at once, or the scheduler would keep every result until the end.
            future.release()
    except (CancelledError, distributed.comm.CommClosedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConnectionError(
            f"the scheduler is gone, or cancelled the blocks ({reason}); finished blocks are in "
            f"{store!r}, and the same call resumes with another scheduler"
        ) from error
    finally:
        # After an error no more blocks may start, since the lock on the store is released next.
        with contextlib.suppress(Exception):  # the scheduler may be gone
            client.cancel([future for future in futures if not future.done()])
