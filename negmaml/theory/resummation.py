r"""Resummation of limit + first, the two leading orders in 1/p, near the threshold p = n_v m.

At rate zero the exact inverse-Wishart mean is limit/(1 - x) with x = first/limit. A ridge removes
that pole, so the resummed mean is

    limit + first/(1 - x s),

where s is one without ridge and falls to zero where the ridge governs. Each theory has
its own s; this module has the rest.
"""

from negmaml._core.arrays import namespace

# The largest x s with ridge. Above this no expansion in 1/p holds: |n_v m - p| <= 2 and the ridge
# is tiny, so that only the ridge keeps the mean finite.
MAX_RIDGED_POLE = 0.5


def pade_resum(limit, first, pole):
    """Return limit + first/(1 - pole), infinite from pole = 1 on unless the limit is zero."""
    xp = namespace(limit, first, pole)
    beyond = pole >= 1
    found = limit + first / (1 - xp.where(beyond, 0, pole))
    # Written so that a limit that is a plain number leaves the dtype to `found`.
    return xp.where(beyond & (limit == 0), limit, xp.where(beyond, xp.inf, found))


def deviation_growth(growth, pole, ridged):
    """Return the factor by which standard deviations at finite size exceed those of the limit.

    growth: that of the mean, 1 + x/(1 - x s). The fluctuations of a mean with a pole at x s = 1
    have theirs at x s = 1/3, as for the inverse-Wishart law: growth/sqrt(1 - 3 x s).
    """
    xp = namespace(growth, pole)
    pole = xp.where(ridged, xp.minimum(pole, MAX_RIDGED_POLE / 2), pole)
    rest = 1 - 3 * pole
    return xp.where(rest > 0, growth / xp.sqrt(xp.where(rest > 0, rest, 1)), xp.inf)
