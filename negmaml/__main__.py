"""`python -m negmaml`, and the `negmaml` command."""

import gc
import sys


def main() -> None:
    """Run the command line, or say which extra it needs."""
    # Importing and tracing make objects by the hundred thousand and hardly any garbage: looking for
    # it after every 700 takes up to a sixth of the time of a short command.
    gc.set_threshold(50_000)
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
