"""The sets of the literature by their short names, in files laid out as those of the hub."""

import pytest
import torch
from image_files import encoded, pictures, write

from s2ap_ext.data import Stream, load_data

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")


def cells(n, shape=(32, 32, 3), seed=0):
    return [encoded(p) for p in pictures(n, seed, shape)]


def test_cifar10(tmp_path):
    write(tmp_path / "plain_text/train-00000-of-00001.parquet", cells(4), [0, 9, 1, 2])
    write(tmp_path / "plain_text/test-00000-of-00001.parquet", cells(2), [3, 4])
    short, long = (load_data(name, data_dir=tmp_path) for name in ("cifar10", "uoft-cs/cifar10"))
    assert (short.name, long.name) == ("cifar10", "uoft-cs/cifar10")
    assert short.classes == long.classes
    assert short.classes[9] == "truck"
    assert torch.equal(short.train.images, long.train.images)


def test_cifar100_has_its_fine_labels(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [f"fine {i}" for i in range(100)]
    for split, n in (("train", 5), ("test", 3)):
        path = tmp_path / f"cifar100/{split}-00000-of-00001.parquet"
        write(path, cells(n), range(95, 95 + n), "img", names, "fine_label")
        table = pq.read_table(path)
        pq.write_table(table.append_column("coarse_label", pa.array([0] * n)), path)
    data = load_data("cifar100", data_dir=tmp_path)
    assert data.num_classes == 100
    assert data.classes[99] == "fine 99"
    assert data.train.labels.tolist() == [95, 96, 97, 98, 99]


def test_svhn_is_that_of_the_cropped_digits(tmp_path):
    for config, value in (("cropped_digits", 3), ("full_numbers", 7)):
        for split in ("train", "test", "extra"):
            write(tmp_path / config / f"{split}-00000-of-00001.parquet", cells(2), [value, value], "image")
    data = load_data("svhn", data_dir=tmp_path)
    assert data.train.labels.tolist() == data.test.labels.tolist() == [3, 3]
    assert data.classes == tuple("0123456789")
    assert torch.equal(load_data("svhn", data_dir=tmp_path / "cropped_digits").train.images, data.train.images)
    with pytest.raises(FileNotFoundError, match="expected one complete train split"):
        load_data("some/digits", data_dir=tmp_path)


def test_tiny_imagenet_is_tested_on_its_validation_split(tmp_path):
    for split in ("train", "valid"):
        write(tmp_path / f"data/{split}-00000-of-00001-1359597a978bc4fa.parquet", cells(6, (64, 64, 3)), [0, 0, 1, 1, 2, 2], "image")
    data = load_data("tiny_imagenet", data_dir=tmp_path)
    assert data.shape == (3, 64, 64)
    assert (len(data.train), len(data.test)) == (6, 6)
    assert data.classes == tuple("012")


def test_the_files_of_tiny_imagenet_are_sorted_by_class_and_what_is_read_is_not(tmp_path):
    labels = [i // 20 for i in range(80)]
    for split in ("train", "valid"):
        write(tmp_path / f"{split}.parquet", cells(80, (8, 8, 3)), labels, "image")
    data = load_data("tiny_imagenet", data_dir=tmp_path, limit=12, test_limit=12)
    assert (len(data.train), len(data.test)) == (12, 12)
    for split in (data.train, data.test):
        assert set(split.labels.tolist()) == {0, 1, 2, 3}
        for image, label in zip(split.images, split.labels.tolist(), strict=True):
            same = [i for i, p in enumerate(pictures(80, 0, (8, 8, 3))) if (p.transpose(2, 0, 1) == image.numpy()).all()]
            assert [labels[i] for i in same] == [label]


def test_imagenet_is_streamed_in_224_pixels_and_tested_on_its_validation_split(tmp_path):
    for split, label in (("train", 4), ("validation", 7), ("test", -1)):
        write(
            tmp_path / f"data/{split}-00000-of-00001.parquet", cells(2, (40, 60, 3)), [label, label], "image", [str(i) for i in range(10)]
        )
    data = load_data("imagenet", data_dir=tmp_path, workers=1)
    assert data.shape == (3, 224, 224)
    assert isinstance(data.train, Stream)
    assert (data.train.decoder.fit.resize, data.train.decoder.fit.scale) == (256, 0.08)
    assert data.test.labels.tolist() == [7, 7]
    assert sorted(data.files.checksums) == ["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"]


@pytest.mark.parametrize(
    ("name", "hub", "wanted", "files"),
    [
        ("svhn", "ufldl-stanford/svhn", {0, 1}, ["cropped_digits/train-0-of-1.parquet", "cropped_digits/test-0-of-1.parquet"]),
        ("svhn", "ufldl-stanford/svhn", set(), ["full_numbers/train-0-of-1.parquet", "cropped_digits/extra-0-of-2.parquet"]),
        (
            "imagenet",
            "ILSVRC/imagenet-1k",
            {0, 1},
            ["data/train-0-of-9.parquet", "data/validation.parquet", "data/test.parquet"],
        ),
        ("tiny_imagenet", "zh-plus/tiny-imagenet", {0, 1}, ["data/train-0-of-1-ab.parquet", "data/valid-0-of-1-ab.parquet"]),
        ("a/b", "a/b", {0, 1, 2}, ["train.parquet", "test.parquet", "validation.parquet", "README.md"]),
    ],
)
def test_only_what_is_used_is_downloaded(name, hub, wanted, files, monkeypatch, tmp_path):
    package = pytest.importorskip("huggingface_hub")

    def snapshot_download(repo_id, *, repo_type, allow_patterns):
        assert (repo_id, repo_type) == (hub, "dataset")
        assert list(package.utils.filter_repo_objects(files, allow_patterns=allow_patterns)) == [files[i] for i in sorted(wanted)]
        return str(tmp_path)

    monkeypatch.setattr(package, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match="no train split"):
        load_data(name)


def test_more_rows_than_the_file_has_bytes_are_refused(tmp_path):
    """The order of an epoch takes memory for each row, and rows of nothing take next to none in the file."""
    write(tmp_path / "train.parquet", [None] * 200_000, [0] * 200_000, group=200_000)
    write(tmp_path / "test.parquet", cells(2), [0, 1])
    with pytest.raises(ValueError, match=r"train.parquet: not a readable parquet file \(200,000 rows in [\d,]+ bytes\)"):
        load_data("some/thing", data_dir=tmp_path)
