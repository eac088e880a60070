"""Types of arrays with their shapes, at no cost at run time.

A type checker reads the annotations of jaxtyping. So does a program that imports jaxtyping before
this package, such as a run-time checker: `jaxtyping.install_import_hook("negmaml",
"beartype.beartype")`. Other programs skip this import, and annotations are plain classes.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax

if TYPE_CHECKING:  # by itself, since type checkers know its value only
    from jaxtyping import Array, ArrayLike, Bool, Float, Int, ScalarLike

    PRNGKeyArray: TypeAlias = Array  # shown by this name
    PyTree: TypeAlias = Any  # that of jaxtyping is unknown to them
elif "jaxtyping" in sys.modules:
    from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree, ScalarLike
else:
    from jax import Array
    from jax.typing import ArrayLike

    class _Shaped:
        """Stands for `Float[Array, "..."]` and the like."""

        def __class_getitem__(cls, item) -> Any:
            return Any

    Bool = Float = Int = PyTree = _Shaped
    PRNGKeyArray, ScalarLike = Any, Any

Numbers: TypeAlias = ArrayLike | Sequence[float]  # a number, an array, or a list of numbers
Rate: TypeAlias = Any  # a number, an array or list, a `Schedule`, or a pytree of them
Rows: TypeAlias = Any  # an array or list with one entry for each row, or a data frame
Devices: TypeAlias = jax.sharding.Mesh | Sequence[Any]  # a mesh, or a list of devices

__all__ = [
    "Array",
    "ArrayLike",
    "Bool",
    "Devices",
    "Float",
    "Int",
    "Numbers",
    "PRNGKeyArray",
    "PyTree",
    "Rate",
    "Rows",
    "ScalarLike",
]
