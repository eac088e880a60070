r"""The mean test loss after adaptation, exact at finite size.

With S ~ Wishart_p(n)/n of the adaptation data and a rule's filters b, q, a model that starts
from omega has adapted weights theta = b(S) omega + q(S) X^T y / n. Hence

    theta - w = b(S) (omega - w) + q(S) X^T noise / n,

and averaging over noise, task and inputs (isotropic, hence E b(S)^2 = h I) leaves

    E L_test(omega) = sigma^2/2 + h/2 (nu^2 + |omega - w0|^2) + sigma^2/(2 n) E tr(q(S)^2 S),
    h = E tr b(S)^2 / p.

The theory inserts a predicted |omega - w0|^2 here, the simulation a measured one.

With covariances x ~ N(0, Sigma), w ~ N(w0, nu^2/p Omega), and H = E b(S) Sigma b(S),

    E L_test(omega) = sigma^2/2 (1 + E tr(Sigma q(S)^2 S)/n) + tr(H Omega) nu^2/(2 p)
                      + (omega - w0)^T H (omega - w0) / 2,

where H has the eigenvectors of Sigma. For one gradient step it is a polynomial in Sigma,

    H = Sigma - 2 alpha Sigma^2 + alpha^2 ((n + 1)/n Sigma^3 + tr(Sigma^2)/n Sigma),

so three quadratic forms (omega - w0)^T Sigma^j (omega - w0) serve every rate. Another rule has one
form of its own for each value of its parameter.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import contract, namespace, outer, stop_gradient, working_dtype
from negmaml._core.checks import as_array, check_array, check_count
from negmaml._core.deprecation import renamed_arguments
from negmaml._core.display import add_fields_repr
from negmaml._core.jit import is_concrete, on_host
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, ArrayLike, Float, ScalarLike
from negmaml.problem.filter_moments import filtered_covariance
from negmaml.problem.model import MixedLinearRegression, check_problem
from negmaml.problem.wishart import wishart_quadrature
from negmaml.rules import InnerRule, check_filters
from negmaml.rules.filters import log_size


@own_settings
def shrinkage(rate: ArrayLike, n: ScalarLike, p: ScalarLike) -> Any:
    r"""h(a) = (1 - a)^2 + a^2 (p + 1)/n, the mean of tr (I - a S)^2 / p; n rows, p dimensions.

    Arguments:
        rate: of one gradient step, any shape and sign.
        n, p: numbers of rows and of dimensions, above 0.

    Returns h, of the shape of `rate`. Raises TypeError or ValueError for a rate that is not finite,
    and for sizes that are not positive numbers. Source: Bernacchia 2021, below Theorem 1.

    >>> shrinkage(0.5, n=20, p=9)  # (1 - 0.5)^2 + 0.5^2 (9 + 1)/20
    0.375
    """
    rate = check_array("rate", rate, "an inner learning rate")
    n, p = (check_array(name, x, "a size", 0, strict=True) for name, x in (("n", n), ("p", p)))
    return _shrinkage(rate, n, p)


def _shrinkage(rate, n, p):
    return (1 - rate) ** 2 + rate**2 * (p + 1) / n


@own_settings
def filter_means(rule: InnerRule, n: int, p: int) -> tuple[Any, Any]:
    r"""Return (E tr b(S)^2 / p, E tr q(S)^2 S / p) for S ~ Wishart_p(n)/n, of the rule's shape.

    The factor of nu^2 + |omega - w0|^2 in twice the test loss after adaptation, and p/n times the
    second is that of sigma^2. Both are infinite where the mean does not exist.

    Arguments:
        rule: any rule with filters, of any shape.
        n, p: rows of a task and dimensions, at least 1.

    >>> import negmaml as nm
    >>> h, noise = nm.problem.filter_means(nm.GradientDescent(0.5), n=20, p=9)
    >>> round(float(h), 6), float(noise)  # `shrinkage(0.5, 20, 9)`, and rate^2
    (0.375, 0.25)
    """
    rule, n, p = check_filters("rule", rule), check_count("n", n), check_count("p", p)
    xp = namespace(rule)
    b, q, exists = rms_filters(rule, n, p)
    return xp.where(exists, b * b, xp.inf), xp.where(exists, q * q, xp.inf)


def rms_filters(rule: InnerRule, n: int, p: int) -> tuple[Any, Any, Any]:
    r"""Return the square roots of E tr b(S)^2 / p and E tr q(S)^2 S / p, and whether both exist.

    One gradient step in closed form; everything else by the finite-size Gauss quadrature of
    ten nodes, exact for up to nine gradient steps and accurate while the filter is smooth on
    the scale of the spectrum. Roots beyond the largest number are returned as that number.

    The density of the eigenvalues falls as exp(-n x/2) and vanishes nowhere. So the means are
    infinite for filters that grow as exp(n x/4) or faster, and for those with a pole at x > 0. A
    pole beyond the outermost nodes is ignored, since eigenvalues come near it so rarely.
    """
    _require_no_preconditioner(rule)
    xp = namespace(rule)
    # One step in closed form: h(a) and a^2, as tr S has the mean p.
    if rule.spectral().constant_filter is not None:
        rate = xp.asarray(rule.spectral().constant_filter)
        return xp.sqrt(_shrinkage(rate, n, p)), rate, xp.ones(rate.shape, bool)
    dtype = working_dtype(rule)
    nodes, weights = (a.astype(dtype) for a in wishart_quadrature(n, p))
    found = rule.spectral().log_form(nodes)
    log_q = log_size(xp.asarray(found.label)) + (0.0 if found.scale is None else found.scale)
    # Logarithms, since filters of steep rules differ by thousands of decades.
    root_x = np.log(np.where(nodes > 0, nodes, 1.0)).astype(dtype) / 2
    b = _root_mean_square(xp.asarray(found.log_init), weights)
    q = _root_mean_square(xp.where(nodes > 0, log_q + root_x, -xp.inf), weights)
    return b, q, xp.broadcast_to(means_exist(rule, nodes[nodes > 0], n), b.shape)


def means_exist(rule: InnerRule, nodes, n):
    """Return whether E b(S)^2 exists for n rows and the positive nodes; see `rms_filters`."""
    xp = namespace(rule, nodes, n)
    # b^2 grows as exp(2 growth x), against the density's exp(-n x/2).
    exists = 4 * xp.asarray(rule.spectral().exponential_type) < n
    pole = rule.spectral().pole_indicator(nodes)
    if pole is None:
        return exists
    # An indicator of one sign on all nodes has no pole between them.
    pole = xp.asarray(pole)
    return exists & ((pole.min(-1) > 0) | (pole.max(-1) < 0))


def _root_mean_square(log_values, weights):
    """Return the root of sum weights exp(2 log_values), at most the largest number."""
    xp = namespace(log_values)
    largest = xp.max(log_values, -1)
    some = xp.isfinite(largest)
    # In units of the largest value, since the squares may overflow.
    unit = stop_gradient(xp.where(some, largest, 0.0))
    mean = xp.exp(2 * (log_values - unit[..., None])) @ weights
    root = xp.sqrt(xp.where(some, mean, 1.0)) * xp.exp(xp.minimum(unit, _largest_log(unit)))
    return xp.where(some, root, 0.0)


def _largest_log(x) -> float:
    return float(np.log(np.finfo(x.dtype).max)) - 1


def _require_no_preconditioner(rule: InnerRule) -> None:
    if rule.spectral().preconditioner is not None:
        raise ValueError(
            f"the mean test loss after {type(rule).__name__} depends on the direction of "
            "omega - w0, not only on its length; simulate with evaluation='sampled'"
        )


@add_fields_repr
class Adapted(NamedTuple):
    r"""The test loss after adaptation as a function of a few quadratic forms of e = omega - w0.

        E L_test(omega) = floor + coefficients . forms / 2
        forms_j = sum_k weights_jk (v_k^T e)^2

    floor: the loss of a model with e = 0, of the rule's shape.
    weights: shape (J, p), functions of Sigma by their values on its eigenvalues.
    coefficients: rule shape + (J,).
    V: the eigenvectors v_k as columns; None where they are the coordinate axes.
    """

    floor: jax.Array
    weights: jax.Array
    coefficients: jax.Array
    V: jax.Array | None

    @own_settings
    def forms(self, error: ArrayLike) -> Any:
        """Return the quadratic forms, (..., J), of vectors e, (..., p)."""
        along = error if self.V is None else contract("...p,pk->...k", error, self.V)
        return contract("...k,jk->...j", along**2, self.weights)

    @own_settings
    def test_loss(self, forms: Any) -> Array:
        """Return the loss for forms of shape (..., J), of shape (...) + rule shape."""
        if is_concrete((self, forms)):
            # Known forms stay in NumPy, where there is no program to compile.
            forms = np.asarray(forms)
        flat = self.coefficients.reshape(-1, len(self.weights))
        excess = contract("...j,rj->...r", forms, flat) / 2
        shape = *forms.shape[:-1], *np.shape(self.floor)
        return jnp.asarray(self.floor + excess.reshape(shape))


@own_settings
def adapted(problem: MixedLinearRegression, adapt: InnerRule) -> Adapted:
    """Return the test loss after `adapt` as a function of quadratic forms, with covariances.

    Exact for polynomial rules; `negmaml.problem.filter_moments` states the error for others.
    """
    check_problem(problem)
    adapt = check_filters("adapt", adapt)
    _require_no_preconditioner(adapt)
    s, o, _, V = problem.modes
    n_r, shape = problem.n_r, adapt.batch_shape
    infinite: Any = 0.0
    if adapt.spectral().constant_filter is not None:
        xp = np if is_concrete((s, o, adapt)) else jnp
        # The polynomial H of the head of this module: coefficients of Sigma, Sigma^2, Sigma^3.
        rate, power = xp.asarray(adapt.spectral().constant_filter), xp.sum(s**2) / n_r
        weights = s ** np.arange(1, 4)[:, None]
        terms = 1 + rate**2 * power, -2 * rate, rate**2 * (n_r + 1) / n_r
        # One step has q = rate, so E tr(Sigma q^2 S)/n = rate^2 tr(Sigma^2)/n.
        coefficients, noise = xp.stack(terms, -1), rate**2 * power
    else:
        h, noise = filtered_covariance(adapt, s, n_r)
        # The infinite loss of one parameter must not make the forms of the others NaN.
        missing = ~jnp.isfinite(h).all(-1)
        infinite = jnp.where(missing, jnp.where(jnp.isinf(h).any(-1), jnp.inf, jnp.nan), 0)
        noise = jnp.where(missing, 0, noise / n_r)
        # Each parameter has one form of its own, and the identity selects it.
        weights = jnp.where(missing[..., None], 0, h).reshape(-1, problem.p)
        coefficients = jnp.eye(len(weights), dtype=s.dtype).reshape(*shape, -1)
    # tr(H Omega) nu^2/p, the loss that the task weights leave.
    tasks = contract("...j,jk,k->...", coefficients, weights, o)
    floor = problem.sigma**2 / 2 * (1 + noise) + tasks / 2 + infinite
    return Adapted(floor, weights, coefficients, V)


@renamed_arguments(distance="weight_error")
@own_settings
def expected_test_loss(
    problem: MixedLinearRegression, weight_error: ArrayLike, adapt: InnerRule
) -> Float[Array, "..."]:
    r"""Return the mean test loss after adaptation, given |omega - w0|^2 = `weight_error`.

        L = sigma^2/2 + h/2 (nu^2 + weight_error) + sigma^2/(2 n_r) E tr q(S)^2 S

    Arguments:
        problem: only p, n_r, sigma and nu matter.
        weight_error: squared distance of the meta-trained weights from w0, any shape. For a problem
            with covariances the quadratic forms of omega - w0 along a last axis: three, of Sigma,
            Sigma^2 and Sigma^3, for one gradient step; for other rules those of `adapted`.
        adapt: the rule used on a new task.

    Returns an array of shape weight_error.shape (less the axis of forms) + rule shape: the exact
    mean over test tasks, adaptation data and test points. Source: negmaml; for one step it is the
    conditional mean behind Bernacchia 2021, Theorems 1 and 2.

    >>> from negmaml import GradientDescent
    >>> problem = MixedLinearRegression(p=4, m=1, n_t=1, n_v=1, n_r=2, sigma=1.0, nu=1.0)
    >>> float(expected_test_loss(problem, 0.0, GradientDescent(0.0)))  # sigma^2/2 + nu^2/2
    1.0
    """
    check_problem(problem)
    adapt = check_filters("adapt", adapt)
    weight_error = _check_weight_error(weight_error)
    if not problem.isotropic:
        return adapted(problem, adapt).test_loss(jnp.asarray(weight_error))
    return expected_isotropic_loss(problem, weight_error, adapt)


def _check_weight_error(value):
    """Return the checked weight error; infinity is allowed, as the theory has infinite means."""
    value = as_array("weight_error", value)
    known = not isinstance(value, jax.core.Tracer) and jax.tree_util.all_leaves([value])
    if known and np.asarray(value).dtype.kind == "f":
        # The finite rest is checked, and infinity stays.
        finite = np.where(np.isposinf(value), 0.0, value)
        check_array("weight_error", finite, "a squared distance", 0)
        return value
    return check_array("weight_error", value, "a squared distance", 0)


@on_host
def expected_isotropic_loss(problem: MixedLinearRegression, weight_error, adapt: InnerRule):
    """Return `expected_test_loss` without covariances, on NumPy's or JAX's arrays."""
    xp = namespace(problem, weight_error, adapt)
    b, q, exists = rms_filters(adapt, problem.n_r, problem.p)
    error, b = outer(problem.nu**2 + weight_error, b)
    noise = problem.sigma * q * (problem.p / problem.n_r) ** 0.5
    floor = (problem.sigma**2 + noise * noise) / 2
    # One of the factors `error` and b^2 may be infinite where the other is zero.
    zero, infinite = (error == 0) | (b == 0), xp.isinf(error)
    excess = xp.where(zero | infinite, 1.0, error / 2) * b * b
    excess = xp.where(zero, 0.0, xp.where(infinite, xp.inf, excess))
    filters_matter = (problem.sigma > 0) | (error > 0)
    return xp.where(exists | ~filters_matter, floor + excess, xp.inf)


def scale_by_filter_sq(value, size):
    """Return value size^2, of shape value shape + size shape; zero where value is zero."""
    value, size = outer(value, size)
    return namespace(value, size).where(value == 0, 0.0, value * size * size)
