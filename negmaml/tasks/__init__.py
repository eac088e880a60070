"""Distributions of tasks: pytrees that, called with a key, give `negmaml.Tasks`."""

from negmaml.tasks.arrays import Episodes, Grouped
from negmaml.tasks.linear import Linear
from negmaml.tasks.quadratic import Quadratic
from negmaml.tasks.sinusoid import Sinusoid

__all__ = ["Episodes", "Grouped", "Linear", "Quadratic", "Sinusoid"]
