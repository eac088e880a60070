"""Images from a folder, one folder a class."""

import os
from pathlib import Path

import numpy as np

from negmaml._core.calls import explain_calls
from negmaml._core.checks import check_choice, check_count, short_repr
from negmaml._core.extras import require

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@explain_calls
def image_folder(
    path: str | os.PathLike[str], *, size: int | tuple[int, int] | None = None, mode: str = "RGB"
) -> tuple[np.ndarray, np.ndarray]:
    """Return (images, labels) of a folder with one folder of images for each class.

    Arguments:
        path: the folder. A class is any folder below it that holds images; its label is its path
            within the folder, such as "Greek/alpha".
        size: (height, width) or one number, to which images are resized. By default they must have
            one size.
        mode: "RGB", or "L" for shades of grey.

    Images are uint8 of shape (rows, height, width, channels), sorted by label and name of the file.
    Files with other suffixes than those of images are ignored, and so are hidden ones. Needs
    pillow: pip install "negmaml[images]". Raises ValueError for a folder without images, and for
    files that are no image or, without `size`, of another size than the first; it names them.

    >>> import negmaml as nm, numpy as np
    >>> from PIL import Image
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     for label in ("alpha", "beta"):
    ...         Path(folder, label).mkdir()
    ...         Image.new("L", (8, 8)).save(Path(folder, label, "1.png"))
    ...     images, labels = nm.tasks.image_folder(folder, size=4, mode="L")
    >>> images.shape, labels.tolist()
    ((2, 4, 4, 1), ['alpha', 'beta'])
    """
    check_choice("mode", mode, ("RGB", "L"))
    height_width = _check_size(size)
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"path must be a folder with one folder a class, got {short_repr(path)}")
    files = sorted(
        (file for file in root.rglob("*") if _is_image(file.relative_to(root))),
        key=lambda file: (file.parent.relative_to(root).as_posix(), file.name),
    )
    if not files:
        raise ValueError(
            f"path must hold folders of images ({', '.join(sorted(SUFFIXES))}), got none in "
            f"{short_repr(path)}"
        )
    images, bad = [], []
    for file in files:
        try:
            images.append(_read(file, height_width, mode))
        except (OSError, ValueError, SyntaxError) as error:  # the errors of pillow
            bad.append(f"{file.relative_to(root)} ({error})")
    if bad:
        raise ValueError(
            f"path must hold readable images, got {len(bad)} of {len(files)} that are not: "
            f"{'; '.join(bad[:5])}; remove or repair them"
        )
    others = [f for f, x in zip(files, images, strict=True) if x.shape != images[0].shape]
    if others:
        first = "x".join(map(str, images[0].shape[:2]))
        raise ValueError(
            f"size must be given for images of several sizes, got {len(others)} of {len(files)} "
            f"unlike the first, {first}: {', '.join(str(f.relative_to(root)) for f in others[:5])}"
        )
    return np.stack(images), np.array([f.parent.relative_to(root).as_posix() for f in files])


def _is_image(file: Path) -> bool:
    """Return whether a path within the folder is an image of a class."""
    hidden = any(part.startswith(".") for part in file.parts)
    return len(file.parts) > 1 and file.suffix.lower() in SUFFIXES and not hidden


def _read(file: Path, size, mode: str) -> np.ndarray:
    """Return one image as uint8 (height, width, channels)."""
    image_module = require("PIL.Image", "images")
    with image_module.open(file) as opened:
        image = opened.convert(mode)
        if size is not None:
            image = image.resize(size[::-1], image_module.Resampling.BILINEAR)
        pixels = np.asarray(image, np.uint8)
    return pixels[..., None] if mode == "L" else pixels


def _check_size(size) -> tuple[int, int] | None:
    """Return (height, width), or None."""
    if size is None:
        return None
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"size must be (height, width) or one number, got {short_repr(size)}")
    height, width = (check_count("size", value) for value in pair)
    return height, width
