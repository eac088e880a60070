"""Best training parameters over a grid of problems, in the limit of large sizes."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from negmaml._core.arrays import cast, namespace
from negmaml._core.checks import check_array, check_broadcast, short_repr
from negmaml._core.deprecation import renamed_attribute
from negmaml._core.display import add_fields_repr
from negmaml._core.jit import jit_fast_compile
from negmaml._core.meshes import any_mesh, as_mesh, gathered, place, share, within
from negmaml._core.platform import DeviceSizes, with_plan
from negmaml._core.settings import own_settings
from negmaml._core.types import Array, ArrayLike, Devices, Float
from negmaml.problem.covariance import check_covariance, modes
from negmaml.rules import GradientDescent, InnerRule, check_scalar_rule
from negmaml.theory.anisotropic.compression import Eigenvalues, compress
from negmaml.theory.anisotropic.inputs import AnisotropicInputs
from negmaml.theory.anisotropic.objective import AnisotropicObjective
from negmaml.theory.api import warn_if_unsolved
from negmaml.theory.isotropic.inputs import SCALARS, IsotropicInputs, check_spectral
from negmaml.theory.isotropic.objective import IsotropicObjective
from negmaml.theory.isotropic.spectral_density import marchenko_pastur
from negmaml.theory.options import named_options
from negmaml.theory.search import minimise, signed_grid

# Fewer points than `negmaml.theory.search` takes: a map has 40,000 cells, and 2% is enough to draw.
MAP_POINTS, MAP_ROUNDS, MAP_INTERVALS = 8, 3, 24  # in float32


@add_fields_repr
class Phase(NamedTuple):
    """The best parameter of every cell, with arrays of the shape of the grid.

    Attributes:
        best: the parameter with the lowest weight error.
        weight_error: that error.
        at_zero: the weight error with parameter 0.

    Both errors are infinite at p = n_v m without ridge, unless nothing is noisy.

    >>> import negmaml as nm
    >>> phase = nm.theory.phase_diagram(40.0, 4.0, [10.0, 40.0], 3.0, sigma=1.0, nu=1.0)
    >>> phase.best.shape, bool((phase.best < 0).all())
    ((2,), True)
    >>> bool((phase.weight_error <= phase.at_zero).all())
    True
    """

    best: Float[Array, "..."]
    weight_error: Float[Array, "..."]
    at_zero: Float[Array, "..."]


Phase.distance = renamed_attribute("Phase.distance", "weight_error")  # type: ignore[attr-defined]


@named_options
@own_settings
@any_mesh
def phase_diagram(
    p: ArrayLike,
    m: ArrayLike,
    n_t: ArrayLike,
    n_v: ArrayLike,
    sigma: ArrayLike,
    nu: ArrayLike,
    train: InnerRule | None = None,
    *,
    offset: ArrayLike = 0.0,
    meta_ridge: ArrayLike = 0.0,
    input_covariance: Float[ArrayLike, " k"] | None = None,
    weight_covariance: Float[ArrayLike, " k"] | None = None,
    mesh: Devices | None = None,
) -> Phase:
    """Best training parameters over a grid of problems, in the limit of large sizes.

    Arguments:
        p, m, n_t, n_v: sizes, here real numbers: only their ratios and m count in the limit.
        sigma, nu: as in the problem. All of these, offset and meta_ridge broadcast against each
            other, and the result has their common shape.
        train: a rule of the family wanted, one gradient step when omitted.
        offset: |omega_0 - w0|^2.
        meta_ridge: as in `theory.test_loss`.
        input_covariance, weight_covariance: as in the problem, but k eigenvalues or a (k, k) matrix
            that stand for p/k directions each, the same for all cells; a number is one eigenvalue,
            None the identity. Both have the same k. With either, the weight error is that of
            predictions, E (omega* - w0)^T Sigma (omega* - w0), and the offset the same in every
            direction.
        mesh: a `jax.sharding.Mesh` or a list of devices that share the cells, of any number.

    The parameter is accurate to about 2%. Where the weight error falls all the way to an end of the
    range of `theory.best_train_rate`, it is that end; NaN where no weight error is finite. For
    isotropic inputs the best parameter has a limit at p = n_v m, and is that limit there. A
    `ConvergenceWarning` is issued where the equations were not solved. One program serves all
    cells: a map of 200 x 200 takes seconds.
    Raises TypeError or ValueError for sizes that are not above 0, amounts that are not at least 0,
    shapes that do not broadcast, covariances of other forms, and a rule that is not scalar.

    >>> import negmaml as nm
    >>> phase = nm.theory.phase_diagram(40.0, 4.0, [10.0, 40.0], 3.0, sigma=1.0, nu=1.0)
    >>> print(phase.best.round(1))  # for n_t = 10 and n_t = 40
    [-0.7 -1.7]
    """
    # A map is of one family with one parameter; its value here is ignored.
    train = check_scalar_rule("train", GradientDescent(0.0) if train is None else train)
    check_spectral("train", train)
    cells, shape = _cells(p, m, n_t, n_v, sigma, nu, offset, meta_ridge)
    spectrum, dtype = None, jnp.float32
    if not (input_covariance is None and weight_covariance is None):
        spectrum, dtype = _spectrum(input_covariance, weight_covariance), jnp.result_type(float)
    arguments = cast((cells, spectrum, train), dtype)
    devices = as_mesh(mesh)
    if devices is not None:
        arguments = place(arguments, devices)
    with within(devices, arguments):
        found = _phases(*arguments, mesh=devices)
    warn_if_unsolved(found.weight_error)
    return jax.tree.map(lambda x: x.reshape(shape), found)


def best_rates_over(p, m, n_t, n_v, sigma, nu):
    """Return only the best rates of `phase_diagram`, by a program of half the size."""
    cells, shape = _cells(p, m, n_t, n_v, sigma, nu, 0.0, 0.0)
    rule = GradientDescent(np.float32(0))
    return np.asarray(_phases(cells, None, rule, only_best=True)).reshape(shape)


def _cells(*given) -> tuple[IsotropicInputs, tuple[int, ...]]:
    """Return the inputs of all cells along one axis, and the shape that they broadcast to."""
    named = {
        name: check_array(name, value, "of a cell", 0, strict=i < 4)
        for i, (name, value) in enumerate(zip(SCALARS, given, strict=True))
    }
    largest = np.finfo(np.float32).max
    for name, value in named.items():
        # The map is computed in float32, where a larger number would be infinite.
        if not isinstance(value, jax.core.Tracer) and np.any(np.abs(value) > largest):
            raise ValueError(
                f"{name} must be a number of float32, below {largest:.3g}, got "
                f"{short_repr(value)}: only ratios of the sizes, and of sigma, nu and the offset's "
                "root, count here"
            )
    shape = check_broadcast({name: np.shape(value) for name, value in named.items()})
    # Known beforehand, so that maps without ridge run the shorter program.
    ridged = bool(np.any(np.asarray(named["meta_ridge"]) != 0))
    xp = namespace(named)
    # One axis of cells, whatever their grid: `lax.map` runs over it in blocks.
    flat = {
        name: xp.broadcast_to(xp.asarray(value, np.float32), shape).ravel()
        for name, value in named.items()
    }
    return IsotropicInputs(**flat, ridged=ridged), shape


@partial(jit_fast_compile, static_argnames=("only_best", "mesh"))
def _phases(
    cells: IsotropicInputs,
    spectrum: Eigenvalues | None,
    train: InnerRule,
    only_best: bool = False,
    mesh: Mesh | None = None,
):
    """Return the `Phase` of every cell, or only the best parameters; isotropic without spectrum."""

    def one(cell: IsotropicInputs):
        objective = _objective(cell, spectrum)

        def at(values):
            return objective.limit(train.with_tunable(values))

        # The scale of the grid follows the cell: n_t changes the largest eigenvalue of S.
        grid = signed_grid(train, objective.largest_eigenvalue, MAP_POINTS)
        best = minimise(at, grid, MAP_ROUNDS)
        if only_best:
            return best
        return Phase(best, *jnp.where(_mean_is_infinite(cell), jnp.inf, at(_beside_zero(best))))

    # Blocks of cells fill vector units and stay in cache; pencils need more memory a cell.
    def size(sizes: DeviceSizes) -> int:
        most = sizes.phase_cells
        if spectrum is not None:
            # The same number for every cell: the largest pencil of the rule, at every point.
            pencil = train.spectral().pencil(1.0).constant
            numbers = (2 * MAP_POINTS + 1) * pencil.size * spectrum.s.size
            most = sizes.pencils_at_once(sizes.phase_pencils, numbers)
        return min(most, -(-len(cells.p) // (1 if mesh is None else mesh.size)))

    def in_blocks(size: int):
        if mesh is None:
            return lax.map(one, cells, batch_size=size)
        own = share(lambda _, cells: lax.map(one, cells, batch_size=size), (), cells, mesh)
        return gathered(own, mesh)

    return with_plan(size, in_blocks)


def _objective(cell: IsotropicInputs, spectrum: Eigenvalues | None):
    """Return the objective of one cell; `spectrum` as from `_spectrum`."""
    if spectrum is None:
        # A coarse rule, of 24 intervals in place of 64, is accurate to the 2% that a map promises.
        coarse = marchenko_pastur(cell.n_t, cell.p, cell.p.dtype, MAP_INTERVALS)
        return IsotropicObjective(dataclasses.replace(cell, quadrature=coarse))
    # The spectrum is given for p = nu = |omega_0 - w0| = 1; here it gets the numbers of the cell.
    here = spectrum._replace(
        count=spectrum.count * cell.p,
        o=spectrum.o * cell.nu**2 / cell.p,
        d=spectrum.d * cell.offset,
    )
    numbers = cell.m, cell.n_t, cell.n_v, cell.sigma, cell.meta_ridge
    return AnisotropicObjective(AnisotropicInputs(here, 0.0, *numbers, ridged=cell.ridged), None)


def _mean_is_infinite(cell: IsotropicInputs):
    """True where the weight error is infinite, whatever the rule: at p = n_v m without ridge."""
    noisy = (cell.sigma > 0) | ((cell.nu > 0) & (cell.m > 1))
    return (cell.p == cell.n_v * cell.m) & (cell.meta_ridge == 0) & noisy


def _beside_zero(best):
    """Return the best parameter and zero; zero twice where no weight error is finite."""
    return jnp.stack([jnp.where(jnp.isnan(best), 0, best), jnp.zeros_like(best)])


def _spectrum(inputs, weights) -> Eigenvalues:
    """Return the spectrum of a cell with p = nu = 1 and |omega_0 - w0| = 1.

    count: the share of the directions with each eigenvalue. weights: the form of Sigma.
    """
    given = {"input_covariance": inputs, "weight_covariance": weights}
    known = {name: _covariance(name, x) for name, x in given.items() if x is not None}
    k = len(next(iter(known.values())))
    for name, value in known.items():
        check_covariance(name, value, k)
    # nu = 1 and p = k: o is then the weights' covariance over k, hence the factor k.
    s, o, _, _ = modes(k, known.get("input_covariance"), known.get("weight_covariance"), 1.0, 0.0)
    short = compress(np.asarray(s, float), np.asarray(k * o, float), np.ones(k), s[None])
    return short._replace(count=short.count / k, d=short.d / k)


def _covariance(name: str, value):
    """Return known eigenvalues or a known matrix; a number is one eigenvalue."""
    value = check_array(name, value, "a covariance")
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name} must be a known array, got {short_repr(value)} while JAX traces: its "
            "spectrum is compressed on the host; use theory.best_train_rate there"
        )
    return np.atleast_1d(np.asarray(value, float))
