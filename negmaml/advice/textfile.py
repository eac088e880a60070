"""Recognises the encoding, separator, header and decimal mark of a text file of a table."""

import bz2
import codecs
import csv
import gzip
import io
import lzma
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from negmaml._core.checks import short_repr
from negmaml.advice.columns import first_code

SAMPLE = 2**18  # bytes from which the format is recognised
PREAMBLE = 50  # lines above a header that are looked through
CHUNK = 2**20
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MARKS_OF_ORDER = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive or Excel workbook", b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"\x89HDF": "an HDF5 file", b"ARROW1": "a Feather file", b"$FL2": "an SPSS file",
    b"<stata_d": "a Stata file", b"{": "a JSON file", b"<": "an HTML or XML page",
}  # fmt: skip
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar", " ": "space"}
SPELLED = {name: mark for mark, name in SEPARATORS.items()} | {r"\t": "\t"}
# Numbers that only one decimal mark explains, and those that either does.
WITH_COMMA = re.compile(r"[+-]?(\d{1,3}(\.\d{3})+,\d+|\d{1,3}(\.\d{3}){2,}|0\d*,\d+|\d*,\d{1,2}"
                        r"|\d*,\d{4,}|\d{4,},\d+)")  # fmt: skip
WITH_POINT = re.compile(r"[+-]?(\d{1,3}(,\d{3})+\.\d+|\d{1,3}(,\d{3}){2,}|0\d*\.\d+|\d*\.\d{1,2}"
                        r"|\d*\.\d{4,}|\d{4,}\.\d+)")  # fmt: skip
WITH_EITHER = re.compile(r"[+-]?[1-9]\d{0,2}[.,]\d{3}")


class TextFormat(NamedTuple):
    """The format of a text file.

    encoding, separator, decimal: as pandas takes them.
    names: of the columns.
    lines: number of lines up to the first row, the header included.
    has_comments: True if lines start with #.
    codes: columns of digits in which some number has a leading zero, as in postal codes.
    notes: sentences on everything unusual.
    """

    encoding: str
    separator: str
    decimal: str
    names: list[str]
    lines: int
    has_comments: bool
    codes: list[str]
    notes: list[str]


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file, decompressed if its name says so."""
    opener = OPENERS.get(path.suffix.lower(), open)
    return opener(path, "rb")  # type: ignore[operator]


def recognise(
    path: Path, wanted: list[str], ignored: set[str], *, sep=None, decimal=None, encoding=None
) -> TextFormat:
    """Return the format of a file; raise ValueError that quotes the file and names an option.

    wanted: names of columns by which the header is found.
    ignored: names of columns whose numbers do not count.
    """
    encoding, has_comments, notes = _encoding(path, encoding)
    with open_bytes(path) as file:
        raw = file.read(SAMPLE)
    text = raw.decode(encoding, "ignore")
    # The sample may end within a row.
    complete = text if len(raw) < SAMPLE else text[: text.rindex("\n") + 1 if "\n" in text else -1]
    if not complete.strip():
        raise ValueError(f"data must have a header and rows, {str(path)!r} is empty")
    separator, at, rows = _separator(complete, wanted, sep)
    lines, names = rows[at]
    if at:
        notes.append(f"Lines above the header skipped: {at}.")
    body = [row for _, row in rows[at + 1 :] if not _is_comment(row, names)]
    names = _complete_names(path, [name.strip() for name in names], body, separator)
    if decimal is None:
        decimal = _decimal(names, body, ignored, separator)
    if (separator, decimal) != (",", "."):
        kind = SEPARATORS.get(separator, repr(separator))
        notes.append(f"Read with the separator {kind} and the decimal mark {decimal!r}.")
    return TextFormat(
        encoding, separator, decimal, names, lines, has_comments, _codes(names, body), notes
    )


def _encoding(path: Path, given: str | None) -> tuple[str, bool, list[str]]:
    """The encoding, whether lines start with #, and notes."""
    with open_bytes(path) as file:
        start = file.read(1024)
    for magic, kind in OTHER_FORMATS.items():
        if start.startswith(magic):
            raise ValueError(
                f"data must be a CSV or Parquet file, {str(path)!r} is {kind}; save it as CSV"
            )
    if given is not None:
        try:
            codecs.lookup(given)
        except LookupError:
            raise ValueError(
                f"--encoding must be an encoding such as utf-8 or cp1252, got {given!r}"
            ) from None
        return given, _scan(path, given, f"--encoding must be that of the file, got {given!r};"), []
    for mark, name in MARKS_OF_ORDER.items():
        if start.startswith(mark):
            return name, _scan(path, name, f"--encoding must be given: {name} is marked, but"), []
    if b"\0" in start:
        # Texts of Western languages have a zero in every second byte of UTF-16.
        name = "utf-16-le" if start[1:2] == b"\0" else "utf-16-be"
        if start.count(b"\0") < len(start) // 3:
            raise ValueError(f"data must be a CSV or Parquet file, {str(path)!r} is binary")
        return name, _scan(path, name, "--encoding must be given:"), [f"Read as {name}."]
    try:
        return "utf-8", _scan(path, "utf-8", ""), []
    except ValueError as not_utf8:
        name = "cp1252"
        has_comments = _scan(path, name, f"--encoding must be given:{not_utf8} and")
        return name, has_comments, [f"Read as {name}, for it is not UTF-8; --encoding changes it."]


def _scan(path: Path, encoding: str, complaint: str) -> bool:
    """Decode the whole file: True if a line starts with #; ValueError for invalid bytes."""
    decoder = codecs.getincrementaldecoder(encoding)()
    before, found = "\n", False
    with open_bytes(path) as file:
        try:
            while chunk := file.read(CHUNK):
                text = before + decoder.decode(chunk)
                found = found or "\n#" in text or "\r#" in text
                before = text[-1:]
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            wrong = error.object[error.start : error.start + 8]
            raise ValueError(f"{complaint} {str(path)!r} has the bytes {wrong!r}") from error
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise ValueError(f"data must be readable, {str(path)!r} is not: {error}") from error
    return found


def _separator(text: str, wanted: list[str], given: str | None):
    """The separator, the place of the header among the rows, and the rows with their last lines."""
    if given is not None:
        given = SPELLED.get(given, given)
        if len(given) != 1:
            raise ValueError(
                f"--sep must be one character, or one of {', '.join(SPELLED)}, got {given!r}"
            )
    best: tuple[float, str, int, list] | None = None
    for separator in [given] if given else SEPARATORS:
        rows = list(_rows(text, separator))
        # The header is the first row with the names that were asked for.
        for at, (_, row) in enumerate(rows[:PREAMBLE]):
            if set(wanted) <= {cell.strip() for cell in row}:
                return separator, at, rows
        widths = Counter(len(row) for _, row in rows if len(row) > 1)
        if rows and (widths or given):
            width, count = widths.most_common(1)[0] if widths else (1, 1)
            score = count / len(rows) + width / 1e6  # of equally regular ones, the finest
            if best is None or score > best[0]:
                # With a separator that was given, the first line shows whether it is the right one.
                at = 0 if given else next(i for i, (_, row) in enumerate(rows) if len(row) == width)
                best = score, separator, at, rows
    if best is None:
        line = text.strip().splitlines()[0][:80]
        raise ValueError(
            f"--sep must be given: no separator splits the first line {line!r} of the data"
        )
    return best[1:]


def _rows(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its last line."""
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=separator != "\t"
    )
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, row
    except csv.Error:  # a cell longer than any of a table: the wrong separator
        return


def _is_comment(row: list[str], names: list[str]) -> bool:
    return row[0].lstrip().startswith("#") and len(row) != len(names)


def _complete_names(path: Path, names: list[str], body: list[list[str]], separator: str):
    """A name for every column, also if rows have one cell more; "" for a last one without cells."""
    if not body:
        raise ValueError(f"data must have rows, {str(path)!r} has only the header {names}")
    width = Counter(map(len, body)).most_common(1)[0][0]
    if width == len(names) + 1:
        full = [row for row in body if len(row) == width]
        if all(not row[-1].strip() for row in full):  # each row ends with a separator
            names = [*names, ""]
        elif [row[0] for row in full[1:]] == [str(int(row[0]) + 1) for row in full[:-1]
                                              if row[0].isdecimal()]:  # fmt: skip
            names = ["row name", *names]  # R gives row names no header
    wide = next((row for row in body if len(row) > len(names)), None)
    if wide is not None:
        cells = separator.join(wide)[:100]
        raise ValueError(
            f"data must have as many cells in a row as in the header {short_repr(names)}, "
            f"{len(names)}, got {len(wide)} in {cells!r}; a text with a separator needs quotes, or "
            "give --sep"
        )
    last = len(names) - 1
    empty = not names[-1] and not any(row[last].strip() for row in body if len(row) > last)
    named = [name or f"column {i + 1}" for i, name in enumerate(names)]
    return [*named[:-1], ""] if empty else named


def _decimal(names: list[str], body: list[list[str]], ignored: set[str], separator: str) -> str:
    """The decimal mark that explains the numbers; ValueError if they leave it open."""
    seen: dict[str, str] = {}
    for row in body:
        for name, cell in zip(names, row, strict=False):
            cell = cell.strip()
            if name in ignored:
                continue
            for mark, pattern in ((",", WITH_COMMA), (".", WITH_POINT), ("", WITH_EITHER)):
                if pattern.fullmatch(cell) and (mark or "," in cell or separator == ";"):
                    seen.setdefault(mark, f"{cell!r} in column {name!r}")
                    break
    if "," in seen and "." in seen:
        raise ValueError(
            f"--decimal must be given: the data have {seen[',']} and {seen['.']}; or --drop one of "
            "the columns"
        )
    if "" in seen and not seen.keys() & {",", "."}:
        raise ValueError(
            f"--decimal must be given: {seen['']} may have a decimal mark or a thousands separator"
        )
    return "," if "," in seen else "."


def _codes(names: list[str], body: list[list[str]]) -> list[str]:
    """The columns of codes such as 01, of which pandas would make numbers."""
    cells: dict[str, list[str]] = {name: [] for name in names}
    for row in body:
        for name, cell in zip(names, row, strict=False):
            # Others stand for a missing value, or the column is one of texts anyway.
            cells[name] += [cell] if re.search(r"\d", cell) else []
    return [name for name in names if first_code(cells[name])]


def without_comments(text: IO[str], names: list[str], separator: str) -> tuple[IO[str], int]:
    """Return the text without rows that start with # and are not like the header, and their number.

    A row with as many cells as the header is data.
    """
    kept, dropped = io.StringIO(newline=""), 0
    writer = csv.writer(kept, delimiter=separator)
    for _, row in _rows(text.read(), separator):
        if _is_comment(row, names):
            dropped += 1
        else:
            writer.writerow(row)
    kept.seek(0)
    return kept, dropped
