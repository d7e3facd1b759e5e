"""``s2ap sweep``: the settings of a recipe with which the finished model is most robust, by Optuna."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from . import options
from .parser import STOPPED, Commands, count
from .run import free_folder, stop_on_interrupt

SHOWN = 10  # trials in the table at the end


def add(commands: Commands) -> None:
    parser = commands.add("sweep", _sweep, "search the settings of a recipe for the most robust model", **options.help_page())
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a recipe's name or the path of a TOML file")
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="KEY=SPEC",
        help="a key to vary: KEY=log:LOW:HIGH, KEY=uniform:LOW:HIGH, KEY=int:LOW:HIGH or KEY=choice:A,B; may be repeated",
    )
    parser.add_argument("--trials", type=count, default=20, metavar="N", help="go on until so many trials have ended (default: 20)")
    parser.add_argument("--storage", default="", metavar="URL", help="Optuna's database, for several machines (default: a file in DIR)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the sweep (default: sweeps/NAME); go on if it is there")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with a sweep that was stopped, or that is to have more trials")
    options.add_to(parser)


def _sweep(arguments: argparse.Namespace) -> int:
    from ..experiments import sweep
    from ..pipeline import extras, progress

    extras.require((*extras.TRAINING, "optuna"))
    if arguments.resume:
        if given := [name for name in ("recipe", "out", "param", "set", "seed", "device", "data_dir") if getattr(arguments, name)]:
            raise ValueError(f"--resume: the sweep goes on with its own recipe and parameters; leave out {', '.join(given)}")
        plan, out = sweep.read_sweep(arguments.resume), arguments.resume
    else:
        plan = sweep.Sweep(options.recipe_of(arguments), tuple(arguments.param))
        out = arguments.out or free_folder(plan.recipe.name, "sweeps")
    show = progress.Lines()
    with stop_on_interrupt() as stop:
        rows = sweep.run_sweep(plan, out, trials=arguments.trials, storage=arguments.storage, show=show, stop=stop)
        stopped = stop()
    _show(rows, out)
    if stopped:
        storage = f" --storage {shlex.quote(arguments.storage)}" if arguments.storage else ""
        go_on = f"s2ap sweep --resume {shlex.quote(str(out))} --trials {arguments.trials}{storage}"
        print(f"s2ap: stopped; to go on: {go_on}", file=sys.stderr)
        return STOPPED
    return 0


def _show(rows: list[dict[str, Any]], out: Path) -> None:
    """Prints the best trials and where everything is."""
    from ..pipeline.extras import optional

    if not rows:
        return
    columns = [name for name in rows[0] if name != "folder"]
    table = optional("rich.table").Table(title=f"the best of {len(rows)} trials", title_style="bold")
    for column in columns:
        table.add_column("robust %" if column == "robust" else column, justify="right")
    for row in rows[:SHOWN]:
        table.add_row(*(_cell(name, row[name]) for name in columns))
    optional("rich.console").Console().print(table)
    if rows[0]["robust"] is not None:
        print(f"The best: {rows[0]['folder']}")
    print(f"Results: {out / 'trials.csv'}")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if name == "robust" else f"{value:.4g}" if isinstance(value, float) else str(value)
