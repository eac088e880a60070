"""Which computation a stored result is of: a digest of the traced program.

Two functions are the same if JAX traces the same program from them: the same operations on the same
shapes with the same numbers and constants, wherever these come from (closures, globals, attributes,
arguments of partials) and whatever the functions and variables are called. Neither source positions
nor addresses enter, so that the digest is the same in every process.

    identity = identify(function, *arguments)        # arrays, or jax.ShapeDtypeStruct
    what = difference(stored, identity)              # "" or what differs, in words
"""

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import jax
import numpy as np

from negmaml._core.settings import other_settings, result_settings, unusual_settings

# Parameters of operations that say how they are called, placed, differentiated or printed, but not
# what they compute. What a derivative rule computes is in the program where it is used.
ASIDE = {
    "name", "name_and_src_info", "debug", "debug_info", "src_info", "index_map_src_info",
    "cost_estimate", "inline", "keep_unused", "donated_invars", "compiler_options_kvs", "ctx_mesh",
    "sharding", "out_sharding", "in_shardings", "out_shardings", "in_layouts", "out_layouts",
    "jvp_jaxpr_fun", "jvp_fun", "fwd_jaxpr_thunk", "bwd", "out_trees", "symbolic_zeros", "in_tree",
    "out_tree",
}  # fmt: skip
# In every digest; other settings are in it where they are not JAX's default, but for x64, which the
# types in the program show.
SETTINGS = ("jax_default_matmul_precision", "jax_threefry_partitionable")
PRINTS = {"debug_callback", "debug_print"}
SHOWN = 200  # numbers that are kept to say what differs


class UnidentifiedError(TypeError):
    """A program that holds something that cannot be compared with another run's."""


@dataclass(frozen=True)
class Identity:
    """A digest, and what there is to say of how two programs differ.

    constants: arrays as type, shape and the beginning of their hash. numbers: those written into
    the program, in order.
    """

    digest: str
    jax: str = ""
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    operations: Mapping[str, int] = dataclasses.field(default_factory=dict)
    constants: Sequence[str] = ()
    numbers: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """As what `json` takes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> "Identity":
        """From what `to_json` gave."""
        return cls(**held)


def identify(function: Callable, *arguments, code_version: str | None = None) -> Identity:
    """The identity of `function(*arguments)`.

    Arguments:
        arguments: pytrees of arrays or `jax.ShapeDtypeStruct`s; only shapes and types count.
        code_version: a label that stands for the program, which is then not traced.

    Raises UnidentifiedError for a program that calls back to Python, since nothing is known of
    what it does there.
    """
    check_code_version(code_version)
    settings = result_settings()
    if code_version is not None:
        unusual = [f"{k}={v}" for k, v in unusual_settings().items() if k != "jax_enable_x64"]
        label = " with ".join([f"version {code_version!r}", *unusual])
        return Identity(label, jax.__version__, settings)
    program = jax.make_jaxpr(lambda *given: function(*given))(*arguments)
    reading = _Reading()
    hashed = {name: settings[name] for name in SETTINGS} | unusual_settings()
    hashed.pop("jax_enable_x64", None)
    digest = _hash(reading.closed(program), *(f"{k}={v}" for k, v in hashed.items()))
    return Identity(
        digest,
        jax.__version__,
        settings,
        [str(aval) for aval in program.in_avals],
        [str(aval) for aval in program.out_avals],
        dict(sorted(reading.operations.items())),
        reading.constants,
        reading.numbers[:SHOWN],
    )


def check_code_version(label) -> None:
    """Raise unless `label` is None or a non-empty string."""
    if label is not None and (not isinstance(label, str) or not label):
        raise TypeError(f"code_version must be a non-empty string, got {label!r}")


def difference(then: Identity, now: Identity) -> str:
    """What differs between two programs, in words; nothing if they are the same."""
    if then.digest == now.digest:
        return ""
    found = other_settings(then.settings, now.settings)
    labels = [i.digest.split(" with ")[0] if i.digest.startswith("version ")
              else "no version label" for i in (then, now)]  # fmt: skip
    if labels[0] != labels[1]:
        return "; ".join([f"then {labels[0]}, now {labels[1]}", *found])
    for what in ("inputs", "outputs", "constants", "numbers"):
        old, new = (list(getattr(identity, what)) for identity in (then, now))
        if old != new:
            found.append(f"{what}: {_changes(old, new)}")
    counts = [Counter(identity.operations) for identity in (then, now)]
    lost, added = counts[0] - counts[1], counts[1] - counts[0]
    for word, some in (("no longer", lost), ("now also", added)):
        if some:
            found.append(f"operations: {word} " + ", ".join(f"{n} {k}" for k, n in some.items()))
    if not found:
        found.append("the same operations, on the same numbers, joined otherwise")
    if then.jax != now.jax:
        found.append(
            f"JAX was {then.jax}, is {now.jax}, which may trace the same function otherwise"
        )
    return "; ".join(found)


def _changes(old: list[str], new: list[str]) -> str:
    """The first places where two lists differ."""
    if len(old) == len(new):
        pairs = [f"{a} became {b}" for a, b in zip(old, new, strict=True) if a != b]
        return ", ".join(pairs[:3]) + (f" and {len(pairs) - 3} more" if len(pairs) > 3 else "")
    gone, come = Counter(old) - Counter(new), Counter(new) - Counter(old)
    parts = [f"{word} {', '.join(list(some)[:3])}" for word, some in
             (("no longer", gone), ("now also", come)) if some]  # fmt: skip
    return f"{len(old)} became {len(new)}" + (f" ({'; '.join(parts)})" if parts else "")


class _Reading:
    """Reads a program into a digest, and notes what it holds on the way.

    Variables are numbered in order of appearance, and programs within are read once each.
    """

    def __init__(self):
        self.operations: Counter[str] = Counter()
        self.constants: list[str] = []
        self.numbers: list[str] = []
        self.read: dict[int, tuple[Any, str]] = {}  # with the object, which keeps its id taken

    def closed(self, program) -> str:
        return _hash("closed", self.jaxpr(program.jaxpr), *map(self.constant, program.consts))

    def jaxpr(self, jaxpr) -> str:
        if id(jaxpr) not in self.read:
            self.read[id(jaxpr)] = jaxpr, self._jaxpr(jaxpr)
        return self.read[id(jaxpr)][1]

    def _jaxpr(self, jaxpr) -> str:
        names: dict[Any, int] = {}

        def bind(variables) -> str:
            return ",".join(
                f"{names.setdefault(variable, len(names))}:{variable.aval}"
                for variable in variables
            )

        def use(atom) -> str:
            if hasattr(atom, "val"):
                return f"{self.literal(atom.val)}:{atom.aval}"
            return str(names[atom])

        lines = [bind(jaxpr.constvars), bind(jaxpr.invars)]
        for equation in jaxpr.eqns:
            taken = ",".join(map(use, equation.invars))
            what = self.operation(equation)
            lines.append(f"{bind(equation.outvars)} = {what} {taken}")
        lines.append(",".join(map(use, jaxpr.outvars)))
        return _hash(*lines)

    def operation(self, equation) -> str:
        """The name of an operation and its parameters."""
        name = equation.primitive.name
        if "callback" in name and name not in PRINTS:
            raise UnidentifiedError(
                f"the function calls back to Python ({name}), and changes of Python code cannot be "
                "detected; pass a label such as code_version='1', and change it with the "
                "function"
            )
        self.operations[name] += 1
        if name in PRINTS:
            return name
        parameters = sorted(equation.params.items())
        kept = [f"{key}={self.value(v)}" for key, v in parameters if key not in ASIDE]
        return f"{name}[{';'.join(kept)}]"

    def literal(self, value) -> str:
        """A number in the program, or an array that became a part of it."""
        if np.ndim(value):
            return self.constant(value)
        plain = np.asarray(value)
        self.numbers.append(str(plain))
        return f"{plain.dtype}:{plain.item()!r}"

    def constant(self, array) -> str:
        """An array by its content."""
        kind = str(array.dtype)
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        if id(array) not in self.read:
            content = np.ascontiguousarray(np.asarray(array))
            self.read[id(array)] = array, hashlib.sha256(content.tobytes()).hexdigest()
        text = f"{kind}{list(np.shape(array))} {self.read[id(array)][1]}"
        self.constants.append(text[: text.index(" ") + 9])
        return text

    def value(self, value) -> str:
        """A parameter of an operation."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | slice):
            return repr(value)
        if isinstance(value, Enum):
            return f"{type(value).__name__}.{value.name}"
        if hasattr(value, "eqns"):
            return self.jaxpr(value)
        if hasattr(value, "jaxpr") and hasattr(value, "consts"):
            return self.closed(value)
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            return self.constant(value)
        if type(value).__name__ == "PRNGImpl":
            return str(value.tag)
        if isinstance(value, tuple | list):
            return f"({','.join(map(self.value, value))})"
        if isinstance(value, Mapping):
            return f"{{{','.join(sorted(f'{k!r}:{self.value(v)}' for k, v in value.items()))}}}"
        if isinstance(value, set | frozenset):
            return f"{{{','.join(sorted(map(self.value, value)))}}}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [f.name for f in dataclasses.fields(value) if f.name not in ASIDE]
            held = ",".join(f"{name}={self.value(getattr(value, name))}" for name in fields)
            return f"{type(value).__name__}({held})"
        return self._other(value)

    def _other(self, value) -> str:
        """Types, and objects that are what they print."""
        if isinstance(value, type | np.dtype):
            return str(np.dtype(value)) if isinstance(value, np.dtype) else value.__qualname__
        if type(value).__name__ == "ClosedRule" and value.__module__.startswith("negmaml."):
            return f"{value.__module__}.{value.__qualname__}"  # how our own operations are batched
        text = repr(value)
        if callable(value) or re.search(r" at 0x[0-9a-f]+", text):
            raise UnidentifiedError(
                f"the function holds {text}, in which changes cannot be detected; pass a label "
                "such as code_version='1', and change it whenever the function changes"
            )
        return f"{type(value).__name__}:{text}"


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:32]
