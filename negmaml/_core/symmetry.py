r"""A test for gradients of traced functions whose derivative need not be symmetric.

JAX differentiates by rules. With A(x) the Jacobian by the rule of an operation, the
gradient g = A^T l has the derivative A^T L A + sum_i l_i dA_i, symmetric where every dA_i is, and
where the operation itself is differentiated by A. JAX's own operations satisfy both, and so does
`stop_gradient` (A = 0 in every order). These need not:

- `jax.custom_vjp`: its backward rule defines A, while its forward rule is differentiated by JAX;
- `jax.custom_jvp`, unless its rule is JAX's or optax's own, or acts on one array entry by
  entry and returns the function itself: dA is diagonal then for any rule;
- an iterative linear solve, which is not exactly the inverse, `jax.custom_batching.custom_vmap`,
  `linear_call` and operations that are not JAX's.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive, jaxpr_as_fun

# Operations of programs that take the arguments of the program one to one.
CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"}
# User-defined derivative rules other than custom_jvp and custom_vjp.
RULED = {"custom_vmap_call": "jax.custom_batching.custom_vmap", "linear_call": "linear_call",
         "custom_transpose_call": "custom_transpose"}  # fmt: skip
ENTRYWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "cos",
    "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor",
    "ge", "gt", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt",
    "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pow", "reduce_precision",
    "rem", "round", "rsqrt", "select_n", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor",
}  # fmt: skip
# Folders whose rules are known to be derivatives. Elsewhere JAX passes on rules of the user.
TRUSTED = {"jax": ("_src/nn", "_src/numpy", "_src/scipy", "_src/third_party/scipy", "_src/lax"),
           "optax": ("losses", "projections")}  # fmt: skip

_own_primitives: set[Primitive] = set()


def asymmetry(program: ClosedJaxpr, count: int) -> str:
    """Return the operation that may make the second derivative asymmetric, in words, or "".

    The derivative is in the first `count` inputs of the program.
    """
    others = len(program.jaxpr.invars) - count
    return _look(program.jaxpr, [True] * count + [False] * others)[0]


def _look(jaxpr: Jaxpr, moving: list[bool]) -> tuple[str, list[bool]]:
    """(the operation that was found or "", which outputs depend on the inputs that move)."""
    marked = {variable for variable, moves in zip(jaxpr.invars, moving, strict=True) if moves}

    def moves(atom) -> bool:
        return not isinstance(atom, Literal) and atom in marked

    for equation in jaxpr.eqns:
        flags = [moves(atom) for atom in equation.invars]
        # Operations that do not depend on the parameters have no second derivative.
        if not any(flags) or equation.primitive.name == "stop_gradient":
            continue
        if found := _rule_of_its_own(equation, flags):
            return found, []
        # Without a closer look at the inner program, every output may depend on moving inputs.
        outputs = [True] * len(equation.outvars)
        for inner in _programs(equation):
            direct = equation.primitive.name in CALLS and len(inner.invars) == len(flags)
            found, own = _look(inner, flags if direct else [True] * len(inner.invars))
            if found:
                return found, []
            outputs = own if direct else outputs
        pairs = zip(equation.outvars, outputs, strict=True)
        marked |= {variable for variable, yes in pairs if yes and _differentiable(variable)}
    return "", [moves(atom) for atom in jaxpr.outvars]


def _differentiable(variable) -> bool:
    return jnp.issubdtype(getattr(variable.aval, "dtype", jnp.float32), jnp.inexact)


def _programs(equation) -> Iterator[Jaxpr]:
    """The programs inside an equation, unless its derivative is a rule that was checked already."""
    if equation.primitive.name in ("custom_jvp_call", "custom_linear_solve"):
        return iter(())
    return _within(equation.params)


def _within(parameters) -> Iterator[Jaxpr]:
    """Every program in the parameters of an equation."""
    if isinstance(parameters, ClosedJaxpr | Jaxpr):
        yield parameters.jaxpr if isinstance(parameters, ClosedJaxpr) else parameters
    elif isinstance(parameters, dict):
        yield from _within(list(parameters.values()))
    elif isinstance(parameters, list | tuple):
        for parameter in parameters:
            yield from _within(parameter)


def _rule_of_its_own(equation, flags: list[bool]) -> str:
    """Return the way in which an equation may break the symmetry, in words, or ""."""
    name = equation.primitive.name
    if name.startswith("custom_vjp_call"):
        return f"a jax.custom_vjp{_named(equation)}"
    if name == "custom_jvp_call" and not (_trusted(equation) or _entrywise(equation, flags)):
        return f"a jax.custom_jvp{_named(equation)}"
    if name == "custom_linear_solve" and iterates(equation.params):
        return "a linear solve that iterates"
    if name in RULED or "hi_primitive" in name:
        return RULED.get(name, name)
    return "" if _of_jax(equation.primitive) else f"the operation {name}, which is not JAX's own"


def _named(equation) -> str:
    info = getattr(getattr(equation.params.get("call_jaxpr"), "jaxpr", None), "debug_info", None)
    name = getattr(info, "func_name", None)
    return f" ({name})" if name else ""


def _trusted(equation) -> bool:
    """True if the rule of a custom_jvp is from JAX, or a loss of optax."""
    info = getattr(equation.params.get("jvp_jaxpr_fun"), "debug_info", None)
    source = getattr(info, "func_src_info", None) or ""
    path = Path(source.partition(" at ")[2].rpartition(":")[0])
    return any(
        path.parent == Path(str(sys.modules[library].__file__)).parent / folder
        for library, folders in TRUSTED.items() if library in sys.modules for folder in folders
    )  # fmt: skip


def _entrywise(equation, flags: list[bool]) -> bool:
    """True if a custom_jvp acts on one array entry by entry, and its rule as well."""
    # Two moving operands would have mixed derivatives.
    if sum(flags) != 1:
        return False
    place = flags.index(True)
    try:
        rule = _rule(equation, place)
    except Exception:  # the rule cannot be traced for one moving operand: not known to be safe
        return False
    # The rule must return the function itself, or its derivative has another rule.
    value = next((e for e in rule.eqns if rule.outvars[0] in e.outvars), None)
    if value is None or value.primitive.name != "custom_jvp_call":
        return False  # not the function itself: the next derivative has another rule
    if value.invars[place] is not rule.invars[0] or str(_rule(value, place)) != str(rule):
        return False
    return _only_entrywise(rule, {*rule.invars[:2]}, value)


def _rule(equation, place: int) -> Jaxpr:
    """The program (operand at `place`, its tangent, other operands) -> (value, tangent)."""
    own = equation.invars[place]
    variables = [a for a in equation.invars if not isinstance(a, Literal) and a is not own]
    others = list(dict.fromkeys(variables))
    info = equation.params["call_jaxpr"].jaxpr.debug_info._replace(
        arg_names=None, result_paths=None
    )
    # The equation as a program of its own, so that jvp applies its rule and nothing else.
    jaxpr = Jaxpr([], [own, *others], equation.outvars, [equation], equation.effects, info)
    function = jaxpr_as_fun(ClosedJaxpr(jaxpr, []))

    def pushed(x, tangent, *others):
        return jax.jvp(lambda x: function(x, *others), (x,), (tangent,))

    shapes = [jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype) for a in (own, own, *others)]
    return jax.make_jaxpr(pushed)(*shapes).jaxpr


def _only_entrywise(jaxpr: Jaxpr, carried: set, same) -> bool:
    """True if all values computed from `carried` are entrywise; calls of `same` count as such."""
    carried = set(carried)
    for equation in jaxpr.eqns:
        flags = [not isinstance(a, Literal) and a in carried for a in equation.invars]
        if not any(flags):
            continue
        name = equation.primitive.name
        if name in CALLS:
            inner = next(_within(equation.params))
            own = {v for v, flag in zip(inner.invars, flags, strict=True) if flag}
            if not _only_entrywise(inner, own, same):
                return False
        elif name == "custom_jvp_call":
            if str(equation.params["call_jaxpr"]) != str(same.params["call_jaxpr"]):
                return False
        elif name not in ENTRYWISE:
            return False
        carried |= set(equation.outvars)
    return True


def iterates(parameters) -> bool:
    """Return whether a program, or one in the parameters of an equation, has a `while` loop."""
    return any(
        equation.primitive.name == "while" or iterates(equation.params)
        for jaxpr in _within(parameters)
        for equation in jaxpr.eqns
    )


def _of_jax(primitive: Primitive) -> bool:
    """True if an operation is one of JAX's modules, and not of a library on top of it."""
    if primitive not in _own_primitives:
        # Copied, because another thread may import a module meanwhile.
        modules = [m for name, m in list(sys.modules.items()) if name.startswith("jax._src.")]
        _own_primitives.update(
            value for m in modules for value in list(vars(m).values())
            if isinstance(value, Primitive)
        )  # fmt: skip
    return primitive in _own_primitives
