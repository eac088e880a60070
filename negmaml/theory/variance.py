"""How much a run scatters, and how many runs a comparison of two rates needs.

For two rules trained on the same data the theory has the covariance of their losses to leading
order in 1/p, with a factor for the threshold: equations (19) to (24) of
negmaml/theory/isotropic.md, and negmaml/theory/anisotropic.md for problems with covariances. The
relative variance of the weight error is of order 1/p. Near the threshold the exact inverse-Wishart
variance at alpha_t = 0 exceeds the limit by a factor gap/(gap - 3), gap = |p - n_v m|: hence the
factor 1/(1 - 3 x s), with x s the pole of the mean.
"""

from typing import NamedTuple

import jax.numpy as jnp

from negmaml._core.checks import check_array, check_flag
from negmaml._core.deprecation import renamed_attribute
from negmaml._core.display import add_fields_repr
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, Float, ScalarLike
from negmaml.problem.model import MixedLinearRegression
from negmaml.rules import InnerRule, check_scalar_rule
from negmaml.theory.isotropic.inputs import check_arguments
from negmaml.theory.model import theory_model
from negmaml.theory.options import named_options


@add_fields_repr
class StandardDeviation(NamedTuple):
    """Standard deviations over runs.

    weight_error: that of |omega* - w0|^2, of train shape.
    test_loss: that of the expected test loss, of train shape + adapt shape.
    """

    weight_error: Float[Array, "..."]
    test_loss: Float[Array, "..."]


StandardDeviation.distance = renamed_attribute(  # type: ignore[attr-defined]
    "StandardDeviation.distance", "weight_error"
)


@named_options
@own_settings
def standard_deviation(
    problem: MixedLinearRegression,
    train: InnerRule,
    adapt: InnerRule,
    *,
    meta_ridge: ScalarLike = 0.0,
    measure: str = "auto",
) -> StandardDeviation:
    """Standard deviation over runs of the results of `negmaml.simulate` (expected evaluation).

    A run is a training set of m tasks. Arguments as in `theory.test_loss`. Infinite where the
    variance does not exist: without ridge at |n_v m - p| <= 3, and just beyond by this theory.
    Leading order in 1/p with the factor for the threshold; see the head of this module.

    >>> from negmaml import GradientDescent
    >>> problem = MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
    >>> scatter = standard_deviation(problem, GradientDescent(-0.2), GradientDescent(0.2))
    >>> round(float(scatter.weight_error), 3)
    0.067
    """
    meta_ridge, train, adapt = check_arguments(problem, meta_ridge, train=train, adapt=adapt)
    model = theory_model(problem, meta_ridge, measure=measure)
    return StandardDeviation(*model.deviations(train, adapt))


@named_options
@own_settings
def required_runs(
    problem: MixedLinearRegression,
    train_a: InnerRule,
    train_b: InnerRule,
    *,
    adapt: InnerRule | None = None,
    meta_ridge: ScalarLike = 0.0,
    measure: str = "auto",
    standard_errors: float = 4.0,
    shared: bool = True,
) -> Float[Array, ""]:
    """Return the number of runs of `negmaml.simulate` that distinguishes two training rules.

    With that many runs the expected difference of the two mean test losses is `standard_errors`
    times its standard error. The rule at test time scales both losses alike and drops out, except
    for problems with covariances.

    Arguments:
        train_a, train_b: rules of one family with scalar parameters.
        adapt: the rule at test time, with a scalar parameter; needed only with covariances.
        shared: whether both rules see the same data in a run, as in one call of `simulate`
            (common random numbers), or independent data.

    Returns a real number; infinity when the two losses are equal. Raises TypeError or ValueError
    for rules that are not scalar or of two families, unless standard_errors is above 0, and for a
    problem with covariances without `adapt`.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
    >>> negative, zero = nm.GradientDescent(-0.2), nm.GradientDescent(0.0)
    >>> round(float(nm.theory.required_runs(problem, negative, zero)))
    19
    """
    meta_ridge, train_a = check_arguments(problem, meta_ridge, train_a=train_a)
    train_a = check_scalar_rule("train_a", train_a)
    train_b = check_scalar_rule("train_b", train_b)
    # One program evaluates both rules side by side, so they share their structure.
    if type(train_a) is not type(train_b):
        raise ValueError(
            f"train_b must be of the family of train_a, {train_a!r}, with other numbers, got "
            f"{train_b!r}"
        )
    standard_errors = check_array("standard_errors", standard_errors, "a distance", 0, strict=True)
    shared = check_flag("shared", shared)
    model = theory_model(problem, meta_ridge, measure=measure)
    a, b, both = model.loss_covariance(train_a, train_b, adapt)
    difference = jnp.abs(a.mean - b.mean)
    # Two equal losses cannot be distinguished by any number of runs.
    same = difference == 0
    # Standard errors squared times the variance of the difference over the difference squared. The
    # quotients are formed with logarithms, because the variances themselves may overflow.
    log_difference = jnp.log(jnp.where(same, 1.0, difference))
    size_a, size_b = (jnp.exp(2 * x.log_units[0] - log_difference) for x in (a, b))
    variance = a.values * size_a**2 + b.values * size_b**2
    if shared:
        variance = jnp.maximum(variance - 2 * both.values * size_a * size_b, 0.0)
    return jnp.where(same, jnp.inf, standard_errors**2 * variance)
