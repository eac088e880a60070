"""Draw the figures of README.md and of the guides, and save their numbers.

    python benchmarks/figures.py [reproduction phases gain_map phase_map features lazy ...]

Writes NAME.png next to this file, and the numbers of those that commands compute to NAME.npz.
`features` and `lazy` are drawn from the numbers that the scripts of these names saved. Tests
compare all numbers with current results of the package, so that no figure is out of date.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import diagrams
import features
import lazy
import numpy as np
import xarray as xr
from PIL import Image

from negmaml._core import plotting

HERE = Path(__file__).parent
MAP_STEP = 8  # of the 200 x 200 cells of a phase diagram, every eighth along each axis is kept
COMMANDS = {
    "reproduction": [["reproduce"]],
    "phases": [["phases"]],
    "gain_map": [["gain-map"]],
    "phase_map": [
        ["sweep", "phase_map", "--store", "phase_map.zarr"],
        ["heatmap", "phase_map.zarr", "--x", "n_t/p", "--y", "n_v*m/p", "--argmin", "train_rate",
         "--out", "phase_map/phase_map"],
    ],
}  # fmt: skip
SCRIPTS = {"features": features.draw, "lazy": lazy.draw}
NAMES = (*COMMANDS, *SCRIPTS, "negative_rate", "maml")


def draw(name: str, folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Draw a figure in `folder`; returns the picture and its numbers, if they are computed here."""
    if name in COMMANDS:
        for command in COMMANDS[name]:
            subprocess.run([sys.executable, "-m", "negmaml", *command], cwd=folder, check=True)
        return folder / name / f"{name}.png", numbers(name, folder)
    drawn, found = figure(name)
    return plotting.save(drawn, folder, name)[0], found


def figure(name: str):
    """Draw a figure that no command draws; returns it, and its numbers if it computes them."""
    if name in SCRIPTS:
        return SCRIPTS[name](np.load(HERE / f"{name}.npz")), {}
    if name == "maml":
        return diagrams.maml(), {}
    found = diagrams.negative_rate_numbers()
    return diagrams.negative_rate(found), found


def numbers(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The numbers in a figure of a command, without those of single runs."""
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


def main(names: list[str]) -> None:
    for name in names:
        with TemporaryDirectory() as folder:
            picture, found = draw(name, Path(folder))
            with Image.open(picture) as image:
                # A palette of 256 colours takes a third of the space; this choice of them keeps the
                # colours of thin lines.
                palette = {"method": Image.Quantize.MAXCOVERAGE, "dither": Image.Dither.NONE}
                small = image.convert("RGB").quantize(256, **palette)
                small.save(HERE / f"{name}.png", optimize=True)
        if found:
            np.savez_compressed(HERE / f"{name}.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1:] or list(NAMES))
