"""The anisotropic theory against the isotropic one, symmetries and simulation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from tests.helpers import assert_no_call_waits
from tests.internals import (
    CPU,
    MAX_UNCOMPRESSED,
    Pencil,
    PencilSystem,
    chain,
    compress,
    expand,
    isotropic_inputs,
    leading,
    marchenko_pastur,
    rule_moments,
    solve_and_linearize,
    solve_saddle,
    training_set,
)
from tests.internals import inputs as structured
from tests.internals import solver_solve as solve

pytestmark = pytest.mark.usefixtures("x64")

SIZES = dict(p=40, m=5, n_t=16, n_v=4, n_r=10, sigma=0.7, nu=1.0)
STEP = nm.GradientDescent(0.2)
POWER_LAW = np.arange(1, 41.0) ** -0.8


def isotropic(**changes):
    return nm.MixedLinearRegression(**(SIZES | dict(omega0=0.1) | changes))


def as_covariance(problem):
    """The same problem, with the identity as an explicit covariance."""
    return dataclasses.replace(problem, input_covariance=np.ones(problem.p))


def host_system(problem, rule, ridge=0.0):
    """The equations' system for the weight error in NumPy's arrays, which need no compilation."""
    weights = np.ones((1, problem.p))
    at, rule = structured.make_inputs(as_covariance(problem), rule, ridge, weights)
    return jax.tree.map(np.asarray, at.system(rule))


def bent(**changes):
    """A problem with a power-law spectrum."""
    return nm.MixedLinearRegression(**(SIZES | dict(input_covariance=POWER_LAW) | changes))


def slowly(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


RULES = [
    nm.GradientDescent(-0.4),
    nm.GradientDescent(0.15, 3),
    nm.Momentum(0.1, 0.8, 2, nesterov=True),
    nm.GradientDescent(nm.Schedule(np.array([0.3, -0.2])), 2),
    nm.Proximal(0.8),
]


@pytest.mark.parametrize("n_v", [4, slowly(14)])
@pytest.mark.parametrize("rule", [RULES[0], slowly(RULES[-1])])
def test_limit_with_identity_is_the_isotropic_one(rule, n_v):
    problem = isotropic(n_v=n_v)
    inputs, (rule,) = isotropic_inputs(problem, (rule,), 0.0, "auto")
    far = 1e12  # the same ratio p/n_t, no 1/p term in the spectrum
    plain = marchenko_pastur(far * problem.n_t, far * problem.p, jnp.float64)
    limit = rule_moments(dataclasses.replace(inputs, quadrature=plain), rule).limit
    found = structured.finite_size_means(host_system(problem, rule), False)
    np.testing.assert_allclose(found.limit[0], limit, rtol=1e-11)


def test_the_ridge_attenuation_is_the_isotropic_one():
    """s is one without ridge, and falls with it."""
    problem, rule = isotropic(), RULES[0]
    plain = marchenko_pastur(1e12 * problem.n_t, 1e12 * problem.p, jnp.float64)
    found = []
    for ridge in (0.0, 4.0, 400.0):
        inputs, (own,) = isotropic_inputs(problem, (rule,), ridge, "auto")
        inputs = jax.tree.map(np.asarray, (dataclasses.replace(inputs, quadrature=plain), own))
        saddle = solve_saddle(training_set(*inputs), True)
        system = host_system(problem, rule, ridge)
        found.append(expand(system, *solve_and_linearize(system, True)).ridge_attenuation)
        expected = leading(saddle.system, saddle.at)[2] ** 2
        np.testing.assert_allclose(found[-1], expected, rtol=1e-8)
    assert found[0] == pytest.approx(1) and found[0] > found[1] > found[2] > 0


@pytest.mark.parametrize("rule", [RULES[0], *map(slowly, RULES[1:])])
def test_next_order_with_identity_is_the_isotropic_one(rule):
    gaps = []
    for scale in (1, 1.5):
        sizes = {name: round(scale * SIZES[name]) for name in ("p", "n_t", "n_v")}
        problem = isotropic(**sizes, omega0=0.1 / scale**0.5)
        for ridge in (0.0, 4.0):
            ridge = jnp.array(ridge * scale)  # one program for both
            for of in (nm.theory.weight_error, nm.theory.train_task_error):
                one = of(problem, rule, meta_ridge=ridge)
                two = of(as_covariance(problem), rule, meta_ridge=ridge)
                gaps.append(abs(float(two / one) - 1))
    assert max(gaps) < 2e-3
    assert max(gaps[4:]) < 0.6 * max(gaps[:4])  # the gap falls as 1/p^2, to 4/9


@pytest.mark.slow
def test_scale_of_inputs():
    """Inputs c times as large, rates over c^2, task weights over c: the same predictions."""
    c = 3.0
    one = bent(omega0=0.1)
    two = bent(input_covariance=c**2 * POWER_LAW, nu=SIZES["nu"] / c, omega0=0.1 / c)
    first = nm.theory.test_loss(one, nm.GradientDescent(-0.5), STEP, meta_ridge=2.0)
    rules = nm.GradientDescent(-0.5 / c**2), nm.GradientDescent(0.2 / c**2)
    second = nm.theory.test_loss(two, *rules, meta_ridge=2.0 * c**2)
    np.testing.assert_allclose(first, second, rtol=1e-10)


def test_rotation():
    """A matrix covariance is its eigenvalues, in its own axes."""
    Q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 40)))
    omega0 = np.linspace(0, 0.2, 40)
    diagonal = bent(omega0=omega0, weight_covariance=np.linspace(0, 2, 40))
    rotated = bent(
        omega0=Q @ omega0,
        input_covariance=(Q * POWER_LAW) @ Q.T,
        weight_covariance=(Q * np.linspace(0, 2, 40)) @ Q.T,
    )
    rule = nm.GradientDescent(-0.5)
    one, two = (nm.theory.test_loss(x, rule, STEP, meta_ridge=1.0) for x in (diagonal, rotated))
    np.testing.assert_allclose(one, two, rtol=1e-9)


@pytest.mark.slow
def test_directions_without_input_stay_where_they_are():
    s = np.append(POWER_LAW[:30], np.zeros(10))
    padded = bent(input_covariance=s, omega0=0.2)
    short = nm.MixedLinearRegression(
        **(SIZES | dict(p=30, nu=(30 / 40) ** 0.5)), omega0=0.2, input_covariance=s[:30]
    )
    rule = nm.GradientDescent(-0.5)
    one, two = (nm.theory.weight_error(x, rule, meta_ridge=1.0) for x in (padded, short))
    np.testing.assert_allclose(one, two + 10 * 0.2**2, rtol=1e-10)


def test_compressed_sums():
    s = np.arange(1, 501.0) ** -1.2
    short = jax.tree.map(np.asarray, jax.jit(compress)(s, np.cos(s) + 2, s**0.5, s[None]))
    for f in (lambda x: 1 / (1 + 20 * x), lambda x: x * (1 - 3 * x) ** 2 / (0.1 + x)):
        whole, few = f(s), short.count * f(short.s)
        np.testing.assert_allclose(few.sum(), whole.sum(), rtol=1e-7)
        np.testing.assert_allclose(short.o @ few, (np.cos(s) + 2) @ whole, rtol=1e-6)
        np.testing.assert_allclose(short.d @ f(short.s), s**0.5 @ whole, rtol=1e-6)
        np.testing.assert_allclose(short.weights[0] @ few, s @ whole, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["power law", "levels"])
def test_long_spectra_are_compressed_without_loss(kind):
    p = 400
    s = np.arange(1, p + 1.0) ** -1.1
    s = s if kind == "power law" else np.where(np.arange(p) < 50, 1.0, 0.03)
    assert p > MAX_UNCOMPRESSED
    problem = bent(p=p, n_t=100, n_v=40, input_covariance=s, omega0=np.linspace(0, 0.1, p))
    weights = jnp.stack([s, s**3])
    found = structured.predict(problem, nm.GradientDescent(0.9), 0.0, weights)
    _, o, d, _ = problem.modes
    numbers = jnp.array([problem.m, problem.n_t, problem.n_v, problem.sigma, 0.0], float)
    forms = jnp.concatenate([s[None], weights])
    system = PencilSystem(s, jnp.ones(p), o, d, forms, *numbers, chain(jnp.array(0.9)))
    whole = jax.jit(lambda system: structured.finite_size_means(system, False))(system)
    np.testing.assert_allclose(found.forms, whole.forms, rtol=2e-6)
    np.testing.assert_allclose(found.task_error, whole.task_error, rtol=2e-6)


SPIKED = np.append([20.0, 8.0], np.ones(38))
CASES = [
    (dict(omega0=0.2), nm.GradientDescent(-0.5), 2.0),
    slowly(dict(n_v=14, input_covariance=SPIKED), nm.GradientDescent(0.04), 0.0),
    slowly(dict(n_v=14, omega0=0.2), nm.GradientDescent(0.3, 2), 5.0),
    slowly(dict(omega0=0.2), nm.Proximal(0.3), 0.0),
    slowly(dict(n_v=14, omega0=0.2), nm.GradientFlow(-0.5), 0.0),
]


@pytest.mark.parametrize(("changes", "rule", "ridge"), CASES)
def test_against_simulation(changes, rule, ridge):
    problem, key = bent(**changes), jax.random.key(0)
    result = nm.simulate(key, problem, rule, STEP, runs=600, meta_ridge=ridge)
    losses = np.asarray(result.test_loss)
    predicted = float(nm.theory.test_loss(problem, rule, STEP, meta_ridge=ridge))
    assert abs(losses.mean() - predicted) < 4 * losses.std(ddof=1) / losses.size**0.5


@pytest.mark.slow
def test_derivatives():
    s = jnp.asarray(POWER_LAW)

    def loss(rate, sigma, tilt, ridge):
        problem = bent(sigma=sigma, input_covariance=s ** (1 + tilt))
        return nm.theory.test_loss(problem, nm.GradientDescent(rate), STEP, meta_ridge=ridge)

    at, step = jnp.array([-0.3, 0.7, 0.1, 2.0]), 1e-4
    flat = jax.jit(lambda x: loss(*x))
    gradient = jax.jit(jax.grad(flat))
    by_hand = [(flat(at + e) - flat(at - e)) / (2 * step) for e in step * jnp.eye(4)]
    np.testing.assert_allclose(gradient(at), by_hand, rtol=1e-6)
    second = jax.jit(jax.jvp, static_argnums=0)(gradient, (at,), (jnp.eye(4)[0],))[1]
    e = step * jnp.eye(4)[0]
    np.testing.assert_allclose(
        second, (gradient(at + e) - gradient(at - e)) / (2 * step), rtol=1e-5
    )


@pytest.mark.slow
def test_batches_of_rules_in_blocks():
    rates = np.linspace(-2, 2, CPU.pencils + 3)
    many = nm.theory.weight_error(bent(), nm.GradientDescent(rates))
    few = nm.theory.weight_error(bent(), nm.GradientDescent(rates[[0, -1]]))
    np.testing.assert_allclose(many[jnp.array([0, -1])], few, rtol=1e-12)


def test_infinite_at_as_many_rows_as_directions():
    problem = bent(n_v=8)
    assert problem.rows == problem.p
    assert nm.theory.weight_error(problem, STEP) == np.inf
    assert np.isfinite(nm.theory.weight_error(problem, STEP, meta_ridge=1.0))
    with pytest.raises(ValueError, match="meta_ridge"):
        nm.theory.best_train_rate(problem)


def hard_systems(count):
    """Condition numbers to 1e8, spikes, n_t from 1, n_v m/p from 1e-3 to 1e3, rates to 5/s_max."""
    rng, k = np.random.default_rng(0), 24
    for _ in range(count):
        kind = rng.integers(3)
        s = 10 ** -rng.uniform(0, 8, k)
        if kind:
            s = np.arange(1, k + 1.0) ** -rng.uniform(0, 5) if kind == 1 else np.ones(k)
        if kind == 2:
            s[:2] = 10 ** rng.uniform(0, 3, 2)
        number = np.full(k, rng.choice([1.0, 40.0]))
        p = number.sum()
        n_t = rng.choice([1.0, np.round(10 ** rng.uniform(0, np.log10(p) + 1))])
        m = np.round(10 ** rng.uniform(0.4, 3))
        n_v = max(1.0, np.round(10 ** rng.uniform(-3, 3) * p / m))
        rate = rng.uniform(-5, 5) / s.max()
        yield s, number, m, n_t, n_v + (n_v * m == p), rate


def test_roots_are_found_everywhere():
    def found(s, number, m, n_t, n_v, rate):
        flat = jnp.ones_like(s)
        system = PencilSystem(s, number, flat, flat, s[None], m, n_t, n_v, 1.0, 0.0, chain(rate))
        return solve(system, False)

    columns = [jnp.asarray(np.array(x)) for x in zip(*hard_systems(60), strict=True)]
    root = jax.jit(lambda x: jax.lax.map(lambda one: found(*one), x))(columns)
    assert np.all(root.converged)
    assert np.all(root.T[:, 0, 0] >= 0) and np.all(root.T[:, 1, 1] <= 0)
    assert np.all(root.ell >= 0) and np.all(root.tau >= 0)


def test_a_flow_is_nearly_a_polynomial():
    for time in (-0.7, 0.0, 1.5):
        flow = nm.GradientFlow(time)
        pencil, error, x = (
            flow.spectral().pencil(2.0),
            float(flow.spectral().pencil_error(2.0)),
            np.linspace(0, 2, 7),
        )
        errors = [filter_squared(pencil, value) ** 0.5 - flow.init_filter(value) for value in x]
        assert np.max(np.abs(errors)) <= error * np.max(flow.init_filter(x)) + 1e-12
        assert error < 0.005 and abs(errors[0]) < 1e-12


def filter_squared(pencil, x):
    """The pencil at S = x with all variables but omega eliminated: the squared filter."""
    form = pencil.constant + x * pencil.coupling + np.diag(np.eye(len(pencil.points))[-1])
    return form[0, 0] - form[0, 1:] @ np.linalg.solve(form[1:, 1:], form[1:, 0])


def test_pencils():
    """Eliminating all variables but omega at S = x leaves the square of the filter."""
    x = 0.37
    for rule in RULES:
        # One program for each rule: its operations one by one would be as many programs.
        pencil, filter_ = jax.jit(lambda rule: (rule.spectral().pencil(1.0), rule.init_filter(x)))(
            rule
        )
        np.testing.assert_allclose(filter_squared(pencil, x), filter_**2, rtol=1e-12)
    assert isinstance(STEP.spectral().pencil(1.0), Pencil)


@pytest.mark.slow
def test_best_rates_and_ridge():
    problem = bent(n_v=6, omega0=0.1)
    best, adapt = nm.theory.best_rates(problem)

    def loss(train, rate, ridge=0.0):
        rules = nm.GradientDescent(train), nm.GradientDescent(rate)
        return nm.theory.test_loss(problem, *rules, meta_ridge=ridge)

    grid = np.linspace(-6, 6, 61)
    losses = loss(grid, np.linspace(-1, 3, 41))
    lowest = float(loss(best, adapt))
    assert lowest <= losses.min() + 1e-9
    assert losses.min() < lowest + 2e-3  # the grid comes close
    rule = nm.GradientDescent(0.3)
    ridge = nm.theory.best_meta_ridge(problem, rule, adapt=STEP)
    values = [float(loss(0.3, 0.2, ridge * factor)) for factor in (0.9, 1, 1.1)]
    assert values[1] == min(values)


@pytest.mark.slow
def test_best_of_other_rules_at_test_time():
    problem, train = bent(n_v=6), nm.GradientDescent(-0.3)
    best = nm.theory.best_adapt_rate(problem, train, nm.GradientDescent(0.0, 2))
    values = [
        float(nm.theory.test_loss(problem, train, nm.GradientDescent(best + move, 2)))
        for move in (-0.05, 0, 0.05)
    ]
    assert values[1] == min(values)


def test_errors_for_features_without_covariances():
    problem = bent()
    for call, error, match in (
        (lambda: nm.theory.weight_error(problem, nm.GradientFlow(9.0)), ValueError, "polynomial"),
        (lambda: nm.theory.weight_error(problem, STEP, method="expansion"), ValueError, "method"),
        (lambda: nm.theory.train_task_error(problem, STEP, measure="exact"), ValueError, "measure"),
        (
            lambda: nm.theory.weight_error(problem, nm.Preconditioned(0.1, np.ones(40))),
            ValueError,
            "P S",
        ),
        (lambda: nm.theory.required_runs(problem, STEP, STEP), ValueError, "covariances"),
        (lambda: nm.theory.weight_error(problem, STEP, meta_ridge=-1.0), ValueError, "meta_ridge"),
        (
            lambda: nm.theory.phase_diagram(9, 2, 3, 4, 1, 1, input_covariance=np.ones((2, 3))),
            ValueError,
            "input_covariance",
        ),
    ):
        with pytest.raises(error, match=match):
            call()


def structured_loss(steps):
    problem = nm.MixedLinearRegression(
        p=40, m=3, n_t=20, n_v=6, n_r=10, sigma=0.5, nu=1.0,
        input_covariance=np.arange(1.0, 41) ** -1,
    )  # fmt: skip

    def loss(rate, sigma):
        own = dataclasses.replace(problem, sigma=sigma)
        return nm.theory.test_loss(own, nm.GradientDescent(rate, steps), nm.GradientDescent(0.2))

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, slowly(3)])
def test_a_vmap_is_a_loop_of_blocks(steps):
    """More rates than one block need no large arrays, and no linear algebra that can wait."""
    rates, sigmas = jnp.linspace(-0.5, 0.5, 50), jnp.array([0.2, 0.5])
    loss = structured_loss(steps)
    both = jax.vmap(jax.vmap(loss, (0, None)), (None, 0))
    assert_no_call_waits(both, rates, sigmas)
    if steps == 1:
        found = jax.jit(both)(rates, sigmas)
        alone = [loss(rates[i], sigma) for i, sigma in ((7, 0.2), (49, 0.5))]
        np.testing.assert_allclose([found[0, 7], found[1, 49]], alone, rtol=1e-4)


@pytest.mark.slow
def test_slopes_in_a_vmap():
    loss, rates = structured_loss(1), jnp.linspace(-0.5, 0.5, 70)
    slopes = jax.jit(jax.vmap(jax.grad(loss), (0, None)))(rates, 0.5)
    np.testing.assert_allclose(slopes[60], jax.grad(loss)(rates[60], 0.5), rtol=1e-3)


@pytest.mark.parametrize("steps", (1, 2))
def test_a_rate_whose_filter_vanishes_at_every_eigenvalue_has_a_root(steps, x64):
    sizes = dict(p=32, m=3, n_t=14, n_v=5, n_r=10, sigma=0.5, nu=1.0)
    problem = nm.MixedLinearRegression(**sizes, input_covariance=np.ones(32))
    at, near = (
        structured.finite_size_means(
            host_system(problem, nm.GradientDescent(rate, steps)), False
        ).forms[0]
        for rate in (1.0, 0.99)
    )
    assert float(at) == pytest.approx(float(near), rel=0.01)


def test_the_task_error_does_not_depend_on_the_forms_asked_for():
    problem = bent(n_v=7, omega0=0.2)  # near n_v m = p, where the resummation matters
    weights = np.stack([POWER_LAW, POWER_LAW**3])
    errors = [
        structured.predict(problem, STEP, 0.0, scale * weights).task_error for scale in (1.0, 1e3)
    ]
    np.testing.assert_allclose(*errors, rtol=1e-12)
