"""Few-shot classification of handwritten digits that were not in the training set.

The data set is that of scikit-learn (1797 images of 8x8). Training episodes classify three of the
digits 0 to 5. Their eight rotations and reflections count as separate classes, because a network
would memorize six classes. Test episodes classify three of the digits 6 to 9, upright, from a few
images of each.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import negmaml as nm

WAYS, UNITS = 3, 64


class DigitsResult(NamedTuple):
    """Accuracy on query images of new digits, before and after adapting, and without training."""

    before: float
    after: float
    untrained: float
    interval: float  # half the width of the 95% interval of `after`


def logits(params, images):
    """One convolution, one hidden layer, and a head for the classes of an episode."""
    # The kernel adapts to each task, where XLA's own convolution is slow on CPU.
    z = jax.nn.relu(nm.im2col_convolution(images[..., None], params["kernel"], stride=2))
    z = jax.nn.relu(z.reshape(len(images), -1) @ params["hidden"] + params["bias"])
    return z @ params["head"]


def loss(params, data):
    """Mean cross entropy on (images, labels)."""
    images, labels = data
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels))


def init(key):
    """He-normal weights; the head starts at zero, so that no class is preferred."""
    kernel, hidden = jax.random.split(key)
    return {
        # ReLU halves the second moment, hence 2 over the inputs of a unit: 3 x 3 pixels, and
        # 4 x 4 positions of 16 channels behind the stride.
        "kernel": jax.random.normal(kernel, (3, 3, 1, 16)) * (2 / 9) ** 0.5,
        "hidden": jax.random.normal(hidden, (256, UNITS)) * (2 / 256) ** 0.5,
        "bias": jnp.zeros(UNITS),
        "head": jnp.zeros((UNITS, WAYS)),
    }


def accuracy(params, data):
    """Fraction of the images that are classified correctly."""
    images, labels = data
    return jnp.mean(jnp.argmax(logits(params, images), -1) == labels)


def in_all_orientations(images, labels):
    """Rotate by quarter turns and reflect: eight classes for each digit."""
    mirrored = images, images[:, :, ::-1]
    rotated = [np.rot90(x, k, axes=(1, 2)) for x in mirrored for k in range(4)]
    # Steps of ten keep the labels of the orientations apart.
    return np.concatenate(rotated), np.concatenate([labels + 10 * i for i in range(8)])


def main(
    steps: int = 800,
    shots: int = 5,
    rate: float = 0.3,
    inner_steps: int = 3,
    test_episodes: int = 600,
    seed: int = 0,
) -> DigitsResult:
    """Meta-train on episodes of 0 to 5; adapt to and test on episodes of 6 to 9."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Pixels are 0 to 16.
    images, labels = digits.images.astype(np.float32) / 16, digits.target
    seen = labels < 6
    sizes = {"ways": WAYS, "shots": shots, "queries": 10}
    training = nm.tasks.Episodes(*in_all_orientations(images[seen], labels[seen]), **sizes, m=8)
    testing = nm.tasks.Episodes(images[~seen], labels[~seen], **sizes, m=min(test_episodes, 100))

    keys = jax.random.split(jax.random.key(seed), 3)
    rule = nm.GradientDescent(rate, inner_steps)
    value_and_grad = nm.maml_value_and_grad(loss, rule)
    start = init(keys[0])
    trained = nm.fit(keys[1], start, value_and_grad, training, optax.adam(1e-3), steps).params

    def test(params):
        # One key: trained and untrained weights meet the same episodes, so they compare in pairs.
        return nm.evaluate(
            keys[2], params, loss, rule, testing,
            metric=accuracy, episodes=test_episodes, per_step=True,
        )  # fmt: skip

    end, untrained = test(trained), test(start)
    return DigitsResult(
        # Entry k of the mean is the accuracy after k inner steps.
        before=float(end.mean[0]),
        after=float(end.mean[-1]),
        untrained=float(untrained.mean[-1]),
        interval=float(end.interval[-1]),
    )


if __name__ == "__main__":
    import tyro

    result = tyro.cli(main)
    print(f"digits 6 to 9, {WAYS} ways; chance is {1 / WAYS:.3f}")
    print(f"before adapting {result.before:.3f}, after {result.after:.3f} ± {result.interval:.3f}")
    print(f"after adapting untrained weights {result.untrained:.3f}")
