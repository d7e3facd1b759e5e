"""Digits, parquet files laid out as the hub's CIFAR-10, batches and augmentation."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from s2ap_ext import data
from s2ap_ext.data import Batches, Split, augmented, load_data, load_parquet, seeded_generator

CIFAR10 = os.environ.get("S2AP_CIFAR10_DIR")  # a folder with the real files


# ---------------------------------------------------------------------------------------------------------------------- digits


def test_digits():
    pytest.importorskip("sklearn")
    digits = load_data("digits")
    assert (len(digits.train), len(digits.test)) == (1438, 359)
    assert digits.shape == (1, 8, 8)
    assert digits.num_classes == 10
    assert digits.classes == tuple("0123456789")
    for split in (digits.train, digits.test):
        assert split.images.dtype == torch.float32
        assert split.labels.dtype == torch.int64
        assert split.images.min() == 0
        assert split.images.max() == 1
        assert torch.equal(split.images * 16, (split.images * 16).round()), "17 grey levels, exactly"
    share = digits.test.labels.bincount() / (digits.train.labels.bincount() + digits.test.labels.bincount())
    assert (share - 0.2).abs().max() < 0.003


def test_digits_are_all_of_them_split_once_and_for_all():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = load_data()
    bunch = datasets.load_digits()
    rows = torch.cat([digits.train.images, digits.test.images]).flatten(1) * 16
    rows = torch.cat([rows, torch.cat([digits.train.labels, digits.test.labels])[:, None]], dim=1)
    expected = np.concatenate([bunch.data, bunch.target[:, None]], axis=1)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))
    torch.manual_seed(5)
    again = load_data()
    assert torch.equal(again.test.images, digits.test.images)
    assert torch.equal(again.train.labels, digits.train.labels)
    # pinned: results of different versions of this package are measured on the same images
    assert digits.test.labels[:12].tolist() == [6, 5, 5, 7, 9, 9, 8, 4, 6, 8, 6, 0]


def test_digits_limits():
    pytest.importorskip("sklearn")
    whole, part = load_data(), load_data(limit=100, test_limit=20)
    assert (len(part.train), len(part.test)) == (100, 20)
    assert torch.equal(part.train.images, whole.train.images[:100])
    assert torch.equal(part.test.labels, whole.test.labels[:20])
    assert part.train.labels.bincount(minlength=10).min() > 0


# --------------------------------------------------------------------------------------------------------------------- parquet


def encoded(pixels, kind="PNG"):
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def pictures(n, seed=0, shape=(32, 32, 3)):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def write(path, cells, labels, image="img", names=None):
    """A parquet file as the hub's: an image struct, a label, and perhaps the class names in the metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [cell if cell is None or isinstance(cell, dict) else {"bytes": cell, "path": None} for cell in cells]
    table = pa.table({image: pa.array(rows, struct), "label": pa.array(labels, pa.int64())})
    if names:
        features = {image: {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=4)


@pytest.fixture(autouse=True)
def _needs_extras(request):
    if "folder" in request.fixturenames:
        pytest.importorskip("pyarrow")
        pytest.importorskip("PIL")


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
    pytest.importorskip("pyarrow")
    smooth = np.broadcast_to(np.linspace(0, 255, 16, dtype=np.uint8)[:, None, None], (16, 16, 3)).copy()
    for split in ("train", "test"):
        write(tmp_path / "jpeg" / f"{split}.parquet", [encoded(smooth, "JPEG")], [0])
        write(tmp_path / "grey" / f"{split}.parquet", [encoded(smooth[:, :, 0])], [0])
    jpeg, grey = load_parquet(tmp_path / "jpeg"), load_parquet(tmp_path / "grey")
    assert (jpeg.train.images.permute(0, 2, 3, 1)[0].int() - torch.from_numpy(smooth).int()).abs().max() < 12
    assert torch.equal(grey.train.images[0, 0], torch.from_numpy(smooth[:, :, 0]))
    assert grey.name == "grey"


def test_hub_layout_with_shards_and_names(tmp_path):
    pytest.importorskip("pyarrow")
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
    pytest.importorskip("pyarrow")
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
        (encoded(pictures(1, shape=(16, 32, 3))[0]), 1, r"row 2: .*\(C, H, W\) = \(3, 32, 32\), got one of \(16, 32, 3\)"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnist"}, "data: expected digits or the name of a set on the hub, such as uoft-cs/cifar10, got 'mnist'"),
        ({"name": "digits", "data_dir": "."}, "data_dir: expected none, the digits come with scikit-learn"),
        ({"name": "digits", "limit": 0}, "limit: expected an integer >= 1, got 0"),
        ({"name": "digits", "test_limit": -5}, "test_limit: expected an integer >= 1, got -5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_data(**arguments)


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
        ("sklearn.datasets", "scikit-learn", {"name": "digits"}),
        ("pyarrow.parquet", "pyarrow", {"name": "uoft-cs/cifar10", "data_dir": "FOLDER"}),
        ("PIL.Image", "Pillow", {"name": "uoft-cs/cifar10", "data_dir": "FOLDER"}),
        ("huggingface_hub", "huggingface_hub", {"name": "uoft-cs/cifar10"}),
    ],
)
def test_missing_packages(folder, monkeypatch, module, package, arguments):
    real = data.importlib.import_module

    def without(name):
        if name == module:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name)

    monkeypatch.setattr(data.importlib, "import_module", without)
    arguments = {key: folder if value == "FOLDER" else value for key, value in arguments.items()}
    with pytest.raises(ImportError, match=rf'{package} is needed .* pip install "s2ap_ext\[train\]"'):
        load_data(**arguments)


@pytest.mark.skipif(not CIFAR10, reason="S2AP_CIFAR10_DIR names no folder with the real CIFAR-10 in parquet files")
def test_real_cifar10():
    cifar = load_data("uoft-cs/cifar10", data_dir=Path(CIFAR10), limit=2000, test_limit=500)
    assert cifar.shape == (3, 32, 32)
    assert (len(cifar.train), len(cifar.test)) == (2000, 500)
    assert cifar.train.labels.bincount(minlength=10).min() > 100
    mean = cifar.train.floats().mean((0, 2, 3))
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), rtol=0, atol=0.02)


# --------------------------------------------------------------------------------------------------------------------- batches


def numbered(n, dtype=torch.uint8):
    """Images whose every pixel says which one it is."""
    images = torch.arange(n).view(n, 1, 1, 1).expand(n, 1, 4, 4).clone()
    return Split(images.to(dtype) if dtype == torch.uint8 else images / 255, torch.arange(n))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_batches_in_order(dtype):
    batches = Batches(numbered(10, dtype), 4, shift=2, flip=True)
    assert len(batches) == 3
    got = list(batches)
    assert [len(y) for _, y in got] == [4, 4, 2]
    images, labels = torch.cat([x for x, _ in got]), torch.cat([y for _, y in got])
    assert torch.equal(labels, torch.arange(10))
    assert images.dtype == torch.float32
    assert torch.equal(images, numbered(10).floats())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_epochs_are_shuffles(dtype):
    batches = Batches(numbered(100, dtype), 32, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        got = list(batches.epoch(epoch))
        assert [len(y) for _, y in got] == [32, 32, 32, 4]
        order = torch.cat([y for _, y in got])
        assert torch.equal(order.sort().values, torch.arange(100))
        assert torch.equal(torch.cat([x for x, _ in got])[:, 0, 2, 1], order.float() / 255)
        orders.append(order)
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])
    other = torch.cat([y for _, y in Batches(numbered(100), 32, seed=4).epoch(0)])
    assert not torch.equal(orders[0], other)


def test_epochs_are_reproducible_and_draw_nothing_from_torch():
    split = Split(torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8), torch.arange(50))
    state = torch.get_rng_state()
    first, second = (list(Batches(split, 16, seed=1, shift=2, flip=True).epoch(7)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for (x, y), (x_again, y_again) in zip(first, second, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmented_is_crop_and_flip(dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 6, 5), generator=generator).to(dtype)
    shifts = torch.randint(-4, 5, (40, 2), generator=generator)
    flips = torch.rand(40, generator=generator) < 0.5
    expected = []
    for image, (dy, dx), flip in zip(F.pad(images, (4, 4, 4, 4)), shifts.tolist(), flips.tolist(), strict=True):
        crop = image[:, 4 + dy : 10 + dy, 4 + dx : 9 + dx]
        expected.append(crop.flip(2) if flip else crop)
    ours = augmented(images, shifts, flips)
    assert ours.dtype == dtype
    assert torch.equal(ours, torch.stack(expected))


def test_augmentation_covers_its_range():
    """A single bright pixel in the middle must reach each position within the shift, equally often."""
    images = torch.zeros(9000, 1, 5, 5)
    images[:, :, 2, 2] = 1
    split = Split(images, torch.zeros(9000, dtype=torch.long))
    seen = sum(x.sum((0, 1)) for x, _ in Batches(split, 1000, shift=1).epoch(0))
    assert seen.sum() == 9000
    assert torch.equal(seen[1:4, 1:4] > 850, torch.ones(3, 3, dtype=torch.bool))

    images[:] = 0
    images[:, :, :, 0] = 1
    left = sum(x[:, 0, 0, 0].sum() for x, _ in Batches(split, 1000, flip=True).epoch(0))
    assert 4300 < left < 4700


def test_batches_convert_and_never_alias_training_data():
    split = numbered(8, torch.float32)
    before = split.images.clone()
    for x, _ in Batches(split, 4, seed=0).epoch(0):
        x.zero_()
    assert torch.equal(split.images, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"shift": -1}, "shift: expected an integer >= 0, got -1"),
        ({"split": numbered(0)}, "split: number of images: expected an integer >= 1, got 0"),
    ],
)
def test_batches_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batches(**{"split": numbered(4), "batch_size": 2, **arguments})


def test_seeded_generator():
    def numbers(*key):
        return torch.rand(4, generator=seeded_generator(*key)).tolist()

    assert numbers(1, 2, 3) == numbers(1, 2, 3)
    assert len({tuple(numbers(*key)) for key in [(0,), (1,), (0, 1), (1, 0), (1, 1), (11,), (1, 0, 0)]}) == 7
