"""AutoAttack and what it consists of, by the code of its authors as the package ``pyautoattack`` brings it (the extra ``eval``).

Nothing of the attacks is written anew here. What is done is to hand the package what it relies on: logits that it may write into (its
square attack does), in float32, since APGD compares losses; gradients without gaps in memory; a seed, for which it would take the clock;
no more target classes than there are; and a refusal where its loss is not defined, instead of a warning.

Source: Croce and Hein, arXiv 2003.01690 (AutoAttack, APGD), 1907.02044 (FAB), 2103.01208 (l1); Andriushchenko et al., arXiv 1912.00049
(Square).
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .._extras import optional
from ..engine import SparseNetwork
from ..modes import evaluation_mode
from ..parts import register
from ..settings import key
from .balls import BALLS
from .base import Attack

PACKAGE = "pyautoattack"
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
VERSIONS = {
    "standard": ("apgd_ce", "apgd_t", "fab_t", "square"),
    "plus": ("apgd_ce", "apgd_dlr", "fab", "square", "apgd_t", "fab_t"),
    "rand": ("apgd_ce", "apgd_dlr"),
}
LEAST_CLASSES = {"apgd_dlr": 3, "apgd_t": 4}  # for which the difference of logits ratio is defined; the others need two
TARGETS = 9  # the classes that targeted attacks aim at, where there are so many others


class _Packaged(Attack):
    """Attacks that the package runs one after the other, each on the images that those before it did not fool."""

    @dataclass(frozen=True)
    class Settings:
        norm: str = key("linf", "the norm of the ball", choices=BALLS)
        eps: float = key(8 / 255, "radius of the ball, in units where images lie in [0, 1]", low=0)

    settings: Any
    version = "standard"
    parts: Sequence[str] = ()

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor | None, *, loss: str = "ce", generator: torch.Generator | None = None
    ) -> Tensor:
        if loss != "ce" or y is None:
            raise ValueError(f"attack {self.name}: expected classes and the loss ce, since it has losses of its own; got {loss}")
        if not len(x):
            return x.clone()
        seed = int(torch.randint(2**31 - 1, ())) if generator is None else generator.initial_seed()
        with (
            torch.inference_mode(False),
            torch.random.fork_rng(devices=[x.device] if x.is_cuda else []),
            evaluation_mode(model, freeze=True),
        ):
            x, y = x.detach().clone(), y.clone()
            attack = self._made(_Logits(model, x.dtype), x, seed)
            run = attack.run_standard_evaluation
            # What the batch is called, and whether classes are returned too, differs between the package and the authors' repository.
            batch = "batch_size" if "batch_size" in inspect.signature(run).parameters else "bs"
            found = run(x.float().contiguous(), y, **{batch: len(x)})
        x_adv: Tensor = found[0] if isinstance(found, tuple) else found
        return x_adv.to(x.dtype)

    def _made(self, logits: _Logits, x: Tensor, seed: int) -> Any:
        """The package's own object, set to run ``parts``."""
        settings = asdict(self.settings)
        ball = {"norm": NORMS[settings["norm"]], "eps": settings["eps"]}
        attack = _package().AutoAttack(logits, **ball, seed=seed, version=self.version, device=x.device)
        attack.attacks_to_run = [name.replace("_", "-") for name in self.parts]
        with torch.no_grad():
            others = logits(x[:1].float()).shape[1] - 1
        for targeted in (attack.apgd_targeted, attack.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, others)
        if "queries" in settings:
            attack.square.n_queries = settings["queries"]
        return attack

    @property
    def implementation(self) -> str:
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"

    def check(self, model: Callable[[Tensor], Tensor], x: Tensor) -> None:
        _package()
        classes = model(x[:1]).shape[1]
        for part in self.parts:
            if classes < (least := LEAST_CLASSES.get(part, 2)):
                what = f"the loss of {part} is defined for {least} or more" if part in LEAST_CLASSES else f"{part} needs {least}"
                raise ValueError(f"attack {self.name}: expected a model with more classes, got {classes}; {what}")
        if "fab" in self.parts and isinstance(model, SparseNetwork):
            raise ValueError(
                f"attack {self.name}: expected a model of torch's, since fab takes several gradients of one forward, got a SparseNetwork"
            )


class _Logits(nn.Module):
    """``model`` as the package needs it."""

    def __init__(self, model: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.compiled = isinstance(getattr(model, "_orig_mod", None), nn.Module)  # by torch.compile
        self.training = False  # not by eval(), which programs of torch.export refuse

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            x = x.view_as(x)
            x.register_hook(Tensor.contiguous)
        images = x.to(self.dtype)
        if self.compiled:
            images = _padded(images)
        return self.model(images)[: len(x)].float().clone()


def _padded(images: Tensor) -> Tensor:
    """``images``, and the first one again and again up to the next power of two.

    Attacks leave out images that are fooled, Square after every query; a model of ``torch.compile`` may be compiled anew for each size.
    """
    more = (1 << (len(images) - 1).bit_length()) - len(images)
    return torch.cat([images, images[:1].expand(more, *images.shape[1:])])


def _package() -> ModuleType:
    return optional(PACKAGE)


@register("apgd_ce")
class ApgdCe(_Packaged):
    """APGD on the cross entropy: PGD with momentum that halves its steps by itself. 100 steps; in l1 with 5 restarts."""

    parts = ("apgd_ce",)


@register("apgd_dlr")
class ApgdDlr(_Packaged):
    """APGD on the difference of logits ratio, which does not change when the logits are scaled."""

    parts = ("apgd_dlr",)


@register("apgd_t")
class ApgdT(_Packaged):
    """APGD on the targeted difference of logits ratio, for the 9 likeliest other classes (5 in l1), 100 steps each."""

    parts = ("apgd_t",)


@register("fab_t")
class FabT(_Packaged):
    """FAB for the 9 likeliest other classes: looks for the nearest decision boundary, 100 steps each."""

    parts = ("fab_t",)


@register("square")
class Square(_Packaged):
    """Square: random search that sees logits and no gradients, 5,000 queries."""

    parts = ("square",)

    @dataclass(frozen=True)
    class Settings(_Packaged.Settings):
        queries: int = key(5000, "forwards for each image", low=1)


@register("autoattack")
class AutoAttack(_Packaged):
    """AutoAttack: ``standard`` is apgd_ce, apgd_t, fab_t, square; ``plus`` and ``rand`` (for models that are random) are others."""

    @dataclass(frozen=True)
    class Settings(_Packaged.Settings):
        version: str = key("standard", "which attacks it consists of", choices=VERSIONS)

    def __init__(self, settings: Any = None, **options: Any) -> None:
        super().__init__(settings, **options)
        self.version, self.parts = self.settings.version, VERSIONS[self.settings.version]

    def stages(self) -> Mapping[str, Attack]:
        ball = {"norm": self.settings.norm, "eps": self.settings.eps}
        return {part: _Stage(part, self.version, ball) for part in self.parts}


class _Stage(_Packaged):
    """One attack of :class:`AutoAttack`, as that version of it runs it."""

    def __init__(self, part: str, version: str, ball: dict[str, Any]) -> None:
        super().__init__(**ball)
        self.version, self.parts = version, (part,)
        self.name = part  # type: ignore[misc]  # it is not registered
