"""Few-shot classification of handwritten digits that were not in the training set.

The data set is that of scikit-learn (1797 images of 8x8). Training episodes classify three of the
digits 0 to 5. Their eight rotations and reflections count as separate classes, because a network
would memorize six classes. Test episodes classify three of the digits 6 to 9, upright, from a few
images of each. All weights adapt by gradient descent, or ridge regression computes the last layer.
"""

from typing import Any, NamedTuple

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


def features(params, images):
    """One convolution and one hidden layer."""
    # The kernel adapts to each task, where XLA's own convolution is slow on CPU.
    z = jax.nn.relu(nm.im2col_convolution(images[..., None], params["kernel"], stride=2))
    return jax.nn.relu(z.reshape(len(images), -1) @ params["hidden"] + params["bias"])


def logits(params, images):
    """A head for the classes of an episode, with a scale if there is one."""
    return params.get("scale", 1.0) * (features(params, images) @ params["head"])


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


def main(
    steps: int = 800,
    shots: int = 5,
    rate: float = 0.3,
    inner_steps: int = 3,
    ridge: float | None = None,
    test_episodes: int = 600,
    seed: int = 0,
) -> DigitsResult:
    """Meta-train on episodes of 0 to 5; adapt to and test on episodes of 6 to 9.

    ridge: the strength of a ridge head in place of gradient descent.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Pixels are 0 to 16.
    images, labels = digits.images.astype(np.float32) / 16, digits.target
    seen, new = nm.tasks.split_classes(labels, (6, 4))
    sizes: dict[str, Any] = {"ways": WAYS, "shots": shots, "queries": 10}
    training = nm.tasks.Episodes(images, labels, classes=seen, orientations=8, **sizes, m=8)
    testing = nm.tasks.Episodes(images, labels, classes=new, **sizes, m=min(test_episodes, 100))

    keys = jax.random.split(jax.random.key(seed), 3)
    start = init(keys[0])
    rule: nm.InnerRule = nm.GradientDescent(rate, inner_steps)
    if ridge is not None:
        # Regression to 0 and 1 leaves the outputs small for a softmax, hence a trained scale.
        start["scale"] = jnp.asarray(5.0)
        rule = nm.RidgeHead(features, strength=ridge)
    value_and_grad = nm.maml_value_and_grad(loss, rule)
    trained = nm.fit(keys[1], start, value_and_grad, training, optax.adam(1e-3), steps).params

    def test(params, rule):
        # One key: trained and untrained weights meet the same episodes, so they compare in pairs.
        return nm.evaluate(
            keys[2], params, loss, rule, testing, metric=accuracy, episodes=test_episodes
        )

    after = test(trained, rule)
    return DigitsResult(
        before=float(test(trained, nm.GradientDescent(0.0)).mean),
        after=float(after.mean),
        untrained=float(test(start, rule).mean),
        interval=float(after.interval),
    )


if __name__ == "__main__":
    import tyro

    result = tyro.cli(main)
    print(f"digits 6 to 9, {WAYS} ways; chance is {1 / WAYS:.3f}")
    print(f"before adapting {result.before:.3f}, after {result.after:.3f} ± {result.interval:.3f}")
    print(f"after adapting untrained weights {result.untrained:.3f}")
