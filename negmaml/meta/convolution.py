"""Convolution as a product with patches, for networks whose kernels adapt to a task."""

import jax.numpy as jnp
import numpy as np

from negmaml._core.checks import check_count
from negmaml._core.types import Array


def im2col_convolution(x: Array, kernel: Array, *, stride: int = 1, padding: str = "SAME") -> Array:
    r"""Return a two-dimensional convolution, as one matrix product over patches (im2col).

        z[n, i, j, o] = sum_{a, b, c} x[n, stride i + a, stride j + b, c] kernel[a, b, c, o]

    Arguments:
        x: images, shape (n, height, width, in).
        kernel: shape (kernel height, kernel width, in, out).
        stride: step between patches, an integer of at least 1.
        padding: "SAME" (zeros around, ceil(size / stride) positions) or "VALID" (none).

    Returns shape (n, rows, columns, out), as `jax.lax.conv_general_dilated` does in the layout
    NHWC, HWIO. On CPU, XLA is slow for convolutions whose kernel differs from task to task or that
    are differentiated twice. This function is several times faster there under MAML, and takes
    kernel height * width times the memory of x. On GPU prefer the native one. Raises ValueError
    for shapes that do not fit or another padding.

    >>> im2col_convolution(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 2)), padding="VALID").shape
    (1, 2, 2, 2)
    """
    stride = check_count("stride", stride)
    if np.ndim(x) != 4 or np.ndim(kernel) != 4 or x.shape[3] != kernel.shape[2]:
        raise ValueError(
            "x and kernel must have shapes (n, height, width, in) and (kernel height, kernel "
            f"width, in, out), got {np.shape(x)} and {np.shape(kernel)}"
        )
    if padding not in ("SAME", "VALID"):
        raise ValueError(f"padding must be 'SAME' or 'VALID', got {padding!r}")
    # Zeros around x make the number of positions that of XLA's "SAME".
    window = kernel.shape[:2]
    if padding == "SAME":
        around = [_same(size, k, stride) for size, k in zip(x.shape[1:3], window, strict=True)]
        x = jnp.pad(x, ((0, 0), *around, (0, 0)))
    rows, columns = ((size - k) // stride + 1 for size, k in zip(x.shape[1:3], window, strict=True))
    # One slice of x for each entry of the kernel, in the order in which `reshape` flattens it.
    patches = [
        x[:, a : a + stride * rows : stride, b : b + stride * columns : stride]
        for a in range(window[0])
        for b in range(window[1])
    ]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[3])


def _same(size: int, window: int, stride: int) -> tuple[int, int]:
    """Return the zeros before and after that make ceil(size / stride) positions, as XLA pads."""
    # The last position starts at (positions - 1) * stride and needs `window` entries.
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2
