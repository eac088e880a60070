r"""The memory that a traced program needs when it is compiled, estimated from its jaxpr.

The operations run in the order of the trace. A value is held from the operation that writes it to
the last one that reads it. As a compiler does, an operation that acts entry by entry is joined with
those that read it: its result is held only if another kind of operation reads it, or if it costs
more than a few instructions and is read twice. A loop holds its carry, its stacked results and the
memory of one step.
"""

from collections.abc import Iterable
from math import prod
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters import partial_eval

from negmaml._core.symmetry import CALLS, ENTRYWISE

# Operations whose body a compiler inserts in place of the call.
INLINE = CALLS | {"custom_jvp_call", "custom_vjp_call", "custom_vmap_call"}
# Results that are the operand in another order, and need no memory.
VIEWS = {"reshape", "transpose", "squeeze", "expand_dims", "optimization_barrier"}
# Cheap operations that are computed again by each reader.
CHEAP = {
    "add", "add_any", "sub", "mul", "neg", "max", "min", "select_n", "and", "or", "not", "eq", "ne",
    "lt", "le", "gt", "ge", "convert_element_type", "abs", "sign", "square", "clamp",
    "stop_gradient", "broadcast_in_dim", "iota", "copy",
}  # fmt: skip
# Operations that compute each entry of the result from entries of the operands.
JOINED = ENTRYWISE | CHEAP | {"slice", "dynamic_slice", "pad", "rev", "concatenate", "gather"}
# They read joined operations, but their results are held.
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
              "argmax", "argmin"}  # fmt: skip
# Their result takes the place of an operand that is not read again.
IN_PLACE = {"dynamic_update_slice", "scatter", "scatter-add", "scatter_add"}


class _Operation(NamedTuple):
    """An operation of a program without calls: values that it reads and writes, by number.

    inside: bytes that it holds while it runs, beside those values.
    """

    name: str
    reads: list[int]
    writes: list[int]
    inside: int = 0


class _Program:
    """The operations of a jaxpr, with the bodies of calls in place of them."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.operations: list[_Operation] = []

    def value(self, variable) -> int:
        """The number of a new value with the size of a variable."""
        self.bytes.append(_bytes_of(variable.aval))
        return len(self.bytes) - 1

    def add(self, jaxpr: Jaxpr, known: dict[Any, int | None]) -> None:
        """Add the operations of a jaxpr; `known` has the numbers of its inputs."""

        for equation in jaxpr.eqns:
            name, reads = equation.primitive.name, _numbers(equation.invars, known)
            body = _body(equation) if name in INLINE else None
            if body is not None:
                own = dict(zip(body.invars, reads, strict=True))
                self.add(body, own)
                known.update(zip(equation.outvars, _numbers(body.outvars, own), strict=True))
                continue
            writes = [self.value(variable) for variable in equation.outvars]
            known.update(zip(equation.outvars, writes, strict=True))
            held = [r for r in reads if r is not None]
            self.operations.append(_Operation(name, held, writes, _inside(equation)))


def _numbers(atoms: Iterable, known: dict[Any, int | None]) -> list[int | None]:
    """Return the numbers of values, None for literals and inputs whose memory does not count."""
    return [None if isinstance(a, Literal) else known.get(a) for a in atoms]


def peak_bytes(program: ClosedJaxpr) -> int:
    """Return the most bytes held at once, beside the arguments and results of a traced program."""
    jaxpr, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return _peak(jaxpr, held=(), results_count=False)


def _peak(jaxpr: Jaxpr, held, results_count: bool) -> int:
    """Return the most bytes held at once by a jaxpr.

    held: inputs whose memory counts, and may be taken over by a result.   results_count: whether
    the memory of results counts.
    """
    flat = _Program()
    known: dict[Any, int | None] = {}
    inputs = {variable: flat.value(variable) for variable in held}
    known.update(inputs)
    flat.add(jaxpr, known)
    outputs = {number for number in _numbers(jaxpr.outvars, known) if number is not None}
    joined = _joined(flat, outputs)
    sources = _sources(flat, joined, set(inputs.values()))

    last: dict[int, int] = {}
    for place, operation in enumerate(flat.operations):
        for value in operation.reads:
            last.update(dict.fromkeys(sources[value], place))
    last.update((source, len(flat.operations)) for o in outputs for source in sources[o])
    ends: dict[int, list[int]] = {}
    for value, place in last.items():
        ends.setdefault(place, []).append(value)

    def counts(value) -> bool:
        return results_count or value not in outputs

    live = sum(flat.bytes[i] for i in inputs.values())
    most = live
    for place, operation in enumerate(flat.operations):
        written = sum(
            flat.bytes[w] for w in operation.writes if w not in joined and w in last and counts(w)
        )
        freed = sum(flat.bytes[v] for v in ends.get(place, ()) if counts(v))
        in_place = operation.name in JOINED or operation.name in IN_PLACE | {"scan", "while"}
        most = max(most, live + operation.inside + max(written - freed if in_place else written, 0))
        live += written - freed
    return most


def _joined(flat: _Program, outputs: set) -> set[int]:
    """Return the values that are not held, since the operations that read them compute them."""
    readers: dict[int, list[str]] = {}
    for operation in flat.operations:
        for value in operation.reads:
            readers.setdefault(value, []).append(operation.name)
    joined = set()
    # From the last to the first, so that a view is judged by those who read it.
    for operation in reversed(flat.operations):
        for value in operation.writes:
            names = readers.get(value, [])
            if value in outputs:
                continue
            if operation.name in VIEWS or (
                operation.name in JOINED
                and (operation.name in CHEAP or len(names) == 1)
                and all(name in JOINED | REDUCTIONS | IN_PLACE for name in names)
            ):
                joined.add(value)
    return joined


def _sources(flat: _Program, joined: set[int], inputs: set) -> list[set[int]]:
    """Return for each value the held values that it is computed from."""
    sources: list[set[int]] = [{v} if v in inputs else set() for v in range(len(flat.bytes))]
    for operation in flat.operations:
        for value in operation.writes:
            if value in joined:
                sources[value] = set().union(*(sources[r] for r in operation.reads))
            else:
                sources[value] = {value}
    return sources


def _inside(equation) -> int:
    """Return the bytes that an operation holds while it runs, beside its operands and results."""
    name, parameters = equation.primitive.name, equation.params
    if name == "scan":
        body, first = parameters["jaxpr"].jaxpr, parameters["num_consts"]
        carry = body.invars[first : first + parameters["num_carry"]]
        # The results of the whole scan are counted by the caller.
        results = sum(_bytes_of(v.aval) for v in equation.outvars[: parameters["num_carry"]])
        return max(_peak(body, carry, True) - results, 0)
    if name == "while":
        body = parameters["body_jaxpr"].jaxpr
        carry = body.invars[parameters["body_nconsts"] :]
        return max(_peak(body, carry, True) - sum(_bytes_of(v.aval) for v in carry), 0)
    return max((_peak(body, (), True) for body in _bodies(parameters)), default=0)


def _body(equation) -> Jaxpr | None:
    """The one program in the parameters of a call, if it takes the operands of the call."""
    bodies = list(_bodies(equation.params))
    fits = len(bodies) == 1 and len(bodies[0].invars) == len(equation.invars)
    return bodies[0] if fits else None


def _bodies(parameters):
    values = parameters.values() if isinstance(parameters, dict) else parameters
    for value in values:
        if isinstance(value, ClosedJaxpr | Jaxpr):
            yield value.jaxpr if isinstance(value, ClosedJaxpr) else value
        elif isinstance(value, tuple | list):
            yield from _bodies(value)


def _bytes_of(aval) -> int:
    size = getattr(getattr(aval, "dtype", None), "itemsize", 0)
    return prod(getattr(aval, "shape", ())) * size
