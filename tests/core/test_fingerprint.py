"""Two functions are the same if they trace to the same program, in this process and in another."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.internals import Identity, UnidentifiedError, difference, identify

KEY = jax.eval_shape(lambda: jax.random.key(0))
NUMBER = jax.ShapeDtypeStruct((), jnp.float32)
RATE = 0.5


def identity(function, **options):
    return identify(function, KEY, NUMBER, **options)


def scaled(key, x, scale=2.0):
    return scale * x + jax.random.normal(key)


def closure(scale):
    return lambda key, x: scale * x


class Holder:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, key, x):
        return self.scale * x

    def method(self, key, x):
        return {"a": jnp.exp(self.scale * x)}


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, key, x):
        return self.scale * x


def everything(key, x):
    """Loops, branches, solvers, derivatives, rules of derivatives, random numbers, constants."""
    y = jax.nn.relu(x) + jnp.sum(jax.random.normal(key, (3,)) @ jnp.arange(6.0).reshape(3, 2))
    y = jax.lax.cond(y > 0, lambda a: a, lambda a: -a, y)
    y = jax.lax.fori_loop(0, 3, lambda i, a: a * 1.5, y)
    y = jax.lax.while_loop(lambda a: a > 10, lambda a: a / 2, y)
    solved = jax.jit(lambda a: jnp.linalg.solve(jnp.eye(2) * a, jnp.ones(2)))(y)
    jax.debug.print("{}", y)
    return {"a": jax.grad(lambda q: jnp.sum(jax.nn.softplus(q) * solved))(y), "b": solved[0]}


def with_global(key, x):
    return RATE * x


def made_differently(monkeypatch):
    yield "closure", closure(2.0), closure(3.0), "2.0 became 3.0"
    yield "attribute", Holder(2.0), Holder(3.0), "2.0 became 3.0"
    yield "slot", Slotted(2.0), Slotted(3.0), "2.0 became 3.0"
    yield "bound method", Holder(2.0).method, Holder(3.0).method, "2.0 became 3.0"
    yield "partial", partial(scaled, scale=2.0), partial(scaled, scale=3.0), "2.0 became 3.0"
    big, other = np.zeros(5000), np.zeros(5000)
    other[2500] = 1.0
    dot = partial(lambda key, x, w: x * jnp.sum(w), w=big)
    yield "large array", dot, partial(dot.func, w=other), "constants: float"
    yield "jitted", jax.jit(closure(2.0)), jax.jit(closure(3.0)), "2.0 became 3.0"
    yield "operation", lambda k, x: x * 2, lambda k, x: x + 2, "no longer 1 mul; operations: now"
    yield "parameter", lambda k, x: jnp.sum(jnp.ones((2, 3)) * x, 0)[0], None, ""
    yield (
        "shape",
        lambda k, x: jnp.zeros(2) * x,
        lambda k, x: jnp.zeros(3) * x,
        "outputs: float32[2]",
    )
    yield "order", lambda k, x: jnp.sin(jnp.cos(x)), lambda k, x: jnp.cos(jnp.sin(x)), "otherwise"
    yield "branch", everything, partial(everything), ""
    before = identity(with_global)
    monkeypatch.setattr(sys.modules[__name__], "RATE", 0.25)
    assert "0.5 became 0.25" in difference(before, identity(with_global))


def test_what_differs_is_found_and_said(monkeypatch):
    for name, one, other, said in made_differently(monkeypatch):
        assert difference(identity(one), identity(one)) == "", name
        found = difference(identity(one), identity(other or one))
        assert (said in found) if said else not found, (name, found)


def test_names_and_places_do_not_matter():
    def f(key, x):
        value = x * 2
        return value + 1

    g = jax.jit(lambda seed, number: number * 2 + 1)
    assert identity(f).digest == identity(lambda k, y: y * 2 + 1).digest
    assert identity(jax.jit(f)).digest == identity(g).digest


def test_shapes_types_and_settings_matter():
    one = identify(jnp.sin, jnp.zeros(3))
    assert "float32[3] became float32[4]" in difference(one, identify(jnp.sin, jnp.zeros(4)))
    assert identify(jnp.sin, np.ones(3, np.float32)) == one
    with jax.default_matmul_precision("highest"):
        assert "precision was None, is highest" in difference(one, identify(jnp.sin, jnp.zeros(3)))
    with jax.enable_x64(True):
        assert "float64[3]" in difference(one, identify(jnp.sin, jnp.zeros(3)))


def test_the_digest_is_the_same_in_other_processes():
    code = """
import json
from tests.core.test_fingerprint import everything, identity
print(json.dumps(identity(everything).to_json()))
"""
    root, found = Path(__file__).parents[2], []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
        done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment,
                              capture_output=True, text=True, check=True)  # fmt: skip
        found.append(Identity.from_json(json.loads(done.stdout)))
    assert found[0] == found[1]
    assert difference(found[0], identity(everything)) == ""


def test_a_callback_is_refused_with_the_way_out():
    def function(key, x):
        return jax.pure_callback(np.sin, NUMBER, x)

    with pytest.raises(
        UnidentifiedError, match=r"pure_callback.*pass a label such as code_version="
    ):
        identity(function)
    one = identity(function, code_version="1")
    assert difference(one, identity(lambda key, x: x, code_version="1")) == ""
    assert "'1', now version '2'" in difference(one, identity(function, code_version="2"))
    assert "now no version label" in difference(one, identity(lambda key, x: x))
    with pytest.raises(TypeError, match="code_version must be a non-empty"):
        identity(function, code_version=1)


def test_another_jax_is_named_where_it_may_be_the_cause():
    then = Identity.from_json({**identity(closure(2.0)).to_json(), "jax": "0.7.0"})
    assert difference(then, identity(closure(2.0))) == ""
    assert "JAX was 0.7.0" in difference(then, identity(closure(3.0)))
