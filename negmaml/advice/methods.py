"""The methods that `advise` compares: their names, which are used everywhere, and their meaning."""

META, ZERO, SHARED = "meta-learning", "zero inner rate", "shared rate"
JOINT, POOLED, SINGLE, MIXED = "joint training", "pooled ridge", "per-group ridge", "mixed model"
RANKED = (POOLED, SINGLE, JOINT, MIXED, META)  # from the simplest: the candidates
METHODS = (*RANKED, ZERO, SHARED)


MEANINGS = {
    POOLED: "one ridge regression on the rows of all groups, which does not adapt to a new group",
    SINGLE: "a ridge regression on the rows of the new group only, which uses no other group",
    JOINT: "a ridge regression on the rows of all groups, then one gradient step on the rows of "
    "the new group",
    MIXED: "coefficients vary between groups around their mean, and those of a new group are "
    "predicted from its rows (a linear mixed model, best linear unbiased prediction)",
    META: "starting coefficients from which a gradient step on some rows of each training group "
    "predicts its other rows best, then one gradient step on the rows of the new group",
    ZERO: "meta-learning with training rate 0",
    SHARED: "meta-learning with one positive rate for training and adaptation, the usual choice",
}


def with_article(method: str) -> str:
    """The name of a method in a sentence.

    >>> with_article("mixed model"), with_article("joint training")
    ('a mixed model', 'joint training')
    """
    return method if method in (JOINT, META) else f"a {method}"
