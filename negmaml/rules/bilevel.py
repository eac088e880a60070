"""Inner problems that any solver solves, with implicit derivatives."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.checks import (
    check_choice,
    check_count,
    check_finite,
    check_optional,
    check_positive,
    short_repr,
)
from negmaml._core.display import tree_text
from negmaml._core.pytree import as_pytree, pytree, static
from negmaml._core.types import PyTree
from negmaml.rules.base import InnerRule, solve_with
from negmaml.rules.field import field_point, is_field
from negmaml.rules.implicit import (
    FlatProblem,
    LinearSolver,
    Settings,
    differentiable_root,
    flat_problem,
    tolerance_or_default,
)
from negmaml.rules.krylov import norm
from negmaml.rules.linear_solvers import NAMES, LinearSettings, is_lineax
from negmaml.rules.optimizer import InnerOptimizer, update_on
from negmaml.rules.proximal import Proximal
from negmaml.rules.schedule import combine, separate
from negmaml.rules.solution import Solution, as_solution
from negmaml.rules.stationary import StationaryRule
from negmaml.rules.trust_region import ROUNDING, StationaryPoint

OPTIMIZER_STEPS = 1000  # of an optax transformation by default; most stop at the tolerance before


@final
@pytree
class Implicit(StationaryRule):
    r"""The solution of an inner problem by any solver, with its implicit derivative.

        theta:    grad loss(theta) + strength (theta - start) = 0
        d theta = -(H + strength I)^{-1} d(grad loss - strength start),    H the Hessian at theta

    theta is the point that the solver reaches. Its derivative is that of the equation, not of the
    steps, so memory does not grow with their number. It holds for `start`, the strength, frozen
    leaves, and all that the loss closes over, such as hyperparameters. `Proximal` solves the same
    equation by steps of its own.

    Arguments:
        inner: the solver. A rule that takes steps, or an optax transformation. Or a function
            (objective, start) -> params, where objective(params) is the loss with the term
            strength/2 |params - start|^2; a solver of another library fits in one line. Both are
            pytrees of the leaves that adapt, with None for others.
        strength: a number of any sign. For 0 the start is only the initial guess, so that the
            derivative in it is zero and the meta-gradient that of frozen leaves and
            hyperparameters.
        steps: the most steps of an optax transformation, 1000 by default, static. A rule has its
            own `steps`. Both stop before if the residual is within the tolerance.
        tolerance: of |grad loss(theta) + strength (theta - start)| over its size at the start,
            static. The default is rounding^(3/4) of the dtype, 2e-12 in float64 and 6e-6 in
            float32. A residual within the rounding of theta is allowed too.
        absolute_tolerance: a residual that is allowed in addition, static, zero by default. A start
            near the solution, as from `negmaml.warm_start`, saves steps only with it.
        linear_solver: of systems with H + strength I: "minres", for any symmetric matrix; "cg" or
            "neumann", for definite ones; "dense", for few parameters; a solver of lineax, such as
            lineax.GMRES(1e-6, 1e-6); or a function (matvec, b) -> x of flat vectors. Static.
        linear_steps: the most iterations of a linear solver; "minres" restarts up to 3 times.
        linear_tolerance: of its residual over |b|, by default as for `tolerance`.

    Implicit MAML as in its paper takes steps of gradient descent and few of conjugate gradients,
    which reach tolerances of this size (Rajeswaran et al., NeurIPS 2019, algorithm 2):

        Implicit(GradientDescent(0.1, steps=16), strength=2.0, tolerance=0.1,
                 linear_solver="cg", linear_steps=5, linear_tolerance=0.1)

    Where derivative rules in the loss may make H asymmetric, GMRES replaces the linear solver.

    `negmaml.adapt(..., return_info=True)` returns whether the residual is within the tolerance, and
    whether the solution is no minimum (`negmaml.rules.SolveInfo`); otherwise a warning is issued if
    the residual is not. A linear system beyond its tolerance warns too, and
    so does "cg" where H + strength I is indefinite.
    Raises ValueError or TypeError for invalid arguments.

    >>> import negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> newton = lambda f, w: w - jax.grad(f)(w) / jax.hessian(f)(w)
    >>> rule = nm.Implicit(newton, strength=3.0)
    >>> float(jax.grad(lambda start: nm.adapt(square, start, 0.0, rule))(1.0))
    0.75
    """

    inner: Any
    strength: Any = 0.0
    _: dataclasses.KW_ONLY
    steps: int | None = static(default=None)
    tolerance: float | None = static(default=None)
    absolute_tolerance: float | None = static(default=None)
    linear_solver: Any = static(default="minres")
    linear_steps: int = static(default=1000)
    linear_tolerance: float | None = static(default=None)

    def __post_init__(self) -> None:
        steps = check_optional(check_count, "steps", self.steps)
        checked = {
            "inner": _check_solver(self.inner, steps),
            "steps": None,  # part of `inner` from here on
            "strength": check_finite("strength", self.strength, "a proximal strength"),
            "linear_steps": check_count("linear_steps", self.linear_steps),
        }
        for name in ("tolerance", "absolute_tolerance", "linear_tolerance"):
            checked[name] = check_optional(check_positive, name, getattr(self, name))
        if isinstance(self.linear_solver, type):
            raise TypeError(
                f"linear_solver must be a solver, got the class {self.linear_solver.__name__}; "
                "make a solver of it, such as lineax.CG(1e-6, 1e-6)"
            )
        if not (callable(self.linear_solver) or is_lineax(self.linear_solver)):
            options = (*NAMES, "a solver of lineax", "a function (matvec, b)")
            check_choice("linear_solver", self.linear_solver, options)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def check(self, params: PyTree) -> None:
        super().check(params)
        if isinstance(self.inner, InnerRule):
            self.inner.check(params)

    @property
    def ignores_start(self) -> bool:
        """True if the strength is known to be zero."""
        return not isinstance(self.strength, jax.core.Tracer) and not np.any(self.strength)

    def solve(self, loss: Callable[..., Any], start: PyTree, *, remat: bool = False) -> Solution:
        """Run the solver from `start`; the result has `SolveInfo`."""
        if is_field(loss, start):
            return self._solve_field(loss, start)
        problem = flat_problem(loss, start, self.strength)
        search = partial(self._search, problem, loss, start)
        return differentiable_root(problem, search, self._linear.solve_linear)

    @property
    def _solve_linear(self) -> LinearSolver:
        return self._linear.solve_linear

    @property
    def _linear(self) -> LinearSettings:
        return LinearSettings(self.linear_solver, self.linear_steps, self.linear_tolerance)

    def _search(self, problem: FlatProblem, loss, start) -> StationaryPoint:
        found, steps = self._run(loss, start, problem.rounding)
        theta, rounding = problem.flatten(found), ROUNDING * problem.rounding
        first = norm(problem.residual(problem.start))
        # |J theta| estimates the terms that cancel in F, and with them its rounding.
        residual, terms = jax.jvp(problem.residual, (theta,), (theta,))
        tolerance = tolerance_or_default(self.tolerance, problem.rounding)
        allowed = tolerance * first + rounding * (norm(terms) + first)
        if self.absolute_tolerance is not None:
            allowed += self.absolute_tolerance
        size = norm(residual)
        return StationaryPoint(theta, size <= allowed, size, steps)

    def _solve_field(self, loss, start) -> Solution:
        """The solution for a loss whose derivative need not be symmetric."""
        # The search is not differentiated, whatever the loss closes over.
        converted, constants = jax.closure_convert(loss, start)
        constants = lax.stop_gradient(constants)
        rounding = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(start))
        found, steps = lax.stop_gradient(self)._run(
            lambda theta: converted(theta, *constants), lax.stop_gradient(start), rounding
        )
        settings = Settings(self.linear_steps, self.tolerance)
        theta, info = field_point(loss, start, self.strength, settings, at=found)
        if self.absolute_tolerance is not None:
            converged = info.converged | (info.residual <= self.absolute_tolerance)
            info = info._replace(converged=converged)
        return Solution(theta, info._replace(steps=steps))

    def _run(self, loss, start, rounding: float):
        """Return (parameters, number of steps) of the solver."""

        def objective(theta):
            squares = (
                jnp.sum(jnp.square(a - b))
                for a, b in zip(*map(jax.tree.leaves, (theta, start)), strict=True)
            )
            value = loss(theta)
            return value + (self.strength / 2 * sum(squares)).astype(value.dtype)

        if isinstance(self.inner, InnerRule):
            takes_loss = isinstance(self.inner, InnerOptimizer)
            if takes_loss or not self.inner.implicit:
                tolerance = tolerance_or_default(self.tolerance, rounding)
                return _descend(self.inner, objective, start, tolerance, self.absolute_tolerance)
            found, info = solve_with(self.inner, objective, start)
        else:
            found, info = as_solution(self.inner(objective, start), 0)
        return _like(start, found), info.steps


class _Iterate(NamedTuple):
    """A point of a solver that takes steps, with the state of its optimizer."""

    k: Any
    theta: Any
    state: Any
    value: Any
    gradient: Any


def _descend(rule: InnerRule, objective: Callable, start, tolerance: float, absolute: float | None):
    """Return (parameters, number of steps) once the gradient is small, or after all steps."""
    stepped, fixed = separate(rule)
    slopes = jax.value_and_grad(objective)

    def size(gradient):
        return norm(jnp.concatenate([
            jnp.ravel(leaf).astype(jnp.promote_types(leaf.dtype, jnp.float32))
            for leaf in jax.tree.leaves(gradient)
        ]))  # fmt: skip

    def unfinished(at: _Iterate):
        return (at.k < rule.steps) & (size(at.gradient) > least)

    def step(at: _Iterate):
        own = combine(jax.tree.map(lambda x: x[at.k], stepped), fixed)
        theta, state = update_on(own, objective, at.value, at.gradient, at.state, at.theta)
        return _Iterate(at.k + 1, theta, state, *slopes(theta))

    first = _Iterate(0, start, rule.init(start), *slopes(start))
    least = tolerance * size(first.gradient)
    if absolute is not None:
        least += absolute
    last = lax.while_loop(unfinished, step, first)
    return last.theta, last.k


def _check_solver(inner, steps: int | None):
    """Return the solver as a pytree; raise unless it is one of the three kinds."""
    if isinstance(inner, Proximal | Implicit):
        raise TypeError(
            f"inner must be a solver without a proximal term of its own, got {inner!r}; give its "
            "strength to Implicit, and a rule that takes steps as inner"
        )
    is_rule = isinstance(inner, InnerRule)
    if is_rule or callable(inner):
        if steps is not None:
            raise ValueError(
                f"steps must be left out unless inner is an optax transformation, got {steps} for "
                f"{short_repr(inner)}; give the number of steps to the solver itself"
            )
        return inner if is_rule else as_pytree(inner)
    import optax

    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "inner must be a rule that takes steps such as GradientDescent(0.1, steps=100), an "
            "optax transformation, or a function (objective, start) -> params, got "
            f"{short_repr(inner)}"
        )
    return InnerOptimizer(inner, OPTIMIZER_STEPS if steps is None else steps)


def _like(start, found):
    """Return the parameters that a solver found, in the types of `start`; raise if unlike it."""
    (leaves, structure), (own, own_structure) = map(jax.tree.flatten, (start, found))
    if str(structure) != str(own_structure) or [*map(jnp.shape, leaves)] != [*map(jnp.shape, own)]:
        raise ValueError(
            f"inner must return parameters like start, {tree_text(start)}, got {tree_text(found)}; "
            "return only the parameters, in their structure"
        )
    return jax.tree.map(lambda a, b: jnp.asarray(b, a.dtype), start, found)
