"""``s2ap experiment``: arms x seeds, compared with each other."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from . import options
from .parser import STOPPED, Commands, count
from .run import free_folder, stop_on_interrupt


def add(commands: Commands) -> None:
    parser = commands.add("experiment", _experiment, "run the arms of a plan with several seeds, and compare them", **_help_page())
    parser.add_argument("plan", nargs="?", metavar="PLAN", help="a plan's name or the path of a TOML file")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the experiment (default: experiments/PLAN); go on if it is there"
    )
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with an experiment that was stopped")
    parser.add_argument("--seeds", type=count, metavar="N", help="run each arm with the seeds 0 to N-1 (default: the plan's)")
    parser.add_argument("--workers", type=count, metavar="N", help="runs at a time (default: one for each core, or 1 on a GPU)")
    options.add_to(parser, seed=False)


def _help_page() -> dict[str, Any]:
    from ..experiments import known_plans, load_plan

    lines = ["plans:", *(f"  {name:<16} {load_plan(name).question}" for name in known_plans())]
    return {"epilog": "\n".join(lines), "formatter_class": argparse.RawDescriptionHelpFormatter}


def _experiment(arguments: argparse.Namespace) -> int:
    from .. import experiments
    from ..pipeline import extras, progress

    extras.require()
    overrides = options.overrides_of(arguments)
    if arguments.resume:
        if given := [text for text in (arguments.plan and "the plan", arguments.out and "--out", overrides and "--set") if text]:
            raise ValueError(f"--resume: the experiment goes on with its own plan; leave out {', '.join(given)}")
        plan, out = experiments.read_plan(arguments.resume).changed(seeds=arguments.seeds), arguments.resume
    elif arguments.plan:
        plan = experiments.load_plan(arguments.plan).changed(overrides, arguments.seeds)
        out = arguments.out or free_folder(plan.name, "experiments")
    else:
        raise ValueError("expected a plan, or --resume DIR")

    show = progress.for_this_terminal()
    with stop_on_interrupt() as stop:
        result = experiments.run(plan, out, workers=arguments.workers, show=show, stop=stop)
        stopped = stop()
    if result.summary is not None:
        _show(result.summary, out)
    if result.failed:
        label, why = next(iter(result.failed.items()))
        more = f" (and {len(result.failed) - 1} more)" if len(result.failed) > 1 else ""
        raise ValueError(f"{len(result.failed)} of the runs failed: {label}: {why}{more}")
    if stopped and not result.finished:
        print(f"s2ap: stopped; to go on: s2ap experiment --resume {shlex.quote(str(out))}", file=sys.stderr)
        return STOPPED
    return 0


def _show(summary: dict[str, Any], out: Path) -> None:
    """Prints a table of the arms and the verdict."""
    from ..experiments.words import percent
    from ..pipeline.extras import optional

    table = optional("rich.table").Table(title=f"{summary['name']}: mean over seeds [95 % interval]", title_style="bold")
    for column in ("arm", "runs", "model", "clean %", "robust %"):
        table.add_column(column, justify="left" if column in ("arm", "model") else "right")
    for arm in summary["arms"]:
        table.add_row(arm["arm"], str(arm["n"]), arm["model"], percent(arm["clean"]), percent(arm["robust"]))
    optional("rich.console").Console().print(table)
    print(summary["verdict"])
    print(f"Results: {out / 'summary.md'}, {out / 'summary.json'}, {out / 'table.csv'}")
