r"""The least-squares system of exact meta-training, and the adaptation rate that suits it.

For a split of a group into support and query rows, with the inner step of rate a on the support,

    y_v - X_v theta(omega) = r - Phi omega,
    Phi = X_v - a/n_t X_v X_t^T X_t,    r = y_v - a/n_t X_v X_t^T y_t.                    (1)

omega minimises the sum of |r - Phi omega|^2 over splits and groups plus ridge |omega|^2. Adaptation
at rate b to rows (X, y) of another group leaves, on its other rows, the residual

    e - b g,    e = y' - X' omega,    g = X' X^T (y - X omega) / n,                       (2)

so that the best rate is sum e.g / sum g.g.
"""

from typing import NamedTuple

import numpy as np

BLOCK = 4096  # rows of the system reduced at once
FOLDS = 5


class MetaSystem(NamedTuple):
    """The system (1) over splits of groups.

    features, y: all rows, (rows, p) and (rows, q).
    orders: the rows of a group in random order, for each of `repeats` splits of each group.
    rate: the raw inner rate.
    n_t, n_v: support and query rows; None: half of the rows, and the others.
    num_unpenalized: number of leading coefficients without a ridge.
    """

    features: np.ndarray
    y: np.ndarray
    orders: list[np.ndarray]
    repeats: int
    rate: float
    ridge: float
    n_t: int | None
    n_v: int | None
    num_unpenalized: int

    def minimizer(self) -> np.ndarray:
        """omega, (p, q)."""
        return self._solved([self._reduced(self.orders)])

    def with_best_adapt_rate(self, fold: np.ndarray, n_r: int | None) -> tuple[np.ndarray, float]:
        """omega, and the raw adaptation rate that is best for groups that did not train.

        Each fold of the groups is adapted from the omega of the other folds.

        fold: of the group of each order.
        n_r: rows to adapt on; None: n_t.
        """
        mine = [[o for o, f in zip(self.orders, fold, strict=True) if f == k]
                for k in range(int(fold.max()) + 1)]  # fmt: skip
        parts = [self._reduced(orders) for orders in mine]
        along = square = 0.0
        for k, orders in enumerate(mine):
            omega = self._solved(parts[:k] + parts[k + 1 :])
            for order in orders:
                e, g = self._adapted(order, omega, n_r)
                along, square = along + float(np.sum(e * g)), square + float(np.sum(g * g))
        # Without features nothing moves, and every rate is best.
        return self._solved(parts), along / square if square > 0 else 0.0

    def _adapted(self, order, omega, n_r):
        """e and g of equation (2), (rows, q) each."""
        n = n_r or self.n_t or len(order) // 2
        x, y = self.features[order], self.y[order]
        residual = y - x @ omega
        step = x[:n].T @ residual[:n] / n
        return residual[n:], x[n:] @ step

    def _reduced(self, orders) -> np.ndarray:
        """R of the QR decomposition of [Phi, r] / sqrt(repeats) over these splits."""
        p = self.features.shape[1]
        reduced: np.ndarray = np.zeros((0, p + self.y.shape[1]))
        pending: list[np.ndarray] = []
        for order in orders:
            n = self.n_t or len(order) // 2
            support, queries = self._rows(order[:n]), order[n:][: self.n_v]
            # With many rows p x p numbers are fewer than n_v x n_t.
            moments = support[:, :p].T @ support / n if n > p else None
            for start in range(0, len(queries), BLOCK):
                query = self._rows(queries[start : start + BLOCK])
                # Targets are the last columns, so one product serves Phi and r.
                if moments is None:
                    step = (query[:, :p] @ support[:, :p].T) @ support / n
                else:
                    step = query[:, :p] @ moments
                pending.append((query - self.rate * step) / np.sqrt(self.repeats))
                # Reduced block by block, so that memory does not grow with the number of splits.
                if sum(map(len, pending)) >= max(BLOCK, 2 * reduced.shape[1]):
                    reduced, pending = _triangle([reduced, *pending]), []
        return _triangle([reduced, *pending])

    def _rows(self, rows) -> np.ndarray:
        return np.hstack([self.features[rows], self.y[rows]])

    def _solved(self, parts: list[np.ndarray]) -> np.ndarray:
        system = _triangle(parts)
        return ridge_minimizer(system, self.ridge, self.y.shape[1], self.num_unpenalized)


def ridge_minimizer(system, ridge: float, targets: int, num_unpenalized: int) -> np.ndarray:
    """Solve least squares, of least norm, with the ridge on all but the unpenalized weights.

    system: [Phi, r] side by side, (rows, p + targets).
    """
    p = system.shape[1] - targets
    # Rows sqrt(ridge) below the system: normal equations would square its condition number.
    penalty = np.sqrt(ridge) * np.eye(p)[num_unpenalized:]
    left = np.vstack([system[:, :p], penalty])
    right = np.vstack([system[:, p:], np.zeros((len(penalty), targets))])
    return np.linalg.lstsq(left, right, rcond=None)[0]


def _triangle(parts: list[np.ndarray]) -> np.ndarray:
    return np.asarray(np.linalg.qr(np.vstack(parts), mode="r"))
