"""``s2ap evaluate``: clean and robust accuracy of a checkpoint, under the recipe's attack or under others by name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import options
from .parser import Commands


def add(commands: Commands) -> None:
    parser = commands.add("evaluate", _evaluate, "clean and robust accuracy of a checkpoint, under any attacks")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="such as RUN_DIR/finetuned.safetensors")
    parser.add_argument("--attack", action="append", default=[], metavar="NAME", help="such as autoattack; may be repeated (default: PGD)")
    parser.add_argument("--norm", metavar="NAME", help="of the attacks' ball: linf, l2 or l1 (attack.norm)")
    parser.add_argument("--eps", metavar="EPS", help="radius of the ball, such as 8/255 (attack.eps)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --attack: write the results to FILE, image by image")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="with --attack: where finished batches stay (default: evaluations/ beside CHECKPOINT)"
    )
    parser.add_argument(
        "--check-gradients", action="store_true", help="look for signs that gradients are masked, on evaluate.images_per_epoch images"
    )
    parser.add_argument(
        "--engine", choices=("torch", "sparse"), default="torch", help="sparse: on the kept weights only, on the CPU; also its latency"
    )
    options.add_to(parser)


def _evaluate(arguments: argparse.Namespace) -> int:
    import torch

    from .. import pipeline, report, speed
    from ..pipeline import evaluate, extras, load_model, progress, recipe_to_evaluate, runner

    extras.require()
    for text in arguments.set:
        if text.partition(".")[0] in ("model", *pipeline.STAGES):
            raise ValueError(f"--set {text}: the model is made already; evaluate takes keys of data, attack and evaluate")
    overrides = options.overrides_of(arguments)
    overrides += [f"attack.{name}={value}" for name in ("norm", "eps") if (value := getattr(arguments, name)) is not None]
    overrides += [f"evaluate.attacks={','.join(arguments.attack)}"]
    recipe = recipe_to_evaluate(arguments.checkpoint, overrides, options.plugins_of(arguments))
    device = pipeline.pick_device(recipe.device)
    data = pipeline.open_data(recipe)
    if arguments.engine == "sparse" and device.type != "cpu":
        raise ValueError(f"--engine sparse: expected the CPU, got {device}; add --device cpu")
    for name in ("json", "out"):
        if getattr(arguments, name) is not None and not arguments.attack:
            raise ValueError(f"--{name}: expected --attack NAME too")
    if arguments.json is not None and not arguments.json.parent.is_dir():  # told before the attack and not after it
        raise ValueError(f"--json: expected a file in a folder that exists, got {arguments.json}")
    model, _, name = load_model(arguments.checkpoint, data=data, device=device)
    network = None
    if arguments.engine == "sparse":
        from ..engine import compile_sparse

        network = compile_sparse(model, torch.rand(1, *data.shape))
    show = progress.for_this_terminal()
    with pipeline.reproducible(recipe):
        if arguments.attack:
            keep = arguments.out or arguments.checkpoint.parent / runner.EVALUATIONS
            found = pipeline.attacked(recipe, data, model, name, engine=arguments.engine, keep=keep, show=show)
            report.print_evaluation(found, data.classes)
            if arguments.json is not None:
                about = {"checkpoint": str(arguments.checkpoint), "model": name, "data": data.name, **found.summary()}
                pipeline.checkpoint.write_text(arguments.json, json.dumps(about, indent=1) + "\n")
        if arguments.check_gradients:
            report.print_gradient_check(pipeline.gradients_checked(recipe, data, network or model, name, show=show))
        if not arguments.attack and not arguments.check_gradients:
            row = evaluate(recipe, data, model, name, run=network, show=show) | {"seconds": 0.0}
            report.print_table({"recipe": recipe.name, "attack": pipeline.describe_attack(recipe), "rows": [row]})
        if network is not None:
            for part in network.dense_parts:
                print(f"dense: {part.name}: {part.reason}")
            report.print_latency(speed.latency(model, data.shape))
    return 0
