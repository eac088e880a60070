"""The problem: the distribution of tasks, and the amount of data of each.

Mixed linear regression (Bernacchia 2021, section 3): every task is a weight vector, every
data point a noisy reading of it,

    w ~ N(w0, nu^2/p Omega)      x ~ N(0, Sigma)      y | x, w ~ N(x.w, sigma^2)

with Sigma = Omega = I in the paper, and any covariance here.
"""

from numbers import Real
from typing import Any

import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import namespace, working_dtype
from negmaml._core.checks import (
    as_array,
    check_array,
    check_count,
    check_nonnegative,
    short_repr,
)
from negmaml._core.jit import is_concrete
from negmaml._core.pytree import pytree, static
from negmaml._core.types import Array, Float
from negmaml.problem.covariance import Modes, check_covariance, modes

# Points of the outer loss: fresh ones of each task, or those that the task adapts on.
SPLITS = ("train-validation", "train-train")


@pytree
class MixedLinearRegression:
    """Mixed linear regression: sizes are static, variances, offsets and covariances are traced.

    Meta-training sees `m` tasks with `n_t` training and `n_v` validation points each; a test
    task offers `n_r` points to adapt on. Dimensions, weights and noise:

        w ~ N(w0, nu^2/p Omega)      x ~ N(0, Sigma)      y | x, w ~ N(x.w, sigma^2)

    Arguments:
        p: dimension of inputs and weights, an integer of at least 1, like all sizes.
        m: number of tasks in meta-training.
        n_t: training (support) points of each task of meta-training.
        n_v: validation (query) points of each task of meta-training.
        n_r: adaptation points of a test task.
        sigma: standard deviation of the label noise, at least 0.
        nu: root mean square of the distance |w - w0|, for Omega of mean eigenvalue one.
        w0: mean of the task weights, shape () or (p,); a scalar stands for every coordinate.
        omega0: the point meta-training starts from, shape () or (p,). It matters when the
            meta-system has fewer than p rows.
        input_covariance: Sigma. None for the identity, eigenvalues of shape (p,) for a diagonal
            matrix, or a matrix of shape (p, p); zero eigenvalues are allowed.
        weight_covariance: Omega, in the same forms. nu = 1 and p times a covariance give that one.

    Raises:
        TypeError: a size that is not an integer, a variance or offset that is not a real number.
        ValueError: a size below 1; sigma or nu negative or not scalar; w0 or omega0 of another
            shape; a covariance of another shape, not symmetric or with a negative eigenvalue; NaN
            or infinity anywhere.

    Source: Bernacchia, "Meta-learning with negative learning rates", ICLR 2021, section 3.

    >>> problem = MixedLinearRegression(p=60, m=3, n_t=30, n_v=2, n_r=20, sigma=1.0, nu=0.5)
    >>> problem.rows, problem.overparameterized
    (6, True)
    """

    p: int = static()
    m: int = static()
    n_t: int = static()
    n_v: int = static()
    n_r: int = static()
    sigma: Any
    nu: Any
    w0: Any = 0.0
    omega0: Any = 0.0
    input_covariance: Any = None
    weight_covariance: Any = None

    def __post_init__(self) -> None:
        # Checked values replace those given, in an instance that is frozen otherwise.
        for name in ("p", "m", "n_t", "n_v", "n_r"):
            size = check_count(name, getattr(self, name))
            object.__setattr__(self, name, size)
        for name in ("sigma", "nu"):
            deviation = check_nonnegative(name, getattr(self, name), "a standard deviation")
            object.__setattr__(self, name, deviation)
        for name in ("w0", "omega0"):
            object.__setattr__(self, name, _check_vector(name, getattr(self, name), self.p))
        for name in ("input_covariance", "weight_covariance"):
            object.__setattr__(self, name, check_covariance(name, getattr(self, name), self.p))

    @property
    def rows(self) -> int:
        """Rows of the meta-system, N = n_v m: p > N is overparameterized, p < N under."""
        return self.n_v * self.m

    @property
    def overparameterized(self) -> bool:
        """True if the minimiser of the meta-loss is not unique: p > n_v m."""
        return self.p > self.rows

    @property
    def isotropic(self) -> bool:
        """True if both covariances are the identity, given as None."""
        return self.input_covariance is None and self.weight_covariance is None

    @property
    def modes(self) -> Modes:
        """The problem along the eigenvectors of its input covariance: `s`, `o`, `d` of `Modes`.

        Derivatives in a matrix Sigma with coinciding eigenvalues are NaN, as those of its
        eigenvectors are; its eigenvalues, shape (p,), have all derivatives.
        """
        # Known offsets stay on the host, where there is nothing to compile.
        xp = np if is_concrete((self.omega0, self.w0)) else jnp
        offset = xp.asarray(self.omega0) - xp.asarray(self.w0)
        return modes(self.p, self.input_covariance, self.weight_covariance, self.nu, offset)

    @property
    def offset_squared(self) -> Float[Array, ""] | float:
        """|omega0 - w0|^2, the squared distance meta-training starts from."""
        known = [x for x in (self.omega0, self.w0) if not isinstance(x, Real)]
        xp = namespace(known)
        # Python's numbers do not decide the dtype, and neither does their square.
        omega0, w0 = self.omega0, self.w0
        if known:
            dtype = working_dtype(omega0, w0)
            omega0, w0 = xp.asarray(omega0, dtype), xp.asarray(w0, dtype)
        squares = (omega0 - w0) ** 2
        return xp.sum(squares) if np.ndim(squares) else self.p * squares


def _check_vector(name: str, value, p: int) -> Any:
    value = as_array(name, value)
    if np.shape(value) not in ((), (p,)):
        raise ValueError(
            f"{name} must be a scalar (every coordinate) or have shape ({p},), "
            f"got shape {np.shape(value)}"
        )
    return check_array(name, value, "a point in weight space")


def check_problem(problem) -> None:
    """Raise a TypeError unless `problem` is a `MixedLinearRegression`."""
    if not isinstance(problem, MixedLinearRegression):
        raise TypeError(
            f"problem must be a MixedLinearRegression, got {short_repr(problem)}; write "
            "negmaml.MixedLinearRegression(p=..., m=..., n_t=..., n_v=..., n_r=..., sigma=..., "
            "nu=...)"
        )
