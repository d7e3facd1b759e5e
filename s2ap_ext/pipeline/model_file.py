"""Models: made from a recipe, and kept in files that hold the recipe too."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import parts
from ..data import Dataset, Split, seeded_generator
from ..data.encoded import FITTING
from ..methods import Method
from ..models.base import at_most
from ..nn.accelerated import check_cuda_graphs, check_precision
from . import checkpoint
from .evaluation import check_attacks
from .plan import STAGES, plan, stage_before
from .recipe import from_table, load_recipe, override, to_table
from .sections import Chosen, Recipe

RECENT = 16  # batches of images, the last of an epoch, from which BatchNorm's statistics are taken anew
MOST = 65_536  # channels, classes and pixels of a side that a checkpoint may ask for
MOST_VALUES = 2**20  # of an image that a checkpoint may ask for
SLACK = 1000  # parameters beyond those in its file at which counting a model's is given up at the latest


def pick_device(name: str) -> torch.device:
    """The torch device that ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` means; raises ValueError if it is unknown or absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device: cannot use {name!r} ({str(error).splitlines()[0]})") from None
    if device.type == "meta":
        raise ValueError("device: expected one that holds data, got 'meta'")
    return device


def new_model(recipe: Recipe, data: Dataset) -> nn.Module:
    """The recipe's model for ``data``, untrained, on the recipe's device.

    Raises:
        ValueError: a model that is larger than this machine's memory; a precision that the device does not compute in; CUDA graphs without
            a CUDA device or ``compile``.
    """
    device = pick_device(recipe.device)
    check_precision(recipe.precision, device)
    check_cuda_graphs(recipe.cuda_graphs, recipe.compile, device)
    count = recipe.model.make().count_parameters(**_sizes(recipe, data))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * count > memory:
        keys = ", ".join(f"model.{f.name}" for f in fields(recipe.model.settings)) or "model"
        raise ValueError(
            f"{keys}: expected a model that fits this machine's {memory / 2**30:.1f} GiB of memory, got one of {count:,} parameters"
        )
    return _build(recipe, recipe.seed, _sizes(recipe, data)).to(device)


def _build(recipe: Recipe, seed: int, sizes: dict[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: nn.Module = recipe.model.make().build(**sizes)
        return model


def make_sparse(model: nn.Module, recipe: Recipe, image: tuple[int, int, int], tell: Callable[[str], None] = lambda line: None) -> Method:
    """Turns the layers of ``model`` that the recipe prunes into pruned ones, in place, and returns the method that did it.

    Args:
        image: the shape of an image, [channels, height, width].
        tell: takes what there is to say about layers that stay dense.
    """
    settings = recipe.prune
    method: Method = settings.method.make()
    how = {"allocation": settings.allocation.make(), "granularity": settings.granularity, "exclude": settings.exclude}
    if settings.tied:
        how |= {"tied": True, "example": torch.zeros(2, *image, device=next(model.parameters()).device)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method.sparsify(model, settings.sparsity, generator=seeded_generator(recipe.seed, 0, 1), **how)
    for warning in caught:
        tell(str(warning.message))
    return method


def check_prunable(recipe: Recipe, data: Dataset) -> int:
    """Raises ValueError if what the recipe says does not fit together: before the hours of pretraining.

    That is a granularity, excluded layers or attacks to evaluate with that the model has not, or a loss that does not go with the attack.

    Returns:
        About how many bytes the files of a run take at most: its models and, while one is written, three states of up to three times
        a pruned model (itself, its momentum and its average) and the last images.
    """
    for stage in plan(recipe):
        settings = getattr(recipe, stage)
        try:
            settings.loss.make(adversary=recipe.attack.make(), label_smoothing=settings.label_smoothing)
        except ValueError as error:
            raise ValueError(f"{stage}: {error}") from None
    if recipe.prune.perturbs == "weights" and isinstance(recipe.prune.gamma, str):
        raise ValueError(f"prune.gamma: expected a number where prune.perturbs is weights, got {recipe.prune.gamma!r}: no mask entry flips")
    _self_contained(recipe)  # what the files of its models hold
    model = new_model(recipe, data)
    check_attacks(recipe, model, data)
    make_sparse(model, recipe, data.shape)
    pruned: int = sum(tensor.nbytes for tensor in model.state_dict().values())
    images: int = min(len(data.train), max(getattr(recipe, stage).batch_size for stage in STAGES))
    models = 5 if recipe.prune.control else 3  # a control has a dense and a pruned one of its own
    return models * pruned + 3 * (3 * pruned + RECENT * 4 * math.prod(data.shape) * images)


def identity(recipe: Recipe, data: Dataset) -> str:
    """What tells a run from any other: a digest of all of its recipe that its results depend on, and of its images.

    The files of a run hold it, so that a file of another run, or of this one before its recipe was edited, is not taken for its own.
    For images that are streamed the checksums of their files stand.
    """
    table = to_table(recipe)
    del table["save_every"]
    for setting in recipe.data.source.make().local:  # the images count, not where they lie
        table["data"].pop(setting, None)
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode())
    for split in (data.train, data.test):
        for part in split.fingerprint():
            digest.update(part)
    if not all(isinstance(split, Split) for split in (data.train, data.test)):
        digest.update(json.dumps(data.files.checksums, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def save_model(path: Path, model: nn.Module, name: str, recipe: Recipe, run: str, data: Dataset) -> None:
    """Writes ``model`` with the recipe that made it and the identity of the ``run``; ``name`` is dense, pruned or finetuned."""
    about = {"model": name, "recipe": to_table(_self_contained(recipe)), "shape": _sizes(recipe, data), "run": run}
    checkpoint.save(path, model.state_dict(), about | {"image": list(data.shape)})


def load_model(
    path: str | Path, *, data: Dataset | None = None, device: torch.device | str = "cpu", plugins: Iterable[str] = ()
) -> tuple[nn.Module, Recipe, str]:
    """The model of a checkpoint, sparse if it was, the recipe that made it, and which model it is (dense, pruned or finetuned).

    Args:
        path: the checkpoint.
        data: images that the model must fit, by the number of their channels and classes and, where it takes one size only, by their size.
        device: where the model goes.
        plugins: modules that the checkpoint may use besides those that recipes read before have named; they are imported. A checkpoint
            may have been written by somebody else, so it does not choose itself what is imported or called.

    Raises:
        ValueError: no such file; a truncated or foreign file; one that holds no model; a model that does not fit ``data``, or that is
            not described by the file alone; a module that is not among ``plugins``.
        ImportError: the model is one of a package that is not installed.
    """
    tensors, about, recipe = _read(path, plugins)
    sizes = about["shape"]
    if data is not None and sizes != (found := _sizes(recipe, data)):
        raise ValueError(f"checkpoint {path}: the model is for {_told(sizes)}, {data.name} has {_told(found)}")
    held = sum(t.numel() for t in tensors.values())
    try:
        if outside := recipe.model.make().outside():
            raise ValueError(f"its model needs {outside}, and a checkpoint does not choose what is read")
        # Compared before anything is made, so that a file of some bytes cannot ask for a model of any size.
        with at_most(2 * held + SLACK):
            count = recipe.model.make().count_parameters(**sizes)
        if count > held:
            raise ValueError(f"does not fit the model: it has {count:,} parameters, and the file holds {held:,} numbers")
        model = _build(recipe, 0, sizes)
        if about["model"] != "dense":
            make_sparse(model, recipe, _checked_image(about.get("image")))
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from None
    checkpoint.load_state(model, tensors, path)
    return model.to(device), recipe, about["model"]


def recipe_to_evaluate(path: str | Path, overrides: Iterable[str] = (), plugins: Iterable[str] = ()) -> Recipe:
    """The recipe of the checkpoint ``path`` with ``overrides``, for measuring its model.

    A checkpoint may have been written by somebody else, so it does not choose what is read: of its data section, the name of a set whose
    images come with a package is taken, but neither a set of the hub nor a folder, unless ``overrides`` name one of the two. Nor does it
    say how large images become; where they were not as large as by default, ``overrides`` must say so too.

    Raises:
        ValueError: as :func:`load_model` and :func:`override`; data that ``overrides`` must name.
    """
    _, _, recipe = _read(path, plugins)
    source, overrides, sizes = recipe.data.source, list(overrides), []
    keys = {text.partition("=")[0].strip() for text in overrides}
    if parts.find("data", source.name).pattern or fields(source.settings):
        if not keys & {"data", "data.name", "data.dir"}:
            way = f"add --data-dir DIR or --set data.name={source.name}"
            raise ValueError(f"checkpoint {path}: its images are those of {source.name}; to read them, {way}")
        plain = Chosen.of("data", source.name)
        sizes = [f"--set data.{name}={getattr(source, name)}" for name in FITTING if getattr(source, name, 0) != getattr(plain, name, 0)]
        recipe = replace(recipe, data=replace(recipe.data, source=plain))
    recipe = override(recipe, overrides)
    if sizes and recipe.data.source.name == source.name and not keys & {f"data.{name}" for name in FITTING}:
        raise ValueError(f"checkpoint {path}: its images were brought to another size than by default; add {' '.join(sizes)}")
    return recipe


def _read(path: str | Path, plugins: Iterable[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any], Recipe]:
    """What the checkpoint ``path`` holds: tensors, the checked header, and the recipe in it."""
    load_recipe("digits", [f"plugins={','.join(plugins)}"])
    tensors, about = checkpoint.load(path)
    if not {"shape", "recipe", "model"} <= about.keys():
        found = f"the state of the stage {about['stage']!s:.80}" if "stage" in about else "something else"
        raise ValueError(f"checkpoint {path}: expected a model, found {found}")
    if about["model"] not in STAGES.values():
        raise ValueError(f"checkpoint {path}: model: expected one of {', '.join(STAGES.values())}, got {str(about['model'])[:80]}")
    recipe = from_table(about["recipe"], f"checkpoint {path}", import_plugins=False)
    return tensors, about | {"shape": _checked_sizes(about["shape"], recipe, path)}, recipe


def _checked_sizes(found: Any, recipe: Recipe, path: str | Path) -> dict[str, Any]:
    """``found``, as JSON holds them, as sizes of the recipe's model."""
    known = recipe.model.make().sizes((1, 1, 1), 1)
    if isinstance(found, dict) and found.keys() == known.keys():
        size = found.get("image_size", [1, 1])
        if isinstance(size, list) and len(size) == 2:
            sizes = {name: tuple(value) if name == "image_size" else value for name, value in found.items()}
            if all(type(value) is int and 1 <= value <= MOST for value in (found["in_channels"], found["num_classes"], *size)):
                return sizes
    raise ValueError(f"checkpoint {path}: shape: expected {' and '.join(sorted(known))} from 1 to {MOST}, got {str(found)[:80]}")


def _checked_image(found: Any) -> tuple[int, int, int]:
    """``found``, as JSON holds it, as the shape of an image."""
    sizes = found if isinstance(found, list) and all(type(size) is int and size >= 1 for size in found) else []
    if len(sizes) == 3 and math.prod(sizes) <= MOST_VALUES:
        return (sizes[0], sizes[1], sizes[2])
    raise ValueError(f"image: expected channels, height and width, {MOST_VALUES} values at most, got {str(found)[:80]}")


def start_from(recipe: Recipe, stage: str, path: str | Path, data: Dataset) -> Recipe:
    """Checks that the checkpoint ``path`` is a model that ``stage`` can start from, and returns ``recipe`` with the sections that made it.

    Raises:
        ValueError: as :func:`load_model`; a checkpoint of another stage, or of another model than the recipe's.
    """
    _, made_by, name = load_model(path, data=data)
    wanted = model_before(recipe, stage)
    if name != wanted:
        raise ValueError(f"checkpoint {path}: {stage} starts from a {wanted} model, this one is {name}")
    if made_by.model != _self_contained(recipe).model:
        settings = " ".join(f"--set model.{key}={shlex.quote(str(value))}" for key, value in to_table(made_by)["model"].items())
        raise ValueError(f"checkpoint {path}: not the recipe's model; to take it, add {settings}")
    earlier = list(STAGES)[: list(STAGES).index(stage)]
    return replace(recipe, **{section: getattr(made_by, section) for section in earlier})


def _self_contained(recipe: Recipe) -> Recipe:
    """``recipe`` as the files of its models hold it."""
    return replace(recipe, model=Chosen("model", recipe.model.name, recipe.model.make().self_contained().settings))


def adopt(path: str | Path, into: Path, recipe: Recipe, data: Dataset) -> None:
    """Copies the model of the checkpoint ``path`` to ``into``, as a file of the run of ``recipe`` on ``data``."""
    tensors, about = checkpoint.load(path)
    checkpoint.save(into, tensors, about | {"run": identity(recipe, data)})


def model_before(recipe: Recipe, stage: str) -> str | None:
    """The name of the model that ``stage`` starts from; None if it starts from an untrained one."""
    before = stage_before(recipe, stage)
    return None if before is None else STAGES[before]


def _sizes(recipe: Recipe, data: Dataset) -> dict[str, Any]:
    """What the recipe's model must know of the images."""
    sizes: dict[str, Any] = recipe.model.make().sizes(data.shape, data.num_classes)
    return sizes


def _told(sizes: dict[str, Any]) -> str:
    size = "{}x{} pixels, ".format(*sizes["image_size"]) if "image_size" in sizes else ""
    return f"{size}{sizes['in_channels']} channels and {sizes['num_classes']} classes"
