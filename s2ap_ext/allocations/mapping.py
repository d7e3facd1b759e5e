"""A sparsity for each layer, by name."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..parts import register
from ..settings import key
from ..sparsity import check_sparsity, kept_in_pattern
from .base import Allocation, Layer


def name_matches(name: str, pattern: str) -> bool:
    """Whether ``pattern``, with ``*`` and ``?``, is a layer's name or that of a module around it: ``layer1`` is for ``layer1.0.conv1``."""
    return any(fnmatch.fnmatchcase(module, pattern) for module in itertools.accumulate(name.split("."), "{}.{}".format))


@register("mapping")
class SparsityByLayer(Allocation):
    """The sparsity of each layer by its name, or that of a module around it; layers that are not named take the model's.

    ``*`` and ``?`` match, also across dots, and the first pattern that matches a layer decides. Counts within a layer are rounded as by
    :class:`s2ap_ext.allocations.uniform.Uniform`; the overall sparsity is what comes of them. A pattern that decides for no layer is
    an error. A tied weight goes by the name of the first layer that has it.
    """

    @dataclass(frozen=True)
    class Settings:
        layers: str = key("", "sparsity by layer, the first match decides, such as conv1=0.5, layer4.*=0.95")

    def __init__(self, settings: Settings | None = None, **options: str) -> None:
        super().__init__(settings, **options)
        self.sparsities: dict[str, float] = {}
        for entry in filter(None, (entry.strip() for entry in self.settings.layers.split(","))):
            pattern, _, text = (part.strip() for part in entry.rpartition("="))
            if pattern in self.sparsities:
                raise ValueError(f"allocation mapping: layers: expected one sparsity for {pattern!r}, got two")
            try:
                self.sparsities[pattern] = check_sparsity(float(text))
            except ValueError:
                raise ValueError(f"allocation mapping: layers: expected LAYER=SPARSITY with a sparsity in [0, 1], got {entry!r}") from None

    @classmethod
    def of(cls, sparsities: Mapping[str, float]) -> SparsityByLayer:
        """From a mapping of patterns to sparsities; raises TypeError or ValueError for a sparsity that is no number in [0, 1]."""
        entries = [f"{pattern}={check_sparsity(sparsity, f'allocation: {pattern}')!r}" for pattern, sparsity in sparsities.items()]
        return cls(layers=", ".join(entries))

    def kept(self, layers: Sequence[Layer], sparsity: float) -> list[int]:
        deciding = [next((p for p in self.sparsities if name_matches(layer.name, p)), None) for layer in layers]
        if idle := [pattern for pattern in self.sparsities if pattern not in deciding]:
            some = ", ".join([layer.name for layer in layers[:5]] + ["..."] * (len(layers) > 5))
            raise ValueError(f"allocation mapping: no layer takes the sparsity of {idle[0]!r}; there are {some}")
        return [
            kept_in_pattern(layer.pattern, layer.weight.numel(), sparsity if pattern is None else self.sparsities[pattern])
            for layer, pattern in zip(layers, deciding, strict=True)
        ]
