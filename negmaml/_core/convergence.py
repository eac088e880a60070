"""The warning of solvers that did not converge, from eager calls and from compiled programs."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap


class ConvergenceWarning(RuntimeWarning):
    """An iterative solver did not reach its tolerance, so results that depend on it are inexact.

    Python shows it once. To raise an error instead, or to ignore it:

        warnings.simplefilter("error", negmaml.ConvergenceWarning)
        warnings.simplefilter("ignore", negmaml.ConvergenceWarning)

    A compiled program warns while it runs on CPU. Its error is a `JaxRuntimeError` that quotes this
    warning, raised when the program waits for the result. Programs on accelerators call no Python:
    there look at the flags of the results.

    >>> import negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2
    >>> rule = nm.Implicit(lambda objective, start: start)  # a solver that does nothing
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", nm.ConvergenceWarning)
    ...     try:
    ...         nm.adapt(square, 0.0, 1.0, rule)
    ...     except nm.ConvergenceWarning as warning:
    ...         print(str(warning).partition(":")[0])
    the inner problem was not solved on some task
    """


def warn_unless(converged, text: str) -> None:
    """Warn with a text if a flag, or one of an array of flags, is False.

    A program compiled for CPU warns by a callback that runs only in this case, once for everything
    that a `vmap` maps. One for an accelerator has no callback, which would make the device wait for
    the host and could not be exported. `converged` may be the constant True, which costs nothing.
    """
    if converged is True:
        return
    # A known flag warns at once, with the caller's stack.
    if not isinstance(converged, jax.core.Tracer):
        if not bool(jnp.all(converged)):
            _warn(text)
        return
    _report(text)(jnp.all(converged))


def _report(text: str):
    """A function of a flag; under `vmap` of all flags at once."""

    @custom_vmap
    def report(converged):
        def on_cpu(converged):
            lax.cond(converged, lambda: None, lambda: jax.debug.callback(partial(_warn, text)))

        lax.platform_dependent(converged, cpu=on_cpu, default=lambda converged: None)
        return converged

    # Under vmap one callback reports for all, instead of one for each.
    @report.def_vmap
    def of_all(size, mapped, converged):
        return jnp.broadcast_to(report(jnp.all(converged)), (size,)), True

    return report


def _warn(text: str) -> None:
    warnings.warn(text, ConvergenceWarning, stacklevel=2)
