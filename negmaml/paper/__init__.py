"""Reproduces the paper's figures and phase diagrams, and cross-checks all methods."""

from negmaml._core.lazy import lazily

__getattr__, __dir__, __all__ = lazily(__name__, __file__)
