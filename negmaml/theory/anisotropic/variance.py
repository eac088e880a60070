r"""Variance of quadratic forms of omega* - w0 over training sets, for problems with covariances.

Let G(mu) be the minimum of |Phi omega - e|^2 + lambda |omega - omega_0|^2 + mu omega^T H omega,
relative to w0. Then omega*^T H omega* = dG/dmu at mu = 0. For two systems 1, 2 on the same data,
with forms and possibly rules of their own, in units of tau_1 tau_2 and to leading order

    Cov(G_1, G_2) = 2 { -c + m <N, R (1 - Gamma R)^{-1} N> }                                 (A23)
    c = - sum_k sum_j o_j^2 phi_j phi'_j (1 - v phi_j - v' phi'_j)                           (A24)
        - sum_k v v' (sum_j o_j phi_j phi'_j)^2 + start
    N = sigma^2 a a'^T + sum_k s_k r r'^T { o [(1 - v phi)(1 - v' phi') + (m-1) v phi v' phi']
                                            + d v ell v' ell' }                              (A25)
    R X = T X T'/n_t + e (e^T X e') e'^T/n_v,    Gamma X = sum_k s_k^2 G X G'                (A26)

on matrices between the variables of the two systems, where primes denote system 2 and Gamma sums
over all tasks. j runs over the m tasks, with phi and o, and over the ridge as one more task, with
ell and d. `start` takes out the share of the ridge only, since omega_0 is fixed. The covariance of
two forms is the mixed derivative in both mu. anisotropic.md derives this.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.arrays import contract
from negmaml._core.factorisations import inverse
from negmaml._core.jit import jit_fast_compile
from negmaml._core.platform import DeviceSizes, with_plan
from negmaml.rules import InnerRule, flat_batch
from negmaml.rules.pencil import Pencil
from negmaml.theory.anisotropic.equations import (
    Marginal,
    PencilSystem,
    bases,
    kron,
    marginal_jvp,
    pad_to_pencil,
)
from negmaml.theory.anisotropic.inputs import AnisotropicInputs, pade_pole
from negmaml.theory.anisotropic.moments import (
    ELL,
    MEANS,
    Expansion,
    Slopes,
    expand,
    solve_and_linearize,
)
from negmaml.theory.anisotropic.solver import PencilRoot
from negmaml.theory.resummation import deviation_growth, pade_resum


@jit_fast_compile
def covariances(at: AnisotropicInputs, first: InnerRule, second: InnerRule | None):
    """Return covariances of the forms after two rules, or after one rule if `second` is None.

    (covariances to leading order (J, J), their growth at finite size (), means after `first` (J,)),
    each with the rule's shape in front.
    """
    shape = first.batch_shape
    rules = [flat_batch(rule) for rule in (first, second) if rule is not None]

    def one(rules):
        systems = [at.system(rule) for rule in rules]
        pair = [respond(system, at.ridged) for system in systems]
        found = covariance(systems[0], pair[0], pair[-1])
        # The first form is the reference of the resummation, not one of those wanted.
        return found[1:, 1:], pair[0].growth * pair[-1].growth, pair[0].means

    # Without the axis of a block a single rule compiles in less time.
    first_rule = jax.tree.map(lambda x: x[0], rules[0])
    pencil = first_rule.spectral().pencil(1.0).constant
    count, numbers = math.prod(shape), pencil.size * at.spectrum.s.size

    def size(sizes: DeviceSizes) -> int | None:
        most = sizes.pencils_at_once(sizes.pencil_variances, numbers)
        return min(most, count) if count > 1 else None

    found = with_plan(size, lambda size: lax.map(one, rules, batch_size=size))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), found)


def growth_factor(system: PencilSystem, expansion: Expansion):
    """Return (growth of deviations at finite size by (A27), means of the forms).

    The growth is that of the form of Sigma; NaN where no root was found.
    """
    limit, first, attenuation, converged = expansion
    pole = pade_pole(system, limit[0], first[0], attenuation)
    means = pade_resum(limit[:-1], first[:-1], pole)
    growth = jnp.where(limit[0] == 0, 1, means[0] / jnp.where(limit[0] == 0, 1, limit[0]))
    growth = deviation_growth(growth, pole, system.ridge > 0)
    return jnp.where(converged, growth, jnp.nan), means[1:]


class PencilState(NamedTuple):
    """A system at its root: T (a, a), the marginal of every eigenvalue, and ell."""

    T: jax.Array
    marginal: Marginal
    ell: jax.Array


class Response(NamedTuple):
    """A system's state, its velocity in each form's ridge at fixed lambda, and tau_y/Z, (J,).

    growth, means: as `growth_factor` returns them.
    """

    pencil: Pencil
    state: PencilState
    velocity: PencilState
    share: jax.Array
    growth: jax.Array
    means: jax.Array


def respond(system: PencilSystem, ridged: bool) -> Response:
    """Return the `Response` of a system to every form in `system.weights`."""
    root, x, slopes = solve_and_linearize(system, ridged)
    # All sources of means but the last, fresh query rows.
    forms = slice(MEANS.start, MEANS.start + system.weights.shape[0])
    share = slopes.tau[forms] / (root.tau + root.ell * slopes.tau[ELL])
    velocity = jax.vmap(lambda y, part: _state_velocity(system, root, x, slopes, y, part))(
        jnp.arange(forms.start, forms.stop), share
    )
    growth, means = growth_factor(system, expand(system, root, x, slopes))
    state = PencilState(root.T, x, root.ell)
    return Response(system.pencil, state, velocity, share, growth, means)


def _state_velocity(
    system: PencilSystem, root: PencilRoot, x: Marginal, slopes: Slopes, y, share
) -> PencilState:
    """Return the velocity with source y at fixed lambda: ell moves by -ell tau_y/Z."""
    # lambda = ell tau stays, so ell moves against tau, and all else along with ell.
    ell = -root.ell * share
    T = slopes.T[:, y] + ell * slopes.T[:, ELL]
    ridge = slopes.ridge[y] + ell * slopes.ridge[ELL]
    symmetric, _ = bases(root.T.shape[0], T.dtype)
    T = (symmetric @ T).reshape(root.T.shape)
    change = pad_to_pencil(system.pencil, T)[..., None] * system.s
    phi, mean, cov = marginal_jvp(x.mean, x.cov, change)
    return PencilState(T, Marginal(phi, mean, cov, -(x.v**2) * (ridge + system.m * phi)), ell)


def covariance(system: PencilSystem, one: Response, two: Response):
    """Return Cov over training sets of the forms of two responses on the same data, (J, J')."""

    def both(first, second):
        return covariance_of_minima(system, one.pencil, two.pencil, first, second)

    # Units are tau_1 tau_2, which move as well: hence share * value beside each slope.
    def along_second(first, velocity, share):
        value, slope = jax.jvp(lambda second: both(first, second), (two.state,), (velocity,))
        return slope + share * value

    def along(velocity, share, other, other_share):
        value, slope = jax.jvp(
            lambda first: along_second(first, other, other_share), (one.state,), (velocity,)
        )
        return slope + share * value

    columns = jax.vmap(along, (None, None, 0, 0))
    return jax.vmap(columns, (0, 0, None, None))(one.velocity, one.share, two.velocity, two.share)


def covariance_of_minima(
    system: PencilSystem, first: Pencil, second: Pencil, one: PencilState, two: PencilState
):
    """Return Cov(G_1, G_2) of (A23) in units of tau_1 tau_2."""
    m, count, o, d, s = system.m, system.count, system.o, system.d, system.s
    x, y = one.marginal, two.marginal
    # -c of (A24): tasks with tasks, then tasks with the ridge.
    b, b_2 = x.v * x.phi, y.v * y.phi
    product, ridges = x.phi * y.phi, one.ell * two.ell
    # The two sums of (A24) are m o^2 phi phi' times 1 - b - b' and times m b b', together `lift`.
    # The ridge with itself gives `start` exactly, and is left out.
    lift = (1 - b) * (1 - b_2) + (m - 1) * b * b_2
    plain = m * count * o**2 * product * lift
    mixed = 2 * m * o * product * d * ridges * x.v * y.v
    lift = (count * o * lift + d * (x.v * one.ell) * (y.v * two.ell)) * s

    # N, R and Gamma of (A25) and (A26), on the active variables and the output.
    left, right = _with_output(first, x.mean), _with_output(second, y.mean)
    N = contract("ik,jk,k->ij", left, right, lift)
    points = _with_output(first, first.points), _with_output(second, second.points)
    N = N + system.sigma**2 * points[0][:, None] * points[1]
    # Rows of training data do not see the output variable, hence zeros beside T.
    R = kron(jnp.pad(one.T, (0, 1)), jnp.pad(two.T, (0, 1))) / system.n_t
    corner = np.zeros(R.shape)
    corner[-1, -1] = 1.0
    R = R + corner / system.n_v
    weights = count * s**2
    cov, cov_2 = (
        _with_output(pencil, _with_output(pencil, of.cov).swapaxes(0, 1))
        for pencil, of in ((first, x), (second, y))
    )
    across, across_2 = left[:, None] * left * x.v, right[:, None] * right * y.v
    # Gamma within a task, and m - 1 times across.
    gamma = contract("iak,jbk,k->ijab", cov + across, cov_2 + across_2, weights)
    gamma = gamma + (m - 1) * contract("iak,jbk,k->ijab", across, across_2, weights)
    gamma = gamma.reshape(R.shape)
    flat = N.ravel()
    answer = R @ (inverse(np.eye(len(R), dtype=R.dtype) - gamma @ R) @ flat)
    return 2 * (jnp.sum(plain + mixed) + m * flat @ answer)


def _with_output(pencil: Pencil, values):
    """Return the entries of the active variables, and that of the output variable last."""
    return jnp.concatenate([values[slice(*pencil.active)], values[-1:]])
