r"""Rates for a network, from its own tasks: a parabola for adapting, the theory for training.

**Adapting.** Linearized in the parameters that adapt, one gradient step of half the mean squared
error moves the output at a query point by -alpha u, with u = J g the derivative of the output along
the gradient g on n support points. With residuals r the query loss is a parabola,

    L(alpha, n) = E (r + alpha u)^2 / 2 = E r^2/2 - alpha slope + alpha^2/2 E u^2,          (1)
    E u^2 = curvature + excess/n,                                                           (2)

since g is a mean over points: pairs of different points give the first part, and a point with
itself the second. Both parts follow from the gradients g1, g2 on two halves of the support,

    curvature = E u1 u2,        excess = n (E ((u1 + u2)/2)^2 - E u1 u2),                   (3)

and the best rate for any number of points is slope / (curvature + excess/n). This assumes nothing
about features or tasks. For mixed linear regression it is the rate of `theory.best_adapt_rate`.

**Training.** Residuals are linear in the features of the tangent kernel, y - f_0(x) = psi(x).w
+ noise, with w of another value in each task. Means and variances of w and of the noise are those
of `random_coefficients`, the moments of psi those of `theory.feature_moments`, and the theory
predicts meta-training from f_0 on any number of tasks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.checks import check_array, check_callable, check_count
from negmaml._core.display import Table, add_fields_repr, add_table_repr
from negmaml._core.pytree import as_pytree
from negmaml._core.settings import own_settings
from negmaml._core.types import ArrayLike, PyTree
from negmaml.advice.features import kernel_features
from negmaml.advice.moments import random_coefficients
from negmaml.kernels import empirical_ntk
from negmaml.kernels.points import Points, stack
from negmaml.meta import Tasks
from negmaml.meta.batching import as_tasks
from negmaml.meta.partition import StaticTree, partition_floating
from negmaml.problem import MixedLinearRegression
from negmaml.rules import GradientDescent
from negmaml.theory import FeatureMoments, feature_moments

LANDMARKS = 600  # points whose kernel matrix gives the features
MAX_TASKS = 300  # whose moments are estimated; memory grows with tasks and features squared
TASKS_AT_ONCE = 16  # each with gradients of its own
# Training rates that are tried, in units of 1 over the largest eigenvalue.
POSITIVE = np.geomspace(0.02, 8, 25)
UNITS = np.concatenate([-POSITIVE[::-1], [0.0], POSITIVE])


@add_fields_repr
class BestRates(NamedTuple):
    """The best pair of rates, and the test loss predicted there, from `NetworkRates.best_rates`.

    Attributes:
        train: the best rate of meta-training.
        adapt: the best rate at test time after it.
        loss: half the mean squared error that is predicted with both.

    >>> import negmaml as nm
    >>> best = nm.advice.BestRates(train=-0.4, adapt=0.3, loss=0.2)
    >>> train, adapt = nm.GradientDescent(best.train), nm.GradientDescent(best.adapt)
    >>> train.rate, adapt.rate
    (-0.4, 0.3)
    """

    train: float
    adapt: float
    loss: float


@add_table_repr
@dataclass(frozen=True, repr=False)
class NetworkRates:
    """Predicted rates and losses of a network on its tasks, from `network_rates`.

    Rates are those of the loss "half the mean squared error"; divide by two for the mean squared
    error.

    Attributes:
        parabola: (4, tasks), the means over queries of r^2/2, -r u, u1 u2 and ((u1 + u2)/2)^2, the
            terms of equations (1) to (3) of `negmaml.advice.network`.
        support: number of support points of these tasks.
        moments: spectrum and fourth moments of the features, (p,).
        mean, variance: of the coefficients w of the tasks along the features, (p,).
        noise_variance: of the labels, with all that features cannot explain.
        trace_fraction: fraction of the tangent kernel's trace in the p features.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=4, m=300, n_t=10, n_v=10, n_r=5, sigma=0.5, nu=1.0)
    >>> tasks = nm.tasks.Linear(problem)(jax.random.key(0))
    >>> found = nm.advice.network_rates(lambda w, x: x @ w, jnp.zeros(4), tasks)
    >>> found.adapt_rate(np.array([1, 5, 20])).round(1).tolist()  # more rows, larger rates
    [0.2, 0.5, 0.8]
    """

    parabola: np.ndarray
    support: int
    moments: FeatureMoments
    mean: np.ndarray
    variance: np.ndarray
    noise_variance: float
    trace_fraction: float

    def adapt_rate(self, n_r: ArrayLike) -> Any:
        """Return the best rate of one step from the network as it is; n_r points, any shape."""
        terms = self.parabola.mean(1)
        return terms[1] / self._curvature(terms[:, None], n_r)[..., 0]

    def adapt_rate_error(self, n_r: ArrayLike) -> Any:
        """Return the standard error of `adapt_rate` over tasks, by the delta method."""
        terms = self.parabola.mean(1)
        curvature = self._curvature(self.parabola, n_r)
        rate = np.asarray(self.adapt_rate(n_r))[..., None]
        # A ratio of means varies as the mean of (slope - rate curvature) / curvature.
        influence = (self.parabola[1] - rate * curvature) / self._curvature(terms[:, None], n_r)
        return influence.std(-1, ddof=1) / influence.shape[-1] ** 0.5

    def adapt_loss(self, rate: ArrayLike, n_r: ArrayLike) -> Any:
        """Return the loss after one step from the network as it is; shapes are broadcast."""
        rate = np.asarray(check_array("rate", rate, "an adaptation rate"))
        terms = self.parabola.mean(1)
        return (
            terms[0] - rate * terms[1] + rate**2 / 2 * self._curvature(terms[:, None], n_r)[..., 0]
        )

    def _curvature(self, terms, n_r):
        """E u^2 of equation (2), the shape of n_r + (tasks,)."""
        n_r = np.asarray(check_array("n_r", n_r, "a number of points", 0, strict=True))
        pairs, square = terms[2:]
        return pairs + self.support * (square - pairs) / n_r[..., None]

    def problem(self, *, m: int, n_t: int, n_v: int, n_r: int) -> MixedLinearRegression:
        """Return the mixed linear regression in the features, for any function of `nm.theory`.

        Meta-training starts from the network: omega0 is zero.
        """
        with jax.enable_x64(True):
            return self.moments.problem(
                m=m, n_t=n_t, n_v=n_v, n_r=n_r, sigma=self.noise_variance**0.5, nu=1.0,
                w0=self.mean, weight_covariance=len(self.variance) * self.variance,
            )  # fmt: skip

    def losses(
        self, train_rates: ArrayLike, problem: MixedLinearRegression, *, meta_ridge: ArrayLike = 0.0
    ) -> Any:
        """Return (best adaptation rates, losses there) after training at each of `train_rates`.

        The network is meta-trained in its lazy regime, to the minimum of
        sum |y_v - f'_v|^2 + meta_ridge |params - start|^2, as by `kernels.meta_train`.
        """
        rates = np.asarray(check_array("train_rates", train_rates, "a training rate"))
        # The loss is a parabola in the adaptation rate, so three rates determine it.
        unit = 1 / float(self.moments.s[0])
        with jax.enable_x64(True):
            three = GradientDescent(jnp.array([-1.0, 0.0, 1.0]) * unit)
            train = GradientDescent(jnp.asarray(rates))
            found = self.moments.test_loss(problem, train, three, meta_ridge=meta_ridge)
        below, at, above = np.moveaxis(np.asarray(found), -1, 0)
        best = (below - above) / (2 * (above + below - 2 * at))
        return best * unit, at + (above - below) * best / 4

    def best_rates(
        self, *, m: int, n_t: int, n_v: int, n_r: int, meta_ridge: ArrayLike = 0.0
    ) -> BestRates:
        """Return the best rates of meta-training from the network on m tasks, and the loss.

        Training rates up to 8 over the largest eigenvalue of the features are tried, both signs; an
        end of this range means that the best one may lie beyond.
        """
        rates = UNITS / float(self.moments.s[0])
        problem = self.problem(m=m, n_t=n_t, n_v=n_v, n_r=n_r)
        adapt, losses = self.losses(rates, problem, meta_ridge=meta_ridge)
        # A rate whose equations were not solved is NaN.
        best = int(np.nanargmin(losses))
        return BestRates(float(rates[best]), float(adapt[best]), float(losses[best]))

    def _summary(self) -> Table:
        rows = []
        for n in (self.support // 2, self.support, 2 * self.support):
            rate, error = self.adapt_rate(n), self.adapt_rate_error(n)
            loss = f"loss {self.adapt_loss(0.0, n):.4g} to {self.adapt_loss(rate, n):.4g}"
            rows.append((f"best rate for {n} points", f"{rate:.4g} ± {error:.1g}", loss))
        trace = f"{len(self.mean)}, {self.trace_fraction:.2%} of the kernel's trace"
        rows.append(("features", trace, f"kurtosis {self.moments.kurtosis:.2f}"))
        return Table("Predicted rates of a network, one gradient step", rows)


@own_settings
def network_rates(
    apply: Callable[..., Any], params: PyTree, tasks: Tasks, *, features: int = 100
) -> NetworkRates:
    r"""Predict the best rates of a network on its own tasks, in training and at test time.

    One gradient step of half the mean squared error in `params`, linearized at `params`:

        L(alpha, n) = before - alpha slope + alpha^2/2 (curvature + excess/n)

    for the test, and the theory of mixed linear regression in the features of the tangent kernel
    for meta-training from `params`; `negmaml.advice.network` derives both.

    Arguments:
        apply: function of (params, x) with values (points,), each from its own point only.
        params: the parameters that adapt, any pytree. For the last layer only, let `apply` hold
            the others.
        tasks: `Tasks` of (x, y), y (tasks, points); a few hundred. Even and odd rows of a support
            are its halves in (3), so each half should have the same classes. The last row of an odd
            number is not used for the test.
        features: largest number of features of the tangent kernel for `best_rates`.

    Returns `NetworkRates`. For parameters in which the model is linear, such as a last layer, test
    losses are exact but for the sample of tasks. Otherwise they hold in the lazy regime.
    `best_rates` also assumes inputs of one distribution in all tasks, and training that stays lazy.
    `benchmarks/README.md` has measured errors of both.

    Raises TypeError or ValueError for shapes that disagree, several outputs, fewer than two tasks
    or support points, and parameters without floating point arrays. Source: negmaml.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=4, m=300, n_t=10, n_v=10, n_r=5, sigma=0.5, nu=1.0)
    >>> tasks = nm.tasks.Linear(problem)(jax.random.key(0))
    >>> found = network_rates(lambda w, x: x @ w, jnp.zeros(4), tasks)
    >>> exact = nm.theory.best_adapt_rate(problem, nm.GradientDescent(0.0), meta_ridge=1e9)
    >>> bool(abs(found.adapt_rate(5) - exact) < 3 * found.adapt_rate_error(5))
    True
    """
    check_callable("apply", apply, "of (params, x)")
    features = check_count("features", features)
    floats, static = partition_floating(params)  # raises where nothing can adapt
    apply, tasks = as_pytree(apply), as_tasks(tasks)
    points, has_outputs = stack(tasks, None)
    m, n_t, _ = points.sizes
    if has_outputs:
        raise ValueError(
            "labels of tasks must have shape (tasks, points), one output, got "
            f"{np.shape(tasks.support[1])}; predict each output separately"
        )
    if m < 2 or n_t < 2:
        raise ValueError(
            f"tasks must be at least 2 with at least 2 support points, got {m} with {n_t}"
        )
    points, _ = stack(tasks, partial(_values, apply, params))
    even = n_t - n_t % 2
    support = tasks.support[0][:, :even], points.y_t[:, :even, 0]
    query = tasks.query[0], points.y_v[..., 0]
    parabola = _parabola(apply, floats, StaticTree(static), support, query)
    x, residuals = _by_task(points)
    psi, fraction = _features(apply, params, x, features)
    gram = _gram(psi.reshape(*residuals.shape, -1), residuals)
    moments = random_coefficients(gram, np.full(len(gram), residuals.shape[1]))
    variance = np.diagonal(moments.covariance).copy()
    return NetworkRates(
        np.asarray(parabola, float), even, feature_moments(psi), moments.mean, variance,
        float(moments.noise_variance), fraction,
    )  # fmt: skip


def _values(apply, params, x):
    values = apply(params, x)
    if np.shape(values) != (len(x),):
        raise ValueError(
            f"apply must return one value for each point, shape ({len(x)},) for {len(x)} points, "
            f"got {np.shape(values)}"
        )
    return values


@jax.jit
def _parabola(apply, floats, static: StaticTree, support, query):
    """Return the terms of equations (1) to (3), (4, tasks)."""

    def of_task(task):
        (x, left), (x_q, r) = task

        def outputs(floats, x):
            return apply(static.combined(floats), x).reshape(len(x))

        def moved(half):
            """Derivative of the query outputs along the gradient on half of the support."""
            _, pull = jax.vjp(partial(outputs, x=x[half::2]), floats)
            (gradient,) = pull(-left[half::2] / len(left[half::2]))
            return jax.jvp(partial(outputs, x=x_q), (floats,), (gradient,))[1]

        # Labels less outputs are -r in (1), so the signs of the cross term agree.
        u1, u2 = moved(0), moved(1)
        u = (u1 + u2) / 2
        terms = r**2 / 2, -r * u, u1 * u2, u**2
        return jnp.stack([jnp.mean(term) for term in terms])

    return lax.map(of_task, (support, query), batch_size=TASKS_AT_ONCE).T


def _by_task(points: Points):
    """Return inputs and residuals of the first tasks, (tasks * points, ...) and (tasks, points)."""
    m, n_t, n_v = points.sizes
    parts = zip(np.split(np.asarray(points.x), [m * n_t]), (n_t, n_v), strict=True)
    x = np.concatenate([part.reshape(m, n, *part.shape[1:]) for part, n in parts], 1)[:MAX_TASKS]
    residuals = np.concatenate([points.y_t, points.y_v], 1)[:MAX_TASKS, :, 0]
    return x.reshape(-1, *x.shape[2:]), residuals.astype(float)


def _features(apply, params, x, most: int):
    """Return features of all points along their principal axes, and their fraction of the trace."""
    # Spread over all points, whose tasks may differ in their inputs.
    landmarks = x[np.linspace(0, len(x) - 1, min(len(x), LANDMARKS)).astype(int)]
    with jax.enable_x64(True):
        # Kernels in float64: their small eigenvalues would be rounding errors.
        doubled = jax.tree.map(_in_float64, params)
        found = kernel_features(empirical_ntk(apply, doubled), landmarks, None, most)
        psi = found(x)
    axes = np.linalg.eigh(psi.T @ psi)[1]
    return psi @ axes[:, ::-1], found.trace_fraction


def _in_float64(leaf):
    floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.asarray(leaf, jnp.float64) if floating else leaf


def _gram(psi, residuals):
    rows = np.concatenate([psi, residuals[..., None]], -1)
    return rows.swapaxes(1, 2) @ rows
