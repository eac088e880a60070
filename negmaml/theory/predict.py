"""Predictions of the test loss and its parts, by the proportional theory or by expansion."""

from functools import partial
from numbers import Real

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.checks import check_choice, check_nonnegative
from negmaml._core.compilation import quick_jit
from negmaml._core.numerics import cast
from negmaml.problem.adaptation import expected_test_loss
from negmaml.problem.model import MixedLinearRegression
from negmaml.rules import GradientDescent, Rule, batch_shape, parameter
from negmaml.theory import expansions
from negmaml.theory.proportional import Moments, moments
from negmaml.theory.saddle import tasks
from negmaml.theory.spectrum import marchenko_pastur, spectrum

METHODS = ("proportional", "expansion")

# Rates evaluated at once: enough to fill vector units, few enough to stay in cache.
BLOCK = 256


def test_loss(
    problem: MixedLinearRegression,
    train: Rule,
    adapt: Rule,
    method: str = "proportional",
    meta_ridge=0.0,
    measure: str = "auto",
):
    r"""Predicted test loss of a model meta-trained with `train` and adapted with `adapt`.

        L = sigma^2/2 + h/2 (nu^2 + E|omega* - w0|^2) + sigma^2/(2 n_r) E tr q(S)^2 S

    Arguments:
        train: inner rule of meta-training, a parameter of any shape and sign.
        adapt: inner rule at test time, likewise; its effect is exact (`expected_test_loss`).
        method: "proportional" (default), for every p / (n_v m), rule and ridge; or "expansion",
            Theorem 1 or 2 for one gradient step without ridge.
        meta_ridge: lambda >= 0 of (Phi^T Phi + lambda I), Phi stacked over tasks.
        measure: spectrum of a task: "exact" (Gauss rule of the exact moments),
            "marchenko-pastur" (with its 1/p term), or "auto", the first for the smallest sizes and
            steep filters, else the second.

    Returns an array of shape train shape + adapt shape, like `negmaml.simulate` without its runs;
    infinite where the mean does not exist (`distance`). Raises ValueError for an unknown `method`
    or `measure`, a bad ridge, and as the expansions do. Source: negmaml,
    derived in negmaml/theory/proportional.md.

    >>> from negmaml import GradientDescent
    >>> problem = MixedLinearRegression(p=60, m=3, n_t=20, n_v=10, n_r=20, sigma=0.5, nu=1.0)
    >>> round(float(test_loss(problem, GradientDescent(0.2), GradientDescent(0.2))), 3)
    0.994
    """
    return expected_test_loss(problem, distance(problem, train, method, meta_ridge, measure), adapt)


def distance(
    problem: MixedLinearRegression,
    train: Rule,
    method: str = "proportional",
    meta_ridge=0.0,
    measure: str = "auto",
):
    r"""E|omega* - w0|^2 over training sets, of the rule's shape.

    Arguments as in `test_loss`. Differentiable, twice too, in the rule's parameter, sigma, nu, w0,
    omega0 and meta_ridge.

    Without ridge the mean is infinite where |n_v m - p| <= 1 (and just beyond, where the
    correction's own pole lies), and for a single task with n_v >= p whose filter has a zero within
    the spectrum: infinity is returned. The equation is at the head of
    `negmaml.theory.proportional`; `task_error` gives the same theory's other number.
    """
    if method == "expansion":
        if not is_zero(meta_ridge):
            raise ValueError(
                f"meta_ridge must be 0 for method='expansion', got {meta_ridge!r}; "
                "use method='proportional'"
            )
        return expansions.distance(problem, train)
    check_choice("method", method, METHODS)
    return evaluate(problem, train, meta_ridge, measure).distance


def task_error(problem: MixedLinearRegression, train: Rule, meta_ridge=0.0, measure: str = "auto"):
    r"""tau^2, the mean squared error of the meta-model on fresh query rows of a training task.

        tau^2 = sigma^2 + E| adapted weights of a training task - its true weights |^2

    Arguments as in `test_loss`; of the rule's shape. Twice the meta-loss that more query points
    of the same tasks, with the same training points, would show; its gap to twice the test loss at
    the same rule says how far meta-training has fitted the tasks it saw.
    """
    return evaluate(problem, train, meta_ridge, measure).task_error


def evaluate(problem: MixedLinearRegression, train: Rule, meta_ridge, measure: str) -> Moments:
    """`proportional.moments`, each of the rule's shape."""
    return evaluate_traced(*arguments_of(problem, meta_ridge, measure, train))


def arguments_of(problem: MixedLinearRegression, meta_ridge, measure: str, *rules: Rule) -> tuple:
    """The arguments of a program like `evaluate_traced` for rules of one family, of one dtype."""
    check_nonnegative("meta_ridge", meta_ridge, "a ridge strength")
    numbers = problem.sigma, problem.nu, problem.offset_squared, meta_ridge
    dtype = jnp.result_type(float, *map(parameter, rules), *numbers)
    numbers, rules, sizes = cast((numbers, rules, sizes_of(problem)), dtype)
    steep = isinstance(rules[0], GradientDescent) and rules[0].steps > 2
    # Nodes and weights, or None where the traced Marchenko-Pastur law serves.
    quadrature = spectrum(problem.n_t, problem.p, measure, dtype, steep)
    return sizes, numbers, *rules, quadrature, not is_zero(meta_ridge)


def sizes_of(problem: MixedLinearRegression) -> tuple[int, int, int, int]:
    """(p, m, n_t, n_v)."""
    return problem.p, problem.m, problem.n_t, problem.n_v


def is_zero(value) -> bool:
    """Whether a number is known to be zero while tracing."""
    return isinstance(value, Real | np.ndarray) and float(value) == 0


@partial(quick_jit, static_argnames="ridged")
def evaluate_traced(sizes, numbers, rule: Rule, quadrature, ridged: bool) -> Moments:
    """Sizes are traced, so that one compilation serves every problem."""
    p, _, n_t, _ = sizes
    measure = marchenko_pastur(n_t, p, p.dtype) if quadrature is None else quadrature
    shape, size = batch_shape(rule), parameter(rule).size
    flat = jax.tree.map(jnp.ravel, rule)
    one = partial(means, sizes, numbers, measure, ridged)
    results = jax.vmap(one)(flat) if size <= BLOCK else lax.map(one, flat, batch_size=BLOCK)
    return jax.tree.map(lambda x: x.reshape(shape), results)


def means(sizes, numbers, measure, ridged: bool, rule: Rule) -> Moments:
    """The moments for a rule with one scalar parameter, everything traced."""
    p, m, _, n_v = sizes
    sigma, nu, offset, ridge = numbers
    found = moments(tasks(sizes, sigma, nu, offset, ridge, rule, measure), ridged)
    alone = (m == 1) & (n_v >= p) & (ridge == 0)
    infinite = jnp.where(alone & _has_zero(rule, measure.nodes[:-1]), jnp.inf, 1)
    return found._replace(
        distance=found.distance * infinite, task_error=found.task_error * infinite
    )


def _has_zero(rule: Rule, x):
    """Whether the filter has a zero between the first and the last of the nodes."""
    if isinstance(rule, GradientDescent):
        rule = GradientDescent(rule.rate)  # an even power does not change sign
    b = rule.b(x)
    return (jnp.min(b) < 0) & (jnp.max(b) > 0)
