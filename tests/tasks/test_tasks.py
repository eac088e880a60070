"""Task distributions: their laws, and draws without replacement from groups of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import negmaml as nm

KEY = jax.random.key(0)


def drawn(distribution):
    """Tasks of a distribution, in one program."""
    return jax.jit(lambda key: distribution(key))(KEY)


def test_linear_tasks_are_the_sample_of_the_problem():
    problem = nm.MixedLinearRegression(p=4, m=3, n_t=6, n_v=5, n_r=2, sigma=0.5, nu=1.0)
    tasks, data = nm.tasks.Linear(problem)(KEY), nm.linear.sample(KEY, problem)
    for mine, theirs in zip((*tasks.support, *tasks.query), data, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_sinusoids_follow_their_law():
    tasks = drawn(nm.tasks.Sinusoid(m=2000, n_t=4, n_v=2))
    x = np.concatenate([tasks.support[0], tasks.query[0]], 1)[..., 0]
    y = np.concatenate([tasks.support[1], tasks.query[1]], 1)[..., 0]
    assert stats.kstest(x.ravel(), stats.uniform(-5, 10).cdf).pvalue > 1e-3
    basis = np.stack([np.sin(x), np.cos(x)], -1)  # A sin(x + f) = A cos f sin x + A sin f cos x
    solved = np.linalg.solve(np.einsum("mni,mnj->mij", basis, basis),
                             np.einsum("mni,mn->mi", basis, y)[..., None])[..., 0]  # fmt: skip
    np.testing.assert_allclose(np.einsum("mni,mi->mn", basis, solved), y, atol=2e-3)
    amplitude, phase = np.hypot(*solved.T), np.arctan2(solved[:, 1], solved[:, 0])
    assert stats.kstest(amplitude, stats.uniform(0.1, 4.9).cdf).pvalue > 1e-3
    assert stats.kstest(phase, stats.uniform(0, np.pi).cdf).pvalue > 1e-3


def test_quadratic_tasks_have_the_moments_of_their_law():
    """w.x + b ~ N(0, nu^2 (|x|^2/p + 1)), so E y = nu^2 2 and the noise adds sigma^2."""
    X, y = drawn(nm.tasks.Quadratic(p=5, m=20000, n_t=1, n_v=1, sigma=0.0, nu=0.7)).support
    ratio = np.asarray(y / (jnp.sum(X**2, -1) / 5 + 1)).ravel() / 0.49  # chi^2 of one degree
    assert stats.kstest(ratio, stats.chi2(1).cdf).pvalue > 1e-3
    noisy = drawn(nm.tasks.Quadratic(p=5, m=20000, n_t=1, n_v=1, sigma=0.3, nu=0.7)).support[1]
    noise = np.asarray(noisy - y).ravel() / 0.3
    assert stats.kstest(noise, stats.norm.cdf).pvalue > 1e-3


def test_points_of_a_quadratic_task_share_its_weights():
    tasks = drawn(nm.tasks.Quadratic(p=1, m=50, n_t=6, n_v=3, sigma=0.0, nu=1.0))
    for x, y in zip(
        np.asarray(tasks.support[0])[..., 0], np.asarray(tasks.support[1]), strict=True
    ):
        np.testing.assert_allclose(np.polyval(np.polyfit(x, y, 2), x), y, atol=1e-3)


@pytest.mark.slow
@given(st.lists(st.integers(3, 9), min_size=2, max_size=6), st.integers(0, 100))
def test_rows_of_ragged_groups_are_drawn_once_and_stay_in_their_group(sizes, seed):
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat([f"group {i}" for i in range(len(sizes))], sizes))
    rows = np.arange(len(groups))
    draw = nm.tasks.Grouped({"row": rows}, groups, m=2, n_t=2, n_v=1)
    tasks = draw(jax.random.key(seed))
    drawn = np.concatenate([tasks.support["row"], tasks.query["row"]], axis=1)
    assert drawn.shape == (2, 3)
    assert len(np.unique(drawn)) == drawn.size
    owners = groups[drawn]
    assert (owners == owners[:, :1]).all() and owners[0, 0] != owners[1, 0]


def test_every_row_of_a_group_is_equally_likely():
    groups = np.array([0] * 5 + [1] * 30)
    draw = nm.tasks.Grouped(np.arange(35), groups, m=2, n_t=2, n_v=1)
    tasks = jax.jit(jax.vmap(lambda key: draw(key)))(jax.random.split(KEY, 3000))
    for part, fraction in ((tasks.support, 2 / 5), (tasks.query, 1 / 5)):
        counts = np.bincount(np.asarray(part).ravel(), minlength=35)[:5]
        assert stats.chisquare(counts).pvalue > 1e-3
        assert counts.sum() == 3000 * 5 * fraction


def images(per_class=6, classes=5):
    """Images whose every pixel is 100 label + number."""
    labels = np.repeat(np.arange(classes) * 7, per_class)  # labels need not be 0, 1, 2, ...
    values = 100 * labels + np.tile(np.arange(per_class), classes)
    order = np.random.default_rng(0).permutation(labels.size)
    return np.broadcast_to(values[order, None, None], (labels.size, 2, 2)), labels[order]


def test_episodes_number_their_own_classes_and_share_no_image():
    draw = nm.tasks.Episodes(*images(), ways=3, shots=2, queries=4, m=50)
    tasks = drawn(draw)
    assert tasks.support[0].shape == (50, 6, 2, 2) and tasks.query[1].shape == (50, 12)
    first_classes = set()
    for i in range(50):
        support, query = ((np.asarray(x[i])[:, 0, 0], np.asarray(y[i])) for x, y in tasks)
        values = np.concatenate([support[0], query[0]])
        assert len(np.unique(values)) == 18
        names = np.concatenate([support[1], query[1]])
        assert np.bincount(support[1]).tolist() == [2, 2, 2]
        pairs = {(name, value // 100) for name, value in zip(names, values, strict=True)}
        assert len(pairs) == 3  # a name is a class, in support and query alike
        first_classes |= {
            value // 100 for name, value in zip(names, values, strict=True) if name == 0
        }
    assert first_classes == {0, 7, 14, 21, 28}


def test_distributions_are_arguments_of_compiled_programs():
    traces = []

    @jax.jit
    def draw(distribution, key):
        traces.append(1)
        return distribution(key)

    for seed, nu in ((0, 1.0), (1, 2.0)):
        draw(nm.tasks.Quadratic(p=2, m=2, n_t=2, n_v=2, sigma=0.1, nu=nu), jax.random.key(seed))
    assert len(traces) == 1


@pytest.mark.slow
def test_within_a_program_data_may_be_traced_and_groups_may_not():
    data, labels = images()
    sizes = {"ways": 3, "shots": 2, "queries": 4, "m": 2}

    def built(data, labels=labels):
        return nm.tasks.Episodes(data, labels, **sizes)(KEY)

    expected, found = built(data), jax.jit(built)(data)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    of_known = jax.jit(lambda: nm.tasks.Grouped(data, labels, m=2, n_t=1, n_v=1)(KEY))()
    assert of_known.support.shape == (2, 1, 2, 2)
    with pytest.raises(TypeError, match=r"labels must be known, got .*build the distribution"):
        jax.jit(built)(data, labels)
    with pytest.raises(TypeError, match="groups must be known"):
        jax.jit(lambda groups: nm.tasks.Grouped(data, groups, m=2, n_t=1, n_v=1))(labels)


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: nm.tasks.Sinusoid(m=0, n_t=1, n_v=1), "m must be an integer of at least 1"),
        (
            lambda: nm.tasks.Quadratic(p=1, m=1, n_t=1, n_v=1, sigma=-1.0, nu=1.0),
            "sigma must be at least 0",
        ),
        (
            lambda: nm.tasks.Grouped(np.ones(3), [0, 0, 1], m=1, n_t=1, n_v=1),
            r"1 of 2 values in groups have fewer than n_t \+ n_v = 2 rows: 1 \(1\)",
        ),
        (
            lambda: nm.tasks.Grouped(np.ones(4), [0, 0, 1, 1], m=3, n_t=1, n_v=1),
            "m must be at most the number of groups, 2, got 3",
        ),
        (
            lambda: nm.tasks.Grouped(np.ones(4), [0, 0], m=1, n_t=1, n_v=1),
            r"groups must have one entry a row, shape \(4,\), got \(2,\)",
        ),
        (
            lambda: nm.tasks.Grouped((np.ones(4), np.ones(3)), [0] * 4, m=1, n_t=1, n_v=1),
            "every leaf of data must lead with the same axis",
        ),
        (
            lambda: nm.tasks.Episodes(*images(), ways=6, shots=1, queries=1, m=1),
            "ways must be at most the number of classes, 5, got 6",
        ),
        (
            lambda: nm.tasks.Episodes(*images(), ways=2, shots=5, queries=5, m=1),
            r"5 of 5 values in labels have fewer than shots \+ queries = 10 rows",
        ),
    ),
)
def test_invalid_arguments_raise_with_their_names(make, message):
    with pytest.raises(ValueError, match=message):
        make()
