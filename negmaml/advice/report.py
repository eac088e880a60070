"""Report of an `Advice`: the decision first, then the rates, all methods, and the conditions."""

import numpy as np

from negmaml._core.display import printable
from negmaml.advice.document import Grid, Section, render
from negmaml.advice.methods import (
    JOINT,
    MEANINGS,
    META,
    MIXED,
    POOLED,
    RANKED,
    SHARED,
    SINGLE,
    ZERO,
    with_article,
)

GLOSSARY = {
    "group": "rows that belong together, for example the pupils of a school",
    "adapt": "use some rows of a new group to predict its other rows",
    "RMSE": "root mean squared error, the typical size of an error, in units of the target",
    "explained variance": "1 minus the mean squared error over the variance of the target; 100% is "
    "a perfect prediction, 0% is as good as predicting the mean",
    "gain": "how much lower the RMSE of the recommended method is, on the same groups",
    "95% interval": "it contains the mean gain over new groups, and over training groups, in about "
    "95 of 100 data sets; it includes the choice of rates and ridges",
    "ridge": "a penalty on squared coefficients, which shrinks them; 0 is least squares. The "
    "intercept has no penalty",
    "gradient step": "a change of the coefficients against the slope of the squared error on a "
    "group's rows, of a size that is called the rate",
    "training rate": "rate of the step on n_t rows of each training group, after which its n_v "
    "other rows measure the error; it may be negative",
    "adaptation rate": "rate of the step on the n_r rows of a new group",
}
STRUCTURE_WORDS = {
    "intercept": "a random intercept, and slopes that are common to all groups",
    "equal": "a random intercept and random slopes of equal variances",
    "full": "a random intercept and random slopes",
}


def report(advice, theory: bool, form: str) -> str:
    """Return the report as text, Markdown or HTML."""
    sections = [
        Section("", [_decision(advice), _accuracy(advice), _certainty(advice)]),
        Section("Rates", _rates(advice)),
        Section("All methods", [_table(advice), _table_note(advice)]),
        Section("More data", [*_more(advice), *(_theory(advice) if theory else [])]),
        Section("Data", _data(advice)),
        Section("Terms", [_terms(advice)]),
    ]
    return printable(render(f"Advice for {advice.data.groups} groups", sections, form))


def _decision(advice) -> str:
    best = advice.recommended
    start = "No method is better than a pooled ridge. " if best == POOLED else ""
    return f"{start}Use {with_article(best)}: {MEANINGS[best]}."


def _accuracy(advice) -> str:
    """The accuracy of the recommended method, and its gain over the usual choices."""
    best = advice.recommended
    text = (
        f"On new groups it predicts {advice.target} with an RMSE of {_number(advice.rmse[best], 4)}"
        f"{_unit(advice)} and explains {_percent(advice.explained_variance[best])} of the variance."
    )
    for name, usual in ((POOLED, ", the usual choice that ignores groups,"), (SINGLE, "")):
        if name != best:
            gain = advice.rmse_gain[name]
            text += (
                f" {with_article(name).capitalize()}{usual} has {_number(advice.rmse[name], 4)}: "
                f"{_more_or_less(gain)}."
            )
    return text


def _more_or_less(gain) -> str:
    """The difference of another method's RMSE from that of the recommended one."""
    if gain.value >= 0:
        return f"{_number(gain.value, 3)} more (95% interval {_interval(gain.low, gain.high)})"
    return f"{_number(-gain.value, 3)} less (95% interval {_interval(-gain.high, -gain.low)})"


def _number(value: float, digits: int) -> str:
    """A number in this many significant digits; from 1 to 1e7 without an exponent, as in 236."""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e7 else text


def _interval(low: float, high: float) -> str:
    return f"{_number(low, 2)} to {_number(high, 2)}"


def _percent(fraction: float) -> str:
    """A percentage, which is 100% only if it is exactly that."""
    return next(
        (text for text in (f"{fraction:.0%}", f"{fraction:.1%}") if float(text[:-1]) < 100),
        "100%" if fraction == 1 else "more than 99.9%",
    )


def _certainty(advice) -> str:
    """How sure the decision is."""
    best, others = (
        advice.recommended,
        [n for n in RANKED if n in advice.gain and n != advice.recommended],
    )
    worse = [n for n in others if advice.gain[n].significantly_better]
    better = [n for n in others if advice.gain[n].high < 0]
    same = [n for n in others if n not in worse and n not in better]
    parts = []
    if POOLED in same:
        parts.append(
            "Its gain over a pooled ridge is not significant: with so few data a pooled ridge may "
            "do as well."
        )
    if worse:
        parts.append(f"It is significantly better than {_list(worse)}.")
    if same:
        parts.append(f"It does not differ significantly from {_list(same)}.")
    if better:
        least = min(advice.loss[n] for n in better)
        parts.append(
            f"It is simpler than {_list(better)}, whose mean squared error is lower by "
            f"{1 - least / advice.loss[best]:.1%} only."
        )
    return " ".join(parts)


def _list(names) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _unit(advice) -> str:
    """The unit of the RMSE, where it is not that of the target."""
    return " standard deviations" if advice.target_scale is None else ""


def _settings(advice) -> str:
    """The settings of the recommended method, as `Advice.model` uses them."""
    best, settings = advice.recommended, advice.settings()
    words = {"ridge": "ridge", "adapt_rate": "adaptation rate", "train_rate": "training rate",
             "meta_ridge": "ridge"}  # fmt: skip
    if best == MIXED:
        with_what = STRUCTURE_WORDS[settings["structure"]]
    else:
        with_what = _list([f"{words[name]} {value:.3g}" for name, value in settings.items()])
    needs = "" if best in (JOINT, META) else " It needs no rates."
    return f"`advice.model()` fits {with_article(best)} with {with_what}.{needs}"


def _rates(advice) -> list[str]:
    low, high = advice.train_rate_interval
    unit = f" (rates in units of {advice.unit_size:.4g})" if advice.unit == "scaled" else ""
    # The rate of least loss is not taken where zero is as good: its interval may leave out zero.
    why = ", since no other is significantly better" if advice.train_rate == 0 else ""
    lines = [
        _settings(advice),
        f"Meta-learning takes training rate {advice.train_rate:.3g}{why}. Its adaptation rate is "
        f"{advice.adapt_rate:.3g}, and its ridge {advice.meta_ridge:.3g}{unit}. The training rate "
        f"of least loss lies between {low:.2g} and {high:.2g} (95%). "
        f"{_meaning_of_rate(advice.train_rate)}",
        " ".join(_against(advice, name) for name in (ZERO, SHARED) if name in advice.loss),
    ]
    rates = advice.grid.rates / advice.unit_size
    # The loss may fall further beyond an end of the axis.
    if advice.best.rate in (0, len(rates) - 1):
        lines.append(
            f"The best rate is at the end of the rates tried, {rates[advice.best.rate]:.3g}; widen "
            "them."
        )
    return lines


def _meaning_of_rate(rate: float) -> str:
    if rate == 0:
        return (
            "A training rate of zero means that training groups take no step: the starting "
            "coefficients are those of a ridge regression."
        )
    if rate < 0:
        return (
            "A negative training rate means that training groups step away from their own rows "
            "while the starting coefficients are learned; new groups still step towards theirs."
        )
    return (
        "A positive training rate means that training groups step towards their own rows while the "
        "starting coefficients are learned, as new groups do."
    )


def _against(advice, name: str) -> str:
    """Meta-learning with any rates against a restricted choice of rates."""
    gain = advice.compare(META, name)
    article = with_article(name)
    if not gain.significant:
        return f"Free rates do not differ significantly from {article}."
    word = "lower" if gain.value > 0 else "higher"
    return f"Free rates have a mean squared error {abs(gain.relative):.1%} {word} than {article}."


def _table(advice) -> Grid:
    """All methods, from the least error."""
    rows = []
    for name in sorted(advice.loss, key=advice.loss.__getitem__):
        gain = advice.rmse_gain[name]
        more = ("recommended", "") if name == advice.recommended else (
            _number(gain.value, 3), _interval(gain.low, gain.high),
        )  # fmt: skip
        explained = f"{advice.explained_variance[name]:.1%}"
        rows.append((name, _number(advice.rmse[name], 4), explained, *more))
    return Grid(("method", "RMSE", "explained variance", "gain", "95% interval"), rows)


def _table_note(advice) -> str:
    return (
        f"RMSE of {advice.target} on rows of held-out groups that they did not adapt on. These "
        "groups chose no rates and no ridges; each method uses its own. The decision is the "
        "simplest of the candidates whose squared error exceeds the least by 0.5% or less; from "
        f"the simplest, they are {_list([name for name in RANKED if name in advice.loss])}."
    )


def _more(advice) -> list[str]:
    costs = advice.cost_of_less
    if not costs:
        return []
    changes = [f"{change} {cost:+.1%}" for change, cost in costs.items()]
    return [
        f"With half of the data, the mean squared error of {with_article(advice.recommended)} "
        f"changes by: {'; '.join(changes)}. Where it rises, twice the data would lower it, by "
        "about half as much if the excess error falls as 1 over the size."
    ]


def _standardised(advice) -> bool:
    return bool(np.any(advice.data.scales[3] != 1))


def _theory(advice) -> list[str]:
    """Predicted losses, their difference from the measured ones, and gains at other sizes."""
    theory, best = advice.theory, advice.best
    measured, error = (a[best.rate, best.ridge] for a in (advice.curves.loss, advice.curves.error))
    rates, gap = advice.grid.rates / advice.unit_size, abs(theory.gap)
    lines = [
        "Theory of meta-learning, from the moments of these groups: loss (half the mean squared "
        f"error{' of the standardised target' * _standardised(advice)}) "
        f"{theory.loss[best.rate]:.4g} at the best rates (measured {measured:.4g} +- "
        f"{error:.2g}), lowest at training rate {rates[np.nanargmin(theory.loss)]:.3g}; "
        f"over all rates its error is {np.nanmedian(gap):.1%} (median) and {np.nanmax(gap):.1%} "
        "(largest)."
    ]
    # Other sizes cannot be checked here, so a prediction for them needs agreement at this size.
    if theory.agrees:
        gains = [f"{change} {gain:+.1%}" for change, gain in theory.gains.items()]
        lines.append(f"It predicts that the loss would fall by: {', '.join(gains)}.")
    else:
        lines.append("It disagrees with the data, so it is not used to predict other sizes.")
    return lines


def _data(advice) -> list[str]:
    """The sizes, and the notes on dropped and encoded data."""
    sizes, data = advice.sizes, advice.data
    lines = [
        f"{data.groups} groups, {len(data.x)} rows, {data.x.shape[1]} coefficients. In each split "
        f"m = {sizes.m} groups train with n_t = {sizes.n_t} and n_v = {sizes.n_v} rows; held-out "
        f"groups adapt on n_r = {sizes.n_r} rows.",
        "Features and targets were standardised."
        if _standardised(advice)
        else "Features and targets were used as they are, not standardised.",
    ]
    return [" ".join(lines), *(note[0].upper() + note[1:] + "." for note in advice.notes)]


def _terms(advice) -> dict[str, str]:
    """The glossary: all methods of the table, and the terms of the report."""
    methods = {name: meaning for name, meaning in MEANINGS.items() if name in advice.loss}
    unit = {}
    if advice.unit == "scaled":
        unit["unit of a rate"] = (
            f"{advice.unit_size:.4g}, 1 over the largest eigenvalue of the second moments of the "
            "features; in the direction of that eigenvalue a step of rate 1 removes the error"
        )
    return methods | GLOSSARY | unit
