"""The commands of sweeps: sweep, status, merge, heatmap, curves."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from negmaml import sweeps
from negmaml._core import plotting
from negmaml._core.extras import require
from negmaml._core.paths import expanded
from negmaml.cli.output import (
    TALKS,
    Output,
    OutputOptions,
    print_renamed,
    print_table,
    say,
    writable_folder,
)
from negmaml.paper import figures
from negmaml.sweeps import spec as specs
from negmaml.sweeps import summary
from negmaml.sweeps.cluster import connected
from negmaml.sweeps.local_device import use_local_device
from negmaml.sweeps.members import SLURM
from negmaml.sweeps.storage import local_path

Overrides = Annotated[tuple[str, ...], tyro.conf.arg(name="override"), tyro.conf.UseAppendAction]
Selection = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
Spec = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPEC")]
Store = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
Stores = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[STORE ...]")]


def sweep(
    spec: Spec,
    store: str | None = None,
    overrides: Overrides = (),
    dry_run: bool = False,
    scheduler: str | None = None,
    worker: str | None = None,
    device: Literal["all", "local"] = "all",
    memory: int | None = None,
    block: int | None = None,
    extend: bool = False,
    allow_code_change: bool = False,
    output: Output = TALKS,
) -> int:
    """Run or resume the sweep of a spec file; a complete store computes nothing.

    Args:
        spec: a TOML file, or phase_map, an example in the package.
        store: path or fsspec URL of the result.
        overrides: fields of the spec, as in --override seeds=20 --override grid.sigma=[0.1,1.0].
        dry_run: only print the plan: cells, shape groups, blocks, bytes, time.
        scheduler: address of a Dask scheduler whose workers compute the blocks.
        worker: 3/16 in the third of 16 processes that run the same command and share the store, or
            slurm in an array job. Workers may join or leave at any time.
        device: local for one GPU of the node, by the number of the process in it, as srun sets it;
            all for all that JAX sees.
        memory: maximal bytes of a batch of cells.
        block: cells computed and stored at once.
        extend: add new seeds and new values of axes to the store.
        allow_code_change: resume even if the function computes something else than before.
        output: the form of the output.
    """
    if device == "local":
        use_local_device()  # before JAX starts
    fields = specs.read(spec, overrides, warn=print_renamed)
    # An option of the command takes precedence over the field of the spec.
    memory = fields.get("memory") if memory is None else memory
    block = fields.get("block") if block is None else block
    with ExitStack() as stack:
        # Set for this call only: the process may run other commands, as tests do.
        stack.enter_context(jax.enable_x64(fields["dtype"] == "float64"))
        call = (fields["function"], fields["grid"])
        if dry_run:
            plan = sweeps.plan(*call, **specs.arguments(fields), memory=memory, block=block)
            if not output.record(plan.record()):
                _print_rows("dry run", plan.rows().items())
            return 0
        if store is None:
            raise ValueError("--store must say where the result goes; or pass --dry-run")
        # Both are needed for the summary at the end, so their absence must show before the work.
        require("xarray", "sweep")
        require("zarr", "sweep")
        client = stack.enter_context(connected(scheduler))
        sweeps.sweep(
            *call,
            store=store,
            client=client,
            worker=_worker(worker),
            memory=memory,
            block=block,
            extend=extend,
            allow_code_change=allow_code_change,
            code_version=fields.get("code_version"),
            progress=output.talks,
            **specs.arguments(fields),
        )
    _print_summary(store, summary.load(store), output)
    return 0


# tyro makes the help from the docstring, which has to list the fields of a spec. They are written
# once, in `spec.FIELDS`.
sweep.__doc__ = inspect.cleandoc(sweep.__doc__ or "").replace(
    "\n\nArgs:", f"\n\nFields of a spec:\n{specs.fields_text()}\n\nArgs:", 1
)


def _worker(text: str | None) -> tuple[int, int] | str | None:
    """The pair (3, 16) of "3/16"; "slurm" and None stay."""
    if text in (None, SLURM):
        return text
    number, slash, count = text.partition("/")
    # int() would also accept signs, spaces and underscores.
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise ValueError(
            f"--worker takes k/n, such as 3/16, or slurm in an array job, got {text!r}"
        )
    return int(number), int(count)


def status(store: Store, check: bool = False, output: Output = TALKS) -> int:
    """Show the progress of a sweep, lost chunks, and the workers that share it.

    Args:
        store: a store of `negmaml sweep`.
        check: read every chunk and verify its checksum; the exit status is 1 if any is lost. The
            same command of `negmaml sweep` computes lost cells again.
        output: the form of the output.
    """
    require("zarr", "sweep")
    found = sweeps.status(store, check=check)
    # Without --check no contents were read, so the status cannot vouch for them.
    code = int(check and bool(found.lost))
    if output.record({"store": store, **found.record()}):
        return code
    _print_rows(store, found.rows())
    if found.workers:
        columns = "process", "worker", "blocks", "last heartbeat"
        print_table(columns, [worker.row() for worker in found.workers], "workers")
    for text in found.losses():
        say(f"lost: {text}")
    return code


def merge(stores: Stores, store: str, output: Output = TALKS) -> int:
    """Merge stores of the same sweep into one.

    Args:
        stores: the stores; they are only read.
        store: path or URL of the result.
        output: the form of the output.
    """
    if not stores:
        raise ValueError("merge takes the stores that are merged: negmaml merge a.zarr b.zarr ...")
    require("xarray", "sweep")
    require("zarr", "sweep")
    _print_summary(store, sweeps.merge(stores, store, progress=output.talks), output)
    return 0


def _print_summary(store: str, dataset, output: OutputOptions) -> None:
    """Print the cells and the range of every variable of a store."""
    if not output.record({"store": store, **summary.record(dataset)}):
        _print_rows(store, summary.rows(dataset))


def _print_rows(title: str, rows) -> None:
    print_table(("what", "value"), rows, title)


def heatmap(
    store: Store,
    x: str,
    y: str,
    value: str | None = None,
    argmin: str | None = None,
    select: Selection = (),
    out: Path | None = None,
    output: Output = TALKS,
) -> int:
    """Plot the mean over seeds, or its argmin along an axis, as a heatmap.

    Args:
        store: a store of `negmaml sweep`, finished or not.
        x: an axis, or a product or quotient of coordinates over one axis, as n_t/p.
        y: another axis, or a product or quotient over it.
        value: the variable; by default the only one, or test_loss.
        argmin: plot the value of this axis at which the mean is least.
        select: values of the other axes, as in --select sigma=1.0.
        out: path of the figure without suffix; by default next to the store.
        output: the form of the output.
    """
    with _figure_file(store, out, "heatmap") as path:
        dataset = summary.select(summary.load(store), _pairs(select))
        across, up = summary.quantity(dataset, x), summary.quantity(dataset, y)
        # Two coordinates of one zipped axis cannot span a plane.
        if across.dims == up.dims:
            raise ValueError(f"--x {x} and --y {y} vary along the same axis, {across.dims[0]}")
        value = summary.variable(dataset, value)
        # All other axes must have been selected.
        keep = [across.dims[0], up.dims[0], *([argmin] if argmin else [])]
        means, _ = summary.mean(dataset, value, keep)
        if argmin:
            means = summary.argmin(means, argmin)
        label = f"best {argmin}" if argmin else f"mean {value}"
        # xarray may order dims otherwise; the image has a row for each y.
        means = means.transpose(up.dims[0], across.dims[0])
        figure = figures.heat_map(across.values, up.values, means.values, (x, y, label))
        paths = plotting.save(figure, path.parent, path.name)
    return _drawn(paths, output)


def curves(
    store: Store,
    x: str,
    hue: str | None = None,
    value: str | None = None,
    select: Selection = (),
    out: Path | None = None,
    output: Output = TALKS,
) -> int:
    """Plot the mean over seeds along one axis, with a band of two standard errors.

    Args:
        store: a store of `negmaml sweep`, finished or not.
        x: an axis, or a product or quotient of coordinates over one axis.
        hue: another axis, with a curve for each of its values.
        value: the variable; by default the only one, or test_loss.
        select: values of the other axes, as in --select sigma=1.0.
        out: path of the figure without suffix; by default next to the store.
        output: the form of the output.
    """
    with _figure_file(store, out, "curves") as path:
        dataset = summary.select(summary.load(store), _pairs(select))
        across, value = summary.quantity(dataset, x), summary.variable(dataset, value)
        means, errors = summary.mean(dataset, value, [across.dims[0], *([hue] if hue else [])])
        lines, values = {}, means[hue].values.tolist() if hue else ()
        for i in range(means.sizes[hue] if hue else 1):
            at = {hue: i} if hue else {}
            held = means[hue].values[i] if hue else 0
            # Static axes may hold strings, which have no number format.
            held = held if isinstance(held, str) else f"{held:g}"
            lines[f"{hue} = {held}" if hue else ""] = means.isel(at).values, errors.isel(at).values
        figure = figures.curves(across.values, lines, (x, f"mean {value}"), values)
        paths = plotting.save(figure, path.parent, path.name)
    return _drawn(paths, output)


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise ValueError(f"--select takes axis=value, got {name + equals + value!r}")
    return {name: value for name, _, value in pairs}


@contextmanager
def _figure_file(store: str, out: Path | None, kind: str) -> Iterator[Path]:
    """Yield the path of a figure without suffix, in a folder that can be written."""
    if out is None:
        # Figures of remote stores go to the current folder.
        local = local_path(store) is not None
        path = expanded("store", store.rpartition("://")[2]) if local else Path(store.rstrip("/"))
        out = path.with_name(f"{path.stem}-{kind}") if local else Path(f"{path.stem}-{kind}")
    out = expanded("--out", out)
    with writable_folder(out.parent) as folder:
        yield folder / out.name


def _drawn(paths: list[Path], output: OutputOptions) -> int:
    if not output.record({"files": paths}):
        output.written(paths)
    return 0
