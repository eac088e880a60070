"""The result of `fit`."""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from negmaml._core.deprecation import renamed_attribute
from negmaml._core.display import Table, add_table_repr, shape_text, tree_text
from negmaml.training.nonfinite import SkipState

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@add_table_repr
class FitResult(NamedTuple):
    """The trained parameters, and the history of the run.

    Attributes:
        params: parameters after `step` updates; those of the last step with a finite loss if
            `finite` is False, and those of the best evaluation with `patience`.
        optimizer_state: the state of the optimizer at the last step. With `patience`, `params` may
            be those of an earlier one; if `finite` is False, it is a first state at `params`.
        loss: value at the parameters before each step, shape (steps,); NaN for steps not taken.
        aux: auxiliary output of each step, stacked; None when the loss has none.
        evaluation: result of `evaluate` after each `evaluate_every` steps, stacked; None without
            `evaluate`.
        step: number of updates in `params`, including those of a `state` the run started from.
        finite: whether all losses and updates were finite.
        stopped_early: whether `patience` or a callback ended the run before its last step.
        unconverged: fraction of tasks at each step whose inner problem was not solved, shape
            (steps,); None where no rule solves one, or for a function of your own.
        skips: the counts of batches that were skipped as not finite, and the scale of a loss with
            `LossScale`, at the end of the run; None with nonfinite="stop".
        first_step: number of steps before this call, in a run that continued from a `state`.
        evaluated: number of the step after which each evaluation was computed; None without.

    >>> import jax, jax.numpy as jnp, negmaml as nm, optax
    >>> square = lambda w, target: (w - target) ** 2 / 2
    >>> tasks = nm.Tasks(jnp.array([0.0, 2.0]), jnp.array([0.0, 2.0]))
    >>> algorithm = nm.maml_value_and_grad(square, nm.GradientDescent(0.5))
    >>> result = nm.fit(jax.random.key(0), 3.0, algorithm, tasks, optax.sgd(1.0), 20)
    >>> round(float(result.params), 2), result.loss.shape, bool(result.finite)
    (1.01, (20,), True)
    """

    params: Any
    optimizer_state: Any
    loss: Any
    aux: Any
    evaluation: Any
    step: Any
    finite: Any
    stopped_early: Any
    unconverged: Any = None
    skips: SkipState | None = None
    first_step: Any = 0
    evaluated: Any = None

    @property
    def skipped(self) -> Any:
        """Number of batches whose update was skipped; those of an earlier `state` are included."""
        return 0 if self.skips is None else self.skips.skipped

    def plot(self) -> "Figure":
        """Draw the loss of each step, its running mean, and the evaluations.

        A run that was vmapped has one line for each run. Values that are not finite leave gaps,
        and a mark on the axis of the steps shows where a step was not finite.

        Returns a matplotlib Figure, with a panel for the loss and for each number of the
        evaluations. Needs matplotlib: pip install "negmaml[figures]".
        """
        from negmaml.training.figures import draw_fit

        return draw_fit(self)

    def _summary(self) -> Table:
        if any(isinstance(x, jax.core.Tracer) for x in (self.loss, self.step, self.finite)):
            return Table("FitResult, traced", [("loss", shape_text(self.loss))])
        losses = np.asarray(self.loss, float)
        # Steps that some run of a batch has taken.
        taken = losses[..., np.isfinite(losses).reshape(-1, losses.shape[-1]).any(0)]
        ending = "" if np.all(self.finite) else ", not all finite"
        ending += ", stopped early" if np.any(self.stopped_early) else ""
        # Under vmap the runs of a batch may have stopped after different steps.
        steps = sorted({int(s) for s in np.ravel(self.step)})
        updates = " to ".join(str(s) for s in dict.fromkeys((steps[0], steps[-1])))
        rows = [
            ("params", tree_text(self.params)),
            ("updates", updates + ending),
            ("loss", f"{shape_text(self.loss)}, {_tail_text(taken)}"),
        ]
        # Shapes only: an auxiliary output may be large.
        for name in ("aux", "evaluation"):
            value = getattr(self, name)
            if value is not None:
                rows.append((name, tree_text(value)))
        if self.unconverged is not None and np.nansum(self.unconverged):
            fraction = np.nanmean(self.unconverged)
            rows.append(("not converged", f"{fraction:.2%} of the inner problems"))
        if np.any(self.skipped):
            rows.append(("skipped", f"{int(np.sum(self.skipped))} batches that were not finite"))
        return Table("FitResult", rows)


FitResult.stopped = renamed_attribute(  # type: ignore[attr-defined]
    "FitResult.stopped", "stopped_early"
)


def _tail_text(losses) -> str:
    """Return the mean loss of the last tenth of the steps, and its range over a batch of runs.

    There is no standard error, since the steps of a run are not independent of each other.
    """
    if not losses.size:
        return "none finite"
    # A single loss is of few tasks and varies; a tenth of the run averages over that.
    count = max(losses.shape[-1] // 10, 1)
    rows = losses[..., -count:].reshape(-1, count)
    means = [row[np.isfinite(row)].mean() for row in rows if np.isfinite(row).any()]
    over_runs = f"{min(means):.4g} to {max(means):.4g} over {len(rows)} runs"
    return f"mean of the last {count} steps {f'{means[0]:.4g}' if len(rows) == 1 else over_runs}"
