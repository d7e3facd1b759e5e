"""What every attack offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from ..parts import Part


class Attack(Part, ABC):
    """A way to make adversarial examples, with its settings: what training and evaluation call."""

    kind = "attack"

    @classmethod
    def within(cls, *, norm: str, eps: float, **options: Any) -> Attack:
        """The attack as an evaluation uses it, which knows the ball and leaves the rest to the attack.

        Args:
            norm, eps: the ball; an attack that has no such settings is made without them.
            options: further settings by name.

        Raises:
            ValueError: a norm that the attack is not for, and all that the class itself raises.
        """
        known = {field.name for field in fields(cls.Settings)}
        return cls(**{name: value for name, value in {"norm": norm, "eps": eps}.items() if name in known}, **options)

    @abstractmethod
    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor | None, *, loss: str = "ce", generator: torch.Generator | None = None
    ) -> Tensor:
        """Adversarial examples for ``x``.

        Args:
            model: gives logits [N, K] for images [N, ...]. It is left as found.
            x: images [N, ...], floating point, in [0, 1].
            y: classes, int64 [N]; may be None where ``loss`` does not use them.
            loss: what the attack maximises, ``"ce"`` or ``"kl"`` as in :func:`s2ap_ext.attacks.pgd`.
            generator: source of random numbers, on the device of ``x``; torch's default one if None.

        Returns:
            x_adv, a new tensor of x's shape and dtype, within [0, 1].

        Raises:
            ValueError: images, classes or logits that make no sense; a ``loss`` that this attack cannot maximise.
        """

    @property
    def implementation(self) -> str:
        """Whose code this is, and its version: ``"s2ap_ext 0.1.0"``. Tables of results name it."""
        from .. import __version__

        return f"s2ap_ext {__version__}"

    def check(self, model: Callable[[Tensor], Tensor], x: Tensor) -> None:
        """Raises what would end the attack, before hours are spent on other attacks.

        Args:
            model: what will be attacked.
            x: at least one of the images.

        Raises:
            ImportError: a package that the attack needs is missing; the message names the command that installs it.
            ValueError: a model that the attack is not defined for.
        """

    def stages(self) -> Mapping[str, Attack]:
        """The attacks that this one consists of, by name, each of which is for the images that those before it did not fool.

        As a rule that is the attack itself. An evaluation runs the stages one after the other over all images, so that it can tell what
        each of them adds, and can go on within an attack that takes hours.
        """
        return {self.name: self}

    def with_gradients(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor | None,
        parameters: Mapping[str, nn.Parameter],
        *,
        loss: str = "ce",
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same examples, and the gradients of parameters that the attack's last backward has given on its way.

        Args:
            parameters: parameters of ``model`` by name, which require a gradient. All else is as for the call.

        Returns:
            ``(x_adv, gradients)``, the latter by name. They are gradients of what the attack maximises, summed over the minibatch, at the
            images before its last step, and of the model in evaluation mode. Each ``.grad`` is as it was; but what listens to the
            gradients of masked weights (HARP's rates do) hears this backward too, so clear the gradients before the next.

        Raises:
            ValueError: what the call raises; an attack that takes no such gradient.
        """
        raise ValueError(f"attack {self.name or type(self).__name__}: takes no gradients of parameters")
