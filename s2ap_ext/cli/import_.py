"""``s2ap import``: a dense model that others trained becomes a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import options
from .parser import Commands


def add(commands: Commands) -> None:
    parser = commands.add("import", _import, "make a checkpoint from the weights of a dense model that others trained")
    parser.add_argument("file", metavar="FILE", type=Path, help="safetensors, or what torch.save wrote (read with weights_only=True)")
    parser.add_argument("recipe", metavar="RECIPE", help="whose model it is: a recipe's name or the path of a TOML file")
    parser.add_argument("--out", type=Path, metavar="CHECKPOINT", default=Path("dense.safetensors"), help="(default: dense.safetensors)")
    options.add_to(parser)


def _import(arguments: argparse.Namespace) -> int:
    from .. import pipeline
    from ..attacks import accuracy
    from ..data import Batches
    from ..pipeline import extras, foreign, progress
    from ..pipeline.model_file import identity, save_model

    extras.require()
    recipe = options.recipe_of(arguments)
    if arguments.out.exists():
        raise ValueError(f"--out: {arguments.out} exists already; choose another name")
    data = pipeline.open_data(recipe)
    model = foreign.import_model(arguments.file, recipe, data)
    few = data.test.first(recipe.evaluate.images_per_epoch)
    with pipeline.reproducible(recipe):
        found = accuracy(model, Batches(few, recipe.evaluate.batch_size, device=next(model.parameters()).device))
    save_model(arguments.out, model, "dense", recipe, identity(recipe, data), data)
    print(f"{arguments.out}: {recipe.model.name}, {progress.percent(found.clean)} of {found.images} test images classified rightly")
    if found.clean < 2 / data.num_classes:
        print("That is about chance. Models of this package take images in [0, 1]: was this one trained on normalised images?")
    return 0
