"""The paper's protocol: test loss on fresh, simulated tasks.

Its mean is `negmaml.problem.expected_test_loss`; what it adds is the noise of a test set.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.arrays import contract
from negmaml._core.checks import check_array
from negmaml._core.keys import check_key
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, Float, PRNGKeyArray
from negmaml.linear.data import Roots, sample
from negmaml.linear.system import in_metric, meta_system
from negmaml.problem.model import MixedLinearRegression, check_problem
from negmaml.rules import InnerRule, check_filters

TEST_TASKS = 100
GROUPS = 4  # of test tasks, one after another
TEST_POINTS = 50


def test_tasks(problem: MixedLinearRegression) -> MixedLinearRegression:
    """The problem with test tasks for tasks of training, and test points for validation."""
    return dataclasses.replace(problem, m=TEST_TASKS, n_t=problem.n_r, n_v=TEST_POINTS)


@own_settings
def sampled_test_loss(
    key: PRNGKeyArray,
    problem: MixedLinearRegression,
    omega: Float[Array, "*batch p"],
    adapt: InnerRule,
    *,
    colours: Roots | None = None,
) -> Float[Array, "..."]:
    """Test loss of `omega` on 100 fresh tasks of n_r adaptation and 50 test points each.

    Half the mean squared error on the test points after adapting. All weights and all rates see
    the same tasks.

    Arguments:
        omega: weights, shape (..., p).
        adapt: the rule used on each task.
        colours: the problem's `linear.data.roots`, where a caller has them.

    Returns an array of shape omega.shape[:-1] + rule shape. Source: Bernacchia 2021, section 5.
    """
    key = check_key("key", key)
    check_problem(problem)
    adapt = check_filters("adapt", adapt)
    omega = check_array("omega", omega, "weights")
    if np.shape(omega)[-1:] != (problem.p,):
        raise ValueError(
            f"omega must have shape (..., {problem.p}), as many weights as the problem has "
            f"dimensions, got {np.shape(omega)}"
        )
    data = sample(key, test_tasks(problem), colours=colours)
    filters = adapt.spectral()
    if filters.constant_filter is not None:
        # The residual e0 - alpha e1 is linear in the rate, so the loss is a quadratic in it.
        e0 = data.y_v - contract("...p,inp->...in", omega, data.X_v)
        start = data.y_t - contract("...p,inp->...in", omega, data.X_t)
        ahead = in_metric(data.X_t, filters.preconditioner)
        descent = contract("...in,inp->...ip", start, ahead)
        e1 = contract("...ip,inp->...in", descent, data.X_v) / problem.n_r
        c0, c1, c2 = (jnp.mean(x, (-2, -1)) for x in (e0**2, e0 * e1, e1**2))
        rate = jnp.asarray(filters.constant_filter)
        c0, c1, c2 = (c.reshape(c.shape + (1,) * rate.ndim) for c in (c0, c1, c2))
        return (c0 - 2 * rate * c1 + rate**2 * c2) / 2
    batch = omega.shape[:-1]
    flat = omega.reshape(-1, omega.shape[-1])

    def of_some(data):
        Phi, r = meta_system(data, adapt)
        errors = r - jnp.moveaxis(contract("...np,bp->...bn", Phi, flat), -2, 0)
        return jnp.mean(errors**2, -1)

    # A loop, which starts when the weights are there: XLA on CPU runs what does not wait for each
    # other side by side, and the eigenvalue problems of training and test at once can deadlock.
    groups = jax.tree.map(lambda x: x.reshape(GROUPS, -1, *x.shape[1:]), data)
    losses = jnp.mean(lax.map(of_some, groups), 0)
    return losses.reshape(*batch, *losses.shape[1:]) / 2
