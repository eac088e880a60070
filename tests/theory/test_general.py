"""Theorem 3: general inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import negmaml as nm
from negmaml.theory import general_inputs
from tests.helpers import OVER, RATES

pytestmark = pytest.mark.usefixtures("x64")

P = 8
SIZES = dict(m=2, n_t=5, n_v=2, n_r=3)
rng = np.random.default_rng(3)
ROOT = rng.standard_normal((P, P)) / P**0.5
COVARIANCE = ROOT @ ROOT.T + 0.2 * np.eye(P)
TASK_ROOT = rng.standard_normal((P, P)) / P
WEIGHT_COVARIANCE = TASK_ROOT @ TASK_ROOT.T
GAUSSIAN = COVARIANCE * np.trace(COVARIANCE @ COVARIANCE) + 2 * np.linalg.matrix_power(
    COVARIANCE, 3
)


def predict(train=-0.3, adapt=0.2, sigma=0.5, fourth_moment=None, **changes):
    arguments = dict(covariance=COVARIANCE, weight_covariance=WEIGHT_COVARIANCE) | SIZES | changes
    rules = nm.GradientDescent(train), nm.GradientDescent(adapt)
    covariances = arguments.pop("covariance"), arguments.pop("weight_covariance")
    return general_inputs(
        *covariances, *rules, sigma=sigma, fourth_moment=fourth_moment, **arguments
    )


def theorem_3(train, adapt, sigma, F):
    """The printed equation, matrix by matrix."""
    C, Cw, n_t, n_r = COVARIANCE, WEIGHT_COVARIANCE, SIZES["n_t"], SIZES["n_r"]

    def H(rate, n):
        B = np.eye(P) - rate * C
        return C @ B @ B + rate**2 / n * (F - C @ C @ C)

    H_t, H_r, power = H(train, n_t), H(adapt, n_r), np.trace(C @ C)
    brace = np.trace(Cw @ H_t) + sigma**2 * (1 + train**2 / n_t * power)
    ratio = np.trace(H_r @ H_t) / np.trace(H_t) ** 2
    floor = np.trace(Cw @ H_r) / 2 + sigma**2 / 2 * (1 + adapt**2 / n_r * power)
    return floor + SIZES["n_v"] * SIZES["m"] / 2 * ratio * brace


# At the identity F = (p + 2) I, so that H = h I with the (p + 1)/n of Theorem 1 exactly.
@pytest.mark.parametrize("fourth_moment", (None, (OVER.p + 2) * np.eye(OVER.p)))
def test_isotropic_gaussian_inputs_give_theorem_1_exactly(fourth_moment):
    q, rates = OVER, jnp.array(RATES)
    rules = nm.GradientDescent(rates), nm.GradientDescent(rates)
    value = general_inputs(
        np.eye(q.p), q.nu**2 / q.p * np.eye(q.p), *rules, m=q.m, n_t=q.n_t, n_v=q.n_v,
        n_r=q.n_r, sigma=q.sigma, fourth_moment=fourth_moment,
    )  # fmt: skip
    np.testing.assert_allclose(value, nm.theory.overparameterized(q, rates, rates), rtol=1e-13)


@pytest.mark.parametrize("scale", (0.25, 3.0))
def test_scaled_isotropic_inputs_are_theorem_1_at_scaled_rates(scale):
    # x -> sqrt(s) x, w -> w / sqrt(s), rate -> rate / s leave every prediction unchanged.
    q, rates = OVER, jnp.array(RATES)
    rule = nm.GradientDescent(rates / scale)
    value = general_inputs(
        scale * np.eye(q.p), q.nu**2 / q.p / scale * np.eye(q.p), rule, rule,
        m=q.m, n_t=q.n_t, n_v=q.n_v, n_r=q.n_r, sigma=q.sigma,
    )  # fmt: skip
    np.testing.assert_allclose(value, nm.theory.overparameterized(q, rates, rates), rtol=1e-12)


@pytest.mark.parametrize("excess", (0.0, 2.5))
@pytest.mark.parametrize("train", RATES)
def test_theorem_3_is_the_printed_equation(train, excess):
    F = GAUSSIAN + excess * np.diag(np.diag(COVARIANCE))
    for adapt in RATES:
        expected = theorem_3(train, adapt, 0.5, F)
        assert float(predict(train, adapt, fourth_moment=F)) == pytest.approx(expected, rel=1e-12)


def test_inputs_are_gaussian_when_their_fourth_moment_is_left_out():
    assert float(predict()) == pytest.approx(float(predict(fourth_moment=GAUSSIAN)), rel=1e-13)


def test_the_default_fourth_moment_is_that_of_simulated_gaussian_inputs():
    # The loss is smooth in F, so that batches of samples give its standard error.
    x = np.random.default_rng(4).standard_normal((40, 10_000, P)) @ np.linalg.cholesky(COVARIANCE).T
    weight = np.einsum("bsi,ij,bsj->bs", x, COVARIANCE, x)
    F = (x * weight[..., None]).swapaxes(1, 2) @ x / x.shape[1]
    errors = F - GAUSSIAN
    z = errors.mean(0) / (errors.std(0, ddof=1) / len(F) ** 0.5)
    assert np.sqrt(np.mean(z**2)) < 1.5
    values = np.array([predict(fourth_moment=f) for f in F])
    assert abs(values.mean() - predict()) < 4 * values.std(ddof=1) / len(F) ** 0.5


def test_heavier_tails_change_the_loss():
    assert abs(float(predict(fourth_moment=2 * GAUSSIAN)) / float(predict()) - 1) > 0.01


def test_a_rotation_of_inputs_and_weights_changes_nothing():
    Q, _ = np.linalg.qr(np.random.default_rng(5).standard_normal((P, P)))
    rotated = predict(
        covariance=Q @ COVARIANCE @ Q.T, weight_covariance=Q @ WEIGHT_COVARIANCE @ Q.T
    )
    assert float(rotated) == pytest.approx(float(predict()), rel=1e-12)


@pytest.mark.parametrize("adapt_shape", ((), (3,), (2, 1)))
@pytest.mark.parametrize("train_shape", ((), (4,), (1, 2)))
def test_the_loss_has_the_shape_of_the_train_and_then_of_the_adapt_rate(train_shape, adapt_shape):
    rates = jnp.full(train_shape, 0.1), jnp.full(adapt_shape, 0.1)
    assert jax.eval_shape(predict, *rates).shape == train_shape + adapt_shape


def test_the_gradient_in_rates_noise_and_moments_is_the_finite_difference():
    def function(train, adapt, sigma, stretch):
        return predict(train, adapt, sigma, covariance=stretch * COVARIANCE)

    point, step = (-0.3, 0.2, 0.5, 1.1), 1e-5
    function = jax.jit(function)
    gradient = jax.grad(function, (0, 1, 2, 3))(*point)
    for i, value in enumerate(gradient):
        up, down = (
            function(*(x + s * (i == j) for j, x in enumerate(point))) for s in (step, -step)
        )
        assert float(value) == pytest.approx(float(up - down) / (2 * step), rel=1e-7)


@pytest.mark.parametrize("name", ("m", "n_t", "n_v", "n_r"))
@pytest.mark.parametrize(("size", "error"), ((0, ValueError), (2.0, TypeError), (True, TypeError)))
def test_bad_sizes_are_rejected_by_name(name, size, error):
    with pytest.raises(error, match=rf"^{name} must be an integer"):
        predict(**{name: size})


@pytest.mark.parametrize("position", ("train", "adapt"))
@pytest.mark.parametrize("rate", (float("nan"), np.array([0.1, np.inf])))
def test_rates_that_are_not_finite_are_rejected_by_name(position, rate):
    with pytest.raises(ValueError, match=r"^rate must be finite"):
        predict(**{position: rate})


@pytest.mark.parametrize("name", ("covariance", "weight_covariance", "fourth_moment"))
@pytest.mark.parametrize("shape", ((P, P + 1), (P + 1,), (P, P, 1), ()))
def test_matrices_of_another_shape_are_rejected_by_name(name, shape):
    # Another covariance of one axis makes the weights' two axes wrong.
    named = "weight_covariance" if name == "covariance" and len(shape) == 1 else name
    with pytest.raises(ValueError, match=rf"^{named} must have shape \(p, p\)"):
        predict(**{name: np.ones(shape)})


@pytest.mark.parametrize("m", (4, 5))
def test_as_many_rows_as_dimensions_are_refused(m):
    with pytest.raises(ValueError, match=rf"p > n_v m, got p=8 and n_v m={2 * m}"):
        predict(m=m)


@pytest.mark.parametrize("sigma", (-0.5, float("nan")))
def test_a_noise_level_that_is_no_standard_deviation_is_rejected_by_name(sigma):
    with pytest.raises(ValueError, match=r"^sigma "):
        predict(sigma=sigma)


@pytest.mark.parametrize("rate", (-0.2, 0.2))
def test_the_prediction_agrees_with_simulation_of_anisotropic_tasks(rate):
    """Meta-train on many small problems in NumPy; p is far above n_v m, as the theorem asks."""
    p, m, n_t, n_v, n_r, sigma, runs = 100, 1, 10, 2, 10, 0.3, 3000
    eigenvalues = np.linspace(0.5, 1.5, p)
    task_variances = np.linspace(2.0, 0.5, p) / p
    rng = np.random.default_rng(6)

    def task(n):
        X = rng.standard_normal((runs, n, p)) * eigenvalues**0.5
        return X, lambda w: np.einsum("tnp,tp->tn", X, w) + sigma * rng.standard_normal((runs, n))

    def adapted(X, y, omega):
        error = y - np.einsum("tnp,tp->tn", X, omega)
        return omega + rate * np.einsum("tnp,tn->tp", X, error) / X.shape[1]

    w = task_variances**0.5 * rng.standard_normal((runs, p))
    (X_t, y_t), (X_v, y_v) = task(n_t), task(n_v)
    X_v_b = X_v - rate * (X_v @ X_t.swapaxes(1, 2)) @ X_t / n_t
    start = adapted(X_t, y_t(w), np.zeros_like(w))
    r = y_v(w) - np.einsum("tnp,tp->tn", X_v, start)
    gram = X_v_b @ X_v_b.swapaxes(1, 2)
    omega = np.einsum("tnp,tn->tp", X_v_b, np.linalg.solve(gram, r[..., None])[..., 0])
    new = task_variances**0.5 * rng.standard_normal((runs, p))
    X_r, y_r = task(n_r)
    miss = adapted(X_r, y_r(new), omega) - new
    losses = (sigma**2 + miss**2 @ eigenvalues) / 2
    rule = nm.GradientDescent(rate)
    predicted = general_inputs(
        np.diag(eigenvalues), np.diag(task_variances), rule, rule,
        m=m, n_t=n_t, n_v=n_v, n_r=n_r, sigma=sigma,
    )  # fmt: skip
    error = losses.std(ddof=1) / runs**0.5
    bias = 0.01 * losses.mean()  # the next order, about (n_v m / p)^2 of the loss and some
    assert abs(losses.mean() - predicted) < 4 * error + bias
    assert 4 * error < 0.06 * losses.mean()
