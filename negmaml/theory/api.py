"""Predictions of the test loss and its parts, by the proportional theory or by expansion."""

import math
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax

from negmaml._core.checks import check_choice
from negmaml._core.convergence import warn_unless
from negmaml._core.jit import is_concrete, jit_fast_compile, on_host
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, Float, ScalarLike
from negmaml.problem.adapted_loss import expected_isotropic_loss
from negmaml.problem.model import SPLITS, MixedLinearRegression
from negmaml.rules import InnerRule, flat_batch
from negmaml.theory import theorems as expansions
from negmaml.theory.anisotropic import inputs as structured
from negmaml.theory.isotropic.filters import means, traced_mean, traced_view
from negmaml.theory.isotropic.inputs import Setting, checked, is_zero, setting_of
from negmaml.theory.isotropic.moments import Moments
from negmaml.theory.isotropic.spectral_density import MEASURES
from negmaml.theory.options import named_options

METHODS = ("proportional", "expansion")

# Rates evaluated at once: enough to fill vector units, few enough to stay in cache.
BLOCK = 256
# Rates up to which NumPy is done before a program would be compiled.
ON_HOST = 4096
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
    r"""Predicted test loss of a model meta-trained with `train` and adapted with `adapt`.

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

    Returns an array of shape train shape + adapt shape, like `negmaml.simulate` without its runs;
    infinite where the mean does not exist: as in `weight_error`, after a flow at test time uphill
    for n_r/4 or longer, and after a proximal rule with -strength among the eigenvalues of S. Raises
    ValueError for an unknown `method`, `measure` or `split`, a bad ridge, and as the expansions do.
    Source: negmaml, derived in negmaml/theory/isotropic.md.

    >>> from negmaml import GradientDescent
    >>> problem = MixedLinearRegression(p=60, m=3, n_t=20, n_v=10, n_r=20, sigma=0.5, nu=1.0)
    >>> round(float(test_loss(problem, GradientDescent(0.2), GradientDescent(0.2))), 3)
    0.994
    """
    meta_ridge, train, adapt = checked(problem, meta_ridge, train=train, adapt=adapt)
    check_choice("split", split, SPLITS)
    train_train = split == "train-train"
    if train_train or not problem.isotropic:
        require_structured(method, measure, split=split)
        problem = structured.with_identity_covariance(problem)
        return _reported(structured.test_loss(problem, train, adapt, meta_ridge, train_train))
    options: dict[str, Any] = {"method": method, "meta_ridge": meta_ridge, "measure": measure}
    return expected_isotropic_loss(problem, weight_error(problem, train, **options), adapt)


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
    r"""E|omega* - w0|^2 over training sets, of the rule's shape.

    Arguments as in `test_loss`. Differentiable, twice too, in the rule's parameter, sigma, nu, w0,
    omega0 and meta_ridge.

    Without ridge the mean is infinite where |n_v m - p| <= 1 (and just beyond, where the
    correction's own pole lies), and for a single task with n_v >= p whose filter has a zero within
    the spectrum: infinity is returned. Filters of steep rules are taken by their logarithms, and a
    mean too large for a number is infinite; the slope of an infinite mean is zero. NaN, with a
    `ConvergenceWarning` outside jit, marks a rule whose equations were not solved.
    `Proximal(0.0)` without ridge may be a jump: what it lets pass vanishes, so that training stays
    where it starts, while every strength next to zero trains; the slope there is that of the labels
    alone. The equation is at the head of
    `negmaml.theory.isotropic.moments`; `train_task_error` gives the same theory's other number.
    """
    meta_ridge, train = checked(problem, meta_ridge, train=train)
    check_choice("split", split, SPLITS)
    train_train = split == "train-train"
    if method == "expansion":
        require_structured(method, measure, problem.isotropic and not train_train, split)
        require_no_ridge(meta_ridge)
        return expansions.weight_error(problem, train)
    check_choice("method", method, METHODS)
    if train_train or not problem.isotropic:
        require_structured(method, measure, split=split)
        problem = structured.with_identity_covariance(problem)
        return _reported(structured.weight_error(problem, train, meta_ridge, train_train))
    return _mean("distance", problem, train, meta_ridge, measure)


@named_options
@own_settings
def train_task_error(
    problem: MixedLinearRegression,
    train: InnerRule,
    *,
    meta_ridge: ScalarLike = 0.0,
    measure: str = "auto",
) -> Float[Array, "..."]:
    r"""tau^2, the mean squared error of the meta-model on fresh query rows of a training task.

        tau^2 = sigma^2 + E| adapted weights of a training task - its true weights |^2

    Arguments as in `test_loss`, of the rule's shape; measure "auto" is "marchenko-pastur" here.
    Twice the meta-loss that more query points of the same tasks, with the same training points,
    would show; its gap to twice the test loss at the same rule says how far meta-training has
    fitted the tasks it saw. Infinite as the test loss.

    Where b(x)^2 varies by powers of ten within the spectrum, the mean rests on few eigenvalues and
    runs scatter by more than the mean. `negmaml.theory.isotropic.eigenvalue_scatter` adds their
    scatter; the result
    was within 10% of simulations for 3 <= n_v <= n_t, up to 25% too low for n_t < n_v, and within a
    factor of 2 for n_v of 1 or 2. With measure "exact" and for problems with covariances it is left
    out: steep filters (four steps of rate 1) come out too low.
    """
    meta_ridge, train = checked(problem, meta_ridge, train=train)
    if not problem.isotropic:
        require_structured("proportional", measure)
        return _reported(structured.train_task_error(problem, train, meta_ridge))
    # Ten nodes are too few for a filter that varies by powers of ten within the spectrum.
    measure = "marchenko-pastur" if measure == "auto" else measure
    return _mean("task_error", problem, train, meta_ridge, measure)


def require_no_ridge(meta_ridge) -> None:
    """Raise unless the ridge is zero, as the expansions need it."""
    if not is_zero(meta_ridge):
        raise ValueError(
            f"meta_ridge must be 0 for method='expansion', got {meta_ridge!r}; "
            "use method='proportional'"
        )


def require_structured(
    method: str, measure: str, isotropic: bool = False, split: str = "train-validation"
) -> None:
    """Raise where an option is for problems without covariances and with a split only."""
    check_choice("method", method, METHODS)
    check_choice("measure", measure, MEASURES)
    if isotropic:
        return
    case = "a problem with covariances" if split == "train-validation" else f"split={split!r}"
    if method != "proportional":
        raise ValueError(
            f"method must be 'proportional' for {case}, got {method!r}; "
            "theory.general_inputs has the expansion for covariances and p > n_v m"
        )
    if measure != "auto":
        raise ValueError(
            f"measure must be 'auto' for {case}, got {measure!r}: the spectrum of S follows from "
            "the covariance"
        )


def evaluate(problem: MixedLinearRegression, train: InnerRule, meta_ridge, measure: str) -> Moments:
    """`proportional.moments` without the task error, each of the rule's shape."""
    setting, train = _settled(problem, train, meta_ridge, measure)
    return _moments(setting, train, with_error=False)


def _mean(of: str, problem: MixedLinearRegression, train: InnerRule, meta_ridge, measure: str):
    """One of `Moments`, of the rule's shape."""
    setting, train = _settled(problem, train, meta_ridge, measure)
    if is_concrete((setting, train)) or math.prod(train.batch_shape) > BLOCK:
        return _reported(getattr(_moments(setting, train, of == "task_error"), of))
    return traced_mean(traced_view(setting, train), setting.ridged, of)


def _reported(found):
    """The means, with a warning where a known one is NaN."""
    if is_concrete(found):
        warn_unless(not np.isnan(jax.device_get(found)).any(), UNSOLVED)
    return found


def _settled(problem: MixedLinearRegression, train: InnerRule, meta_ridge, measure: str):
    setting, (train,) = setting_of(problem, (train,), meta_ridge, measure)
    return setting, train


def _moments(setting: Setting, train: InnerRule, with_error: bool) -> Moments:
    if math.prod(train.batch_shape) <= ON_HOST and is_concrete((setting, train)):
        return on_host(means)(setting, train, with_error=with_error)
    return _compiled(setting, train, with_error=with_error)


@partial(jit_fast_compile, static_argnames="with_error")
def _compiled(setting: Setting, rule: InnerRule, with_error: bool) -> Moments:
    """Sizes are traced, so that one compilation serves every problem."""
    one = partial(means, setting, with_error=with_error)
    results = lax.map(one, flat_batch(rule), batch_size=BLOCK)
    return jax.tree.map(lambda x: x.reshape(rule.batch_shape), results)
