r"""Kernels of infinitely wide ReLU networks, by the arc-cosine recursion.

A network of depth L with weights W_l ~ N(0, 1) and biases b_l ~ N(0, 1), in the parametrisation

    z_1 = s W_1 x / sqrt(d) + c b_1,     z_{l+1} = s W_{l+1} relu(z_l) / sqrt(width) + c b_{l+1},
     f = z_{L+1}

(s^2 the weight variance, c^2 the bias variance) is a Gaussian process at initialisation as its
width grows, of covariance Sigma_{L+1}, and its tangent kernel is Theta_{L+1}, constant in training:

    Sigma_1 = s^2 x.x' / d + c^2                      Theta_1 = Sigma_1
    Sigma_{l+1} = s^2 E relu(u) relu(u') + c^2        Theta_{l+1} = Sigma_{l+1} + s^2 Theta_l E 1(u
    > 0) 1(u' > 0)

over (u, u') normal with covariance Sigma_l. At the angle t between them, cos t = c,

    E relu(u) relu(u') = sqrt(Sigma(x,x) Sigma(x',x')) (sin t + (pi - t) c) / (2 pi),
    E 1(u > 0) 1(u' > 0) = (pi - t) / (2 pi).

Sources: Cho and Saul, NeurIPS 2009; Lee et al., ICLR 2018; Jacot et al., NeurIPS 2018.
"""

from typing import Any

import jax.numpy as jnp

from negmaml._core.checks import check_choice, check_count, check_nonnegative
from negmaml._core.numerics import contract
from negmaml._core.pytree import pytree, static

KINDS = ("tangent", "process")


@pytree
class ReLUNetwork:
    """The kernel of `relu_network`."""

    depth: int = static()
    kind: str = static()
    weight_variance: Any
    bias_variance: Any

    def __call__(self, x1, x2):
        """The kernel between points of shapes (n1, d) and (n2, d): (n1, n2)."""
        x1, x2 = (jnp.asarray(x, jnp.result_type(float, x)) for x in (x1, x2))
        if x1.ndim != 2 or x2.ndim != 2 or x1.shape[1] != x2.shape[1]:
            raise ValueError(
                f"points must have shape (points, d) with one d, got {x1.shape} and {x2.shape}; "
                "flatten inputs of more axes"
            )
        s, c, d = self.weight_variance, self.bias_variance, x1.shape[1]
        one, two = (s * jnp.sum(x**2, 1) / d + c for x in (x1, x2))
        process = s * contract("xd,yd->xy", x1, x2) / d + c
        tangent = process
        for _ in range(self.depth):
            scale = jnp.sqrt(one[:, None] * two)
            cosine = _cosine(process, scale)
            angle = jnp.arccos(cosine)
            above = (jnp.pi - angle) / (2 * jnp.pi)
            process = s * scale * (jnp.sin(angle) / (2 * jnp.pi) + above * cosine) + c
            tangent = process + s * tangent * above
            one, two = (s * variance / 2 + c for variance in (one, two))
        return tangent if self.kind == "tangent" else process


def _cosine(process, scale):
    """process / scale in [-1, 1], exactly 1 where it is to rounding: arccos has no slope there."""
    cosine = process / jnp.where(scale > 0, scale, 1)
    margin = 8 * jnp.finfo(cosine.dtype).eps
    return jnp.where(cosine > 1 - margin, 1, jnp.maximum(cosine, -1))


def relu_network(
    depth: int, *, kind: str = "tangent", weight_variance=2.0, bias_variance=0.0
) -> ReLUNetwork:
    r"""The kernel of a fully connected ReLU network of infinite width, on points (n, d).

    Arguments:
        depth: hidden layers, an integer of at least 1.
        kind: "tangent", the neural tangent kernel, of training all layers; or "process", the
            covariance of the network at initialisation, of training the last layer.
        weight_variance: of the weights, times the inputs of a layer; 2 keeps ReLU's scale.
        bias_variance: of the biases.

    The head of `negmaml.kernels.infinite` has the recursion and the parametrisation, in which rates
    do not depend on the width. Raises TypeError or ValueError for a depth below 1, an unknown kind,
    and variances that are negative or not finite.

    >>> kernel = relu_network(1)
    >>> kernel(jnp.eye(2), jnp.eye(2))[0, 0]  # 2 |x|^2 / d from each of the two layers, over 1
    Array(2., dtype=float32)
    """
    check_choice("kind", kind, KINDS)
    for name, value in (("weight_variance", weight_variance), ("bias_variance", bias_variance)):
        check_nonnegative(name, value, "a variance")
    return ReLUNetwork(check_count("depth", depth), kind, weight_variance, bias_variance)
