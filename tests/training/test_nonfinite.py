"""Batches whose loss, gradient or update is not finite: stop, skip, or scale the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from tests.internals import address
from tests.training import tiny
from tests.training.tiny import KEY, same

ADAM, STEPS = optax.adam(0.1), 8


def number(i):
    """Return the task of step i, a number that is its key's."""
    return float(draw(address(KEY, 0, i)))


def draw(key):
    return jax.random.uniform(key)


def at_bad(task, bad):
    return jnp.any(jnp.abs(task - jnp.asarray(bad)) < 1e-6)


def broken_at(*steps, where="loss", of=jnp.nan):
    """Return a `value_and_grad` that is not finite in these steps, and a good one in others."""
    bad = [number(i) for i in steps]

    def value_and_grad(params, task):
        now = at_bad(task, bad)
        loss, gradient = (params - task) ** 2, 2 * (params - task)
        loss = jnp.where(now & (where != "gradient"), of, loss)
        return loss, jnp.where(now & (where != "only loss"), of, gradient)

    return value_and_grad


def train(value_and_grad, steps=STEPS, optimizer=ADAM, params=1.0, **options):
    return nm.fit(KEY, params, value_and_grad, draw, optimizer, steps, **options)


def by_hand(skipped, steps=STEPS):
    """Return (parameters, optimizer state) after the steps that are not skipped."""
    params, state = jnp.asarray(1.0), ADAM.init(jnp.asarray(1.0))
    for i in set(range(steps)) - set(skipped):
        updates, state = ADAM.update(2 * (params - number(i)), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("of", (np.nan, np.inf))
@pytest.mark.parametrize("where", ("loss", "gradient", "only loss"))
def test_skipped_batches_leave_parameters_and_optimizer_as_they_are(where, of):
    result = train(broken_at(2, 3, 6, where=where, of=of), nonfinite=2)
    same((result.params, result.optimizer_state), by_hand({2, 3, 6}))
    assert bool(result.finite) and int(result.step) == STEPS and int(result.skipped) == 3
    losses = np.isfinite(result.loss)
    assert where == "gradient" or np.flatnonzero(~losses).tolist() == [2, 3, 6]
    assert "3 batches that were not finite" in repr(result)


def test_an_update_that_overflows_is_skipped():
    """Gradients of 1, and a rate that makes the parameters infinite in one step."""
    rates = optax.scale_by_schedule(lambda count: jnp.where(count == 3, jnp.inf, -1.0))
    result = train(lambda p, _: (p, jnp.ones(())), 5, rates, nonfinite=5)
    # The count of the schedule stays where it is, so all further steps are skipped.
    assert float(result.params) == -2.0 and int(result.skipped) == 2


def test_a_run_ends_after_the_allowed_number_in_a_row():
    with pytest.warns(RuntimeWarning, match="since 3 batches in a row .* last finite loss"):
        result = train(broken_at(1, 3, 4, 5), nonfinite=2)
    assert not bool(result.finite) and int(result.skipped) == 4
    assert np.isnan(result.loss[6:]).all()
    # The last finite loss is that of step 2.
    same(result.params, by_hand({1}, 2)[0])
    assert int(result.step) == 2


def test_all_ways_to_run_skip_the_same(tmp_path):
    bad = broken_at(2, 3, 6)
    whole = train(bad, nonfinite=3)
    hooked = train(bad, nonfinite=3, callback=lambda *_: None, callback_every=3)
    same(hooked, whole)
    first = train(bad, 3, nonfinite=3)
    assert int(first.skips.in_a_row) == 1
    same(train(bad, STEPS - 3, nonfinite=3, state=first).params, whole.params)
    many = jax.vmap(lambda start: train(bad, params=start, nonfinite=3))(jnp.array([1.0, 2.0]))
    same(many.params[0], whole.params)
    np.testing.assert_array_equal(many.skipped, [3, 3])
    mesh = jax.make_mesh((1,), ("task",))
    tasks = lambda key: draw(key)[None]  # noqa: E731
    sharded = nm.fit(KEY, 1.0, lambda p, t: bad(p, t[0]), tasks, ADAM, STEPS, nonfinite=3,
                     mesh=mesh)  # fmt: skip
    same(sharded.params, whole.params)


def test_counts_in_a_row_pass_from_run_to_run():
    bad = broken_at(1, 2, 3)
    first = train(bad, 3, nonfinite=2)
    with pytest.warns(RuntimeWarning, match="since 3 batches"):
        assert not bool(train(bad, 3, nonfinite=2, state=first).finite)


def test_a_resumed_run_skips_the_same(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    bad = broken_at(2, 3, 6)
    options = dict(nonfinite=2, checkpoint=tmp_path / "a", checkpoint_every=3)
    train(bad, 3, **options)
    same(train(bad, **options), train(bad, nonfinite=2))
    with pytest.raises(ValueError, match=r"nonfinite \(2 then, stop now\)"):
        train(bad, 9, checkpoint=tmp_path / "a")


def test_patience_does_not_count_steps_that_are_skipped():
    options = dict(evaluate=lambda p, t: (p - 0.5) ** 2, evaluate_every=1, patience=3)
    result = train(broken_at(2, 3), nonfinite=2, **options)
    plain = train(broken_at(), **options)
    assert bool(result.finite) and result.evaluation.shape == plain.evaluation.shape
    assert int(result.step) >= 3


# Optimizers that skip by themselves.


@pytest.mark.parametrize(
    "wrap",
    (
        lambda o: optax.apply_if_finite(o, 2),
        lambda o: optax.chain(optax.identity(), optax.apply_if_finite(o, 2)),
        lambda o: optax.MultiSteps(o, 1, should_skip_update_fn=optax.skip_not_finite),
    ),
    ids=("apply_if_finite", "within a chain", "MultiSteps"),
)
def test_a_batch_that_the_optimizer_rejects_does_not_stop_the_run(wrap):
    result = train(broken_at(2, 3, 6), optimizer=wrap(ADAM))
    same(result.params, by_hand({2, 3, 6})[0])
    assert bool(result.finite) and int(result.step) == STEPS
    assert np.flatnonzero(np.isnan(result.loss)).tolist() == [2, 3, 6]


def test_a_run_ends_after_the_own_limit_of_apply_if_finite():
    with pytest.warns(RuntimeWarning, match="not finite"):
        result = train(broken_at(3, 4, 5), optimizer=optax.apply_if_finite(ADAM, 2))
    assert not bool(result.finite) and np.isnan(result.loss[3:]).all()
    same(result.params, by_hand((), 2)[0])


def test_a_rejected_batch_leaves_the_state_of_the_model():
    broken = broken_at(2)

    def with_state(model, task):
        loss, gradient = broken(model.params, task)
        return loss, nm.Stateful(gradient, model.state + loss)

    start = nm.Stateful(jnp.asarray(1.0), jnp.asarray(0.0))
    for options in ({"nonfinite": 1}, {"optimizer": optax.apply_if_finite(ADAM, 1)}):
        result = train(with_state, 4, params=start, **options)
        losses = np.asarray(result.loss)
        assert float(result.params.state) == pytest.approx(losses[[0, 1, 3]].sum(), rel=1e-6)


def test_a_multi_steps_object_is_its_transformation_with_extra_arguments():
    seen = []

    def update(updates, state, params=None, *, value, **_):
        seen.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    steps = optax.MultiSteps(optax.chain(inner, optax.sgd(0.1)), 2)
    result = train(broken_at(), 4, steps)
    assert seen
    params = jnp.asarray(1.0)
    for i in (0, 2):
        params -= 0.1 * sum(2 * (params - number(j)) for j in (i, i + 1)) / 2
    same(result.params, params)


# The last finite loss.


def test_a_run_that_is_repeated_and_one_that_keeps_good_parameters_return_the_same():
    bad = broken_at(5)
    plain, hooked = ({}, {"callback": lambda *_: None, "callback_every": 4})
    with pytest.warns(RuntimeWarning, match="after 5 of 8 steps"):
        found = [train(bad, **options) for options in (plain, hooked)]
    same(*found)
    same(found[0].params, by_hand((), 4)[0])
    traced = jax.jit(lambda start: train(bad, params=start))(1.0)
    same(traced.params, found[0].params)


# Derivatives through a run.


def test_derivatives_through_adam_need_eps_root_where_a_gradient_is_zero():
    """The second parameter has no gradient, and Adam a square root of zero."""

    def value_and_grad(params, task):
        return jax.value_and_grad(lambda p: (p[0] - task) ** 2 + 0 * p[1] ** 2)(params)

    def slope(optimizer):
        start = jnp.array([1.0, 2.0])
        run = lambda p: train(value_and_grad, 3, optimizer, params=p).params  # noqa: E731
        return jax.grad(lambda p: jnp.sum(run(p)))(start)

    assert np.isnan(slope(optax.adam(1e-2))).any()
    assert np.isfinite(slope(optax.adam(1e-2, eps_root=1e-10))).all()


# A scaled loss.

HALF = nm.LossScale(initial=2.0**12, period=3)


def small_in_half(params, data):
    """A loss with derivatives below the least number of float16; the factors are exact in it."""
    x, y = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), data)
    w = params["w"].astype(jnp.float16)
    v = params["v"].astype(jnp.float16)
    return (jnp.mean((w * x + v - y) ** 2) * jnp.float16(2**-10) * jnp.float16(2**-13)).astype(
        float
    )


def small(params, data):
    return tiny.loss(params, data) * 2**-23


@pytest.mark.parametrize("make", (nm.maml_value_and_grad, nm.fomaml))
def test_a_scaled_loss_trains_where_derivatives_vanish_in_float16(make):
    descend, rule = optax.sgd(1e6), nm.GradientDescent(0.01)

    def found(loss, **options):
        result = nm.fit(KEY, tiny.PARAMS, make(loss, rule), tiny.tasks, descend, 4, **options)
        return result.params["v"] - tiny.PARAMS["v"]

    exact = found(small)
    assert abs(float(found(small_in_half))) < 0.5 * abs(float(exact))
    assert float(found(small_in_half, nonfinite=HALF)) == pytest.approx(float(exact), rel=0.05)


def test_a_scale_changes_no_update_of_float32():
    algorithm = nm.maml_value_and_grad(tiny.loss, tiny.RULE, batch_size=3)
    plain, scaled = (
        nm.fit(KEY, tiny.PARAMS, algorithm, tiny.tasks, ADAM, 7, **options)
        for options in ({}, {"nonfinite": HALF})
    )
    same(scaled.params, plain.params)
    same(scaled.loss, plain.loss)
    # Twice doubled, after three batches each.
    assert float(scaled.skips.scale) == 2.0**14 and int(scaled.skips.finite_in_a_row) == 1


def scaled_overflow(params, task, loss_scale):
    """A gradient of one, whose product with the scale overflows beyond 1000."""
    return params, jnp.where(loss_scale > 1000, jnp.inf, loss_scale)


def test_the_scale_is_halved_and_the_batch_skipped_after_an_overflow():
    result = train(scaled_overflow, 5, optax.sgd(1.0), nonfinite=HALF)
    # 4096, 2048 and 1024 overflow, and 512 does not.
    assert int(result.skipped) == 3 and float(result.skips.scale) == 512
    assert float(result.params) == 1.0 - 2
    assert np.isfinite(result.loss).all()  # only its derivative overflows


def test_a_scaled_run_ends_after_its_limit():
    with pytest.warns(RuntimeWarning, match="since 3 batches in a row"):
        result = train(scaled_overflow, nonfinite=nm.LossScale(2.0**20, limit=2))
    assert not bool(result.finite) and float(result.skips.scale) == 2.0**17


def test_a_scale_resumes_and_continues(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    whole = train(scaled_overflow, nonfinite=HALF)
    options = dict(nonfinite=HALF, checkpoint=tmp_path / "a", checkpoint_every=2)
    train(scaled_overflow, 2, **options)
    same(train(scaled_overflow, **options), whole)
    first = train(scaled_overflow, 2, nonfinite=HALF)
    rest = train(scaled_overflow, STEPS - 2, nonfinite=HALF, state=first)
    same((rest.params, rest.skips), (whole.params, whole.skips))


def test_a_scale_under_vmap_and_over_devices_is_that_of_each_run():
    starts = jnp.array([1.0, 3.0])
    many = jax.vmap(lambda p: train(scaled_overflow, params=p, nonfinite=HALF))(starts)
    np.testing.assert_array_equal(many.skips.scale, [512, 512])
    mesh = jax.make_mesh((1,), ("task",))
    algorithm = nm.maml_value_and_grad(tiny.loss, tiny.RULE)
    plain, sharded = (
        nm.fit(KEY, tiny.PARAMS, algorithm, tiny.tasks, ADAM, 4, nonfinite=HALF, **options)
        for options in ({}, {"mesh": mesh})
    )
    same(sharded.params, plain.params)


@pytest.mark.parametrize("own", (lambda p, t: (p, p), jax.tree_util.Partial(lambda p, t: (p, p))))
def test_a_function_that_takes_no_scale_raises(own):
    with pytest.raises(TypeError, match=r"value_and_grad must be an algorithm .*loss_scale"):
        train(own, nonfinite=nm.LossScale())
