"""The warning of solvers that did not converge, from eager calls and from compiled programs."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap


class ConvergenceWarning(RuntimeWarning):
    """An iterative solver did not reach its tolerance, so results that depend on it are inexact.

    Python shows it once. To have an error instead, or silence:

        warnings.simplefilter("error", negmaml.ConvergenceWarning)
        warnings.simplefilter("ignore", negmaml.ConvergenceWarning)

    A compiled program warns while it runs, so the error of one is a `JaxRuntimeError` that quotes
    this, raised where its result is waited for.
    """


def warn_unless(converged, text: str) -> None:
    """Warn with a text if a flag, or one of an array of flags, is False.

    From a compiled program by a callback that runs in this case only, once for all that a `vmap`
    maps. `converged` may be True itself, which costs nothing.
    """
    if converged is True:
        return
    if not isinstance(converged, jax.core.Tracer):
        if not bool(jnp.all(converged)):
            _warn(text)
        return
    _report(text)(jnp.all(converged))


def _report(text: str):
    """A function of a flag; under `vmap` of all flags at once."""

    @custom_vmap
    def report(converged):
        lax.cond(converged, lambda: None, lambda: jax.debug.callback(partial(_warn, text)))
        return converged

    @report.def_vmap
    def of_all(size, mapped, converged):
        return jnp.broadcast_to(report(jnp.all(converged)), (size,)), True

    return report


def _warn(text: str) -> None:
    warnings.warn(text, ConvergenceWarning, stacklevel=2)
