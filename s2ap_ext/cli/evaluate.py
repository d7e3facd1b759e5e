"""``s2ap evaluate``: clean and robust accuracy of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import options
from .parser import Commands


def add(commands: Commands) -> None:
    parser = commands.add("evaluate", _evaluate, "clean and robust accuracy of a checkpoint")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="such as RUN_DIR/finetuned.safetensors")
    parser.add_argument(
        "--engine", choices=("torch", "sparse"), default="torch", help="sparse: on the kept weights only, on the CPU; also its latency"
    )
    options.add_to(parser)


def _evaluate(arguments: argparse.Namespace) -> int:
    import torch

    from .. import pipeline, report, speed
    from ..pipeline import evaluate, extras, load_model, progress, recipe_to_evaluate

    extras.require()
    for text in arguments.set:
        if text.partition(".")[0] in ("model", *pipeline.STAGES):
            raise ValueError(f"--set {text}: the model is made already; evaluate takes keys of data, attack and evaluate")
    recipe = recipe_to_evaluate(arguments.checkpoint, options.overrides_of(arguments), options.plugins_of(arguments))
    device = pipeline.pick_device(recipe.device)
    data = pipeline.open_data(recipe)
    if arguments.engine == "sparse" and device.type != "cpu":
        raise ValueError(f"--engine sparse: expected the CPU, got {device}; add --device cpu")
    model, _, name = load_model(arguments.checkpoint, data=data, device=device)
    network = None
    if arguments.engine == "sparse":
        from ..engine import compile_sparse

        network = compile_sparse(model, torch.rand(1, *data.shape))
    with pipeline.reproducible(recipe):
        row = evaluate(recipe, data, model, name, run=network, show=progress.for_this_terminal()) | {"seconds": 0.0}
        report.print_table({"recipe": recipe.name, "attack": pipeline.describe_attack(recipe), "rows": [row]})
        if network is not None:
            for part in network.dense_parts:
                print(f"dense: {part.name}: {part.reason}")
            report.print_latency(speed.latency(model, data.shape))
    return 0
