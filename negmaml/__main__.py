"""`python -m negmaml`, and the `negmaml` command."""

import sys


def main() -> None:
    """Run the command line, or say which extra it needs."""
    try:
        import platformdirs  # noqa: F401

        from negmaml.cli.cache import keep_programs
        from negmaml.cli.main import run
    except ModuleNotFoundError as missing:
        if missing.name not in ("tyro", "rich", "platformdirs"):
            raise
        sys.exit(f"negmaml: the command line needs {missing.name}; pip install 'negmaml[cli]'")
    keep_programs()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
