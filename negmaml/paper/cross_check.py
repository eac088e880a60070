"""Computes one test loss by six methods, which have to agree within their stated errors."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from negmaml import theory
from negmaml._core.arrays import canonicalize, contract
from negmaml._core.checks import check_count
from negmaml._core.deprecation import renamed_attribute
from negmaml._core.display import Table
from negmaml._core.jit import jit_fast_compile
from negmaml._core.keys import check_key, key_of
from negmaml._core.settings import own_settings
from negmaml._core.types import PRNGKeyArray
from negmaml.linear.data import sample
from negmaml.linear.simulation import simulate
from negmaml.linear.solve import minimiser
from negmaml.linear.system import meta_system
from negmaml.meta import Tasks, maml
from negmaml.problem.adapted_loss import adapted, expected_test_loss
from negmaml.problem.model import MixedLinearRegression, check_problem
from negmaml.rules import InnerRule, UndefinedMethodError, check_scalar_rule
from negmaml.theory.model import theory_model

Z_LIMIT = 4.0  # standard errors; a correct method fails once in 16,000
EXACT_LIMIT = 1e-6  # relative; float64 methods that compute the same number
SAMPLED_RUNS = 100  # of 100 tasks each; differences are paired, so these are enough
DESCENT_RUNS = 4
MAX_STEPS = 200_000
HEAD = ("method", "value", "error", "reference", "deviation")


class MethodResult(NamedTuple):
    """The test loss by one method, next to the reference it is compared with.

    value, error: the number and its standard error (0 when exact given the data).
    reference: the reference, computed from the same data if the method uses data.
    kind: "z", "relative", or "skipped" for a method that does not apply.
    deviation: z-score if `kind` is "z", relative error if "relative".
    limit: the largest |deviation| that counts as agreement.
    truncation: for an expansion, the size of the terms it leaves out; subtracted from the
        difference before the z-score is formed.
    """

    name: str
    value: float
    error: float
    reference: float
    kind: str
    deviation: float
    limit: float
    truncation: float = 0.0
    note: str = ""

    @property
    def agrees(self) -> bool:
        """True if the method agrees with its reference, or does not apply."""
        return self.kind == "skipped" or abs(self.deviation) <= self.limit

    @property
    def verdict(self) -> str:
        """The deviation, a mark if it is above the limit, and the note."""
        texts = {"z": f"z = {self.deviation:+.2f}", "relative": f"{self.deviation:.1e} relative"}
        mark = "" if self.agrees else "  disagrees"
        note = f"  ({self.note})" if self.note else ""
        return texts.get(self.kind, "not applicable") + mark + note


class Verification(NamedTuple):
    """Results of all methods of `verify`; print it for a table.

    Attributes:
        methods: one `MethodResult` for each method, the reference first.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=6, m=1, n_t=4, n_v=2, n_r=4, sigma=0.5, nu=1.0)
    >>> adapt = nm.GradientDescent(0.2)
    >>> found = nm.verify(problem, nm.GradientDescent(-0.1), adapt, runs=100)
    >>> len(found.methods), found.methods[0].name, found.agrees
    (6, 'exact solve, expected', True)
    """

    methods: tuple[MethodResult, ...]

    @property
    def agrees(self) -> bool:
        """True if every method that applies agrees with its reference."""
        return all(method.agrees for method in self.methods)

    @property
    def _verdict(self) -> str:
        return "all methods agree" if self.agrees else "the methods disagree"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        rows = [
            (m.name, f"{m.value:.6g}", f"{m.error:.1e}", f"{m.reference:.6g}", m.verdict)
            for m in self.methods
        ]
        return Table(self._verdict, rows, HEAD).html()

    def __str__(self) -> str:
        width = max(len(m.name) for m in self.methods)
        lines = ["{:<{}}  {:>11}  {:>8}  {:>11}  {}".format(HEAD[0], width, *HEAD[1:])]
        for m in self.methods:
            numbers = f"{m.value:>11.6g}  {m.error:>8.1e}  {m.reference:>11.6g}"
            lines.append(f"{m.name:<{width}}  {numbers}  {m.verdict}")
        return "\n".join([*lines, self._verdict])


# Set after the class, since a type checker takes names in a NamedTuple for fields.
setattr(Verification, "roads", renamed_attribute("Verification.roads", "methods"))  # noqa: B010


@own_settings
def verify(
    problem: MixedLinearRegression,
    train: InnerRule,
    adapt: InnerRule,
    *,
    key: PRNGKeyArray | None = None,
    runs: int = 1000,
) -> Verification:
    r"""Compute the test loss of one problem by six methods and compare them, in float64.

    1. exact solve, expected evaluation: `simulate`, the reference of the next three;
    2. theory: `theory.weight_error`, allowed the square of its 1/p term, relative to the limit;
    3. theory: `theory.weight_error` by expansion, allowed the size of its next order;
    4. exact solve, sampled evaluation: the paper's protocol, on the first 100 of these runs;
    5. meta-training by gradient descent (optax, autodiff meta-gradient) until converged, against
       the exact solve on the same data;
    6. the meta-gradient by automatic differentiation against Phi^T (Phi omega - r) / N.

    Arguments:
        train, adapt: rules with scalar parameters. Methods 5 and 6 apply to training rules with
            updates of any model. Method 3 applies to one gradient step. Methods 2 and 3 apply away
            from p = n_v m, to rules that are functions of the spectrum. Others are "skipped".
        key: a JAX key; jax.random.key(0) by default.
        runs: number of simulated runs, at least 2.

    Returns a `Verification`. Raises TypeError or ValueError for rules that are not scalar, for
    runs < 2, and at p = n_v m, where every mean is infinite.

    >>> import negmaml as nm
    >>> problem = nm.MixedLinearRegression(p=6, m=1, n_t=4, n_v=2, n_r=4, sigma=0.5, nu=1.0)
    >>> adapt = nm.GradientDescent(0.2)
    >>> nm.verify(problem, nm.GradientDescent(-0.1), adapt, runs=100).agrees
    True
    """
    check_problem(problem)
    train, adapt = check_scalar_rule("train", train), check_scalar_rule("adapt", adapt)
    if check_count("runs", runs) < 2:
        raise ValueError(f"runs must be at least 2 for a standard error, got {runs!r}")
    if key is not None:
        key = check_key("key", key)
    if problem.p == problem.rows:
        raise ValueError(
            f"p = n_v m = {problem.p}: every mean is infinite there, and no two samples of it "
            "agree; change p, m or n_v"
        )
    # In single precision the methods would differ by rounding more than by their errors.
    with jax.enable_x64(True):
        key = key_of(0) if key is None else key
        problem, train, adapt = canonicalize((problem, train, adapt), np.float64)
        # One key for both: run i has the same data in each, so differences are paired.
        expected, sampled = (
            np.asarray(simulate(key, problem, train, adapt, runs=n, evaluation=e).test_loss)
            for n, e in ((runs, "expected"), (min(runs, SAMPLED_RUNS), "sampled"))
        )
        mean, error = _mean_and_error(expected)
        reference = MethodResult("exact solve, expected", mean, error, mean, "z", 0.0, Z_LIMIT)
        return Verification(
            (
                reference,
                _proportional_theory(problem, train, adapt, mean, error),
                _expansion_theory(problem, train, adapt, mean, error),
                _sampled_evaluation(expected[: sampled.size], sampled),
                *_by_autodiff(key, problem, train, adapt),
            )
        )


def _mean_and_error(values) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / values.size**0.5)


def _ratio(difference: float, scale: float) -> float:
    """Return difference / scale, and 0 if the difference is 0."""
    return difference / scale if scale else (np.inf if difference else 0.0)


def _proportional_theory(problem, train, adapt, mean: float, error: float) -> MethodResult:
    name = "theory, proportional"
    try:
        excess, limit, floor = _predicted(problem, train, adapt)
    except (ValueError, TypeError) as reason:
        return _skipped(name, str(reason).split(":")[0])
    # The next order of an expansion in 1/p is about the square of the first, relative to the limit.
    correction = abs(_ratio(excess - limit, limit))
    if not np.isfinite(correction):
        return _skipped(name, "the mean is infinite at this size")
    if correction >= 0.5:
        return _skipped(name, f"its 1/p term is {correction:.2g} of the limit at this size")
    omitted = limit * correction**2 / (1 - correction)
    return _with_truncation(name, floor + excess, omitted, mean, error)


def _predicted(problem, train, adapt) -> tuple[float, float, float]:
    """Excess test loss over that of omega = w0: predicted, and its limit; then that of w0."""
    floor, *losses = theory_model(problem).loss_terms(train, adapt)
    excess, limit = (float(loss - floor) for loss in losses)
    return excess, limit, float(floor)


def _expansion_theory(problem, train, adapt, mean: float, error: float) -> MethodResult:
    name = "theory, expansion"
    try:
        distance = theory.weight_error(problem, train, method="expansion")
    except ValueError as reason:
        return _skipped(name, str(reason).split(", got")[0].split(";")[0])
    rho = float(theory.expansion_parameter(problem, train))
    if rho >= 0.5:  # terms left out would be as large as terms kept
        return _skipped(name, f"no expansion at this size: its parameter is {rho:.2g}")
    # For label noise at alpha_t = 0 the omitted orders add up to the factor 1 / (1 - rho).
    value, more = (
        float(expected_test_loss(problem, float(distance) * x, adapt)) for x in (1, 1 / (1 - rho))
    )
    return _with_truncation(name, value, more - value, mean, error)


def _with_truncation(
    name, value: float, truncation: float, mean: float, error: float
) -> MethodResult:
    # Only the part of the difference beyond the omitted terms counts.
    excess = max(abs(value - mean) - truncation, 0.0)
    note = f"next order up to {truncation:.1e}"
    z = _ratio(float(np.copysign(excess, value - mean)), error)
    return MethodResult(name, value, 0.0, mean, "z", z, Z_LIMIT, truncation, note)


def _sampled_evaluation(expected, sampled) -> MethodResult:
    """Compare sampled and expected evaluation of the same runs, by their paired differences."""
    mean, error = _mean_and_error(sampled)
    # The same runs: their common scatter cancels in the difference.
    gap, gap_error = _mean_and_error(sampled - expected)
    z = _ratio(gap, gap_error)
    return MethodResult(
        "exact solve, sampled", mean, error, float(expected.mean()), "z", z, Z_LIMIT
    )


def _by_autodiff(key, problem, train, adapt) -> tuple[MethodResult, MethodResult]:
    names = "meta-training (optax)", "meta-gradient, autodiff"
    try:
        results = None if train.implicit else jax.device_get(_descents(key, problem, train))
    except UndefinedMethodError:  # the rule has filters and no update
        results = None
    if results is None:
        reason = f"{type(train).__name__} has no gradient steps to differentiate through"
        return _skipped(names[0], reason), _skipped(names[1], reason)
    descended, solved, converged, gradient, exact = results
    losses, references = (
        np.asarray(_loss_of(problem, omega, adapt)) for omega in (descended, solved)
    )
    # The same data, so the losses agree to rounding, without standard errors.
    relative = _ratio(float(np.max(np.abs(losses - references))), float(references.min()))
    note = "" if bool(converged.all()) else f"not converged in {MAX_STEPS} steps"
    mean, error = _mean_and_error(losses)
    descent = MethodResult(
        names[0],
        mean,
        error,
        float(references.mean()),
        "relative",
        relative,
        EXACT_LIMIT,
        note=note,
    )
    size, exact_size = (float(np.linalg.norm(g)) for g in (gradient, exact))
    relative = _ratio(float(np.linalg.norm(gradient - exact)), exact_size)
    return descent, MethodResult(names[1], size, 0.0, exact_size, "relative", relative, EXACT_LIMIT)


def _loss_of(problem, omega, adapt):
    """The expected test loss of weights (..., p)."""
    if problem.isotropic:
        return expected_test_loss(problem, np.sum((omega - np.asarray(problem.w0)) ** 2, -1), adapt)
    after = adapted(problem, adapt)
    return after.test_loss(after.forms(omega - problem.w0))


def _skipped(name: str, reason: str) -> MethodResult:
    return MethodResult(name, np.nan, 0.0, np.nan, "skipped", 0.0, 0.0, note=reason)


def _squared_error(omega, data):
    """Half the mean squared error of a linear model."""
    X, y = data
    return jnp.mean((contract("np,p->n", X, omega) - y) ** 2) / 2


@partial(jit_fast_compile, profile="trivial")
def _descents(key, problem, train):
    """Run `_descend` for a few runs."""
    key = jax.random.fold_in(key, 2)
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(DESCENT_RUNS))
    return jax.vmap(_descend, (0, None, None))(keys, problem, train)


def _descend(key, problem, train):
    """Meta-train one run by descent and exactly; compute both meta-gradients at the start."""
    data = sample(key, problem)
    tasks = Tasks(support=(data.X_t, data.y_t), query=(data.X_v, data.y_v))
    objective = maml(_squared_error, train)
    start = jnp.broadcast_to(problem.omega0, (problem.p,)).astype(data.X_t.dtype)
    Phi, r = meta_system(data, train)

    def meta_gradient(omega):
        return jax.grad(objective)(omega, tasks)

    # The gradient of |Phi omega - r|^2 / (2 N) is Phi^T (Phi omega - r) / N.
    exact = contract("np,n->p", Phi, contract("np,p->n", Phi, start) - r) / len(r)
    hessian = contract("np,nq->pq", Phi, Phi) / len(r)  # sets only the step size and the momentum
    omega, converged = _minimise(meta_gradient, hessian, start)
    return omega, minimiser(Phi, r, start).omega, converged, meta_gradient(start), exact


def _minimise(gradient, hessian, start):
    """Minimize a quadratic by Nesterov's method until the gradient has decreased by 1e-12.

    The rate is 1/largest curvature, the momentum follows from the condition number of the curved
    directions. Updates are combinations of gradients, so flat directions do not move.
    """
    curvature = jnp.linalg.eigvalsh(hessian)
    largest = curvature[-1]
    # Eigenvalues of flat directions are rounding errors, which would set the momentum to one.
    smallest = jnp.min(jnp.where(curvature > 1e-10 * largest, curvature, largest))
    root = jnp.sqrt(largest / smallest)
    # Nesterov's momentum for condition number k: (sqrt(k) - 1) / (sqrt(k) + 1).
    optimizer = optax.sgd(1 / largest, momentum=(root - 1) / (root + 1), nesterov=True)
    target = 1e-12 * jnp.linalg.norm(gradient(start))  # far below EXACT_LIMIT in the loss

    def unfinished(carry):
        step, _, _, slope = carry
        return (step < MAX_STEPS) & (jnp.linalg.norm(slope) > target)

    def step(carry):
        count, omega, state, slope = carry
        updates, state = optimizer.update(slope, state, omega)
        omega = optax.apply_updates(omega, updates)
        return count + 1, omega, state, gradient(omega)

    first = (0, start, optimizer.init(start), gradient(start))
    _, omega, _, slope = lax.while_loop(unfinished, step, first)
    return omega, jnp.linalg.norm(slope) <= target
