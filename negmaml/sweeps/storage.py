"""The files of a store, on a disk or at a URL: each is written whole or not at all."""

import contextlib
import errno
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from negmaml._core.extras import MissingExtraError, require
from negmaml._core.paths import expanded
from negmaml._core.plain_files import LinkedError, plain_sizes, read_plain

PARTIAL = ".partial"  # how files end that are being written, ours and those of zarr

LONGEST = 200  # bytes of a store's name, of which those of its locks are made


class StoreError(ValueError):
    """The store is not one that this sweep can read or write."""


class Address(str):
    """The one address of a store, whatever spelling it was given by, which messages repeat."""

    given: str

    def __new__(cls, address: str, given: str = "") -> "Address":
        made = super().__new__(cls, address)
        made.given = given or address
        return made

    def __repr__(self) -> str:
        return repr(self.given)


def check_url(url) -> Address:
    """The address of the store at a path or URL; raises unless there is such a file system.

    Links, `~`, relative paths and other spellings of one place have one address, so that they have
    one lock, and the store stays the same if the working directory changes.
    """
    if not isinstance(url, str | os.PathLike) or not isinstance(os.fspath(url), str):
        raise TypeError(f"store must be a path or a URL, got {url!r}")
    given = os.fspath(url)
    if not given.strip() or "\0" in given:
        raise ValueError(f"store must be a path or a URL, got {given!r}")
    path = local_path(given)
    found = _remote_address(given) if path is None else str(path)
    if found is None or (path is not None and not path.name):
        raise ValueError(f"store must be a folder of its own, not the root, got {given!r}")
    if path is not None and len(os.fsencode(path.name)) > LONGEST:
        raise ValueError(
            f"store must have a name of at most {LONGEST} bytes, got {len(os.fsencode(path.name))}"
        )
    return Address(found, given)


def _remote_address(url: str) -> str | None:
    """A URL as its file system writes it; None for the root of one."""
    fsspec = require("fsspec", "sweep")
    protocol, _, rest = url.partition("://")
    if (known := protocol.lower()) not in {*fsspec.available_protocols(), *fsspec.registry}:
        raise ValueError(
            f"store {url!r}: there is no file system {protocol!r}; use a path, or a URL such as "
            "s3://, gs://, az:// or memory://"
        )
    try:
        fsspec.get_filesystem_class(known)
    except ImportError as error:
        raise MissingExtraError(f"store {url!r}: {error}") from error
    if not rest.strip("/"):
        return None
    plain = f"{known}://{rest.rstrip('/')}"
    files, path = fsspec.core.url_to_fs(plain)
    usual = files.unstrip_protocol(path)
    same = fsspec.core.url_to_fs(usual) == (files, path)  # a host or account may be lost
    return usual if same else plain


def local_path(url: str) -> Path | None:
    """The path of a local store, without links and `~`; None for a URL."""
    protocol, separator, rest = url.partition("://")
    if separator and protocol.lower() not in ("file", "local"):
        return None
    path = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
    return Path(os.path.realpath(expanded("store", path if separator else url)))


def address(url: str) -> str:
    """The store as zarr and xarray take it."""
    path = local_path(url)
    return str(url if path is None else path)


def check_writable(url: str) -> None:
    """Raise OSError unless a local store, and files beside it, can be written; URLs pass.

    Makes the folder that the store is in.
    """
    path = local_path(url)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "there is a file in its path" if in_the_way else error.strerror or str(error)
        raise OSError(
            error.errno,
            f"store {url!r} cannot be written ({reason}); choose another path, or mend its "
            "permissions",
        ) from error


def files_of(url: str) -> "LocalFiles | RemoteFiles":
    """The files of the store at a path or URL."""
    path = local_path(url)
    return RemoteFiles(url) if path is None else LocalFiles(path)


class LocalFiles:
    """Files under a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def exists(self) -> bool:
        """Whether there is anything: a file of this name, or a folder that is not empty."""
        if self.folder.is_dir():
            return any(self.folder.iterdir())
        return self.folder.exists()

    def read(self, key: str, most: int | None = None) -> bytes | None:
        """The content of a file, at most one byte more than `most` of it; None without a file."""
        try:
            return read_plain(self.folder / key, most)
        except LinkedError as error:
            raise StoreError(f"store {str(self.folder)!r}: {error}") from error

    def sizes(self) -> dict[str, int]:
        """Bytes of every file; StoreError for a symbolic link among them."""
        try:
            return dict(plain_sizes(self.folder))
        except LinkedError as error:
            raise StoreError(f"store {str(self.folder)!r}: {error}") from error

    def write(self, key: str, data: bytes) -> None:
        """Write a file aside, and rename it."""
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            aside.write_bytes(data)
            os.replace(aside, path)
        except Exception:
            aside.unlink(missing_ok=True)
            raise

    def remove(self, key: str) -> None:
        """Remove a file, and the folders that it leaves empty."""
        path = self.folder / key
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for folder in path.parents:
                if folder == self.folder:
                    break
                folder.rmdir()

    def names(self) -> Iterator[str]:
        """Every file."""
        for path in sorted(self.folder.rglob("*")):
            if not path.is_dir():
                yield path.relative_to(self.folder).as_posix()


class RemoteFiles:
    """Objects under a URL, as fsspec sees them; object stores write them whole."""

    def __init__(self, url: str):
        self.files, self.folder = require("fsspec", "sweep").core.url_to_fs(url.rstrip("/"))

    def exists(self) -> bool:
        """Whether there is anything."""
        return any(True for _ in self.names())

    def read(self, key: str, most: int | None = None) -> bytes | None:
        """The content of an object, at most one byte more than `most` of it; None without one."""
        part = {} if most is None else {"start": 0, "end": most + 1}
        try:
            return self.files.cat_file(f"{self.folder}/{key}", **part)
        except FileNotFoundError:
            return None

    def sizes(self) -> dict[str, int]:
        """Bytes of every object."""
        self.files.invalidate_cache()
        found = self.files.find(self.folder, detail=True)
        return {
            path.removeprefix(self.folder).lstrip("/"): int(held["size"] or 0)
            for path, held in found.items()
        }

    def write(self, key: str, data: bytes) -> None:
        """Write an object."""
        self.files.pipe_file(f"{self.folder}/{key}", data)

    def remove(self, key: str) -> None:
        """Remove an object."""
        with contextlib.suppress(FileNotFoundError):
            self.files.rm_file(f"{self.folder}/{key}")

    def names(self) -> Iterator[str]:
        """Every object."""
        self.files.invalidate_cache()
        for path in self.files.find(self.folder):
            yield path.removeprefix(self.folder).lstrip("/")
