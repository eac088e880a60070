"""The private names that tests reach: the one place to change when the package is rearranged."""

# ruff: noqa: F401

from negmaml._core import jit, plotting, progress, taylor
from negmaml._core.arrays import canonicalize, contract, namespace, stop_gradient
from negmaml._core.checks import short_repr
from negmaml._core.convergence import warn_unless
from negmaml._core.deprecation import renamed_arguments, renamed_attribute, renamed_exports
from negmaml._core.display import (
    Table,
    add_table_repr,
    mean_range_text,
    mean_text,
    one_line,
    shape_text,
    tree_text,
)
from negmaml._core.factorisations import SAFE_WORK, cpu_safe_vmap, eigh, inverse, linear_solve
from negmaml._core.fingerprint import Identity, UnidentifiedError, difference, identify
from negmaml._core.jit import _PROFILES as jit_profiles
from negmaml._core.jit import FastCompileJit, compiler_options, is_concrete, jit_fast_compile
from negmaml._core.jit import registered as jit_registered
from negmaml._core.keys import COUNTER_BASED, check_key, counter_based
from negmaml._core.lazy import lazily
from negmaml._core.memory import peak_bytes
from negmaml._core.paths import expanded
from negmaml._core.platform import (
    CPU,
    GPU,
    TPU,
    device_platform,
    lowered_for,
    sizes_for,
    with_plan,
)
from negmaml._core.progress import ProgressLog, duration, shown_progress
from negmaml._core.pytree import as_pytree
from negmaml._core.registry import maker, register
from negmaml._core.registry import registered as registry_registered
from negmaml._core.settings import DEFAULTS, result_settings, settings_of
from negmaml._core.symmetry import asymmetry
from negmaml.advice import columns, data, meta_system, predicted, rowblocks, splits, statistics
from negmaml.advice.baselines import mixed_model, per_group_ridge
from negmaml.advice.cv import CVLosses, cv_losses
from negmaml.advice.data import group_rows
from negmaml.advice.document import Grid, Section, render
from negmaml.advice.labels import unique_labels
from negmaml.advice.methods import MEANINGS
from negmaml.advice.moments import (
    STRUCTURES,
    RandomCoefficients,
    initial_shrinkage,
    updated_shrinkage,
)
from negmaml.advice.report import _number as report_number
from negmaml.advice.report import _percent as report_percent
from negmaml.advice.result import _loss_curves, summarise
from negmaml.advice.result import _rmse_difference as rmse_difference
from negmaml.advice.selection import (
    ALL,
    CHOOSE,
    REPORT,
    ByMethod,
    Difference,
    Evidence,
    RateChoice,
    RateGrid,
    best_adapt_rate,
    best_choices,
    best_rate_interval,
    bootstrap_error,
    collect_evidence,
    decide,
    loss_at,
    losses_of,
    t_quantile,
)
from negmaml.advice.solve import MAX_VECTORIZED, ridge_path
from negmaml.advice.splits import Splits, bootstrap, cross_validation, max_training_groups
from negmaml.advice.statistics import quadratic_forms
from negmaml.cli import main, output, paper
from negmaml.cli.cache import keep_programs
from negmaml.kernels import iterative, points, tangent
from negmaml.kernels import solve as kernels_solve
from negmaml.linear import evaluate, simulation
from negmaml.linear.cholesky import cholesky_solve, panel_width, quadratic_form
from negmaml.linear.evaluate import TEST_POINTS, TEST_TASKS
from negmaml.linear.simulation import Experiment, RunPlan, Simulation
from negmaml.linear.solve import one_step_corrections, one_step_distances
from negmaml.linear.system import one_step_system
from negmaml.meta.choice import choose
from negmaml.meta.gradients import Algorithm, second_order
from negmaml.meta.lowrank import wide_weights
from negmaml.meta.memory import check_bytes
from negmaml.paper import cross_check, figures, gain_map, netcdf, nonlinear, reproduce
from negmaml.paper import phases as paper_phases
from negmaml.paper.cross_check import MethodResult, Verification
from negmaml.paper.gain_map import _map
from negmaml.paper.phases import _data
from negmaml.paper.reproduce import (
    CURVE_RATES,
    FIXED_INDEX,
    PROBLEMS,
    RATES,
    Panel,
    _best_by_parabola,
    best_on_grid,
    contents,
    experiments,
    to_dataset,
    with_jackknife,
)
from negmaml.problem.adapted_loss import adapted, expected_test_loss, filter_means, shrinkage
from negmaml.problem.covariance import input_range, symmetric_sqrt
from negmaml.problem.filter_moments import filtered_covariance
from negmaml.problem.wishart import normalized_moment, wishart_quadrature
from negmaml.rules.krylov import minres, truncated_cg
from negmaml.rules.linear_solvers import LinearSettings
from negmaml.rules.pencil import (
    DEGREE,
    Pencil,
    chain,
    error_of,
    interpolated,
    pencil_of_updates,
    proximal_pencil,
)
from negmaml.sweeps import (
    chunks,
    compiler,
    flags,
    layout,
    lease,
    lost,
    members,
    merging,
    parse,
    planning,
    progressions,
    reduce,
    runner,
    selection,
    session,
    spec,
    storage,
    store,
    summary,
    worker,
)
from negmaml.sweeps.description import MANIFEST as description_MANIFEST
from negmaml.sweeps.description import description_of
from negmaml.sweeps.guard import guarded, zarr_arrays
from negmaml.sweeps.local_device import use_local_device
from negmaml.sweeps.members import WorkerRecord
from negmaml.sweeps.parse import parse_grid, parse_seeds
from negmaml.sweeps.planning import ValidatedSweep, chunk_shape, prepare, regions
from negmaml.sweeps.runner import Runner
from negmaml.sweeps.storage import Address, check_url, storage_beside
from negmaml.sweeps.store import MANIFEST as store_MANIFEST
from negmaml.sweeps.store import SweepStore, create, open_store
from negmaml.sweeps.summary import load
from negmaml.sweeps.untrusted import MAX_BLOCKS, MAX_CELLS, check_manifest
from negmaml.theory import allocation, optima
from negmaml.theory import phases as theory_phases
from negmaml.theory.anisotropic import inputs, outliers
from negmaml.theory.anisotropic.compression import MAX_UNCOMPRESSED, compress
from negmaml.theory.anisotropic.equations import FourthMoments, PencilSystem, pencil_blocks
from negmaml.theory.anisotropic.inputs import make_inputs
from negmaml.theory.anisotropic.model import AnisotropicModel
from negmaml.theory.anisotropic.moments import _slopes_of_F_4, expand, solve_and_linearize
from negmaml.theory.anisotropic.solver import solve as solver_solve
from negmaml.theory.anisotropic.variance import covariances
from negmaml.theory.isotropic import logarithms, model, saddle_point
from negmaml.theory.isotropic import moments as isotropic_moments
from negmaml.theory.isotropic.eigenvalue_scatter import log_scatter_factor
from negmaml.theory.isotropic.hessian import FOR_BOTH, exponent, first_order
from negmaml.theory.isotropic.inputs import isotropic_inputs
from negmaml.theory.isotropic.logarithms import (
    find_root,
    largest_exponent,
    largest_log_ratio,
    log_at_least_tiny,
    resolvent_fractions,
    times_exp_2log,
)
from negmaml.theory.isotropic.model import IsotropicModel
from negmaml.theory.isotropic.moments import (
    corrected_moments,
    evaluate_filters,
    leading,
    rule_moments,
)
from negmaml.theory.isotropic.saddle_point import solve as saddle_point_solve
from negmaml.theory.isotropic.saddle_point import training_set
from negmaml.theory.isotropic.scaling import rescale, saddle_derivatives, solve_saddle
from negmaml.theory.isotropic.spectral_density import Spectrum, marchenko_pastur, spectrum
from negmaml.theory.isotropic.variance import covariance_of_loss
from negmaml.theory.model import ExpansionModel, MeanModel, TheoryModel, mean_model, theory_model
from negmaml.theory.phases import Phase, best_rates_over, phase_diagram
from negmaml.theory.search import ROUNDS, minimise
from negmaml.theory.sensitivity import sensitivity_by_parts
from negmaml.theory.theorems import _g_coefficients, _polynomial, weight_error
from negmaml.theory.variance import StandardDeviation
from negmaml.training import programs, seeds
from negmaml.training.batches import Batches
from negmaml.training.sharding import task_sharding
from negmaml.training.state import address, advance_in_place
