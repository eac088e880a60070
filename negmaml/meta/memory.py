r"""The memory of a meta-gradient by method, segments and batch size, before anything is compiled.

Every option is traced, and the bytes that its program holds at once are estimated from the jaxpr
(`negmaml._core.memory`). Under a budget the options are tried in the order of their extra work: the
default method on all tasks at once, on fewer at a time, then other methods, then segments whose
steps are computed twice.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax

from negmaml._core.calls import explain_calls
from negmaml._core.checks import check_count, short_repr
from negmaml._core.display import Table, add_fields_repr, add_table_repr
from negmaml._core.memory import peak_bytes
from negmaml._core.types import PyTree
from negmaml.meta.batching import as_tasks, leading_axis
from negmaml.meta.model_variables import Variables

Algorithm: TypeAlias = Any  # that of `negmaml.meta.gradients`, which imports this module

UNITS = {
    "": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30
}  # fmt: skip


@add_fields_repr
class MemoryOption(NamedTuple):
    """A way to compute a meta-gradient, and its memory.

    Attributes:
        method, segment, batch_size: as in `maml_value_and_grad`; batch_size is a number.
        bytes: the estimated memory beside parameters, tasks and results.
    """

    method: str | None
    segment: int | str | None
    batch_size: int
    bytes: int


@add_table_repr
class MemoryPlan(NamedTuple):
    """The result of `memory_plan`.

    Attributes:
        chosen: the first option within the budget; None where every option exceeds it.
        options: all options, the least work first.
        budget: in bytes; None for no limit.
    """

    chosen: MemoryOption | None
    options: tuple[MemoryOption, ...]
    budget: int | None

    def _summary(self) -> Table:
        limit = "" if self.budget is None else f", at most {bytes_text(self.budget)}"
        rows = [
            (o.method or "-", str(o.segment or "-"), str(o.batch_size), bytes_text(o.bytes),
             "chosen" if o == self.chosen else "")
            for o in self.options
        ]  # fmt: skip
        columns = ("method", "segment", "batch_size", "memory", "")
        return Table(f"Estimated memory beside parameters, tasks and results{limit}", rows, columns)


@explain_calls
def memory_plan(
    value_and_grad: Any,
    params: PyTree,
    tasks: Any,
    *,
    budget: int | str | None = None,
) -> MemoryPlan:
    r"""Return the estimated memory of a meta-gradient for each method, and the choice for a budget.

    Arguments:
        value_and_grad: an algorithm such as `maml_value_and_grad(loss, rule)`. Its `method`,
            `segment` and `batch_size` are kept if they were given, and varied otherwise.
        params, tasks: those that it will be called with. Only their shapes are used.
        budget: bytes, or a text such as "2GiB" or "500MB". With a budget each option has the
            largest batch size that fits.

    The program is traced for each option. Nothing is compiled or computed. The estimate counts
    values that are held at once in the order of the trace, beside parameters, tasks and results. It
    was within 30% of XLA's own number on a CPU (tests/meta/test_memory.py checks a factor of 2).

    Returns `MemoryPlan`, which prints as a table. Raises TypeError for other functions, and
    ValueError for a budget that is not positive.

    >>> import negmaml as nm, jax.numpy as jnp
    >>> loss = lambda w, x: jnp.sum(jnp.sin(w) * x)
    >>> function = nm.maml_value_and_grad(loss, nm.GradientDescent(0.1, steps=400))
    >>> tasks = nm.Tasks(jnp.ones((2, 1000)), jnp.ones((2, 1000)))
    >>> memory_plan(function, jnp.ones(1000), tasks, budget="2MB").chosen[:3]
    ('mixed', None, 1)
    """
    algorithm: Any = getattr(value_and_grad, "func", None)
    if not hasattr(algorithm, "with_convergence"):
        raise TypeError(
            "value_and_grad must be an algorithm such as maml_value_and_grad(loss, rule), not "
            f"jitted, got {short_repr(value_and_grad)}"
        )
    (rule,) = value_and_grad.args
    planner = _Planner(algorithm, rule, params, tasks)
    return planner.plan(None if budget is None else check_bytes("budget", budget))


def planned(algorithm: Algorithm, rule, params, tasks) -> Algorithm:
    """Return the algorithm with the first options within its budget; print them if it asks."""
    planner = _Planner(algorithm, rule, params, tasks)
    plan = planner.plan(algorithm.memory_budget, whole=algorithm.explain)
    if algorithm.explain:
        print(plan)
    if plan.chosen is None:
        least = min(option.bytes for option in plan.options)
        raise ValueError(
            f"memory_budget must be at least {bytes_text(least)} for these shapes, got "
            f"{algorithm.memory_budget} B; use truncate, fewer rows or smaller parameters"
        )
    return planner.with_option(plan.chosen)


def check_bytes(name: str, value) -> int:
    """Return a number of bytes, given as an integer or as a text with a unit; else raise."""
    if not isinstance(value, str):
        return check_count(name, value)
    number = value.rstrip("kKMGiB ")
    unit = value[len(number) :].strip()
    try:
        size = float(number) * UNITS[unit]
    except (ValueError, KeyError):
        size = float("nan")
    if not 1 <= size < float("inf"):
        raise ValueError(
            f"{name} must be a number of bytes above 0, such as 2_000_000, '500MB' or '2GiB', in "
            f"one of the units {', '.join(filter(None, UNITS))}, got {value!r}"
        )
    return int(size)


def bytes_text(size: int) -> str:
    """A number of bytes with a unit."""
    unit = next((u for u in ("GB", "MB", "kB") if size >= UNITS[u]), "B")
    return f"{size / UNITS[unit]:.3g} {unit}"


class _Planner:
    """The options of one algorithm on one set of shapes."""

    def __init__(self, algorithm: Algorithm, rule, params, tasks):
        self.algorithm = algorithm._replace(memory_budget=None, explain=False)
        self.arguments = rule, algorithm.variables(params), as_tasks(tasks)
        self.in_parts = isinstance(params, Variables)
        self.default, self.steps = self._default_method()
        self.count = leading_axis("tasks.support and tasks.query", tuple(self.arguments[-1]))

    def plan(self, budget: int | None, whole: bool = True) -> MemoryPlan:
        """Return the options and the first that fits; up to that one unless the plan is whole."""
        chosen, tried = None, []
        for option in self.options(budget):
            tried.append(option)
            if chosen is None and (budget is None or option.bytes <= budget):
                chosen = option
                if not whole:
                    break
        return MemoryPlan(chosen, tuple(tried), budget)

    def options(self, budget: int | None) -> Iterator[MemoryOption]:
        """Each method, without and with segments, with the largest batch size within the budget."""
        for method, segment in self._variants():
            try:
                yield self._largest_batch(method, segment, budget)
            except (ValueError, TypeError):
                # A method that is not exact for this loss and rule is no option, unless it is the
                # one of the user, who gets the error.
                if method == self.algorithm.method or method == self.default:
                    raise

    def _variants(self) -> list[tuple[str | None, int | str | None]]:
        """(method, segment) of all options."""
        given, segment = self.algorithm.method, self.algorithm.unroll.segment
        if self.default in (None, "implicit"):
            return [(given, segment)]
        others = dict.fromkeys((self.default, "mixed", "reverse", "remat"))
        methods = [given] if given else list(others)
        segments: list[int | str | None] = [segment]
        if segment is None and self.steps >= 4:  # below, the square root saves nothing
            segments.append("sqrt")
        pairs = [(method, segment) for segment in segments for method in methods]
        return [pair for pair in pairs if pair[0] != "low-rank" or pair[1] is None]

    def _default_method(self) -> tuple[str | None, int]:
        """(method of the algorithm without a budget, None if there is only one; steps)."""
        found: list = []

        def look(rule, parts, tasks):
            found.append(self.algorithm.default_method(rule, self._model(parts), tasks))

        jax.eval_shape(look, *self.arguments)
        return found[0]

    def _largest_batch(self, method, segment, budget: int | None) -> MemoryOption:
        """Return the option with the most tasks at once within the budget, or with the fewest."""
        size = self.algorithm.batch_size
        option = partial(self._option, method, segment)
        whole = option(self.count if size is None else min(size, self.count))
        if budget is None or whole.bytes <= budget or size is not None or self.count == 1:
            return whole
        best = option(1)
        # Memory is almost linear in the number of tasks; blocks of equal size trace one program.
        each = max((whole.bytes - best.bytes) / (self.count - 1), 1)
        size = 1 + max(int((budget - best.bytes) / each), 0)
        while size > 1:
            size = -(-self.count // -(-self.count // size))
            larger = option(size)
            if larger.bytes <= budget:
                return larger
            size //= 2
        return best

    def _option(self, method, segment, batch_size: int) -> MemoryOption:
        option = MemoryOption(method, segment, batch_size, 0)

        def compute(rule, parts, tasks):
            return self.with_option(option).with_convergence(rule, self._model(parts), tasks)[0]

        return option._replace(bytes=peak_bytes(jax.make_jaxpr(compute)(*self.arguments)))

    def _model(self, parts: Variables):
        """Return the parameters in the form in which they were given."""
        return parts if self.in_parts else parts.model

    def with_option(self, option: MemoryOption) -> Algorithm:
        """Return the algorithm with the method, segment and batch size of an option."""
        unroll = self.algorithm.unroll._replace(segment=option.segment)
        size = option.batch_size if option.batch_size < self.count else None
        return self.algorithm._replace(method=option.method, unroll=unroll, batch_size=size)
