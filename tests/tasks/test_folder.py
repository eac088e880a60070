"""Images from folders, one a class."""

import jax
import numpy as np
import pytest

import negmaml as nm

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def root(tmp_path):
    """Three classes, one of them two folders deep, with two images of one colour each."""
    for number, name in enumerate(("b", "a", "Greek/alpha")):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for i in range(2):
            colour = (50 * number, 10 * i, 200)
            Image.new("RGB", (6, 4), colour).save(folder / f"{i}.png")
        (folder / "notes.txt").write_text("no image")
    return tmp_path


def test_labels_are_folders_and_rows_are_sorted(root):
    images, labels = nm.tasks.image_folder(root)
    assert images.shape == (6, 4, 6, 3) and images.dtype == np.uint8
    assert labels.tolist() == ["Greek/alpha"] * 2 + ["a"] * 2 + ["b"] * 2
    assert images[:, 0, 0].tolist() == [
        [100, 0, 200], [100, 10, 200], [50, 0, 200], [50, 10, 200], [0, 0, 200], [0, 10, 200]
    ]  # fmt: skip
    draw = nm.tasks.Episodes(images, labels, ways=2, shots=1, queries=1, m=2)
    assert draw(jax.random.key(0)).support[0].shape == (2, 2, 4, 6, 3)


def test_images_are_resized_and_grey(root):
    assert nm.tasks.image_folder(root, size=(3, 5), mode="L")[0].shape == (6, 3, 5, 1)
    assert nm.tasks.image_folder(root, size=8)[0].shape == (6, 8, 8, 3)


def test_bad_files_are_named(root):
    Image.new("RGB", (5, 5)).save(root / "a" / "large.png")
    with pytest.raises(ValueError, match=r"size must be given.*1 of 7 unlike.*a/large\.png"):
        nm.tasks.image_folder(root)
    (root / "b" / "broken.png").write_text("no image")
    with pytest.raises(ValueError, match=r"1 of 8 that are not: b/broken\.png"):
        nm.tasks.image_folder(root, size=4)


def test_wrong_arguments_raise(root, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for call, message in (
        (lambda: nm.tasks.image_folder(root / "none"), "path must be a folder"),
        (lambda: nm.tasks.image_folder(empty), "path must hold folders of images"),
        (lambda: nm.tasks.image_folder(root, size=(1, 2, 3)), "size must be"),
        (lambda: nm.tasks.image_folder(root, mode="CMYK"), "mode must be one of 'RGB', 'L'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
