"""Errors of calls that do not fit a signature: they say which form is right.

Python says `simulate() takes 4 positional arguments but 5 were given`. Users of other libraries try
their names of arguments, so the error also names the argument that is meant.
"""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
# Names of other libraries, with the names of this package in the order of preference.
_RATE = ("rate", "train_rate", "rule", "train", "optimizer")
SYNONYMS = {
    **dict.fromkeys(("lr", "learning_rate", "alpha", "step_size", "inner_lr", "eta"), _RATE),
    **dict.fromkeys(("ridge", "l2", "weight_decay", "regularization"), ("meta_ridge", "strength")),
    **dict.fromkeys(("lam", "lambda_", "reg", "mu"), ("strength", "meta_ridge")),
    **dict.fromkeys(
        ("iterations", "num_steps", "n_steps", "inner_steps", "adaptation_steps"),
        ("steps", "rule"),
    ),
    **dict.fromkeys(("steps", "n_inner"), ("rule",)),
    **dict.fromkeys(("seed", "rng", "prng", "random_state", "rng_key"), ("key", "seeds")),
    **dict.fromkeys(
        ("batch", "batch_size", "tasks_per_batch", "meta_batch_size", "num_tasks"), ("m", "tasks")
    ),
    **dict.fromkeys(("shots", "n_shot", "k_shot", "n_support"), ("n_t", "shots")),
    **dict.fromkeys(("n_query", "queries"), ("n_v",)),
    **dict.fromkeys(("num_samples", "samples", "trials", "n"), ("runs", "episodes", "seeds")),
    **dict.fromkeys(("beta", "decay"), ("momentum",)),
    **dict.fromkeys(("Sigma", "covariance", "cov"), ("input_covariance",)),
    **dict.fromkeys(("noise", "noise_std"), ("sigma",)),
    **dict.fromkeys(("model", "weights", "init"), ("params",)),
    **dict.fromkeys(("solver", "inner_solver", "inner_optimizer"), ("inner", "rule")),
}
HINTS = {
    "first_order": "negmaml.fomaml is MAML of first order",
    "second_order": "negmaml.maml differentiates to second order, negmaml.fomaml does not",
}
NAMES = 8  # of a signature that a message lists


def explain_calls(function: F) -> F:
    """Return the function, whose errors of wrong calls name the right form."""

    @wraps(function)
    def call(*arguments, **keywords):
        try:
            return function(*arguments, **keywords)
        except TypeError as error:
            reject_wrong_call(error, function, arguments, keywords)
            raise

    return call  # type: ignore[return-value]


def reject_wrong_call(error: TypeError, function: Callable, arguments, keywords) -> None:
    """Raise a TypeError with the right form if the arguments do not fit the function.

    It is called where the function was called, with the error that was caught there.
    """
    # An error from within the function has frames below the caller's.
    if error.__traceback__ is None or error.__traceback__.tb_next is not None:
        return
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function in C
        return
    try:
        signature.bind(*arguments, **keywords)
    except TypeError:
        raise TypeError(_explanation(function, signature, arguments, keywords)) from None


def _explanation(function: Callable, signature: inspect.Signature, arguments, keywords) -> str:
    """Say what is wrong with a call, and how the function is called."""
    owner, _, name = function.__qualname__.rpartition("<locals>.")[2].rpartition(".")
    parameters = list(signature.parameters.values())
    # The instance of a method is no argument to its user.
    if owner:
        parameters, arguments = parameters[1:], arguments[1:]
        name = {"__init__": owner, "__call__": f"{owner}(...)"}.get(name, f"{owner}.{name}")
    mistake = _mistake(parameters, arguments, keywords)
    mark = "" if mistake.endswith("?") else "."
    return f"{name} {mistake}{mark} Write {name}({_form(parameters)})"


def _mistake(parameters: list[inspect.Parameter], arguments, keywords) -> str:
    """The first mistake in a call."""
    by_position = [p.name for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD]
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    known, given = by_position + named, by_position[: len(arguments)]
    for name in keywords:
        if name not in known:
            return f"got an unknown argument {name!r}{_hint(name, known)}"
        if name in given:
            return f"got {name!r} twice, by position and as {name}=..."
    if len(arguments) > len(by_position):
        plural = "" if len(by_position) == 1 else "s"
        text = f"takes at most {len(by_position)} positional argument{plural}, got {len(arguments)}"
        more = ["..."] if len(named) > NAMES else []
        return text + (f"; keyword-only are {', '.join(named[:NAMES] + more)}" if named else "")
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty and p.name in known and p.name not in {*given, *keywords}
    ]
    return f"is missing {', '.join(missing)}"


def _hint(unknown: str, known: list[str]) -> str:
    """The argument that an unknown name may mean."""
    meant = [name for name in SYNONYMS.get(unknown, ()) if name in known]
    meant = meant or get_close_matches(unknown, known, 1, 0.6)
    if meant:
        return f"; did you mean {meant[0]!r}?"
    return f"; {HINTS[unknown]}" if unknown in HINTS else ""


def _form(parameters: list[inspect.Parameter]) -> str:
    """The arguments of a call in short: `key, problem, train, adapt, runs=..., ...`."""
    shown = []
    for p in parameters:
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            plain = p.default is p.empty and p.kind is not p.KEYWORD_ONLY
            shown.append(p.name if plain else f"{p.name}=...")
    more = ["..."] if len(shown) > NAMES else []
    return ", ".join(shown[:NAMES] + more)
