"""Six roads to one number: they have to meet within their stated errors."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from negmaml import theory
from negmaml._core.arrays import contract, settled
from negmaml._core.checks import check_count
from negmaml._core.display import Table
from negmaml._core.jit import quick_jit
from negmaml._core.keys import check_key, key_of
from negmaml._core.settings import own_settings
from negmaml.linear.data import sample
from negmaml.linear.simulation import simulate
from negmaml.linear.solve import minimiser
from negmaml.linear.system import meta_system
from negmaml.meta import Tasks, maml
from negmaml.problem.adapted_loss import adapted, expected_test_loss
from negmaml.problem.model import MixedLinearRegression, check_problem
from negmaml.rules import Rule, check_scalar_rule
from negmaml.theory.anisotropic import inputs as structured
from negmaml.theory.api import evaluate

Z_LIMIT = 4.0  # standard errors; a right road fails once in 16,000
EXACT_LIMIT = 1e-6  # relative; float64 roads that compute the same number
SAMPLED_RUNS = 100  # each simulates 100 tasks; differences are paired, so these are enough
DESCENT_RUNS = 4
MAX_STEPS = 200_000


class Road(NamedTuple):
    """One road to the test loss, next to the one it is compared with.

    value, error: the number and its standard error (0 when exact given the data).
    reference: what it is compared with, on the same data where both see data.
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
        """Whether the road meets its reference; a road that does not apply cannot disagree."""
        return self.kind == "skipped" or abs(self.deviation) <= self.limit

    @property
    def verdict(self) -> str:
        """The deviation in words, whether it is too large, and the note."""
        what = {"z": f"z = {self.deviation:+.2f}", "relative": f"{self.deviation:.1e} relative"}
        mark = "" if self.agrees else "  DISAGREES"
        note = f"  ({self.note})" if self.note else ""
        return what.get(self.kind, "not applicable") + mark + note


class Verification(NamedTuple):
    """The roads of `verify` and their verdict; print it for a table."""

    roads: tuple[Road, ...]

    @property
    def agrees(self) -> bool:
        """Whether every road that applies meets its reference."""
        return all(road.agrees for road in self.roads)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        rows = [
            (
                road.name,
                f"{road.value:.6g}",
                f"{road.error:.1e}",
                f"{road.reference:.6g}",
                road.verdict,
            )
            for road in self.roads
        ]
        title = "all roads agree" if self.agrees else "the roads DISAGREE"
        return Table(title, rows, ("road", "value", "error", "reference", "deviation")).html()

    def __str__(self) -> str:
        width = max(len(road.name) for road in self.roads)
        lines = [f"{'road':<{width}}  {'value':>11}  {'error':>8}  {'reference':>11}  deviation"]
        for road in self.roads:
            numbers = f"{road.value:>11.6g}  {road.error:>8.1e}  {road.reference:>11.6g}"
            lines.append(f"{road.name:<{width}}  {numbers}  {road.verdict}")
        lines.append("all roads agree" if self.agrees else "the roads DISAGREE")
        return "\n".join(lines)


@own_settings
def verify(
    problem: MixedLinearRegression, train: Rule, adapt: Rule, *, key: Any = None, runs: int = 1000
) -> Verification:
    r"""Compute the test loss of one problem along six roads and compare them, in float64.

    1. exact solve, expected evaluation: `simulate`, the reference of the next three;
    2. theory: `theory.weight_error`, allowed the square of its 1/p term, relative to the limit;
    3. theory: `theory.weight_error` by expansion, allowed the size of its next order;
    4. exact solve, sampled evaluation: the paper's protocol, on the first 100 of these runs;
    5. meta-training by gradient descent (optax, autodiff meta-gradient) until converged, against
       the exact solve on the same data;
    6. the meta-gradient by automatic differentiation against Phi^T (Phi omega - r) / N.

    Arguments:
        train, adapt: rules with scalar parameters. Roads 5 and 6 apply to rules that move any
            model by updates in training, 3 to one gradient step, 2 and 3 away from p = n_v m and
            to rules that act by the spectrum alone; otherwise they are marked as not applicable.
        key: a JAX key, jax.random.key(0) when left out.
        runs: simulated runs, at least 2.

    Returns a `Verification`. Raises TypeError or ValueError for rules that are not scalar, for
    runs < 2, and at p = n_v m, where every mean is infinite.
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
    with jax.enable_x64(True):
        key = key_of(0) if key is None else key
        problem, train, adapt = settled((problem, train, adapt), np.float64)
        expected, sampled = (
            np.asarray(simulate(key, problem, train, adapt, runs=n, evaluation=e).test_loss)
            for n, e in ((runs, "expected"), (min(runs, SAMPLED_RUNS), "sampled"))
        )
        mean, error = _mean_and_error(expected)
        reference = Road("exact solve, expected", mean, error, mean, "z", 0.0, Z_LIMIT)
        return Verification(
            (
                reference,
                _proportional_road(problem, train, adapt, mean, error),
                _expansion_road(problem, train, adapt, mean, error),
                _sampled_road(expected[: sampled.size], sampled),
                *_autodiff_roads(key, problem, train, adapt),
            )
        )


def _mean_and_error(values) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / values.size**0.5)


def _ratio(difference: float, scale: float) -> float:
    """difference / scale, where no difference is 0 on every scale."""
    return difference / scale if scale else (np.inf if difference else 0.0)


def _proportional_road(problem, train, adapt, mean: float, error: float) -> Road:
    name = "theory, proportional"
    try:
        excess, limit, floor = _predicted(problem, train, adapt)
    except (ValueError, TypeError) as reason:
        return _skipped(name, str(reason).split(":")[0])
    correction = abs(_ratio(excess - limit, limit))
    if not np.isfinite(correction):
        return _skipped(name, "the mean is infinite at this size")
    if correction >= 0.5:
        return _skipped(name, f"its 1/p term is {correction:.2g} of the limit at this size")
    omitted = limit * correction**2 / (1 - correction)
    return _theory_road(name, floor + excess, omitted, mean, error)


def _predicted(problem, train, adapt) -> tuple[float, float, float]:
    """Test loss in excess of what w0 itself leaves: predicted, its limit; and what w0 leaves."""
    if problem.isotropic:
        found = evaluate(problem, train, 0.0, "auto")
        floor, *losses = (
            float(expected_test_loss(problem, x, adapt)) for x in (0.0, found.distance, found.limit)
        )
    else:
        after = adapted(problem, adapt)
        forms = structured.predict(problem, train, 0.0, after.weights)
        floor, losses = float(after.floor), [after.test_loss(x) for x in (forms.forms, forms.limit)]
    excess, limit = (float(loss - floor) for loss in losses)
    return excess, limit, float(floor)


def _expansion_road(problem, train, adapt, mean: float, error: float) -> Road:
    name = "theory, expansion"
    try:
        distance = theory.weight_error(problem, train, method="expansion")
    except ValueError as reason:
        return _skipped(name, str(reason).split(", got")[0].split(";")[0])
    rho = float(theory.expansion_parameter(problem, train))
    if rho >= 0.5:  # the terms left out would be as large as those kept
        return _skipped(name, f"no expansion at this size: its parameter is {rho:.2g}")
    # The terms left out are exact for the label noise at alpha_t = 0.
    value, more = (
        float(expected_test_loss(problem, float(distance) * x, adapt)) for x in (1, 1 / (1 - rho))
    )
    return _theory_road(name, value, more - value, mean, error)


def _theory_road(name, value: float, truncation: float, mean: float, error: float) -> Road:
    excess = max(abs(value - mean) - truncation, 0.0)
    note = f"next order up to {truncation:.1e}"
    z = _ratio(float(np.copysign(excess, value - mean)), error)
    return Road(name, value, 0.0, mean, "z", z, Z_LIMIT, truncation, note)


def _sampled_road(expected, sampled) -> Road:
    """Sampled minus expected evaluation of the same runs: the paired difference is the test."""
    mean, error = _mean_and_error(sampled)
    gap, gap_error = _mean_and_error(sampled - expected)
    z = _ratio(gap, gap_error)
    return Road("exact solve, sampled", mean, error, float(expected.mean()), "z", z, Z_LIMIT)


def _autodiff_roads(key, problem, train, adapt) -> tuple[Road, Road]:
    names = "meta-training (optax)", "meta-gradient, autodiff"
    if not train.moves_any_model or train.implicit:
        reason = f"{type(train).__name__} has no gradient steps to differentiate through"
        return _skipped(names[0], reason), _skipped(names[1], reason)
    results = jax.device_get(_descents(key, problem, train))
    descended, solved, converged, gradient, exact = results
    losses, references = (
        np.asarray(_loss_of(problem, omega, adapt)) for omega in (descended, solved)
    )
    relative = _ratio(float(np.max(np.abs(losses - references))), float(references.min()))
    note = "" if bool(converged.all()) else f"not converged in {MAX_STEPS} steps"
    mean, error = _mean_and_error(losses)
    descent = Road(
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
    return descent, Road(names[1], size, 0.0, exact_size, "relative", relative, EXACT_LIMIT)


def _loss_of(problem, omega, adapt):
    """The expected test loss of weights (..., p)."""
    if problem.isotropic:
        return expected_test_loss(problem, np.sum((omega - np.asarray(problem.w0)) ** 2, -1), adapt)
    after = adapted(problem, adapt)
    return after.test_loss(after.forms(omega - problem.w0))


def _skipped(name: str, reason: str) -> Road:
    return Road(name, np.nan, 0.0, np.nan, "skipped", 0.0, 0.0, note=reason)


def _squared_error(omega, data):
    """Half the mean squared error of a linear model."""
    X, y = data
    return jnp.mean((contract("np,p->n", X, omega) - y) ** 2) / 2


@partial(quick_jit, work="trivial")
def _descents(key, problem, train):
    """`_descend` of a few runs."""
    key = jax.random.fold_in(key, 2)
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(DESCENT_RUNS))
    return jax.vmap(_descend, (0, None, None))(keys, problem, train)


def _descend(key, problem, train):
    """Meta-train one run by descent; solve it exactly; both meta-gradients at the start."""
    data = sample(key, problem)
    tasks = Tasks(support=(data.X_t, data.y_t), query=(data.X_v, data.y_v))
    objective = maml(_squared_error, train)
    start = jnp.broadcast_to(problem.omega0, (problem.p,)).astype(data.X_t.dtype)
    Phi, r = meta_system(data, train)

    def meta_gradient(omega):
        return jax.grad(objective)(omega, tasks)

    exact = contract("np,n->p", Phi, contract("np,p->n", Phi, start) - r) / len(r)
    hessian = contract("np,nq->pq", Phi, Phi) / len(r)  # says how far a step may go, no more
    omega, converged = _minimise(meta_gradient, hessian, start)
    return omega, minimiser(Phi, r, start).omega, converged, meta_gradient(start), exact


def _minimise(gradient, hessian, start):
    """Nesterov's descent on a quadratic until the gradient has fallen by twelve digits.

    Rate 1/largest curvature and momentum from the condition number of the curved directions;
    updates are combinations of gradients, so flat directions stay where they started.
    """
    curvature = jnp.linalg.eigvalsh(hessian)
    largest = curvature[-1]
    smallest = jnp.min(jnp.where(curvature > 1e-10 * largest, curvature, largest))
    root = jnp.sqrt(largest / smallest)
    optimizer = optax.sgd(1 / largest, momentum=(root - 1) / (root + 1), nesterov=True)
    target = 1e-12 * jnp.linalg.norm(gradient(start))

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
