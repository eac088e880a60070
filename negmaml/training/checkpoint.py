"""Training in chunks: a bar to watch, and checkpoints to go on from.

A checkpoint is a step of an orbax `CheckpointManager`: the state of the run, its history, and an
identity, digests of the numbers that the run depends on. Orbax writes a step beside the earlier
ones and renames it when it is whole, so an interrupted write leaves those as they were.
"""

import contextlib
import hashlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.checks import check_count
from negmaml._core.extras import require
from negmaml.training.state import Run, State, advance

FORMAT = "negmaml.fit 1"
KEPT = 2  # checkpoints
PARTS, BAR_PARTS = 10, 100  # chunks of a run with checkpoints, and with a bar


def in_chunks(run: Run, state: State, steps: int, directory, every: int | None, progress: bool):
    """What `advance` gives for all steps; `directory`, `every` and `progress` as in `fit`."""
    every = -(-steps // PARTS) if every is None else check_count("checkpoint_every", every)
    length = min(every, -(-steps // BAR_PARTS)) if progress else min(every, steps)
    shapes = jax.eval_shape(partial(advance, length=length), run, state, 0, steps)[1]
    history = jax.tree.map(lambda x: np.zeros((0, *x.shape[1:]), x.dtype), shapes)
    done, save = 0, None
    with contextlib.ExitStack() as stack:
        if directory is not None:
            identity = _identity(run, state)
            manager = stack.enter_context(_open(Path(directory).absolute()))
            done, state, history = _latest(manager, identity, state, history)
            save = partial(_save, manager, identity)
        if done > steps:
            raise ValueError(f"checkpoint holds {done} steps already, more than steps={steps}")
        show = stack.enter_context(_bar(steps)) if progress else None
        while done < steps:
            taken = min(length, every - done % every, steps - done)
            state, part = advance(run, state, done, done + taken, length=length)
            done += taken
            history = jax.tree.map(partial(_append, taken), history, part)
            if save and (done % every == 0 or done == steps):
                save(done, state, history)
            if show:
                show(done, history[0][-1])
    return state, jax.tree.map(jnp.asarray, history)


def _append(count: int, history, part):
    return np.concatenate([history, np.asarray(part[:count])])


def _identity(run: Run, state: State) -> dict[str, str]:
    """Digests of what has to be the same for a run to go on."""
    parts = {"key": jax.random.key_data(run.key), "params": state.params}
    for name in ("value_and_grad", "sample_tasks", "optimizer", "evaluate", "evaluation_tasks"):
        parts[f"numbers of {name}"] = getattr(run, name)
    digests = {name: _digest(part) for name, part in parts.items()}
    return {"format": FORMAT, "evaluate_every": str(run.evaluate_every), **digests}


def _digest(tree) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _open(directory: Path):
    """The manager of the checkpoints in a directory that is new, empty or of `fit`."""
    ocp = require("orbax.checkpoint", "checkpoint")
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"checkpoint must be a directory, {str(directory)!r} is a file")
    entries = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
    strange = {name for name in entries if not name.split(".")[0].isdigit()}
    if strange:
        raise ValueError(
            f"checkpoint {str(directory)!r} holds what `fit` did not write "
            f"({sorted(strange)[:3]}); nothing was changed; give a new or empty directory"
        )
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
    manager = ocp.CheckpointManager(directory, options=options)
    try:
        yield manager
    finally:
        manager.close()


def _latest(manager, identity: dict[str, str], state: State, history):
    """(steps done, state, history) of the last checkpoint, or those given if there is none."""
    import orbax.checkpoint as ocp

    step = manager.latest_step()
    if step is None:
        return 0, state, history
    meta = _restore(manager, step, meta=ocp.args.JsonRestore()).meta
    differing = sorted(n for n in identity | meta if identity.get(n) != meta.get(n))
    if differing:
        raise ValueError(
            f"checkpoint {str(manager.directory)!r} belongs to another run: {', '.join(differing)} "
            "differ; nothing was changed; give another directory, or the arguments it was made with"
        )
    rows = jax.tree.map(lambda x: np.zeros((step, *x.shape[1:]), x.dtype), history)
    like = jax.tree.leaves((state, rows))
    leaves = _restore(manager, step, leaves=ocp.args.StandardRestore(like)).leaves
    state, history = jax.tree.unflatten(jax.tree.structure((state, history)), leaves)
    return step, state, jax.tree.map(np.asarray, history)


def _restore(manager, step: int, **parts):
    import orbax.checkpoint as ocp

    try:
        return manager.restore(step, args=ocp.args.Composite(**parts))
    except Exception as damage:  # orbax raises many kinds for missing and broken files
        raise ValueError(
            f"checkpoint {step} in {str(manager.directory)!r} is damaged or not of `fit` "
            f"({type(damage).__name__}); nothing was changed; remove {step} to go on from an "
            "earlier one, or give another directory"
        ) from damage


def _save(manager, identity: dict[str, str], step: int, state: State, history) -> None:
    import orbax.checkpoint as ocp

    leaves = jax.tree.leaves((state, history))
    parts = {"meta": ocp.args.JsonSave(identity), "leaves": ocp.args.StandardSave(leaves)}
    manager.save(step, args=ocp.args.Composite(**parts))


@contextlib.contextmanager
def _bar(steps: int):
    """A function (steps done, loss) that moves a bar."""
    rich = require("rich.progress", "cli")
    first = rich.Progress.get_default_columns()[:2]
    with rich.Progress(*first, rich.MofNCompleteColumn(), rich.TimeRemainingColumn()) as bar:
        task = bar.add_task("meta-training", total=steps)

        def show(done: int, loss):
            bar.update(task, completed=done, description=f"meta-training, loss {float(loss):.4g}")

        yield show
