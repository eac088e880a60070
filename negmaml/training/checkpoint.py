"""Checkpoints of a run, from which it goes on.

A checkpoint is a step of an orbax `CheckpointManager`: the state of the run, its history, and an
identity, digests of all that the run depends on. Orbax writes a step beside the earlier ones and
renames it when it is whole, so an interrupted write leaves those as they were. A digest of the
numbers themselves finds files with other bits than were written, which orbax reads as they are.
"""

import contextlib
import hashlib
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from negmaml._core.extras import require
from negmaml._core.fingerprint import Identity, UnidentifiedError, difference, identify
from negmaml._core.settings import other_settings, unusual_settings
from negmaml.training.carried import split_arrays
from negmaml.training.checkpoint_files import check_arrays, check_files
from negmaml.training.precision import as_now, as_written, kind
from negmaml.training.state import Run, State, whole

FORMAT = "negmaml.fit 2"
KEPT = 2  # checkpoints


class Store:
    """The checkpoints of one run in a directory."""

    def __init__(self, manager, identity: dict[str, Any], keep_going: bool):
        self.manager, self.identity, self.keep_going = manager, identity, keep_going
        self.damaged: list[int] = []

    def latest(self, state: State, shapes):
        """(steps done, state, history, place of the loader) of the last that is whole.

        shapes: of a history. Without a checkpoint, the state as given.
        """
        blame = None
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                meta = self._restored(step, meta=_ocp().args.JsonRestore()).meta
                self._check(meta)
                rows = jax.tree.map(lambda x, n=step: _virtual((n, *x.shape[1:]), x.dtype), shapes)
                like = jax.tree.leaves((state, rows))
                written = as_written(self._name(step), like, meta.get("arrays"))
                self._check_arrays(step, written)
                args = _ocp().args.StandardRestore(written)
                leaves = self._restored(step, leaves=args).leaves
                if meta.get("digest", digest := _digest(leaves)) != digest:
                    raise _DamageError(
                        f"{self._name(step)} is damaged (other numbers than written)"
                    )
                leaves = list(map(as_now, leaves, like))
            except _DamageError as damage:
                blame = blame or damage
                self.damaged.append(step)
                continue
            if blame is not None:
                warnings.warn(f"{blame}; going on from checkpoint {step}", stacklevel=7)
            state, history = jax.tree.unflatten(jax.tree.structure((state, rows)), leaves)
            return step, state, jax.tree.map(np.asarray, history), meta.get("place")
        if blame is not None:
            raise ValueError(
                f"{blame}, and there is no earlier one; nothing was changed; give another directory"
            ) from blame
        empty = jax.tree.map(lambda x: np.zeros((0, *x.shape[1:]), x.dtype), shapes)
        return 0, state, empty, None

    def save(self, step: int, state: State, history, place) -> None:
        """Write a checkpoint, in place of damaged ones."""
        for bad in self.damaged:
            self.manager.delete(bad)
        self.damaged = []
        leaves = jax.tree.leaves((state, history))
        meta = {"identity": self.identity, "place": place, "digest": _digest(leaves)}
        meta["arrays"] = [kind(leaf) for leaf in leaves]
        args = _ocp().args
        parts = {"meta": args.JsonSave(meta), "leaves": args.StandardSave(leaves)}
        self.manager.save(step, args=args.Composite(**parts))

    def _check(self, meta) -> None:
        """Raise for a checkpoint of another run; warn if it is gone on from all the same."""
        stored = meta.get("identity", {}) if isinstance(meta, dict) else {}
        # Without a record they were the defaults; of x64 the types of the numbers tell.
        known = {k: v for k, v in self.identity["settings"].items() if k == "jax_enable_x64"}
        stored = {"settings": known, **stored}
        found = [
            f"{name} ({what})" if what else name
            for name in sorted(self.identity | stored)
            if (what := _difference(stored.get(name), self.identity.get(name))) is not None
        ]
        if not found:
            return
        text = "; ".join(found)
        if self.keep_going and stored.get("format") == FORMAT:
            warnings.warn(
                f"going on from a checkpoint as asked; what may differ: {text}", stacklevel=8
            )
            return
        raise ValueError(
            f"checkpoint {str(self.manager.directory)!r} belongs to another run, which differs in "
            f"{text}. Nothing was changed; give another directory, or the arguments it was made "
            'with, or go on from it deliberately with resume="any"'
        )

    def _restored(self, step: int, **parts):
        try:
            return self.manager.restore(step, args=_ocp().args.Composite(**parts))
        except Exception as damage:  # orbax raises many kinds for missing and broken files
            raise _DamageError(
                f"{self._name(step)} is damaged or not of `fit` ({type(damage).__name__})"
            ) from damage

    def _check_arrays(self, step: int, like) -> None:
        try:
            check_arrays(Path(self.manager.directory) / str(step) / "leaves", like)
        except Exception as damage:  # as many kinds as orbax raises
            raise _DamageError(f"{self._name(step)} is damaged ({damage})") from damage

    def _name(self, step: int) -> str:
        return f"checkpoint {step} in {str(self.manager.directory)!r}"


def _virtual(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Return zeros that take no memory: the number of steps is only the name of a folder."""
    return np.broadcast_to(np.zeros((), dtype), shape)


class _DamageError(Exception):
    """A checkpoint that cannot be read."""


def _ocp() -> Any:
    return require("orbax.checkpoint", "checkpoint")


@contextlib.contextmanager
def opened(directory: Path, identity: dict[str, Any], keep_going: bool):
    """The `Store` of a run in a directory that is new, empty or of `fit`."""
    ocp = _ocp()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"checkpoint must be a directory, {str(directory)!r} is a file")
    entries = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
    strange = {name for name in entries if not name.split(".")[0].isdigit()}
    if strange:
        raise ValueError(
            f"checkpoint {str(directory)!r} holds what `fit` did not write "
            f"({sorted(strange)[:3]}); nothing was changed; give a new or empty directory"
        )
    try:
        check_files(directory)
    except ValueError as error:
        raise ValueError(f"checkpoint {str(directory)!r} is not used: {error}") from error
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
    with _held(directory):
        manager = ocp.CheckpointManager(directory, options=options)
        try:
            yield Store(manager, identity, keep_going)
        finally:
            manager.close()


@contextlib.contextmanager
def _held(directory: Path):
    """A lock beside a directory, which goes with the process; raises if another run has it.

    The processes of one run, which share a directory, have one lock, that of the first. Where no
    file can be made beside the directory there is no lock, so that a finished run can be read.
    """
    path = directory.with_name(f".{directory.name}.lock")
    lock = require("filelock", "checkpoint").FileLock(path)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        try:
            _ = jax.process_index() or lock.acquire(timeout=0)
        except TimeoutError as error:  # that of filelock is one
            raise ValueError(
                f"checkpoint {str(directory)!r} is in use by another run; wait for it, or give "
                "another directory"
            ) from error
    try:
        yield
    finally:
        lock.release()


def identity_of(run: Run, state: State, batch, *, trace: bool) -> dict[str, Any]:
    """What has to be the same for a run to go on: numbers it starts from, programs it consists of.

    batch: shapes of one, where batches are given. trace: whether to read the programs;
    without, they count as unknown.
    """
    now = state.now
    identity: dict[str, Any] = {
        "format": FORMAT,
        "key": _digest(run.key),
        "params": _digest((now.params, run.carried, now.model_state, now.step)),
        "evaluate_every": run.evaluate_every,
        "patience": run.patience,
        "settings": unusual_settings(),
    }
    for name, (function, *arguments) in _programs(run, state, batch).items():
        identity[name] = _read(name, function, arguments) if trace else None
    return identity


def program_of(identity: dict[str, Any]) -> str:
    """The programs of a run, and the settings they are traced with, as text."""
    parts = {k: v for k, v in identity.items() if isinstance(v, dict)}
    return " ".join(f"{k}={v.get('digest', v)}" for k, v in sorted(parts.items()))


def check_unchanged(run: Run, state: State, batch) -> None:
    """Raise unless the functions of a run are those that its checkpoints record."""
    if program_of(identity_of(run, state, batch, trace=True)) != run.program:
        raise ValueError(
            "the functions of a run with checkpoints, and the settings of JAX, must stay as they "
            "are while it runs; checkpoints until now are whole; undo the change, and the same "
            "call resumes"
        )


def _programs(run: Run, state: State, batch) -> dict[str, tuple]:
    """Each function of a run with what it is called on; shapes count."""
    now, params = state.now, whole(run, state.now)
    arrays, others = split_arrays(params)
    programs: dict[str, tuple] = {}
    tasks = batch
    if run.sample_tasks is not None:
        programs["sample_tasks"] = run.sample_tasks, run.key
        tasks = jax.eval_shape(run.sample_tasks, run.key)

    def of_params(function):
        return lambda arrays, tasks: function(others(arrays), tasks)

    def update(gradient, state, params):
        optimizer = optax.with_extra_args_support(run.optimizer())
        some = {"value": jnp.zeros(()), "grad": gradient, "value_fn": lambda p: _squares(p)}
        return optimizer.update(gradient, state, params, **some)

    programs["value_and_grad"] = of_params(run.value_and_grad), arrays, tasks
    programs["optimizer"] = update, now.params, now.optimizer_state, now.params
    if run.evaluate is not None:
        programs["evaluation_tasks"] = run.evaluation_tasks, run.key
        tasks = jax.eval_shape(run.evaluation_tasks, run.key)
        programs["evaluate"] = of_params(run.evaluate), arrays, tasks
    return programs


def _read(name: str, function, arguments) -> dict[str, Any]:
    try:
        return identify(function, *arguments).to_json()
    except UnidentifiedError as unknown:
        raise ValueError(
            f"checkpoint must know what run it is of, and {name} holds what cannot be compared "
            f'({unknown}); to keep checkpoints without that, give resume="any"'
        ) from unknown


def _difference(then, now) -> str | None:
    """What differs in words, "" where there is none for it; None if nothing does."""
    if then == now:
        return None
    if isinstance(then, dict) and isinstance(now, dict):
        if "digest" not in then:
            return ", ".join(other_settings(then, now))
        return difference(Identity.from_json(then), Identity.from_json(now)) or None
    programs = isinstance(then, dict) or isinstance(now, dict)
    return "" if programs else f"{_short(then)} then, {_short(now)} now"


def _short(value) -> str:
    return str(value)[:12]


def _squares(tree):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))


def _digest(tree) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
