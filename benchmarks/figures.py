"""Redraw the figures of README.md that commands draw, and save their numbers.

    python benchmarks/figures.py [reproduction phases gain_map phase_map]

Writes NAME.png and NAME.npz next to this file. A test compares the numbers with current results of
the package, so that no figure is out of date.
"""

import subprocess
import sys
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory

import numpy as np
import xarray as xr

HERE = Path(__file__).parent
MAP_STEP = 8  # of the 200 x 200 cells of a phase diagram, every eighth along each axis is kept
FIGURES = {
    "reproduction": [["reproduce"]],
    "phases": [["phases"]],
    "gain_map": [["gain-map"]],
    "phase_map": [
        ["sweep", "phase_map", "--store", "phase_map.zarr"],
        ["heatmap", "phase_map.zarr", "--x", "n_t/p", "--y", "n_v*m/p", "--argmin", "train_rate",
         "--out", "phase_map/phase_map"],
    ],
}  # fmt: skip


def draw(name: str, folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Draw a figure by its commands in `folder`; returns the picture and its numbers."""
    for command in FIGURES[name]:
        subprocess.run([sys.executable, "-m", "negmaml", *command], cwd=folder, check=True)
    return folder / name / f"{name}.png", numbers(name, folder)


def numbers(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The numbers in a figure, without those of single runs."""
    if name == "phase_map":
        with xr.open_zarr(folder / "phase_map.zarr") as data:
            best = data.test_loss.mean("seed").idxmin("train_rate")
            return {"best": best.transpose("n_t", "m", ...).values.astype(np.float32)}
    with xr.open_dataset(folder / name / f"{name}.nc") as data:
        thin = {dim: slice(None, None, MAP_STEP) for dim, size in data.sizes.items() if size == 200}
        data = data.drop_dims(["run_a", "run_b"], errors="ignore").isel(thin)
        return {
            key: values.values if key in data.coords else values.values.astype(np.float32)
            for key, values in data.variables.items()
            if values.dtype.kind == "f"
        }


if __name__ == "__main__":
    for name in sys.argv[1:] or FIGURES:
        with TemporaryDirectory() as folder:
            picture, found = draw(name, Path(folder))
            copyfile(picture, HERE / f"{name}.png")
            np.savez_compressed(HERE / f"{name}.npz", **found)
