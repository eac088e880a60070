"""`python -m negmaml`, and the `negmaml` command."""

import gc
import os
import sys


def main() -> None:
    """Run the command line, or say which extra it needs."""
    # Importing and tracing make objects by the hundred thousand and hardly any garbage: looking for
    # it after every 700 takes up to a sixth of the time of a short command.
    gc.set_threshold(50_000)
    # Python has no streams where the shell closed them, and everything prints.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        import platformdirs  # noqa: F401

        from negmaml.cli.cache import keep_programs
        from negmaml.cli.main import run, terminated_as_interrupt
    except ModuleNotFoundError as missing:
        if missing.name not in ("tyro", "rich", "platformdirs"):
            raise
        sys.exit(f"negmaml: the command line needs {missing.name}; pip install 'negmaml[cli]'")
    with terminated_as_interrupt():
        try:
            keep_programs()
            code = run(sys.argv[1:])
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has closed the pipe, as `head` does; the exit must not write into it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 141  # 128 + SIGPIPE
    sys.exit(code)


if __name__ == "__main__":
    main()
