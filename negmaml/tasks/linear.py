"""Mixed linear regression as a distribution of tasks."""

from typing import Any

from negmaml._core.pytree import pytree
from negmaml.linear.data import sample
from negmaml.meta.batching import Tasks


@pytree
class Linear:
    r"""Tasks of a `MixedLinearRegression`: m linear models with weights around w0.

        w ~ N(w0, nu^2/p I_p)      x ~ N(0, I_p)      y | x, w ~ N(x.w, sigma^2)

    Called with a key it gives `Tasks` whose support is (X, y) of shapes (m, n_t, p) and (m, n_t),
    and whose query has n_v points; the draws are those of `negmaml.linear.data`. Source:
    Bernacchia 2021, section 3.
    """

    problem: Any

    def __call__(self, key) -> Tasks:
        data = sample(key, self.problem)
        return Tasks(support=(data.X_t, data.y_t), query=(data.X_v, data.y_v))
