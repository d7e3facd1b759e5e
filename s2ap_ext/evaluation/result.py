"""What an evaluation found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..intervals import wilson


@dataclass(frozen=True)
class Evaluation:
    """Which images are classified rightly under which attack.

    Attributes:
        norm, eps: the ball that the attacks searched.
        seed: of their random numbers.
        labels: the images' classes, int64 [N].
        held: for each attack, by name, and for ``"clean"`` (no attack): whether the model is right about an image, bool [N]. An adversary
            may leave an image alone, so what is wrong without an attack does not hold under any.
        implementations: for each attack whose code it is, with the version.
        stages: for each attack that consists of several: the accuracy after each of them.
        engine: what computed the logits, ``"torch"`` or ``"sparse"``.
    """

    norm: str
    eps: float
    seed: int
    labels: Tensor
    held: dict[str, Tensor]
    implementations: dict[str, str]
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    engine: str = "torch"

    @property
    def n(self) -> int:
        """The number of images."""
        return len(self.labels)

    @property
    def accuracy(self) -> dict[str, float]:
        """For each attack the fraction of images that hold."""
        return {name: int(held.sum()) / self.n for name, held in self.held.items()}

    @property
    def worst_held(self) -> Tensor:
        """Whether an image holds under every attack, bool [N]."""
        return torch.stack(list(self.held.values())).all(dim=0)

    @property
    def worst(self) -> float:
        """The fraction of images that hold under every attack: an adversary may choose the attack for each image."""
        return int(self.worst_held.sum()) / self.n

    def interval(self, name: str) -> tuple[float, float]:
        """Wilson's 95 % interval of an accuracy, as if the images were drawn at random.

        Args:
            name: of an attack, ``"clean"``, or ``"worst"``.

        Raises:
            ValueError: no such attack.
        """
        if name != "worst" and name not in self.held:
            raise ValueError(f"name: expected one of {', '.join([*self.held, 'worst'])}, got {name!r}")
        return wilson(self.worst if name == "worst" else self.accuracy[name], self.n)

    def per_class(self) -> Iterator[tuple[int, int, dict[str, float]]]:
        """For each class that occurs: the class, the number of its images, and the fraction that holds, by attack and ``"worst"``."""
        held = self.held | {"worst": self.worst_held}
        for number in sorted(set(self.labels.tolist())):
            own = self.labels == number
            count = int(own.sum())
            yield number, count, {name: int(mask[own].sum()) / count for name, mask in held.items()}

    def summary(self) -> dict[str, Any]:
        """All of it that JSON can hold; of the images the numbers, from 0, of those that do not hold."""
        attacks = {}
        for name, fraction in self.accuracy.items():
            low, high = self.interval(name)
            attacks[name] = {"accuracy": fraction, "low": low, "high": high, "implementation": self.implementations[name]}
            attacks[name]["broken"] = (~self.held[name]).nonzero().squeeze(1).tolist()
            if name in self.stages:
                attacks[name]["stages"] = self.stages[name]
        low, high = self.interval("worst")
        classes = [{"class": number, "images": count, **fractions} for number, count, fractions in self.per_class()]
        about = {"norm": self.norm, "eps": self.eps, "images": self.n, "seed": self.seed, "engine": self.engine}
        return about | {"worst": {"accuracy": self.worst, "low": low, "high": high}, "attacks": attacks, "classes": classes}
