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

Near t = 0 both need t to more digits than cos t has, so the recursion carries the squared distance
Sigma(x, x) + Sigma(x', x') - 2 Sigma(x, x') along; with r the roots of the variances, 1 - cos t is
(distance - (r - r')^2) / (2 r r'), and the next distance is, the biases dropping out,

    s^2 ( (r - r')^2 / 2 + r r' (1 - cos t - (sin t - t cos t) / pi) ).

Sources: Cho and Saul, NeurIPS 2009; Lee et al., ICLR 2018; Jacot et al., NeurIPS 2018.
"""

from typing import Any

import jax.numpy as jnp

from negmaml._core.arrays import contract
from negmaml._core.calls import explain_calls
from negmaml._core.checks import check_choice, check_count, check_nonnegative
from negmaml._core.deprecation import warn_renamed
from negmaml._core.jit import jit_fast_compile
from negmaml._core.pytree import pytree, static
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, ArrayLike, ScalarLike

KINDS = ("ntk", "nngp")
OLD_KINDS = {"tangent": "ntk", "process": "nngp"}


@pytree
class ReLUNetwork:
    """The kernel of `relu_network`, a function of two sets of points.

    depth, kind, weight_variance, bias_variance: the arguments of `relu_network`.
    """

    depth: int = static()
    kind: str = static()
    weight_variance: Any
    bias_variance: Any

    @own_settings
    def __call__(self, x1: ArrayLike, x2: ArrayLike) -> Array:
        """The kernel between points of shapes (n1, d) and (n2, d): (n1, n2)."""
        x1, x2 = (jnp.asarray(x, jnp.result_type(float, x)) for x in (x1, x2))
        if x1.ndim != 2 or x2.ndim != 2 or x1.shape[1] != x2.shape[1]:
            raise ValueError(
                f"points must have shape (points, d) with one d, got {x1.shape} and {x2.shape}; "
                "flatten inputs of more axes"
            )
        return _kernel(self, x1, x2)


def _kernel_matrix(network: ReLUNetwork, x1, x2):
    s, c, d = network.weight_variance, network.bias_variance, x1.shape[1]
    # Sigma_1(x, x) of both sets of points, from which all later variances follow.
    one, two = (s * jnp.sum(x**2, 1)[:, None] / d + c for x in (x1, x2))
    two = two.T
    ntk = nngp = s * contract("xd,yd->xy", x1, x2) / d + c
    # Computed from differences, since Sigma(x,x) + Sigma(x',x') - 2 Sigma(x,x') would cancel.
    distance = s * jnp.sum((x1[:, None] - x2) ** 2, -1) / d
    for _ in range(network.depth):
        # r r' of the recursion; its terms are named as in the head of this module.
        scale = _root(one * two)
        radius_gap = (_root(one) - _root(two)) ** 2
        one_minus_cos = _one_minus_cos(distance, radius_gap, scale)
        sine = _root(one_minus_cos * (2 - one_minus_cos))
        # 1 - cos t = 2 sin^2(t/2): arccos would lose half of the digits near t = 0. The
        # derivative of arcsin is infinite at t = pi, hence a constant there.
        angle = jnp.where(
            one_minus_cos < 2,
            2 * jnp.arcsin(_root(jnp.where(one_minus_cos < 2, one_minus_cos, 0) / 2)),
            jnp.pi,
        )
        # `above` is P(u > 0, u' > 0).
        above, cosine = (jnp.pi - angle) / (2 * jnp.pi), 1 - one_minus_cos
        nngp = s * scale * (sine / (2 * jnp.pi) + above * cosine) + c
        ntk = nngp + s * ntk * above
        distance = s * (radius_gap / 2 + scale * (one_minus_cos - (sine - angle * cosine) / jnp.pi))
        # E relu(u)^2 is half the variance.
        one, two = (s * variance / 2 + c for variance in (one, two))
    return ntk if network.kind == "ntk" else nngp


_kernel = jit_fast_compile(_kernel_matrix)


def _root(x):
    """The square root, with derivative zero at zero, which occurs if points repeat."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def _one_minus_cos(distance, radius_gap, scale):
    """1 - cos t in [0, 2]; points that are collinear up to rounding count as collinear."""
    # A difference within rounding is set to zero, or its root would be noise.
    eps = jnp.finfo(scale.dtype).eps
    left = jnp.where(distance - radius_gap < 4 * eps * distance, 0, distance - radius_gap)
    one_minus_cos = left / (2 * jnp.where(scale > 0, scale, 1))
    return jnp.where(one_minus_cos > 2 - 8 * eps, 2, one_minus_cos)


@explain_calls
def relu_network(
    depth: int,
    *,
    kind: str = "ntk",
    weight_variance: ScalarLike = 2.0,
    bias_variance: ScalarLike = 0.0,
) -> ReLUNetwork:
    r"""The kernel of a fully connected ReLU network of infinite width, on points (n, d).

    Arguments:
        depth: hidden layers, an integer of at least 1.
        kind: "ntk", the neural tangent kernel, of training all layers; or "nngp", the
            covariance of the network at initialisation, of training the last layer.
        weight_variance: of the weights, times the inputs of a layer; 2 keeps ReLU's scale.
        bias_variance: of the biases.

    The head of `negmaml.kernels.analytic` has the recursion and the parametrisation, in which rates
    do not depend on the width. Raises TypeError or ValueError for a depth below 1, an unknown kind,
    and variances that are negative or not finite.

    >>> kernel = relu_network(1)
    >>> kernel(jnp.eye(2), jnp.eye(2))[0, 0]  # 2 |x|^2 / d from each of the two layers, over 1
    Array(2., dtype=float32)
    """
    if isinstance(kind, str) and kind in OLD_KINDS:
        warn_renamed(f"relu_network(kind={kind!r})", f"kind={OLD_KINDS[kind]!r}")
        kind = OLD_KINDS[kind]
    check_choice("kind", kind, KINDS)
    for name, value in (("weight_variance", weight_variance), ("bias_variance", bias_variance)):
        check_nonnegative(name, value, "a variance")
    return ReLUNetwork(check_count("depth", depth), kind, weight_variance, bias_variance)
