"""Output of commands; texts of users are printed verbatim, never as markup."""

import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table

from negmaml._core.deprecation import renamed_text
from negmaml._core.display import printable
from negmaml._core.extras import available
from negmaml._core.paths import expanded

# Texts of users may hold brackets and colons, which rich would read as markup and emoji.
console = Console(markup=False, emoji=False)


def say(text: str) -> None:
    """Print lines that only the terminal wraps."""
    # Without hard line breaks, a long path can be copied from the terminal in one piece.
    console.print(printable(text), highlight=False, soft_wrap=True)


def print_renamed(old: str, new: str) -> None:
    """Warn on stderr that a command, a flag or a field of a spec has a new name."""
    # On stderr, so that redirected output holds results only.
    print(f"negmaml: warning: {printable(renamed_text(old, new))}", file=sys.stderr)


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    title: str | None = None,
    note: str | None = None,
    wrap: bool = True,
) -> None:
    """Print rows under the names of their columns, with a note below; `wrap` lets cells wrap."""
    table = Table(title=None if title is None else printable(title), caption=note)
    for column in columns:
        table.add_column(printable(column), no_wrap=not wrap)
    for row in rows:
        table.add_row(*map(printable, row))
    console.print(table)


def say_written(paths: Iterable[Path]) -> None:
    """Print the paths of written files."""
    say("wrote " + ", ".join(map(str, paths)))


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
