"""Spectra of inputs by name, each with a few numbers for its shape."""

import jax
import jax.numpy as jnp

from negmaml._core.checks import check_choice, check_count, check_finite
from negmaml._core.settings import own_settings
from negmaml._core.types import Array

SPECTRA = ("isotropic", "power", "two-level", "spikes")


@own_settings
def named_spectrum(
    name: str,
    p: int,
    *,
    exponent: float | Array = 1.0,
    level: float | Array = 10.0,
    share: float | Array = 0.5,
    spikes: float | Array = 1.0,
) -> jax.Array:
    r"""p eigenvalues of an input covariance, in falling order and of mean one.

        "isotropic"    1
        "power"        k^-exponent, k = 1, ..., p
        "two-level"    `level` in the first share p directions, else 1
        "spikes"       1 + level in the first `spikes` directions, else 1

    each divided by its mean, so that all have the same input power. Numbers are traced, and a name
    ignores those that it does not use. For `MixedLinearRegression(input_covariance=...)`.

    Raises ValueError for another name, for numbers that are not finite, and for a level below 0.

    >>> named_spectrum("power", 4, exponent=0.0).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    check_choice("spectrum", name, SPECTRA)
    p = check_count("p", p)
    # The numbers that are not used are checked as well, so that a typing error is found.
    numbers = dict(exponent=exponent, level=level, share=share, spikes=spikes)
    for argument, value in numbers.items():
        check_finite(argument, value, "a number of a spectrum")
    if not isinstance(level, jax.core.Tracer) and level < 0:
        raise ValueError(f"level must be at least 0, an input variance, got {level!r}")
    # Comparisons with traced numbers, so that shares and spikes are axes of one program.
    k = jnp.arange(1, p + 1, dtype=jnp.result_type(float, *numbers.values()))
    if name == "power":
        values = k**-exponent
    elif name == "two-level":
        values = jnp.where(k <= share * p, level, 1)
    elif name == "spikes":
        values = jnp.where(k <= spikes, 1 + level, 1)
    else:
        values = jnp.ones_like(k)
    return values / jnp.mean(values)
