"""The ``s2ap`` command.

Exit codes: 0 done; 1 a defect of this program (with a traceback); 2 input that cannot be used, told in one line; 130 stopped by Ctrl-C,
with the command that goes on. Only ``doctor`` works from the core install; the others ask for the ``train`` extra.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from . import __version__

STOPPED = 130
LONGEST = 1000  # characters of an error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (the process's own if None) and returns the exit code."""
    try:
        arguments = _parser().parse_args(argv)
        return arguments.command(arguments)
    except BrokenPipeError:  # nobody reads the report; what was done is in its files
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        # These types are how the library reports input that it cannot use: recipes, files, devices, missing packages, losses that diverge.
        return _refuse(str(error))
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        return _refuse(f"not enough memory; choose a smaller model or smaller batches ({error})")
    except KeyboardInterrupt:
        print("s2ap: interrupted", file=sys.stderr)
        return STOPPED


def _refuse(message: str) -> int:
    """Prints why the input cannot be used, in one line that no name of a file or text in it can break, and returns the exit code."""
    line = "".join(c if c.isprintable() else " " for c in message)
    print(f"s2ap: error: {line if len(line) <= LONGEST else line[: LONGEST - 3] + '...'}", file=sys.stderr)
    return 2


# --------------------------------------------------------------------------------------------------------------------- commands


def _run(arguments: argparse.Namespace) -> int:
    return _train(arguments, None)


def _one_stage(arguments: argparse.Namespace) -> int:
    return _train(arguments, arguments.stage)


def _train(arguments: argparse.Namespace, stage: str | None) -> int:
    """Trains one stage, or all of them where ``stage`` is None.

    Everything is read and checked first; the folder is made when nothing is left that could be wrong with the input.
    """
    from . import pipeline
    from .pipeline import RunFolder, Session, Stopped, extras, progress
    from .pipeline.model_file import adopt, model_before
    from .pipeline.run_folder import check_space, read_recipe

    extras.require()
    start = getattr(arguments, "start", None)
    recipe = read_recipe(arguments.resume) if arguments.resume else _recipe(arguments)
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
        path = arguments.out or _free_folder(recipe.name)
        check_space(path, pipeline.check_prunable(recipe, data))
        folder = RunFolder.create(path, recipe)
        adopt(start, folder.path / f"{before}.safetensors", recipe, data)
    elif before is None:
        path = arguments.out or _free_folder(recipe.name)
        check_space(path, pipeline.check_prunable(recipe, data))
        folder = RunFolder.create(path, recipe)
    else:
        raise ValueError(f"{stages[0]}: expected --from CHECKPOINT, the {before} model to start from")

    show = progress.for_this_terminal()
    show.say(f"{recipe.name}: writing to {folder.path}")
    with folder, _stop_on_interrupt() as stop:
        try:
            pipeline.run(Session(recipe, data, folder, show, stop), stages)
        except Stopped:
            command = "run" if stage is None else stage
            print(f"s2ap: stopped; to go on: s2ap {command} --resume {shlex.quote(str(folder.path))}", file=sys.stderr)
            return STOPPED
    _show_report(folder.path)
    return 0


def _recipe(arguments: argparse.Namespace):
    """The recipe of the command line."""
    from .pipeline import load_recipe

    if not arguments.recipe:
        raise ValueError("expected a recipe, or --resume RUN_DIR")
    return load_recipe(arguments.recipe, _overrides(arguments))


def _plugins(arguments: argparse.Namespace) -> list[str]:
    """The modules that ``--set plugins=...`` names: a checkpoint that needs them does not choose what is imported."""
    pairs = [text.partition("=") for text in arguments.set]
    return [value for name, _, value in pairs if name.strip() == "plugins"]


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """``--set`` and its short forms, the latter last."""
    overrides = list(arguments.set)
    if arguments.data_dir is not None:
        overrides.append(f"data.dir={_absolute(arguments.data_dir)}")
    if arguments.seed is not None:
        overrides.append(f"seed={arguments.seed}")
    if arguments.device is not None:
        overrides.append(f"device={arguments.device}")
    return overrides


def _absolute(folder: str) -> Path:
    """``--data-dir`` as the recipe keeps it: right from wherever the run goes on."""
    try:
        return Path(folder).expanduser().absolute()
    except RuntimeError as error:  # no such user, or none that has a home
        raise ValueError(f"--data-dir {folder}: {error}") from error


def _refuse_with_resume(arguments: argparse.Namespace) -> None:
    names = {"recipe": "the recipe", "out": "--out", "start": "--from", "set": "--set", "seed": "--seed", "device": "--device"}
    names["data_dir"] = "--data-dir"
    if given := [text for name, text in names.items() if getattr(arguments, name, None) not in (None, [])]:
        raise ValueError(f"--resume: the run goes on with its own recipe; leave out {', '.join(given)}")


def _free_folder(name: str) -> Path:
    """``runs/NAME``, or the first of ``runs/NAME-2``, ``runs/NAME-3``, ... that does not exist."""
    numbered = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
    return next(path for path in numbered if not path.exists())


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
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


def _evaluate(arguments: argparse.Namespace) -> int:
    import torch

    from . import pipeline, report, speed
    from .pipeline import evaluate, extras, load_model, progress, recipe_to_evaluate

    extras.require()
    for text in arguments.set:
        if text.partition(".")[0] in ("model", *pipeline.STAGES):
            raise ValueError(f"--set {text}: the model is made already; evaluate takes keys of data, attack and evaluate")
    recipe = recipe_to_evaluate(arguments.checkpoint, _overrides(arguments), _plugins(arguments))
    device = pipeline.pick_device(recipe.device)
    data = pipeline.open_data(recipe)
    if arguments.engine == "sparse" and device.type != "cpu":
        raise ValueError(f"--engine sparse: expected the CPU, got {device}; add --device cpu")
    model, _, name = load_model(arguments.checkpoint, data=data, device=device)
    network = None
    if arguments.engine == "sparse":
        from .engine import compile_sparse

        network = compile_sparse(model, torch.rand(1, *data.shape))
    with pipeline.reproducible(recipe):
        row = evaluate(recipe, data, model, name, run=network, show=progress.for_this_terminal()) | {"seconds": 0.0}
        report.print_table({"recipe": recipe.name, "attack": pipeline.describe_attack(recipe), "rows": [row]})
        if network is not None:
            for part in network.dense_parts:
                print(f"dense: {part.name}: {part.reason}")
            report.print_latency(speed.latency(model, data.shape))
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    import torch

    from . import report, speed
    from .nn import cost

    if arguments.calibrate:
        print(f"{cost.save(speed.calibrate())}: {cost.load()}")
        if not arguments.checkpoint:
            return 0
    if not arguments.checkpoint:
        raise ValueError("profile: expected CHECKPOINT or --calibrate")
    from . import pipeline
    from .pipeline import extras, load_model, recipe_to_evaluate

    extras.require()
    data = pipeline.open_data(recipe_to_evaluate(arguments.checkpoint, _overrides(arguments), _plugins(arguments)))
    model, _, _ = load_model(arguments.checkpoint, data=data)
    report.print_profile(speed.profile(model, torch.rand(arguments.batch, *data.shape)), arguments.batch)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from .pipeline import extras

    extras.require()
    _show_report(arguments.run_dir)
    return 0


def _show_report(folder: Path) -> None:
    from . import report, speed

    results = report.read_results(folder)
    plots = report.write_plots(folder)
    report.print_table(results)
    if "latency" in results:
        report.print_latency(speed.Latency(**row) for row in results["latency"])
    if plots:
        print(f"Plots: {', '.join(str(path) for path in plots)}")


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import doctor

    return doctor()


# ----------------------------------------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_refuse(f"{message[: LONGEST // 2]} (see {self.prog} --help)"))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="s2ap", description="Adversarially robust pruning with S2AP: pretrain, prune, finetune, evaluate.")
    parser.add_argument("--version", action="version", version=f"s2ap {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, function: Callable, summary: str, description: str = "", **options) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=description or f"{summary[0].upper()}{summary[1:]}.", **options)
        sub.set_defaults(command=function)
        return sub

    sub = command("run", _run, "the whole pipeline: pretrain, prune, finetune, evaluate", **_recipe_help())
    _training_options(sub)
    for stage, summary, start in (
        ("pretrain", "train a dense model robustly", ""),
        ("prune", "search the mask of a dense model", "dense"),
        ("finetune", "train a pruned model under its mask", "pruned"),
    ):
        sub = command(stage, _one_stage, summary, **_recipe_help())
        sub.set_defaults(stage=stage)
        _training_options(sub)
        if start:
            sub.add_argument("--from", dest="start", metavar="CHECKPOINT", type=Path, help=f"the {start} model to start from")
    sub = command("evaluate", _evaluate, "clean and robust accuracy of a checkpoint")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="such as RUN_DIR/finetuned.safetensors")
    sub.add_argument(
        "--engine", choices=("torch", "sparse"), default="torch", help="sparse: on the kept weights only, on the CPU; also its latency"
    )
    _recipe_options(sub)
    sub = command("profile", _profile, "what a checkpoint's convolutions cost on the CPU, dense and on their kept weights")
    sub.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", type=Path, help="such as RUN_DIR/finetuned.safetensors")
    sub.add_argument("--batch", type=_count, default=64, metavar="N", help="images at once (default: 64)")
    sub.add_argument("--calibrate", action="store_true", help="fit the cost model to this machine first, and keep its numbers")
    _recipe_options(sub)
    sub = command("report", _report, "the table and the plots of a finished run")
    sub.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    command("doctor", _doctor, "which kernels run here, and why")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 6 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1 to 999999, got {text}")
    return int(text)


def _training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a recipe's name or the path of a TOML file")
    _recipe_options(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: runs/NAME)")
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with a run that was stopped")


def _recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe; may be repeated")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data's parquet files (data.dir)")
    parser.add_argument("--seed", metavar="N", help="everything random follows from it (seed)")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, ... (device)")


def _recipe_help() -> dict:
    """The recipes and their keys, for the end of a help page."""
    from .pipeline.recipe import explained_keys, known_recipes

    lines = [f"recipes: {', '.join(known_recipes())}", "", "keys of a recipe, with their defaults:"]
    lines += [f"  {key:<32} {text}" for key, text in explained_keys()]
    return {"epilog": "\n".join(lines), "formatter_class": argparse.RawDescriptionHelpFormatter}


if __name__ == "__main__":
    sys.exit(main())
