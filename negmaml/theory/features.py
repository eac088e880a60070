r"""Moments of features that the theory needs, from a sample of them or from their kernel.

In the limit inputs k(x) matter only through the spectrum of Sigma = E k k^T, provided that
quadratic forms k^T G k hardly vary (universality). Those of real features do vary, and two more
moments describe by how much. At test time one step depends on F = E (k^T Sigma k) k k^T (Theorem
3). In training, to first order in the excess over Gaussian features, the mean depends on C, the
covariance of k_j^2/s_j and k_l^2/s_l along the eigenvectors.

**Spectrum.** The eigenvalues l_i of the kernel matrix K/N of N points spread beyond those of Sigma,
s_k. For x > 0 the diagonal of x (K/N + x)^{-1} is 1/(1 + gamma_i), where gamma_i is the form of
point i in the resolvent of all others. With t = mean(gamma/(1 + gamma))/mean(gamma),

    N x mean(gamma) = sum_k s_k / (1 + s_k t/x),

up to fluctuations of relative order 1/N. This is Silverstein's equation (1995) where gamma is the
same for all points, and it is also exact where points differ only by a random length. The right
side is linear in the numbers of s_k at each value, so these numbers are a nonnegative least-squares
fit on a grid of values (in the manner of El Karoui 2008, here on the real axis, where both sides
are smooth). The theory needs sums of the same kind, so it cannot resolve more than the fit does.
The trace is kept exactly.

**Fourth moment at test time.** tr F = E_ij K_ii K_ij^2 over pairs of different points. Along each
eigenvector where there are more points than dimensions; else in the proportions of Gaussian
features of a random length, F = r (Sigma tr Sigma^2 + 2 Sigma^3). That r, the `kurtosis`, is 1 for
Gaussian features.

**Fourth moments in training.** C as a function of s and s', since the theory depends on no more of
it. Its means over pairs of a few bins of s are estimated, with equal shares of the sum of
s/(s + s_0), s_0 a tenth of the mean, and linear interpolation in log s. Eigenvectors are those of
one half of the points and covariances those of the other half, and vice versa. The value of
Gaussian features along the same axes is subtracted.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from negmaml._core.checks import check_count, check_finite, short_repr
from negmaml._core.deprecation import renamed_attribute
from negmaml._core.display import add_fields_repr
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, ArrayLike, Float, ScalarLike
from negmaml.problem.adapted_loss import Adapted
from negmaml.problem.model import MixedLinearRegression
from negmaml.rules import InnerRule, check_rule
from negmaml.theory.anisotropic import inputs as anisotropic
from negmaml.theory.anisotropic.equations import FourthMoments

VALUES, EQUATIONS = 160, 240  # sizes of the grid of s and of the grid of x
SPAN = 1e-9  # smallest value of s over the largest
BINS = 8  # of s, for the fourth moments in training
MIN_POINTS = 20  # with fewer, fourth moments in training are set to zero
# s_0 over the mean of s: eigenvalues of this size count half in the bins' weights.
HALF_WEIGHT = 0.1


@add_fields_repr
class FeatureMoments(NamedTuple):
    """The moments of features that the theory needs, as arrays (p,) with eigenvalues descending.

    Attributes:
        s: eigenvalues of E k k^T.
        fourth: those of F along the same directions.
        kurtosis: tr F over its value for Gaussian features, tr Sigma tr Sigma^2 + 2 tr Sigma^3, all
            three without bias from the number of points.
        fourth_moments: how squared lengths along these directions vary together beyond those of
            Gaussian features, as `equations.FourthMoments`; for Gaussian features of random length
            the relative variance of its square at every s.

    >>> import negmaml as nm
    >>> features = np.random.default_rng(0).standard_normal((100, 200))
    >>> found = nm.theory.feature_moments(features)
    >>> problem = found.problem(m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
    >>> problem.p, problem.input_covariance.shape, round(float(found.s.mean()), 1)
    (200, (200,), 1.0)
    """

    s: Float[Array, " p"]
    fourth: Float[Array, " p"]
    kurtosis: float
    fourth_moments: FourthMoments

    @own_settings
    def problem(self, **options: Any) -> MixedLinearRegression:
        """Return mixed linear regression in these features; options as there, without p."""
        return MixedLinearRegression(p=len(self.s), input_covariance=self.s, **options)

    @own_settings
    def adapted(self, problem: MixedLinearRegression, adapt: InnerRule) -> Adapted:
        """Return `problem.adapted` for one gradient step, with the features' fourth moment."""
        if check_rule("adapt", adapt).spectral().gradient_rate is None:
            raise ValueError(f"adapt must be one gradient step, got {adapt!r}")
        rate, n_r = jnp.asarray(adapt.spectral().constant_filter), problem.n_r
        weights = jnp.concatenate([self.s ** jnp.arange(1, 4)[:, None], self.fourth[None]])
        ones = jnp.ones_like(rate)
        terms = ones, -2 * rate, rate**2 * (1 - 1 / n_r), rate**2 / n_r
        coefficients, noise = jnp.stack(terms, -1), rate**2 * jnp.sum(self.s**2) / n_r
        tasks = coefficients @ (weights @ problem.modes.o)
        return Adapted(problem.sigma**2 / 2 * (1 + noise) + tasks / 2, weights, coefficients, None)

    @own_settings
    def test_loss(
        self,
        problem: MixedLinearRegression,
        train: InnerRule,
        adapt: InnerRule,
        *,
        meta_ridge: ScalarLike = 0.0,
    ) -> Float[Array, "..."]:
        """Return `theory.test_loss` with the features' fourth moments in training and at test time.

        Arguments:
            problem: as from `problem`: its input covariance is `s`.
            adapt: one gradient step, a rate of any shape.
        """
        if np.shape(problem.input_covariance) != self.s.shape:
            raise ValueError(
                "problem must have the spectrum s as its input_covariance; use .problem"
            )
        after = self.adapted(problem, adapt)
        found = anisotropic.predict(
            problem, train, meta_ridge, after.weights, fourth_moments=self.fourth_moments
        )
        return after.test_loss(found.forms)


FeatureMoments.together = renamed_attribute(  # type: ignore[attr-defined]
    "FeatureMoments.together", "fourth_moments"
)


@own_settings
def feature_moments(
    features: Float[ArrayLike, "points p"] | None = None,
    *,
    kernel: Float[ArrayLike, "points points"] | None = None,
    p: int | None = None,
) -> FeatureMoments:
    r"""Estimate the spectrum of features and their fourth moments from a finite sample.

    Arguments:
        features: a sample of independent feature vectors k(x), shape (N, p). For a network in its
            lazy regime the gradient of its output in its parameters.
        kernel: or their kernel matrix k(x_i).k(x_j), shape (N, N), with `p`, their dimension, where
            p is too large for features to be formed.

    Features are not centred: Sigma = E k k^T. Work grows as p N min(p, N).
    Runs on the host in float64. Raises ValueError for other shapes, fewer than two points, features
    that are all zero, and NaN or infinity. Source: negmaml; see the head of this module.

    >>> rng = np.random.default_rng(0)
    >>> found = feature_moments(rng.standard_normal((100, 200)))
    >>> bool(abs(found.s - 1).max() < 0.6), abs(found.kurtosis - 1) < 0.1
    (True, True)
    """
    X, K, p = _checked(features, kernel, p)
    N = len(K) if X is None else len(X)
    # The smaller of the two Gram matrices has all nonzero eigenvalues.
    small = X is not None and p < N
    if not small:
        K = X @ X.T if X is not None else K
    gram = X.T @ X if small else K
    eigenvalues, V = np.linalg.eigh(gram / N)
    values = np.maximum(eigenvalues[::-1], 0)
    P = (X @ V[:, ::-1]) ** 2 / N if small else V[:, ::-1] ** 2 * values
    grid, counts = _population(values, P, N, p)
    s = _expand(grid, counts, p, values.sum())

    # With K_ii and (K^2)_ii of the kernel matrix: sums over different points, without bias.
    if small:
        lengths, squares = np.sum(X**2, 1), np.sum((X @ gram) * X, 1)
    else:
        lengths, squares = np.diagonal(K), np.sum(K**2, 1)
    # Without the point itself: its own square is no estimate of Sigma.
    projected = (squares - lengths**2) / (N - 1)  # k^T Sigma k of each point
    triples = N**3 * np.sum(eigenvalues**3) - 3 * lengths @ squares + 2 * np.sum(lengths**3)
    cubes = triples / (N * (N - 1) * max(N - 2, 1))
    total = np.mean(lengths * projected)
    kurtosis = total / (lengths.mean() * projected.mean() + 2 * cubes)

    gaussian = s * np.sum(s**2) + 2 * s**3
    if small:
        along = np.mean(projected[:, None] * (X @ V[:, ::-1]) ** 2, 0)
        plain = values * np.sum(s**2) + 2 * values**3
        gaussian = gaussian * np.divide(along, plain, out=np.ones(p), where=plain > 0)
    fourth = gaussian * (total / gaussian.sum())
    fourth_moments = _fourth_moments(s, X, K)
    return FeatureMoments(jnp.asarray(s), jnp.asarray(fourth), float(kurtosis), fourth_moments)


def _checked(features, kernel, p):
    if (features is None) == (kernel is None):
        what = "neither" if features is None else "both"
        raise ValueError(
            f"give either features, of shape (N, p), or a kernel matrix with p; got {what}"
        )
    name, given = ("features", features) if kernel is None else ("kernel", kernel)
    check_finite(name, given, "a sample of features")
    array = np.asarray(given, float)
    if array.ndim != 2 or len(array) < 2:
        raise ValueError(f"{name} must have shape (N, p) with N >= 2 points, got {array.shape}")
    if kernel is None:
        X, K, p = array, None, array.shape[1]
    else:
        if array.shape[0] != array.shape[1] or not np.allclose(array, array.T):
            raise ValueError(f"kernel must be a symmetric matrix (N, N), got shape {array.shape}")
        if p is None:
            raise ValueError(
                "p, the dimension of the features, must be given with a kernel matrix, got None"
            )
        X, K, p = None, array, check_count("p", p)
    if not array.any():
        raise ValueError(f"{name} must not be all zero, got {short_repr(array)}")
    return X, K, p


def _population(values, P, N: int, p: int):
    """Return (values of s, their real-valued multiplicities) from sample eigenvalues.

    P: the share of each point in each eigenvalue, (N, .), with `values` as its sum over points.
    """
    from scipy.optimize import nnls

    top, mean = values[0], values.sum() / p
    # From far below the scale that N points resolve to far above the largest eigenvalue.
    x = np.geomspace(min(mean, values.sum() / N) * 1e-3, top * 1e2, EQUATIONS)
    weights = 1 / (1 - P @ (1 / (values[:, None] + x))) - 1  # gamma of every point at every x
    right = N * x * weights.mean(0)
    m = np.mean(weights / (1 + weights), 0) / weights.mean(0) / x
    s = np.geomspace(top * SPAN, top * 1.2, VALUES)
    matrix = s / (1 + np.multiply.outer(m, s))
    rows = [matrix / right[:, None], 30 * s[None] / values.sum(), np.full((1, VALUES), 30 / p)]
    slack = np.zeros((EQUATIONS + 2, 1))  # the number of directions without variance
    slack[-1] = 30 / p
    system = np.hstack([np.concatenate(rows), slack])
    counts, _ = nnls(system, np.concatenate([np.ones(EQUATIONS), [30.0, 30.0]]))
    return s, counts[:-1]


def _fourth_moments(s, X, K) -> FourthMoments:
    """Return C of the head of this module on the eigenvalues s."""
    N, mean = len(K) if X is None else len(X), s.mean()
    if N < MIN_POINTS:
        return FourthMoments(jnp.zeros((1, s.size)), jnp.zeros((1, 1)))
    one, two = slice(None, N // 2), slice(N // 2, None)
    parts = [_projected(X, K, *x) for x in ((one, two), (two, one))]
    along = np.sort(np.concatenate([np.mean(Z**2, 0) for Z in parts]))
    along = along[along > s[0] * SPAN]
    share = np.cumsum(along / (along + HALF_WEIGHT * mean))
    middles = (np.arange(BINS) + 0.5) / BINS * share[-1]
    centers = np.interp(middles, share, np.log(along))
    covariance = sum(_covariance(centers, mean, Z) for Z in parts) / 2
    return FourthMoments(jnp.asarray(_near(centers, s).T), jnp.asarray(covariance))


def _near(centers, s):
    """Return the weight of each s in the bins about `centers`, linear in log s, (p, BINS)."""
    logs = np.log(np.maximum(s, np.finfo(float).tiny))
    return np.stack([np.interp(logs, centers, row) for row in np.eye(len(centers))], -1)


def _projected(X, K, own, other):
    """Return components of the points `other` along the eigenvectors of the points `own`."""
    if X is not None:
        points = X[own]
        if X.shape[1] < len(points):
            return X[other] @ np.linalg.eigh(points.T @ points)[1]
        gram, cross = points @ points.T, X[other] @ points.T
    else:
        gram, cross = K[own, own], K[other, own]
    values, V = np.linalg.eigh(gram)
    kept = values > values[-1] * SPAN
    return cross @ (V[:, kept] / np.sqrt(values[kept]))


def _covariance(centers, mean, Z):
    """Return means of C over pairs of bins, (BINS, BINS), for components Z of points."""
    s = np.mean(Z**2, 0)
    Z, s = Z[:, s > 0] / np.sqrt(s[s > 0]), s[s > 0]
    A = _near(centers, s) * (s / (s + HALF_WEIGHT * mean))[:, None]
    A = A / np.maximum(A.sum(0), np.finfo(float).tiny)
    # The axes are not exactly eigenvectors, so Gaussian features have squared correlations to
    # subtract. Lengths measured on the same N points make these smaller by N/(N + 2).
    squares = ((Z.T @ Z / len(Z)) ** 2 - 1 / len(Z)) * (len(Z) / (len(Z) + 2))
    lengths = (Z**2 - 1) @ A
    return lengths.T @ lengths / len(Z) - 2 * A.T @ squares @ A


def _expand(values, counts, p: int, trace):
    """Return p eigenvalues, descending: means over each unit of `counts`, with the given trace."""
    order = np.argsort(values)[::-1]
    values, counts = values[order], counts[order]
    reach = np.concatenate([[0.0], np.cumsum(counts)])
    mass = np.concatenate([[0.0], np.cumsum(counts * values)])
    edges = np.arange(p + 1) * max(1.0, reach[-1] / p)  # rounding may leave slightly more than p
    s = np.diff(np.interp(edges, reach, mass))
    return np.sort(s)[::-1] * (trace / s.sum())
