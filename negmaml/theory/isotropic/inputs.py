"""The numbers that the isotropic theory takes from a problem, and checks of its arguments."""

import dataclasses
from numbers import Real
from typing import Any

import numpy as np

from negmaml._core.arrays import canonicalize, working_dtype
from negmaml._core.checks import check_nonnegative, short_repr
from negmaml._core.pytree import pytree, static
from negmaml.problem.model import MixedLinearRegression, check_problem
from negmaml.rules import InnerRule, check_filters
from negmaml.theory.isotropic.spectral_density import Spectrum, marchenko_pastur, spectrum

SCALARS = ("p", "m", "n_t", "n_v", "sigma", "nu", "offset", "meta_ridge")


@pytree
class IsotropicInputs:
    """An isotropic problem and a ridge, all scalars of one dtype and traced.

    p, m, n_t, n_v: sizes, real, so that one compiled program serves every problem.
    sigma, nu, meta_ridge: as in the problem; offset: |omega_0 - w0|^2.
    quadrature: spectrum of S; None for the Marchenko-Pastur law of the sizes.
    ridged: True if the ridge may be above zero, static.
    """

    p: Any
    m: Any
    n_t: Any
    n_v: Any
    sigma: Any
    nu: Any
    offset: Any
    meta_ridge: Any
    quadrature: Any = None
    ridged: bool = static(default=False)

    @property
    def spectrum(self) -> Spectrum:
        """Nodes and weights of the spectrum of S."""
        if self.quadrature is not None:
            return self.quadrature
        return marchenko_pastur(self.n_t, self.p, self.p.dtype)

    @property
    def rows(self):
        """N = n_v m."""
        return self.n_v * self.m

    def with_ridge(self, meta_ridge) -> "IsotropicInputs":
        """Return the inputs with another ridge, which may be above zero."""
        return dataclasses.replace(self, meta_ridge=meta_ridge, ridged=True)

    def with_spectrum(self) -> "IsotropicInputs":
        """Return the inputs with their quadrature computed, for callers that need it repeatedly."""
        return dataclasses.replace(self, quadrature=self.spectrum)


def isotropic_inputs(
    problem: MixedLinearRegression, rules: tuple[InnerRule, ...], meta_ridge, measure: str
):
    """Return (the inputs, the rules), all of one dtype, for rules of one family.

    Raises ValueError for a problem with covariances, a bad ridge, and a rule with a
    preconditioner.
    """
    meta_ridge = check_nonnegative("meta_ridge", meta_ridge, "a ridge strength")
    check_problem(problem)
    if not problem.isotropic:
        raise ValueError(
            f"problem must not have covariances here, got {short_repr(problem)}: this part of the "
            "theory is for isotropic inputs and weights; test_loss, weight_error, train_task_error "
            "and the best rates and ridge take them"
        )
    rules = tuple(check_spectral("train", rule) for rule in rules)
    numbers = problem.sigma, problem.nu, problem.offset_squared, meta_ridge
    sizes = problem.p, problem.m, problem.n_t, problem.n_v
    dtype = working_dtype(rules, numbers)
    # None for the Marchenko-Pastur law: it then follows traced sizes within the program.
    quadrature = spectrum(problem.n_t, problem.p, measure, dtype, rules[0].spectral().entire)
    values = dict(zip(SCALARS, canonicalize((*sizes, *numbers), dtype), strict=True))
    inputs = IsotropicInputs(**values, quadrature=quadrature, ridged=not is_zero(meta_ridge))
    return inputs, canonicalize(rules, dtype)


def check_arguments(problem, meta_ridge, **rules) -> list:
    """Return [the ridge, every rule] as arrays and rules; raise ValueError or TypeError."""
    check_problem(problem)
    ridge = check_nonnegative("meta_ridge", meta_ridge, "a ridge strength")
    return [ridge, *(check_filters(name, rule) for name, rule in rules.items())]


def check_spectral(name: str, rule) -> InnerRule:
    """Return the rule if it acts only by its filters on the spectrum of S; raise otherwise."""
    rule = check_filters(name, rule)
    if rule.spectral().preconditioner is not None:
        raise ValueError(
            f"{name} {type(rule).__name__} acts through P S, which has no rotational symmetry: the "
            "theory does not hold; use simulate"
        )
    return rule


def is_zero(value) -> bool:
    """True if a number is known to be zero, even while JAX traces."""
    # Tracers are neither: a traced ridge counts as one that may be above zero.
    return isinstance(value, Real | np.ndarray) and float(value) == 0
