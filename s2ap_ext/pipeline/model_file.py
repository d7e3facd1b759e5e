"""Models: made from a recipe, and kept in files that hold the recipe too."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..data import Dataset, seeded_generator
from ..methods import Method
from . import checkpoint
from .plan import STAGES, stage_before
from .recipe import from_table, to_table
from .sections import Recipe


def pick_device(name: str) -> torch.device:
    """The torch device that ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` means; raises ValueError if it is unknown or absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: cannot use {name!r} ({str(error).splitlines()[0]})") from None
    if device.type == "meta":
        raise ValueError("device: expected one that holds data, got 'meta'")
    return device


def new_model(recipe: Recipe, data: Dataset) -> nn.Module:
    """The recipe's model for ``data``, untrained, on the recipe's device."""
    return _build(recipe, recipe.seed, _shape(data)).to(pick_device(recipe.device))


def _build(recipe: Recipe, seed: int, shape: dict[str, int]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return recipe.model.make().build(**shape)


def make_sparse(model: nn.Module, recipe: Recipe, tell: Callable[[str], None] = lambda line: None) -> Method:
    """Turns the layers of ``model`` that the recipe prunes into pruned ones, in place, and returns the method that did it.

    Args:
        tell: takes what there is to say about layers that stay dense.
    """
    settings = recipe.prune
    method = settings.method.make()
    how = {"allocation": settings.allocation.make(), "granularity": settings.granularity, "exclude": settings.exclude}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method.sparsify(model, settings.sparsity, generator=seeded_generator(recipe.seed, 0, 1), **how)
    for warning in caught:
        tell(str(warning.message))
    return method


def check_prunable(recipe: Recipe, data: Dataset) -> None:
    """Raises ValueError if the recipe's granularity or its excluded layers do not fit its model: before the hours of pretraining."""
    make_sparse(new_model(recipe, data), recipe)


def identity(recipe: Recipe, data: Dataset) -> str:
    """What tells a run from any other: a digest of all of its recipe that its results depend on, and of its images.

    The files of a run hold it, so that a file of another run, or of this one before its recipe was edited, is not taken for its own.
    """
    table = to_table(recipe)
    del table["save_every"]
    table["data"].pop("dir", None)  # the images count, not where they lie
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode())
    for split in (data.train, data.test):
        for tensor in (split.images, split.labels):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def save_model(path: Path, model: nn.Module, name: str, recipe: Recipe, run: str, data: Dataset) -> None:
    """Writes ``model`` with the recipe that made it and the identity of the ``run``; ``name`` is dense, pruned or finetuned."""
    about = {"model": name, "recipe": to_table(recipe), "shape": _shape(data), "run": run}
    checkpoint.save(path, model.state_dict(), about)


def load_model(path: str | Path, *, data: Dataset | None = None, device: torch.device | str = "cpu") -> tuple[nn.Module, Recipe, str]:
    """The model of a checkpoint, sparse if it was, the recipe that made it, and which model it is (dense, pruned or finetuned).

    Args:
        path: the checkpoint. It may need plugins, which must have been imported before.
        data: images that the model must fit, by the number of their channels and classes.
        device: where the model goes.

    Raises:
        ValueError: no such file; a truncated or foreign file; one that holds no model; a model that does not fit ``data``; a plugin that
            was not imported.
    """
    tensors, about = checkpoint.load(path)
    if not isinstance(about, dict) or not {"shape", "recipe", "model"} <= about.keys():
        stage = about.get("stage") if isinstance(about, dict) else None
        raise ValueError(f"checkpoint {path}: expected a model, found {f'the state of the stage {stage}' if stage else 'something else'}")
    shape, recipe = about["shape"], from_table(about["recipe"], f"checkpoint {path}", import_plugins=False)
    if data is not None and shape != _shape(data):
        text = "{in_channels} channels and {num_classes} classes"
        raise ValueError(f"checkpoint {path}: the model is for {text.format(**shape)}, {data.name} has {text.format(**_shape(data))}")
    model = _build(recipe, 0, shape)
    if about["model"] != "dense":
        make_sparse(model, recipe)
    checkpoint.load_state(model, tensors, path)
    return model.to(device), recipe, about["model"]


def start_from(recipe: Recipe, stage: str, path: str | Path, data: Dataset) -> Recipe:
    """Checks that the checkpoint ``path`` is a model that ``stage`` can start from, and returns ``recipe`` with the sections that made it.

    Raises:
        ValueError: as :func:`load_model`; a checkpoint of another stage, or of another model than the recipe's.
    """
    _, made_by, name = load_model(path, data=data)
    wanted = model_before(recipe, stage)
    if name != wanted:
        raise ValueError(f"checkpoint {path}: {stage} starts from a {wanted} model, this one is {name}")
    if made_by.model != recipe.model:
        settings = " ".join(f"--set model.{key}={value}" for key, value in to_table(made_by)["model"].items())
        raise ValueError(f"checkpoint {path}: not the recipe's model; to take it, add {settings}")
    earlier = list(STAGES)[: list(STAGES).index(stage)]
    return replace(recipe, **{section: getattr(made_by, section) for section in earlier})


def adopt(path: str | Path, into: Path, recipe: Recipe, data: Dataset) -> None:
    """Copies the model of the checkpoint ``path`` to ``into``, as a file of the run of ``recipe`` on ``data``."""
    tensors, about = checkpoint.load(path)
    checkpoint.save(into, tensors, about | {"run": identity(recipe, data)})


def model_before(recipe: Recipe, stage: str) -> str | None:
    """The name of the model that ``stage`` starts from; None if it starts from an untrained one."""
    before = stage_before(recipe, stage)
    return None if before is None else STAGES[before]


def _shape(data: Dataset) -> dict[str, int]:
    """What a model must know of the images."""
    return {"num_classes": data.num_classes, "in_channels": data.shape[0]}
