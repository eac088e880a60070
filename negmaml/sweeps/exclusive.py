"""Small files beside a store, each of which can be created by one process alone.

On a disk by O_EXCL, which holds between the machines of a shared file system too, where locks of
the operating system may not; at a URL by what the store of objects has for it.
"""

import contextlib
import os
from pathlib import Path

from negmaml._core.extras import require
from negmaml._core.plain_files import LinkedError, open_plain, read_plain
from negmaml.sweeps.storage import StoreError, local_path

MOST = 2**16  # bytes of a note: no worker writes a longer one


def beside(url: str, what: str) -> "LocalNotes | RemoteNotes":
    """The files of a purpose beside the store at a path or URL."""
    path = local_path(url)
    if path is None:
        return RemoteNotes(url, what)
    return LocalNotes(path.with_name(f".{path.name}.{what}"))


class LocalNotes:
    """Files in a folder. Symbolic links among them count as empty, and are never followed."""

    def __init__(self, folder: Path):
        if folder.is_symlink():
            raise StoreError(
                f"{str(folder)!r} is a symbolic link, which could lead to other files; remove it"
            )
        self.folder = folder

    def names(self) -> list[str]:
        """Every file, in order."""
        try:
            return sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return []

    def read(self, name: str, most: int = MOST) -> str:
        """Return the text of a file, empty for a missing one, and for one that no worker wrote."""
        try:
            return _text(read_plain(self.folder / name, most), most)
        except LinkedError:
            return ""

    def write(self, name: str, text: str) -> None:
        """Rewrite a file that is there, in place: other machines see it when they open it."""
        with (
            contextlib.suppress(FileNotFoundError, LinkedError),
            open(open_plain(self.folder / name, os.O_RDWR), "r+") as file,
        ):
            file.write(text)
            file.truncate()

    def create(self, name: str, text: str) -> bool:
        """Whether the file could be made, because there was none."""
        for attempt in range(3):  # another may just have removed the folder, which was empty
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                file = os.open(self.folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return False
            except FileNotFoundError:
                if attempt == 2:
                    raise
            else:
                with open(file, "w") as opened:
                    opened.write(text)
                return True
        return False

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    def clear(self) -> None:
        """Remove the folder, if it is empty."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()


class RemoteNotes:
    """Objects under a URL."""

    def __init__(self, url: str, what: str):
        fsspec = require("fsspec", "sweep")
        self.url = url
        self.files, self.folder = fsspec.core.url_to_fs(f"{url.rstrip('/')}.{what}")
        write = getattr(type(self.files), "_pipe_file", type(self.files).pipe_file)
        if write is fsspec.spec.AbstractFileSystem.pipe_file:  # looks first, and writes then
            raise not_exclusive(url)

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def names(self) -> list[str]:
        """Every object, in order."""
        self.files.invalidate_cache(self.folder)
        try:
            found = self.files.ls(self.folder, detail=False)
        except FileNotFoundError:
            return []
        return sorted(name.rsplit("/", 1)[-1] for name in found)

    def read(self, name: str, most: int = MOST) -> str:
        """Return the text of an object, empty if it is missing or no worker wrote it."""
        try:
            return _text(self.files.cat_file(self._path(name), start=0, end=most + 1), most)
        except FileNotFoundError:
            return ""

    def write(self, name: str, text: str) -> None:
        """Write an object."""
        self.files.pipe_file(self._path(name), text.encode())

    def create(self, name: str, text: str, again: bool = False) -> bool:
        """Whether the object could be made, because there was none."""
        try:
            self.files.pipe_file(self._path(name), text.encode(), mode="create")
        except FileExistsError:
            held = True
        except OSError:  # what stores answer that have no word for it
            held = bool(self.read(name))
            if not held:
                raise
        else:
            return True
        return not again and held and self.read(name) == text  # sent twice by the client

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with contextlib.suppress(OSError):
            self.files.rm_file(self._path(name))

    def clear(self) -> None:
        """There are no folders."""

    def check(self, name: str, text: str) -> None:
        """Raise if a file that was just created could be created again."""
        if self.create(name, text, again=True):
            self.remove(name)
            raise not_exclusive(self.url)


def _text(data: bytes | None, most: int) -> str:
    """Bytes as text, empty where they are none or too many."""
    return data.decode(errors="replace") if data and len(data) <= most else ""


def not_exclusive(url: str) -> StoreError:
    """Of a file system that cannot do it."""
    return StoreError(
        f"store {url!r} is on a file system that cannot create a file exclusively, so two "
        "sweeps could write to it at once; use a path, or S3, Google Cloud Storage or Azure"
    )
