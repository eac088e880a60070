"""Draw the picture of MAML, and that of the effect of a negative training rate in one dimension.

    python benchmarks/figures.py maml negative_rate

`negative_rate`, left: the loss of meta-training on one query row of input 1 whose label is one
standard deviation too high. The task has one weight, and support rows with S = 1:

    L(omega) = (Phi (omega - w0) - e)^2 / 2      Phi = 1 - alpha_t
    e^2 = sigma^2 (1 + alpha_t^2/n_t)

so noise moves its minimum by e/Phi. Right: the same for p weights (Theorem 1): the noise of the
residuals r, the mean square h_t of the factor on omega, and their quotient, to which the weight
error from noise is proportional.
"""

import numpy as np

import negmaml as nm
from negmaml._core import plotting
from negmaml._core.plotting import INK, NEGATIVE, POSITIVE, SERIES, number

SHOWN_RATES, N_T_ONE = (-0.5, 0.0, 0.5), 10
P, N_T = 60, 30
WEIGHTS, RATES = np.linspace(-1.0, 4.0, 201), np.linspace(-3, 2, 201)


def negative_rate_numbers() -> dict[str, np.ndarray]:
    """The numbers in the picture of the effect of a negative rate."""
    rates = np.array(SHOWN_RATES)[:, None]
    noise = np.sqrt(1 + rates**2 / N_T_ONE)  # in units of sigma
    factor = np.asarray(nm.theory.shrinkage(RATES, n=N_T, p=P))
    residual = 1 + RATES**2 * P / N_T
    return {
        "shown_rates": rates[:, 0],
        "weights": WEIGHTS,
        "losses": ((1 - rates) * WEIGHTS - noise) ** 2 / 2,
        "minima": (noise / (1 - rates))[:, 0],
        "rates": RATES,
        "factor": factor,
        "residual": residual,
        "quotient": residual / factor,
        "stationary": np.array(nm.theory.stationary_train_rates(p=P, n_t=N_T), float),
    }


def negative_rate(values):
    """Draw both panels from `negative_rate_numbers`; returns a matplotlib Figure."""
    with plotting.style():
        figure, axes = plotting.panels(1, 2, 4.0)
        _draw_losses(axes[0, 0], values)
        _draw_quotient(axes[0, 1], values)
        plotting.share_legend(figure, 4)
    return figure


def _draw_losses(axis, values) -> None:
    moves = []
    for rate, loss, least in zip(
        values["shown_rates"], values["losses"], values["minima"], strict=True
    ):
        color = plotting.sign_color(rate)
        axis.plot(values["weights"], loss, color=color, label=rf"$\alpha_t$ = {number(rate)}")
        axis.plot(least, 0, "o", color=color, ms=6, clip_on=False, zorder=3)
        moves.append(f"{number(least, '.2f')} at {number(rate)}")
    axis.plot([], [], "o", color=INK, ms=6, label="minimum")
    axis.axvline(0, color=INK, ls=":", lw=1, label="minimum without noise")
    axis.set(ylim=(0, 2), xlim=values["weights"][[0, -1]])
    axis.set_xlabel(r"weight $(\omega-w_0)/\sigma$")
    axis.set_ylabel(r"loss of meta-training$/\sigma^2$")
    plotting.set_finding(axis, f"Noise moves the minimum by\n{', '.join(moves)}")


def _draw_quotient(axis, values) -> None:
    rates, (best, worst) = values["rates"], values["stationary"]
    axis.plot(rates, values["factor"], color=SERIES[2], ls="--", label=r"$h_t$, factor on $\omega$")
    axis.plot(rates, values["residual"], color=SERIES[1], ls="-.", label="noise of residuals")
    axis.plot(rates, values["quotient"], color=SERIES[0], label="quotient: error from noise")
    for rate, color, label in ((best, NEGATIVE, "least"), (worst, POSITIVE, "largest")):
        height = np.interp(rate, rates, values["quotient"])
        axis.plot(rate, height, "D", color=color, ms=7, zorder=3, label=f"{label} error")
    axis.set(yscale="log", xlim=rates[[0, -1]], xlabel=r"training rate $\alpha_t$")
    axis.set_ylabel("in units of those at rate 0")
    plotting.set_finding(
        axis, f"The error from noise is least at {number(best, '.2f')},\nlargest at {worst:.2f}"
    )


TOP, BOTTOM = 66, 14  # heights of both rows of boxes, in percent of the picture
HALF = 9  # half the height of a box
STEP = "#e3f3ee"  # background of inner steps


def maml():
    """Draw meta-training above and the test below; returns a matplotlib Figure."""
    with plotting.style():
        figure, axes = plotting.panels(1, 1, 3.9, layout=None)
        axis = axes[0, 0]
        axis.set_position((0, 0, 1, 1))
        axis.set(xlim=(0, 100), ylim=(0, 100))
        axis.set_axis_off()
        axis.text(2, 95, "Meta-training: mean over m tasks, repeated", va="center", weight="bold")
        _row(
            axis, TOP, r"weights $\omega$", "step of gradient descent\n" + r"at rate $\alpha_t$",
            "mean loss of\nadapted weights", r"$n_t$ support rows of a task",
            r"its $n_v$ query rows",
        )  # fmt: skip
        _feed_back(axis, "outer step: gradient through the inner step")
        axis.text(2, 40, "Test: a new task", va="center", weight="bold")
        _row(
            axis, BOTTOM, r"trained weights $\omega$",
            "step of gradient descent\n" + r"at rate $\alpha_r$", "prediction",
            r"$n_r$ support rows", "its other rows",
        )  # fmt: skip
    return figure


def _row(axis, y: float, start: str, step: str, end: str, support: str, query: str) -> None:
    """Draw boxes of weights, of a step on support rows, and of a loss or prediction."""
    _box(axis, 2, 22, y, start)
    _box(axis, 36, 64, y, step, STEP)
    _box(axis, 78, 98, y, end)
    _arrow(axis, (22, y), (36, y))
    _arrow(axis, (64, y), (78, y))
    for x, text in ((50, support), (88, query)):
        axis.text(x, y + HALF + 12, text, ha="center", va="center")
        _arrow(axis, (x, y + HALF + 9), (x, y + HALF))


def _box(axis, left: float, right: float, y: float, text: str, color: str = "white") -> None:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=2"
    corner, width, height = (left, y - HALF), right - left, 2 * HALF
    axis.add_patch(FancyBboxPatch(corner, width, height, style, fc=color, ec=INK, lw=1.2))
    axis.text((left + right) / 2, y, text, ha="center", va="center")


def _arrow(axis, start, end) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, arrowprops=style)


def _feed_back(axis, text: str) -> None:
    """Draw the arrow from the loss back to the weights, below the first row."""
    low = TOP - HALF - 9
    axis.plot([88, 88, 12], [TOP - HALF, low, low], color=INK, lw=1.2)
    _arrow(axis, (12, low), (12, TOP - HALF))
    axis.text(50, low + 3.5, text, ha="center", va="center")
