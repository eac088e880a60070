"""Random keys whose numbers depend on the key only, not on other draws.

Generators that map a key and a counter to bits, such as threefry and Philox, draw the same numbers
under `jax.vmap` as one key at a time. `rbg` and `unsafe_rbg` draw those of all keys from the first
key of the batch, so that a run would depend on the others. Keys of these and of unknown generators
are hashed into keys of threefry, one by one.
"""

import jax
import jax.numpy as jnp
import numpy as np

from negmaml._core.checks import short_repr

COUNTER_BASED = {"threefry2x32", "threefry4x32", "philox2x32", "philox4x32"}
FALLBACK = "threefry2x32"


def check_key(name: str, key):
    """Return `key` as a key that is safe under `vmap`; raise unless it is one random key of JAX.

    key: typed, or an array of raw uint32 for the default generator. It is returned unchanged if its
    generator is in `COUNTER_BASED`.
    """
    if not (is_typed_key(key) or _is_raw(key)):
        # An integer was probably meant as a seed: the message shows the call.
        whole = isinstance(key, int | np.integer) and not isinstance(key, bool)
        plain = isinstance(key, int | float | str | np.generic | None)
        order = "" if plain else ", and check the order of the arguments"
        raise TypeError(
            f"{name} must be a random key, got {short_repr(key)}; write "
            f"{name}=jax.random.key({key if whole else 0}){order}"
        )
    if key.ndim != (0 if is_typed_key(key) else 1):
        raise ValueError(
            f"{name} must be one random key, got an array of shape {key.shape}; "
            "use jax.vmap for several keys"
        )
    # A raw key does not say its generator, so its shape must be that of the default one.
    if _is_raw(key):
        default, words = _default(), _words(_default())
        if key.shape != words:
            raise ValueError(
                f"{name} must be a raw key of shape {words}, as the default generator {default!r} "
                f"has it, got shape {key.shape}; write {name}=jax.random.key(0, impl=...), which "
                "says its generator"
            )
        if default in COUNTER_BASED:
            return key
    return counter_based(as_typed(key))


def as_typed(key):
    """Return a typed or raw key as a typed key."""
    return key if is_typed_key(key) else jax.random.wrap_key_data(jnp.asarray(key))


def counter_based(keys):
    """Typed keys of any shape, each as a key of a generator in `COUNTER_BASED`."""
    return keys if jax.random.key_impl(keys) in COUNTER_BASED else _hashed(keys)


def with_counter_based_keys(tree):
    """The pytree with its typed keys as those of a generator in `COUNTER_BASED`."""
    return jax.tree.map(lambda leaf: counter_based(leaf) if is_typed_key(leaf) else leaf, tree)


def key_of(seed):
    """The key of a seed by the default generator, or by threefry if that is not safe."""
    default = _default()
    return jax.random.key(seed, impl=default if default in COUNTER_BASED else FALLBACK)


def fixed_key():
    """A constant threefry key, independent of the settings, for draws that are part of a method."""
    return jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32), impl=FALLBACK)


@jax.jit
def _hashed(keys):
    """Every word of a key folded into a key of threefry."""

    # Two words are a threefry key; each further word is folded in.
    def one(words):
        words = jnp.pad(words, (0, max(0, 2 - len(words))))
        key = jax.random.wrap_key_data(words[:2], impl=FALLBACK)
        for word in words[2:]:
            key = jax.random.fold_in(key, word)
        return key

    data = jax.random.key_data(keys)
    return jax.vmap(one)(data.reshape(keys.size, -1)).reshape(keys.shape)


def mixed_draws(program) -> list[str]:
    """Names of the unsafe generators of all draws from several keys at once in a program."""
    found = []
    for equation in program.eqns:
        if equation.primitive.name == "random_bits":
            keys = equation.invars[0].aval
            generator = str(keys.dtype._impl.name)
            if keys.ndim and generator not in COUNTER_BASED:
                found.append(generator)
        # Loops and branches hold programs in their parameters.
        for parameter in jax.tree.leaves(equation.params, is_leaf=_is_program):
            if _is_program(parameter):
                found += mixed_draws(getattr(parameter, "jaxpr", parameter))
    return found


def _is_program(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def is_typed_key(leaf) -> bool:
    """True for an array of typed keys."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _is_raw(leaf) -> bool:
    return getattr(leaf, "dtype", None) == np.uint32 and isinstance(leaf, jax.Array | np.ndarray)


def _default() -> str:
    return jax.config.jax_default_prng_impl  # type: ignore[attr-defined]


def _words(default: str) -> tuple[int, ...]:
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=default))).shape
