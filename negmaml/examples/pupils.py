"""A small untidy file of pupils in schools, made for the notebook `pupils_in_schools`.

    python -m negmaml.examples.pupils       writes pupils.csv, the file that the package has

The scores are simulated: how much earlier results and hours of practice count differs from school
to school. The file has the faults of real ones: a line above the header, decimal commas, numbers
that are texts, labels in several spellings, codes with leading zeros, missing values, an
identifier, a column that is constant, a school of two pupils, and a row of totals.
"""

from pathlib import Path

import numpy as np
import pandas as pd

FILE = Path(__file__).parent / "notebooks" / "pupils.csv"
SCHOOLS, SEED = 55, 2020
MEALS = {True: ("yes", "Yes", "yes "), False: ("no", "No", "no")}


def pupils(schools: int, seed: int, first: int = 1) -> pd.DataFrame:
    """Return tidy rows of pupils, with schools numbered from `first`."""
    random = np.random.default_rng(seed)
    counts = random.integers(10, 27, schools)
    school = np.repeat(np.arange(schools), counts)
    level, slope, practice = random.normal(size=(3, schools))
    earlier, hours = random.normal(size=len(school)), random.gamma(4.0, 1.0, len(school))
    meals, track = random.random(len(school)) < 0.3, random.integers(1, 4, len(school))
    score = 50 + 2.5 * level[school] - 3 * meals + (track == 3) * 2
    score = score + (5 + 3.5 * slope[school]) * earlier + (1 + practice[school]) * (hours - 4)
    return pd.DataFrame(
        {
            "school": [f"{first + i:03}" for i in school],
            "track": [f"{t:02}" for t in track],
            "free_meals": meals,
            "earlier": 100 + 15 * earlier,
            "hours": hours,
            "attendance": random.integers(80, 101, len(school)),
            "tested_on": np.datetime64("2024-05-02") + random.integers(0, 20, len(school)),
            "score": score + 4 * random.normal(size=len(school)),
        }
    )


def untidy(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return the rows as texts, as a program of a school office exports them."""
    random = np.random.default_rng(seed)
    count = len(rows)
    texts = pd.DataFrame(
        {
            "pupil_id": random.permutation(np.arange(10_000, 90_000))[:count].astype(str),
            "school": rows["school"],
            "year": "2024",
            "track": rows["track"],
            "free_meals": [MEALS[bool(m)][random.integers(3)] for m in rows["free_meals"]],
            "earlier": [_decimal(value, 1) for value in rows["earlier"]],
            "hours": [_decimal(value, 2) for value in rows["hours"]],
            "attendance": [f"{value}%" for value in rows["attendance"]],
            "tested_on": rows["tested_on"].dt.strftime("%d.%m.%Y"),
            "score": [_decimal(value, 1) for value in rows["score"]],
        }
    )
    texts.loc[random.random(count) < 0.05, "hours"] = ""
    texts.loc[random.random(count) < 0.02, "hours"] = "k.A."  # German: not stated
    texts.loc[random.random(count) < 0.01, "score"] = ""
    return texts


def _decimal(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace(".", ",")


def content() -> str:
    """Return the text of the file."""
    rows = pupils(SCHOOLS, SEED)
    last = rows.index[rows["school"] == f"{SCHOOLS:03}"]
    texts = untidy(rows.drop(last[2:]).reset_index(drop=True), SEED)
    header = ";".join(texts.columns)
    lines = [";".join(row) for row in texts.itertuples(index=False)]
    total = ";".join(["", "Total", *[""] * (len(texts.columns) - 3), "51.374"])
    return "\n".join(["# export of the school office", header, *lines, total, ""])


def main(path: str = "pupils.csv") -> None:
    """Write the file."""
    Path(path).write_text(content(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
