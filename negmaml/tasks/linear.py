"""Mixed linear regression as a distribution of tasks."""

from dataclasses import fields as fields_of
from typing import Any

import numpy as np

from negmaml._core.display import Table, add_table_repr, shape_text
from negmaml._core.keys import check_key
from negmaml._core.pytree import pytree
from negmaml._core.settings import own_settings
from negmaml._core.types import PRNGKeyArray
from negmaml.linear.data import sample
from negmaml.meta.batching import Tasks
from negmaml.problem import MixedLinearRegression


@add_table_repr
@pytree
class Linear:
    r"""Tasks of a `MixedLinearRegression`: m linear models with weights around w0.

        w ~ N(w0, nu^2/p I_p)      x ~ N(0, I_p)      y | x, w ~ N(x.w, sigma^2)

    A call with a key returns `Tasks` whose support is (X, y) of shapes (m, n_t, p) and (m, n_t),
    and whose query has n_v points. The draws are those of `negmaml.linear.data`.

    Arguments:
        problem: a `MixedLinearRegression`; with covariances, w and x have those.

    Source: Bernacchia 2021, section 3.

    >>> import jax, negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=6, m=3, n_t=4, n_v=2, n_r=5, sigma=1.0, nu=0.5)
    >>> tasks = nm.tasks.Linear(problem)(jax.random.key(0))
    >>> tasks.support[0].shape, tasks.query[1].shape
    ((3, 4, 6), (3, 2))
    """

    problem: Any

    def __post_init__(self) -> None:
        if not isinstance(self.problem, MixedLinearRegression):
            raise TypeError(f"problem must be a MixedLinearRegression, got {self.problem!r}")

    def _summary(self) -> Table:
        # Arrays are shown by their shapes, numbers by their values.
        fields = [(f.name, getattr(self.problem, f.name)) for f in fields_of(self.problem)]
        rows = [(name, str(v) if np.ndim(v) == 0 else shape_text(v)) for name, v in fields]
        return Table("Linear, a distribution of tasks", rows)

    @own_settings
    def __call__(self, key: PRNGKeyArray) -> Tasks:
        key = check_key("key", key)
        # The sampler of `nm.simulate`, so that MAML on a linear model can be compared to it.
        data = sample(key, self.problem)
        return Tasks(support=(data.X_t, data.y_t), query=(data.X_v, data.y_v))
