"""Keys of every generator, for everything public that takes one.

A result depends on the key and on its own place only: run i on the key and i, a cell of a sweep on
its seed and values, a batch of calls under vmap on each key by itself.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.random import define_prng_impl

import negmaml as nm
from negmaml import advice, kernels, linear, sweeps, tasks, theory, training
from tests.internals import COUNTER_BASED, check_key, counter_based, nonlinear, reproduce
from tests.internals import paper_phases as phases

IMPLEMENTATIONS = ["threefry2x32", "rbg", "unsafe_rbg"]


def exists(generator: str) -> bool:
    """Whether this version of JAX has it."""
    try:
        return jax.random.key(0, impl=generator) is not None
    except ValueError:
        return False


SAFE = [name for name in sorted(COUNTER_BASED) if exists(name)]


OWN = define_prng_impl(
    key_shape=(1,),
    seed=lambda seed: jnp.asarray(seed, jnp.uint32).reshape(1),
    split=lambda key, shape: (key[0] + jnp.arange(np.prod(shape), dtype=jnp.uint32)).reshape(
        *shape, 1
    ),
    random_bits=lambda key, width, shape: jnp.full(shape, key[0], jnp.dtype(f"uint{width}")),
    fold_in=lambda key, data: key + jnp.asarray(data, jnp.uint32),
    name="of_a_user",
    tag="own",
)
PROBLEM = nm.MixedLinearRegression(p=6, m=2, n_t=4, n_v=2, n_r=3, sigma=0.5, nu=1.0)
COLOURED = nm.MixedLinearRegression(
    p=6, m=2, n_t=4, n_v=2, n_r=3, sigma=0.5, nu=1.0, input_covariance=np.arange(1.0, 7.0)
)
RULE = nm.GradientDescent(-0.2)
POINT = {"p": 6, "m": 2, "n_t": 4, "n_v": 2, "n_r": 3, "sigma": 0.5, "nu": 1.0,
         "train_rate": -0.2, "adapt_rate": 0.1}  # fmt: skip
DATA = np.arange(48.0, dtype=np.float32).reshape(24, 2)
GROUPS = np.arange(24) % 6


def square(w, data):
    x, y = data
    return jnp.mean((x[..., 0] * w - y[..., 0]) ** 2)


VALUE_AND_GRAD = nm.maml_value_and_grad(square, RULE)
SGD = optax.sgd(0.01)
SINUSOID = tasks.Sinusoid(m=2, n_t=3, n_v=2)


def fitted(key):
    return nm.fit(key, 0.3, VALUE_AND_GRAD, SINUSOID, SGD, 2).loss


def evaluated(key):
    return nm.evaluate(key, 0.3, square, RULE, SINUSOID, episodes=4).values


TAKES_A_KEY = {
    "simulate": lambda key: nm.simulate(key, PROBLEM, RULE, RULE, runs=3),
    "simulate sampled": lambda key: nm.simulate(
        key, PROBLEM, RULE, RULE, runs=2, evaluation="sampled"
    ),
    "simulate coloured": lambda key: nm.simulate(key, COLOURED, RULE, RULE, runs=2),
    "sample": lambda key: linear.sample(key, PROBLEM),
    "sampled_test_loss": lambda key: linear.sampled_test_loss(key, PROBLEM, jnp.ones(6), RULE),
    "LinearModel": jax.jit(lambda key: linear.LinearModel()(key, **POINT)),
    "fit": fitted,
    "evaluate": evaluated,
    "Sinusoid": SINUSOID,
    "Quadratic": tasks.Quadratic(p=3, m=2, n_t=2, n_v=2, sigma=0.1, nu=1.0),
    "Linear": tasks.Linear(PROBLEM),
    "Grouped": tasks.Grouped(DATA, GROUPS, m=3, n_t=2, n_v=1),
    "Episodes": tasks.Episodes(DATA, GROUPS, m=2, ways=2, shots=1, queries=2),
}  # fmt: skip
SLOW = {"LinearModel", "verify"}
ON_THE_HOST = {
    "HostEpisodes": tasks.HostEpisodes(DATA, GROUPS, m=2, ways=2, shots=1, queries=2),
    "split_classes": lambda key: [*map(jnp.asarray, tasks.split_classes(GROUPS, (2, 2), key=key))],
    "compile_simulation": lambda key: linear.compile_simulation(
        key, PROBLEM, RULE, RULE, runs=2, index=1
    )(),
    "verify": lambda key: [
        r.value for r in nm.verify(PROBLEM, RULE, RULE, key=key, runs=4).methods
    ],
    "advise": lambda key: (
        nm.advise(
            DATA, np.sin(DATA.sum(1)), GROUPS, n_t=1, n_v=1, n_r=1, splits=12, key=key
        ).train_rate
    ),
}


def same(one, other, rtol=2e-5):
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6, equal_nan=True), one, other
    )


def differs(one, other) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return any(not np.array_equal(a, b) for a, b in pairs)


def test_the_tables_hold_every_public_function_of_a_key():
    public = {*vars(linear), *vars(tasks), *nm.__all__, *vars(kernels), *vars(theory)}
    named = {name: value for module in (nm, linear, tasks, kernels, theory, advice, training)
             for name in dir(module) if name in public
             and callable(value := getattr(module, name))}  # fmt: skip
    takes = {name for name, value in named.items() if "key" in _parameters(value)}
    known = {name.split()[0] for name in (*TAKES_A_KEY, *ON_THE_HOST)}
    assert takes <= known, takes - known


def _parameters(value) -> set[str]:
    """The parameters of a function, or of calling an instance of a class."""
    called = vars(value).get("__call__", None) if isinstance(value, type) else value
    return set() if called is None else set(inspect.signature(called).parameters)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in TAKES_A_KEY | ON_THE_HOST
    ],
)
def test_every_function_takes_every_key_as_one_that_is_safe_under_vmap(name):
    function = (TAKES_A_KEY | ON_THE_HOST)[name]
    for implementation in (*IMPLEMENTATIONS, OWN):
        key = jax.random.key(3, impl=implementation)
        same(function(key), function(counter_based(key)))


def test_keys_of_a_batch_are_hashed_one_by_one():
    for implementation in (*IMPLEMENTATIONS, OWN):
        keys = jax.random.split(jax.random.key(3, impl=implementation), 5)

        def draw(key):
            return jax.random.normal(check_key("key", key), (3,))

        apart = jnp.stack([draw(key) for key in keys])
        np.testing.assert_array_equal(jax.jit(jax.vmap(draw))(keys), apart)
        assert len(np.unique(apart)) == 15


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, OWN], ids=str)
@pytest.mark.parametrize("name", TAKES_A_KEY)
def test_a_batch_of_keys_gives_what_each_gives_by_itself(name, implementation):
    function = TAKES_A_KEY[name]
    keys = jax.random.split(jax.random.key(3, impl=implementation), 2)
    together = jax.jit(jax.vmap(function))(keys)
    first, second = (jax.tree.map(lambda x, i=i: x[i], together) for i in range(2))
    same(first, function(keys[0]))
    assert differs(first, second)


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
@pytest.mark.parametrize("name", ["sample", "evaluate", "Grouped"])
def test_raw_keys_are_those_of_the_default_generator(name, implementation):
    function = TAKES_A_KEY[name]
    key = jax.random.key(4, impl=implementation)
    expected = function(key)
    with jax.default_prng_impl(implementation):
        same(function(jax.random.key_data(key)), expected)
        same(function(np.asarray(jax.random.key_data(key))), expected)
    with pytest.raises(ValueError, match=r"key must be a raw key of shape \(2,\).*\(4,\)"):
        function(jax.random.key_data(key))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("evaluation", linear.simulation.EVALUATIONS)
def test_the_first_runs_do_not_depend_on_how_many_there_are(evaluation, implementation):
    key = jax.random.key(0, impl=implementation)
    few, many = (
        nm.simulate(key, PROBLEM, RULE, RULE, runs=n, evaluation=evaluation) for n in (2, 5)
    )
    same(few, jax.tree.map(lambda x: x[..., :2], many))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_cells_of_a_sweep_depend_on_their_seed_and_values_only(implementation):
    def function(key, x, y):
        return {"value": x * jax.random.normal(key, (2,)) + 0 * y}

    grid = {"x": [1.0, 2.0], "y": [0.5, 1.5, 2.5]}
    with jax.default_prng_impl(implementation):
        whole = nm.sweep(function, grid, 4, common_random_numbers=["x"])
        pieces = nm.sweep(function, grid, 4, common_random_numbers=["x"], block=3)
    np.testing.assert_array_equal(whole.value, pieces.value)
    np.testing.assert_array_equal(2 * whole.value[0], whole.value[1])  # x shares its numbers
    assert len(np.unique(whole.value[0])) == whole.value[0].size


@pytest.mark.slow
def test_the_cells_of_the_linear_model_do_not_depend_on_the_generator_of_the_default():
    grid = POINT | {"sigma": [0.1, 1.0]}
    expected = nm.sweep(sweeps.linear, grid, 3).test_loss.values
    for implementation in IMPLEMENTATIONS:
        with jax.default_prng_impl(implementation):
            same(nm.sweep(sweeps.linear, grid, 3, block=1).test_loss.values, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_items_of_a_map_over_devices_do_not_see_each_other(implementation):
    keys = jax.random.split(jax.random.key(0, impl=implementation), 3)
    one, together = (nm.map_over_devices(jax.random.normal, keys, batch_size=b) for b in (None, 3))
    np.testing.assert_array_equal(one, together)


def test_raw_keys_of_a_generator_that_is_not_safe_have_no_batch():
    data = jax.random.key_data(jax.random.split(jax.random.key(0, impl="rbg"), 3))
    seeds = jnp.arange(3)
    with jax.default_prng_impl("rbg"):
        for function, items in (
            (lambda key: jax.random.normal(key), data),
            (lambda seed: jax.random.normal(jax.random.key(seed)), seeds),
        ):
            assert len(nm.map_over_devices(function, items)) == 3
            with pytest.raises(ValueError, match=r"batch_size must be None .* rbg .* got 3"):
                nm.map_over_devices(function, items, batch_size=3)
        shared = nm.map_over_devices(lambda x: x + jax.random.normal(jax.random.key(0)), seeds,
                                     batch_size=3)  # fmt: skip
    assert len(np.unique(np.asarray(shared) - np.arange(3))) < 3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_that_tasks_hold_are_each_their_own(implementation):
    keys = jax.random.split(jax.random.key(0, impl=implementation), 3)

    def noisy(w, data):
        key, target = data
        return (w + jax.random.normal(key) - target) ** 2

    def held(some):
        return nm.Tasks((some, jnp.zeros(len(some))), (some, jnp.ones(len(some))))

    value = nm.evaluate(keys[0], 0.5, noisy, nm.GradientDescent(0.1), held(keys)).values
    one = nm.evaluate(keys[0], 0.5, noisy, nm.GradientDescent(0.1), held(keys[2:])).values
    same(value[2:], one)
    objective = nm.maml(noisy, nm.GradientDescent(0.1))
    same(objective(0.5, held(keys)), jnp.mean(value))


@pytest.mark.parametrize("implementation", SAFE)
def test_generators_that_are_safe_are_left(implementation):
    key = jax.random.key(2, impl=implementation)
    assert check_key("key", key) is key
    keys = jax.random.split(key, 3)
    alone = jnp.stack([jax.random.normal(k, (5,)) for k in keys])
    np.testing.assert_array_equal(jax.vmap(lambda k: jax.random.normal(k, (5,)))(keys), alone)


def test_hashed_keys_differ_where_any_word_does():
    data = np.vstack([np.zeros(4), np.eye(4)]).astype(np.uint32)
    hashed = counter_based(jax.random.wrap_key_data(data, impl="rbg"))
    assert len(np.unique(jax.random.key_data(hashed), axis=0)) == 5
    assert jax.random.key_impl(hashed) == "threefry2x32"


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_figures_take_every_key(implementation):
    key = jax.random.key(1, impl=implementation)
    for function in (
        lambda key: [found for _, found in reproduce.experiments(["overparameterized"], key, 20)],
        lambda key: list(nonlinear.runs(key, 2, nonlinear.CONFIG)),
        lambda key: phases.contents(key, 2)[0],
    ):
        found, expected = (
            [x for x in jax.tree.leaves(function(k)) if not isinstance(x, str)]
            for k in (key, counter_based(key))
        )
        same(found, expected)
