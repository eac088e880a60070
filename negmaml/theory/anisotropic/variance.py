r"""How forms of omega* - w0 scatter over training sets, for problems with covariances.

Let G(mu) be the least of |Phi omega - e|^2 + lambda |omega - omega_0|^2 + mu omega^T H omega, all
relative to w0: then omega*^T H omega* = dG/dmu at mu = 0. For two systems 1, 2 on the same data,
with forms and even rules of their own, in units of tau_1 tau_2 and to leading order
(negmaml/theory/anisotropic.md)

    Cov(G_1, G_2) = 2 { -c + m <N, R (1 - Gamma R)^{-1} N> }
    c = - sum_k sum_j o_j^2 phi_j phi'_j (1 - v phi_j - v' phi'_j)
        - sum_k v v' (sum_j o_j phi_j phi'_j)^2 + start
    N = sigma^2 a a'^T + sum_k s_k r r'^T { o [(1 - v phi)(1 - v' phi') + (m - 1) v phi v' phi']
                                            + d v ell v' ell' }

on matrices between the variables of the two systems (primes are those of system 2), with

    R X = T X T'/n_t + e (e^T X e') e'^T/n_v,    Gamma X = sum_k s_k^2 G X G'

as for the 1/p term, Gamma over all tasks. j runs over the m tasks, with phi and o, and the ridge, a
task more with ell and d; `start`, its own share d^2 ell ell' (1 - v ell)(1 - v' ell'), is not in
c, since omega_0 does not scatter. The covariance of two forms is the mixed derivative in both mu.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from negmaml._core.arrays import contract
from negmaml._core.factorisations import inverse
from negmaml._core.jit import quick_jit
from negmaml.problem import MixedLinearRegression, adapted
from negmaml.rules import Rule, flat_batch
from negmaml.rules.pencil import Pencil
from negmaml.theory.anisotropic.equations import (
    Marginal,
    PencilSystem,
    bases,
    embedded,
    moved,
)
from negmaml.theory.anisotropic.inputs import (
    LARGEST_RIDGED_POLE,
    AnisotropicInputs,
    continued,
    make_inputs,
    pole_of,
)
from negmaml.theory.anisotropic.moments import (
    ELL,
    MEANS,
    Expansion,
    Slopes,
    expand,
    solve_and_linearize,
)
from negmaml.theory.anisotropic.solver import Root

BLOCK = 16  # rules at once in a program


def variances(problem: MixedLinearRegression, train: Rule, adapt: Rule, meta_ridge):
    """(Var |omega* - w0|^2, Var of the expected test loss), train shape and with adapt's after."""
    after = adapted(problem, adapt)
    weights = jnp.concatenate([jnp.ones((1, problem.p)), after.weights])
    at, train = make_inputs(problem, train, meta_ridge, weights)
    found, growth, _ = covariances(at, train, None)
    flat = after.coefficients.reshape(-1, len(after.weights))
    losses = contract("rj,...jk,rk->...r", flat, found[..., 1:, 1:], flat) / 4
    losses = (losses * growth[..., None]).reshape(train.batch_shape + adapt.batch_shape)
    return found[..., 0, 0] * growth, losses


def difference(problem: MixedLinearRegression, first: Rule, second: Rule, adapt: Rule, meta_ridge):
    """(Var L_1, Var L_2, Cov(L_1, L_2), E L_1 - E L_2) of two rules on the same data."""
    after = adapted(problem, adapt)
    form = contract("j,jk->k", after.coefficients, after.weights)[None] / 2
    at, first = make_inputs(problem, first, meta_ridge, form)
    _, second = make_inputs(problem, second, meta_ridge, form)
    pairs = (first, None), (second, None), (first, second)
    (a, mean), (b, other), (cross, _) = (
        (found[0, 0] * growth, means[0])
        for found, growth, means in (covariances(at, *pair) for pair in pairs)
    )
    return a, b, cross, mean - other


@quick_jit
def covariances(at: AnisotropicInputs, first: Rule, second: Rule | None):
    """Of two rules or, without a second, of one with itself; rule shape + what is said.

    (covariances of the forms asked for to leading order (J, J), the factor by which they grow at
    finite size (), means of the forms after `first` (J,)).
    """
    shape = first.batch_shape
    rules = [flat_batch(rule) for rule in (first, second) if rule is not None]

    def one(rules):
        systems = [at.system(rule) for rule in rules]
        pair = [respond(system, at.ridged) for system in systems]
        found = covariance(systems[0], pair[0], pair[-1])
        return found[1:, 1:], pair[0].growth * pair[-1].growth, pair[0].means

    found = lax.map(one, rules, batch_size=BLOCK if math.prod(shape) > 1 else None)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), found)


def growth_of(system: PencilSystem, expansion: Expansion):
    """(how deviations of finite sizes exceed those of the limit, means of the forms asked for).

    As in `negmaml.theory.variance`, by the form of Sigma; NaN where no root was found.
    """
    limit, first, fade, converged = expansion
    pole = pole_of(system, limit[0], first[0], fade)
    means = continued(limit[1:-1], first[1:-1], pole)
    capped = jnp.minimum(pole, LARGEST_RIDGED_POLE / 2)
    rest = 1 - 3 * jnp.where(system.ridge > 0, capped, pole)
    whole = continued(limit[0], first[0], pole)
    growth = jnp.where(limit[0] == 0, 1, whole / jnp.where(limit[0] == 0, 1, limit[0]))
    growth = jnp.where(rest > 0, growth / jnp.sqrt(jnp.where(rest > 0, rest, 1)), jnp.inf)
    return jnp.where(converged, growth, jnp.nan), means


class State(NamedTuple):
    """A system at its root: T (a, a) and, per eigenvalue, phi, r (d, k), K_c (d, d, k), v; ell."""

    T: jax.Array
    phi: jax.Array
    mean: jax.Array
    spread: jax.Array
    v: jax.Array
    ell: jax.Array


class Response(NamedTuple):
    """A system's state, how it moves with each form's ridge at fixed lambda, and tau_y/Z, (J,).

    growth, means: of `growth_of`.
    """

    pencil: Pencil
    state: State
    velocity: State
    share: jax.Array
    growth: jax.Array
    means: jax.Array


def respond(system: PencilSystem, ridged: bool) -> Response:
    """The state of a system and its response to every form in `system.weights`."""
    root, x, slopes = solve_and_linearize(system, ridged)
    # Without the last of the means' sources, fresh query rows.
    forms = slice(MEANS.start, MEANS.start + system.weights.shape[0])
    share = slopes.tau[forms] / (root.tau + root.ell * slopes.tau[ELL])
    velocity = jax.vmap(lambda y, part: _moving(system, root, x, slopes, y, part))(
        jnp.arange(forms.start, forms.stop), share
    )
    state = State(root.T, x.phi, x.mean, x.spread, x.v, root.ell)
    growth, means = growth_of(system, expand(system, root, x, slopes))
    return Response(system.pencil, state, velocity, share, growth, means)


def _moving(system: PencilSystem, root: Root, x: Marginal, slopes: Slopes, y, share) -> State:
    """Velocity with source y at fixed lambda: ell moves by -ell tau_y/Z."""
    ell = -root.ell * share
    T = slopes.T[:, y] + ell * slopes.T[:, ELL]
    own = slopes.own[y] + ell * slopes.own[ELL]
    symmetric, _ = bases(root.T.shape[0], T.dtype)
    T = (symmetric @ T).reshape(root.T.shape)
    phi, mean, spread = moved(x.mean, x.spread, embedded(system.pencil, T)[..., None] * system.s)
    return State(T, phi, mean, spread, -(x.v**2) * (own + system.m * phi), ell)


def covariance(system: PencilSystem, one: Response, two: Response):
    """Cov over training sets of the forms of two responses on the same data, (J, J')."""

    def both(first, second):
        return covariance_of_minima(system, one.pencil, two.pencil, first, second)

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
    system: PencilSystem, first: Pencil, second: Pencil, one: State, two: State
):
    """Cov(G_1, G_2) in units of tau_1 tau_2."""
    m, count, o, d, s = system.m, system.count, system.o, system.d, system.s
    b, b_2 = one.v * one.phi, two.v * two.phi
    kept, kept_2 = one.v * one.ell, two.v * two.ell
    product, ridges = one.phi * two.phi, one.ell * two.ell
    lift = (1 - b) * (1 - b_2) + (m - 1) * b * b_2
    plain = m * count * o**2 * product * lift
    cross = 2 * m * o * product * d * ridges * one.v * two.v
    lift = (count * o * lift + d * kept * kept_2) * s

    left, right = (_kept(pencil, x.mean) for pencil, x in ((first, one), (second, two)))
    N = contract("ik,jk,k->ij", left, right, lift)
    N = N + system.sigma**2 * _kept(first, first.points)[:, None] * _kept(second, second.points)
    R = _kronecker(_data(one.T), _data(two.T)) / system.n_t
    corner = np.zeros(R.shape)
    corner[-1, -1] = 1.0
    R = R + corner / system.n_v
    weights = count * s**2
    own, own_2 = (_all(pencil, x.spread) for pencil, x in ((first, one), (second, two)))
    between, between_2 = (y[:, None] * y * x.v for y, x in ((left, one), (right, two)))
    gamma = contract("iak,jbk,k->ijab", own + between, own_2 + between_2, weights)
    gamma = gamma + (m - 1) * contract("iak,jbk,k->ijab", between, between_2, weights)
    gamma = gamma.reshape(R.shape)
    flat = N.ravel()
    answer = R @ (inverse(np.eye(len(R), dtype=R.dtype) - gamma @ R) @ flat)
    return 2 * (jnp.sum(plain + cross) + m * flat @ answer)


def _kept(pencil: Pencil, values):
    """The entries of variables A involves, and of e last."""
    return jnp.concatenate([values[slice(*pencil.active)], values[-1:]])


def _all(pencil: Pencil, G):
    """The same of matrices (d, d, k)."""
    rows = jnp.concatenate([G[slice(*pencil.active)], G[-1:]])
    return jnp.concatenate([rows[:, slice(*pencil.active)], rows[:, -1:]], 1)


def _data(T):
    """T, and zero for e, which data of training do not see of itself."""
    return jnp.pad(T, (0, 1))


def _kronecker(T, T_2):
    """X -> T X T' as a matrix."""
    size = T.shape[0] * T_2.shape[0]
    return (T[:, None, :, None] * T_2[None, :, None, :]).reshape(size, size)
