"""`python -m negmaml`, and the `negmaml` command."""

import sys


def main() -> None:
    """Run the command line, or say which extra it needs."""
    try:
        from negmaml.cli.main import run
    except ModuleNotFoundError as missing:
        if missing.name not in ("tyro", "rich"):
            raise
        sys.exit(f"negmaml: the command line needs {missing.name}; pip install 'negmaml[cli]'")
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
