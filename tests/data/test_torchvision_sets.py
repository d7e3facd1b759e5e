"""The data sets of torchvision, of which a module of the same form takes the place."""

import importlib.util
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import pictures

from s2ap_ext.data import Batches, Split, Stream, load_data
from s2ap_ext.parts import OWN, find

Image = pytest.importorskip("PIL.Image")


class CIFAR10:
    """Images in memory, the argument ``train``, names of the classes, a folder of its own."""

    base_folder = "cifar-batches"
    classes = ("cat", "dog")

    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        if not (Path(root) / self.base_folder / "batch").exists():
            raise RuntimeError("Dataset not found or corrupted.\n You can use download=True to download it")
        self.data = pictures(20 if train else 6, seed=train)
        self.targets = [i % 2 for i in range(len(self.data))]

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return Image.fromarray(self.data[i]), self.targets[i]


class SVHN(CIFAR10):
    """The argument ``split``, no names, NumPy's integers."""

    classes = None

    def __init__(self, root, split="train"):
        if split not in ("train", "test", "extra"):
            raise ValueError(f"Unknown value '{split}' for argument split.")
        super().__init__(root, split == "train")
        self.labels = np.arange(len(self.data)) % 10
        del self.targets

    def __getitem__(self, i):
        return Image.fromarray(self.data[i]), self.labels[i]


class ImageNet(CIFAR10):
    """Images of any size, a split that is called val, several names for each class."""

    classes = (("cat", "tabby"), ("dog",))

    def __init__(self, root, split="train"):
        if split not in ("train", "val"):
            raise ValueError(f"Unknown value '{split}' for argument split. Valid values are train, val.")
        super().__init__(root, split == "train")
        self.asked = split
        self.samples = [(str(Path(root) / "cifar-batches" / "batch"), 0)]

    def __getitem__(self, i):
        return Image.fromarray(self.data[i][: 20 + i % 9]), self.targets[i]


class Broken(CIFAR10):
    def __getitem__(self, i):
        return (Image.fromarray(self.data[i]), self.data[i]) if i % 2 else 1 / 0


class Places:
    def __init__(self, root):
        pass


class Words(CIFAR10):
    classes = None

    def __init__(self, root, train=True):
        super().__init__(root, train)
        del self.targets


@pytest.fixture
def root(tmp_path, monkeypatch):
    module = types.ModuleType("torchvision.datasets")
    for cls in (CIFAR10, SVHN, ImageNet, Broken, Places, Words):
        setattr(module, cls.__name__, cls)
    module.__all__ = ["CIFAR10", "SVHN", "ImageNet"]
    package = types.ModuleType("torchvision")
    package.datasets = module
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package if name == "torchvision" else real(name))
    (tmp_path / "cifar-batches").mkdir()
    (tmp_path / "cifar-batches/batch").write_bytes(b"12345")
    (tmp_path / "another-set").write_bytes(b"of the same root")
    return tmp_path


def test_a_set_with_the_argument_train(root):
    data = load_data("torchvision:CIFAR10", data_dir=root)
    assert data.name == "torchvision:CIFAR10"
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.test)) == (20, 6)
    assert isinstance(data.train, Split)
    shown = {image.numpy().tobytes(): int(label) for image, label in zip(data.train.images, data.train.labels, strict=True)}
    assert shown == {p.transpose(2, 0, 1).tobytes(): i % 2 for i, p in enumerate(pictures(20, seed=1))}
    assert torch.equal(load_data("torchvision:CIFAR10", data_dir=root, limit=5).train.images, data.train.images[:5])
    assert set(data.train.labels[:8].tolist()) == {0, 1}
    assert data.files.bytes == 5
    assert list(data.files.checksums) == ["cifar-batches"]


def test_a_set_with_the_argument_split(root):
    data = load_data("torchvision:SVHN", data_dir=root)
    assert data.classes == tuple("0123456789")
    assert (len(data.train), len(data.test)) == (20, 6)


def test_a_set_of_images_of_any_size(root):
    data = load_data("torchvision:ImageNet", data_dir=root, size=8, workers=2)
    assert data.classes == ("cat", "dog")
    assert isinstance(data.train, Stream)
    assert data.train.source.images.asked == "train"
    batches = Batches(data.train, 8)
    x, y = (torch.cat(parts) for parts in zip(*batches.epoch(0), strict=True))
    assert x.shape == (20, 3, 8, 8)
    assert y.bincount().tolist() == [10, 10]
    assert list(data.files.checksums) == ["cifar-batches"]
    assert torch.equal(x[8:], torch.cat([x for x, _ in batches.epoch(0, 1)]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CIFAR11", r"torchvision.datasets has no CIFAR11; did you mean CIFAR10\?"),
        ("__all__", r"torchvision.datasets has no __all__"),
        ("Places", r"torchvision:Places: expected a data set with the argument train or split, got one with root"),
        ("Words", r"torchvision:Words: expected a set with classes or one of targets, labels, _labels, found neither"),
        (
            "Broken",
            r"torchvision:Broken \(train\), image \d+: (not a readable|expected a Pillow image and)",
        ),
    ],
)
def test_sets_that_cannot_be_used(root, name, message):
    with pytest.raises(ValueError, match=message):
        load_data(f"torchvision:{name}", data_dir=root)


@pytest.mark.parametrize("name", ["CIFAR10", "SVHN", "ImageNet"])
def test_a_set_whose_files_are_missing(root, name):
    (root / "cifar-batches/batch").unlink()
    with pytest.raises(
        ValueError, match=rf"torchvision:{name}: Dataset not found or corrupted. You can use download=True [^\n]* \(read from"
    ):
        load_data(f"torchvision:{name}", data_dir=root)


def test_the_root_must_be_named(root):
    with pytest.raises(ValueError, match=r"torchvision:CIFAR10: dir: expected the root folder of torchvision's data sets"):
        load_data("torchvision:CIFAR10")


def test_without_torchvision(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else real(name))
    with pytest.raises(ImportError, match=r'torchvision missing; install with: pip install "s2ap_ext\[torchvision\]"'):
        load_data("torchvision:CIFAR10", data_dir=tmp_path)


def test_the_names_of_libraries_are_not_those_of_modules():
    assert find("data", "torchvision:CIFAR10").__name__ == "TorchvisionData"
    assert not re.fullmatch(OWN, "torchvision:CIFAR10")
    assert re.fullmatch(OWN, "torchvision_too:CIFAR10")
