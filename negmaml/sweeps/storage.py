"""Storage: the files of a store and beside it, in a folder or in an object store."""

import contextlib
import errno
import os
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from negmaml._core.extras import MissingExtraError, require
from negmaml._core.paths import expanded
from negmaml._core.plain_files import LinkedError, open_plain, plain_sizes, read_plain

PARTIAL = ".partial"  # the suffix of files that are being written, by us or by zarr
LONGEST = 200  # bytes of a store's name: names of its lease folders are longer
READERS = 16  # threads that read files
BATCH = 256  # files that a thread reads in turn
MAX_NOTE = 2**16  # bytes of a lease or note: no worker writes a longer one


class StoreError(ValueError):
    """The store holds another sweep, is damaged, or is in use by another process.

    >>> import negmaml as nm
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = nm.sweep(lambda key, x: {"y": x}, {"x": [1.0, 2.0]}, [0], f"{folder}/a")
    ...     try:
    ...         nm.sweep(lambda key, x: {"y": x}, {"x": [3.0]}, [0], f"{folder}/a")
    ...     except nm.sweeps.StoreError as error:
    ...         print(str(error).splitlines()[1].strip())
    axis x: asked adds 1 (3.0); extend adds it (--extend)
    """


class Address(str):
    """The canonical address of a store; messages show it as the caller spelled it.

    It is a `str`, so it can be passed wherever a URL is expected.
    """

    given: str

    def __new__(cls, address: str, given: str = "") -> "Address":
        made = super().__new__(cls, address)
        made.given = given or address
        return made

    def __repr__(self) -> str:
        return repr(self.given)


def check_url(url) -> Address:
    """The address of the store at a path or URL; raise ValueError for an unknown file system.

    Links, `~`, relative paths and other spellings of one place have one address and so one lock.
    The store stays the same if the working directory changes.
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
    """The canonical URL; None for the root of a file system."""
    fsspec = require("fsspec", "sweep")
    protocol, _, rest = url.partition("://")
    if (known := protocol.lower()) not in {*fsspec.available_protocols(), *fsspec.registry}:
        raise ValueError(
            f"store {url!r}: there is no file system {protocol!r}; use a path, or a URL such as "
            "s3://, gs://, az:// or memory://"
        )
    try:
        # fsspec also knows protocols whose packages are not installed.
        fsspec.get_filesystem_class(known)
    except ImportError as error:
        raise MissingExtraError(f"store {url!r}: {error}") from error
    if not rest.strip("/"):
        return None
    plain = f"{known}://{rest.rstrip('/')}"
    files, path = fsspec.core.url_to_fs(plain)
    # Use the canonical URL only if it leads to the same file system: a host or account
    # may be lost.
    usual = files.unstrip_protocol(path)
    same = fsspec.core.url_to_fs(usual) == (files, path)
    return usual if same else plain


def local_path(url: str) -> Path | None:
    """The path of a local store, with links and `~` resolved; None for a URL."""
    protocol, separator, rest = url.partition("://")
    if separator and protocol.lower() not in ("file", "local"):
        return None
    path = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
    return Path(os.path.realpath(expanded("store", path if separator else url)))


def check_writable(url: str) -> None:
    """Raise OSError unless a local store and its neighbours can be written; URLs always pass.

    Creates the folder that contains the store.
    """
    path = local_path(url)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Locks and leases are beside the store, so its parent must be writable.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        # The folder above may be writable although the store itself is not.
        if path.is_dir() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "there is a file in its path" if in_the_way else error.strerror or str(error)
        raise OSError(
            error.errno,
            f"store {url!r} cannot be written ({reason}); choose another path, or change "
            "its permissions",
        ) from error


def storage_at(url: str) -> "Storage":
    """The files of the store at a path or URL."""
    path = local_path(url)
    return RemoteStorage(url) if path is None else LocalStorage(path)


def storage_beside(url: str, purpose: str) -> "Storage":
    """The files of a purpose beside a store, such as its leases; none of them is in the store."""
    path = local_path(url)
    if path is None:
        storage = RemoteStorage(f"{url.rstrip('/')}.{purpose}")
        write = getattr(type(storage.files), "_pipe_file", type(storage.files).pipe_file)
        # The default implementation looks for the file first and then writes it: not exclusive.
        if write is require("fsspec", "sweep").spec.AbstractFileSystem.pipe_file:
            raise storage.not_exclusive()
        return storage
    folder = path.with_name(f".{path.name}.{purpose}")
    if folder.is_symlink():
        raise StoreError(
            f"{str(folder)!r} is a symbolic link, which could lead to other files; remove it"
        )
    return LocalStorage(folder)


T = TypeVar("T")


def in_batches(function: Callable[[Any], T], keys: Sequence) -> list[T]:
    """function(key) of every key, in threads: they hide the latency of a disk or object store."""

    def several(start: int) -> list[T]:
        return [function(key) for key in keys[start : start + BATCH]]

    if len(keys) <= READERS:
        return [function(key) for key in keys]
    # A task for each file would cost more than reading it from a local disk.
    with ThreadPoolExecutor(READERS) as readers:
        return [one for found in readers.map(several, range(0, len(keys), BATCH)) for one in found]


class Storage(ABC):
    """Named files below a folder or a URL. A key is the path of a file from there.

    `create` is exclusive between processes and machines. `write` replaces a file as a whole, so
    readers never see a part of it.
    """

    @abstractmethod
    def exists(self) -> bool:
        """True if there is anything: a file of this name, or a folder that is not empty."""

    @abstractmethod
    def names(self) -> list[str]:
        """The sorted names of files and folders at the top level; empty without a folder."""

    @abstractmethod
    def sizes(self, under: str = "") -> dict[str, int]:
        """The size in bytes of every file at any depth; StoreError for a symbolic link.

        under: a folder; only files in it are listed.
        """

    @abstractmethod
    def read(self, key: str, most: int | None = None) -> bytes | None:
        """The content of a file, at most one byte more than `most`; None for a missing file."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Create a file at the top level; return False if it exists already."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Write a file as a whole."""

    @abstractmethod
    def overwrite(self, key: str, data: bytes) -> None:
        """Rewrite a small file in place; a file that was removed on a disk stays removed."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove a file if it exists, and the folders that it leaves empty."""

    @abstractmethod
    def remove_if_empty(self) -> None:
        """Remove the folder itself if it is empty."""

    @abstractmethod
    def check_exclusive(self, key: str, data: bytes) -> None:
        """Raise StoreError if a file just created with this data can be created again."""

    def read_text(self, key: str, most: int = MAX_NOTE) -> str:
        """The text of a small file; empty if it is missing, a link, or longer than `most`."""
        try:
            data = self.read(key, most)
        except StoreError:
            return ""
        return data.decode(errors="replace") if data and len(data) <= most else ""

    def discard(self, key: str) -> None:
        """Remove a file and ignore all errors of the operating system."""
        with contextlib.suppress(OSError):
            self.remove(key)


class LocalStorage(Storage):
    """Files in a folder. Symbolic links among them are never followed."""

    def __init__(self, folder: Path):
        self.folder = folder

    def exists(self) -> bool:
        return bool(self.names()) if self.folder.is_dir() else self.folder.exists()

    def names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self, under: str = "") -> dict[str, int]:
        try:
            return dict(plain_sizes(self.folder, under))
        except LinkedError as error:
            raise StoreError(f"store {str(self.folder)!r}: {error}") from error

    def read(self, key: str, most: int | None = None) -> bytes | None:
        try:
            return read_plain(self.folder / key, most)
        except LinkedError as error:
            raise StoreError(f"store {str(self.folder)!r}: {error}") from error

    def create(self, key: str, data: bytes) -> bool:
        # O_EXCL holds between the machines of a shared file system, where locks of the operating
        # system may not. Another process may remove the folder when it is empty: then try again.
        for attempt in range(3):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                file = os.open(self.folder / key, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return False
            except FileNotFoundError:
                if attempt == 2:
                    raise
            else:
                # Readers may see the file before its text; an empty holder counts as alive.
                with open(file, "wb") as opened:
                    opened.write(data)
                return True
        return False

    def write(self, key: str, data: bytes) -> None:
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        # A rename within a folder is atomic: readers see the old file or the new one. An interrupt
        # leaves the partial file, which the next sweep removes.
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            aside.write_bytes(data)
            os.replace(aside, path)
        except Exception:
            aside.unlink(missing_ok=True)
            raise

    def overwrite(self, key: str, data: bytes) -> None:
        # Other machines see the new content when they open the file; a new file that replaces it
        # could stay hidden behind their caches of the folder.
        with (
            contextlib.suppress(FileNotFoundError, LinkedError),
            open(open_plain(self.folder / key, os.O_RDWR), "r+b") as file,
        ):
            file.write(data)
            file.truncate()

    def remove(self, key: str) -> None:
        path = self.folder / key
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            # rmdir fails at the first folder that is not empty, which ends the loop.
            for folder in path.parents:
                if folder == self.folder:
                    break
                folder.rmdir()

    def remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def check_exclusive(self, key: str, data: bytes) -> None:
        """Nothing to check: the operating system guarantees it."""


class RemoteStorage(Storage):
    """Objects under a URL, as fsspec sees them; object stores write each as a whole."""

    def __init__(self, url: str):
        self.url = url
        self.files, self.folder = require("fsspec", "sweep").core.url_to_fs(url.rstrip("/"))

    def exists(self) -> bool:
        return bool(self.names())

    def names(self) -> list[str]:
        # fsspec keeps listings, and an old one hides the files of other processes.
        self.files.invalidate_cache(self.folder)
        try:
            found = self.files.ls(self.folder, detail=False)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)

    def sizes(self, under: str = "") -> dict[str, int]:
        self.files.invalidate_cache()
        found = self.files.find(f"{self.folder}/{under}".rstrip("/"), detail=True)
        return {
            path.removeprefix(self.folder).lstrip("/"): int(held["size"] or 0)
            for path, held in found.items()
        }

    def read(self, key: str, most: int | None = None) -> bytes | None:
        part = {} if most is None else {"start": 0, "end": most + 1}
        try:
            return self.files.cat_file(f"{self.folder}/{key}", **part)
        except FileNotFoundError:
            return None

    def create(self, key: str, data: bytes) -> bool:
        # The client sends a request twice after a lost answer. Then the file exists with our data.
        return self._create(key, data) or self.read(key, len(data)) == data

    def _create(self, key: str, data: bytes) -> bool:
        try:
            self.files.pipe_file(f"{self.folder}/{key}", data, mode="create")
        except FileExistsError:
            return False
        except OSError:  # some stores answer an existing file with another error
            if not self.read(key):
                raise
            return False
        return True

    def write(self, key: str, data: bytes) -> None:
        self.files.pipe_file(f"{self.folder}/{key}", data)

    def overwrite(self, key: str, data: bytes) -> None:
        self.files.pipe_file(f"{self.folder}/{key}", data)

    def remove(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.files.rm_file(f"{self.folder}/{key}")

    def remove_if_empty(self) -> None:
        """Nothing to remove: object stores have no folders."""

    def check_exclusive(self, key: str, data: bytes) -> None:
        if self._create(key, data):
            self.discard(key)
            raise self.not_exclusive()

    def not_exclusive(self) -> StoreError:
        """The error for a file system that cannot create a file exclusively."""
        return StoreError(
            f"store {self.url.rpartition('.')[0]!r} is on a file system that cannot create a file "
            "exclusively, so two sweeps could write to it at once; use a path, or S3, Google Cloud "
            "Storage or Azure"
        )
