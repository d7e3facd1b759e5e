"""What a recipe says: its sections, every key with its type, default, range and meaning.

A key that names a part (:mod:`s2ap_ext.parts`) holds it as :class:`Chosen`: its name and its settings. Recipes are read and written by
:mod:`.recipe`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from .. import parts
from ..nn.accelerated import PRECISIONS
from ..optim import FlipBudget
from ..settings import key, types_of

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class Chosen:
    """A part that a recipe names, with its settings. Attributes that it has not itself are those of the settings.

    Attributes:
        kind, name: what :func:`s2ap_ext.parts.find` finds the part by.
        settings: an object of the part's ``Settings``.
    """

    kind: str
    name: str
    settings: Any

    @classmethod
    def of(cls, kind: str, name: str, **options: Any) -> Chosen:
        """The part called ``name``; errors as in :func:`s2ap_ext.parts.make`."""
        return cls(kind, name, parts.make(kind, name, **options).settings)

    def make(self, **arguments: Any) -> Any:
        """A new object of the part."""
        return parts.find(self.kind, self.name)(self.settings, **arguments)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "settings":  # asked for by copy and pickle before there are settings
            raise AttributeError(name)
        return getattr(self.settings, name)


def part(kind: str, name: str, help: str, *, flat: bool = False) -> Any:
    """A key that names a part: its kind, its default name, what it means.

    Args:
        flat: the part's name is the section's key ``name``, and its options are keys of the section itself.
    """
    return field(default_factory=lambda: Chosen.of(kind, name), metadata={"kind": kind, "default": name, "help": help, "flat": flat})


@dataclass(frozen=True)
class Data:
    source: Chosen = part("data", "digits", "the images: a data set known by name, or one of the hub such as uoft-cs/cifar10", flat=True)
    train_size: int = key(0, "train on the first so many images; 0: all", low=0)
    test_size: int = key(0, "test on the first so many images; 0: all", low=0)
    shift: int = key(0, "training images move by up to so many pixels", low=0, high=1024)
    flip: bool = key(False, "training images are mirrored left to right, each with probability 1/2")


@dataclass(frozen=True)
class Training:
    """What the training stages share: SGD on a robust loss."""

    epochs: int = key(100, "passes over the training images", low=0, high=10**6)
    batch_size: int = key(128, "images per step", low=1, high=10**7)
    lr: float = key(0.1, "learning rate at the start", low=0, high=1e6)
    schedule: str = key("cosine", "how the learning rate falls, epoch by epoch", choices=SCHEDULES)
    momentum: float = key(0.9, "SGD's momentum", low=0, high=1)
    weight_decay: float = key(5e-4, "SGD's weight decay", low=0, high=1e6)
    loss: Chosen = part("loss", "pgd_at", "what is minimised")
    label_smoothing: float = key(0.0, "the share of each label's probability that is spread over all classes", low=0, high=1)
    averaging: float = key(
        0.0, "decay of the average of what trains, which the stage leaves (such as 0.9995); 0: none", low=0, high=0.999999
    )
    reestimate_batchnorm: bool = key(False, "BatchNorm's statistics are taken anew before each evaluation and before the model is saved")


@dataclass(frozen=True)
class Pretrain(Training):
    pass


@dataclass(frozen=True)
class Prune(Training):
    epochs: int = key(20, "passes over the training images", low=0, high=10**6)
    reestimate_batchnorm: bool = key(True, Training.__dataclass_fields__["reestimate_batchnorm"].metadata["help"])
    method: Chosen = part("method", "hydra", "how the mask is searched")
    sparsity: float = key(0.9, "fraction of the weights removed", low=0, high=1)
    allocation: Chosen = part("allocation", "uniform", "how the weights that stay are spread over the layers")
    granularity: str = key("weight", "what is removed as one: weight, channel, head, neuron, or N:M such as 2:4 (N of every M inputs stay)")
    tied: bool = key(False, "channel: layers whose results are added share one mask, so that densify(shrink=True) removes their channels")
    exclude: tuple[str, ...] = key((), "layers that stay dense: names, in which * and ? match, or :first and :last")
    s2ap: bool = key(True, "take the gradient at scores perturbed towards higher loss")
    gamma: float | str = key(
        1e-3,
        "S2AP: size of the perturbation relative to the scores' norm, layer by layer; or flips:P, such that it flips P times as many mask "
        "entries as the layer keeps (flips:0.003), or track:P, the same by the steps before",
        low=0,
        high=1e6,
        parse=FlipBudget.parse,
    )
    ascent: Chosen = part("ascent", "exact", "S2AP: in which steps the scores are perturbed, and along what")
    warmup_epochs: int = key(5, "S2AP: epochs of plain steps at the start", low=0)
    control: bool = key(
        False,
        "S2AP: search without it too, from the same model and with the same random numbers, to compare with (folder plain of the run)",
    )
    sampled_gradients: float = key(
        1.0,
        "the share of the output channels, drawn anew in each step, in which pruned weights get gradients where convolutions run on their "
        "kept weights; 1: all, exactly",
        low=0.001,
        high=1,
    )
    perturbs: str = key(
        "scores", "S2AP: what is perturbed; weights: the kept ones, as AWP does it, as a control", choices=("scores", "weights")
    )


@dataclass(frozen=True)
class Finetune(Training):
    lr: float = key(0.01, "learning rate at the start", low=0, high=1e6)
    awp: bool = key(True, "adversarial perturbation of the kept weights")
    gamma: float = key(5e-3, "AWP: size of the perturbation relative to the kept weights' norm, layer by layer", low=0, high=1e6)
    warmup_epochs: int = key(0, "AWP: epochs of plain steps at the start", low=0)


@dataclass(frozen=True)
class Evaluate:
    steps: int = key(20, "steps of the attack on the test images", low=0, high=10**6)
    step_size: float = key(2 / 255, "length of one step", low=0, high=1e6)
    batch_size: int = key(256, "images per batch", low=1, high=10**7)
    images_per_epoch: int = key(256, "test images for the robust accuracy after each training epoch", low=1)
    attacks: tuple[str, ...] = key((), "more attacks on the test images of each finished model, by name, such as autoattack")
    latency_at_scale: bool = key(
        False, "measure on the CPU how fast a ResNet-18 of prune.sparsity runs too, where the recipe's own network is too small to show it"
    )


@dataclass(frozen=True)
class Recipe:
    """A complete, valid recipe. ``Recipe()`` holds the defaults."""

    name: str = key("recipe", "what the run is called, and its folder in runs/", pattern=r"\w[\w .+-]{0,99}")
    plugins: tuple[str, ...] = key((), "modules to import first, for the parts that they register")
    seed: int = key(0, "everything random follows from it", low=0, high=2**32 - 1)
    device: str = key("auto", "auto (CUDA where there is a device), or a torch device such as cpu or cuda:1")
    save_every: float = key(30.0, "seconds of training after which the state is saved within an epoch", low=0)
    threads: int = key(0, "CPU threads, on which the last bits of sums depend; 0: as many as torch takes", low=0, high=1024)
    precision: str = key(
        "fp32",
        "of the forwards and backwards in training and in the accuracies of its epochs, not of parameters, scores or the last evaluation",
        choices=PRECISIONS,
    )
    channels_last: bool = key(False, "in training, images have their channels innermost in memory, which is faster on a GPU")
    compile: bool = key(False, "in training, the model runs as torch.compile makes it, in all batches of full size")
    cuda_graphs: bool = key(False, "what is compiled runs in CUDA graphs, which spares a GPU the launches of its kernels")
    model: Chosen = part("model", "digits_cnn", "the architecture")
    data: Data = field(default_factory=Data)
    attack: Chosen = part("attack", "pgd", "the training attack; the test images are attacked with its norm and eps too")
    pretrain: Pretrain = field(default_factory=Pretrain)
    prune: Prune = field(default_factory=Prune)
    finetune: Finetune = field(default_factory=Finetune)
    evaluate: Evaluate = field(default_factory=Evaluate)


@functools.cache
def part_places() -> dict[str, dict[str, Any]]:
    """Where a recipe names parts: the path of each table with a ``name``, the default, and the keys ``beside`` it that are no options."""
    places = {}
    types = types_of(Recipe)
    for f in fields(Recipe):
        inside = fields(types[f.name]) if is_dataclass(types[f.name]) and types[f.name] is not Chosen else ()
        for g in (f, *inside):
            if "kind" in g.metadata:
                path = f.name if g is f or g.metadata["flat"] else f"{f.name}.{g.name}"
                places[path] = {**g.metadata, "beside": [h.name for h in inside if h is not g] if g.metadata["flat"] else []}
    return places
