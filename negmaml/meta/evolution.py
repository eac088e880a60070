r"""Evolution strategies: gradients of a smoothed objective from its values only.

    f_sigma(x) = E f(x + sigma e),     grad f_sigma(x) = E e f(x + sigma e) / sigma,     e ~ N(0, I)

Nothing is differentiated, so f may be of any kind, with steps, host code or a chaotic unroll. The
noise of sample i is a function of (key, i) only, and the same for all tasks. `fit` gives each step
a key; other callers pass one as the third argument.

For an inner problem of many steps, `persistent_evolution_strategies` updates the rule after every
truncation of it. The perturbations of a sample add up over truncations,

    gradient_t = mean_i (xi_i,t / sigma) L_t(x + sigma e_i,1 .. x + sigma e_i,t),
    xi_i,t = e_i,1 + .. + e_i,t,

so that the effect of earlier truncations on L_t counts, and the mean over truncations is unbiased.
Sources: Nesterov and Spokoiny, Found. Comput. Math. 17 (2017) 527; Vicol, Metz and Sohl-Dickstein,
"Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent Evolution Strategies",
ICML 2021.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from negmaml._core.calls import explain_calls
from negmaml._core.checks import (
    check_callable,
    check_choice,
    check_count,
    check_flag,
    check_optional,
    check_positive,
)
from negmaml._core.display import add_fields_repr
from negmaml._core.jit import is_concrete
from negmaml._core.keys import check_key, is_typed_key
from negmaml._core.meshes import any_mesh
from negmaml._core.pytree import as_pytree, tree_where
from negmaml._core.settings import own_transfers
from negmaml._core.types import ScalarLike
from negmaml.meta.batching import Tasks, as_tasks, leading_axis, mean_in_blocks
from negmaml.meta.gradients import of_same_class, pair_variables
from negmaml.meta.minibatches import at_step
from negmaml.meta.model_variables import (
    TRAINED,
    ParamsAndRule,
    PESForm,
    PESParams,
    Variables,
    as_rule_form,
    check_trainable,
    next_common_key,
    variables,
)
from negmaml.meta.partition import (
    Loss,
    check_inputs,
    check_loss,
    check_scalar,
    combine,
    freeze_mask,
    partition,
    thaw_mask,
)
from negmaml.meta.stateful import LiftedLoss
from negmaml.rules import InnerRule, as_rule, separate
from negmaml.rules import combine as combine_rule

SIGNS = (1.0, -1.0)  # of the perturbation of the two members of an antithetic pair


@explain_calls
def evolution_strategies(
    objective: Callable[[Any, Any], Any],
    *,
    sigma: ScalarLike,
    samples: int,
    antithetic: bool = True,
    batch_size: int | None = None,
    wrt: str = "params",
) -> Callable[..., Any]:
    r"""Return (params, tasks, key) -> (value, gradient) of an objective, from its values only.

        gradient = mean_i e_i (f(x + sigma e_i) - f(x - sigma e_i)) / (2 sigma),    e_i ~ N(0, I)

    It is an unbiased estimate of the gradient of E f(x + sigma e), which for a quadratic f is that
    of f. `fit` takes the function as its `value_and_grad`, and gives it a key for each step.

    Arguments:
        objective: (params, tasks) -> one number, such as `maml(loss, rule)`. It need not be
            differentiable.
        sigma: standard deviation of the perturbations, above 0; traced.
        samples: number of values of the objective, even for antithetic pairs.
        antithetic: whether samples come in pairs x + sigma e and x - sigma e. If not, the gradient
            is sum_i e_i (f_i - mean f) / ((samples - 1) sigma).
        batch_size: number of perturbations computed at once, all by default. It changes the result
            by rounding only.
        wrt: as in `maml_value_and_grad`. For "rule" and "both" pass `ParamsAndRule(params, rule)`
            to the result, whose rule an objective such as `maml(loss, rule)` uses.

    The value is the mean over samples. The state of a model is the same for all samples: they share
    its random numbers, and its running statistics stay as they are. Raises ValueError or TypeError
    for invalid arguments, and for an objective that does not return one number.

    >>> import jax.numpy as jnp
    >>> steps = lambda w, tasks: jnp.mean(jnp.where(w > tasks, 1.0, 0.0))  # of derivative zero
    >>> slope = evolution_strategies(steps, sigma=1.0, samples=2000)
    >>> value, gradient = slope(0.0, jnp.zeros(1), jax.random.key(0))
    >>> bool(abs(gradient - 0.3989) < 0.03)  # the normal density at 0
    True
    """
    objective = as_pytree(check_callable("objective", objective, "of (params, tasks)"))
    antithetic = check_flag("antithetic", antithetic)
    samples = _check_samples(samples, antithetic)
    batch_size = check_optional(check_count, "batch_size", batch_size)
    check_choice("wrt", wrt, TRAINED)
    return Partial(Smoothed(samples, antithetic, batch_size, wrt), objective, _check_sigma(sigma))


@explain_calls
def persistent_evolution_strategies(
    loss: Loss,
    rule: InnerRule,
    *,
    truncation: int,
    sigma: ScalarLike,
    samples: int,
    inner_loss: Loss | None = None,
    mask: Any = None,
    wrt: str = "rule",
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    r"""Return (value_and_grad, init) for a rule of many steps, a truncation of them at a time.

        objective = mean_t mean_i loss(theta_{i, t K}, query_i),    t = 1 .. steps / K

    Each call takes K = `truncation` inner steps with every sample, from where the last call left
    it. Its gradient is that of one truncation; the mean over all truncations of an inner problem is
    an unbiased estimate of the gradient of the objective, smoothed over independent perturbations
    of the truncations. After the last truncation the next call starts on new tasks. Plain evolution
    strategies on truncations would ignore the effect of the rule on later ones.

        value_and_grad, init = persistent_evolution_strategies(loss, rule, truncation=10, ...)
        start = init(ParamsAndRule(params, rule), tasks)
        result = fit(key, start, value_and_grad, sample_tasks, optimizer, steps)
        result.params.params.rule

    Arguments:
        loss, rule, inner_loss, mask: as in `maml_value_and_grad`. `rule` takes steps, all of those
            of an inner problem.
        truncation: number of steps of a call, a divisor of the steps of the rule.
        sigma, samples: as in `evolution_strategies`; samples are antithetic pairs.
        wrt: "rule", or "both" for the start of the inner problems, too.

    `init(pair, tasks)` returns `PESParams(pair, state)`, the meta-parameters with the unfinished
    inner problems; of the tasks only shapes are used. `value_and_grad` is a function of (those,
    tasks, key). It uses the tasks of the call that starts an inner problem, and those of the state
    otherwise. Raises ValueError or TypeError for invalid arguments, and for another number of tasks
    than that of `init`, which is the case if `fit` shares tasks over a mesh. Source: Vicol, Metz
    and Sohl-Dickstein, ICML 2021.

    >>> import jax.numpy as jnp, negmaml as nm
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> rule = nm.GradientDescent(0.1, steps=4)
    >>> value_and_grad, init = nm.persistent_evolution_strategies(
    ...     square, rule, truncation=2, sigma=0.01, samples=4
    ... )
    >>> tasks = nm.Tasks(support=jnp.ones(1), query=jnp.ones(1))
    >>> start = init(nm.ParamsAndRule(0.0, rule), tasks)
    >>> value, (gradient, state) = value_and_grad(start, tasks, jax.random.key(0))
    >>> bool(gradient.rule.rate < 0)  # a larger rate is better
    True
    """
    rule = as_rule("rule", rule)
    rule.check_meta()
    if rule.implicit:
        raise TypeError(f"rule must take steps, of which a truncation is a part, got {rule!r}")
    truncation = check_count("truncation", truncation)
    if rule.steps % truncation:
        raise ValueError(
            f"truncation must divide the {rule.steps} steps of the rule, got {truncation}"
        )
    check_choice("wrt", wrt, ("rule", "both"))
    check_trainable(rule, wrt)
    method = Persistent(
        check_loss("loss", loss), check_optional(check_loss, "inner_loss", inner_loss),
        check_optional(freeze_mask, "mask", mask), truncation, _check_samples(samples, True), wrt,
    )  # fmt: skip
    return Partial(method, rule, _check_sigma(sigma)), partial(method.init, rule)


class Smoothed(NamedTuple):
    """The options of `evolution_strategies`; hashable, so that equal ones compile once."""

    samples: int
    antithetic: bool
    batch_size: int | None
    wrt: str

    @property
    def takes_key(self) -> bool:
        """True: `fit` passes a key for each step."""
        return True

    @own_transfers
    @any_mesh
    def __call__(self, objective, sigma, params, tasks, key=None):
        """Return (value, gradient), the gradient in the form of the parameters."""
        key = check_key("key", key)
        floats, state, form = self.variables(params)
        floats = jax.tree.map(jnp.asarray, floats)

        def value(floats):
            found = objective(form.model(floats, state), tasks)
            return check_scalar(found, False, "objective")[0]

        if is_concrete((floats, key)):  # an error of the objective comes before any work
            jax.eval_shape(value, floats)

        def one(number):
            noise = _noise(floats, jax.random.fold_in(key, number))
            if self.antithetic:
                up, down = _both_signs(lambda s: value(_shifted(floats, s * sigma, noise)))
                return (up + down) / 2, _scaled(noise, (up - down) / (2 * sigma)), None
            up = value(_shifted(floats, sigma, noise))
            return up, _scaled(noise, up / sigma), _scaled(noise, 1 / sigma)

        def block(numbers, weight):
            found = jax.vmap(one)(numbers)
            return jax.tree.map(lambda x: jnp.sum(weight * x, 0).astype(x.dtype), found), None

        count = self.samples // 2 if self.antithetic else self.samples
        (mean, gradient, rest), _ = mean_in_blocks(block, jnp.arange(count), self.batch_size)
        if not self.antithetic:  # the mean of the other samples is an unbiased baseline

            def centred(g, r):
                return ((g - (mean * r).astype(g.dtype)) * (count / (count - 1))).astype(g.dtype)

            gradient = jax.tree.map(centred, gradient, rest)
        new = jax.tree.map(lambda x: next_common_key(x) if is_typed_key(x) else x, state)
        if isinstance(params, Variables):
            return mean, (gradient, new)
        return mean, form.gradient(params, gradient, new)

    def variables(self, params, before=None) -> Variables:
        """Return the parts of meta-parameters, of which those train that `wrt` names."""
        found = pair_variables(self.wrt, params, before)
        if self.wrt != "params" and as_rule_form(found.form) is None:
            raise TypeError(
                f"params must be ParamsAndRule(params, rule) with wrt={self.wrt!r}, got only params"
            )
        return found


@add_fields_repr
class PESState(NamedTuple):
    """Unfinished inner problems: of each pair of samples two particles, for every task.

    particles: (adapting leaves, state of the optimizer), with axes for pairs, signs and tasks.
    noise: the sum of the perturbations of each pair. truncations: those that are done.
    """

    particles: Any
    noise: Any
    truncations: Any
    tasks: Tasks


class Persistent(NamedTuple):
    """The options of `persistent_evolution_strategies`; hashable."""

    loss: Loss
    inner_loss: Loss | None
    hashable_mask: Any
    truncation: int
    samples: int
    wrt: str

    @property
    def takes_key(self) -> bool:
        """True: `fit` passes a key for each step."""
        return True

    def init(self, rule, params, tasks) -> PESParams:
        """Return the meta-parameters with a state in which no inner problem has begun."""
        if not isinstance(params, ParamsAndRule):
            raise TypeError(
                f"params must be ParamsAndRule(params, rule), got {type(params).__name__}"
            )
        tasks, parts = as_tasks(tasks), variables(params, self.wrt)
        form: Any = parts.form
        if jax.tree.leaves(parts.state):
            raise TypeError(
                "params must be a model without a state for persistent_evolution_strategies, got "
                f"{type(params.params).__name__} with a state"
            )
        pairs, count = self.samples // 2, leading_axis("tasks", tuple(tasks))

        def point(floats):
            start, own = form.fixed.combined(floats)
            own, start = check_inputs(_of_same_steps(own, rule), start)
            moving = partition(start, thaw_mask(self.hashable_mask))[0]
            return moving, own.init(moving)

        def zeros(shape: tuple, like):
            return jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape), x.dtype), like)

        floats = jax.tree.map(jnp.asarray, parts.params)
        particles = zeros((pairs, 2, count), jax.eval_shape(point, floats))
        noise = zeros((pairs,), floats)
        tasks = jax.tree.map(jnp.asarray, tasks)
        return PESParams(params, PESState(particles, noise, jnp.asarray(0), tasks))

    @own_transfers
    @any_mesh
    def __call__(self, rule, sigma, params, tasks, key=None):
        """Return (value, gradient) of the next truncation, the new state in the gradient's form."""
        key = check_key("key", key)
        form: Any
        floats, (_, state), form = self.variables(params)
        floats = jax.tree.map(jnp.asarray, floats)
        tasks = self._tasks(state, as_tasks(tasks))
        inner, outer = self._losses(form.inner.inner)

        def unroll(own, frozen, moving, point, support, query):
            """Take the steps of a truncation; return the loss on the query and the new point."""
            gradient = jax.grad(
                lambda theta, k: inner(combine(theta, frozen), (), at_step(support, k))[0]
            )
            stepped, fixed = separate(own)
            first = state.truncations * self.truncation
            stepped = jax.tree.map(
                lambda x: lax.dynamic_slice_in_dim(x, first, self.truncation), stepped
            )

            def step(carry, at):
                theta, optimizer_state = carry
                numbers, k = at
                one_step = combine_rule(numbers, fixed)
                return one_step.update(gradient(theta, k), optimizer_state, theta), None

            point = tree_where(state.truncations == 0, (moving, own.init(moving)), point)
            point, _ = lax.scan(step, point, (stepped, first + jnp.arange(self.truncation)))
            return outer(combine(point[0], frozen), (), query)[0], point

        def particle(noise, sign, points):
            start, own = form.inner.fixed.combined(_shifted(floats, sign * sigma, noise))
            own, start = check_inputs(_of_same_steps(own, rule), start)
            moving, frozen = partition(start, thaw_mask(self.hashable_mask))
            values, points = jax.vmap(partial(unroll, own, frozen, moving))(points, *tasks)
            return jnp.mean(values), points

        def pair(number, accumulated, points):
            noise = _noise(floats, jax.random.fold_in(key, number))
            signs = jnp.asarray(SIGNS)
            values, points = jax.vmap(partial(particle, noise))(signs, points)
            fresh = jax.tree.map(jnp.zeros_like, noise)
            accumulated = tree_where(state.truncations == 0, fresh, accumulated)
            accumulated = jax.tree.map(jnp.add, accumulated, noise)
            slope = (values[0] - values[1]) / (2 * sigma)
            return jnp.mean(values), _scaled(accumulated, slope), accumulated, points

        numbers = jnp.arange(self.samples // 2)
        values, slopes, noise, points = jax.vmap(pair)(numbers, state.noise, state.particles)
        gradient = jax.tree.map(lambda x: jnp.mean(x, 0), slopes)
        done = (state.truncations + 1) % (rule.steps // self.truncation)
        new = (), PESState(points, noise, done, tasks)
        if isinstance(params, Variables):
            return jnp.mean(values), (gradient, new)
        return jnp.mean(values), form.gradient(params, gradient, new)

    def variables(self, params, before=None) -> Variables:
        """Return the parts of meta-parameters, of which those train that `wrt` names."""
        if isinstance(params, Variables):
            found = params
        elif isinstance(params, PESParams):
            inner = pair_variables(self.wrt, params.params, before)
            found = Variables(inner.params, (inner.state, params.state), PESForm(inner.form))
        else:
            found = None
        if not (found and isinstance(found.form, PESForm)):
            raise TypeError(
                "params must be PESParams, as init(ParamsAndRule(params, rule), tasks) returns it, "
                f"got {type(params).__name__}"
            )
        return found

    def _tasks(self, state: PESState, tasks: Tasks) -> Tasks:
        """Return the tasks of the inner problems: those given if new ones start."""
        given, held = (leading_axis("tasks", tuple(x)) for x in (tasks, state.tasks))
        if given != held:
            raise ValueError(
                f"tasks must be {held}, as those of init, got {given}; a mesh cannot share them"
            )
        return tree_where(state.truncations == 0, tasks, state.tasks)

    def _losses(self, form):
        outer = LiftedLoss(self.loss, form)
        return outer if self.inner_loss is None else LiftedLoss(self.inner_loss, form), outer


def _of_same_steps(own, rule):
    """Return the rule of a `ParamsAndRule`; raise unless truncations are the same parts of it."""
    if of_same_class(own, rule).steps != rule.steps:
        raise ValueError(
            f"the rule in ParamsAndRule must take {rule.steps} steps, as the rule that the "
            f"algorithm was built with, got {own.steps}"
        )
    return own


def _check_sigma(sigma):
    """Return the standard deviation; raise unless it is traced or a number above zero."""
    return sigma if isinstance(sigma, jax.core.Tracer) else check_positive("sigma", sigma)


def _check_samples(samples, antithetic: bool) -> int:
    samples = check_count("samples", samples)
    if samples < 2 or (antithetic and samples % 2):
        allowed = "even, in antithetic pairs" if antithetic else "at least 2"
        raise ValueError(f"samples must be {allowed}, got {samples}")
    return samples


def _noise(floats, key):
    """Return standard normal numbers for every leaf, each by its own address."""
    structure: Any
    leaves, structure = jax.tree.flatten(floats)
    keys = [jax.random.fold_in(key, j) for j in range(len(leaves))]
    return structure.unflatten(
        [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


def _shifted(floats, size, noise):
    return jax.tree.map(lambda x, e: x + (size * e).astype(x.dtype), floats, noise)


def _scaled(noise, number):
    return jax.tree.map(lambda e: (number * e).astype(e.dtype), noise)


def _both_signs(function: Callable):
    """Return (function(1), function(-1)), as one program."""
    up, down = jax.vmap(function)(jnp.asarray(SIGNS))
    return up, down
