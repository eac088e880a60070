"""Parameters of a checkpoint, without the functions of the run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from tests.training.tiny import ALGORITHM, KEY, PARAMS, RULE, TEST, loss, same, tasks

pytest.importorskip("orbax.checkpoint")
ADAM = optax.adam(1e-2)


def train(path, steps=4, params=PARAMS, algorithm=ALGORITHM, **options):
    given = {"checkpoint": path, "checkpoint_every": 2} | options
    return nm.fit(KEY, params, algorithm, tasks, ADAM, steps, **given)


def test_the_latest_and_a_chosen_checkpoint_are_loaded(tmp_path):
    whole = train(tmp_path / "a")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    same(nm.load(tmp_path / "a"), whole.params)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    same(nm.load(str(tmp_path / "a"), step=4), whole.params)
    same(nm.load(tmp_path / "a", step=2), train(tmp_path / "b", 2).params)
    same(nm.load(tmp_path / "a", PARAMS), whole.params)
    with pytest.raises(ValueError, match=r"step must be one of those in .*\[2, 4\], got 3"):
        nm.load(tmp_path / "a", step=3)


def test_with_patience_the_best_parameters_are_loaded(tmp_path):
    """The evaluation grows with every step, so the first is the best."""
    given = dict(evaluate=lambda p, t: p, evaluate_every=1, patience=9, checkpoint=tmp_path,
                 evaluation_tasks=lambda key: key)  # fmt: skip
    rise = lambda p, t: (p, -jnp.ones(()))  # noqa: E731
    result = nm.fit(KEY, 0.0, rise, lambda key: key, optax.sgd(1.0), 5, **given)
    assert float(result.params) == float(nm.load(tmp_path)) == float(nm.load(tmp_path, best=True))
    assert float(nm.load(tmp_path)) == 1 and float(nm.load(tmp_path, best=False)) == 5


def test_best_needs_an_evaluation(tmp_path):
    train(tmp_path / "a")
    with pytest.raises(ValueError, match=r"best=True needs .* fit had no patience"):
        nm.load(tmp_path / "a", best=True)
    nothing = lambda p, t: jnp.nan * p["w"]  # noqa: E731
    train(tmp_path / "b", evaluate=nothing, evaluate_every=1, patience=9)
    with pytest.raises(ValueError, match="no evaluation was finite"):
        nm.load(tmp_path / "b", best=True)
    assert np.isfinite(nm.load(tmp_path / "b")["w"])


def test_after_a_run_that_is_not_finite_the_last_good_parameters_are_loaded(tmp_path):
    broken = lambda p, t: (jnp.where(p < -1.5, jnp.nan, p), jnp.ones(()))  # noqa: E731
    with pytest.warns(RuntimeWarning, match="not finite"):
        result = nm.fit(KEY, 0.0, broken, lambda key: key, optax.sgd(1.0), 9, checkpoint=tmp_path)
    assert float(nm.load(tmp_path)) == float(result.params) == -1


def test_trees_with_parts_that_do_not_train_are_loaded_without_a_model(tmp_path):
    params = {"layers": [PARAMS, ()], "none": None, "sizes": (3, "name", True),
              "table": jnp.arange(3)}  # fmt: skip
    algorithm = nm.maml_value_and_grad(lambda p, d: loss(p["layers"][0], d), RULE)
    result = train(tmp_path, params=params, algorithm=algorithm)
    found = nm.load(tmp_path)
    assert found["sizes"] == (3, "name", True) and found["table"].dtype == jnp.int32
    assert jax.tree.structure(found) == jax.tree.structure(params)
    same(found["layers"], result.params["layers"])


def test_a_model_with_state_is_loaded(tmp_path):
    def with_key(params, state, data):
        return loss(params, data), state | {"mean": state["mean"] + 1.0}

    start = nm.Stateful(PARAMS, {"mean": jnp.zeros(()), "key": jax.random.key(3)})
    result = train(tmp_path, params=start, algorithm=nm.maml_value_and_grad(with_key, RULE))
    for found in (nm.load(tmp_path), nm.load(tmp_path, start)):
        assert isinstance(found, nm.Stateful)
        same(found.params, result.params.params)
        assert float(found.state["mean"]) == float(result.params.state["mean"])
        assert jax.dtypes.issubdtype(found.state["key"].dtype, jax.dtypes.prng_key)


def test_an_nnx_module_needs_a_module(tmp_path):
    nnx = pytest.importorskip("flax.nnx")

    def make(seed):
        return nnx.Linear(1, 1, rngs=nnx.Rngs(seed))

    def module_loss(module, data):
        x, y = data
        return jnp.mean((module(x[..., None])[..., 0] - y) ** 2)

    algorithm = nm.maml_value_and_grad(module_loss, RULE)
    result = train(tmp_path, params=make(0), algorithm=algorithm)
    with pytest.raises(TypeError, match=r"like must be given .* a Flax NNX module"):
        nm.load(tmp_path)
    found = nm.load(tmp_path, make(1))
    same(nnx.state(found), nnx.state(result.params))
    with pytest.raises(ValueError, match=r"like must have the shapes .*float32\[1,2\]"):
        nm.load(tmp_path, nnx.Linear(1, 2, rngs=nnx.Rngs(0)))


def test_a_model_with_a_state_for_each_step_resumes_and_needs_a_model(tmp_path):
    def centred(params, mean, data):
        x, y = data
        mean = 0.9 * mean + 0.1 * x.mean()
        return loss(params, (x - mean, y)), mean

    start = nm.maml_plus_plus_params(nm.Stateful(PARAMS, jnp.zeros(())), rate=0.02, steps=2)
    algorithm = nm.maml_plus_plus(centred, annealing=3)
    train(tmp_path, 2, start, algorithm)
    result = train(tmp_path, 4, start, algorithm)
    same(result.params, nm.fit(KEY, start, algorithm, tasks, ADAM, 4).params)
    with pytest.raises(TypeError, match=r"like must be given .* a PerStepModel"):
        nm.load(tmp_path)
    same(nm.load(tmp_path, start), result.params)


def test_directories_that_cannot_be_loaded_are_named(tmp_path):
    with pytest.raises(ValueError, match="path must be a directory with checkpoints"):
        nm.load(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds none"):
        nm.load(tmp_path)
    train(tmp_path / "a", evaluate=TEST, evaluate_every=1)
    for name in (4, 2):
        for file in (tmp_path / "a" / str(name)).rglob("*"):
            if file.is_file() and file.parent.name == "d":
                file.write_bytes(b"x")
        if name == 4:
            with pytest.warns(UserWarning, match=r"checkpoint 4 .* damaged.*loading checkpoint 2"):
                same(nm.load(tmp_path / "a"), train(tmp_path / "b", 2).params)
    with pytest.raises(ValueError, match=r"damaged.*there is no earlier one"):
        nm.load(tmp_path / "a")


@pytest.mark.parametrize(
    "wrong", ({"path": 3}, {"path": ""}, {"step": 0}, {"step": 1.5}, {"best": "yes"})
)
def test_wrong_arguments_are_named(tmp_path, wrong):
    (name,) = wrong
    with pytest.raises((TypeError, ValueError), match=name):
        nm.load(**{"path": tmp_path} | wrong)
