"""Image sets of the Hugging Face hub: those of the robustness literature by short names, and any other by its name there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .._extras import optional
from ..parts import Part, register, registered
from ..settings import key
from .encoded import ImageData
from .parquet import LAYOUT, TESTS, Sources, parquet_sources


@register("owner/name", pattern=r"[\w.-]+/[\w.-]+")
class HubData(ImageData):
    """An image set of the Hugging Face hub by its name there, such as uoft-cs/cifar10: its parquet files, at hand or downloaded.

    Attributes:
        hub: the set's name on the hub; empty: the part's own name.
        config: the folder of the version that is meant where the set comes in several.
        tests: names of the split to test on, of which the first that is there is taken.
        classes: names of the classes for files that may come without them.
    """

    hub: ClassVar[str] = ""
    config: ClassVar[str] = ""
    tests: ClassVar[tuple[str, ...]] = TESTS
    classes: ClassVar[tuple[str, ...] | None] = None

    @dataclass(frozen=True)
    class Settings(ImageData.Settings):
        dir: str = key("", "folder of the set's parquet files; empty: ask the hub")

    @classmethod
    def member(cls, name: str) -> type[Part]:
        """What is known of the set under its short name holds under its name on the hub too."""
        return next((part for part in registered("data").values() if getattr(part, "hub", "") == name), cls)

    def sources(self) -> Sources:
        folder = self.settings.dir or _download(self.hub or self.name, self.config, self.tests)
        return parquet_sources(folder, tests=self.tests, config=self.config, classes=self.classes)


@register("cifar10")
class Cifar10(HubData):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels."""

    hub = "uoft-cs/cifar10"
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@register("cifar100")
class Cifar100(HubData):
    """CIFAR-100 with its 100 fine classes: 50,000 training and 10,000 test images of 32x32 pixels."""

    hub = "uoft-cs/cifar100"


@register("svhn")
class SVHN(HubData):
    """Street View House Numbers, cropped digits: 73,257 training and 26,032 test images of 32x32 pixels."""

    hub, config = "ufldl-stanford/svhn", "cropped_digits"
    classes = tuple("0123456789")


@register("tiny_imagenet")
class TinyImageNet(HubData):
    """Tiny ImageNet, 200 classes: 100,000 training images of 64x64 pixels, and to test on the 10,000 of its validation split."""

    hub, tests, by_class = "zh-plus/tiny-imagenet", ("valid",), True


@register("imagenet")
class ImageNet(HubData):
    """ImageNet, 1000 classes: 1,281,167 training images of any size, and to test on the 50,000 of its validation split."""

    hub, tests = "ILSVRC/imagenet-1k", ("validation",)  # the labels of its test split are not public

    @dataclass(frozen=True)
    class Settings(HubData.Settings):
        size: int = key(224, "height and width that images are cut out and scaled to; 0: all have one size, and keep it", low=0, high=4096)


def _download(name: str, config: str, tests: Iterable[str]) -> Path:
    """The folder with the parquet files of the hub's set ``name``, from its local cache where it has them."""
    hub = optional("huggingface_hub")
    inside = f"{config}/" if config else "*"
    patterns = [f"{inside}{split}*.parquet" for split in ("train", *tests)]
    try:
        return Path(hub.snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the hub's own, those of its HTTP client, and OSError
        raise ConnectionError(
            f"could not get {name} from the Hugging Face hub ({type(error).__name__}: {error}); "
            f"with the files at hand, name their folder (--data-dir): {LAYOUT}"
        ) from error
