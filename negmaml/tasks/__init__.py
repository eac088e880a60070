"""Distributions of tasks: pytrees that return `negmaml.Tasks` for a random key."""

from negmaml.tasks.arrays import Episodes, Grouped
from negmaml.tasks.linear import Linear
from negmaml.tasks.quadratic import Quadratic
from negmaml.tasks.sinusoid import Sinusoid

__all__ = ["Episodes", "Grouped", "Linear", "Quadratic", "Sinusoid"]
