"""Simulation against dense NumPy, against itself under other sizes, and against the theory."""

import dataclasses
from itertools import product

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml import linear, theory
from tests.helpers import OVER, UNDER, mostly_slow, z_score
from tests.internals import RunPlan, expected_test_loss
from tests.internals import evaluate as evaluation
from tests.internals import simulation as module
from tests.linear.dense import dense_system

# By route: far from square the amortised one, near square and with one task the general one.
PROBLEMS = {
    "over": nm.MixedLinearRegression(p=8, m=2, n_t=5, n_v=2, n_r=6, sigma=0.5, nu=0.7),
    "under": nm.MixedLinearRegression(p=4, m=5, n_t=3, n_v=3, n_r=6, sigma=0.5, nu=0.7),
    "near": nm.MixedLinearRegression(p=8, m=2, n_t=5, n_v=3, n_r=6, sigma=0.5, nu=0.7),
    "one task": nm.MixedLinearRegression(p=8, m=1, n_t=5, n_v=2, n_r=6, sigma=0.5, nu=0.7),
}
PROBLEMS = {
    name: dataclasses.replace(problem, w0=0.3, omega0=np.linspace(-1, 1, problem.p))
    for name, problem in PROBLEMS.items()
}
RATES = np.array([-0.6, 0.0, 0.3])
ADAPT = nm.GradientDescent(np.array([-0.2, 0.4]))
KEY = jax.random.key(11)
draw = jax.jit(linear.sample)


def run_key(key, index):
    """The key of the data of one run, by address."""
    return jax.random.fold_in(key, 2 * index)


def dense_distances(problem, rule_of, runs, ridge=0.0, train_train=False):
    """|omega* - w0|^2, (rates, runs), from the definition and `linear.sample`."""
    distances = np.empty((len(RATES), runs))
    for i in range(runs):
        data = draw(run_key(KEY, i), problem)
        if train_train:
            data = linear.Data(data.X_t, data.y_t, data.X_t, data.y_t)
        for k, rate in enumerate(RATES):
            Phi, r = dense_system(data, rule_of(rate))
            residual = r - Phi @ problem.omega0
            if ridge:
                matrix = Phi.T @ Phi + ridge * np.eye(problem.p)
                step = np.linalg.solve(matrix, Phi.T @ residual)
            else:
                step = np.linalg.pinv(Phi) @ residual
            distances[k, i] = np.sum((problem.omega0 + step - problem.w0) ** 2)
    return distances


def dense_losses(problem, distances):
    """Section 3 of the theory for one step, written out: (rates, adapt rates, runs)."""
    p, n_r, a = problem.p, problem.n_r, ADAPT.rate[:, None]
    h = (1 - a) ** 2 + a**2 * (p + 1) / n_r
    spread = problem.nu**2 + distances[:, None, :]
    return problem.sigma**2 / 2 * (1 + a**2 * p / n_r) + h / 2 * spread


@pytest.fixture
def set_plan(monkeypatch):
    """Simulate by another plan than that of the platform."""

    def replace(plan):
        program = jax.jit(lambda experiment: module._simulate_in_blocks(experiment, plan))
        monkeypatch.setattr(module, "_simulate_few", program)

    return replace


class TestAgainstDense:
    @pytest.mark.parametrize(
        ("name", "ridge"), mostly_slow(list(product(PROBLEMS, (0.0, 0.7))), 0, 2, 5)
    )
    def test_one_step_runs_are_those_of_dense_algebra(self, x64, name, ridge):
        problem = PROBLEMS[name]
        result = nm.simulate(
            KEY, problem, nm.GradientDescent(RATES), ADAPT, runs=3, meta_ridge=ridge
        )
        distances = dense_distances(problem, nm.GradientDescent, 3, ridge)
        np.testing.assert_allclose(result.weight_error, distances, rtol=1e-8)
        np.testing.assert_allclose(result.test_loss, dense_losses(problem, distances), rtol=1e-8)
        assert result.well_conditioned.all()

    @pytest.mark.parametrize(
        "rule_of",
        mostly_slow(
            [lambda a: nm.GradientDescent(a, 3), nm.GradientFlow, lambda a: nm.Proximal(a + 2)], 0
        ),
        ids=["three steps", "flow", "proximal"],
    )
    def test_other_rules_are_those_of_dense_algebra(self, x64, rule_of):
        problem = PROBLEMS["under"]
        result = nm.simulate(KEY, problem, rule_of(RATES), ADAPT, runs=3)
        distances = dense_distances(problem, rule_of, 3)
        np.testing.assert_allclose(result.weight_error, distances, rtol=1e-8)

    def test_outer_loss_on_training_points_is_that_of_dense_algebra(self, x64):
        problem = PROBLEMS["under"]
        train = nm.GradientDescent(RATES)
        result = nm.simulate(KEY, problem, train, ADAPT, runs=3, split="train-train")
        distances = dense_distances(problem, nm.GradientDescent, 3, train_train=True)
        np.testing.assert_allclose(result.weight_error, distances, rtol=1e-8)

    def test_adaptation_by_another_rule_is_its_expected_loss(self, x64):
        problem, adapt = PROBLEMS["over"], nm.GradientFlow(-0.4)
        result = nm.simulate(KEY, problem, nm.GradientDescent(RATES), adapt, runs=3)
        distances = dense_distances(problem, nm.GradientDescent, 3)
        expected = expected_test_loss(problem, distances, adapt)
        np.testing.assert_allclose(result.test_loss, expected, rtol=1e-8)


@pytest.mark.parametrize("evaluation", ["expected", "sampled"])
@pytest.mark.parametrize("adapt_shape", [(), (2,)])
@pytest.mark.parametrize("train_shape", [(), (3,), (3, 4)])
def test_shapes_are_train_then_adapt_then_runs(train_shape, adapt_shape, evaluation):
    train, adapt = (nm.GradientDescent(np.zeros(shape)) for shape in (train_shape, adapt_shape))
    result = jax.eval_shape(
        lambda key: nm.simulate(key, PROBLEMS["over"], train, adapt, runs=5, evaluation=evaluation),
        KEY,
    )
    chex.assert_shape(result.test_loss, (*train_shape, *adapt_shape, 5))
    chex.assert_shape(result.weight_error, (*train_shape, 5))
    chex.assert_shape(result.well_conditioned, (*train_shape, 5))
    chex.assert_type(list(result), [jnp.float32, jnp.float32, bool])


class TestSharedRandomness:
    # One and two runs at a time, and as accelerators do.
    @pytest.mark.parametrize(
        ("shape", "panel"), mostly_slow([((7, 1, 1), 0), ((4, 2, 1), 4), ((2, 1, 4), 2)], 1)
    )
    def test_first_runs_of_a_longer_simulation_are_those_of_a_shorter(
        self, x64, set_plan, shape, panel
    ):
        train = nm.GradientDescent(RATES)
        short = nm.simulate(KEY, PROBLEMS["over"], train, ADAPT, runs=3)
        set_plan(RunPlan(shape, panel))
        long = nm.simulate(KEY, PROBLEMS["over"], train, ADAPT, runs=7)
        for here, there in zip(short[:2], long[:2], strict=True):
            np.testing.assert_allclose(here, there[..., :3], rtol=1e-10)
        assert np.unique(long.weight_error[0]).size == 7

    @pytest.mark.slow
    def test_block_size_does_not_change_sampled_evaluation(self, x64, set_plan):
        problem, train = PROBLEMS["over"], nm.GradientDescent(0.1)
        one = nm.simulate(KEY, problem, train, ADAPT, runs=5, evaluation="sampled")
        set_plan(RunPlan((5, 1, 1), 0))
        other = nm.simulate(KEY, problem, train, ADAPT, runs=5, evaluation="sampled")
        np.testing.assert_allclose(one.test_loss, other.test_loss, rtol=1e-10)

    @pytest.mark.slow
    def test_test_tasks_are_not_those_of_training(self, x64, monkeypatch):
        """With the sizes and rule of training, whose tasks the weights fit without an error."""
        monkeypatch.setattr(evaluation, "TEST_TASKS", 8)
        monkeypatch.setattr(evaluation, "TEST_POINTS", 3)
        problem = nm.MixedLinearRegression(p=40, m=8, n_t=5, n_v=3, n_r=5, sigma=0.5, nu=0.7)
        rule = nm.GradientDescent(0.2)
        options = dict(runs=5, evaluation="sampled")
        result = nm.simulate(KEY, problem, rule, rule, **options)
        assert (result.test_loss > 0.1).all()
        still = nm.simulate(KEY, problem, rule, rule, meta_ridge=1e12, **options)  # zero weights
        assert np.unique(still.test_loss.round(6)).size == 5  # each run has tasks of its own

    @pytest.mark.parametrize("name", ["over", "near"])
    def test_order_of_rates_does_not_change_their_losses(self, x64, name):
        order = np.array([2, 0, 1])
        here, there = (
            nm.simulate(KEY, PROBLEMS[name], nm.GradientDescent(rates), ADAPT, runs=3).test_loss
            for rates in (RATES, RATES[order])
        )
        np.testing.assert_allclose(there, here[order], rtol=1e-10)

    def test_other_rates_do_not_change_the_losses_of_a_rate(self, x64):
        together, alone = (
            nm.simulate(KEY, PROBLEMS["over"], nm.GradientDescent(rates), ADAPT, runs=3).test_loss
            for rates in (RATES, RATES[2])
        )
        np.testing.assert_allclose(alone, together[2], rtol=1e-10)

    def test_another_key_gives_other_runs(self):
        results = [
            nm.simulate(
                jax.random.key(seed), PROBLEMS["over"], nm.GradientDescent(RATES), ADAPT, runs=3
            )
            for seed in (0, 1)
        ]
        assert np.abs(results[0].weight_error - results[1].weight_error).min() > 1e-4


class TestOuterLossOnTrainingPoints:
    def test_wide_minimiser_does_not_depend_on_the_training_rate(self, x64):
        # Phi = (I - a K) X and r = (I - a K) y: the factor cancels when Phi has full row rank.
        problem = dataclasses.replace(PROBLEMS["over"], n_t=3)
        result = nm.simulate(
            KEY, problem, nm.GradientDescent(RATES), ADAPT, runs=3, split="train-train"
        )
        expected = np.broadcast_to(result.weight_error[1], (3, 3))
        np.testing.assert_allclose(result.weight_error, expected, rtol=1e-6)

    def test_rows_are_those_of_the_training_points(self):
        # (1 - n_t m / p) of the starting offset remains without noise and spread.
        problem = dataclasses.replace(PROBLEMS["over"], n_t=3, sigma=0.0, nu=0.0)
        train = nm.GradientDescent(0.0)
        distance = nm.simulate(
            KEY, problem, train, ADAPT, runs=1000, split="train-train"
        ).weight_error
        exact = float(problem.offset_squared) * (1 - 6 / 8)
        assert abs(z_score(np.asarray(distance, float), exact)) < 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["over", "under"])
def test_sampled_evaluation_agrees_in_mean_with_the_expected_one(name):
    train = nm.GradientDescent(np.float32(-0.3))
    expected, sampled = (
        np.asarray(nm.simulate(KEY, PROBLEMS[name], train, ADAPT, runs=100, evaluation=e).test_loss)
        for e in ("expected", "sampled")
    )
    for k in range(2):
        assert abs(z_score(sampled[k] - expected[k], 0.0)) < 4
        assert np.std(sampled[k] - expected[k]) > 0


class TestNearThreshold:
    SQUARE = nm.MixedLinearRegression(p=6, m=2, n_t=5, n_v=3, n_r=4, sigma=0.5, nu=0.7)

    def test_two_dimensions_above_the_threshold_float32_is_finite_and_right(self):
        problem = dataclasses.replace(self.SQUARE, p=8)
        train = nm.GradientDescent(RATES)
        single = nm.simulate(KEY, problem, train, ADAPT, runs=50)
        assert np.isfinite(single.test_loss).all()
        assert single.well_conditioned.all()
        with jax.enable_x64(True):
            double = [
                dense_distance(
                    jax.tree.map(np.float64, draw(run_key(KEY, i), cast32(problem))), problem, rate
                )
                for rate in RATES
                for i in range(50)
            ]
        np.testing.assert_allclose(single.weight_error.ravel(), double, rtol=1e-2)

    def test_at_the_threshold_every_run_that_is_not_finite_is_flagged(self):
        result = nm.simulate(KEY, self.SQUARE, nm.GradientDescent(RATES), ADAPT, runs=50)
        chex.assert_shape(result.test_loss, (3, 2, 50))
        assert not (result.well_conditioned & ~np.isfinite(result.weight_error)).any()
        assert result.well_conditioned.mean() > 0.9

    def test_a_system_without_data_is_flagged(self, x64):
        # Proximal adaptation of strength zero fits every task: Phi vanishes when n_t >= p.
        full = dataclasses.replace(PROBLEMS["over"], n_t=9)
        assert not nm.simulate(KEY, full, nm.Proximal(0.0), ADAPT, runs=3).well_conditioned.any()


def cast32(problem):
    """The problem in float32 whatever the default, to draw the same numbers."""
    return jax.tree.map(np.float32, problem)


def dense_distance(data, problem, rate):
    Phi, r = dense_system(data, nm.GradientDescent(rate))
    return np.sum((np.linalg.pinv(Phi) @ r) ** 2)


def mean_loss(point, name, steps):
    """Mean test loss of three runs as a function of every number."""
    problem = PROBLEMS[name]
    omega0 = problem.omega0 + point["start"] * np.arange(1.0, problem.p + 1)
    problem = dataclasses.replace(problem, sigma=point["sigma"], nu=point["nu"], omega0=omega0)
    train = nm.GradientDescent(point["train"], steps=steps)
    adapt = nm.GradientDescent(point["adapt"])
    return nm.simulate(
        KEY, problem, train, adapt, runs=3, meta_ridge=point["meta_ridge"]
    ).test_loss.mean()


value_and_slopes = jax.jit(jax.value_and_grad(mean_loss), static_argnums=(1, 2))
POINT = {"train": -0.3, "adapt": 0.2, "sigma": 0.5, "nu": 0.7, "start": 0.4, "meta_ridge": 0.0}


class TestDerivatives:
    """Derivatives of the mean test loss at one key against differences."""

    @pytest.mark.parametrize("ridge", mostly_slow([0.0, 0.5], 1))
    @pytest.mark.parametrize(
        ("name", "steps"),
        [("over", 1), ("under", 1), ("near", 1), pytest.param("under", 2, marks=pytest.mark.slow)],
    )
    def test_gradient_is_that_of_central_differences(self, x64, name, steps, ridge):
        point = {**POINT, "meta_ridge": ridge}
        _, gradient = value_and_slopes(point, name, steps)
        h = 1e-4

        def at(parameter, k):
            moved = {**point, parameter: point[parameter] + k * h}
            return float(value_and_slopes(moved, name, steps)[0])

        for parameter in point:
            if parameter == "meta_ridge" and ridge == 0:  # no value below zero: one-sided
                values = [at(parameter, k) for k in range(5)]
                difference = np.dot([-25, 48, -36, 16, -3], values) / (12 * h)
            else:
                values = [at(parameter, k) for k in (-2, -1, 1, 2)]
                difference = np.dot([1, -8, 8, -1], values) / (12 * h)
            scale = max(abs(difference), 1e-3 * values[0])
            assert abs(gradient[parameter] - difference) < 1e-6 * scale, parameter

    @pytest.mark.parametrize("name", ["over", "under"])
    def test_the_starting_point_matters_only_above_the_threshold(self, x64, name):
        slope = value_and_slopes(POINT, name, 1)[1]["start"]
        assert (abs(slope) > 1e-2) == (name == "over")


class TestCompilation:
    def test_new_numbers_do_not_compile_anew(self, monkeypatch):
        problem = PROBLEMS["over"]
        nm.simulate(KEY, problem, nm.GradientDescent(RATES), ADAPT, runs=3)
        no_trace = chex.assert_max_traces(module.meta_train_distance, n=0)
        monkeypatch.setattr(module, "meta_train_distance", no_trace)
        changes = (
            (problem, RATES + 1, ADAPT, 0.0),
            (problem, -RATES.astype(np.float32), nm.GradientDescent(RATES[:2]), 0),
            (dataclasses.replace(problem, sigma=2, nu=0), RATES, ADAPT, np.float32(0.3)),
            (dataclasses.replace(problem, sigma=jnp.float32(0.1)), jnp.asarray(RATES), ADAPT, 1.5),
        )
        for seed, (changed, rates, adapt, ridge) in enumerate(changes):
            train = nm.GradientDescent(rates)
            nm.simulate(jax.random.key(seed), changed, train, adapt, runs=3, meta_ridge=ridge)
        with pytest.raises(AssertionError, match="traced"):
            nm.simulate(KEY, problem, train, ADAPT, runs=4)

    def test_vmap_and_jit_over_sigma_are_a_loop(self, x64):
        def losses(sigma):
            problem = dataclasses.replace(PROBLEMS["over"], sigma=sigma)
            return nm.simulate(KEY, problem, nm.GradientDescent(RATES), ADAPT, runs=3).test_loss

        sigmas = np.array([0.0, 0.5, 2.0])
        together = jax.jit(jax.vmap(losses))(sigmas)
        np.testing.assert_allclose(together, [losses(sigma) for sigma in sigmas], rtol=1e-10)


class TestBadInputs:
    @pytest.mark.parametrize(
        ("error", "name", "options"),
        [
            (ValueError, "runs", {"runs": 0}),
            (ValueError, "runs", {"runs": -3}),
            (TypeError, "runs", {"runs": 10.0}),
            (TypeError, "runs", {"runs": True}),
            (ValueError, "meta_ridge", {"meta_ridge": -0.1}),
            (ValueError, "meta_ridge", {"meta_ridge": np.nan}),
            (ValueError, "meta_ridge", {"meta_ridge": np.inf}),
            (ValueError, "meta_ridge", {"meta_ridge": np.zeros(2)}),
            (TypeError, "meta_ridge", {"meta_ridge": "1"}),
            (ValueError, "evaluation", {"evaluation": "exact"}),
            (ValueError, "split", {"split": "train"}),
        ],
    )
    def test_error_names_the_argument(self, error, name, options):
        with pytest.raises(error, match=f"^{name} must"):
            nm.simulate(KEY, PROBLEMS["over"], nm.GradientDescent(0.1), ADAPT, **options)

    @pytest.mark.parametrize("rate", [np.nan, np.inf, [0.1, np.nan]])
    def test_a_rate_that_is_not_finite_is_named(self, rate):
        with pytest.raises(ValueError, match=r"^rate must be finite"):
            nm.GradientDescent(rate)


def mean_and_error(values):
    values = np.asarray(values, float)
    return values.mean(-1), values.std(-1, ddof=1) / values.shape[-1] ** 0.5


# The training rate -0.5 carries the proof of the square in Theorem 2.
THEORY_RATES = nm.GradientDescent(np.array([-0.5, -0.2, 0.0, 0.2], np.float32))
THEORY_ADAPT = nm.GradientDescent(np.array([-0.4, 0.2], np.float32))


@pytest.fixture(scope="module", params=[OVER, UNDER], ids=["over", "under"])
def simulated(request):
    """A problem of the paper, mean test losses and their standard errors."""
    result = nm.simulate(KEY, request.param, THEORY_RATES, THEORY_ADAPT, runs=400)
    assert result.well_conditioned.all()
    return request.param, *mean_and_error(result.test_loss)


class TestAgainstTheory:
    def test_expansion_meets_simulation_within_its_next_order(self, simulated):
        problem, mean, error = simulated
        distance = theory.weight_error(problem, THEORY_RATES, method="expansion")
        rho = theory.expansion_parameter(problem, THEORY_RATES)
        assert (rho < 0.5).all()
        predicted = theory.test_loss(problem, THEORY_RATES, THEORY_ADAPT, method="expansion")
        beyond = expected_test_loss(problem, distance * (1 + rho / (1 - rho)), THEORY_ADAPT)
        assert (np.abs(mean - predicted) < 4 * error + (beyond - predicted)).all()

    def test_expansion_is_within_a_few_percent(self, simulated):
        problem, mean, error = simulated
        predicted = theory.test_loss(problem, THEORY_RATES, THEORY_ADAPT, method="expansion")
        assert (np.abs(mean - predicted) < 4 * error + 0.05 * mean).all()

    def test_expansion_ranks_the_training_rates(self, simulated):
        problem, mean, _ = simulated
        predicted = theory.test_loss(problem, THEORY_RATES, THEORY_ADAPT, method="expansion")
        np.testing.assert_array_equal(np.argsort(mean, 0), np.argsort(predicted, 0))

    @pytest.mark.slow
    def test_theorem_two_has_the_square_of_h_t(self):
        train, adapt = nm.GradientDescent(-0.5), nm.GradientDescent(0.2)
        mean, error = mean_and_error(nm.simulate(KEY, UNDER, train, adapt, runs=4000).test_loss)
        assert abs(mean - 0.0414) < 4 * error
        assert (0.0523 - mean) / error > 10

    def test_a_quarter_of_the_runs_already_shows_the_square(self, simulated):
        problem, mean, error = simulated
        if problem.overparameterized:
            pytest.skip("the square is in the other regime's theorem")
        assert abs(mean[0, 1] - 0.0414) < 4 * error[0, 1]
        assert (0.0523 - mean[0, 1]) / error[0, 1] > 10


@pytest.mark.parametrize("rate", [-0.5, 0.0, 0.4])
def test_starting_point_keeps_the_exact_share_of_its_offset(rate):
    # E|omega* - w0|^2 = (1 - N/p) |omega0 - w0|^2 without noise and spread, for every rule.
    problem = dataclasses.replace(PROBLEMS["over"], sigma=0.0, nu=0.0)
    distances = nm.simulate(KEY, problem, nm.GradientDescent(rate), ADAPT, runs=2000).weight_error
    exact = (1 - 4 / 8) * float(problem.offset_squared)
    assert abs(z_score(np.asarray(distances, float), exact)) < 4


@pytest.mark.parametrize(
    ("p", "n_v", "exact"),
    [(14, 2, 4 / (14 - 4 - 1)), (4, 7, 4 / (14 - 4 - 1))],
    ids=["over", "under"],
)
def test_label_noise_without_adaptation_has_the_inverse_wishart_mean(p, n_v, exact):
    problem = nm.MixedLinearRegression(p=p, m=2, n_t=1, n_v=n_v, n_r=3, sigma=1.0, nu=0.0)
    distances = nm.simulate(KEY, problem, nm.GradientDescent(0.0), ADAPT, runs=4000).weight_error
    assert abs(z_score(np.asarray(distances, float), exact)) < 4
