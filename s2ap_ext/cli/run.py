"""``s2ap run``, ``pretrain``, ``prune`` and ``finetune``: the whole pipeline, or one of its stages."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from . import options, report
from .parser import STOPPED, Commands


def add(commands: Commands) -> None:
    _add_options(commands.add("run", _run, "the whole pipeline: pretrain, prune, finetune, evaluate", **options.help_page()))
    for stage, summary, start in (
        ("pretrain", "train a dense model robustly", ""),
        ("prune", "search the mask of a dense model", "dense"),
        ("finetune", "train a pruned model under its mask", "pruned"),
    ):
        parser = commands.add(stage, _one_stage, summary, **options.help_page())
        parser.set_defaults(stage=stage)
        _add_options(parser)
        if start:
            parser.add_argument("--from", dest="start", metavar="CHECKPOINT", type=Path, help=f"the {start} model to start from")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a recipe's name or the path of a TOML file")
    options.add_to(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/NAME)")
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with a run that was stopped")
    parser.add_argument("--verbose", action="store_true", help="a line for each epoch, not only for each stage")


def _run(arguments: argparse.Namespace) -> int:
    return _train(arguments, None)


def _one_stage(arguments: argparse.Namespace) -> int:
    return _train(arguments, arguments.stage)


def _train(arguments: argparse.Namespace, stage: str | None) -> int:
    """Trains one stage, or all of them where ``stage`` is None.

    Everything is read and checked first; the folder is made when nothing is left that could be wrong with the input.
    """
    from .. import pipeline
    from ..pipeline import RunFolder, Session, Stopped, extras, progress
    from ..pipeline.model_file import adopt, model_before
    from ..pipeline.run_folder import check_space, read_recipe

    extras.require()
    start = getattr(arguments, "start", None)
    recipe = read_recipe(arguments.resume) if arguments.resume else options.recipe_of(arguments)
    stages = pipeline.plan(recipe) if stage is None else (stage,)
    if stages[0] not in pipeline.plan(recipe):
        raise ValueError(f"{stages[0]}: the method {recipe.prune.method.name} has only the stages {', '.join(pipeline.plan(recipe))}")
    pipeline.pick_device(recipe.device)
    data = pipeline.open_data(recipe)
    before = model_before(recipe, stages[0])
    if arguments.resume:
        _refuse_with_resume(arguments)
        check_space(arguments.resume, pipeline.check_prunable(recipe, data))
        folder = RunFolder.resume(arguments.resume)
    elif start and before is None:
        raise ValueError(f"--from: {stages[0]} of the method {recipe.prune.method.name} starts from an untrained model; leave it out")
    elif start:
        recipe = pipeline.start_from(recipe, stages[0], start, data)
        path = arguments.out or free_folder(recipe.name)
        check_space(path, pipeline.check_prunable(recipe, data))
        folder = RunFolder.create(path, recipe)
        adopt(start, folder.path / f"{before}.safetensors", recipe, data)
    elif before is None:
        path = arguments.out or free_folder(recipe.name)
        check_space(path, pipeline.check_prunable(recipe, data))
        folder = RunFolder.create(path, recipe)
    else:
        raise ValueError(f"{stages[0]}: expected --from CHECKPOINT, the {before} model to start from")

    show = progress.for_this_terminal(arguments.verbose)
    show.say(f"{recipe.name}: writing to {folder.path}")
    with folder, stop_on_interrupt() as stop:
        try:
            pipeline.run(Session(recipe, data, folder, show, stop), stages)
        except Stopped:
            command = "run" if stage is None else stage
            print(f"s2ap: stopped; to go on: s2ap {command} --resume {shlex.quote(str(folder.path))}", file=sys.stderr)
            return STOPPED
    report.show(folder.path)
    return 0


def _refuse_with_resume(arguments: argparse.Namespace) -> None:
    names = {"recipe": "the recipe", "out": "--out", "start": "--from", "set": "--set", "seed": "--seed", "device": "--device"}
    names["data_dir"] = "--data-dir"
    if given := [text for name, text in names.items() if getattr(arguments, name, None) not in (None, [])]:
        raise ValueError(f"--resume: the run goes on with its own recipe; leave out {', '.join(given)}")


def free_folder(name: str, within: str = "runs") -> Path:
    """``WITHIN/NAME``, or the first of ``WITHIN/NAME-2``, ``WITHIN/NAME-3``, ... that does not exist."""
    numbered = (Path(within) / (name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
    return next(path for path in numbered if not path.exists())


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed, or the process told to end. A second time interrupts at once."""
    pressed = False

    def handle(signum: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        print("\ns2ap: stopping after this step (again to stop at once)", file=sys.stderr)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, handle) for number in signals]
    try:
        yield lambda: pressed
    finally:
        for number, earlier in zip(signals, before, strict=True):
            signal.signal(number, earlier)
