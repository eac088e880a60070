"""Means for a setting and a rule: the rule's filters read once, and all else without the rule.

What is solved does not know of which family the rule was, so that programs serve all of them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.arrays import namespace
from negmaml._core.settings import own_settings
from negmaml.problem.adapted_loss import means_exist
from negmaml.rules import InnerRule
from negmaml.theory.isotropic.inputs import Setting, with_spectrum
from negmaml.theory.isotropic.moments import Moments, moments
from negmaml.theory.isotropic.saddle_point import ON_NODES, TrainingSet, training_set
from negmaml.theory.isotropic.scaling import Solved, solved


class View(NamedTuple):
    """What the theory takes from a setting and a rule, or a batch of rules.

    tasks: the filters on the spectrum, and the numbers of the setting.
    adapted: whether means over adapted weights exist.
    endless: whether a filter vanishes within the spectrum of a task that is alone, without ridge.
    bend: of the task error, as in `negmaml.theory.isotropic.eigenvalue_scatter`.
    """

    tasks: TrainingSet
    adapted: Any
    endless: Any
    bend: Any


def view(setting: Setting, rule: InnerRule) -> View:
    """The `View` of a setting and a rule."""
    setting = with_spectrum(setting)
    xp, nodes = namespace(setting, rule), setting.spectrum.nodes[:-1]
    alone = (setting.m == 1) & (setting.n_v >= setting.p) & (setting.meta_ridge == 0)
    endless = alone
    if xp is not np or alone.any():
        crossing = xp.asarray(rule.spectral().zero_indicator(nodes))
        endless = alone & (crossing.min(-1) < 0) & (crossing.max(-1) > 0)
    degree = rule.spectral().degree
    bend = 1 / (2 * degree) if degree else 0.0
    exist = means_exist(rule, nodes, setting.n_t)
    return View(training_set(setting, rule), exist, endless, bend)


def moments_of(seen: View, found: Solved, with_error: bool = False) -> Moments:
    """`proportional.moments`, infinite also where the `View` says so."""
    values = moments(found, with_error, seen.bend)
    where, inf = namespace(values.limit).where, float("inf")

    def grown(value):
        return where(seen.endless & (value > 0), inf, value)

    error = values.task_error
    if with_error:
        # Where b(S) has an inverse in nearly every run, b(S) omega* does not depend on b.
        error = where(seen.adapted | (error == 0), error, inf)
    return values._replace(
        distance=grown(values.distance), task_error=error, growth=grown(values.growth)
    )


def means(setting: Setting, rule: InnerRule, with_error: bool = False) -> Moments:
    """The moments for a rule or a batch of rules, of its shape."""
    return means_at(view(setting, rule), setting.ridged, with_error)


def means_at(seen: View, ridged: bool, with_error: bool = False) -> Moments:
    """The moments for a `View`."""
    return moments_of(seen, solved(seen.tasks, ridged), with_error)


# In a trace two programs: one of each rule, and one that all rules share.
traced_view = jax.jit(view)
_means_at = jax.jit(means_at, static_argnames=("ridged", "with_error"))


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def traced_mean(seen: View, ridged: bool, of: str):
    """The distance or the task error for a `View`, in a trace.

    A test loss beyond 1e20 has as large a derivative in the distance, and taken back through all
    that follows float32 would overflow. So the derivatives of the mean itself are taken, which are
    numbers, and multiplied with what comes.
    """
    return getattr(_means_at(seen, ridged, of == "task_error"), of)


@own_settings
def _along(ridged: bool, of: str, primals, tangents):
    (seen,), (moves,) = primals, tangents
    shape, nodes = seen.tasks.log_b.shape[:-1], seen.tasks.log_b.shape[-1:]

    def of_every_rule(name, leaf):
        return jnp.broadcast_to(leaf, shape + (nodes if name in ON_NODES else ()))

    def mean(parts):
        tasks = seen.tasks._replace(**parts)
        return getattr(_means_at(seen._replace(tasks=tasks), ridged, of == "task_error"), of)

    parts = {name: x for name, x in seen.tasks._asdict().items() if x is not None}
    value, back = jax.vjp(mean, {name: of_every_rule(name, x) for name, x in parts.items()})
    (slopes,) = back(jnp.ones_like(value))
    along = jnp.zeros_like(value)
    for name, slope in slopes.items():
        move = getattr(moves.tasks, name)
        if not isinstance(move, jax.custom_derivatives.SymbolicZero):
            along += (slope * of_every_rule(name, move)).reshape(*shape, -1).sum(-1)
    return value, along


traced_mean.defjvp(_along, symbolic_zeros=True)
