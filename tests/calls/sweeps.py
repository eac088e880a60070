"""Calls of `negmaml.sweeps`."""

import jax
import numpy as np

import negmaml as nm
from negmaml.sweeps import merge, plan, random_points, status
from tests.calls.form import PATH, Right, Wrong, wrong
from tests.calls.rules import COUNTS


def function(key, size, scale=1.0):
    return {"value": scale * jax.random.normal(key) + size}


def leading(key, rates):
    return {"value": rates, "first": rates[0]}


GRID = {"size": [1, 2], "scale": [0.5, 1.0]}
RATES = {"rates": [1.0, 2.0]}
GOOD = {"function": function, "grid": GRID, "seeds": 2}
SAID = [
    # store
    (dict(store=3), TypeError, "store must be a path or a URL, got 3"),
    (dict(store=b"x"), TypeError, "store must be a path or a URL, got b'x'"),
    (dict(store=True), TypeError, "store must be a path or a URL"),
    (dict(store=""), ValueError, "store must be a path or a URL, got ''"),
    (dict(store=" "), ValueError, "store must be a path"),
    (dict(store=["x.zarr"]), TypeError, "store must be a path"),
    (dict(store="nowhere://bucket/x.zarr"), ValueError, "no file system 'nowhere'"),
    (dict(store="S3 ://x"), ValueError, "no file system"),
    (dict(extend="yes", store=PATH), TypeError, "extend must be True or False, got 'yes'"),
    (dict(extend=1, store=PATH), TypeError, "extend must be True or False, got 1"),
    (dict(extend=True), ValueError, "extend=True is about a store that is there; pass store="),
    (dict(allow_code_change=None, store=PATH), TypeError, "allow_code_change must be True or"),
    (dict(allow_code_change=True), ValueError, "allow_code_change=True is about a store"),
    (dict(code_version=2, store=PATH), TypeError, "code_version must be a non-empty string"),
    (dict(code_version="", store=PATH), TypeError, "code_version must be a non-empty string"),
    (dict(client="tcp://localhost:1"), ValueError, "client needs a store"),
    (dict(client=3, store=PATH), TypeError, r"client must be a distributed\.Client"),
    # names
    (dict(static="size"), TypeError, "static must be a list of names"),
    (dict(static=["size", 3]), TypeError, "static must be a list of names, got 3 in it"),
    (dict(static=["sise"]), ValueError, "static: no axis 'sise'; did you mean 'size'"),
    (dict(common_random_numbers="size"), TypeError, "common_random_numbers must be a list of"),
    (dict(common_random_numbers=["scal"]), ValueError, "common_random_numbers: no axis 'scal'"),
    (dict(vectorized="scale"), TypeError, "vectorized must be a list of names"),
    (dict(vectorized=3), TypeError, "vectorized must be a list of names"),
    (dict(function=leading, grid=RATES, vectorized=["rate"]), ValueError, "did you mean 'rates'"),
    (dict(output_dims={"values": ["size"]}), ValueError, "no 'values'; did you mean 'value'"),
    (dict(output_dims={3: ["a"]}), TypeError, "output_dims must have names of outputs as keys"),
    (dict(output_dims=["value"]), TypeError, "output_dims must map outputs to the names"),
    (dict(output_dims={"value": "size"}), TypeError, r"output_dims\['value'\] must be a list"),
    # seeds and root
    (dict(seeds=[True, False]), ValueError, r"seeds must be .*got \[True, False\]"),
    (dict(seeds=True), ValueError, "seeds must be"),
    (dict(seeds=-1), ValueError, "seeds must be"),
    (dict(seeds=0), ValueError, "seeds must be"),
    (dict(seeds=2.0), ValueError, "seeds must be"),
    (dict(seeds=[0.5]), ValueError, "seeds must be"),
    (dict(seeds=[]), ValueError, "seeds must be"),
    (dict(seeds="12"), ValueError, "seeds must be"),
    (dict(seeds=None), ValueError, "seeds must be"),
    (dict(seeds=[2**32]), ValueError, "from 0 to 2"),
    (dict(seeds=[-1]), ValueError, "from 0 to 2"),
    (dict(seeds=[3, 3]), ValueError, "got 3 twice"),
    (dict(root_seed=-1), ValueError, "root_seed must be an integer from 0"),
    (dict(root_seed=2**32), ValueError, "root_seed must be an integer from 0"),
    (dict(root_seed=1.0), ValueError, "root_seed must be an integer from 0"),
    (dict(root_seed=True), ValueError, "root_seed must be an integer from 0"),
    # means
    (dict(memory=0), ValueError, "memory must be an integer of at least 1"),
    (dict(memory=1.5), TypeError, "memory must be"),
    (dict(memory=True), TypeError, "memory must be"),
    (dict(block=0), ValueError, "block must be"),
    (dict(block="4"), TypeError, "block must be"),
    (dict(devices=[]), ValueError, "devices must be a list of some of"),
    (dict(devices=["cpu"]), ValueError, "devices must be a list of some of"),
    (dict(devices=3), ValueError, "devices must be a list of some of"),
    (dict(progress="x"), TypeError, "progress must be True, False or a function, got 'x'"),
    (dict(progress=None), TypeError, "progress must be True, False or a function"),
    # grid
    (dict(grid=None), TypeError, "grid must be a dict of axes"),
    (dict(grid="size"), TypeError, "grid must be a dict of axes"),
    (dict(grid=3), TypeError, "grid must be a dict of axes"),
    (dict(grid=[3]), TypeError, "grid must be a dict of axes"),
    (dict(grid=[]), ValueError, "at least one dict"),
    (dict(grid={}), ValueError, "size missing"),
    (dict(grid={"size": 2**40}), ValueError, "beyond int32"),
    (dict(grid={"size": [1, -(2**70)]}), ValueError, "beyond int32"),
    (dict(grid=GRID | {"scale": [1e300]}), ValueError, "beyond float32"),
    (dict(grid=GRID | {"scale": [0.5, 10**400]}), ValueError, "beyond float32"),
    (dict(grid=GRID | {"scale": [np.inf]}), ValueError, "any finite number"),
    (dict(grid=GRID | {"scale": np.nan}), ValueError, "any finite number"),
    (dict(grid=GRID | {"scale": ["a", 1.0]}, static=["size"]), TypeError, "must hold numbers"),
    (dict(grid=GRID | {"scale": [1j]}), TypeError, "not a number, string or truth value"),
    (dict(grid=GRID | {"scale": [b"a"]}), TypeError, "not a number, string or truth value"),
    (dict(grid=GRID | {"scale": [None]}), TypeError, "not a number, string or truth value"),
    (dict(grid=GRID | {"scale": np.ones((2, 2))}), TypeError, "must hold numbers, strings or"),
    (dict(grid=GRID | {"scale": {}}), TypeError, "not a number"),
    (dict(grid={("size",): [1]}), ValueError, "zips 1 axes, got the row 1"),
    (dict(grid={("size", "scale"): 3}), TypeError, "need a list of tuples"),
    (dict(grid={("size", "scale"): [(1,)]}), ValueError, "zips 2 axes"),
    (dict(grid={"size size": [1]}), TypeError, "named by a word"),
    (dict(grid={b"size": [1]}), TypeError, "named by a word"),
    # function
    (dict(function=None), TypeError, "function must be callable"),
    (dict(function="linear"), TypeError, "function must be callable"),
    (dict(function=dict), TypeError, "function must be callable"),
    (dict(function=lambda: 0), TypeError, "must take a key first"),
    (dict(function=lambda key, size, scale: 0.0), TypeError, "must return a dict of arrays"),
    (dict(function=lambda key, size, scale: scale + 0 * size), TypeError, "an array; write return"),
    (dict(function=lambda key, size, scale: {}), TypeError, "must return a dict of arrays"),
    (dict(function=lambda key, size, scale: {"size": 1.0}), ValueError, "names that the grid"),
]  # fmt: skip
LINEAR = {"p": 2, "m": 2, "n_t": 2, "n_v": 2, "n_r": 2, "sigma": 0.1, "nu": 1.0,
          "train_rate": 0.1, "adapt_rate": 0.1}  # fmt: skip
RANGE = {"low": -1, "high": 1}


def swept(**changes):
    """A sweep of the linear model."""
    return nm.sweep(nm.sweeps.linear, LINEAR | changes, 1)


WRONG = [
    *(Wrong(nm.sweep, GOOD | call, said, error) for call, error, said in SAID),
    *wrong(plan, GOOD, memory=COUNTS, block=COUNTS, devices=(3, [], ["cpu"])),
    *wrong(nm.sweep, GOOD | {"store": PATH}, worker=((0, 2), (3, 2), (1, 0), (1,), 1, "3/4", True,
                                                   (1.0, 2), [])),
    Wrong(nm.sweep, GOOD | {"worker": (1, 2)}, "worker"),
    *wrong(random_points, {"n": 2, "rate": RANGE}, n=COUNTS, seed=(-1, 0.5, "a", None, True),
           rate=({}, {"low": 1}, RANGE | {"high": -1}, RANGE | {"low": np.inf}, RANGE | {"x": 1},
                 RANGE | {"low": np.nan}, RANGE | {"high": "a"}, RANGE | {"scale": "log"},
                 RANGE | {"scale": "cube"}, RANGE | {"scale": 2}, RANGE | {"integer": 2}, [])),
    Wrong(random_points, {"n": 2}, "need a range"),
    *wrong(status, {"store": PATH}, store=(3, None, "", b"x", "nowhere://x")),
    *wrong(merge, {"stores": ["a.zarr"], "store": PATH}, stores=("a.zarr", [], 3, None),
           store=(3, None, "", "nowhere://x")),
    *wrong(swept, {}, **dict.fromkeys(("p", "m", "n_t", "n_v", "n_r"), (0, -1, 1.5, "a", True)),
           sigma=(-1.0, np.nan, "a"), nu=(-1.0, "a"), train_rate=(np.nan, "a", 1j), w0=(np.inf,),
           spectrum=("flat", 3), meta_ridge=(-1.0,), train_steps=(0, 1.5)),
]  # fmt: skip


def values(grid, seeds=2, **options):
    """The outputs of a sweep, without labels."""
    return np.asarray(nm.sweep(function, grid, seeds, **options)["value"])


RIGHT = [
    Right("seeds in a list", lambda: values(GRID | {"size": 1}, [0, 1]),
          lambda: values(GRID | {"size": 1})),
    Right("axes in tuples, arrays and ranges",
          lambda: values({"size": range(1, 2), "scale": np.array([0.5, 1.0])}),
          lambda: values({"size": 1, "scale": (0.5, 1)}).reshape(1, 2, 2)),
]  # fmt: skip
