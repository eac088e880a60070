"""Labelled dataset of all losses of an `Advice`."""

import numpy as np

from negmaml._core.extras import require
from negmaml._core.provenance import versions

ADAPT_RATES = np.linspace(-1, 2, 61)  # scaled; contains 0 and 1


def dataset(advice):
    """Return the losses over all rates and ridges, and those of the baselines, as a Dataset."""
    xarray = require("xarray", "advice")
    grid, curves, size = advice.grid, advice.curves, advice.unit_size
    # The coefficients give the loss at any rate, so the axis is a choice of the table only.
    adapt = ADAPT_RATES * advice.data.rate_unit if grid.adapt is None else grid.adapt
    c0, c1, c2 = (c[..., None] for c in curves.meta)
    plane = ("train_rate", "meta_ridge")
    gains = advice.gain
    variables = {
        "loss": ((*plane, "adapt_rate"), (c0 - 2 * adapt * c1 + adapt**2 * c2) / 2),
        "best_adapt_rate": (plane, curves.adapt / size),
        "best_loss": (plane, curves.loss),
        "best_loss_error": (plane, curves.error),
        "excess": (plane, curves.excess),
        "excess_error": (plane, curves.excess_error),
        "method_loss": ("method", list(advice.loss.values())),
        "method_fitted_loss": ("method", [advice.fitted_loss[name] for name in advice.loss]),
    }
    for name in ("value", "error", "low", "high", "relative"):
        values = [getattr(gains[method], name) for method in gains]
        variables[f"gain_{name}"] = ("baseline", values)
    coordinates = {
        "train_rate": grid.rates / size,
        "raw_train_rate": ("train_rate", grid.rates),
        "meta_ridge": grid.ridges,
        "adapt_rate": adapt / size,
        "raw_adapt_rate": ("adapt_rate", adapt),
        "method": list(advice.loss),
        "baseline": list(gains),
    }
    return xarray.Dataset(variables, coordinates, _attributes(advice))


def _attributes(advice) -> dict:
    low, high = advice.train_rate_interval
    return {
        "train_rate": advice.train_rate,
        "adapt_rate": advice.adapt_rate,
        "meta_ridge": advice.meta_ridge,
        "train_rate_low": low,
        "train_rate_high": high,
        "rate_unit": advice.unit,
        "unit_size": advice.unit_size,
        **advice.sizes._asdict(),
        "groups": advice.data.groups,
        "rows": len(advice.data.x),
        "features": ", ".join(advice.data.names),
        "notes": "; ".join(advice.notes),
        "loss_meaning": "half the mean squared error on rows of held-out groups not adapted on",
        **versions(),
    }
