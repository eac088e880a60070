"""Callbacks, early stopping, continued runs, optimizers with extra arguments, and batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from tests.internals import Batches
from tests.training.tiny import ALGORITHM, BATCH, KEY, PARAMS, TEST, same
from tests.training.tiny import tasks as TASKS

ADAM = optax.adam(1e-2)


def train(steps=6, tasks=TASKS, optimizer=ADAM, params=PARAMS, **options):
    return nm.fit(KEY, params, ALGORITHM, tasks, optimizer, steps, **options)


def test_a_callback_gets_the_metrics_since_the_last_call():
    seen = []
    result = train(
        callback=lambda *given: seen.append(given), callback_every=4, evaluate=TEST,
        evaluate_every=2,
    )  # fmt: skip
    assert [step for step, _, _ in seen] == [4, 6]
    losses = np.asarray(result.loss)
    for (_, metrics, _), own in zip(seen, (losses[:4], losses[4:]), strict=True):
        assert metrics["loss"] == pytest.approx(own.mean(), rel=1e-5)
    evaluations = [float(metrics["evaluation"]) for _, metrics, _ in seen]
    np.testing.assert_allclose(evaluations, result.evaluation[np.array([1, 2])], rtol=1e-6)
    same(seen[-1][2], result.params)
    same(result, train(evaluate=TEST, evaluate_every=2))


def test_a_callback_gets_the_norm_of_the_last_gradient_and_the_time_so_far():
    seen = []
    train(4, callback=lambda *given: seen.append(given), callback_every=2)
    params = {0: PARAMS} | {step: own for step, _, own in seen}
    single = []
    train(4, callback=lambda step, metrics, own: single.append((metrics["gradient_norm"], own)))
    for (step, metrics, _), (norm, _) in zip(seen, single[1::2], strict=True):
        assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-6) and step in params
    key = jax.random.fold_in(jax.random.fold_in(KEY, 0), 3)
    gradient = gradient_of(single[2][1], TASKS(key))[1]
    assert seen[1][1]["gradient_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
    times = [metrics["wall_time"] for _, metrics, _ in seen]
    assert 0 < times[0] < times[1] < 600


def test_a_resumed_run_reports_as_the_uninterrupted_one(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    logs: dict = {"whole": [], "parts": []}

    def options(name):
        return dict(
            callback=lambda step, metrics, _: logs[name].append((step, metrics)), callback_every=4,
            evaluate=TEST, evaluate_every=3, checkpoint=tmp_path / name, checkpoint_every=1,
        )  # fmt: skip

    train(8, **options("whole"))
    train(4, **options("parts"))

    class Killed(Exception):
        pass

    def kill(step, metrics, _):
        raise Killed

    with pytest.raises(Killed):
        train(8, **options("parts") | {"callback": kill, "callback_every": 6})
    train(8, **options("parts"))
    for (step, whole), (other, parts) in zip(logs["whole"], logs["parts"], strict=True):
        assert step == other and whole["loss"] == pytest.approx(parts["loss"], rel=1e-6)
        assert float(whole["evaluation"]) == pytest.approx(float(parts["evaluation"]), rel=1e-6)
    times = [metrics["wall_time"] for _, metrics in logs["parts"]]
    assert times[0] < times[1]


def test_a_callback_that_returns_true_stops():
    result = train(callback=lambda step, metrics, params: step == 4, callback_every=2)
    assert int(result.step) == 4 and bool(result.stopped_early) and result.loss.shape == (6,)
    assert np.isfinite(result.loss[:4]).all() and np.isnan(result.loss[4:]).all()
    same(result.loss[:4], train().loss[:4])
    assert "stopped early" in repr(result)


@pytest.mark.parametrize("true", (np.bool_(True), np.array(True), jnp.array(True)), ids=repr)
def test_a_true_boolean_of_any_library_stops(true):
    result = train(callback=lambda step, *_: true if step == 2 else ~true, callback_every=2)
    assert int(result.step) == 2 and bool(result.stopped_early)


@pytest.mark.parametrize("answer", (None, 1, "yes", 0.5, {"loss": 1}, np.float32(1)), ids=repr)
def test_a_result_that_is_not_a_boolean_does_not_stop(answer):
    assert int(train(callback=lambda *_: answer, callback_every=2).step) == 6


def test_an_array_of_booleans_raises():
    with pytest.raises(ValueError, match="callback must return one truth value"):
        train(callback=lambda *_: jnp.array([True, False]), callback_every=2)


def descending(params, _):
    return params, jnp.ones(())


def parabola(params, _):
    """Lowest at -3, which sgd(1.0) from zero reaches after three steps."""
    return (params + 3) ** 2


@pytest.mark.parametrize("period", (None, 2))
def test_patience_stops_and_keeps_the_best(period):
    hooks = {} if period is None else {"callback": lambda *_: None, "callback_every": period}
    result = nm.fit(
        KEY, 0.0, descending, lambda key: key, optax.sgd(1.0, momentum=0.0), 20,
        evaluate=parabola, evaluate_every=1, patience=4, **hooks,
    )  # fmt: skip
    assert float(result.params) == -3.0 and int(result.step) == 3 and bool(result.stopped_early)
    np.testing.assert_array_equal(result.evaluation[:7], [4, 1, 0, 1, 4, 9, 16])
    assert np.isnan(result.evaluation[7:]).all() and np.isnan(result.loss[7:]).all()


def accuracy(params, task):
    return {"loss": (params + 3) ** 2, "query": {"accuracy": -jnp.abs(params + 2)}, "more": (1, 2)}


@pytest.mark.parametrize(
    ("monitor", "mode", "best"),
    (("loss", "min", -3.0), ("query/accuracy", "max", -2.0), ("query/accuracy", "min", -9.0)),
)
def test_patience_follows_a_named_number_in_either_direction(monitor, mode, best):
    result = nm.fit(
        KEY, 0.0, descending, lambda key: key, optax.sgd(1.0), 9, evaluate=accuracy,
        evaluate_every=1, patience=3, monitor=monitor, monitor_mode=mode,
    )  # fmt: skip
    assert float(result.params) == best
    assert int(result.step) == -best and bool(result.stopped_early) == (best > -9)
    assert result.evaluation["query"]["accuracy"].shape == (9,)


@pytest.mark.parametrize("monitor", (None, "los", "query", ""))
def test_a_number_that_is_not_there_raises_with_those_that_are(monitor):
    calls = []
    with pytest.raises(ValueError, match=r"monitor.*\['loss', 'more/0'.*'query/accuracy'\]"):
        nm.fit(
            KEY, 0.0, descending, lambda key: key, optax.sgd(1.0), 9, evaluate=accuracy,
            evaluate_every=1, patience=3, monitor=monitor, callback=lambda *_: calls.append(1),
        )  # fmt: skip
    assert not calls


def test_patience_before_a_finite_evaluation_keeps_the_last_good_parameters():
    options = dict(evaluate=lambda p, _: p * jnp.nan, evaluate_every=1, patience=9)
    result = nm.fit(KEY, 0.0, descending, lambda key: key, optax.sgd(1.0), 4, **options)
    assert float(result.params) == -4 and int(result.step) == 4
    broken = lambda p, _: (jnp.where(p < -2.5, jnp.nan, p), jnp.ones(()))  # noqa: E731
    with pytest.warns(RuntimeWarning, match="not finite"):
        result = nm.fit(KEY, 0.0, broken, lambda key: key, optax.sgd(1.0), 9, **options)
    assert float(result.params) == -2 and int(result.step) == 2


def test_patience_vmaps_and_each_seed_stops_on_its_own():
    def one(start):
        return nm.fit(
            KEY, start, descending, lambda key: key, optax.sgd(1.0), 9,
            evaluate=parabola, evaluate_every=1, patience=2,
        )  # fmt: skip

    result = jax.vmap(one)(jnp.array([0.0, 2.0, 20.0]))
    np.testing.assert_array_equal(result.params, [-3.0, -3.0, 11.0])
    np.testing.assert_array_equal(result.stopped_early, [True, True, False])


@pytest.mark.parametrize("hooks", ({}, {"callback": lambda *_: None, "callback_every": 2}))
def test_a_run_continued_from_a_result_is_the_uninterrupted_run(hooks):
    first = train(steps=4, evaluate=TEST, evaluate_every=2)
    more = train(steps=2, params=None, state=first, evaluate=TEST, evaluate_every=2, **hooks)
    whole = train(steps=6, evaluate=TEST, evaluate_every=2)
    same(more.params, whole.params)
    same(more.optimizer_state, whole.optimizer_state)
    same(jnp.concatenate([first.loss, more.loss]), whole.loss)
    same(jnp.concatenate([first.evaluation, more.evaluation]), whole.evaluation)
    assert int(more.step) == 6


@pytest.mark.slow
def test_evaluations_fall_on_the_steps_of_the_whole_run():
    options = {"evaluate": TEST, "evaluate_every": 3}
    whole = train(steps=7, **options)
    parts = [train(steps=2, evaluate=TEST, evaluate_every=1)]
    for steps in (3, 2):
        parts.append(train(steps=steps, params=None, state=parts[-1], **options))
    same(jnp.concatenate([part.evaluation for part in parts[1:]]), whole.evaluation)
    traced = jax.jit(lambda state: train(steps=3, params=None, state=state, **options))(parts[0])
    same(traced.evaluation, whole.evaluation[:1])


@pytest.mark.slow
def test_optimizers_with_extra_arguments_get_the_value():
    plateau = optax.chain(
        optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1, atol=1e9)
    )
    flat = nm.fit(KEY, 0.0, lambda p, _: (0.0 * p, jnp.ones(())), lambda k: k, plateau, 6)
    assert -6 < float(flat.params) < -1  # the rate was halved on the way
    searched = train(steps=8, tasks=TASKS(KEY), optimizer=optax.lbfgs())
    assert searched.loss[-1] < searched.loss[0]


# Data.


def host(count, kind=tuple):
    """Batches of NumPy arrays, as loaders give them."""
    return [kind(jax.tree.map(np.asarray, tuple(TASKS(jax.random.key(i))))) for i in range(count)]


gradient_of = jax.jit(ALGORITHM)


def by_hand(steps, batches):
    params, state = PARAMS, ADAM.init(PARAMS)
    for i in range(steps):
        gradient = gradient_of(params, nm.Tasks(*batches[i % len(batches)]))[1]
        updates, state = ADAM.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


class Loader:
    """Batches in an order of its own, with a place that it can be put back to."""

    def __init__(self, batches):
        self.batches, self.place = batches, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        while self.place < len(self.batches):
            self.place += 1
            yield self.batches[self.place - 1]
        self.place = 0


class Restartable(Loader):
    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class Grained:
    """Its iterators have a place, as those of grain: a dict, or what a loader of grain has."""

    def __init__(self, batches, encoded=False):
        self.batches, self.encoded = batches, encoded

    def __iter__(self):
        return GrainedIterator(self)


class GrainedIterator(Loader):
    def __init__(self, source):
        super().__init__(source.batches)
        self.encoded = source.encoded

    def __iter__(self):
        return self

    def __next__(self):
        if self.place == len(self.batches):
            raise StopIteration
        self.place += 1
        return self.batches[self.place - 1]

    def get_state(self):
        return str(self.place).encode() if self.encoded else {"next": self.place}

    def set_state(self, state):
        self.place = int(state) if self.encoded else state["next"]


@pytest.mark.parametrize("kind", (tuple, list, lambda pair: dict(zip(nm.Tasks._fields, pair))))  # noqa: B905
def test_batches_of_an_iterable_are_taken_in_turn(kind):
    batches = host(3)
    own = [kind(batch) for batch in batches]
    same(train(steps=5, tasks=own).params, by_hand(5, batches))


@pytest.mark.slow
def test_epochs_are_passes_over_an_iterable():
    batches = host(3)
    twice = nm.fit(KEY, PARAMS, ALGORITHM, Loader(batches), ADAM, epochs=2)
    assert twice.loss.shape == (6,)
    same(twice, train(steps=6, tasks=batches))
    same(twice, train(steps=6, tasks=Loader(batches), callback=lambda *_: None, callback_every=4))


def test_torch_arrays_are_taken():
    torch = pytest.importorskip("torch")
    batches = [jax.tree.map(torch.as_tensor, batch) for batch in host(2)]
    same(train(steps=3, tasks=batches), train(steps=3, tasks=host(2)))


def test_an_iterator_is_read_once_and_its_end_is_named():
    same(train(steps=3, tasks=iter(host(3))), train(steps=3, tasks=host(3)))
    with pytest.raises(ValueError, match=r"ran out after 3 batches.*start again"):
        train(steps=4, tasks=iter(host(3)))
    with pytest.raises(ValueError, match=r"at least one batch, got \[\]"):
        train(tasks=[])


def test_the_next_batch_is_fetched_while_a_step_is_computed():
    order = []

    def batches():
        for i, batch in enumerate(host(3)):
            order.append(i)
            yield batch

    train(steps=2, tasks=batches(), callback=lambda step, *_: order.append(f"step {step}"))
    assert order == [0, 1, "step 1", "step 2"]  # every step by itself, for the callback


@pytest.mark.slow
def test_a_loader_with_a_state_resumes_at_its_position(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    whole = train(steps=7, tasks=Restartable(host(4)))
    train(steps=5, tasks=Restartable(host(4)), checkpoint=tmp_path / "a")
    same(train(steps=7, tasks=Restartable(host(4)), checkpoint=tmp_path / "a"), whole)
    for encoded in (False, True):
        path = tmp_path / f"c{encoded}"
        for steps in (5, 7):  # without a warning
            found = train(steps=steps, tasks=Grained(host(4), encoded), checkpoint=path)
        same(found, whole)
    train(steps=5, tasks=host(4), checkpoint=tmp_path / "b")
    with pytest.warns(UserWarning, match="5 batches are skipped.*same batches again"):
        same(train(steps=7, tasks=host(4), checkpoint=tmp_path / "b"), whole)


def test_groups_end_where_shapes_change_and_the_position_is_that_of_the_next_group():
    rows = [np.zeros(2), np.ones(2), np.full(3, 2.0), np.full(2, 3.0)]
    batches = Batches(Restartable(rows), None)
    assert batches.shapes().shape == (2,) and batches.place() == {"place": 0}
    group, number = batches.take(4, 4)
    assert number == 2 and group.shape == (4, 2) and group[:, 0].tolist() == [0, 1, 1, 1]
    assert batches.place() == {"place": 2}  # the third was read, and is kept
    assert batches.take(4, 4)[0].shape == (4, 3)
    again = Batches(Restartable(rows), None)
    again.shapes()
    again.restore({"place": 3}, 3)
    assert again.take(1, 1)[0].tolist() == [[3.0, 3.0]]


@pytest.mark.slow
def test_batches_of_several_shapes_train():
    ragged = [jax.tree.map(lambda x, i=i: x[: 2 + i % 2], b) for i, b in enumerate(host(5))]
    same(train(steps=9, tasks=ragged).params, by_hand(9, ragged))


def test_one_batch_may_be_passed_for_all_steps():
    same(train(tasks=BATCH).params, by_hand(6, [BATCH]))


# Functions that are not functions of their key.


def test_a_sampler_that_is_not_a_function_of_its_key_raises():
    batches, numbers = iter(host(9)), np.random.default_rng(0)

    def noise(key):
        x = numbers.standard_normal((2, 3, 1)).astype(np.float32)
        return (x, x), (x, x)

    for sampler in (lambda key: next(batches), noise):
        with pytest.raises(
            ValueError, match="sample_tasks returns other tasks when it is called ag"
        ):
            train(tasks=sampler)
    with pytest.raises(ValueError, match="evaluation_tasks returns other tasks"):
        train(evaluate=TEST, evaluate_every=2, evaluation_tasks=lambda key: next(batches))


def test_a_sampler_that_ignores_its_key_warns_and_is_used():
    with pytest.warns(UserWarning, match="does not use its key.*pass the tasks themselves"):
        result = train(tasks=lambda key: BATCH)
    same(result, train(tasks=BATCH))


@pytest.mark.slow
def test_pure_samplers_of_any_form_pass():
    pool = TASKS(KEY)

    def choice(key):
        rows = jax.random.randint(key, (2,), 0, 4)
        return jax.tree.map(lambda x: jax.nn.relu(x[rows]) + np.float32(1), pool)

    train(steps=1, tasks=choice)
    train(steps=1, tasks=jax.tree_util.Partial(lambda scale, key: TASKS(key), 2.0))
    jax.vmap(lambda s: train(steps=1, tasks=lambda key: TASKS(jax.random.fold_in(key, s))).loss)(
        jnp.arange(2)
    )


@pytest.mark.slow
def test_an_inner_adam_without_a_derivative_is_named_when_it_is_built():
    def dead(params, data):
        return jnp.sum(jnp.sin(params * data) * jnp.array([1.0, 0.0]))

    start, data = jnp.ones(2), nm.Tasks(jnp.ones((1, 2)), jnp.ones((1, 2)))
    outer = lambda params, data: jnp.sum(params * data)  # noqa: E731
    plain = nm.InnerOptimizer(optax.adam(1e-2), 2)
    with pytest.warns(UserWarning, match="eps_root"):
        bad = nm.maml_value_and_grad(outer, plain, inner_loss=dead)
    assert np.isnan(bad(start, data)[1]).any()
    rooted = nm.InnerOptimizer(optax.adam(1e-2, eps_root=1e-10), 2)
    for algorithm in (
        nm.maml_value_and_grad(outer, rooted, inner_loss=dead),
        nm.fomaml(outer, plain, inner_loss=dead),
        nm.maml_value_and_grad(outer, nm.InnerOptimizer(optax.sgd(0.1, momentum=0.9), 2)),
    ):
        assert np.isfinite(algorithm(start, data)[1]).all()
