"""Everything public lowers for CPU, CUDA and TPU: products at full precision, nothing of the host.

No accelerator is needed, since JAX lowers a program for any platform.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from negmaml import kernels, linear, problem, theory
from tests.lowered import foreign, imprecise, lowered, products

SPECTRUM = np.arange(1, 7) ** -1.0
SIZES = dict(p=6, m=3, n_t=8, n_v=4, n_r=5)
FEW = dict(p=14, m=3, n_t=8, n_v=4, n_r=5)  # p > n_v m
RATE, ADAPT = nm.GradientDescent(-0.2), nm.GradientDescent(0.1)
ROTATION = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
MATRIX = ((ROTATION * SPECTRUM) @ ROTATION.T).astype(np.float32)
X, Y = (np.random.default_rng(1).standard_normal(s).astype(np.float32) for s in ((4, 6, 3), (4, 6)))
TASKS = nm.Tasks((X[:, :4], Y[:, :4]), (X[:, 4:], Y[:, 4:]))


def key():
    """A fresh one, since `debug_key_reuse` follows the objects."""
    with jax.transfer_guard("allow"):
        return jax.random.key(0)


FEATURES = theory.feature_moments(np.maximum(np.random.default_rng(2).standard_normal((20, 6)), 0))


def isotropic(sigma, **sizes):
    return nm.MixedLinearRegression(**(SIZES | sizes), sigma=sigma, nu=1.0)


def coloured(sigma, **more):
    more = {"input_covariance": SPECTRUM, **more}
    return nm.MixedLinearRegression(**SIZES, sigma=sigma, nu=1.0, **more)


def network(w, x):
    return jnp.tanh(x @ w["a"]) @ w["b"]


def descent(number):
    return nm.GradientDescent(number)


def tangent(number):
    kernel = kernels.empirical_ntk(network, {"a": jnp.ones((3, 4)) * number, "b": jnp.ones(4)})
    return kernel(X[0], X[1])


def trained(number, **options):
    return kernels.meta_train(
        lambda a, b: number * a @ b.T, TASKS, descent(number), meta_ridge=0.1, **options
    )


# Each a function of one number, whose programs are looked into.
THEORY = {
    "test_loss": lambda x: theory.test_loss(isotropic(x), descent(x), ADAPT),
    "test_loss, coloured": lambda x: theory.test_loss(coloured(x), descent(x), ADAPT),
    "test_loss, steps": lambda x: theory.test_loss(coloured(x), nm.GradientDescent(x, 3), ADAPT),
    "test_loss, train-train": lambda x: theory.test_loss(
        coloured(x), descent(x), ADAPT, split="train-train"
    ),
    "test_loss, proximal": lambda x: theory.test_loss(coloured(0.5), nm.Proximal(x), ADAPT),
    "test_loss, flow": lambda x: theory.test_loss(coloured(0.5), nm.GradientFlow(x), ADAPT),
    "test_loss, matrices": lambda x: theory.test_loss(
        coloured(x, input_covariance=MATRIX, weight_covariance=MATRIX), descent(x), ADAPT
    ),
    "weight_error": lambda x: theory.weight_error(coloured(x), descent(x)),
    "train_task_error": lambda x: theory.train_task_error(coloured(x), descent(x)),
    "standard_deviation": lambda x: tuple(
        theory.standard_deviation(coloured(x), descent(x), ADAPT)
    ),
    "standard_deviation, isotropic": lambda x: tuple(
        theory.standard_deviation(isotropic(x), descent(x), ADAPT)
    ),
    "required_runs": lambda x: theory.required_runs(
        coloured(x), descent(x), RATE, adapt=ADAPT
    ),
    "best_train_rate": lambda x: theory.best_train_rate(coloured(x), adapt=ADAPT),
    "best_train_rate, isotropic": lambda x: theory.best_train_rate(isotropic(x)),
    "best_adapt_rate": lambda x: theory.best_adapt_rate(coloured(x), descent(x)),
    "best_rates": lambda x: theory.best_rates(coloured(x)),
    "best_meta_ridge": lambda x: theory.best_meta_ridge(
        coloured(x), descent(x), adapt=ADAPT
    ),
    "phase_diagram": lambda x: tuple(theory.phase_diagram(6.0, 3.0, 8.0, 4.0, x, 1.0)),
    "general_inputs": lambda x: theory.general_inputs(
        MATRIX * x, MATRIX, descent(x), ADAPT, m=1, n_t=8, n_v=4, n_r=5, sigma=x
    ),
    "overparameterized": lambda x: theory.overparameterized(isotropic(x, p=20), x, x),
    "underparameterized": lambda x: theory.underparameterized(isotropic(x, p=4), x, x),
    "expansion_parameter": lambda x: theory.expansion_parameter(isotropic(x), descent(x)),
    "FeatureMoments": lambda x: FEATURES.test_loss(
        FEATURES.problem(m=3, n_t=8, n_v=4, n_r=5, sigma=x, nu=1.0), descent(x), ADAPT
    ),
}  # fmt: skip
LINEAR = {
    "simulate": lambda x: tuple(nm.simulate(key(), isotropic(x), descent(x), ADAPT, runs=2)),
    "simulate, coloured": lambda x: tuple(
        nm.simulate(key(), coloured(x, input_covariance=MATRIX), descent(x), ADAPT, runs=2)
    ),
    "simulate, steps": lambda x: tuple(
        nm.simulate(key(), isotropic(x), nm.GradientDescent(x, 3), ADAPT, runs=2)
    ),
    "simulate, sampled": lambda x: tuple(
        nm.simulate(key(), isotropic(x), descent(x), ADAPT, runs=2, evaluation="sampled")
    ),
    "sample": lambda x: tuple(linear.sample(key(), coloured(x, input_covariance=MATRIX))),
    "sampled_test_loss": lambda x: linear.sampled_test_loss(
        key(), isotropic(x), jnp.ones(6) * x, nm.GradientDescent(x, 2)
    ),
    "minimiser": lambda x: linear.minimiser(X[0] * x, Y[0], jnp.zeros(3), meta_ridge=0.1)[0],
    "meta_system": lambda x: linear.meta_system(
        linear.Data(X[:, :4] * x, Y[:, :4], X[:, 4:], Y[:, 4:]), descent(x)
    ),
    "LinearModel": lambda x: linear.LinearModel()(
        key(), **SIZES, sigma=x, nu=1.0, train_rate=-0.2, adapt_rate=0.1
    ),
}  # fmt: skip
KERNELS = {
    "empirical_ntk": tangent,
    "relu_network": lambda x: kernels.relu_network(2, weight_variance=x)(X[0], X[1]),
    "meta_train": lambda x: trained(x)(X[0]),
    "meta_train, steps": lambda x: kernels.meta_train(
        kernels.relu_network(1), TASKS, nm.GradientDescent(x, 3), meta_ridge=0.1
    )(X[0]),
    "meta_train, iterative": lambda x: trained(x, method="iterative")(X[0]),
    "KernelModel.adapt": lambda x: trained(x).adapt((X[0], Y[0]), descent(x))(X[1]),
    "KernelModel.loss": lambda x: trained(x).loss(TASKS, ADAPT),
    "leave_one_task_out": lambda x: kernels.leave_one_task_out(
        lambda a, b: x * a @ b.T, TASKS, descent(x), meta_ridge=0.1
    ).losses(ADAPT),
}  # fmt: skip
PROBLEM = {
    "expected_test_loss": lambda x: problem.expected_test_loss(isotropic(x), x, ADAPT),
    "adapted": lambda x: problem.adapted(coloured(x), ADAPT).test_loss(
        problem.adapted(coloured(x), ADAPT).forms(jnp.ones(6) * x)
    ),
    "adapted, flow": lambda x: tuple(
        problem.adapted(coloured(x), nm.GradientFlow(x))[:2]
    ),
    "filter_means": lambda x: problem.filter_means(nm.GradientDescent(x, 3), 8, 6),
    "shrinkage": lambda x: problem.shrinkage(x, 8, 6),
    "named_spectrum": lambda x: problem.named_spectrum("power", 6, exponent=x),
}  # fmt: skip
AREA_MODULES = {"theory": theory, "linear": linear, "kernels": kernels, "problem": problem}
AREAS = {"theory": THEORY, "linear": LINEAR, "kernels": KERNELS, "problem": PROBLEM}
# On the host in NumPy, or no functions of arrays.
WITHOUT_PRODUCTS = {
    "theory": {"best_allocation", "expected_test_loss", "feature_moments", "shrinkage",
               "stationary_train_rates", "wishart_moment", "wishart_quadrature", "Allocation",
               "Phase", "RatePair"},
    "linear": {"Data", "Simulation", "MetaSolution", "compile_simulation"},
    "kernels": {"LeftOut"},
    "problem": {"MixedLinearRegression", "Modes", "wishart_moment",
                "wishart_quadrature"},
}  # fmt: skip
CASES = [(area, name) for area, table in AREAS.items() for name in table]
# Traced in less than a second of CPU time; derivatives of the others are traced by the slow tests.
CHEAP = {name for area in ("linear", "kernels", "problem") for name in AREAS[area]} | {
    "standard_deviation", "general_inputs",
    "test_loss", "best_train_rate, isotropic", "overparameterized", "underparameterized",
    "expansion_parameter",
}  # fmt: skip
CHEAP_DERIVATIVES = CHEAP - {
    "standard_deviation", "test_loss", "best_train_rate, isotropic",
    "meta_train, iterative",
}  # fmt: skip


def summed(function):
    def total(x):
        leaves = jax.tree.leaves(function(x))
        return sum(jnp.sum(x) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating))

    return total


def cases(cheap):
    marks = {True: [], False: [pytest.mark.slow]}
    return [pytest.param(*case, marks=marks[case[1] in cheap], id=case[1]) for case in CASES]


def test_the_tables_hold_everything_public():
    for area, table in AREAS.items():
        listed = {name.split(",")[0].split(".")[0] for name in table}
        assert set(AREA_MODULES[area].__all__) - listed - {"SPECTRA"} == WITHOUT_PRODUCTS[area]


def check(function, *arguments):
    """Assert that the program suits every platform; return its text for CPU."""
    texts = lowered(function, *arguments)
    for platform, text in texts.items():
        assert not imprecise(text), platform
        assert platform == "cpu" or not foreign(text), platform
    return texts["cpu"]


@pytest.mark.parametrize(("area", "name"), cases(CHEAP))
def test_programs_suit_every_platform(area, name):
    check(AREAS[area][name], 0.3)


@pytest.mark.parametrize(("area", "name"), cases(CHEAP_DERIVATIVES))
def test_derivatives_suit_every_platform(area, name):
    check(jax.grad(summed(AREAS[area][name])), 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_task_error", "best_rates"])
def test_derivatives_of_a_program_of_the_users_do_so_too(name):
    assert len(products(check(jax.grad(jax.jit(summed(THEORY[name]))), 0.3))) > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_loss, matrices", "standard_deviation", "best_train_rate"])
def test_second_derivatives_do_so_too(name):
    assert len(products(check(jax.hessian(summed(THEORY[name])), 0.3))) > 100


def on_cpu(function, *arguments):
    return lowered(function, *arguments, platforms=("cpu",))["cpu"]


def test_the_counter_sees_products_that_may_be_rounded():
    assert len(imprecise(on_cpu(lambda x: x @ x.T, X[0]))) == 1
    assert not products(on_cpu(lambda x: x @ x.T, X[0].astype(int)))
    with jax.default_matmul_precision("highest"):
        assert not imprecise(on_cpu(lambda x: x @ x.T, X[0]))


def test_the_counter_sees_float64_and_calls_to_the_host():
    with jax.enable_x64(True):
        assert foreign(on_cpu(lambda x: x + 1, np.ones(3))) >= {"tensor<3xf64>"}
    assert foreign(on_cpu(jnp.linalg.cholesky, X[0].T @ X[0]))
    assert foreign(on_cpu(lambda x: jax.debug.callback(print, x), 0.3))


# A loss of the user's own.


def loss_with(precision):
    def loss(w, data):
        x, y = data
        hidden = jnp.tanh(jnp.matmul(x, w["a"], precision=precision))
        return jnp.mean((jnp.matmul(hidden, w["b"], precision=precision)[..., 0] - y) ** 2)

    return loss


WIDE = {"a": jnp.ones((3, 16)), "b": jnp.ones((16, 1))}
METRIC = {"a": np.eye(48), "b": np.eye(16)}
TWO_STEPS = nm.GradientDescent(0.1, steps=2)
SIX_STEPS = nm.Momentum(0.1, 0.5, steps=6)


def plus_plus(loss, rule):
    """MAML++ from params, of first order before the outer step 1."""
    algorithm = nm.maml_plus_plus(loss, annealing=3, second_order_from=1)
    return lambda w, tasks: algorithm(nm.maml_plus_plus_params(w, steps=rule.steps), tasks)


META = {
    "maml": (nm.maml_value_and_grad, TWO_STEPS),
    "maml, momentum": (nm.maml_value_and_grad, nm.Momentum(0.1, 0.5, 2)),
    "maml, preconditioned": (nm.maml_value_and_grad, nm.Preconditioned(0.1, METRIC)),
    "maml, proximal": (nm.maml_value_and_grad, nm.Proximal(5.0)),
    "maml, Adam": (nm.maml_value_and_grad, nm.InnerOptimizer(optax.adam(0.1, eps_root=1e-8), 2)),
    "maml, segments": (partial(nm.maml_value_and_grad, segment=2, truncate=5), SIX_STEPS),
    "maml, segments of steps": (
        partial(nm.maml_value_and_grad, method="remat", segment="sqrt"), SIX_STEPS,
    ),
    "fomaml": (nm.fomaml, TWO_STEPS),
    "reptile": (nm.reptile, TWO_STEPS),
    "imaml": (nm.imaml, nm.Proximal(5.0)),
    "imaml, conjugate gradients": (nm.imaml, nm.Implicit(TWO_STEPS, 5.0, linear_solver="cg")),
    "maml_plus_plus": (plus_plus, TWO_STEPS),
    "anil": (lambda loss, rule: nm.anil(loss, rule, {"a": False, "b": True}), TWO_STEPS),
}  # fmt: skip
SAMPLERS = {
    "Linear": nm.tasks.Linear(coloured(0.5, input_covariance=MATRIX)),
    "Sinusoid": nm.tasks.Sinusoid(2, 3, 3),
    "Quadratic": nm.tasks.Quadratic(3, 2, 3, 3, 0.1, 0.5),
    "Grouped": nm.tasks.Grouped(np.ones(8, np.float32), np.arange(8) % 2, m=2, n_t=2, n_v=1),
    "Episodes": nm.tasks.Episodes(
        np.ones((8, 2, 2), np.uint8),
        np.arange(8) % 2,
        ways=2,
        shots=1,
        queries=2,
        m=2,
        balanced=False,
        orientations=8,
        augment=lambda key, x: x + jax.random.normal(key),
    ),
}


SLOW_META = {"maml, preconditioned", "maml, proximal", "maml, Adam"}  # seconds each


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_META else []) for name in META],
)
def test_products_of_a_loss_keep_their_precision_and_those_around_it_are_full(name):
    make, rule = META[name]
    full = check(make(loss_with("highest"), rule), WIDE, TASKS)
    assert products(full)
    users = on_cpu(make(loss_with(None), rule), WIDE, TASKS)
    assert imprecise(users) and len(products(users)) == len(products(full))


@pytest.mark.parametrize("make", (nm.PrototypeHead, nm.RidgeHead, nm.LogisticHead))
def test_heads_suit_every_platform_at_full_precision(make):
    def features(w, x):
        return jnp.tanh(jnp.matmul(x, w["a"], precision="highest"))

    def loss(w, data):
        outputs = jnp.matmul(features(w, data[0]), w["w"], precision="highest") + w["b"]
        return optax.softmax_cross_entropy_with_integer_labels(outputs, data[1]).mean()

    params = {"a": jnp.ones((3, 16)), "w": jnp.zeros((16, 2)), "b": jnp.zeros(2)}
    rule = make(features, head=lambda path, _: path[0] != "a")
    classes = nm.Tasks(*((x, (y > 0).astype(int)) for x, y in TASKS))
    assert products(check(nm.maml_value_and_grad(loss, rule), params, classes))


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_suit_every_platform(name):
    check(lambda key: SAMPLERS[name](key), key())


def test_training_and_evaluation_suit_every_platform():
    loss = loss_with("highest")

    def trained(key, params):
        algorithm = nm.maml_value_and_grad(loss, TWO_STEPS)
        fitted = nm.fit(key, params, algorithm, TASKS, optax.adam(1e-2), 2)
        return nm.evaluate(key, fitted.params, loss, TWO_STEPS, TASKS, episodes=4)

    check(trained, key(), WIDE)


def test_minibatches_and_warm_starts_suit_every_platform():
    loss, mask = loss_with("highest"), {"a": False, "b": True}
    tasks = nm.Tasks(nm.Minibatches(TASKS.support, 3), TASKS.query)
    value_and_grad, init = nm.warm_start(loss, TWO_STEPS, mask=mask, tasks=len(X))
    check(lambda params: value_and_grad(init(params), tasks), WIDE)


def test_meta_sgd_suits_every_platform():
    params = nm.MetaSGDParams(WIDE, jax.tree.map(jnp.zeros_like, WIDE))
    check(nm.meta_sgd(loss_with("highest")), params, TASKS)


def test_gradients_in_a_rule_suit_every_platform():
    loss, pair = loss_with("highest"), nm.ParamsAndRule(WIDE, TWO_STEPS)
    objective = nm.maml(loss, TWO_STEPS)
    estimate = nm.evolution_strategies(objective, sigma=0.1, samples=2, wrt="both")
    persistent, init = nm.persistent_evolution_strategies(
        loss, TWO_STEPS, truncation=1, sigma=0.1, samples=2
    )

    def gradients(key, pair):
        exact = nm.maml_value_and_grad(loss, TWO_STEPS, wrt="both")(pair, TASKS)
        return exact, estimate(pair, TASKS, key), persistent(init(pair, TASKS), TASKS, key)

    check(gradients, key(), pair)


def test_an_explicit_precision_in_a_network_survives():
    def explicit(w, x):
        return jnp.matmul(jnp.tanh(x @ w["a"]), w["b"], precision="default")

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    found = on_cpu(kernels.empirical_ntk(explicit, params), X[0], X[1])
    assert 0 < len(imprecise(found)) < len(products(found))
