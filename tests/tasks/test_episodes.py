"""Episodes: their classes, rows, orientations and augmentations, each by its address."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import negmaml as nm
from negmaml.tasks.episodes import oriented

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SIZES = {"ways": 3, "shots": 2, "queries": 4, "m": 5}
LABELS = RNG.permutation(np.repeat(list("abcdefgh"), [6, 7, 8, 9, 6, 7, 8, 9]))
# The first pixel of an image is its row, so that an episode says its rows.
IMAGES = np.broadcast_to(np.arange(len(LABELS))[:, None, None], (len(LABELS), 3, 3)).astype(float)


def episodes(**options):
    return nm.tasks.Episodes(IMAGES, LABELS, **SIZES | options)


def drawn(distribution, key=KEY):
    return jax.device_get(jax.jit(lambda draw, key: draw(key))(distribution, key))


def rows_of(part):
    return part[0][..., 0, 0].astype(int)


def is_key(x):
    return jax.dtypes.issubdtype(getattr(x, "dtype", np.dtype(float)), jax.dtypes.prng_key)


def plain(tree):
    """The leaves as arrays of NumPy, keys by their data."""
    return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in jax.tree.leaves(tree)]


def same(found, expected):
    for a, b in zip(plain(tuple(found)), plain(tuple(expected)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_splits_of_classes_are_disjoint_and_complete():
    for sizes in ((4, 3, 1), (0.5, 0.375, 0.125)):
        for key in (None, KEY):
            parts = nm.tasks.split_classes(LABELS, sizes, key=key)
            assert [len(part) for part in parts] == [4, 3, 1]
            assert sorted(np.concatenate(parts).tolist()) == list("abcdefgh")
    in_order = nm.tasks.split_classes(LABELS, (2, 2))
    assert [part.tolist() for part in in_order] == [["a", "b"], ["c", "d"]]
    again = nm.tasks.split_classes(LABELS, (4, 4), key=jax.random.key(1))
    same(again, nm.tasks.split_classes(LABELS, (4, 4), key=jax.random.key(1)))
    assert again[0].tolist() != list("abcd")


def test_episodes_of_some_classes_are_those_of_their_images():
    train, test = nm.tasks.split_classes(LABELS, (4, 4))
    for part in (train, test):
        chosen = np.isin(LABELS, part)
        alone = nm.tasks.Episodes(IMAGES[chosen], LABELS[chosen], **SIZES)
        same(drawn(episodes(classes=part)), drawn(alone))
        assert set(LABELS[rows_of(drawn(alone).query)].ravel()) <= set(part)


def test_replaced_sizes_and_options_are_those_of_a_new_distribution():
    changes = {"ways": 5, "shots": 1, "queries": 2, "m": 3, "keys": True}
    same(drawn(episodes().replace(**changes)), drawn(episodes(**changes)))
    augmented = episodes(augment=lambda key, image: image + 1)
    same(drawn(augmented.replace(augment=None)), drawn(episodes()))


@pytest.mark.parametrize("balanced", (True, False))
def test_no_image_is_in_support_and_query(balanced):
    support, query = drawn(episodes(balanced=balanced, m=40))
    for i in range(40):
        rows = np.concatenate([rows_of(support)[i], rows_of(query)[i]])
        assert len(np.unique(rows)) == len(rows) == 3 * (2 + 4)
        of_class = {}
        for row, label in zip(rows, np.concatenate([support[1][i], query[1][i]]), strict=True):
            assert of_class.setdefault(label, LABELS[row]) == LABELS[row]
        assert len(set(of_class.values())) == 3
        assert np.bincount(support[1][i]).tolist() == [2, 2, 2]


def test_unbalanced_queries_are_a_uniform_draw_from_all_other_images():
    """With classes of 3 and 9 images and one shot, 2 of 10 others are of the small class."""
    labels = np.repeat([0, 1], [3, 9])
    draw = nm.tasks.Episodes(np.arange(12), labels, ways=2, shots=1, queries=2, m=4000,
                             balanced=False)  # fmt: skip
    _, (images, _) = drawn(draw)
    small = (images < 3).sum(1)
    expected = stats.hypergeom(10, 2, 4).pmf(range(3)) * len(small)
    assert stats.chisquare(np.bincount(small, minlength=3), expected).pvalue > 1e-3


def test_turned_classes_are_classes_of_their_own():
    """An image of four different corners says its class, its turn and its mirror image."""
    corners = np.array([[1.0, 2.0], [3.0, 4.0]])
    images = corners + 10 * np.arange(2).repeat(3)[:, None, None]
    draw = nm.tasks.Episodes(images, np.arange(2).repeat(3), ways=12, shots=1, queries=2, m=30,
                             orientations=8)  # fmt: skip
    support, query = drawn(draw)
    known = [np.rot90(x, k) for x in (corners, corners[:, ::-1]) for k in range(4)]
    for i in range(30):
        seen = {}
        for part in (support, query):
            for image, label in zip(part[0][i], part[1][i], strict=True):
                turn = [np.array_equal(image % 10, form) for form in known].index(True)
                assert seen.setdefault(label, (image[0, 0] // 10, turn)) == (
                    image[0, 0] // 10,
                    turn,
                )
        assert len(set(seen.values())) == 12


def test_orientations_are_quarter_turns_and_their_mirror_images():
    image = RNG.standard_normal((4, 4, 3))
    found = jax.vmap(oriented, (None, 0))(image, jnp.arange(8))
    for turn in range(8):
        mirrored = image[:, ::-1] if turn >= 4 else image
        np.testing.assert_allclose(found[turn], np.rot90(mirrored, turn % 4), rtol=1e-6)


def test_augmentation_by_image_and_by_task():
    def noise(key, image):
        return image + jax.random.uniform(key)

    per_image, per_task = (drawn(episodes(**{by: noise})) for by in ("augment", "augment_task"))
    bare = drawn(episodes())
    for i in range(5):
        of_images, of_task = (
            np.concatenate([(a[0] - b[0])[i, :, 0, 0] for a, b in zip(some, bare, strict=True)])
            for some in (per_image, per_task)
        )
        assert len(np.unique(of_images.round(5))) == 18
        assert np.ptp(of_task) < 1e-5
    shifts = (per_task.support[0] - bare.support[0])[:, 0, 0, 0]
    assert len(np.unique(shifts.round(5))) == 5


def test_every_episode_depends_on_its_address_only():
    options = {"augment": lambda key, x: x + jax.random.normal(key), "keys": True}
    few, many = (drawn(episodes(m=m, **options)) for m in (2, 5))
    same(plain(few), [x[:2] for x in plain(many)])


def test_images_of_uint8_are_scaled_and_other_leaves_are_not():
    images = {"pixels": np.full((len(LABELS), 2), 51, np.uint8), "size": np.arange(len(LABELS))}
    draw = nm.tasks.Episodes(images, LABELS, **SIZES)
    assert draw.data["pixels"].dtype == jnp.uint8
    support = drawn(draw).support[0]
    np.testing.assert_allclose(support["pixels"], np.full((5, 6, 2), 0.2), rtol=1e-6)
    assert support["size"].dtype == draw.data["size"].dtype
    assert drawn(draw.replace(scale=False)).support[0]["pixels"].dtype == np.uint8


def test_keys_of_episodes_reach_the_loss():
    def loss(w, data):
        images, _, key = data
        return jnp.mean(images) * w**2 + w * jax.random.normal(key)

    draw = episodes(keys=True)
    tasks = draw(KEY)
    assert tasks.support[2].shape == (5,) and is_key(tasks.support[2])
    keys = jax.random.key_data(jnp.concatenate([tasks.support[2], tasks.query[2]]))
    assert len(np.unique(np.asarray(keys), axis=0)) == 10
    algorithm = nm.maml_value_and_grad(loss, nm.GradientDescent(1e-3))

    assert nm.fit(KEY, 1.0, algorithm, draw, optax.sgd(1e-3), 2).finite


def test_a_ridge_head_classifies_new_classes_of_episodes():
    """Classes whose images are noisy copies of one point, with the identity for features."""
    points = RNG.standard_normal((8, 6)).repeat(10, 0)
    x = (points + 0.1 * RNG.standard_normal(points.shape)).astype(np.float32)
    draw = nm.tasks.Episodes(x, np.arange(8).repeat(10), **SIZES)

    def accuracy(params, data):
        return jnp.mean(jnp.argmax(data[0] @ params["head"], 1) == data[1])

    rule = nm.RidgeHead(lambda params, x: x, strength=0.1)
    params = {"head": jnp.zeros((6, 3))}
    found = nm.evaluate(KEY, params, lambda p, d: 0.0, rule, draw, metric=accuracy, episodes=50)
    assert found.mean > 0.9


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: episodes(classes=["a", "z"]), r"classes must hold values of labels.*\['z'\]"),
        (lambda: episodes(classes=["a", "b"]), "ways must be at most the number of classes, 2"),
        (lambda: episodes(classes=[]), "classes must hold values of labels"),
        (lambda: episodes(orientations=2), r"orientations must be 1, 4 \(quarter turns\)"),
        (lambda: episodes(ways=33, orientations=4), "classes in all orientations, 32, got 33"),
        (lambda: nm.tasks.Episodes(np.ones((len(LABELS), 2, 3)), LABELS, orientations=4, **SIZES),
         "needs square images"),
        (lambda: episodes(augment="flip"), "augment must be a function"),
        (lambda: episodes(augment_task=lambda image: image), r"augment_task must be a function "
         r"\(key, image\) -> image, got .*too many positional"),
        (lambda: drawn(episodes(augment=lambda key, image: None)), "must return an image"),
        (lambda: episodes(queries=5), r"fewer than shots \+ queries = 7 rows: a \(6\), e \(6\)"),
        (lambda: episodes(queries=6, balanced=False), "queries must leave ways"),
        (lambda: episodes().replace(queries=5), "fewer than shots"),
        (lambda: episodes().replace(classes=["a"]), "replace takes ways, shots"),
        (lambda: nm.tasks.split_classes(LABELS, (5, 4)), "at most all 8 classes"),
        (lambda: nm.tasks.split_classes(LABELS, (0.99, 0.01)), "sizes must give every set a class"),
        (lambda: nm.tasks.split_classes(LABELS, (4, 0.5)), "sizes must be numbers of classes"),
    ),
)  # fmt: skip
def test_wrong_arguments_raise_with_their_names(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
