"""Networks of Hugging Face's transformers."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..parts import register
from ..settings import key, nearest
from .base import Model
from .library import LibraryModel, library
from .normalization import Normalize

HALF: tuple[float, ...] = (0.5, 0.5, 0.5)  # mean and standard deviation for networks that say nothing else
LARGEST = 10**6  # of the whole numbers in a configuration that is given as text
# What the data decide, and what says nothing about the architecture.
NOT_KEPT = {"dtype", "id2label", "label2id", "problem_type", "torch_dtype", "transformers_version"}
# What would make transformers load something besides the architecture: the code, kernels or backbones of others.
LOADS = {"auto_map", "custom_pipelines", "name_or_path", "quantization_config", "trust_remote_code"}
LOADING_TYPES = {"timm_wrapper"}


class HFClassifier(nn.Module):
    """A network for image classification of transformers behind a :class:`Normalize`: [N, C, H, W] in [0, 1] -> logits [N, num_classes].

    Args:
        model: returns an object with ``logits``.
        mean, std: of the channels.
        in_channels: channels of the images.
    """

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], *, in_channels: int) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std, in_channels=in_channels, persistent=True)
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(self.normalize(x)).logits
        return logits


@register("hf:NAME", pattern=r"hf:\S+")
class HFModel(LibraryModel):
    """A network of transformers for image classification: hf:vit, a hub's hf:owner/name, or a folder such as hf:./name.

    A name without a slash is that of an architecture with its usual configuration, such as vit, deit, swin or convnext. Only the
    weights of the hub and of folders can be pretrained; they are read from safetensors, never from pickles.
    """

    @dataclass(frozen=True)
    class Settings(LibraryModel.Settings):
        config: str = key("", 'what differs from the named configuration, as JSON such as {"num_hidden_layers": 4}')

    def make(self, *, num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
        transformers = library("transformers")
        config = self._config()
        config.num_labels = num_classes
        config.architectures = config.architectures or []  # of several networks for one architecture the first one is meant
        size = image_size[0] if image_size[0] == image_size[1] else list(image_size)
        for name, value in (("num_channels", in_channels), ("image_size", size)):
            if hasattr(config, name):
                setattr(config, name, value)
        mean, std = HALF, HALF
        if not self.settings.pretrained:
            model = transformers.AutoModelForImageClassification.from_config(config, trust_remote_code=False)
        else:
            model, loading = transformers.AutoModelForImageClassification.from_pretrained(
                self.wanted,
                config=config,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                output_loading_info=True,
                dtype="float32",
            )
            self._check_loaded(loading)
            mean, std = self._normalization()
        return HFClassifier(model, mean, std, in_channels=in_channels)

    def outside(self) -> str:
        if self._is_complete() or "/" not in self.wanted:
            return super().outside()
        return f"the configuration of {self.wanted}"

    def self_contained(self) -> Model:
        text = self.settings.config
        if "/" in self.wanted and not self._is_complete():
            config = self._config()
            known = type(config)().to_dict()
            kept = {name: value for name, value in config.to_diff_dict().items() if name in known and name not in NOT_KEPT | LOADS}
            kept = {name: value for name, value in kept.items() if not name.startswith("_")} | {"model_type": config.model_type}
            text = json.dumps(kept, sort_keys=True)
        return type(self)(replace(self.settings, pretrained=False, config=text))

    def _is_complete(self) -> bool:
        """Whether the settings hold the whole configuration."""
        return "model_type" in self._given()

    def _given(self) -> dict[str, Any]:
        """The setting ``config``, checked."""
        try:
            given = json.loads(self.settings.config or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"model {self.name}: config: not JSON ({error})") from None
        if not isinstance(given, dict):
            raise ValueError(f"model {self.name}: config: expected a JSON object, got {self.settings.config[:80]}")
        for name, value in _walk(given):
            if name.startswith("_") or name in LOADS or "backbone" in name or "implementation" in name:
                raise ValueError(f"model {self.name}: config: {name[:80]} says what is loaded, not what the architecture is")
            if isinstance(value, int) and abs(value) > LARGEST:
                raise ValueError(f"model {self.name}: config: {name[:80]}: expected a number up to {LARGEST:,}, got {str(value)[:80]}")
        return given

    def _config(self) -> Any:
        """The configuration, an object of transformers."""
        transformers = library("transformers")
        given = self._given()
        known = _architectures(transformers)
        if "/" in self.wanted and "model_type" not in given:
            config = _config_outside(self.wanted)
            cls, table = type(config), config.to_dict()
        else:
            architecture = given.get("model_type", self.wanted)
            if architecture not in known:
                near = nearest(str(architecture), known)
                raise ValueError(f"model {self.name}: expected an architecture such as vit, or owner/name, got {architecture!r:.80}{near}")
            cls, table = transformers.CONFIG_MAPPING[architecture], {}
        if cls.model_type not in known:
            raise ValueError(f"model {self.name}: {cls.model_type} is no architecture for image classification")
        if unknown := [name for name in given if name not in cls().to_dict()]:
            raise ValueError(f"model {self.name}: config: unknown key {unknown[0][:80]}{nearest(unknown[0], cls().to_dict())}")
        if self.settings.pretrained and "/" not in self.wanted:
            raise ValueError(f"model {self.name}: pretrained: an architecture by itself has no weights; name owner/name or a folder")
        return cls.from_dict(table | given)

    def _check_loaded(self, loading: dict[str, Any]) -> None:
        """Raises ValueError unless all but the head has the weights that were loaded."""
        odd = [str(name if isinstance(name, str) else name[0]) for part in ("missing_keys", "mismatched_keys") for name in loading[part]]
        if len({name.rpartition(".")[0] for name in odd}) > 1:
            raise ValueError(f"model {self.name}: its pretrained weights do not fit: {', '.join(sorted(odd)[:3])}")

    def _normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The mean and the standard deviation of the channels that the weights were trained with."""
        cached_file = library("transformers.utils").cached_file
        path = cached_file(self.wanted, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        about = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        return tuple(about.get("image_mean", HALF)), tuple(about.get("image_std", HALF))


@functools.cache
def _config_outside(name: str) -> Any:
    """The configuration of the hub's network, or the folder, ``name``: read once, so that it stays what a run has started with."""
    return library("transformers").AutoConfig.from_pretrained(name, trust_remote_code=False)


def _architectures(transformers: Any) -> list[str]:
    """The names of the architectures for image classification that load nothing else."""
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    return [name for name in mapping if name not in LOADING_TYPES]


def _walk(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested dictionaries and lists with the key under which it stands."""
    yield name, value
    if isinstance(value, dict):
        for key_, inside in value.items():
            yield from _walk(inside, key_)
    elif isinstance(value, list):
        for inside in value:
            yield from _walk(inside, name)
