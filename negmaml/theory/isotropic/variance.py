r"""Two systems on the same data: the covariance of their losses and its derivatives in both kappas.

The equation is at the head of `negmaml.theory.variance`. The scatter of the distance is a
derivative
in both ridges of that of the loss, and with many rows (kappa far above B) smaller than that by
(p/N)^2: no float32 would be left of it. So the blocks of H are eliminated on paper, and what
remains of them are moments over the spectrum weighted by R, whose derivatives are covariances,

    rho f = <f R>/<R>,     d (rho f)/dkappa_1 = -Cov(f, r_1)     d^2 (rho f) = K_3(f, r_1, r_2)

with r_i = 1/(B_i + kappa_i), s_i = B_i r_i and K_3 the third joint cumulant: deviations from means,
in which nothing is lost. With v = rho V beta, b = rho beta, P = p g_1 g_2 and

    A = p <R>           w_1 = v A          w_2 = sigma^2 + p kappa_1 kappa_2 <V R>
    X = n_v - p <beta^2 R> = t_1 + p kappa_2 <s_1 r_2>               E = X + A b^2
    J = Cov(r_1, r_2)/<R> + P b^2/E                                  j = m (v X + b w_2)/E

the equation reads

    Cov(G_1, G_2)/2 = t_1 t_2 { m p kappa_1 kappa_2 <V^2 R> + m (w_2^2 - 2 b w_1 w_2 - v w_1 X)/E }
                      + { t_1 t_2 j (j + 2 start) + start^2 t_1' t_2' m J } P/(1 - m J)

where start = D2/p K_1 K_2, and t' is the t that goes with start: see `covariance_of_loss`.
"""

from negmaml._core.arrays import namespace
from negmaml.theory.isotropic.scaling import Point, Seen
from negmaml.theory.isotropic.series import Series

KEPT = ("", "x", "y", "xy")  # derivatives in kappa_1 (x) and kappa_2 (y)


def covariance_of_loss(pair: list[Seen], points: list[Point]):
    """d^2 Cov(G_1, G_2) / dkappa_1 dkappa_2 at the two roots, both in units of kappa."""
    (one, two), (at_1, at_2) = pair, points
    xp, p, m, sigmas = namespace(at_1.t), one.p, one.m, one.sigma * two.sigma
    V = one.a[0] * two.a[0] + one.a[1] * two.a[1]
    moments = Weighted(one, two, at_1, at_2)
    A, b, v = moments.total, moments.mean(moments.beta), moments.mean(V * moments.beta)
    w_1, w_2 = v * A, series(_=sigmas) + p * moments.with_kappas(V)
    X, E = moments.unused, moments.residual(b)
    per_E = E.reciprocal()
    P = p * (series(_=at_1.g, x=-at_1.l) * series(_=at_2.g, y=-at_2.l))
    J = moments.dependence() + P * (b * b) * per_E
    free = series(_=1.0) - m * J
    eps = xp.finfo(p.dtype).eps  # at p = n_v m without ridge nothing is free
    free = Series(free.terms | {"": xp.maximum(free[""], eps)}, KEPT)
    coupling = P * free.reciprocal()
    j = m * ((v * X + b * w_2) * per_E)

    t_1, t_2 = series(_=at_1.t, x=at_1.t1), series(_=at_2.t, y=at_2.t1)
    alone = p * moments.with_kappas(V * V) + (w_2 * w_2 - w_1 * (2.0 * (b * w_2) + v * X)) * per_E
    # The start's source is ridge^2 = (t K)^2, held fixed. ridge^2/t is K^2 (2 t_root - t) to first
    # order, which is all that one derivative in each kappa sees, and regular at t = 0.
    start = xp.sqrt(one.offset) * xp.sqrt(two.offset) / p * at_1.K * at_2.K
    mirrored = series(_=at_1.t, x=-at_1.t1) * series(_=at_2.t, y=-at_2.t1)
    noise = m * alone + j * j * coupling
    cross = 2 * start * at_1.t * at_2.t * (j * coupling)
    begun = start * start * m * (mirrored * (J * coupling))
    return 2.0 * (t_1 * t_2 * noise + cross + begun)["xy"]


def series(**terms) -> Series:
    """A series in the two kappas; the value is `_`."""
    return Series({name.strip("_"): x for name, x in terms.items()}, KEPT)


class Weighted:
    """Means over the spectrum weighted by R = r_1 r_2, at kappa_1 = kappa_2 = 1, as series."""

    def __init__(self, one: Seen, two: Seen, at_1: Point, at_2: Point):
        self.one, self.two, self.points = one, two, (at_1, at_2)
        self.beta, self.R = one.b * two.b, one.free * two.free
        self.over = one.mean(self.R)
        # r - <r> is <s> - s: of whichever is the smaller no digits cancel.
        self.plain = [_deviation(x.mean, x.free, x.fitted) for x in (one, two)]
        self.r_1, self.r_2 = (d - self.of(d)[..., None] for d in self.plain)

    def of(self, values):
        """The weighted mean itself."""
        return self.one.mean(values * self.R) / self.over

    @property
    def total(self) -> Series:
        """A = p <R>."""
        p, mean, r_1, r_2 = self.one.p, self.one.mean, self.one.free, self.two.free
        first, second = mean(self.R * r_1), mean(self.R * r_2)
        return p * series(_=self.over, x=-first, y=-second, xy=mean(self.R * self.R))

    def mean(self, values) -> Series:
        """The weighted mean of values that do not depend on kappa."""
        found = self.of(values)
        rest = values - found[..., None]
        x, y, xy = (self.of(rest * d) for d in (self.r_1, self.r_2, self.r_1 * self.r_2))
        return series(_=found, x=-x, y=-y, xy=xy)

    def with_kappas(self, values) -> Series:
        """kappa_1 kappa_2 <f R>: a share kappa r has the derivative r s."""
        mean, f, s_1, s_2 = self.one.mean, values * self.R, self.one.fitted, self.two.fitted
        return series(_=mean(f), x=mean(f * s_1), y=mean(f * s_2), xy=mean(f * s_1 * s_2))

    @property
    def unused(self) -> Series:
        """X, with beta^2 R = s_1 s_2."""
        p, mean, s_1, s_2 = self.one.p, self.one.mean, self.one.fitted, self.two.fitted
        x, y, xy = (mean(s_1 * s_2 * part) for part in (self.one.free, self.two.free, self.R))
        value = self.points[0].t + p * mean(s_1 * self.two.free)
        return series(_=value, x=p * x, y=p * y, xy=-p * xy)

    def residual(self, b: Series) -> Series:
        """E, of which all but the value is that of -A Var(beta)."""
        rest = self.beta - b[""][..., None]
        square = rest * rest
        value, both = self.of(square), self.of(self.r_1 * self.r_2)
        xy = self.of(square * self.r_1 * self.r_2) - value * both - 2 * b["x"] * b["y"]
        variance = series(
            _=value, x=-self.of(square * self.r_1), y=-self.of(square * self.r_2), xy=xy
        )
        slopes = -1.0 * (self.total * variance)
        value = self.unused[""] + self.total[""] * b[""] * b[""]
        return Series(slopes.terms | {"": value}, KEPT)

    def dependence(self) -> Series:
        """Cov(r_1, r_2)/<R> = 1 - g_1 g_2/<R>, the covariance that of the plain spectrum."""
        mean, (d_1, d_2), (at_1, at_2) = self.one.mean, self.plain, self.points
        rest = at_1.g * at_2.g / self.over

        def drift(r, g):
            """<r>, weighted by R, less weighted by r."""
            return (mean(r * d_1 * d_2) - mean(r * d_1) * mean(r * d_2) / g) / self.over

        x, y = drift(self.one.free, at_1.g), drift(self.two.free, at_2.g)
        xy = x * y - self.of(self.r_1 * self.r_2)
        return series(_=mean(d_1 * d_2) / self.over, x=-rest * x, y=-rest * y, xy=-rest * xy)


def _deviation(mean, r, s):
    """r less its mean over the spectrum, for r + s = 1."""
    fitted = mean(s)[..., None]
    return namespace(r).where(fitted < 0.5, fitted - s, r - mean(r)[..., None])
