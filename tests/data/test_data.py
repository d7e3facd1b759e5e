"""Digits, data of a user's own module, batches and augmentation."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from s2ap_ext import parts
from s2ap_ext.data import Batches, Split, augmented, load_data, seeded_generator

# ---------------------------------------------------------------------------------------------------------------------- digits


def test_digits():
    pytest.importorskip("safetensors")
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
    pytest.importorskip("safetensors")
    whole, part = load_data(), load_data(limit=100, test_limit=20)
    assert (len(part.train), len(part.test)) == (100, 20)
    assert torch.equal(part.train.images, whole.train.images[:100])
    assert torch.equal(part.test.labels, whole.test.labels[:20])
    assert part.train.labels.bincount(minlength=10).min() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "mnist"},
            "data: expected one of cifar10, cifar100, digits, folder, imagenet, owner/name, package.module:attribute, svhn, tiny_imagenet, "
            "torchvision:NAME, got 'mnist'",
        ),
        (
            {"name": "digits", "data_dir": "."},
            "data_dir: expected none, since digits is not read from a folder",
        ),
        ({"name": "digits", "limit": 0}, "limit: expected an integer >= 1, got 0"),
        ({"name": "digits", "test_limit": -5}, "test_limit: expected an integer >= 1, got -5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_data(**arguments)


# ---------------------------------------------------------------------------------------------------------------- a user's own

OWN = """
import torch
from dataclasses import dataclass
from s2ap_ext.data import Data, Dataset, Split
from s2ap_ext.settings import key

def split(n, images=None, labels=None):
    images = torch.linspace(0, 1, n * 12).view(n, 3, 2, 2) if images is None else images
    return Split(images, torch.arange(n) % 2 if labels is None else labels)

def stripes(train=None):
    return Dataset("stripes", train or split(6), split(4), ("thin", "thick"))

class Stripes(Data):
    @dataclass(frozen=True)
    class Settings:
        dir: str = key("", "where they are")

    def load(self, *, limit=None, test_limit=None):
        return Dataset(self.settings.dir, split(3), split(2), ("thin", "thick")).limited(limit, test_limit)

number = 7

def nothing(): return None
def needs_more(path): return stripes()
def bright(): return stripes(split(6, images=255 * torch.rand(6, 3, 2, 2)))
def double(): return stripes(split(6, images=torch.rand(6, 3, 2, 2).double()))
def flat(): return stripes(split(6, images=torch.rand(6, 12)))
def wider(): return Dataset("stripes", split(6), split(2, images=torch.rand(2, 3, 2, 4)), ("thin", "thick"))
def short(): return stripes(split(6, labels=torch.tensor([0, 1])))
def bytes_(): return stripes(split(6, labels=torch.zeros(6, dtype=torch.uint8)))
def third(): return stripes(split(6, labels=torch.tensor([0, 1, 2, 0, 1, 2])))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's that gives data."""
    (tmp_path / "own_stripes.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_stripes"
    del sys.modules["own_stripes"]


def test_own_function(own):
    stripes = load_data(f"{own}:stripes")
    assert (stripes.name, stripes.shape, stripes.classes) == ("stripes", (3, 2, 2), ("thin", "thick"))
    part = load_data(f"{own}:stripes", limit=4, test_limit=1)
    assert torch.equal(part.train.images, stripes.train.images[:4])
    assert (len(part.train), len(part.test)) == (4, 1)
    with pytest.raises(ValueError, match="test_limit: expected an integer >= 1, got 0"):
        load_data(f"{own}:stripes", test_limit=0)
    with pytest.raises(ValueError, match="data_dir: expected none, since own_stripes:stripes is not read from a folder"):
        load_data(f"{own}:stripes", data_dir="somewhere")


def test_own_part(own, tmp_path):
    stripes = load_data(f"{own}:Stripes", data_dir=tmp_path, limit=2)
    assert stripes.name == str(tmp_path)
    assert len(stripes.train) == 2
    assert parts.find("data", f"{own}:Stripes").name == f"{own}:Stripes"


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("strips", r"data own_stripes:strips: own_stripes has no strips; did you mean stripes"),
        ("number", r"data own_stripes:number: expected a class derived from .* or a function \(\) -> Dataset, got int"),
        ("nothing", r"data own_stripes:nothing: expected a Dataset from it, got NoneType"),
        ("needs_more", r"data own_stripes:needs_more: expected a function that takes \(\) \(missing a required argument: 'path'\)"),
        ("bright", r"bright: train: expected float images in \[0, 1\], got values from .* to 25\d"),
        ("double", r"double: train: expected images \[N, C, H, W\] of uint8 or float32, .*, got \[6, 3, 2, 2\] of torch.float64"),
        ("flat", r"flat: train: expected images \[N, C, H, W\] .*, got \[6, 12\] of torch.float32"),
        ("wider", r"wider: test: expected images .* of one shape in both splits, got \[2, 3, 2, 4\]"),
        ("short", r"short: train: expected one int64 label for each of 6 images, got \[2\] of torch.int64"),
        ("bytes_", r"bytes_: train: expected one int64 label for each of 6 images, got \[6\] of torch.uint8"),
        ("third", r"third: train: expected labels from 0 to 1, got 0 to 2"),
    ],
)
def test_own_errors(own, attribute, message):
    with pytest.raises(ValueError, match=message):
        load_data(f"{own}:{attribute}")


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
