"""Images in memory: scikit-learn's digits, and parquet files laid out as the Hugging Face hub's ``uoft-cs/cifar10``.

A :class:`Split` holds all its images as one tensor and :class:`Batches` moves it to the device once, so an epoch reads no file and
copies nothing but indices. Shuffling and augmentation are functions of (seed, epoch): a resumed run sees what an uninterrupted one
would have seen, and every device sees the same.
"""

from __future__ import annotations

import importlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Batches", "Dataset", "Split", "augmented", "load_data", "load_digits", "load_parquet", "seeded_generator"]

# Classes of sets on the hub whose files may come without them.
HUB_CLASSES = {
    "uoft-cs/cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
LAYOUT = "train.parquet and test.parquet, or shards such as train-00000-of-00001.parquet, in it or in one folder below"


@dataclass(frozen=True)
class Split:
    """Images and their classes.

    Attributes:
        images: [N, C, H, W], uint8 in [0, 255] or float32 in [0, 1].
        labels: int64 [N].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def floats(self) -> Tensor:
        """The images as float32 in [0, 1]."""
        return _floats(self.images)


@dataclass(frozen=True)
class Dataset:
    """A training and a test split with the names of the classes."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return tuple(self.train.images.shape[1:])


def load_data(
    name: str = "digits", *, data_dir: str | Path | None = None, limit: int | None = None, test_limit: int | None = None
) -> Dataset:
    """Loads a data set.

    Args:
        name: ``"digits"``, or the name of an image set on the Hugging Face hub such as ``"uoft-cs/cifar10"``.
        data_dir: folder with the parquet files of that set. None downloads them from the hub, or takes them from its local cache.
        limit, test_limit: read only so many images of the training and the test split.

    Raises:
        ValueError: an unknown name, a limit below 1, or files whose contents are wrong (see :func:`load_parquet`).
        FileNotFoundError: no such folder, or not the expected files in it.
        ImportError: a package of the ``train`` extra is missing.
        ConnectionError: the hub could not be reached, or has no such set.
    """
    for key, value in {"limit": limit, "test_limit": test_limit}.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{key}: expected an integer >= 1, got {value!r}")
    if name == "digits":
        if data_dir is not None:
            raise ValueError("data_dir: expected none, the digits come with scikit-learn; name a set on the hub, such as uoft-cs/cifar10")
        data = load_digits()
        return Dataset(name, _first(data.train, limit), _first(data.test, test_limit), data.classes)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"data: expected digits or the name of a set on the hub, such as {', '.join(HUB_CLASSES)}, got {name!r}")
    folder = _download(name) if data_dir is None else Path(data_dir)
    return load_parquet(folder, name=name, classes=HUB_CLASSES.get(name), limit=limit, test_limit=test_limit)


def _first(split: Split, limit: int | None) -> Split:
    return Split(split.images[:limit], split.labels[:limit])


def _require(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{package} is needed to load this data ({error}): pip install "s2ap_ext[train]"') from error


# ---------------------------------------------------------------------------------------------------------------------- digits

DIGITS_SPLIT_SEED = 0  # the split belongs to the data: runs with different seeds are measured on the same test images


def load_digits() -> Dataset:
    """scikit-learn's 1797 handwritten digits, 8x8 pixels with 17 grey levels, as float32 in [0, 1]: 1438 to train on, 359 to test.

    A fixed split in which every class has its share, each part in a fixed random order.

    Raises:
        ImportError: scikit-learn is missing.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (its test part).
    """
    bunch = _require("sklearn.datasets", "scikit-learn").load_digits()
    images = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    generator = torch.Generator().manual_seed(DIGITS_SPLIT_SEED)
    order = torch.randperm(len(labels), generator=generator)
    # An image's rank among those of its class decides: the first fifth of every class is for testing.
    one_hot = F.one_hot(labels[order])
    rank = (one_hot.cumsum(0) * one_hot).sum(1) - 1
    share = (one_hot.sum(0).float() / 5).round().long()
    test = rank < share[labels[order]]
    splits = [Split(images[index], labels[index]) for index in (order[~test], order[test])]
    return Dataset("digits", *splits, classes=tuple("0123456789"))


# --------------------------------------------------------------------------------------------------------------------- parquet


def load_parquet(
    folder: str | Path,
    *,
    name: str = "",
    classes: tuple[str, ...] | None = None,
    limit: int | None = None,
    test_limit: int | None = None,
) -> Dataset:
    """Image classification data in parquet files with the columns ``img`` (struct of ``bytes`` and ``path``; PNG, JPEG, ...) and ``label``.

    Args:
        folder: holds train.parquet and test.parquet, or shards such as plain_text/train-00000-of-00001.parquet.
        name: what the data set is called; the folder's name if empty.
        classes: names of the classes. None takes those stored in the file, and where there are none counts the labels.
        limit, test_limit: read only the first so many rows.

    Raises:
        FileNotFoundError: no such folder, or not the expected files in it; the message says what was found.
        ValueError: a file that is not readable as parquet or lacks a column, an image that cannot be decoded or is of another size, a label
            out of range; the message names file and row.
        ImportError: pyarrow or Pillow is missing.
    """
    folder = Path(folder)
    shards = {split: _find_shards(folder, split) for split in ("train", "test")}
    if classes is None:
        classes = _stored_classes(shards["train"][0]) or tuple(str(i) for i in range(_largest_label(shards) + 1))
    train = _read_split(shards["train"], len(classes), limit, None)
    test = _read_split(shards["test"], len(classes), test_limit, train.images.shape[1:])
    return Dataset(name or folder.name, train, test, classes)


def _download(name: str) -> Path:
    """The folder with the parquet files of the hub's set ``name``, from its local cache where it has them."""
    hub = _require("huggingface_hub", "huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, repo_type="dataset", allow_patterns=["*train*.parquet", "*test*.parquet"]))
    except Exception as error:  # the hub's own, those of its HTTP client, and OSError
        raise ConnectionError(
            f"could not get {name} from the Hugging Face hub ({type(error).__name__}: {error}); "
            f"with the files at hand, name their folder (--data-dir): {LAYOUT}"
        ) from error


def _find_shards(folder: Path, split: str) -> list[Path]:
    """The parquet files of ``split``, in order."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected {LAYOUT}")
    pattern = re.compile(rf"{split}(-(\d+)-of-(\d+))?(-[0-9a-f]+)?\.parquet")
    found = [path for path in sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")]) if pattern.fullmatch(path.name)]
    if not found:
        entries = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise FileNotFoundError(f"{folder}: no {split} split; expected {LAYOUT}; found {entries}")
    parts = [pattern.fullmatch(path.name).groups() for path in found]
    count = int(parts[0][2] or 1)
    if len({path.parent for path in found}) > 1 or [int(part[1] or 0) for part in parts] != list(range(count)):
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise FileNotFoundError(f"{folder}: expected one complete {split} split, of {count} file(s); found {names}")
    return found


def _open_parquet(path: Path):
    """The ParquetFile, with the columns checked, and the name of the image column."""
    parquet, arrow = _require("pyarrow.parquet", "pyarrow"), _require("pyarrow", "pyarrow")
    try:
        file = parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error
    schema = file.schema_arrow
    image = next((name for name in ("img", "image") if name in schema.names), None)
    is_image = image and arrow.types.is_struct(schema.field(image).type) and schema.field(image).type.get_field_index("bytes") >= 0
    if not is_image or "label" not in schema.names or not arrow.types.is_integer(schema.field("label").type):
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise ValueError(f"{path}: expected the columns img: struct<bytes: binary, path: string> and label: int64, found {found}")
    return file, image


def _rows(path: Path, columns: list[str]) -> Iterator[dict]:
    """The rows of ``path`` one by one, reading no more of it than is asked for."""
    arrow = _require("pyarrow", "pyarrow")
    file, _ = _open_parquet(path)
    try:
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: truncated or corrupt ({error})") from error


def _stored_classes(path: Path) -> tuple[str, ...] | None:
    """The class names that the hub's own tools store in a parquet file."""
    metadata = _open_parquet(path)[0].schema_arrow.metadata or {}
    try:
        return tuple(json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _largest_label(shards: dict[str, list[Path]]) -> int:
    return max(row["label"] or 0 for paths in shards.values() for path in paths for row in _rows(path, ["label"]))


def _read_split(paths: list[Path], num_classes: int, limit: int | None, shape: torch.Size | None) -> Split:
    """Decodes the images of ``paths`` to uint8, all of one ``shape`` (C, H, W); that of the first if None."""
    images, labels = [], []
    for path in paths:
        _, column = _open_parquet(path)
        for number, row in enumerate(_rows(path, [column, "label"])):
            where = f"{path}, row {number}"
            image = _decode(row[column], where)
            shape = shape or torch.Size((image.shape[2], *image.shape[:2]))
            if (image.shape[2], *image.shape[:2]) != shape:
                raise ValueError(f"{where}: expected an image of shape (C, H, W) = {tuple(shape)}, got one of {image.shape} (H, W, C)")
            if row["label"] is None or not 0 <= row["label"] < num_classes:
                raise ValueError(f"{where}: expected a label from 0 to {num_classes - 1}, got {row['label']}")
            images.append(image)
            labels.append(row["label"])
            if len(labels) == limit:
                break
        if len(labels) == limit:
            break
    if not labels:
        raise ValueError(f"{paths[0]}: no rows")
    return Split(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


def _decode(cell: dict | None, where: str) -> np.ndarray:
    """The pixels of an image, uint8 [H, W, C] with C = 1 (grey) or 3."""
    image_module = _require("PIL.Image", "Pillow")
    data = (cell or {}).get("bytes")
    if data is None:
        raise ValueError(f"{where}: expected the bytes of an image, got none")
    try:
        with image_module.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except Exception as error:  # whatever a broken file brings a decoder to
        raise ValueError(f"{where}: not a readable image ({error})") from error
    return pixels.reshape(*pixels.shape[:2], -1)


# --------------------------------------------------------------------------------------------------------------------- batches


def seeded_generator(*key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator whose numbers are a function of ``key``, such as (seed, epoch); different keys give unrelated numbers."""
    # With its length in front: to SeedSequence (1,) and (1, 0) are the same.
    state = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))


def _floats(images: Tensor) -> Tensor:
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def augmented(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """``images`` moved and mirrored, each in its own way, all in one gather; what moves in is 0.

    Args:
        images: [N, C, H, W], any dtype.
        shifts: int64 [N, 2], rows and columns by which the image moves up and left.
        flips: bool [N], whether it is then mirrored left to right.

    Returns:
        A new tensor like ``images``.

    Equivalent to::

        p = shifts.abs().max()
        for image, (dy, dx), flip in zip(F.pad(images, (p, p, p, p)), shifts, flips):
            crop = image[:, p + dy : p + dy + H, p + dx : p + dx + W]
            out.append(crop.flip(2) if flip else crop)
    """
    n, c, height, width = images.shape
    rows = torch.arange(height, device=images.device) + shifts[:, :1]  # [N, H]
    columns = torch.arange(width, device=images.device).expand(n, width)
    columns = torch.where(flips[:, None], columns.flip(1), columns) + shifts[:, 1:]  # [N, W]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]  # [N, H, W]
    index = (rows.clamp(0, height - 1) * width)[:, :, None] + columns.clamp(0, width - 1)[:, None, :]
    index = index.view(n, 1, height * width).expand(n, c, height * width)
    moved = images.reshape(n, c, height * width).gather(2, index).view_as(images)
    return moved * inside[:, None]


class Batches:
    """The batches of a split: ``(images, labels)``, float32 [B, C, H, W] in [0, 1] and int64 [B], on the device.

    Iterating gives the images as they are and in order, for evaluation. :meth:`epoch` gives them shuffled and augmented, for training.

    Args:
        split: the images; moved to ``device`` here, once.
        batch_size: images per batch; the last one may have fewer.
        device: where the batches are made.
        seed: of shuffling and augmentation.
        shift: each image moves by up to so many pixels in both directions, with zeros moving in: a random crop from the padded image.
        flip: mirror every second image, at random.

    Raises:
        ValueError: ``batch_size`` below 1, a negative ``shift``, an empty split.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        seed: int = 0,
        shift: int = 0,
        flip: bool = False,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("shift", shift, 0), ("split: number of images", len(split), 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.batch_size, self.seed, self.shift, self.flip = batch_size, seed, shift, flip

    def __len__(self) -> int:
        """The number of batches."""
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield _floats(images), labels

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch ``number``, from 0: the same ones whenever it is asked for."""
        n, device = len(self.labels), self.labels.device
        generator = seeded_generator(self.seed, number)
        order = torch.randperm(n, generator=generator).to(device)
        shifts = torch.randint(-self.shift, self.shift + 1, (n, 2), generator=generator).to(device)
        flips = (torch.rand(n, generator=generator) < (0.5 if self.flip else 0)).to(device)
        for index in order.split(self.batch_size):
            images = self.images[index]
            if self.shift or self.flip:
                images = augmented(images, shifts[index], flips[index])
            yield _floats(images), self.labels[index]
