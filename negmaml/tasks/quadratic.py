"""Quadratic regression, a task that is nonlinear in its parameters."""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.checks import check_count, check_nonnegative
from negmaml._core.keys import check_key
from negmaml._core.pytree import pytree, static
from negmaml._core.settings import own_settings
from negmaml._core.types import PRNGKeyArray
from negmaml.meta.batching import Tasks


@pytree
class Quadratic:
    r"""Regression of y | x ~ N((w.x + b)^2, sigma^2), a task for each w and b.

        w ~ N(0, nu^2/p I_p)     b ~ N(0, nu^2)     x ~ N(0, I_p)

    A call with a key returns `Tasks` of `m` tasks: support (X, y) of shapes (m, n_t, p) and
    (m, n_t), query with n_v points.

    Arguments:
        p: dimension of inputs and weights.
        m, n_t, n_v: number of tasks, of support rows and of query rows in a draw.
        sigma: standard deviation of the label noise, at least 0.
        nu: standard deviation of the bias, and root mean square of the norm of the weights.

    Raises TypeError or ValueError for a size below 1, and for
    sigma or nu that are negative or not finite.

    >>> import negmaml as nm
    >>> draw = nm.tasks.Quadratic(p=6, m=3, n_t=4, n_v=2, sigma=0.1, nu=1.0)
    >>> tasks = draw(jax.random.key(0))
    >>> tasks.support[0].shape, tasks.query[1].shape
    ((3, 4, 6), (3, 2))
    """

    p: int = static()
    m: int = static()
    n_t: int = static()
    n_v: int = static()
    sigma: Any
    nu: Any

    def __post_init__(self) -> None:
        for name in ("p", "m", "n_t", "n_v"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
        for name in ("sigma", "nu"):
            check_nonnegative(name, getattr(self, name), "a standard deviation")

    @own_settings
    def __call__(self, key: PRNGKeyArray) -> Tasks:
        key = check_key("key", key)
        p, m, n = self.p, self.m, self.n_t + self.n_v
        shapes = ((m, p), (m, 1), (m, n, p), (m, n))
        # One draw is cut into four arrays, which takes fewer operations than four draws.
        ends = np.cumsum([prod(shape) for shape in shapes])
        normals = jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1])
        w, b, x, noise = (z.reshape(s) for z, s in zip(normals, shapes, strict=True))
        inner = jnp.einsum("mnp,mp->mn", x, w, precision="highest") / p**0.5
        # nu is a factor of both w and b, so its square is one of (w.x + b)^2.
        y = self.nu**2 * (inner + b) ** 2 + self.sigma * noise
        # Points are independent, so the first n_t are a random support.
        cut = self.n_t
        return Tasks((x[:, :cut], y[:, :cut]), (x[:, cut:], y[:, cut:]))
