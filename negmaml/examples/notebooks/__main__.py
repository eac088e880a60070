"""Copies the notebooks into a folder, the current one by default."""

import shutil
import sys
from pathlib import Path


def main(folder: str = ".") -> list[Path]:
    """Copy the notebooks into a folder, and return their paths; a file there is kept."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    copies = []
    for source in sorted(Path(__file__).parent.glob("*.ipynb")):
        copies.append(target / source.name)
        if copies[-1].exists():
            raise ValueError(f"folder must not have {source.name!r} yet, got {folder!r}")
        shutil.copyfile(source, copies[-1])
    return copies


if __name__ == "__main__":
    print(*main(*sys.argv[1:2]), sep="\n")
