"""Parameters from a checkpoint of `fit`, without the functions of the run.

A checkpoint holds the leaves of a run in one list. Beside them is a layout, in JSON: the numbers of
the leaves of the model, and the tree of the model if it is made of dicts, lists and tuples.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.calls import explain_calls
from negmaml._core.checks import check_count, check_flag, check_optional
from negmaml._core.display import tree_text
from negmaml._core.paths import expanded
from negmaml.meta.model_variables import MetaSGDParams, NNXForm, PairForm, Stateful, variables
from negmaml.meta.per_step import PerStepForm
from negmaml.training.state import TrainSetup, TrainState

MAX_INLINE = 10_000  # numbers of an array that does not train, in a layout
NAMED: dict[str, Any] = {"Stateful": Stateful, "MetaSGDParams": MetaSGDParams}


class _Leaf:
    """The number of a leaf of a checkpoint, in place of the leaf."""

    def __init__(self, number: int):
        self.number = number


class _NotPlainError(Exception):
    """A tree that JSON does not describe."""


def layout(setup: TrainSetup, state: TrainState) -> dict[str, Any]:
    """Return where the model is in the leaves of a checkpoint, whose first are those of `state`."""
    structure: Any
    leaves, structure = jax.tree.flatten(state)
    numbered = structure.unflatten(list(map(_Leaf, range(len(leaves)))))

    def part(point) -> dict[str, Any]:
        own = {name: [leaf.number for leaf in jax.tree.leaves(getattr(point, name))]
               for name in ("params", "model_state")}  # fmt: skip
        try:
            _check_plain(setup.form)
            tree = setup.form.model(point.params, point.model_state)
            return {**own, "tree": _encoded(tree)}
        except _NotPlainError as other:
            return {**own, "tree": None, "kind": str(other)}

    best = None if numbered.best is None else numbered.best.value.number
    return {"now": part(numbered.now), "kept": part(numbered.kept), "best": best,
            "finite": numbered.finite.number}  # fmt: skip


def _check_plain(form) -> None:
    """Raise for models that are computed from arrays, in place of which `layout` has numbers."""
    if isinstance(form, NNXForm):
        raise _NotPlainError("a Flax NNX module")
    if isinstance(form, PerStepForm):
        raise _NotPlainError("a PerStepModel")
    if isinstance(form, PairForm):
        _check_plain(form.inner)


def _encoded(tree) -> dict[str, Any]:
    """Return a tree in the form of JSON."""
    kind = type(tree)
    if kind is _Leaf:
        return {"leaf": tree.number}
    if tree is None or kind in (bool, int, str):
        return {"value": tree}
    if kind is dict and all(type(key) is str for key in tree):
        return {"dict": {key: _encoded(value) for key, value in tree.items()}}
    if kind in (list, tuple):
        return {kind.__name__: list(map(_encoded, tree))}
    if NAMED.get(kind.__name__) is kind:
        return {kind.__name__: list(map(_encoded, tree))}
    numbers = isinstance(tree, np.ndarray | np.generic | jax.Array)
    if numbers and tree.dtype.kind in "biu" and tree.size <= MAX_INLINE:
        return {"array": [str(tree.dtype), np.asarray(tree).tolist()]}
    raise _NotPlainError(f"a {kind.__name__}")


def _decoded(encoded: dict[str, Any], leaves: list):
    """Return the tree again, with the leaves of a checkpoint."""
    ((kind, content),) = encoded.items()
    if kind == "leaf":
        return jnp.asarray(leaves[content])
    if kind == "value":
        return content
    if kind == "array":
        return jnp.asarray(content[1], content[0])
    if kind == "dict":
        return {key: _decoded(value, leaves) for key, value in content.items()}
    parts = [_decoded(value, leaves) for value in content]
    return NAMED[kind](*parts) if kind in NAMED else {"list": list, "tuple": tuple}[kind](parts)


@explain_calls
def load(
    path: str | os.PathLike[str],
    like: Any = None,
    *,
    step: int | None = None,
    best: bool | None = None,
) -> Any:
    """Return the parameters of a checkpoint of `fit`, for testing or another use.

    Arguments:
        path: the directory that was given to `fit` as `checkpoint`. A run may be writing to it.
        like: a model of the same kind and shapes, whose numbers are not used. Needed for a Flax NNX
            module, an Equinox module and other classes; not for dicts, lists, tuples, `Stateful`
            and `MetaSGDParams`.
        step: number of steps of a checkpoint; the latest intact one by default. `fit` keeps two.
        best: whether to return the parameters of the best evaluation, which a run with `patience`
            keeps. By default they are returned if the run has them.

    Without `best` they are the parameters after that step; those of the last finite loss if the run
    stopped there as not finite. To resume the run itself call `fit` again.

    Raises ValueError for a directory that is missing, empty or damaged, and for a step or
    parameters that it does not hold. Raises TypeError where `like` is needed. Needs orbax: pip
    install "negmaml[checkpoint]".

    >>> import jax, jax.numpy as jnp, negmaml as nm, optax
    >>> from tempfile import TemporaryDirectory
    >>> value_and_grad = jax.value_and_grad(lambda w, tasks: (w - jnp.mean(tasks.query)) ** 2)
    >>> tasks = nm.Tasks(jnp.ones(2), jnp.ones(2))
    >>> arguments = jax.random.key(0), 3.0, value_and_grad, tasks, optax.sgd(0.5), 2
    >>> with TemporaryDirectory() as folder:
    ...     result = nm.fit(*arguments, checkpoint=folder)
    ...     float(nm.load(folder))
    1.0
    """
    from negmaml.training.checkpoint import open_for_reading

    step = check_optional(check_count, "step", step)
    best = check_optional(check_flag, "best", best)
    with open_for_reading(Path(expanded("path", path)).absolute()) as store:
        name, meta, leaves = store.leaves(step)
    found = meta.get("model")
    if found is None:
        raise ValueError(
            f"{name} was written by an earlier version of negmaml, which did not record the model; "
            "call fit with the same arguments, and take the params of its result"
        )
    part = _chosen(name, found, leaves, best)
    if like is not None:
        return _like(name, like, part, leaves)
    if part["tree"] is None:
        raise TypeError(
            f"like must be given for {name}, since its model is or holds {part['kind']}; pass a "
            "model of the same kind and shapes, such as a new one"
        )
    return _decoded(part["tree"], leaves)


def _chosen(name: str, found: dict[str, Any], leaves: list, best: bool | None) -> dict[str, Any]:
    """Return the part of the layout to load."""
    evaluated = found["best"] is not None and np.isfinite(leaves[found["best"]])
    if best and not evaluated:
        why = "no evaluation was finite" if found["best"] is not None else "fit had no patience"
        raise ValueError(f"best=True needs a best evaluation, and {name} has none: {why}")
    last = found["now"] if leaves[found["finite"]] else found["kept"]
    return found["kept"] if evaluated and best is not False else last


def _like(name: str, like, part: dict[str, Any], leaves: list):
    """Return a model of the kind of `like` with the leaves of a checkpoint."""
    parts: Any = variables(like)

    def filled(tree, numbers):
        structure: Any
        own, structure = jax.tree.flatten(tree)
        new = [jnp.asarray(leaves[i]) for i in numbers]
        if [x.shape for x in own] != [x.shape for x in new]:
            raise ValueError(
                f"like must have the shapes of the model in {name}, "
                f"{tree_text(new)}, got {tree_text(tree)}"
            )
        return structure.unflatten(new)

    params = filled(parts.params, part["params"])
    return parts.form.model(params, filled(parts.state, part["model_state"]))
