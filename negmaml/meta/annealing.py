r"""MAML++: learned rates and model states of each inner step, and a loss that changes in training.

It composes `meta_sgd` with a `Schedule` for every rate, `per_step_model`, the multi-step loss with
weights that depend on the outer step, and inner gradients that are constants at first.

Source: Antoniou, Edwards and Storkey, "How to train your MAML", ICLR 2019.
"""

from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.calls import explain_calls
from negmaml._core.checks import check_finite, short_repr
from negmaml._core.pytree import as_pytree, pytree
from negmaml._core.types import Rate
from negmaml.meta import gradients
from negmaml.meta.choice import LossPair
from negmaml.meta.model_variables import MetaSGDParams, variables
from negmaml.meta.per_step import PerStepState, per_step_model
from negmaml.rules import Schedule


@pytree
class Annealing:
    """The weights and the order of the derivative as functions of the outer step.

    annealing: as in `maml_plus_plus`. second_order_from: None for second order at every step.
    """

    annealing: Any
    second_order_from: Any

    def __post_init__(self):
        if callable(self.annealing):
            object.__setattr__(self, "annealing", as_pytree(self.annealing))
        else:
            _check_outer_steps("annealing", self.annealing)
        _check_outer_steps("second_order_from", self.second_order_from)
        # Zero needs no program of first order.
        if isinstance(self.second_order_from, int) and self.second_order_from == 0:
            object.__setattr__(self, "second_order_from", None)

    def weights(self, steps: int, count):
        """Return the weights of the query losses at outer step `count`, (steps,)."""
        if not callable(self.annealing):
            # The part of the annealing that is over, 1 for an annealing of no steps.
            share = jnp.where(count < self.annealing, count / jnp.maximum(self.annealing, 1), 1.0)
            return jnp.full(steps, (1 - share) / steps).at[-1].add(share)
        weights = jnp.asarray(self.annealing(count))
        if weights.shape != (steps,):
            raise ValueError(
                f"annealing must return a weight for each of {steps} inner steps, got shape "
                f"{weights.shape}"
            )
        return weights


def _check_outer_steps(name: str, value) -> None:
    """Raise unless the value is a number of outer steps, at least 0."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole and not (
        isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.integer)
    ):
        raise TypeError(
            f"{name} must be an integer, a number of outer steps, got {short_repr(value)}"
        )
    if not isinstance(value, jax.core.Tracer) and value < 0:
        raise ValueError(f"{name} must be at least 0 outer steps, got {value!r}")


def maml_plus_plus(losses: LossPair, plan: Annealing, meta, state, tasks, weight):
    """Return value, and gradients in the parameters and in the rates of each step."""
    if not isinstance(state, PerStepState):
        raise TypeError(
            "params must be those of maml_plus_plus_params(model, rate=..., steps=...), got "
            "MetaSGDParams of a model without a state for each step"
        )
    count, rule = state.counter.outer, meta.rule
    losses = losses._replace(step_weights=plan.weights(rule.steps, count))

    def second_order(meta):
        return gradients.meta_sgd(losses, rule, meta, state, tasks, weight)

    def first_order(meta):
        return gradients.meta_sgd(
            losses, rule, meta, state, tasks, weight, of=gradients.first_order
        )

    if plan.second_order_from is None:
        return second_order(meta)
    # Both programs are compiled, and one of them is run.
    return lax.cond(count < plan.second_order_from, first_order, second_order, meta)


@explain_calls
def maml_plus_plus_params(model: Any, *, rate: Rate = 0.01, steps: int = 5) -> MetaSGDParams:
    r"""Return the parameters from which `maml_plus_plus` trains: `MetaSGDParams`.

    Arguments:
        model: any pytree, or a model with a state, such as a Flax NNX module with BatchNorm
            (`nm.variables`).
        rate: the first value of the inner rates, of any sign. A number, or a `Schedule` with a
            value for each step, gives every parameter array rates of its own. A prefix of the
            parameters gives one set of rates for each of its entries, such as one for each layer of
            a list of layers.
        steps: number of inner steps.

    Returns `MetaSGDParams` with a `Schedule` of `steps` rates for each entry of `rate`, and the
    model as a `PerStepModel`, which has a state for each step and counts the outer steps. After
    training, `params.rule` is the rule of the test and `params.params` the model:

        nm.evaluate(key, trained.params, loss, trained.rule, tasks)

    Raises ValueError or TypeError for a rate that does not fit the parameters or is not finite, for
    steps that are not an integer of at least 1, and as `variables`.

    >>> start = maml_plus_plus_params({"w": 1.0, "b": 0.0}, rate=0.1, steps=2)
    >>> start.rule.steps, start.rate["b"].values.tolist()
    (2, [0.10000000149011612, 0.10000000149011612])
    """
    own = per_step_model(model, steps)
    params = variables(own).params
    rate = check_finite("rate", rate, "an inner learning rate")

    def schedule(number):
        values = number.first(steps) if isinstance(number, Schedule) else [number] * steps
        return Schedule(jnp.asarray(values, float))

    if isinstance(rate, Schedule) or jax.tree_util.all_leaves([rate]):
        rates = jax.tree.map(lambda _: schedule(rate), params)
    else:
        rates = jax.tree.map(schedule, rate, is_leaf=lambda x: isinstance(x, Schedule))
    found = MetaSGDParams(own, rates)
    found.rule.check(params)
    return found
