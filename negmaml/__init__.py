"""Differentiable meta-learning with inner learning rates of either sign, and the theory of them."""

from negmaml._core.deprecation import renamed_exports
from negmaml._core.lazy import lazily
from negmaml._core.registry import register
from negmaml._core.version import __version__ as __version__

# Names are imported when they are asked for, from where `__init__.pyi` says: few uses need all.
_get, __dir__, __all__ = lazily(__name__, __file__)
__getattr__ = renamed_exports(
    __name__,
    {
        "Fit": "FitResult",
        "LearnedRates": "MetaSGDParams",
        "Rule": "InnerRule",
        "convolution": "im2col_convolution",
        "state_per_step": "per_step_state",
    },
    otherwise=_get,
)
register("linear", "negmaml.linear:LinearModel")
