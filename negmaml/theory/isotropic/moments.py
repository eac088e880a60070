r"""The proportional theory: distance and task error for every n_v m / p, rule and meta-ridge.

With kappa, g, t, K of `negmaml.theory.isotropic.saddle_point`, u = sigma^2 + p int mu V kappa/(B +
kappa) and D2 = |omega_0 - w0|^2, and primes for derivatives in kappa,

    E|omega* - w0|^2 = { m (t u)' + D2 K^2 (g t' - g' t) } / (t K)'
    tau^2            = n_v/m { m (u K' - u' K) + D2 K^2 (g K)' } / (t K)'

to leading order for p, n_t and n_v m large at fixed ratios (`leading`), and the term of
relative order 1/p after it (`negmaml.theory.isotropic.hessian`). negmaml/theory/isotropic.md
derives both.

**Resummation.** That mean suggests how the series goes on: with x the 1/p term over the leading
one, 1/(1 - x) is exact there. A ridge takes the pole away, hence 1 + x/(1 - x s), where
s = ((t'K - tK')/(t'K + tK'))^2 is one without ridge and falls to zero where the ridge governs.
The pole belongs to the threshold p = n_v m, and so it is the same for the task error: limit + first
order/(1 - x s), with the x of the distance, and x s at most 1/|p - n_v m|. With a pole of its own a
filter that varies much within the spectrum, whose first order is large far from the threshold,
would have one there. Such filters get a factor of `negmaml.theory.isotropic.eigenvalue_scatter` as
well.
"""

from typing import Any, NamedTuple

from negmaml._core.arrays import namespace, stop_gradient
from negmaml.theory.isotropic.eigenvalue_scatter import log_growth
from negmaml.theory.isotropic.hessian import first_order
from negmaml.theory.isotropic.logarithms import squared_unit
from negmaml.theory.isotropic.saddle_point import TrainingSet
from negmaml.theory.isotropic.scaling import Point, Seen, Solved, solved

# The largest x s with ridge: beyond it the ridge alone keeps the mean finite, |n_v m - p| <= 2 and
# the ridge tiny, and no expansion in 1/p holds.
LARGEST_RIDGED_POLE = 0.5


class Moments(NamedTuple):
    """distance: E|omega* - w0|^2. task_error: tau^2. limit: the leading distance. pole: x s.

    growth: distance/limit.
    """

    distance: Any
    task_error: Any
    limit: Any
    pole: Any
    growth: Any


def moments(found: Solved, with_error: bool = True, bend=0.0) -> Moments:
    """The theory's means, with finite-size corrections; infinite where they do not exist.

    The task error is left out, None, unless wanted. bend: as in `eigenvalues.log_growth`.
    """
    tasks, root, seen, point = found
    limit, task_error, balance = leading(seen, point)
    distance_1, task_error_1 = first_order(seen, point, with_error)
    ridge = tasks.ridge > 0
    where, inf = namespace(limit).where, float("inf")
    noisy = (tasks.sigma > 0) | ((tasks.tasks > 0) & (tasks.m > 1))
    at_threshold = (abs(tasks.p - tasks.n_v * tasks.m) <= 1) & ~ridge & noisy
    growth, pole = _resummed(limit, distance_1, balance**2, ridge)
    growth = where(at_threshold, inf, growth)
    limit = squared_unit(limit, seen.log_amplitude)
    distance = _grown(limit, growth)
    if not with_error:
        return Moments(distance, None, limit, pole, growth)
    x, minimum = _ratio(task_error_1, task_error), namespace(limit).minimum
    nearest = 1 / namespace(limit).maximum(abs(tasks.p - tasks.n_v * tasks.m), 1.0)
    error_pole = where(x > 0, minimum(pole, nearest), x)
    error_growth = where(at_threshold, inf, _continued(x, error_pole))
    log_unit = seen.log_amplitude + root.log_kappa / 2
    log_unit = log_unit + log_growth(seen, point, task_error, bend) / 2
    task_error = _grown(squared_unit(task_error, log_unit), error_growth)
    return Moments(distance, task_error, limit, pole, growth)


def limit(tasks: TrainingSet, ridged: bool):
    """The distance of `leading` alone, with nothing of finite sizes."""
    _, _, seen, point = solved(tasks, ridged)
    return squared_unit(leading(seen, point)[0], seen.log_amplitude)


def leading(tasks: Seen, at: Point):
    """Distance and task error of the limit, and (t'K - tK')/(tK)'; equations at the head."""
    n_v, m, D2 = tasks.n_v, tasks.m, tasks.offset
    distance = m * (at.t1 * at.u + at.t * at.u1) + D2 * at.K**2 * (at.g * at.t1 + at.l * at.t)
    start = D2 * at.K**2 * at.w  # (g K)' = m w
    fitted = (m - 1) * at.w / at.g**2  # K' - K, so that u K' - u' K is without a difference
    task_error = n_v * (at.left * at.K1 + at.u1 * fitted + start)
    return (
        distance / at.slope,
        task_error / at.slope,
        (at.t1 * at.K - at.t * at.K1) / at.slope,
    )


def _resummed(leading, first, fade, ridged):
    """1 + x/(1 - x s) and x s, with x = first/leading and s = `fade`."""
    xp = namespace(leading)
    x = _ratio(first, leading)
    pole = xp.where(x > 0, x * fade, x)
    pole = xp.where(ridged, xp.minimum(pole, LARGEST_RIDGED_POLE), pole)
    return _continued(x, pole), pole


def _ratio(first, leading):
    """first/leading, zero where there is nothing."""
    xp = namespace(leading)
    # In units of the leading term: its square may be no number.
    none = leading == 0
    unit = stop_gradient(xp.where(none, 1.0, leading))
    return xp.where(none, 0.0, (first / unit) / xp.where(none, 1.0, leading / unit))


def _continued(x, pole):
    """1 + x/(1 - pole), infinite from the pole on."""
    xp = namespace(x)
    beyond = pole >= 1
    factor = 1 + x / (1 - xp.where(beyond, 0.0, pole))
    return xp.where(beyond, float("inf"), factor)


def _grown(value, growth):
    """value growth, zero where value is zero; where it is infinite it has no slope."""
    xp = namespace(value)
    endless = xp.isinf(growth)
    grown = value * xp.where(endless, 1.0, growth)
    return xp.where(endless & (value != 0), xp.inf, grown)
