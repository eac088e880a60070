"""One interface to the solvers: means and covariances of meta-trained weights and their losses.

`theory_model` is the only place where the theory asks whether a problem is isotropic. Predictions,
standard deviations and optima are written once, on the `TheoryModel` that it returns. Two solvers
stay behind it. The isotropic one has exact moments at finite size and is 30 times faster; the
anisotropic one takes any covariance, and outer losses on the training points.
"""

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

from negmaml._core.checks import check_choice
from negmaml.problem.model import SPLITS, MixedLinearRegression
from negmaml.rules import InnerRule
from negmaml.theory import theorems
from negmaml.theory.anisotropic.inputs import with_identity_covariance
from negmaml.theory.anisotropic.model import AnisotropicModel
from negmaml.theory.isotropic.inputs import is_zero
from negmaml.theory.isotropic.model import IsotropicMeans, IsotropicModel
from negmaml.theory.isotropic.spectral_density import MEASURES
from negmaml.theory.isotropic.variance import Covariance

METHODS = ("proportional", "expansion")


@runtime_checkable
class MeanModel(Protocol):
    """The means of a problem with a ridge: what every method can predict.

    Shapes: those of `train`, followed by that of `adapt` where it is an argument.
    """

    def require_finite_mean(self) -> None:
        """Raise ValueError where every mean is infinite."""

    def weight_error(self, train: InnerRule) -> Any:
        """Return E|omega* - w0|^2."""

    def test_loss(self, train: InnerRule, adapt: InnerRule) -> Any:
        """Return the expected test loss after adaptation."""

    def best_adapt_step(self, train: InnerRule) -> Any:
        """Return the rate of the best gradient step at test time, of the training rule's shape."""

    def adaptation_objective(self, train: InnerRule, adapt: InnerRule) -> tuple[Any, InnerRule]:
        """Return the test loss as an objective of the rule at test time, and that rule."""


@runtime_checkable
class TheoryModel(MeanModel, Protocol):
    """Means and covariances of a problem with a ridge, by the proportional theory.

    A model holds the user's problem and ridge as they are. Entry points check their arguments.
    """

    num_exact_sizes: ClassVar[int]

    def at_spectrum(self, n_t: int, measure: str) -> "TheoryModel":
        """Return the model with the spectrum of another n_t, where that depends on it."""

    def train_task_error(self, train: InnerRule) -> Any:
        """Return tau^2, the mean squared error on fresh query rows of a training task."""

    def loss_terms(self, train: InnerRule, adapt: InnerRule) -> tuple[Any, Any, Any]:
        """Return the test loss of w0 itself, of omega*, and of omega* to leading order."""

    def deviations(self, train: InnerRule, adapt: InnerRule) -> tuple[Any, Any]:
        """Return the standard deviations of |omega* - w0|^2 and of the expected test loss."""

    def loss_covariance(
        self, train_a: InnerRule, train_b: InnerRule, adapt: InnerRule | None
    ) -> tuple[Covariance, Covariance, Covariance]:
        """Return the covariances of the losses of a, b, and a with b, up to a common factor."""

    def train_objective(self, train: InnerRule, adapt: InnerRule | None) -> tuple[Any, InnerRule]:
        """Return the test loss as an objective of the training rule, and that rule.

        adapt: the rule at test time, or None for the best gradient step.
        """


@dataclasses.dataclass(frozen=True)
class ExpansionModel(IsotropicMeans):
    """An isotropic problem without ridge, by Theorem 1 or 2.

    It has means only, for one gradient step; see `negmaml.theory.theorems`. Neither theorem is
    valid at p = n_v m.
    """

    def weight_error(self, train: InnerRule):
        """Return E|omega* - w0|^2, of the rule's shape."""
        return theorems.weight_error(self.problem, train)


def theory_model(
    problem: MixedLinearRegression,
    meta_ridge: Any = 0.0,
    *,
    measure: str = "auto",
    split: str = "train-validation",
) -> TheoryModel:
    """Return the model of a problem with a ridge by the proportional theory.

    Arguments as in `negmaml.theory.test_loss`. Raises ValueError for an unknown `measure` or
    `split`, and for a `measure` where the spectrum follows from the covariance.
    """
    model = mean_model(problem, meta_ridge, "proportional", measure, split)
    return model  # type: ignore[return-value]


def mean_model(
    problem: MixedLinearRegression, meta_ridge: Any, method: str, measure: str, split: str
) -> MeanModel:
    """Return the model of a problem by a method: "proportional" or "expansion"."""
    check_choice("split", split, SPLITS)
    check_choice("method", method, METHODS)
    check_choice("measure", measure, MEASURES)
    # Rows of a train-train loss are no longer independent of S, so that even isotropic inputs need
    # the pencil of the anisotropic solver.
    train_train = split == "train-train"
    if train_train or not problem.isotropic:
        _require_defaults(method, measure, split)
        return AnisotropicModel(with_identity_covariance(problem), meta_ridge, train_train)
    if method == "expansion":
        # The theorems expand without ridge, and there is no formula to fall back on.
        if not is_zero(meta_ridge):
            raise ValueError(
                f"meta_ridge must be 0 for method='expansion', got {meta_ridge!r}; "
                "use method='proportional'"
            )
        return ExpansionModel(problem)
    return IsotropicModel(problem, meta_ridge, measure)


def _require_defaults(method: str, measure: str, split: str) -> None:
    """Raise for options that only isotropic problems with a split have."""
    case = "a problem with covariances" if split == "train-validation" else f"split={split!r}"
    if method != "proportional":
        raise ValueError(
            f"method must be 'proportional' for {case}, got {method!r}; "
            "theory.general_inputs has the expansion for covariances and p > n_v m"
        )
    # The anisotropic solver derives the spectrum of S itself, so that no choice is left.
    if measure != "auto":
        raise ValueError(
            f"measure must be 'auto' for {case}, got {measure!r}: the spectrum of S follows from "
            "the covariance"
        )
