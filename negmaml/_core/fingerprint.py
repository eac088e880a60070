"""The identity of a computation: a digest of the program that JAX traces.

Two functions are the same if JAX traces the same program from them: the same operations on the same
shapes with the same numbers and constants. It does not matter whether these come from closures,
globals, attributes or arguments of partials, nor how functions and variables are named. Source
positions and addresses are left out, so the digest is the same in every process.

    identity = identify(function, *arguments)        # arrays, or jax.ShapeDtypeStruct
    text = difference(stored, identity)              # "" or the differences in words

The lowered text of a program would not do: it is another one on each platform, and it calls Python
in the same way to print a number, which changes no result, and to compute one.
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

# Parameters of operations for names, placement, derivatives or printing, which do not change the
# result. The computation of a derivative rule is in the program where it is used.
IGNORED_PARAMS = {
    "name", "name_and_src_info", "debug", "debug_info", "src_info", "index_map_src_info",
    "cost_estimate", "inline", "keep_unused", "donated_invars", "compiler_options_kvs", "ctx_mesh",
    "sharding", "out_sharding", "in_shardings", "out_shardings", "in_layouts", "out_layouts",
    "jvp_jaxpr_fun", "jvp_fun", "fwd_jaxpr_thunk", "bwd", "out_trees", "symbolic_zeros", "in_tree",
    "out_tree",
}  # fmt: skip
# These settings are in every digest, the others where they differ from JAX's default. The exception
# is x64, which the types in the program show.
SETTINGS = ("jax_default_matmul_precision", "jax_threefry_partitionable")
DEBUG_PRIMITIVES = {"debug_callback", "debug_print"}
MAX_NUMBERS = 200  # stored of a program, to describe a difference


class UnidentifiedError(TypeError):
    """A program holds an object that cannot be compared with that of another run.

    Examples are callbacks to Python and functions in the parameters of an operation.
    """


@dataclass(frozen=True)
class Identity:
    """The digest of a program, and a summary from which a difference can be described.

    constants: arrays as type, shape and the first digits of their hash. numbers: the scalars in the
    program, in order. operations: the number of each.
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
        """Return the identity as a dict that `json` can write."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> "Identity":
        """Return the identity that `to_json` wrote."""
        return cls(**held)


def identify(function: Callable, *arguments, code_version: str | None = None) -> Identity:
    """Return the identity of `function(*arguments)`.

    Arguments:
        arguments: pytrees of arrays or `jax.ShapeDtypeStruct`s; only shapes and types count.
        code_version: a label that stands for the program, which is then not traced.

    Raises UnidentifiedError for a program that calls back to Python, since its computation there
    is unknown.
    """
    check_code_version(code_version)
    settings = result_settings()
    if code_version is not None:
        unusual = [f"{k}={v}" for k, v in unusual_settings().items() if k != "jax_enable_x64"]
        label = " with ".join([f"version {code_version!r}", *unusual])
        return Identity(label, jax.__version__, settings)
    # The lambda hides a static_argnums or a cache of the function itself.
    program = jax.make_jaxpr(lambda *given: function(*given))(*arguments)
    hasher = JaxprHasher()
    hashed = {name: settings[name] for name in SETTINGS} | unusual_settings()
    hashed.pop("jax_enable_x64", None)
    digest = _hash(hasher.closed(program), *(f"{k}={v}" for k, v in hashed.items()))
    return Identity(
        digest,
        jax.__version__,
        settings,
        [str(aval) for aval in program.in_avals],
        [str(aval) for aval in program.out_avals],
        dict(sorted(hasher.operations.items())),
        hasher.constants,
        hasher.numbers[:MAX_NUMBERS],
    )


def digest_of(program, strict: bool = True) -> str:
    """Return the digest of a jaxpr with its constants.

    strict: whether to raise UnidentifiedError for an object that cannot be compared; else any two
    of them count as equal.
    """
    return JaxprHasher(strict).closed(program)


def check_code_version(label) -> None:
    """Raise unless `label` is None or a non-empty string."""
    if label is not None and (not isinstance(label, str) or not label):
        raise TypeError(f"code_version must be a non-empty string, got {label!r}")


def difference(then: Identity, now: Identity) -> str:
    """Return the differences of two programs in words; "" if they are the same."""
    if then.digest == now.digest:
        return ""
    found = other_settings(then.settings, now.settings)
    # A label and a digest say nothing about each other.
    labels = [i.digest.split(" with ")[0] if i.digest.startswith("version ")
              else "no version label" for i in (then, now)]  # fmt: skip
    if labels[0] != labels[1]:
        return "; ".join([f"then {labels[0]}, now {labels[1]}", *found])
    for name in ("inputs", "outputs", "constants", "numbers"):
        old, new = (list(getattr(identity, name)) for identity in (then, now))
        if old != new:
            found.append(f"{name}: {_changes(old, new)}")
    # Counter subtraction drops negative counts, so each direction has only its own surplus.
    counts = [Counter(identity.operations) for identity in (then, now)]
    lost, added = counts[0] - counts[1], counts[1] - counts[0]
    for word, some in (("no longer", lost), ("now also", added)):
        if some:
            found.append(f"operations: {word} " + ", ".join(f"{n} {k}" for k, n in some.items()))
    # The summaries agree, but the digest also has the order and the connections.
    if not found:
        found.append("the same operations on the same numbers, connected otherwise")
    if then.jax != now.jax:
        found.append(
            f"JAX was {then.jax}, is {now.jax}, which may trace the same function otherwise"
        )
    return "; ".join(found)


def _changes(old: list[str], new: list[str]) -> str:
    """Describe the first places where two lists differ."""
    if len(old) == len(new):
        pairs = [f"{a} became {b}" for a, b in zip(old, new, strict=True) if a != b]
        return ", ".join(pairs[:3]) + (f" and {len(pairs) - 3} more" if len(pairs) > 3 else "")
    lost, added = Counter(old) - Counter(new), Counter(new) - Counter(old)
    parts = [f"{word} {', '.join(list(some)[:3])}" for word, some in
             (("no longer", lost), ("now also", added)) if some]  # fmt: skip
    return f"{len(old)} became {len(new)}" + (f" ({'; '.join(parts)})" if parts else "")


class JaxprHasher:
    """Hashes a program, and collects its operations, constants and numbers.

    Variables are numbered in order of appearance, so that their names do not matter. A program
    within the program is hashed once, however often it is called.
    """

    def __init__(self, strict: bool = True):
        self.strict = strict
        self.operations: Counter[str] = Counter()
        self.constants: list[str] = []
        self.numbers: list[str] = []
        # By id. The object is stored as well, since a deleted object's id can be used again.
        self.hashes: dict[int, tuple[Any, str]] = {}

    def closed(self, program) -> str:
        return _hash("closed", self.jaxpr(program.jaxpr), *map(self.constant, program.consts))

    def jaxpr(self, jaxpr) -> str:
        # A jaxpr is shared by all its calls, such as those of a function of jax.numpy.
        if id(jaxpr) not in self.hashes:
            self.hashes[id(jaxpr)] = jaxpr, self._jaxpr(jaxpr)
        return self.hashes[id(jaxpr)][1]

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
        """Return the name of an operation and its parameters."""
        name = equation.primitive.name
        if "callback" in name and name not in DEBUG_PRIMITIVES:
            self._unidentified(f"the function calls back to Python ({name})")
        self.operations[name] += 1
        # The arguments of a print are computed by operations that are read anyway.
        if name in DEBUG_PRIMITIVES:
            return name
        parameters = sorted(equation.params.items())
        kept = [f"{key}={self.value(v)}" for key, v in parameters if key not in IGNORED_PARAMS]
        return f"{name}[{';'.join(kept)}]"

    def literal(self, value) -> str:
        """Return a number in the program, or an array that became a part of it, as text."""
        if np.ndim(value):
            return self.constant(value)
        # With its type: 1 and 1.0 are different numbers.
        plain = np.asarray(value)
        self.numbers.append(str(plain))
        return f"{plain.dtype}:{plain.item()!r}"

    def constant(self, array) -> str:
        """Return type, shape and hash of an array."""
        kind = str(array.dtype)
        if isinstance(array, jax.core.Tracer):
            return self._unidentified(f"the function holds a traced {array.aval}")
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        if id(array) not in self.hashes:
            content = np.ascontiguousarray(np.asarray(array))
            self.hashes[id(array)] = array, hashlib.sha256(content.tobytes()).hexdigest()
        text = f"{kind}{list(np.shape(array))} {self.hashes[id(array)][1]}"
        # Eight digits suffice to describe a difference; the digest of the program uses all.
        self.constants.append(text[: text.index(" ") + 9])
        return text

    def value(self, value) -> str:
        """Return a parameter of an operation as text."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | slice):
            return repr(value)
        if isinstance(value, Enum):
            return f"{type(value).__name__}.{value.name}"
        # A jaxpr within, such as the body of a loop.
        if hasattr(value, "eqns"):
            return self.jaxpr(value)
        if hasattr(value, "jaxpr") and hasattr(value, "consts"):
            return self.closed(value)
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            return self.constant(value)
        # By name, since the class is private to JAX.
        if type(value).__name__ == "PRNGImpl":
            return str(value.tag)
        if isinstance(value, tuple | list):
            return f"({','.join(map(self.value, value))})"
        if isinstance(value, Mapping):
            return f"{{{','.join(sorted(f'{k!r}:{self.value(v)}' for k, v in value.items()))}}}"
        # Sorted, because the order of a set of strings differs between processes.
        if isinstance(value, set | frozenset):
            return f"{{{','.join(sorted(map(self.value, value)))}}}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [f.name for f in dataclasses.fields(value) if f.name not in IGNORED_PARAMS]
            held = ",".join(f"{name}={self.value(getattr(value, name))}" for name in fields)
            return f"{type(value).__name__}({held})"
        return self._other(value)

    def _other(self, value) -> str:
        """Return types, and objects that their text describes."""
        if isinstance(value, type | np.dtype):
            return str(np.dtype(value)) if isinstance(value, np.dtype) else value.__qualname__
        if type(value).__name__ == "ClosedRule" and value.__module__.startswith("negmaml."):
            return f"{value.__module__}.{value.__qualname__}"  # how our own operations are batched
        # An address differs from process to process, and a function may do anything.
        text = repr(value)
        if callable(value) or re.search(r" at 0x[0-9a-f]+", text):
            return self._unidentified(f"the function holds {text}")
        return f"{type(value).__name__}:{text}"

    def _unidentified(self, reason: str) -> str:
        """Raise for an object that cannot be compared; return a stand-in for it if not strict."""
        if self.strict:
            raise UnidentifiedError(
                f"{reason}, in which changes cannot be detected; pass a label such as "
                "code_version='1', and change it whenever the function changes"
            )
        return "unidentified"


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    # With its length, so that parts cannot be cut in another place.
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    # 128 bits: a chance collision is out of reach, and manifests stay short.
    return digest.hexdigest()[:32]
