"""Heads computed from the support: against plain loops, for models of every kind."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import negmaml as nm
from tests.helpers import mostly_slow

RNG = np.random.default_rng(0)
WAYS, WIDTH, INPUTS = 3, 6, 4
LABELS = np.tile(np.arange(WAYS), 5)


def tasks(count=2, shots=5):
    """Tasks of (inputs, labels), with `shots` rows a class on the support and five on the query."""
    labels = np.broadcast_to(LABELS, (count, len(LABELS)))
    x = RNG.standard_normal((2, count, len(LABELS), INPUTS))
    n = WAYS * shots
    return nm.Tasks((x[0][:, :n], labels[:, :n]), (x[1], labels))


def params():
    return {
        "body": RNG.standard_normal((INPUTS, WIDTH)),
        "head": {"w": np.zeros((WIDTH, WAYS)), "b": np.zeros(WAYS)},
        "scale": np.array(3.0),
    }


PARAMS, TASKS, FEW = params(), tasks(), tasks(shots=1)


def features(params, x):
    return jnp.tanh(x @ params["body"])


def loss(params, data):
    x, labels = data
    outputs = features(params, x) @ params["head"]["w"] + params["head"]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(
        params["scale"] * outputs, labels
    ).mean()  # fmt: skip


def prototypes(phi, labels):
    """Squared distances to the class means, as prototypical networks use them."""
    means = jnp.stack([phi[labels == k].mean(0) for k in range(WAYS)])
    return lambda query: -jnp.sum((query[:, None] - means) ** 2, -1)


def one_more(phi):
    return jnp.concatenate([phi, jnp.ones((len(phi), 1))], 1)


def ridge(phi, labels, penalty=0.3):
    """Normal equations with a constant feature."""
    X, Y = one_more(phi), jnp.eye(WAYS)[labels]
    W = jnp.linalg.inv(X.T @ X + penalty * len(X) * jnp.eye(X.shape[1])) @ X.T @ Y
    return lambda query: one_more(query) @ W


def logistic(phi, labels, penalty=0.3):
    """Newton steps, unrolled."""
    X = one_more(phi)

    def objective(w):
        W = w.reshape(-1, WAYS)
        scores = jax.nn.log_softmax(X @ W)
        return -scores[np.arange(len(X)), labels].mean() + penalty / 2 * jnp.sum(w**2)

    w = jnp.zeros(X.shape[1] * WAYS)
    for _ in range(8):
        w = w - jnp.linalg.solve(jax.hessian(objective)(w), jax.grad(objective)(w))
    return lambda query: one_more(query) @ w.reshape(-1, WAYS)


HEADS = {
    "prototypes": (nm.PrototypeHead(features), prototypes),
    "ridge": (nm.RidgeHead(features, strength=0.3), ridge),
    "ridge of more features than rows": (nm.RidgeHead(features, strength=0.3), ridge),
    "logistic": (nm.LogisticHead(features, strength=0.3), logistic),
}


def plain_loop(params, tasks, head):
    """The query loss of one task after another, written out."""
    total = 0.0
    for i in range(len(tasks.query[1])):
        (x, y), (x_query, y_query) = jax.tree.map(lambda leaf, i=i: leaf[i], tuple(tasks))
        outputs = params["scale"] * head(features(params, x), y)(features(params, x_query))
        total -= jax.nn.log_softmax(outputs)[np.arange(len(y_query)), y_query].mean()
    return total / len(tasks.query[1])


def same(found, expected, rtol=1e-6, atol=1e-9):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected
    )


@pytest.mark.parametrize("name", HEADS)
def test_values_and_meta_gradients_are_those_of_a_plain_loop(x64, name):
    rule, head = HEADS[name]
    data = FEW if "more features" in name else TASKS
    expected = jax.jit(jax.value_and_grad(lambda p: plain_loop(p, data, head)))(PARAMS)
    same(jax.jit(nm.maml_value_and_grad(loss, rule))(PARAMS, data), expected)


def test_every_way_to_the_meta_gradient_agrees(x64):
    """Nested autodiff of the objective, blocks of tasks, and ANIL, whose body is frozen."""
    rule = nm.RidgeHead(features, strength=0.3)
    mask = {"body": False, "head": True, "scale": False}

    @jax.jit
    def everything(params, tasks):
        ways = (nm.maml_value_and_grad(loss, rule, batch_size=1), nm.anil(loss, rule, mask),
                jax.value_and_grad(nm.maml(loss, rule)), nm.imaml(loss, rule))  # fmt: skip
        return [way(params, tasks) for way in ways]

    for found in everything(PARAMS, TASKS):
        same(found, everything(PARAMS, TASKS)[0])
    found = nm.evaluate(jax.random.key(0), PARAMS, loss, rule, TASKS)
    assert float(found.mean) == pytest.approx(float(everything(PARAMS, TASKS)[0][0]))
    assert not found.unconverged


@pytest.mark.parametrize("shots", (1, 5))
@pytest.mark.parametrize("strength", mostly_slow((-0.02, 0.4), 0))
def test_ridge_is_the_proximal_point_of_a_squared_loss_on_the_head(x64, shots, strength):
    def squared(params, data):
        x, labels = data
        outputs = features(params, x) @ params["head"]["w"] + params["head"]["b"]
        return jnp.sum((outputs - jnp.eye(WAYS)[labels]) ** 2) / (2 * len(x))

    mask = {"body": False, "head": True, "scale": False}
    support = jax.tree.map(lambda x: x[0], tasks(shots=shots).support)
    expected = nm.adapt(squared, PARAMS, support, nm.Proximal(strength), mask=mask)
    rule = nm.RidgeHead(features, strength=strength)
    same(nm.adapt(squared, PARAMS, support, rule), expected, atol=1e-8)


def test_ridge_without_strength_interpolates(x64):
    support = jax.tree.map(lambda x: x[0], FEW.support)
    adapted = nm.adapt(loss, PARAMS, support, nm.RidgeHead(features, strength=0.0))
    outputs = features(adapted, support[0]) @ adapted["head"]["w"] + adapted["head"]["b"]
    np.testing.assert_allclose(outputs, np.eye(WAYS)[support[1]], atol=1e-9)


@pytest.mark.slow
def test_strength_is_differentiated_as_a_leaf_of_the_rule_and_of_the_model(x64):
    rule = nm.RidgeHead(features, strength=jnp.exp(-1.0))
    _, (_, of_rule) = nm.maml_value_and_grad(loss, rule, wrt="both")(PARAMS, TASKS)
    learned = nm.RidgeHead(features, strength=lambda params: jnp.exp(params["log_strength"]))
    start = {**PARAMS, "log_strength": np.array(-1.0)}
    _, gradient = nm.maml_value_and_grad(loss, learned)(start, TASKS)
    same(gradient["log_strength"], of_rule.strength * jnp.exp(-1.0))

    def plain(strength):
        return plain_loop(PARAMS, TASKS, partial(ridge, penalty=strength))

    same(of_rule.strength, jax.grad(plain)(jnp.exp(-1.0)))


def test_ridge_of_numbers_is_that_of_one_output(x64):
    x, y = RNG.standard_normal((8, INPUTS)), RNG.standard_normal(8)
    expected = np.linalg.solve(x.T @ x / 8 + 0.5 * np.eye(INPUTS), x.T @ y / 8)
    rule = nm.RidgeHead(lambda params, x: x, strength=0.5)
    for shape in ((INPUTS,), (INPUTS, 1)):
        found = nm.adapt(loss, {"head": np.zeros(shape)}, (x, y), rule)["head"]
        assert found.shape == shape
        np.testing.assert_allclose(np.ravel(found), expected, rtol=1e-10)


def test_labels_may_be_one_hot_and_the_support_of_another_form():
    x, labels = jax.tree.map(lambda leaf: leaf[0], TASKS.support)
    for make in (nm.PrototypeHead, nm.RidgeHead, nm.LogisticHead):
        expected = nm.adapt(loss, PARAMS, (x, labels), make(features))
        same(nm.adapt(loss, PARAMS, (x, np.eye(WAYS)[labels]), make(features)), expected, 1e-5)
        own = make(features, examples=lambda data: (data["x"], data["y"]))
        same(nm.adapt(loss, PARAMS, {"x": x, "y": labels}, own), expected)


def test_labels_beyond_the_classes_are_reported():
    x, labels = jax.tree.map(lambda leaf: leaf[0], TASKS.support)
    for make in (nm.PrototypeHead, nm.RidgeHead, nm.LogisticHead):
        _, info = nm.adapt(loss, PARAMS, (x, labels), make(features), return_info=True)
        assert bool(info.converged)
        _, info = nm.adapt(loss, PARAMS, (x, labels + 1), make(features), return_info=True)
        assert not bool(info.converged)
    with pytest.warns(nm.ConvergenceWarning):
        nm.adapt(loss, PARAMS, (x, labels + 1), nm.RidgeHead(features))


def test_a_class_without_a_row_is_not_predicted():
    x, labels = jax.tree.map(lambda leaf: leaf[0], TASKS.support)
    some = labels < 2
    adapted = nm.adapt(loss, PARAMS, (x[some], labels[some]), nm.PrototypeHead(features))
    outputs = features(adapted, x) @ adapted["head"]["w"] + adapted["head"]["b"]
    assert np.isfinite(outputs).all() and (np.argmax(outputs, 1) < 2).all()
    slope = jax.grad(loss)(adapted, (x[some], labels[some]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


def test_parameters_of_half_precision_are_fitted_in_single():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    support = jax.tree.map(lambda x: x[0], TASKS.support)
    adapted, info = nm.adapt(loss, half, support, nm.RidgeHead(features), return_info=True)
    assert adapted["head"]["w"].dtype == jnp.bfloat16 and bool(info.converged)
    full = nm.adapt(loss, PARAMS, support, nm.RidgeHead(features))
    same(adapted["head"]["w"].astype(float), full["head"]["w"], 0.1, 0.02)


# Models of other libraries. Each makes (model, loss, features, name of the head).


def of_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Linear(INPUTS, WIDTH, rngs=rngs)
            self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
            self.head = nnx.Linear(WIDTH, WAYS, rngs=rngs)

        def features(self, x):
            return jnp.tanh(self.norm(self.body(x)))

    return Net(nnx.Rngs(0)), Net.features, lambda model, phi: model.head(phi), "head"


def of_equinox():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        body: eqx.nn.Linear
        head: eqx.nn.Linear

        def features(self, x):
            return jnp.tanh(jax.vmap(self.body)(x))

    keys = jax.random.split(jax.random.key(0))
    net = Net(eqx.nn.Linear(INPUTS, WIDTH, key=keys[0]), eqx.nn.Linear(WIDTH, WAYS, key=keys[1]))
    return net, Net.features, lambda model, phi: jax.vmap(model.head)(phi), "head"


def of_linen():
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        def setup(self):
            self.body, self.head = linen.Dense(WIDTH), linen.Dense(WAYS)
            self.norm = linen.BatchNorm(use_running_average=False)

        def features(self, x):
            return jnp.tanh(self.norm(self.body(x)))

        def classify(self, phi):
            return self.head(phi)

        def __call__(self, x):
            return self.classify(self.features(x))

    net = Net()
    variables = net.init(jax.random.key(0), np.zeros((5, INPUTS)))

    def features_of(variables, x):
        return net.apply(variables, x, method="features", mutable=["batch_stats"])[0]

    def classify(variables, phi):
        return net.apply(variables, phi, method="classify")

    return variables, features_of, classify, "head"


def of_stateful():
    def features_of(params, state, x):
        return features(params, x - state)

    def classify(params, state, phi):
        return phi @ params["head"]["w"] + params["head"]["b"]

    return nm.Stateful(PARAMS, jnp.zeros(INPUTS)), features_of, classify, "head"


@pytest.mark.parametrize("kind", mostly_slow((of_nnx, of_linen, of_equinox, of_stateful), 0))
def test_heads_of_models_of_every_kind(kind):
    model, features_of, classify, head = kind()
    stateful = isinstance(model, nm.Stateful)

    def of_model(*arguments):
        *model, (x, labels) = arguments
        outputs = classify(*model, features_of(*model, x))
        value = optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()
        return (value, model[1] + 1) if stateful else value

    support = jax.tree.map(lambda leaf: jnp.asarray(leaf[0], jnp.float32), TASKS.support[0])
    rule = nm.PrototypeHead(features_of, head=head)
    adapted = nm.adapt(of_model, model, (support, LABELS), rule)
    of = tuple(model) if stateful else (model,)
    expected = prototypes(features_of(*of, support), LABELS)
    parts = tuple(adapted) if stateful else (adapted,)
    query = features_of(*of, support[:4])
    found = classify(*parts, query) - jnp.sum(query**2, 1)[:, None]
    same(found, expected(query), 1e-4, 1e-4)
    gradient = nm.maml_value_and_grad(of_model, rule)(model, TASKS)[1]
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 0


def adapted(rule, params=PARAMS, support=None, mask=None):
    support = jax.tree.map(lambda x: x[0], TASKS.support) if support is None else support
    return nm.adapt(loss, params, support, rule, mask=mask)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: adapted(nm.RidgeHead(features, head="top")), "head must select leaves .*'top'"),
        (lambda: adapted(nm.RidgeHead(features, head=lambda path, _: True)), "a linear layer"),
        (lambda: adapted(nm.PrototypeHead(features, head="body")), "and a bias of shape"),
        (lambda: adapted(nm.RidgeHead(features), mask={"body": True, "head": False,
                                                       "scale": True}), "head must select leaves"),
        (lambda: adapted(nm.RidgeHead(lambda p, x: x)), "must have 4 rows"),
        (lambda: adapted(nm.RidgeHead(features, strength=lambda p: p["head"]["b"])),
         r"strength must be a function that returns one number, of shape \(\)"),
        (lambda: adapted(nm.RidgeHead(features), support=(np.ones((0, INPUTS)), np.ones(0, int))),
         "support of a head must have at least one row"),
        (lambda: adapted(nm.RidgeHead(features, transposed=True)), "shape .6, 3. for features"),
        (lambda: adapted(nm.RidgeHead(lambda p, x: x[0])), r"features must return .*float"),
        (lambda: adapted(nm.RidgeHead(features), support=np.ones((5, INPUTS))), "examples"),
        (lambda: adapted(nm.RidgeHead(features), support=(np.ones((5, INPUTS)), np.ones(5))),
         r"targets of a head must be integer labels of shape \(5,\) or \(5, 3\)"),
        (lambda: adapted(nm.RidgeHead(lambda p, x: x @ p["body"][:, :3]),
                         {**PARAMS, "head": np.zeros((3, 3))}), "transposed must be given"),
        (lambda: nm.reptile(loss, nm.RidgeHead(features))(PARAMS, TASKS), "rule that steps"),
    ),
)  # fmt: skip
def test_models_and_data_that_do_not_fit_raise(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
