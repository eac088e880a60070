"""Predictions of the test loss and its parts, by the proportional theory or by expansion."""

import jax
import numpy as np

from negmaml._core.convergence import warn_unless
from negmaml._core.jit import is_concrete
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, Float, ScalarLike
from negmaml.problem.model import MixedLinearRegression
from negmaml.rules import InnerRule
from negmaml.theory.isotropic.inputs import check_arguments
from negmaml.theory.model import mean_model, theory_model
from negmaml.theory.options import named_options

UNSOLVED = (
    "the equations of the theory were not solved for some training rule, and its mean is NaN: the "
    "rule's filter varies too much over the spectrum; take a smaller rate or time, or fewer steps"
)


@named_options
@own_settings
def test_loss(
    problem: MixedLinearRegression,
    train: InnerRule,
    adapt: InnerRule,
    *,
    method: str = "proportional",
    meta_ridge: ScalarLike = 0.0,
    measure: str = "auto",
    split: str = "train-validation",
) -> Float[Array, "..."]:
    r"""Predict the test loss of a model meta-trained with `train` and adapted with `adapt`.

        L = sigma^2/2 + h/2 (nu^2 + E|omega* - w0|^2) + sigma^2/(2 n_r) E tr q(S)^2 S

    Arguments:
        train: inner rule of meta-training, a parameter of any shape and sign.
        adapt: inner rule at test time, likewise; its effect is exact (`expected_test_loss`).
        method: "proportional" (default), for every p / (n_v m), rule and ridge; or "expansion",
            Theorem 1 or 2 for one gradient step without ridge.
        meta_ridge: lambda >= 0 of (Phi^T Phi + lambda I), Phi stacked over tasks.
        measure: spectrum of a task: "exact" (Gauss rule of the exact moments),
            "marchenko-pastur" (with its 1/p term), or "auto", the first for the smallest sizes
            (up to min(n_t, p) = 16 for filters without a pole, 3 for others), else the second.
        split: "train-validation", or "train-train": the outer loss on the training points
            themselves (n_v is then unused), for rules with a pencil.

    Returns an array of shape train shape + adapt shape, like `negmaml.simulate` without its runs.
    It is infinite where the mean does not exist: as in `weight_error`, after a flow at test time
    uphill for n_r/4 or longer, and after a proximal rule with -strength among the eigenvalues of S.
    Raises ValueError for an unknown `method`, `measure` or `split`, a bad ridge, and as the
    expansions do. Source: negmaml, derived in negmaml/theory/isotropic.md and anisotropic.md.

    >>> from negmaml import GradientDescent
    >>> problem = MixedLinearRegression(p=60, m=3, n_t=20, n_v=10, n_r=20, sigma=0.5, nu=1.0)
    >>> round(float(test_loss(problem, GradientDescent(0.2), GradientDescent(0.2))), 3)
    0.994
    """
    meta_ridge, train, adapt = check_arguments(problem, meta_ridge, train=train, adapt=adapt)
    model = mean_model(problem, meta_ridge, method, measure, split)
    return warn_if_unsolved(model.test_loss(train, adapt))


@named_options
@own_settings
def weight_error(
    problem: MixedLinearRegression,
    train: InnerRule,
    *,
    method: str = "proportional",
    meta_ridge: ScalarLike = 0.0,
    measure: str = "auto",
    split: str = "train-validation",
) -> Float[Array, "..."]:
    r"""Predict E|omega* - w0|^2 over training sets, of the rule's shape.

    Arguments as in `test_loss`. Differentiable, twice too, in the rule's parameter, sigma, nu, w0,
    omega0 and meta_ridge.

    Without ridge the mean is infinite where |n_v m - p| <= 1 (and just beyond, where the
    correction's own pole lies), and for a single task with n_v >= p whose filter has a zero within
    the spectrum: infinity is returned. Filters of steep rules enter by their logarithms, and a mean
    too large for a number is infinite; the slope of an infinite mean is zero. NaN, with a
    `ConvergenceWarning` outside jit, marks a rule whose equations were not solved.
    `Proximal(0.0)` without ridge may be discontinuous: at weight 0 nothing is trained, at any other
    weight it is; the slope there is that of the labels only. The equation is at the head of
    `negmaml.theory.isotropic.moments`; `train_task_error` returns the other mean of the theory.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=60, m=3, n_t=20, n_v=10, n_r=20, sigma=0.5, nu=1.0)
    >>> error = nm.theory.weight_error(problem, nm.GradientDescent([-0.2, 0.0, 0.2]))
    >>> [f"{x:.3f}" for x in error]
    ['1.037', '1.103', '1.242']
    """
    meta_ridge, train = check_arguments(problem, meta_ridge, train=train)
    model = mean_model(problem, meta_ridge, method, measure, split)
    return warn_if_unsolved(model.weight_error(train))


@named_options
@own_settings
def train_task_error(
    problem: MixedLinearRegression,
    train: InnerRule,
    *,
    meta_ridge: ScalarLike = 0.0,
    measure: str = "auto",
) -> Float[Array, "..."]:
    r"""Predict tau^2, the mean squared error on fresh query rows of a training task.

        tau^2 = sigma^2 + E| adapted weights of a training task - its true weights |^2

    Arguments as in `test_loss`, of the rule's shape; measure "auto" is "marchenko-pastur" here.
    tau^2 is twice the meta-loss on more query points of the same tasks with the same training
    points. Its gap to twice the test loss at the same rule measures how far meta-training has
    fitted its tasks. It is infinite where the test loss is.

    Where b(x)^2 varies by powers of ten within the spectrum, the mean depends on few eigenvalues
    and runs scatter by more than the mean. `negmaml.theory.isotropic.eigenvalue_scatter` adds their
    scatter. The result was within 10% of simulations for 3 <= n_v <= n_t, up to 25% too low for n_t
    < n_v, and within a factor of 2 for n_v of 1 or 2. The correction is missing with measure
    "exact" and for problems with covariances: steep filters (four steps of rate 1) come out too
    low.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=60, m=3, n_t=20, n_v=10, n_r=20, sigma=0.5, nu=1.0)
    >>> round(float(nm.theory.train_task_error(problem, nm.GradientDescent(0.2))), 2)
    1.68
    """
    meta_ridge, train = check_arguments(problem, meta_ridge, train=train)
    model = theory_model(problem, meta_ridge, measure=measure)
    return warn_if_unsolved(model.train_task_error(train))


def warn_if_unsolved(found):
    """Return the means, after a warning if a known one is NaN."""
    # Within a trace the values are unknown; NaN then is the only sign.
    if is_concrete(found):
        warn_unless(not np.isnan(jax.device_get(found)).any(), UNSOLVED)
    return found
