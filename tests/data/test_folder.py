"""Folders of image files, one for each class."""

import shutil

import pytest
import torch
from image_files import encoded, pictures, write_folders

from s2ap_ext.data import Batches, Split, Stream, load_data

pytest.importorskip("PIL")

CLASSES = ("ant", "bee", "cow")


def test_images_of_one_size_are_held_in_memory(tmp_path):
    write_folders(tmp_path, CLASSES, splits=("train", "test"), shape=(10, 8, 3))
    data = load_data("folder", data_dir=tmp_path)
    assert data.classes == CLASSES
    assert data.shape == (3, 10, 8)
    assert (len(data.train), len(data.test)) == (9, 9)
    assert isinstance(data.train, Split)
    for label in range(3):
        held = {image.numpy().tobytes() for image in data.train.images[data.train.labels == label]}
        assert held == {pictures(1, 10 * label + i, (10, 8, 3))[0].transpose(2, 0, 1).tobytes() for i in range(3)}


def test_images_of_any_size_are_cut_out_and_scaled(tmp_path):
    write_folders(tmp_path, CLASSES, splits=("train", "val"))
    data = load_data("folder", data_dir=tmp_path, size=8, workers=1)
    assert data.shape == (3, 8, 8)
    assert isinstance(data.train, Stream)
    assert isinstance(data.test, Split)
    batches = Batches(data.train, 4, seed=1)
    x, y = (torch.cat(parts) for parts in zip(*batches.epoch(0), strict=True))
    assert x.shape == (9, 3, 8, 8)
    assert y.sort().values.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert not torch.equal(x, torch.cat([x for x, _ in batches.epoch(1)]))


def test_the_first_images_are_of_all_classes_and_always_the_same(tmp_path):
    write_folders(tmp_path, CLASSES, each=12, shape=(4, 4, 3))
    part, again = (load_data("folder", data_dir=tmp_path, limit=12, test_limit=18) for _ in range(2))
    assert set(part.train.labels.tolist()) == set(part.test.labels.tolist()) == {0, 1, 2}
    assert torch.equal(part.train.images, again.train.images)
    assert torch.equal(part.train.images, load_data("folder", data_dir=tmp_path).train.images[:12])


def test_what_is_no_image_is_passed_over(tmp_path):
    write_folders(tmp_path, CLASSES, shape=(4, 4, 3))
    (tmp_path / "train/ant/notes.txt").write_text("hello")
    (tmp_path / "train/.cache").mkdir()
    (tmp_path / "train/list.csv").touch()
    (tmp_path / "train/bee/more").mkdir()
    data = load_data("folder", data_dir=tmp_path)
    assert len(data.train) == 9
    assert data.classes == CLASSES


def test_tiny_imagenets_archive(tmp_path):
    """There the images of a class lie one folder deeper."""
    write_folders(tmp_path, CLASSES, shape=(4, 4, 3))
    for name in CLASSES:
        (tmp_path / "train" / name).rename(tmp_path / "train" / "images")
        (tmp_path / "train" / name).mkdir()
        (tmp_path / "train" / "images").rename(tmp_path / "train" / name / "images")
        (tmp_path / "train" / name / f"{name}_boxes.txt").touch()
    assert len(load_data("folder", data_dir=tmp_path).train) == 9


def test_each_class_folder_has_a_checksum(tmp_path):
    write_folders(tmp_path, CLASSES, shape=(4, 4, 3))
    before = load_data("folder", data_dir=tmp_path).files.checksums
    assert list(before) == [f"{split}/{name}" for split in ("train", "val") for name in CLASSES]
    (tmp_path / "train/bee/1.png").write_bytes(encoded(pictures(1, 99, (4, 4, 3))[0]))
    after = load_data("folder", data_dir=tmp_path).files.checksums
    assert {name for name in before if before[name] != after[name]} == {"train/bee"}
    (tmp_path / "train/cow/1.png").rename(tmp_path / "train/cow/9.png")
    assert load_data("folder", data_dir=tmp_path).files.checksums["train/cow"] != after["train/cow"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda root: shutil.rmtree(root), FileNotFoundError, r"no such folder; expected train/CLASS/IMAGE"),
        (lambda root: shutil.rmtree(root / "val"), FileNotFoundError, r"no folder test; expected .*; found train$"),
        (lambda root: shutil.rmtree(root / "train"), FileNotFoundError, r"no folder train; expected .*; found val$"),
        (lambda root: (root / "val/dog").mkdir(), ValueError, r"val/dog: expected only classes that .*train has, found dog"),
        (
            lambda root: [shutil.rmtree(d) for d in (root / "train").iterdir()],
            FileNotFoundError,
            r"expected a folder for each class",
        ),
        (lambda root: [f.unlink() for f in root.glob("val/*/*")], FileNotFoundError, r"val: no images; expected files such as .*val/ant/1"),
        (lambda root: (root / "val/bee/0.png").write_bytes(b"x"), ValueError, r"val/bee/0.png: not a readable image"),
        (lambda root: (root / "val/bee/0.png").write_bytes(encoded(pictures(1)[0])), ValueError, r"val/bee/0.png: expected an image of sh"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, change, error, message):
    root = tmp_path / "images"
    write_folders(root, CLASSES, shape=(4, 4, 3))
    change(root)
    with pytest.raises(error, match=message):
        load_data("folder", data_dir=root)


def test_a_folder_must_be_named():
    with pytest.raises(ValueError, match=r"data folder: dir: expected the folder of the images \(--data-dir DIR\), got none"):
        load_data("folder")


def test_a_file_that_has_gone_is_named(tmp_path):
    write_folders(tmp_path, CLASSES)
    data = load_data("folder", data_dir=tmp_path, size=8, workers=1)
    (tmp_path / "train/ant/0.png").unlink()
    with pytest.raises(ValueError, match=r"train/ant/0.png: not a readable image \(No such file or directory\)"):
        list(Batches(data.train, 4))
