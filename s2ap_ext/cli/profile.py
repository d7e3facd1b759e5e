"""``s2ap profile``: what the convolutions of a checkpoint cost on this machine, or where a step of a mask search goes."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import options
from .parser import Commands, count

BATCH = 64  # images at once, for a checkpoint


def add(commands: Commands) -> None:
    summary = "what a checkpoint's convolutions cost on the CPU, dense and on their kept weights; or where a training step goes"
    parser = commands.add("profile", _profile, summary)
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", type=Path, help="such as RUN_DIR/finetuned.safetensors")
    parser.add_argument("--step", metavar="RECIPE", help="a step of the mask search of this recipe, beside one that sorts in every forward")
    parser.add_argument("--batch", type=count, metavar="N", help=f"images at once (default: {BATCH}; with --step as the recipe says)")
    parser.add_argument("--calibrate", action="store_true", help="fit the cost model to this machine first, and keep its numbers")
    options.add_to(parser)


def _profile(arguments: argparse.Namespace) -> int:
    if arguments.step:
        return _profile_step(arguments)
    import torch

    from .. import report, speed
    from ..nn import cost

    if arguments.calibrate:
        print(f"{cost.save(speed.calibrate())}: {cost.load()}")
        if not arguments.checkpoint:
            return 0
    if not arguments.checkpoint:
        raise ValueError("profile: expected CHECKPOINT, --step RECIPE or --calibrate")
    from .. import pipeline
    from ..pipeline import extras, load_model, recipe_to_evaluate

    extras.require()
    data = pipeline.open_data(recipe_to_evaluate(arguments.checkpoint, options.overrides_of(arguments), options.plugins_of(arguments)))
    model, _, _ = load_model(arguments.checkpoint, data=data)
    batch = arguments.batch or BATCH
    report.print_profile(speed.profile(model, torch.rand(batch, *data.shape)), batch)
    return 0


def _profile_step(arguments: argparse.Namespace) -> int:
    from .. import pipeline, report
    from ..pipeline import extras
    from ..pipeline.step_profile import profile_step

    extras.require()
    if arguments.checkpoint or arguments.calibrate:
        raise ValueError("--step: expected neither CHECKPOINT nor --calibrate beside it")
    recipe = pipeline.load_recipe(arguments.step, options.overrides_of(arguments))
    rows = profile_step(recipe, pipeline.open_data(recipe), batch=arguments.batch)
    how = f"S2AP, {recipe.prune.ascent.name} ascent" if recipe.prune.s2ap else "plain"
    images = arguments.batch or recipe.prune.batch_size
    report.print_steps(f"a step of {recipe.name}'s mask search: {recipe.prune.method.name}, {how}, {images} images", rows)
    return 0
