"""Checkpoints of a run, from which it resumes.

A checkpoint is a step of an orbax `CheckpointManager`: the state of the run, its history, and an
identity, which holds digests of everything the run depends on. Orbax writes a step beside the
earlier ones and renames it when it is complete, so an interrupted write does not damage them. Orbax
does not notice changed bits in the numbers; a digest of the numbers does.
"""

import contextlib
import hashlib
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.caller import warn_caller
from negmaml._core.extras import require
from negmaml._core.fingerprint import Identity, UnidentifiedError, difference, identify
from negmaml._core.settings import other_settings, unusual_settings
from negmaml.meta.partition import StaticTree
from negmaml.training.checkpoint_files import check_arrays, check_files
from negmaml.training.nonfinite import needs_scale
from negmaml.training.precision import convert_like, kind, template, written_templates
from negmaml.training.programs import update_with_extra_args
from negmaml.training.state import TrainSetup, TrainState, recombine

# Another number for files that this module could not read. With `patience` the best parameters are
# in the place of the last good ones since 4; other runs are as in 3.
FORMAT, FORMAT_WITH_PATIENCE = "negmaml.fit 3", "negmaml.fit 4"
# The options of checkpoints that do not record them.
DEFAULT_OPTIONS = {"monitor": ["min", None], "nonfinite": "stop"}
MAX_TO_KEEP = 2  # checkpoints: a damaged one leaves another


class CheckpointStore:
    """The checkpoints of one run in a directory.

    manager: of orbax. identity: as `identity_of` returns it. model: the `layout` of the model.
    resume_any: whether a checkpoint of another identity is used, with a warning.
    """

    def __init__(self, manager, identity: dict[str, Any], model: dict[str, Any], resume_any: bool):
        self.manager, self.identity, self.resume_any = manager, identity, resume_any
        self.model = model
        self.damaged: list[int] = []

    def latest(self, state: TrainState, shapes):
        """Return (steps done, state, history, metadata) of the last intact checkpoint.

        shapes: of a history. Without a checkpoint the state is the given one, after 0 steps.
        """
        steps = self.manager.all_steps()
        if not steps:
            empty = jax.tree.map(lambda x: np.zeros((0, *x.shape[1:]), x.dtype), shapes)
            return 0, state, empty, {}
        step, (meta, state, history) = self._last_intact(
            steps, lambda step: self._read(step, state, shapes), "resuming from"
        )
        return step, state, jax.tree.map(np.asarray, history), meta

    def leaves(self, step: int | None) -> tuple[str, dict[str, Any], list]:
        """Return (name, metadata, leaves) of a checkpoint, of the last intact one for None."""
        steps = self.manager.all_steps()
        if step is not None and step not in steps:
            raise ValueError(
                f"step must be one of those in {str(self.manager.directory)!r}, {sorted(steps)}, "
                f"got {step}"
            )
        chosen = steps if step is None else [step]
        step, (meta, leaves) = self._last_intact(chosen, self._read_leaves, "loading")
        return self._name(step), meta, leaves

    def _last_intact(self, steps, read, doing: str):
        """Return (step, result of `read`) for the last of the steps that is not damaged."""
        first_damage = None
        for step in sorted(steps, reverse=True):
            try:
                found = read(step)
            except _DamageError as damage:
                first_damage = first_damage or damage
                self.damaged.append(step)
                continue
            if first_damage is not None:
                warn_caller(f"{first_damage}; {doing} checkpoint {step}")
            return step, found
        raise ValueError(
            f"{first_damage}, and there is no earlier one; nothing was changed; give another "
            "directory"
        ) from first_damage

    def _read_leaves(self, step: int) -> tuple[dict[str, Any], list]:
        """Return (metadata, leaves) of a checkpoint, in the form in which they were written."""
        meta = self._restored(step, meta=_ocp().args.JsonRestore()).meta
        kinds = meta.get("arrays") if isinstance(meta, dict) else None
        if kinds is None:  # then it has no layout either
            return {}, []
        return meta, self._checked_leaves(step, meta, [template(own) for own in kinds])

    def _read(self, step: int, state: TrainState, shapes):
        """Return (metadata, state, history) of a checkpoint, after all checks of them."""
        # In this order: no array is read before its size and its run are known.
        meta = self._restored(step, meta=_ocp().args.JsonRestore()).meta
        self._check_identity(meta)
        # The number of steps is only the name of a folder: rows must not take memory for it.
        rows = jax.tree.map(lambda x: _zeros_without_memory((step, *x.shape[1:]), x.dtype), shapes)
        like = jax.tree.leaves((state, rows))
        written = written_templates(self._name(step), like, meta.get("arrays"))
        leaves = self._checked_leaves(step, meta, written)
        leaves = list(map(convert_like, leaves, like))
        return meta, *jax.tree.unflatten(jax.tree.structure((state, rows)), leaves)

    def _checked_leaves(self, step: int, meta, written: list) -> list:
        """Return the leaves of a checkpoint that are like `written`; raise for other numbers."""
        self._check_arrays(step, written)
        leaves = self._restored(step, leaves=_ocp().args.StandardRestore(written)).leaves
        if meta.get("digest", digest := array_digest(leaves)) != digest:
            raise _DamageError(f"{self._name(step)} is damaged (other numbers than written)")
        return leaves

    def save(self, step: int, state: TrainState, history, place, wall_time: float) -> None:
        """Write a checkpoint, and delete the damaged ones."""
        # Only now, since the run has proceeded without them.
        for bad in self.damaged:
            self.manager.delete(bad)
        self.damaged = []
        # A list of leaves, since orbax would need classes of the user to restore a tree.
        leaves = jax.tree.leaves((state, history))
        meta: dict[str, Any] = {"identity": self.identity, "place": place}
        meta["digest"] = array_digest(leaves)
        meta |= {"arrays": [kind(leaf) for leaf in leaves], "wall_time": wall_time}
        meta["model"] = self.model
        args = _ocp().args
        items = {"meta": args.JsonSave(meta), "leaves": args.StandardSave(leaves)}
        self.manager.save(step, args=args.Composite(**items))

    def _check_identity(self, meta) -> None:
        """Raise for a checkpoint of another run; only warn with `resume_any`."""
        stored = meta.get("identity", {}) if isinstance(meta, dict) else {}
        # Checkpoints of older versions have no settings: they were the defaults, but for x64,
        # which the dtypes of the arrays show.
        unrecorded = {k: v for k, v in self.identity["settings"].items() if k == "jax_enable_x64"}
        stored = {"settings": unrecorded, **DEFAULT_OPTIONS, **stored}
        found = [
            f"{name} ({text})" if text else name
            for name in sorted(self.identity | stored)
            if (text := _difference(stored.get(name), self.identity.get(name))) is not None
        ]
        if not found:
            return
        text = "; ".join(found)
        if self.resume_any and stored.get("format") == self.identity["format"]:
            warn_caller(f"resuming from a checkpoint as asked; possible differences: {text}")
            return
        raise ValueError(
            f"checkpoint {str(self.manager.directory)!r} belongs to another run, which differs in "
            f"{text}. Nothing was changed; give another directory, or the arguments it was made "
            'with, or resume from it deliberately with resume="any"'
        )

    def _restored(self, step: int, **items):
        try:
            return self.manager.restore(step, args=_ocp().args.Composite(**items))
        except Exception as damage:  # orbax raises many types for missing and broken files
            raise _DamageError(
                f"{self._name(step)} is damaged or not of `fit` ({type(damage).__name__})"
            ) from damage

    def _check_arrays(self, step: int, like) -> None:
        try:
            check_arrays(Path(self.manager.directory) / str(step) / "leaves", like)
        except Exception as damage:  # tensorstore raises many types, too
            raise _DamageError(f"{self._name(step)} is damaged ({damage})") from damage

    def _name(self, step: int) -> str:
        return f"checkpoint {step} in {str(self.manager.directory)!r}"


def _zeros_without_memory(shape: tuple[int, ...], dtype) -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype), shape)


class _DamageError(Exception):
    """A checkpoint that cannot be read."""


def _ocp() -> Any:
    return require("orbax.checkpoint", "checkpoint")


@contextlib.contextmanager
def open_for_reading(directory: Path):
    """Yield a `CheckpointStore` that is only read, also while a run writes to it."""
    ocp = _ocp()
    if not directory.is_dir():
        raise ValueError(
            f"path must be a directory with checkpoints of fit, {str(directory)!r} is none"
        )
    if not any(entry.name.isdigit() for entry in directory.iterdir()):
        raise ValueError(
            f"path must be a directory with checkpoints of fit, {str(directory)!r} holds none; "
            "give the directory that fit got as checkpoint"
        )
    check_files(directory)
    # Not read_only=True, which logs warnings for each option that follows from it.
    options = ocp.CheckpointManagerOptions(create=False, enable_async_checkpointing=False)
    manager = ocp.CheckpointManager(directory, options=options)
    try:
        yield CheckpointStore(manager, {}, {}, False)
    finally:
        manager.close()


@contextlib.contextmanager
def open_store(directory: Path, identity: dict[str, Any], model: dict[str, Any], resume_any: bool):
    """Yield the `CheckpointStore` of a run in a directory that is new, empty or of `fit`."""
    ocp = _ocp()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"checkpoint must be a directory, {str(directory)!r} is a file")
    entries = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
    # Orbax names steps by their number, with a suffix while it writes one.
    unknown = {name for name in entries if not name.split(".")[0].isdigit()}
    if unknown:
        raise ValueError(
            f"checkpoint {str(directory)!r} holds files that `fit` did not write "
            f"({sorted(unknown)[:3]}); nothing was changed; give a new or empty directory"
        )
    try:
        check_files(directory)
    except ValueError as error:
        raise ValueError(f"checkpoint {str(directory)!r} is not used: {error}") from error
    # Synchronous: after `save` returns, the run may be killed without loss.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=MAX_TO_KEEP, enable_async_checkpointing=False
    )
    with _locked(directory):
        manager = ocp.CheckpointManager(directory, options=options)
        try:
            yield CheckpointStore(manager, identity, model, resume_any)
        finally:
            manager.close()


@contextlib.contextmanager
def _locked(directory: Path):
    """Hold a lock beside a directory; raise if another run holds it.

    The lock is freed when the process dies. The processes of one run share the directory, and the
    first of them holds the lock. Where no file can be made beside the directory there is no lock,
    so that a finished run can be read.
    """
    path = directory.with_name(f".{directory.name}.lock")
    lock = require("filelock", "checkpoint").FileLock(path)
    # A folder may be read-only, and a finished run in it can still be read.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        try:
            _ = jax.process_index() or lock.acquire(timeout=0)
        except TimeoutError as error:  # the base class of filelock's
            raise ValueError(
                f"checkpoint {str(directory)!r} is in use by another run; wait for it, or give "
                "another directory"
            ) from error
    try:
        yield
    finally:
        lock.release()


def identity_of(setup: TrainSetup, state: TrainState, batch, *, trace: bool) -> dict[str, Any]:
    """Return everything that must be equal to resume a run: its first numbers and its programs.

    batch: shapes of a batch, where batches are given. trace: whether to trace the programs; without
    it they count as unknown.
    """
    # The parameters of the first step, by content: another start is another run.
    now = state.now
    start = now.params, setup.form, now.model_state, now.step
    identity: dict[str, Any] = {
        "format": FORMAT if setup.patience is None else FORMAT_WITH_PATIENCE,
        "key": array_digest(setup.key),
        "params": array_digest(start),
        "evaluate_every": setup.evaluate_every,
        "patience": setup.patience,
        "monitor": [setup.monitor_mode, setup.monitor],
        "nonfinite": "stop" if setup.nonfinite is None else str(setup.nonfinite),
        "settings": unusual_settings(),
    }
    for name, (function, *arguments) in _programs(setup, state, batch).items():
        identity[name] = _identify(name, function, arguments) if trace else None
    return identity


def program_of(identity: dict[str, Any]) -> str:
    """Return the digests of all programs of a run and their settings as one text."""
    found = {k: v for k, v in identity.items() if isinstance(v, dict)}
    return " ".join(f"{k}={v.get('digest', v)}" for k, v in sorted(found.items()))


def check_unchanged(setup: TrainSetup, state: TrainState, batch) -> None:
    """Raise unless the functions of a run are those that its checkpoints record."""
    if program_of(identity_of(setup, state, batch, trace=True)) != setup.program:
        raise ValueError(
            "the functions of a run with checkpoints, and the settings of JAX, must not change "
            "while it runs; the checkpoints so far are valid; undo the change, and the same call "
            "resumes"
        )


def _programs(setup: TrainSetup, state: TrainState, batch) -> dict[str, tuple]:
    """Return each function of a run with its arguments, of which only the shapes count."""
    now = state.now
    arrays, structure = StaticTree(recombine(setup, now)).tree_flatten()
    programs: dict[str, tuple] = {}
    # Shapes of the tasks, without drawing any.
    tasks = batch
    if setup.sample_tasks is not None:
        programs["sample_tasks"] = setup.sample_tasks, setup.key
        tasks = jax.eval_shape(setup.sample_tasks, setup.key)

    def of_arrays(function):
        return lambda own, tasks: function(StaticTree.tree_unflatten(structure, own).tree, tasks)

    # The optimizer is traced by itself, so that a difference in it is reported as one.
    def update(gradient, state, params):
        return update_with_extra_args(setup.optimizer(), gradient, state, params, jnp.zeros(()))

    value_and_grad = setup.value_and_grad
    if needs_scale(value_and_grad, setup.nonfinite):
        value_and_grad = partial(value_and_grad, loss_scale=jnp.ones(()))
    programs["value_and_grad"] = of_arrays(value_and_grad), arrays, tasks
    programs["optimizer"] = update, now.params, now.optimizer_state, now.params
    if setup.evaluate is not None:
        programs["evaluation_tasks"] = setup.evaluation_tasks, setup.key
        tasks = jax.eval_shape(setup.evaluation_tasks, setup.key)
        programs["evaluate"] = of_arrays(setup.evaluate), arrays, tasks
    return programs


def _identify(name: str, function, arguments) -> dict[str, Any]:
    try:
        return identify(function, *arguments).to_json()
    except UnidentifiedError as unknown:
        raise ValueError(
            f"checkpoint must record the programs of its run, and {name} holds an object that "
            f'cannot be compared ({unknown}); to keep checkpoints without that, give resume="any"'
        ) from unknown


def _difference(then, now) -> str | None:
    """Return the difference in words, "" where there are none for it, None for equal values."""
    if then == now:
        return None
    if isinstance(then, dict) and isinstance(now, dict):
        # Settings are a dict without a digest, the identity of a program has one.
        if "digest" not in then:
            return ", ".join(other_settings(then, now))
        return difference(Identity.from_json(then), Identity.from_json(now)) or None
    programs = isinstance(then, dict) or isinstance(now, dict)
    return "" if programs else f"{_short(then)} then, {_short(now)} now"


def _short(value) -> str:
    """Return a value as text, of a digest only the beginning."""
    text = str(value)
    return text[:12] if len(text) == hashlib.sha256().digest_size * 2 else text


def array_digest(tree) -> str:
    """Return the hash of the arrays of a tree."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
