"""Text report of an `Advice`."""

import numpy as np

from negmaml._core.display import printable

NAMES = {
    "advised": "best rates",
    "zero inner rate": "zero training rate, then adapting",
    "shared rate": "one positive rate for both (the usual choice)",
    "joint training": "pooled ridge on all rows, then adapting",
    "pooled ridge": "pooled ridge, not adapted",
    "per-group ridge": "ridge on the new group's rows only",
    "mixed model": "linear mixed model (best linear unbiased)",
}


def text(advice, theory: bool) -> str:
    """Return one page: the advised rates, their gains, and how they were computed."""
    parts = [_use(advice), _verdict(advice), _table(advice)]
    parts += [_theory(advice)] if theory else []
    return printable("\n\n".join([*parts, _conditions(advice)])) + "\n"


def _theory(advice) -> str:
    """Predicted losses, their difference from the measured ones, and gains at other sizes."""
    theory, best = advice.theory, advice.best
    measured, error = (a[best.rate, best.ridge] for a in (advice.curves.loss, advice.curves.error))
    rates, gap = advice.grid.rates / advice.unit_size, abs(theory.gap)
    lines = [
        f"Theory, from the moments of these groups: loss {theory.loss[best.rate]:.4g} at the best "
        f"rates (measured {measured:.4g} +- {error:.2g}), lowest at training rate "
        f"{rates[np.nanargmin(theory.loss)]:.3g}; over all rates its error is "
        f"{np.nanmedian(gap):.1%} (median) and {np.nanmax(gap):.1%} (largest)."
    ]
    # Other sizes cannot be checked here, so a prediction for them needs agreement at this size.
    if theory.agrees:
        gains = [f"{change} {gain:+.1%}" for change, gain in theory.gains.items()]
        lines.append(f"It predicts that the loss would fall by: {', '.join(gains)}.")
    else:
        lines.append("It disagrees with the data, so it is not used to predict other sizes.")
    return "\n".join(lines)


def _use(advice) -> str:
    """The advised rates and ridge."""
    unit = f" ({advice.unit_size:.4g} in raw units each)" if advice.unit == "scaled" else ""
    low, high = advice.train_rate_interval
    lines = [
        f"Use training rate {advice.train_rate:.3g}, adaptation rate {advice.adapt_rate:.3g}"
        f"{unit}, meta-ridge {advice.meta_ridge:.3g}.",
        f"The best training rate lies between {low:.2g} and {high:.2g} (95%).",
    ]
    rates = advice.grid.rates / advice.unit_size
    # The loss may fall further beyond an end of the axis.
    if advice.best.rate in (0, len(rates) - 1):
        lines.append(
            f"It is at the end of the rates tried, {rates[advice.best.rate]:.3g}; widen them."
        )
    return "\n".join(lines)


def _verdict(advice) -> str:
    """One sentence for each comparison."""
    zero, pooled, lines = advice.gain["zero inner rate"], advice.gain["pooled ridge"], []
    if not pooled.significantly_better:
        lines.append("Adapting has no significant gain: a pooled ridge does as well.")
    if not advice.significantly_better:
        lines.append(
            "No significant gain over a zero training rate: the best rate found is "
            f"{advice.grid.rates[advice.best.rate] / advice.unit_size:.3g}, with a gain of "
            f"{_percent(zero)}. A zero rate is the simpler choice."
        )
    for name, gain in advice.gain.items():
        # The lines above have reported this comparison.
        if name == "zero inner rate" and not advice.significantly_better:
            continue
        other = NAMES[name].split(" (")[0]
        if gain.significantly_better:
            lines.append(f"Better than {other} by {_percent(gain)}.")
        elif gain.significant:
            lines.append(f"Worse than {other} by {_percent(gain, -1)}: prefer that method.")
        else:
            lines.append(f"No significant difference from {other}: {_percent(gain)}.")
    return "\n".join(lines)


def _percent(gain, sign: int = 1) -> str:
    # `relative` is the value over the baseline's loss, which scales the ends of the interval.
    baseline = gain.value / gain.relative if gain.relative else 1.0
    # A change of sign swaps the ends.
    low, high = sorted((sign * gain.low / baseline, sign * gain.high / baseline))
    return f"{sign * gain.relative:.1%} of its loss ({low:.1%} to {high:.1%})"


def _table(advice) -> str:
    rows = [("method", "loss", "gain of the best rates", "95% interval")]
    for name, loss in advice.loss.items():
        # The advised rates have no gain over themselves.
        gain = advice.gain.get(name)
        more = ("", "") if gain is None else (
            f"{gain.value:.4g} +- {gain.error:.2g}", f"{gain.low:.3g} to {gain.high:.3g}",
        )  # fmt: skip
        rows.append((NAMES[name], f"{loss:.5g}", *more))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _conditions(advice) -> str:
    """The meaning of the loss, the sizes, and the notes on dropped data."""
    sizes, data = advice.sizes, advice.data
    lines = [
        "Loss: half the mean squared error on the rows of a held-out group that it did not adapt "
        "on. The table has losses on groups that did not choose rates or ridges; each method "
        "uses its own.",
        f"{data.groups} groups, {len(data.x)} rows, {data.x.shape[1]} coefficients; m = {sizes.m} "
        f"groups train, n_t = {sizes.n_t}, n_v = {sizes.n_v}, n_r = {sizes.n_r}.",
        "Features and targets were standardised."
        if data.scales[3].tolist() != [1.0] * len(data.scales[3])
        else "Features and targets were used as they are, not standardised.",
    ]
    if advice.unit == "scaled":
        lines.append(
            "Rates are in units of 1 over the largest eigenvalue of the features' moments."
        )
    return "\n".join([*lines, *(note[0].upper() + note[1:] + "." for note in advice.notes)])
