"""Objects that a spec names: rules with parameters, functions, and results of functions.

{ rule = "Momentum", rate = 0.1, momentum = 0.9, steps = 3 }     negmaml.rules.Momentum(...)
{ callable = "jax.nn:relu" }                                     the function
{ call = "optax:adam", learning_rate = 0.01 }                    the optimizer it returns
"""

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from negmaml._core.checks import did_you_mean

RULES = "negmaml.rules"
KINDS = ("rule", "callable", "call")


def imported(where: str, name: Any) -> Any:
    """Import "module:attribute"; modules in the current folder count."""
    module, _, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not (module and attribute):
        raise ValueError(f'{where} must be "module:function", got {name!r}')
    # An installed command has the folder of its script on the path, not the current one.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    # error.name, since the missing module may be one that the named module imports.
    except ModuleNotFoundError as error:
        raise ValueError(f"{where}: no module {error.name!r} for {name!r}") from error
    except AttributeError as error:
        near_one = did_you_mean(attribute, dir(sys.modules[module]))
        raise ValueError(f"{where}: {module!r} has no {attribute!r}{near_one}") from error
    return found


def resolved(where: str, value: Any) -> Any:
    """A value of a spec in which objects replace the tables that name them."""
    if isinstance(value, list):
        return [resolved(where, one) for one in value]
    if not isinstance(value, Mapping):
        return value
    # Inner tables first: an object may take other objects as its arguments.
    held = {name: resolved(f"{where}.{name}", one) for name, one in value.items()}
    kinds = [kind for kind in KINDS if isinstance(value.get(kind), str)]
    if not kinds:
        return held
    kind = kinds[0]
    name = held.pop(kind)
    if kind == "rule":
        made = _rule(where, name)
    else:
        made = imported(where, name)
        if not callable(made):
            raise ValueError(f"{where}: {name!r} is no function, but {made!r}")
        if kind == "callable":
            if held:
                raise ValueError(
                    f"{where}: a callable has no arguments, got {', '.join(held)}; to have it "
                    f'called with them, write call = "{name}"'
                )
            return made
    try:
        return made(**held)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {name} does not take {held}: {error}") from error


def _rule(where: str, name: str) -> Any:
    # Imported by name: sweeps may not depend on rules, but a spec may name them.
    rules = importlib.import_module(RULES)
    members = {one: getattr(rules, one) for one in rules.__all__}
    kinds = rules.InnerRule, rules.Schedule
    known = [
        one for one, member in members.items()
        if isinstance(member, type) and issubclass(member, kinds) and member is not kinds[0]
    ]  # fmt: skip
    if name not in known:
        raise ValueError(
            f"{where}: no rule {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}"
        )
    return getattr(rules, name)
