"""Old names of what a rule defines, which work for one release with a DeprecationWarning.

A rule of version 0.2 defined its filters and all that was known about them on itself. Those names
are now hooks of `InnerRule` with other names, or members of the `Filter` that it returns.
"""

import inspect
from typing import Any

from negmaml._core.deprecation import warn_renamed
from negmaml.rules.filters import RuleFilter

HOOKS = {"q": "label_filter", "b": "init_filter", "tuned": "tunable", "with_tuned": "with_tunable"}
MOVED = {
    "one_step": "constant_filter", "metric": "preconditioner", "growth": "exponential_type",
    "crossing": "zero_indicator", "pole": "pole_indicator", "filters": "log_form",
    "degree": "degree", "entire": "entire", "pencil_on": "pencil", "pencil_error": "pencil_error",
}  # fmt: skip


def old_attribute(rule, name: str) -> Any:
    """The value of an attribute of a rule under its old name; for `__getattr__`."""
    if name in HOOKS:
        warn_renamed(f"{type(rule).__name__}.{name}", HOOKS[name], 4)
        return getattr(rule, HOOKS[name])
    if name in MOVED:
        warn_renamed(f"{type(rule).__name__}.{name}", f"spectral().{MOVED[name]}", 4)
        return getattr(rule.spectral(), MOVED[name])
    text = f"{type(rule).__name__!r} object has no attribute {name!r}"
    # With name and object Python suggests the nearest attribute.
    raise AttributeError(text, name=name, obj=rule)


def adopt_old_names(cls) -> None:
    """Let a class of rules that defines old names serve under the new ones."""
    own = vars(cls)
    fields = {
        name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in f"{kind}"
    }
    for old, new in HOOKS.items():
        if old in own.keys() - fields and new not in own:
            warn_renamed(f"{cls.__name__}.{old}", new, 5)
            setattr(cls, new, own[old])
    moved = (own.keys() & {*MOVED, "pencil"}) - fields
    if moved and "spectral" not in own:
        names = ", ".join(sorted(moved))
        warn_renamed(f"{cls.__name__}.{names}", "spectral(), which returns a Filter with them", 5)
        # A filter that reads each of the old members from the rule.
        members: dict[str, Any] = {MOVED[old]: _from_rule(old) for old in moved & MOVED.keys()}
        if "pencil" in moved:
            members["pencil"] = lambda self, largest: self.rule.pencil
        old_filter = type("OldFilter", (RuleFilter,), members)
        cls.spectral = lambda self: old_filter(self)


def _from_rule(old: str) -> property:
    return property(lambda self: getattr(self.rule, old))
