"""Regression of sinusoids, the first benchmark of MAML."""

import jax
import jax.numpy as jnp

from negmaml._core.checks import check_count
from negmaml._core.keys import check_key
from negmaml._core.pytree import pytree, static
from negmaml._core.settings import own_settings
from negmaml._core.types import PRNGKeyArray
from negmaml.meta.batching import Tasks


@pytree
class Sinusoid:
    r"""Regression of y = amplitude sin(x + phase), a task for each amplitude and phase.

        amplitude ~ U(0.1, 5)      phase ~ U(0, pi)      x ~ U(-5, 5)

    A call with a key returns `Tasks` of `m` tasks: support (x, y) of shapes (m, n_t, 1), query of
    shapes (m, n_v, 1). Raises TypeError or ValueError for a size below 1. Source: Finn, Abbeel and
    Levine, ICML 2017, section 5.1.

    >>> tasks = Sinusoid(m=25, n_t=10, n_v=5)(jax.random.key(0))
    >>> tasks.support[0].shape, tasks.query[1].shape
    ((25, 10, 1), (25, 5, 1))
    """

    m: int = static()
    n_t: int = static()
    n_v: int = static()

    def __post_init__(self) -> None:
        for name in ("m", "n_t", "n_v"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))

    @own_settings
    def __call__(self, key: PRNGKeyArray) -> Tasks:
        key = check_key("key", key)
        for_amplitude, for_phase, for_x = jax.random.split(key, 3)
        # Shape (m, 1, 1): one value for all points of a task.
        amplitude = jax.random.uniform(for_amplitude, (self.m, 1, 1), minval=0.1, maxval=5.0)
        phase = jax.random.uniform(for_phase, (self.m, 1, 1), maxval=jnp.pi)
        # Support and query rows are drawn alike, so one draw is cut in two.
        shape = (self.m, self.n_t + self.n_v, 1)
        x = jax.random.uniform(for_x, shape, minval=-5.0, maxval=5.0)
        y = amplitude * jnp.sin(x + phase)
        cut = self.n_t
        return Tasks((x[:, :cut], y[:, :cut]), (x[:, cut:], y[:, cut:]))
