"""The minimiser against dense solutions, its flag, its accuracy and its derivatives."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml import linear
from tests.helpers import RATES
from tests.internals import one_step_corrections, one_step_distances, one_step_system

minimiser = jax.jit(linear.minimiser)

SHAPES = {"wide": (5, 9), "square": (7, 7), "tall": (12, 7)}
WIDE_AND_TALL = [SHAPES["wide"], SHAPES["tall"]]
OMEGA0 = 0.8


def draw(shape, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=shape), generator.normal(size=shape[0])


def dense_minimiser(Phi, r, ridge, omega0=0.0):
    """The algebraic solution; at a slightly negative ridge too, for central differences."""
    N, p = Phi.shape
    start = np.broadcast_to(omega0, p)
    residual = r - Phi @ start
    if p > N:
        return start + Phi.T @ np.linalg.solve(Phi @ Phi.T + ridge * np.eye(N), residual)
    return start + np.linalg.solve(Phi.T @ Phi + ridge * np.eye(p), Phi.T @ residual)


def conditioned(shape, condition, seed=1):
    """A matrix with singular values spread evenly in their logarithm over 1..1/condition."""
    generator = np.random.default_rng(seed)
    k = min(shape)
    left, right = (np.linalg.qr(generator.normal(size=(n, k)))[0] for n in shape)
    return left * np.geomspace(1, 1 / condition, k) @ right.T


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("omega0", [0.0, OMEGA0, "vector"])
def test_without_ridge_it_is_the_pseudoinverse_from_omega0(x64, shape, omega0):
    Phi, r = draw(shape)
    omega0 = np.linspace(-1, 2, shape[1]) if omega0 == "vector" else omega0
    expected = omega0 + np.linalg.pinv(Phi) @ (r - Phi @ np.broadcast_to(omega0, shape[1]))
    omega, well_conditioned = minimiser(Phi, r, omega0)
    np.testing.assert_allclose(omega, expected, rtol=1e-10, atol=1e-11)
    assert well_conditioned


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("ridge", [1e-3, 0.5, 40.0])
def test_ridge_solves_the_normal_equations_from_omega0(x64, shape, ridge):
    Phi, r = draw(shape)
    omega, well_conditioned = minimiser(Phi, r, OMEGA0, meta_ridge=ridge)
    matrix = Phi.T @ Phi + ridge * np.eye(shape[1])
    expected = OMEGA0 + np.linalg.solve(matrix, Phi.T @ (r - OMEGA0 * Phi.sum(1)))
    np.testing.assert_allclose(omega, expected, rtol=1e-9, atol=1e-11)
    assert well_conditioned


def test_tall_without_ridge_is_least_squares_wherever_it_starts(x64):
    Phi, r = draw(SHAPES["tall"])
    expected = np.linalg.lstsq(Phi, r, rcond=None)[0]
    for omega0 in (0.0, OMEGA0):
        np.testing.assert_allclose(minimiser(Phi, r, omega0).omega, expected, rtol=1e-10)


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_wide_correction_lies_in_the_row_space(x64, ridge):
    Phi, r = draw(SHAPES["wide"])
    step = np.asarray(minimiser(Phi, r, OMEGA0, meta_ridge=ridge).omega) - OMEGA0
    np.testing.assert_allclose(np.linalg.pinv(Phi) @ Phi @ step, step, atol=1e-11)
    assert np.linalg.norm(step) > 0.1


def test_wide_without_ridge_interpolates(x64):
    Phi, r = draw(SHAPES["wide"])
    np.testing.assert_allclose(Phi @ minimiser(Phi, r, OMEGA0).omega, r, atol=1e-11)


@pytest.mark.parametrize("shape", WIDE_AND_TALL, ids=["wide", "tall"])
def test_a_batch_solves_every_system(x64, shape):
    systems = [draw(shape, seed) for seed in range(6)]
    Phi, r = (np.stack(leaf).reshape(2, 3, *leaf[0].shape) for leaf in zip(*systems, strict=True))
    solution = minimiser(Phi, r, OMEGA0, meta_ridge=0.5)
    chex.assert_shape(solution.omega, (2, 3, shape[1]))
    chex.assert_shape(solution.well_conditioned, (2, 3))
    expected = [dense_minimiser(*system, 0.5, OMEGA0) for system in systems]
    np.testing.assert_allclose(solution.omega.reshape(6, -1), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3])
@pytest.mark.parametrize("shape", [(20, 20), (18, 20), (20, 18)], ids=["square", "wide", "tall"])
def test_float32_loses_the_condition_number_and_not_its_square(shape, condition):
    # A consistent system, whose solution changes by cond times the change of the data.
    Phi = conditioned(shape, condition).astype(np.float32)
    r = (Phi @ np.linspace(-1, 1, shape[1])).astype(np.float32)
    exact = np.linalg.lstsq(Phi.astype(float), r.astype(float), rcond=None)[0]
    omega, well_conditioned = minimiser(Phi, r)
    error = np.linalg.norm(omega - exact) / np.linalg.norm(exact)
    assert error < 4 * condition * np.finfo(np.float32).eps
    assert well_conditioned


def singular(shape):
    """A system whose smaller Gram matrix is exactly singular."""
    Phi, r = draw(shape)
    if shape[0] < shape[1]:
        Phi[1], r[1] = Phi[0], r[0]
    else:
        Phi[:, 1] = Phi[:, 0]
    return Phi, r


def broken(shape, where):
    Phi, r = draw(shape)
    if where == "Phi":
        Phi[1, 1] = np.nan
    else:
        r[1] = np.inf
    return Phi, r


BAD = {
    "repeated": singular,
    "zero": lambda shape: (np.zeros(shape), np.ones(shape[0])),
    "NaN in Phi": lambda shape: broken(shape, "Phi"),
    "infinity in r": lambda shape: broken(shape, "r"),
}


@pytest.mark.parametrize("shape", WIDE_AND_TALL, ids=["wide", "tall"])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_system_is_flagged_and_its_neighbour_untouched(x64, bad, shape):
    good = draw(shape, seed=3)
    Phi, r = (np.stack(leaf) for leaf in zip(bad(shape), good, strict=True))
    omega, well_conditioned = minimiser(Phi, r)
    np.testing.assert_array_equal(well_conditioned, [False, True])
    np.testing.assert_allclose(omega[1], dense_minimiser(*good, 0.0), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", WIDE_AND_TALL, ids=["wide", "tall"])
def test_a_ridge_makes_a_singular_system_reliable(x64, shape):
    Phi, r = singular(shape)
    omega, well_conditioned = minimiser(Phi, r, meta_ridge=0.5)
    np.testing.assert_allclose(omega, dense_minimiser(Phi, r, 0.5), rtol=1e-9, atol=1e-11)
    assert well_conditioned


def size_and_slope(omega):
    """A function of the weights with curvature and without symmetry."""
    return jnp.sum(jnp.arange(1.0, len(omega) + 1) * omega) + jnp.sum(omega**4)


def numpy_size_and_slope(omega):
    return np.sum(np.arange(1.0, len(omega) + 1) * omega) + np.sum(omega**4)


@jax.jit
def derivatives(Phi, r, ridge):
    """Gradients in Phi, r and ridge, and the second derivative in ridge."""

    def value(Phi, r, ridge):
        return size_and_slope(linear.minimiser(Phi, r, OMEGA0, meta_ridge=ridge).omega)

    second = jax.grad(jax.grad(value, 2), 2)(Phi, r, ridge)
    return *jax.grad(value, (0, 1, 2))(Phi, r, ridge), second


@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize("shape", WIDE_AND_TALL, ids=["wide", "tall"])
class TestDerivatives:
    """Against central differences of the dense solution, which exists at a negative ridge."""

    def dense(self, Phi, r, ridge):
        return numpy_size_and_slope(dense_minimiser(Phi, r, ridge, OMEGA0))

    def test_in_the_ridge(self, x64, shape, ridge):
        Phi, r = draw(shape)
        step = 1e-5
        difference = self.dense(Phi, r, ridge + step) - self.dense(Phi, r, ridge - step)
        slope = derivatives(Phi, r, ridge)[2]
        np.testing.assert_allclose(slope, difference / (2 * step), rtol=1e-6)
        assert abs(slope) > 0.01

    def test_twice_in_the_ridge(self, x64, shape, ridge):
        Phi, r = draw(shape)
        step = 1e-3
        values = [self.dense(Phi, r, ridge + k * step) for k in (-2, -1, 0, 1, 2)]
        second = np.dot([-1, 16, -30, 16, -1], values) / (12 * step**2)
        np.testing.assert_allclose(derivatives(Phi, r, ridge)[3], second, rtol=1e-5)

    def test_in_the_matrix(self, x64, shape, ridge):
        Phi, r = draw(shape)
        direction = 1e-6 * np.random.default_rng(5).normal(size=shape)
        difference = self.dense(Phi + direction, r, ridge) - self.dense(Phi - direction, r, ridge)
        along = np.sum(derivatives(Phi, r, ridge)[0] * direction)
        np.testing.assert_allclose(2 * along, difference, rtol=1e-6)

    def test_in_the_right_hand_side(self, x64, shape, ridge):
        Phi, r = draw(shape)
        direction = 1e-6 * np.random.default_rng(6).normal(size=shape[0])
        difference = self.dense(Phi, r + direction, ridge) - self.dense(Phi, r - direction, ridge)
        along = np.sum(derivatives(Phi, r, ridge)[1] * direction)
        np.testing.assert_allclose(2 * along, difference, rtol=1e-6)


TASKS = {"wide": (2, 2), "tall": (6, 4)}  # m, n_v; p is 8


def draw_tasks(m, n_v):
    generator = np.random.default_rng(m)
    shapes = (m, 5, 8), (m, 5), (m, n_v, 8), (m, n_v)
    return linear.Data(*(generator.normal(size=shape) for shape in shapes))


@jax.jit
def both_routes(data, rates, ridge):
    fast = one_step_corrections(one_step_system(data), rates, ridge)
    system = linear.meta_system(data, nm.GradientDescent(rates))
    return fast, linear.minimiser(*system, meta_ridge=ridge)


@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize(("m", "n_v"), TASKS.values(), ids=TASKS)
def test_the_amortised_route_is_the_minimiser_at_every_rate(x64, m, n_v, ridge):
    fast, general = both_routes(draw_tasks(m, n_v), np.array(RATES), ridge)
    chex.assert_shape(fast.omega, (len(RATES), 8))
    np.testing.assert_allclose(fast.omega, general.omega, rtol=1e-8, atol=1e-10)
    assert fast.well_conditioned.all()
    assert general.well_conditioned.all()


@pytest.mark.parametrize("ridge", [0.0, 0.5, 1e7])
@pytest.mark.parametrize("offset", [0.0, OMEGA0])
@pytest.mark.parametrize(("m", "n_v"), TASKS.values(), ids=TASKS)
def test_distances_need_no_weights(x64, m, n_v, ridge, offset):
    data, offset = draw_tasks(m, n_v), np.full(8, offset)
    fast, _ = both_routes(data, np.array(RATES), ridge)
    distance, well_conditioned = jax.jit(one_step_distances)(
        one_step_system(data), np.array(RATES), ridge, offset
    )
    expected = np.sum((np.asarray(fast.omega) + offset) ** 2, -1)
    np.testing.assert_allclose(distance, expected, rtol=1e-9)
    np.testing.assert_array_equal(well_conditioned, fast.well_conditioned)


@pytest.mark.parametrize(("m", "n_v"), TASKS.values(), ids=TASKS)
def test_the_shared_gram_matrix_flags_only_a_singular_rate(x64, m, n_v):
    # Orthogonal training inputs of squared length 2 n_t: one step at rate 1/2 erases them.
    data = draw_tasks(m, n_v)
    X_t = np.broadcast_to((2 * 8) ** 0.5 * np.eye(8), (m, 8, 8))
    data = data._replace(X_t=X_t, y_t=np.ones((m, 8)))
    fast, _ = both_routes(data, np.array([-0.3, 0.5, 0.7]), 0.0)
    np.testing.assert_array_equal(fast.well_conditioned, [True, False, True])
