"""The files of a store, on a disk or at a URL: each is written whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from negmaml._core.extras import MissingExtraError, require
from negmaml._core.plain_files import LinkedError, plain_sizes, read_plain

PARTIAL = ".partial"  # how files end that are being written, ours and those of zarr


class StoreError(ValueError):
    """The store is not one that this sweep can read or write."""


def check_url(url) -> None:
    """Raise unless it is a path, or a URL of a file system that there is."""
    if not isinstance(url, str | os.PathLike) or not isinstance(os.fspath(url), str):
        raise TypeError(f"store must be a path or a URL, got {url!r}")
    url = os.fspath(url)
    if not url.strip():
        raise ValueError(f"store must be a path or a URL, got {url!r}")
    if local_path(url) is not None:
        return
    fsspec, protocol = require("fsspec", "sweep"), url.split("://")[0]
    if protocol not in fsspec.available_protocols():
        raise ValueError(
            f"store {url!r}: there is no file system {protocol!r}; use a path, or a URL such as "
            "s3://, gs://, az:// or memory://"
        )
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise MissingExtraError(f"store {url!r}: {error}") from error


def local_path(url: str) -> Path | None:
    """The path of a local store, None for a URL."""
    if "://" not in url:
        return Path(url)
    return Path(url.removeprefix("file://")) if url.startswith("file://") else None


def address(url: str) -> str:
    """The store as zarr and xarray take it."""
    return str(local_path(url) or url)


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
