"""The version of the package, where the build and stored results read it."""

__version__ = "0.2.0"
