"""``s2ap profile``: what the convolutions of a checkpoint cost on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import options
from .parser import Commands, count


def add(commands: Commands) -> None:
    parser = commands.add("profile", _profile, "what a checkpoint's convolutions cost on the CPU, dense and on their kept weights")
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", type=Path, help="such as RUN_DIR/finetuned.safetensors")
    parser.add_argument("--batch", type=count, default=64, metavar="N", help="images at once (default: 64)")
    parser.add_argument("--calibrate", action="store_true", help="fit the cost model to this machine first, and keep its numbers")
    options.add_to(parser)


def _profile(arguments: argparse.Namespace) -> int:
    import torch

    from .. import report, speed
    from ..nn import cost

    if arguments.calibrate:
        print(f"{cost.save(speed.calibrate())}: {cost.load()}")
        if not arguments.checkpoint:
            return 0
    if not arguments.checkpoint:
        raise ValueError("profile: expected CHECKPOINT or --calibrate")
    from .. import pipeline
    from ..pipeline import extras, load_model, recipe_to_evaluate

    extras.require()
    data = pipeline.open_data(recipe_to_evaluate(arguments.checkpoint, options.overrides_of(arguments), options.plugins_of(arguments)))
    model, _, _ = load_model(arguments.checkpoint, data=data)
    report.print_profile(speed.profile(model, torch.rand(arguments.batch, *data.shape)), arguments.batch)
    return 0
