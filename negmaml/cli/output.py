"""Output of commands: results on stdout, all else on stderr; texts of users are never markup."""

import json
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from negmaml._core.deprecation import renamed_text
from negmaml._core.display import Table, printable
from negmaml._core.extras import available
from negmaml._core.paths import expanded
from negmaml._core.progress import Progress, shown_progress


@dataclass(frozen=True)
class OutputOptions:
    """Options of the output that every command has."""

    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print results and errors only: no progress, no notes, no names of files."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON document instead; NaN and infinity are null."""

    @property
    def talks(self) -> bool:
        """True if notes and progress are shown."""
        return not (self.quiet or self.json)

    def progress(self, work: str, unit: str = "parts") -> AbstractContextManager[Progress]:
        """Show the progress of some work on stderr."""
        return shown_progress(work, unit) if self.talks else nullcontext(Progress())

    def note(self, text: str) -> None:
        """Print lines that are no result."""
        if self.talks:
            say(text)

    def written(self, paths: Iterable[Path]) -> None:
        """Print the paths of written files."""
        self.note("wrote " + ", ".join(map(str, paths)))

    def record(self, values: Mapping[str, Any]) -> bool:
        """Print the result as JSON and return True, if that is asked for."""
        if self.json:
            say(json_text(values))
        return self.json


# Without a prefix the options are --json and --quiet.
Output = Annotated[OutputOptions, tyro.conf.arg(name="")]
TALKS = OutputOptions()


def say(text: str) -> None:
    """Print lines as they are; characters that the stream cannot encode are spelled out."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = printable(text)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = text.replace("±", "+/-").replace("ω", "omega")
        text = plain.encode(encoding, "backslashreplace").decode(encoding)
    print(text)


def json_text(values: Mapping[str, Any]) -> str:
    """A result as JSON, in ASCII so that every stream can hold it."""
    return json.dumps(_plain(values), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    """Numbers, texts, lists and dicts for a value; NaN and infinity become None."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(held) for key, held in value.items()}
    if hasattr(value, "dtype"):
        value = np.asarray(value).tolist()
    if isinstance(value, list | tuple):
        return [_plain(held) for held in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str | None) else str(value)


def print_renamed(old: str, new: str) -> None:
    """Warn on stderr that a command, a flag or a field of a spec has a new name."""
    # On stderr, so that redirected output holds results only.
    print(f"negmaml: warning: {printable(renamed_text(old, new))}", file=sys.stderr)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], title: str, note: str | None = None
) -> None:
    """Print a title, rows under the names of their columns, and a note below."""
    # Plain and never cut to the width of a terminal, so that a log and a pipe get the same.
    say(Table(title, list(rows), columns).text())
    if note is not None:
        say(f"  ({note})")


def check_writable(folder: Path, extra: str = "figures") -> Path:
    """Expand `~` in a folder and create it; raise OSError if it cannot be written."""
    folder = expanded("--out", folder)
    # A missing package is an error before the work, not after it.
    for package in ("matplotlib", "xarray", "scipy"):
        available(package, extra)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A trial, since permissions do not show a read-only disk.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"--out must be a folder that can be written, got {str(folder)!r} "
            f"({error.strerror}); choose another with --out"
        ) from error
    return folder


@contextmanager
def writable_folder(folder: Path, extra: str = "figures") -> Iterator[Path]:
    """Yield the folder of `check_writable`; after an error, remove it and the parents it made."""
    made = [path for path in (expanded("--out", folder), *expanded("--out", folder).parents)
            if not path.exists()]  # fmt: skip
    try:
        yield check_writable(folder, extra)
    except BaseException:
        for path in made:
            # A file of another program keeps its folder.
            with suppress(OSError):
                path.rmdir()
        raise


def provenance() -> dict[str, str]:
    """The record of versions and precision that is stored with a result."""
    import jax.numpy as jnp

    from negmaml._core.provenance import versions

    return versions() | {
        "dtype of simulations, and of theory in Python": str(jnp.result_type(float)),
        "dtype of theory in commands": "float64",
        "matmul precision of statistics": "highest",
    }
