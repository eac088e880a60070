"""The paper's protocol: test loss on fresh, simulated tasks.

Its mean is `negmaml.problem.expected_test_loss`, to which it adds the noise of a test set.
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
from negmaml.linear.data import CovarianceRoots, sample
from negmaml.linear.system import meta_system, precondition
from negmaml.problem.model import MixedLinearRegression, check_problem
from negmaml.rules import InnerRule, check_filters

TEST_TASKS = 100
GROUPS = 4  # of test tasks, one after another
TEST_POINTS = 50


def test_tasks(problem: MixedLinearRegression) -> MixedLinearRegression:
    """The problem whose training tasks are the test tasks, with test points for validation."""
    return dataclasses.replace(problem, m=TEST_TASKS, n_t=problem.n_r, n_v=TEST_POINTS)


@own_settings
def sampled_test_loss(
    key: PRNGKeyArray,
    problem: MixedLinearRegression,
    omega: Float[Array, "*batch p"],
    adapt: InnerRule,
    *,
    sqrt_cov: CovarianceRoots | None = None,
) -> Float[Array, "..."]:
    """Test loss of `omega` on 100 fresh tasks of n_r adaptation and 50 test points each.

    It is half the mean squared error on the test points after adapting. All weights and all rates
    use the same tasks.

    Arguments:
        omega: weights, shape (..., p).
        adapt: the rule used on each task.
        sqrt_cov: the problem's `linear.data.covariance_roots`, if they are already known.

    Returns an array of shape omega.shape[:-1] + rule shape. Source: Bernacchia 2021, section 5.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=6, m=3, n_t=4, n_v=2, n_r=5, sigma=1.0, nu=0.5)
    >>> key, rates = jax.random.key(0), nm.GradientDescent(jnp.array([0.0, 0.1]))
    >>> nm.linear.sampled_test_loss(key, problem, jnp.zeros(6), rates).shape
    (2,)
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
    data = sample(key, test_tasks(problem), sqrt_cov=sqrt_cov)
    filters = adapt.spectral()
    if filters.constant_filter is not None:
        # The residual e0 - alpha e1 is linear in the rate, so the loss is a quadratic in it.
        e0 = data.y_v - contract("...p,inp->...in", omega, data.X_v)
        start = data.y_t - contract("...p,inp->...in", omega, data.X_t)
        ahead = precondition(data.X_t, filters.preconditioner)
        descent = contract("...in,inp->...ip", start, ahead)
        e1 = contract("...ip,inp->...in", descent, data.X_v) / problem.n_r
        c0, c1, c2 = (jnp.mean(x, (-2, -1)) for x in (e0**2, e0 * e1, e1**2))
        rate = jnp.asarray(filters.constant_filter)
        c0, c1, c2 = (c.reshape(c.shape + (1,) * rate.ndim) for c in (c0, c1, c2))
        return (c0 - 2 * rate * c1 + rate**2 * c2) / 2
    batch = omega.shape[:-1]
    # All weights use the meta-system of the same test tasks.
    flat = omega.reshape(-1, omega.shape[-1])

    def group_losses(data):
        Phi, r = meta_system(data, adapt)
        errors = r - jnp.moveaxis(contract("...np,bp->...bn", Phi, flat), -2, 0)
        return jnp.mean(errors**2, -1)

    # A loop waits for the weights. Without it XLA on CPU runs the eigenvalue problems of training
    # and test at once, which can deadlock.
    groups = jax.tree.map(lambda x: x.reshape(GROUPS, -1, *x.shape[1:]), data)
    losses = jnp.mean(lax.map(group_losses, groups), 0)
    return losses.reshape(*batch, *losses.shape[1:]) / 2
