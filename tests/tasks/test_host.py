"""Episodes from the host are those from the device, and resume."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm

KEY = jax.random.key(3)
RNG = np.random.default_rng(1)
LABELS = RNG.permutation(np.arange(6).repeat(8))
IMAGES = RNG.integers(0, 256, (48, 4, 4), np.uint8)
SIZES = {"ways": 2, "shots": 1, "queries": 2, "m": 3, "orientations": 4, "keys": True}


def noise(key, image):
    return image + jax.random.normal(key, image.shape)


def loss(w, data):
    images, labels, key = data
    outputs = images.reshape(len(images), -1) @ w + jax.random.normal(key, (2,))
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def plain(tasks):
    """Tasks with the data of their keys."""
    return [[*part[:2], jax.random.key_data(part[2])] for part in tasks]


@pytest.fixture
def host(tmp_path):
    stored = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, IMAGES.shape)
    stored[:] = IMAGES
    read = np.load(tmp_path / "x.npy", mmap_mode="r")
    return nm.tasks.HostEpisodes(read, LABELS, augment=noise, **SIZES)


def test_draws_are_those_of_the_device(host):
    device = nm.tasks.Episodes(IMAGES, LABELS, augment=noise, **SIZES)
    assert isinstance(host.data, np.memmap)
    same(plain(host(KEY)), plain(device(KEY)))
    same(plain(host.replace(ways=4, m=2)(KEY)), plain(device.replace(ways=4, m=2)(KEY)))
    batches = iter(host.batches(KEY))
    for i in range(4):
        same(plain(next(batches)), plain(device(jax.random.fold_in(KEY, i))))


def test_an_iterator_resumes_at_its_state(host):
    whole = iter(host.batches(KEY))
    expected = [plain(next(whole)) for _ in range(5)]
    first = iter(host.batches(KEY))
    for _ in range(2):
        next(first)
    second = iter(host.batches(KEY))
    second.set_state(first.get_state())
    same([plain(next(second)) for _ in range(3)], expected[2:])


def test_fit_streams_and_resumes_from_a_checkpoint(host, tmp_path):
    pytest.importorskip("orbax.checkpoint")
    algorithm = nm.maml_value_and_grad(loss, nm.GradientDescent(0.1))
    run = partial(nm.fit, KEY, jnp.zeros((16, 2)), algorithm, host.batches(KEY), optax.sgd(0.1))
    whole = run(6)
    assert np.isfinite(whole.loss).all()
    run(3, checkpoint=tmp_path / "run")
    same(run(6, checkpoint=tmp_path / "run").params, whole.params)
    # A stream of other draws is another run.
    other = host.batches(jax.random.fold_in(KEY, 1))
    with pytest.raises(ValueError, match="differs in sample_tasks"):
        nm.fit(*run.args[:3], other, optax.sgd(0.1), 6, checkpoint=tmp_path / "run")


@pytest.mark.slow
def test_devices_share_a_stream(host):
    """Its arrays, on one device, reach all devices of the mesh, with the keys of the tasks."""
    algorithm = nm.maml_value_and_grad(loss, nm.GradientDescent(0.1))
    stream = host.replace(m=2 * jax.device_count()).batches(KEY)
    one, many = (
        nm.fit(KEY, jnp.zeros((16, 2)), algorithm, stream, optax.sgd(0.1), 2, mesh=mesh).loss
        for mesh in (None, jax.devices())
    )
    np.testing.assert_allclose(one, many, rtol=1e-5)


def test_a_traced_key_says_what_to_pass(host):
    for call in (
        lambda: jax.jit(lambda key: host(key))(KEY),
        lambda: nm.evaluate(KEY, jnp.zeros((16, 2)), loss, nm.GradientDescent(0.1), host),
    ):
        with pytest.raises(TypeError, match=r"key must be known.*HostEpisodes\.batches\(key\)"):
            call()  # fmt: skip
