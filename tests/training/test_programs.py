"""Equal optimizers share a program, and the number of programs is bounded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from tests.internals import advance_in_place, programs

TARGETS = jnp.arange(1.0, 5.0)
DECAY = 0.5


def value_and_grad(w, targets):
    return jax.value_and_grad(lambda w: jnp.mean((w - targets) ** 2))(w)


def sample(key):
    return TARGETS + 0 * jax.random.key_data(key)[0]


def train(optimizer):
    return nm.fit(jax.random.key(0), 3.0, value_and_grad, sample, optimizer, 5)


@pytest.fixture(autouse=True)
def no_programs():
    programs._optimizers.clear()
    programs._structures.clear()
    advance_in_place.clear_cache()


def test_equal_optimizers_compile_once():
    results = [train(optax.adam(1e-2)) for _ in range(3)]
    assert advance_in_place._cache_size() == 1
    assert len({float(result.params) for result in results}) == 1


def test_other_numbers_and_other_structures_are_other_optimizers():
    found = {
        float(train(optimizer).params)
        for optimizer in (optax.adam(1e-2), optax.adam(-1e-2), optax.adam(1e-2, b1=0.8),
                          optax.chain(optax.adam(1e-2), optax.scale(0.5)),
                          optax.adam(lambda step: 1e-2 / (1 + step)))
    }  # fmt: skip
    assert len(found) == advance_in_place._cache_size() == 5


def test_globals_of_an_optimizer_are_part_of_its_identity(monkeypatch):
    """Closures with the same code, whose global variable has changed, are not equal."""

    def decaying():
        return optax.GradientTransformation(
            lambda params: (), lambda g, state, params: (-DECAY * params, state)
        )

    first = train(decaying())
    monkeypatch.setitem(globals(), "DECAY", 0.25)
    second = train(decaying())
    np.testing.assert_allclose([first.params, second.params], [3 * 0.5**5, 3 * 0.75**5], rtol=1e-6)


def test_an_optimizer_that_cannot_be_compared_still_trains():
    def update(gradient, state, params):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(lambda g: np.float32(-0.1) * g, shape, gradient), state

    result = train(optax.GradientTransformation(lambda params: (), update))
    assert bool(result.finite) and float(result.params) < 3


@pytest.mark.slow
def test_programs_are_bounded(monkeypatch):
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 2)
    for rate in (0.1, 0.2, 0.3):
        train(optax.sgd(rate))
    assert advance_in_place._cache_size() == 1
    train(optax.sgd(0.3))
    assert advance_in_place._cache_size() == 1
