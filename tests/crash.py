"""Stops a process at any one of its storage operations, and the files that it leaves."""

import shutil
from pathlib import Path


class Stop(BaseException):
    """As a kill: nothing handles it."""


class Operations:
    """Counts storage operations, and stops all from one on."""

    def __init__(self):
        self.count, self.at, self.within, self.stopped = 0, None, False, False

    def step(self, aside: Path | None = None, content: bytes = b""):
        """To be called before every operation; a stop within it leaves half the content aside."""
        self.count += 1
        if self.at is not None and self.count >= self.at:
            self.stopped = True
            if self.within and aside is not None and self.count == self.at:
                aside.write_bytes(content[: len(content) // 2])
            raise Stop

    def run(self, call, at=None, within=False):
        """The call, stopped at an operation; None if it was."""
        self.count, self.at, self.within, self.stopped = 0, at, within, False
        try:
            return call()
        except BaseException:
            if not self.stopped:  # what a library makes of a stop counts as one
                raise
            return None
        finally:
            self.at = None


class Disk:
    """A folder, and what a stop within a write leaves there."""

    within = True

    def __init__(self, folder: Path, name="x.zarr"):
        self.folder, self.url = folder, str(folder / name)

    def keep(self):
        return shutil.copytree(self.folder, Path(f"{self.folder}-kept"), dirs_exist_ok=True)

    def restore(self, kept):
        shutil.rmtree(self.folder)
        if kept:
            shutil.copytree(kept, self.folder)

    def names(self):
        return [p.name for p in self.folder.rglob("*") if not p.is_dir()]
