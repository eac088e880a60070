r"""Models of any library, taken apart into parameters that train and a state, and made again.

The parts of each kind of model, and the result of its loss:

| model | trained | state | result of the loss |
|---|---|---|---|
| any pytree | floating point leaves | `()` | value |
| `Stateful(params, state)` | `params` | `state` | (value, new state) |
| Flax NNX module | `nnx.Param` | other variables | value |
| Flax linen variables | "params" | other collections | value, or (value, new collections) |
| `MetaSGDParams(model, rate)` | model and rate | of the model | as of the model |
| `ParamsAndRule(model, rule)` | model, rule, or both | of the model | as of the model |
| `PerStepModel` | those of its model | one for each inner step | as of the model |

A loss is a function of (model, data), that of `Stateful` of (params, state, data). The loss of an
NNX module updates statistics and random streams in place. It gets a copy, so that no traced array
ends up in the module of the user.

Everything else in the package works on `Variables`. A model without a state has the state `()`,
which has no leaves and costs nothing.
"""

import sys
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from negmaml._core.checks import check_choice
from negmaml._core.display import Table, add_fields_repr, add_table_repr, tree_text
from negmaml._core.keys import is_typed_key, with_counter_based_keys
from negmaml._core.pytree import (
    as_float_arrays,
    nothing_like,
    pytree,
    split_floating,
    static,
)
from negmaml._core.types import PyTree, Rate
from negmaml.meta.partition import StaticTree, check_scalar, partition_floating
from negmaml.rules import GradientDescent, Schedule, as_rule

# Collections that layers of linen update. A dict with other names beside "params" is a plain
# pytree, all of which trains.
LINEN_STATE = {"batch_stats", "cache", "intermediates", "spectral_stats"}


@add_fields_repr
class Stateful(NamedTuple):
    """Parameters that train, and the state of the model that its loss updates.

    Attributes:
        params: any pytree.
        state: any pytree, such as running statistics.

    Pass it as `params` to `adapt`, `fit`, `evaluate` or an algorithm. The loss is then a function
    of (params, state, data) that returns (value, new state) or (value, new state, aux). A typed key
    in the state is another one for each task and each call of the loss.

    >>> import negmaml as nm
    >>> count = lambda w, state, x: ((w - x) ** 2 / 2, state + 1)  # calls of the loss
    >>> adapted = nm.adapt(count, nm.Stateful(0.0, 0), 1.0, nm.GradientDescent(0.5, steps=3))
    >>> float(adapted.params), int(adapted.state)
    (0.875, 3)
    """

    params: Any
    state: Any


@add_fields_repr
class MetaSGDParams(NamedTuple):
    """Meta-parameters of `meta_sgd`: a model and its inner learning rates.

    Attributes:
        params: the model, in any form that `adapt` takes.
        rate: a number, or a pytree like the trained leaves of the model or a prefix of it.

    The rates are trained without a constraint, so they may become zero or negative.

    >>> import negmaml as nm
    >>> start = nm.MetaSGDParams({"w": 0.0, "b": 0.0}, rate={"w": 0.1, "b": -0.1})
    >>> start.rule.steps, start.rule.rate["b"]
    (1, -0.1)
    """

    params: Any
    rate: Rate

    @property
    def rule(self) -> GradientDescent:
        """`GradientDescent` at these rates, for as many steps as a `Schedule` among them has.

        One step without a `Schedule`; then GradientDescent(rate, steps) takes more.
        """
        rates = jax.tree.leaves(self.rate, is_leaf=lambda node: isinstance(node, Schedule))
        counts = [jnp.shape(rate.values)[0] for rate in rates if isinstance(rate, Schedule)]
        return GradientDescent(self.rate, max(counts, default=1))


@add_fields_repr
class ParamsAndRule(NamedTuple):
    """A model and the rule that adapts it, as the meta-parameters of an algorithm.

    Attributes:
        params: the model, in any form that `adapt` takes.
        rule: the rule, used in place of that which the algorithm was built with.

    `wrt` of the algorithm names the part that trains, and `fit` leaves the other part as it is.
    Gradients have the same form, with None in place of leaves that do not train.

    >>> import negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> rule = nm.GradientDescent(0.25)
    >>> value_and_grad = nm.maml_value_and_grad(square, rule, wrt="both")
    >>> pair = nm.ParamsAndRule(0.0, rule)
    >>> value, gradient = value_and_grad(pair, nm.Tasks(jnp.ones(1), jnp.ones(1)))
    >>> float(gradient.params), float(gradient.rule.rate)
    (-0.5625, -0.75)
    """

    params: Any
    rule: Any


@add_fields_repr
class PESParams(NamedTuple):
    """Meta-parameters of `persistent_evolution_strategies`, and its unfinished inner problems.

    Attributes:
        params: a `ParamsAndRule`.
        state: follows the calls of the algorithm; it does not train.

    >>> import negmaml as nm
    >>> square, rule = lambda w, target: (w - target) ** 2, nm.GradientDescent(0.1, steps=4)
    >>> value_and_grad, init = nm.persistent_evolution_strategies(
    ...     square, rule, truncation=2, sigma=0.01, samples=4
    ... )
    >>> start = init(nm.ParamsAndRule(0.0, rule), nm.Tasks(jnp.ones(1), jnp.ones(1)))
    >>> start.params.rule.steps
    4
    """

    params: Any
    state: Any


class Form:
    """The form of a model: how it is made of its parts, and how its loss is called.

    A form is a pytree, so that it can be an argument of a compiled program.
    """

    @abstractmethod
    def model(self, params: PyTree, state: PyTree) -> Any:
        """Return the model in the user's form, from its trained leaves and its state."""

    def arguments(self, params: PyTree, state: PyTree) -> tuple[Any, ...]:
        """Return the arguments of a loss or metric that come before the data."""
        return (self.model(params, state),)

    @abstractmethod
    def outcome(
        self, arguments: tuple[Any, ...], state: PyTree, result: Any, has_aux: bool
    ) -> tuple[Any, Any, Any]:
        """Return (value, new state, aux) of a loss, after a call with these arguments."""

    def gradient(self, model: Any, gradient: PyTree, state: PyTree) -> Any:
        """Return the gradient in the user's form; the new state takes the place it has there."""
        return gradient

    def parts_of_gradient(self, model: Any, gradient: PyTree) -> tuple[Any, Any]:
        """Return (gradient, new state) from the result of a function of the user's."""
        return gradient, ()


@add_table_repr
class Variables(NamedTuple):
    """A model in parts: its trained leaves, its state, and the form that joins them.

    Attributes:
        params: a pytree with None in place of leaves that do not train.
        state: running statistics, counters and random keys; `()` if there are none.
        form: the rest of the model.

    >>> import negmaml as nm
    >>> parts = nm.variables({"w": 1.0, "name": "linear"})
    >>> float(parts.params["w"]), parts.params["name"], parts.state
    (1.0, None, ())
    >>> parts.model["name"]
    'linear'
    """

    params: Any
    state: Any
    form: Form

    @property
    def model(self) -> Any:
        """The model in the user's form."""
        return self.form.model(self.params, self.state)

    def _summary(self) -> Table:
        kind = type(self.form).__name__.removesuffix("Form")
        rows = [("trained", tree_text(self.params)), ("state", tree_text(self.state))]
        return Table(f"Variables of a model of kind {kind}", rows)


class OwnVariables:
    """A model that knows its parts."""

    @abstractmethod
    def own_variables(self) -> Variables:
        """Return the parts of the model."""


@pytree
class PytreeForm(Form):
    """A pytree without a state. static: its leaves that do not train."""

    static: StaticTree

    def model(self, params, state):
        """The pytree."""
        return self.static.combined(params)

    def outcome(self, arguments, state, result, has_aux):
        """A value, or (value, aux)."""
        value, aux = check_scalar(result, has_aux)
        return value, state, aux


@pytree
class StatefulForm(Form):
    """`Stateful` parameters. static: the leaves of the parameters that do not train."""

    static: StaticTree

    def model(self, params, state):
        """The pair."""
        return Stateful(self.static.combined(params), state)

    def arguments(self, params, state):
        """Parameters and state."""
        return tuple(self.model(params, state))

    def outcome(self, arguments, state, result, has_aux):
        """(value, new state) or (value, new state, aux)."""
        if not (isinstance(result, tuple) and len(result) in (2, 3)):
            raise TypeError(
                "the loss of Stateful parameters must return (value, new state) or (value, new "
                f"state, aux), got {type(result).__name__}"
            )
        # The aux of a loss with state needs no has_aux: it is the third of three.
        value, new, *aux = result
        check_scalar(value, False)
        # A loss may return its key as it was; the next call must not draw the same numbers.
        return value, _next_keys(like_state(new, state)), aux[0] if aux else None

    def gradient(self, model, gradient, state):
        """The new state in place of the gradient of the state."""
        return Stateful(gradient, state)

    def parts_of_gradient(self, model, gradient):
        """Both parts of the pair."""
        return tuple(gradient)


@pytree
class LinenForm(Form):
    """Variables of Flax linen.

    fixed: the leaves of its parameters that do not train. kind: dict, or FrozenDict.
    """

    fixed: StaticTree
    kind: Any = static()

    def model(self, params, state):
        """The dict of collections."""
        return self.kind({**state, "params": self.fixed.combined(params)})

    def outcome(self, arguments, state, result, has_aux):
        """A value, or (value, new collections) as `apply` returns them, or with aux."""
        value, new, *aux = result if isinstance(result, tuple) else (result, {})
        check_scalar(value, False)
        # `apply` returns the collections that it was asked for, as dicts even of a FrozenDict.
        new = _in_containers_of(state, {**state, **new})
        return value, like_state(new, state), aux[0] if aux else None

    def gradient(self, model, gradient, state):
        """The new collections beside the gradient of the parameters."""
        return self.kind({**state, "params": gradient})

    def parts_of_gradient(self, model, gradient):
        """The gradient of the parameters, and the other collections."""
        others = {name: gradient.get(name, model[name]) for name in model if name != "params"}
        return gradient["params"], others


@pytree
class NNXForm(Form):
    """A Flax NNX module.

    frozen: its parameters that do not train. trained: the filter of the variables that do, which
    need not be parameters.
    """

    frozen: Any
    graph: Any = static()
    trained: Any = static()

    def model(self, params, state):
        """A new module."""
        return _nnx().merge(self.graph, params, self.frozen, state, copy=True)

    def outcome(self, arguments, state, result, has_aux):
        """A value, or (value, aux); the state is that of the module after the call."""
        value, aux = check_scalar(result, has_aux)
        return value, like_state(self._state_of(arguments[0]), state), aux

    def gradient(self, model, gradient, state):
        """The gradient as `nnx.grad` returns it; the module gets the new state."""
        _nnx().update(model, state)
        return gradient

    def parts_of_gradient(self, model, gradient):
        """The gradient, and the state of the module after the call."""
        return gradient, self._state_of(model)

    def _state_of(self, module):
        nnx = _nnx()
        return nnx.split(module, self.trained, nnx.Param, ...)[-1]


@pytree
class PairForm(Form):
    """A model beside numbers of its adaptation: `MetaSGDParams` or `ParamsAndRule`.

    inner: the form of the model. fixed: a pair of all that does not train. kind: its class.
    trained: the part of a `ParamsAndRule` that trains, one of `TRAINED`.
    """

    inner: Form
    fixed: StaticTree
    kind: Any = static()
    trained: str = static(default="both")

    def model(self, params, state):
        """Both parts in the user's form."""
        first, second = self.fixed.combined(params)
        return self.kind(self.inner.model(first, state), second)

    def arguments(self, params, state):
        """Raise TypeError: a loss takes a model."""
        user = "meta_sgd and maml_plus_plus"
        if self.kind is ParamsAndRule:
            user = "maml, maml_value_and_grad and other algorithms"
        raise TypeError(
            f"params must be a model here, got {self.kind.__name__}, which is for {user}; pass its "
            "parts, .params as params and .rule as rule"
        )

    def outcome(self, arguments, state, result, has_aux):
        """That of the model."""
        return self.inner.outcome(arguments, state, result, has_aux)

    def gradient(self, model, gradient, state):
        """The gradients of the model, in its form, and of the other part."""
        first, second = gradient
        return self.kind(self.inner.gradient(model.params, first, state), second)

    def parts_of_gradient(self, model, gradient):
        """The gradients of both parts, and the new state of the model."""
        first, second = gradient
        of_params, state = self.inner.parts_of_gradient(model.params, first)
        return self.kind(of_params, second), state


@pytree
class PESForm(Form):
    """`PESParams`. inner: the form of its parameters, whose state comes first of two."""

    inner: Form

    def model(self, params, state):
        """Parameters and state."""
        return PESParams(self.inner.model(params, state[0]), state[1])

    def outcome(self, arguments, state, result, has_aux):
        """None: no loss takes them."""
        raise TypeError("PESParams go to fit and their value_and_grad only, got them in a loss")

    def gradient(self, model, gradient, state):
        """The new state in place of the gradient of the state."""
        return PESParams(self.inner.gradient(model.params, gradient, state[0]), state[1])


def as_rule_form(form) -> PairForm | None:
    """Return the form if it is that of a `ParamsAndRule`, else None."""
    return form if isinstance(form, PairForm) and form.kind is ParamsAndRule else None


TRAINED = ("params", "rule", "both")


def split_pair(params, rule, trained: str) -> tuple[Any, Any]:
    """Return (trained leaves, all others) of parameters and a rule, each a `ParamsAndRule`."""
    numbers, others = split_floating(rule) if trained != "params" else (nothing_like(rule), rule)
    if trained == "rule":
        return ParamsAndRule(nothing_like(params), numbers), ParamsAndRule(params, others)
    return ParamsAndRule(params, numbers), ParamsAndRule(nothing_like(params), others)


def variables(model: Any, trained: Any = None) -> Variables:
    """Return the parts of a model: the parameters that train, its state, and its form.

    Arguments:
        model: any pytree, a Flax NNX module, variables of Flax linen, `Stateful`,
            `MetaSGDParams` or `ParamsAndRule`. Modules of Equinox are pytrees; with an
            `eqx.nn.State` they are `Stateful(module, state)`.
        trained: for an NNX module, the filter of the variables that train, `nnx.Param` by default;
            other parameters keep their values. For `ParamsAndRule` "params", "rule" or "both", the
            default.

    The result can be passed as `params` wherever the model can. Its attribute `model` is the model
    again. An algorithm returns (value, (gradient, new state)) for it and changes no module. Then
    update the module by `optimizer.update(module, gradient)` and `nnx.update(module, state)`.

    Raises TypeError if no leaf is floating point, for complex leaves, for `trained` of another kind
    of model, and for an `nnx.State` that holds more than parameters. Raises ValueError for an
    unknown part of a pair.

    >>> found = variables({"w": jnp.ones(2), "name": "linear"})
    >>> found
    Variables of a model of kind Pytree
      trained  ['w'] float32[2]
      state    nothing
    >>> found.model["name"]
    'linear'
    """
    if isinstance(model, Variables):
        return model
    if isinstance(model, PESParams):
        inner = variables(model.params, trained)
        return Variables(inner.params, (inner.state, model.state), PESForm(inner.form))
    if isinstance(model, ParamsAndRule):
        return _of_pair(model, "both" if trained is None else trained)
    if isinstance(model, OwnVariables):
        return model.own_variables()
    if hasattr(model, "optimizer_state"):  # of `negmaml.training`, which this module cannot import
        raise TypeError(
            f"params must be the parameters, got a {type(model).__name__}, which holds more; pass "
            "its attribute params, as in result.params"
        )
    if _holds_module(model):
        return _of_module(model, trained)
    if trained is not None:
        raise TypeError(
            f"trained is a filter of a Flax NNX module or a part of ParamsAndRule, got a "
            f"{type(model).__name__}; for other models choose what trains by optax.masked or what "
            "adapts by mask"
        )
    if isinstance(model, MetaSGDParams):
        inner = variables(model.params)
        rate, static_leaves = partition_floating(model.rate)
        fixed = MetaSGDParams(nothing_like(inner.params), static_leaves)
        form = PairForm(inner.form, StaticTree(fixed), MetaSGDParams)
        return Variables(MetaSGDParams(inner.params, rate), inner.state, form)
    if isinstance(model, Stateful):
        floats, static_leaves = partition_floating(model.params)
        state = with_counter_based_keys(jax.tree.map(jnp.asarray, model.state))
        return Variables(floats, state, StatefulForm(StaticTree(static_leaves)))
    if isinstance(model, Mapping) and "params" in model and len(model) > 1 and set(model) <= {
        "params", *LINEN_STATE
    }:  # fmt: skip
        floats, static_leaves = partition_floating(model["params"])
        state = {k: jax.tree.map(jnp.asarray, v) for k, v in model.items() if k != "params"}
        kind = dict if isinstance(model, dict) else type(model)
        return Variables(floats, state, LinenForm(StaticTree(static_leaves), kind))
    floats, static_leaves = partition_floating(model)
    return Variables(floats, (), PytreeForm(StaticTree(static_leaves)))


def variables_as_before(model: Any, before: Any) -> Variables:
    """Return the parts of a trained model, split by the filter of those it was trained from."""
    form = before.form if isinstance(before, Variables) else None
    if not isinstance(form, NNXForm):
        form = as_rule_form(form)
    return variables(model, None if form is None else form.trained)


def _of_pair(pair: ParamsAndRule, trained: str) -> Variables:
    check_choice("trained", trained, TRAINED)
    inner, rule = variables(pair.params), as_float_arrays(as_rule("rule", pair.rule))
    check_trainable(rule, trained)
    moving, fixed = split_pair(inner.params, rule, trained)
    return Variables(
        moving, inner.state, PairForm(inner.form, StaticTree(fixed), ParamsAndRule, trained)
    )


def check_trainable(rule, trained: str) -> None:
    """Raise TypeError if a rule has to train and has no number that can."""
    if trained != "params" and not jax.tree.leaves(split_floating(rule)[0]):
        raise TypeError(
            f"rule must hold floating point numbers to have a gradient, got {rule!r}; write 0.0 "
            "for 0, and hold the numbers of an optax transformation in fields of a rule of your own"
        )


def _holds_module(model) -> bool:
    """True for an NNX module, also in a container; raise for a state that would train silently."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:  # then no object of it can exist
        return False
    if isinstance(model, nnx.Module):
        return True

    def is_node(x):
        return isinstance(x, nnx.Module | nnx.Variable)

    leaves = [x for x in jax.tree.leaves(model, is_leaf=is_node) if is_node(x)]
    if any(isinstance(x, nnx.Module) for x in leaves):
        return not isinstance(model, Stateful | MetaSGDParams)
    others = sorted({type(x).__name__ for x in leaves if not isinstance(x, nnx.Param)})
    if others and not isinstance(model, Stateful):
        raise TypeError(
            f"params hold {', '.join(others)} of Flax NNX, which must not train; pass the module "
            "itself, or split it with nnx.split(module, nnx.Param, ...) and pass "
            "Stateful(params, rest)"
        )
    return False


def _of_module(module, trained) -> Variables:
    nnx = _nnx()
    # A predicate can be hashed, a list of filters cannot.
    trained = nnx.filterlib.to_predicate(nnx.Param if trained is None else trained)
    graph, params, frozen, state = nnx.split(module, trained, nnx.Param, ...)
    if not jax.tree.leaves(params):
        raise TypeError(
            f"trained must select variables of {type(module).__name__}, got a filter that selects "
            "none; nnx.Param selects all parameters, nnx.PathContains('head') those of one part"
        )
    floats, static_leaves = partition_floating(params)
    if jax.tree.leaves(static_leaves):
        raise TypeError("variables of an NNX module that train must hold floating point arrays")
    return Variables(floats, with_counter_based_keys(state), NNXForm(frozen, graph, trained))


def _nnx() -> Any:
    return sys.modules["flax.nnx"]


def _in_containers_of(state, new):
    """Return a tree in the containers of the state if both have the same paths."""
    leaves, structure = jax.tree_util.tree_leaves_with_path(new), jax.tree.structure(state)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    if [path for path, _ in leaves] != paths:
        return new
    return jax.tree.unflatten(structure, [leaf for _, leaf in leaves])


def like_state(new, state):
    """Return the new state in the dtypes of the old one; raise where its structure differs.

    A scan over inner steps needs the same types before and after a step.
    """

    def cast(n, old):
        return n if is_typed_key(old) else jnp.asarray(n, jnp.result_type(old))

    try:
        return jax.tree.map(cast, new, state)
    except ValueError as mismatch:
        raise ValueError(
            f"the loss must return a state like the one it is given, "
            f"{jax.tree.structure(state)}, got {jax.tree.structure(new)}"
        ) from mismatch


# Random keys in a state. Each task has its own, addressed by its number in the meta-batch, so that
# results do not depend on blocks or devices.
NO_TASK = 2**32 - 1


def keys_of_tasks(state, numbers):
    """Return the keys in a state for each of these tasks, stacked, and None for other leaves."""

    def of_tasks(keys):
        return jax.vmap(lambda number: _fold(keys, number))(numbers)

    return jax.tree.map(lambda leaf: of_tasks(leaf) if is_typed_key(leaf) else None, state)


def next_common_key(keys):
    """Return the keys of the meta-step after one with these."""
    return _fold(keys, NO_TASK)


def _next_keys(state):
    """Return the state with other keys, for the next call of a loss."""
    return jax.tree.map(lambda leaf: _fold(leaf, 0) if is_typed_key(leaf) else leaf, state)


def _fold(keys, number):
    """Fold a number into keys of any shape."""
    flat = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys.ravel())
    return flat.reshape(keys.shape)
