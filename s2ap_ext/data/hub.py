"""Image sets of the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .._extras import optional
from ..parts import register
from ..settings import key
from .base import Data, Dataset
from .parquet import LAYOUT, load_parquet

# Classes of sets whose files may come without them.
CLASSES = {
    "uoft-cs/cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}


@register("owner/name", pattern=r"[\w.-]+/[\w.-]+")
class HubData(Data):
    """An image set of the Hugging Face hub by its name there, such as uoft-cs/cifar10: its parquet files, at hand or downloaded."""

    @dataclass(frozen=True)
    class Settings:
        dir: str = key("", "folder of the set's parquet files; empty: ask the hub")

    def load(self, *, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        folder = self.settings.dir or _download(self.name)
        return load_parquet(folder, name=self.name, classes=CLASSES.get(self.name), limit=limit, test_limit=test_limit)


def _download(name: str) -> Path:
    """The folder with the parquet files of the hub's set ``name``, from its local cache where it has them."""
    hub = optional("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, repo_type="dataset", allow_patterns=["*train*.parquet", "*test*.parquet"]))
    except Exception as error:  # the hub's own, those of its HTTP client, and OSError
        raise ConnectionError(
            f"could not get {name} from the Hugging Face hub ({type(error).__name__}: {error}); "
            f"with the files at hand, name their folder (--data-dir): {LAYOUT}"
        ) from error
