"""Inner rules: how parameters adapt to a task's data."""

from negmaml.rules.rules import (
    GradientDescent,
    GradientFlow,
    Proximal,
    Rule,
    batch_shape,
    parameter,
)

__all__ = ["GradientDescent", "GradientFlow", "Proximal", "Rule", "batch_shape", "parameter"]
