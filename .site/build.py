"""Build the documentation into build/site, which any browser reads without a server.

    pip install ".[docs]"
    python .site/build.py

Warnings, dead links and files of other hosts are errors.
"""

import shutil
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# This copy of the package is described, wherever another one is installed.
sys.path[:0] = [str(HERE), str(ROOT)]


def main() -> int:
    """Stage, build and check; return the exit status."""
    import check
    import stage
    from sphinx.cmd.build import build_main

    started = time.process_time()
    staged, site = ROOT / "build/site-source", ROOT / "build/site"
    for folder in (staged, site):  # without pages of files that are gone
        shutil.rmtree(folder, ignore_errors=True)
    stage.stage(staged)
    status = build_main(
        ["-b", "html", "-W", "--keep-going", "-q", "-E", "-c", str(HERE), "-d",
         str(ROOT / "build/site-doctrees"), str(staged), str(site)]
    )  # fmt: skip
    if status:
        return status
    found = check.problems(site)
    print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
    pages = sum(1 for _ in site.rglob("*.html"))
    print(f"{site / 'index.html'}: {pages} pages, {time.process_time() - started:.0f} CPU seconds")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
