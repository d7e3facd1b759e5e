"""Parquet files laid out as the hub's CIFAR-10, whole and damaged."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encoded, huge_png, pictures, write

from s2ap_ext.data import load_data, load_parquet

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")

CIFAR10 = os.environ.get("S2AP_CIFAR10_DIR")  # a folder with the real files


@pytest.fixture
def folder(tmp_path):
    """Ten training and four test images under the plain names."""
    write(tmp_path / "train.parquet", [encoded(p) for p in pictures(10)], range(10))
    write(tmp_path / "test.parquet", [encoded(p) for p in pictures(4, seed=1)], [0, 9, 3, 3])
    return tmp_path


def test_cifar_layout(folder):
    cifar = load_data("uoft-cs/cifar10", data_dir=folder)
    assert cifar.name == "uoft-cs/cifar10"
    assert cifar.shape == (3, 32, 32)
    assert cifar.num_classes == 10
    assert cifar.classes[0] == "airplane"
    assert cifar.classes[9] == "truck"
    assert cifar.train.images.dtype == torch.uint8
    assert cifar.train.images.is_contiguous()
    assert torch.equal(cifar.train.images, torch.from_numpy(pictures(10)).permute(0, 3, 1, 2))
    assert torch.equal(cifar.test.images, torch.from_numpy(pictures(4, seed=1)).permute(0, 3, 1, 2))
    assert cifar.train.labels.tolist() == list(range(10))
    assert cifar.test.labels.tolist() == [0, 9, 3, 3]
    assert torch.equal(cifar.train.floats(), cifar.train.images.float() / 255)


def test_jpeg_and_grey_images(tmp_path):
    smooth = np.broadcast_to(np.linspace(0, 255, 16, dtype=np.uint8)[:, None, None], (16, 16, 3)).copy()
    for split in ("train", "test"):
        write(tmp_path / "jpeg" / f"{split}.parquet", [encoded(smooth, "JPEG")], [0])
        write(tmp_path / "grey" / f"{split}.parquet", [encoded(smooth[:, :, 0])], [0])
    jpeg, grey = load_parquet(tmp_path / "jpeg"), load_parquet(tmp_path / "grey")
    assert (jpeg.train.images.permute(0, 2, 3, 1)[0].int() - torch.from_numpy(smooth).int()).abs().max() < 12
    assert torch.equal(grey.train.images[0, 0], torch.from_numpy(smooth[:, :, 0]))
    assert grey.name == "grey"


def test_hub_layout_with_shards_and_names(tmp_path):
    names, below = ["cat", "dog"], tmp_path / "plain_text"
    for i in range(2):
        write(below / f"train-{i:05d}-of-00002.parquet", [encoded(p) for p in pictures(5, seed=i)], [i] * 5, "image", names)
    write(below / "test-00000-of-00001.parquet", [encoded(p) for p in pictures(2)], [0, 0], "image", names)
    pets = load_data("someone/pets", data_dir=tmp_path)
    assert pets.classes == ("cat", "dog")
    assert pets.train.labels.tolist() == [0] * 5 + [1] * 5
    assert torch.equal(pets.train.images[5:], torch.from_numpy(pictures(5, seed=1)).permute(0, 3, 1, 2))
    limited = load_data("someone/pets", data_dir=tmp_path, limit=7, test_limit=1)
    assert limited.train.labels.tolist() == [0] * 5 + [1] * 2
    assert len(limited.test) == 1


def test_without_names_labels_are_counted(tmp_path):
    write(tmp_path / "train.parquet", [encoded(p) for p in pictures(3)], [0, 6, 1])
    write(tmp_path / "test.parquet", [encoded(p) for p in pictures(1)], [0])
    assert load_data("someone/things", data_dir=tmp_path, limit=1).classes == tuple("0123456")


def test_limit_reads_no_further(folder):
    write(folder / "train.parquet", [encoded(p) for p in pictures(3)] + [b"broken"], [0, 1, 2, 3])
    assert len(load_parquet(folder, classes=tuple("0123456789"), limit=3).train) == 3
    with pytest.raises(ValueError, match=r"train.parquet, row 3: not a readable image"):
        load_parquet(folder, classes=tuple("0123456789"), limit=4)


@pytest.mark.parametrize(
    ("cell", "label", "message"),
    [
        (b"\x89PNG\r\n\x1a\n nothing", 1, r"row 2: not a readable image"),
        (encoded(pictures(1)[0], "JPEG")[:-200], 1, r"row 2: not a readable image .*truncated"),
        ({"bytes": None, "path": "cat.png"}, 1, r"row 2: expected the bytes of an image, got none"),
        (None, 1, r"row 2: expected the bytes of an image, got none"),
        (encoded(pictures(1, shape=(16, 32, 3))[0]), 1, r"row 2: .*\(C, H, W\) = \(3, 32, 32\), got one of \(3, 16, 32\)"),
        (encoded(pictures(1)[0]), 10, r"row 2: expected a label from 0 to 9, got 10"),
        (encoded(pictures(1)[0]), -1, r"row 2: expected a label from 0 to 9, got -1"),
        (encoded(pictures(1)[0]), None, r"row 2: expected a label from 0 to 9, got None"),
    ],
)
def test_bad_rows(folder, cell, label, message):
    good = [encoded(p) for p in pictures(2)]
    write(folder / "train.parquet", [*good, cell], [0, 1, label])
    with pytest.raises(ValueError, match=r"train.parquet, " + message):
        load_data("uoft-cs/cifar10", data_dir=folder)


def test_test_images_must_fit_the_training_images(folder):
    write(folder / "test.parquet", [encoded(p) for p in pictures(1, shape=(28, 28, 3))], [0])
    with pytest.raises(ValueError, match=r"test.parquet, row 0: expected an image of shape .* \(3, 32, 32\)"):
        load_data("uoft-cs/cifar10", data_dir=folder)


@pytest.mark.parametrize("size", [0, 3, 500, -20])
def test_damaged_parquet(folder, size):
    path = folder / "train.parquet"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"train.parquet: not a readable parquet file"):
        load_data("uoft-cs/cifar10", data_dir=folder)


def test_parquet_damaged_inside(folder):
    path = folder / "train.parquet"
    content = bytearray(path.read_bytes())
    content[4:3000] = bytes(2996)  # the footer stays, the first pages are gone
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train.parquet: truncated or corrupt"):
        load_data("uoft-cs/cifar10", data_dir=folder)


def test_missing_columns(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"pixels": [1.0], "label": [0]}), folder / "train.parquet")
    with pytest.raises(ValueError, match=r"train.parquet: expected the columns img: struct.* found pixels: double, label: int64"):
        load_data("uoft-cs/cifar10", data_dir=folder)
    write(folder / "train.parquet", [], [])
    with pytest.raises(ValueError, match=r"train.parquet: no rows"):
        load_data("uoft-cs/cifar10", data_dir=folder)


def test_wrong_folders(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; expected train.parquet"):
        load_data("uoft-cs/cifar10", data_dir=empty / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no train split; expected train.parquet .*; found nothing"):
        load_data("uoft-cs/cifar10", data_dir=empty)
    (empty / "data_batch_1").touch()
    with pytest.raises(FileNotFoundError, match=r"no train split; .* found data_batch_1"):
        load_data("uoft-cs/cifar10", data_dir=empty)
    (folder / "test.parquet").rename(folder / "train-00000-of-00002.parquet")
    with pytest.raises(FileNotFoundError, match=r"expected one complete train split, .* found .*-of-00002.parquet, train.parquet"):
        load_data("uoft-cs/cifar10", data_dir=folder)
    (folder / "train.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected one complete train split, of 2 file\(s\)"):
        load_data("uoft-cs/cifar10", data_dir=folder)


def test_from_the_hub(folder, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot_download(repo_id, *, repo_type, allow_patterns):
        asked.append((repo_id, repo_type))
        names = ["plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet", "README.md"]
        assert list(hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns)) == names[:2]
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert len(load_data("uoft-cs/cifar10", limit=6).train) == 6
    assert asked == [("uoft-cs/cifar10", "dataset")]


def test_hub_out_of_reach(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def snapshot_download(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    message = r"could not get uoft-cs/cifar10 from the Hugging Face hub \(OSError: Name .*--data-dir"
    with pytest.raises(ConnectionError, match=message):
        load_data("uoft-cs/cifar10")


@pytest.mark.parametrize(
    ("module", "package", "arguments"),
    [
        ("safetensors", "safetensors", {"name": "digits"}),
        ("pyarrow", "pyarrow", {"name": "uoft-cs/cifar10", "data_dir": "FOLDER"}),
        ("PIL", "pillow", {"name": "uoft-cs/cifar10", "data_dir": "FOLDER"}),
        ("huggingface_hub", "huggingface_hub", {"name": "uoft-cs/cifar10"}),
    ],
)
def test_missing_packages(folder, monkeypatch, module, package, arguments):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else real(name))
    arguments = {key: folder if value == "FOLDER" else value for key, value in arguments.items()}
    with pytest.raises(ImportError, match=rf'{package} missing; .* pip install "s2ap_ext\[train\]"'):
        load_data(**arguments)


@pytest.mark.skipif(not CIFAR10, reason="S2AP_CIFAR10_DIR names no folder with the real CIFAR-10 in parquet files")
def test_real_cifar10():
    cifar = load_data("uoft-cs/cifar10", data_dir=Path(CIFAR10), limit=2000, test_limit=500)
    assert cifar.shape == (3, 32, 32)
    assert (len(cifar.train), len(cifar.test)) == (2000, 500)
    assert cifar.train.labels.bincount(minlength=10).min() > 100
    stream = load_data("cifar10", data_dir=Path(CIFAR10), limit=300, stream="always", workers=2).train
    assert torch.equal(torch.cat([x for x, _ in stream.read(torch.arange(300), 64)]), cifar.train.images[:300])
    mean = cifar.train.floats().mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), rtol=0, atol=0.02)


@pytest.mark.filterwarnings("default")  # as in a program of the user's
@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_absurd_sizes_are_refused_from_the_header(folder, size, monkeypatch):
    image_module = pytest.importorskip("PIL.Image")
    write(folder / "test.parquet", [huge_png(*size)], [0])
    with pytest.raises(ValueError, match=r"test.parquet, row 0: not a readable image"):
        load_parquet(folder)
    write(folder / "train.parquet", [huge_png(*size)], [0])
    monkeypatch.setattr(image_module.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"train.parquet, row 0: not a readable image"):
        load_parquet(folder, classes=("thing",))


def test_an_image_of_another_size_is_not_decoded(folder):
    """A megabyte of PNG can hold gigabytes of pixels: what does not fit the others is refused by its header."""
    write(folder / "test.parquet", [huge_png(8_000, 8_000)], [0])
    with pytest.raises(ValueError, match=r"test.parquet, row 0: expected an image of shape .* \(3, 32, 32\), got one of \(3, 8000, 8000\)"):
        load_parquet(folder)


# -------------------------------------------------------------------------------------------------------------- columns and labels


@pytest.mark.parametrize("twice", ["img", "label"])
def test_a_column_that_is_there_twice(folder, twice):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "train.parquet")
    columns, names = [*table.columns, table.column(twice)], [*table.column_names, twice]
    pq.write_table(pa.Table.from_arrays(columns, names=names), folder / "train.parquet")
    with pytest.raises(ValueError, match=rf"train.parquet: expected one column {twice}, found 2"):
        load_data("uoft-cs/cifar10", data_dir=folder)


@pytest.mark.parametrize("label", [65_536, 2**40])
def test_labels_without_names_are_bounded(folder, label):
    write(folder / "train.parquet", [encoded(p) for p in pictures(7)], [0, 1, 2, 3, 4, label, 3])
    with pytest.raises(ValueError, match=rf"train.parquet, row 5: expected a label from 0 to 65535, got {label}"):
        load_parquet(folder)


def test_stored_names_that_are_none_are_not_taken(folder):
    write(folder / "train.parquet", [encoded(p) for p in pictures(3)], [0, 6, 1], names="not a list of names")
    assert load_parquet(folder).classes == tuple("0123456789")
