"""The frame of the user's call, to which a warning should point."""

import sys
import warnings

# Frames of these packages lie between the user's line and a warning: wrappers and callbacks.
_INNER = {"negmaml", "jax", "contextlib"}


def warn_caller(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the innermost frame outside the package, however deep the call is."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame) in _INNER:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)


def _package(frame) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]
