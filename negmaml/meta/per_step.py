r"""A state of the model for each inner step, as the normalisation statistics of MAML++.

Activations shift as the weights adapt, so statistics after k inner steps differ from those before
them. A `PerStepModel` has a stack of steps + 1 states: the loss of inner step k reads and replaces
state k, and the query after k steps does too. Steps beyond the last state share it.

Source: Antoniou, Edwards and Storkey, "How to train your MAML", ICLR 2019.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from negmaml._core.calls import explain_calls
from negmaml._core.checks import check_callable, check_count
from negmaml._core.display import Table, add_fields_repr, add_table_repr, tree_text
from negmaml._core.keys import is_typed_key
from negmaml._core.pytree import pytree
from negmaml.meta.model_variables import Form, OwnVariables, Variables, variables
from negmaml.meta.stateful import StepCount


@add_fields_repr
class PerStepState(NamedTuple):
    """The states of all inner steps, stacked, and the number of the step that comes next."""

    stack: Any
    counter: StepCount

    @property
    def current(self):
        """The state of the step that comes next."""
        return jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, self._place(x), keepdims=False), self.stack
        )

    def after(self, new):
        """Return the states after a step whose new state this is."""
        stack = jax.tree.map(
            lambda x, n: lax.dynamic_update_index_in_dim(x, n, self._place(x), 0), self.stack, new
        )
        return PerStepState(stack, self.counter._replace(inner=self.counter.inner + 1))

    def _place(self, leaf):
        # Evaluation may take more steps than training.
        return jnp.minimum(self.counter.inner, leaf.shape[0] - 1)


@add_table_repr
@pytree
class PerStepModel(OwnVariables):
    """A model with a state for each inner step, made by `per_step_model`.

    Attributes:
        model: the model with the state of the step that comes next: of the first at the start, of
            the last after adapting.
        states: the states of all steps, stacked along the first axis.
        counter: counter.inner, the number of the next step, and counter.outer, the number of
            meta-steps so far.

    >>> import negmaml as nm
    >>> start = nm.per_step_model(nm.Stateful(0.0, 0.0), steps=2)
    >>> start.states.shape, int(start.counter.outer)  # of two inner steps and the query
    ((3,), 0)
    """

    model: Any
    states: Any
    counter: StepCount

    def own_variables(self) -> Variables:
        """The trained leaves of the model, the states, and the form."""
        inner = variables(self.model)
        state = PerStepState(jax.tree.map(jnp.asarray, self.states), StepCount(*self.counter))
        return Variables(inner.params, state, PerStepForm(inner.form))

    def _summary(self) -> Table:
        rows = [(name, tree_text(getattr(self, name))) for name in ("model", "states")]
        return Table("Model with a state for each inner step", rows)


@pytree
class PerStepForm(Form):
    """A `PerStepModel`. inner: the form of its model."""

    inner: Form

    def model(self, params, state):
        """The model with the current state, and all states."""
        return PerStepModel(self.inner.model(params, state.current), *state)

    def arguments(self, params, state):
        """The arguments of the model with the current state."""
        return self.inner.arguments(params, state.current)

    def outcome(self, arguments, state, result, has_aux):
        """That of the model, whose new state replaces the current one."""
        value, new, aux = self.inner.outcome(arguments, state.current, result, has_aux)
        return value, state.after(new), aux

    def gradient(self, model, gradient, state):
        """The gradient in place of the model, and the new states."""
        return PerStepModel(gradient, *state)

    def parts_of_gradient(self, model, gradient):
        """The gradient and the new states."""
        return gradient.model, PerStepState(gradient.states, gradient.counter)


@explain_calls
def per_step_model(model: Any, steps: int) -> PerStepModel:
    r"""Return the model with a separate state for each of `steps` inner steps and for the query.

    Arguments:
        model: a model with a state (`nm.variables`): a Flax NNX module, variables of linen, or
            `Stateful`. The states start alike; random keys differ from step to step.
        steps: number of inner steps. Steps beyond it share the last state.

    The result takes the place of the model in every algorithm, `fit`, `adapt` and `evaluate`, with
    the same loss. Its gradient is a `PerStepModel` with the gradient of the trained leaves for a
    model. Raises TypeError or ValueError for steps that are not an integer of at least 1, and as
    `variables`. Source: Antoniou, Edwards and Storkey, ICLR 2019.

    >>> import negmaml as nm
    >>> count = lambda w, state, x: ((w - x) ** 2, state + 1)
    >>> start = per_step_model(nm.Stateful(0.0, 0.0), steps=2)
    >>> after = nm.adapt(count, start, 1.0, nm.GradientDescent(0.1))
    >>> after.states.tolist(), float(after.model.state)
    ([1.0, 0.0, 0.0], 0.0)
    """
    found = variables(model)
    if isinstance(found.form, PerStepForm):
        raise TypeError(f"model must not have a state for each step yet, got {model!r}")
    return PerStepModel(found.model, *_start(found.state, check_count("steps", steps)))


def per_step_state(
    loss: Callable[..., Any], steps: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    r"""Return (loss, init) with a separate state for each of `steps` inner steps and the query.

    It is `per_step_model` for a loss of (params, state, data), as a function. The new state is a
    stack of steps + 1 states and the number of the step; `init` makes it from one state.

    >>> count = lambda w, state, x: ((w - x) ** 2, state + 1)
    >>> loss, init = per_step_state(count, steps=1)
    >>> stack, _ = loss(0.0, init(jnp.zeros(())), 1.0)[1]
    >>> stack.tolist()
    [1.0, 0.0]
    """
    check_callable("loss", loss, "of (params, state, data)")
    check_count("steps", steps)

    def init(state):
        return _start(state, steps)

    def stepped(params, state, data):
        value, new, *aux = loss(params, state.current, data)
        return value, state.after(new), *aux

    return stepped, init


def _start(state, steps: int) -> PerStepState:
    """Return a state for each inner step and one for the query after them, alike at the start."""

    def stack(leaf):
        leaf = jnp.asarray(leaf)
        if not is_typed_key(leaf):
            return jnp.stack([leaf] * (steps + 1))
        # Equal keys would draw the same numbers in every step.
        flat = jax.vmap(
            lambda k: jax.vmap(lambda key: jax.random.fold_in(key, k))(leaf.ravel())
        )(jnp.arange(steps + 1))  # fmt: skip
        return flat.reshape(steps + 1, *leaf.shape)

    zero = jnp.zeros((), int)
    return PerStepState(jax.tree.map(stack, state), StepCount(zero, zero))
