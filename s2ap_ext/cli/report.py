"""``s2ap report``: the tables and plots of finished runs, and pages about runs and experiments."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .parser import Commands

if TYPE_CHECKING:
    from ..report import Run


def add(commands: Commands) -> None:
    parser = commands.add("report", _report, "the tables and plots of finished runs, or a page about runs and experiments")
    parser.add_argument("folders", metavar="RUN", type=Path, nargs="+", help="the folder of a finished run, or of an experiment")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables of results as Markdown")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the results of the runs, a row for each model")


def _report(arguments: argparse.Namespace) -> int:
    from .. import report
    from ..pipeline import checkpoint, extras

    extras.require()
    runs, experiments = report.read_all(arguments.folders)
    for run in runs:
        _show(run)
    for experiment in experiments:
        print(f"{experiment.name}: {experiment.summary['verdict']}")
    writers: dict[Path | None, Callable[[], str]] = {
        arguments.html: lambda: report.to_html(runs, experiments),
        arguments.markdown: lambda: report.to_markdown(runs, experiments),
        arguments.csv: lambda: report.to_csv(runs),
    }
    for path, write in writers.items():
        if path is not None:
            checkpoint.write_text(path, write())
            print(f"Written: {path}")
    return 0


def show(folder: Path) -> None:
    """Prints the tables of the finished run in ``folder``, draws its plots, and says what to look at next."""
    from .. import report

    runs, _ = report.read_all([folder])
    _show(runs[0])
    last = folder / f"{runs[0].results['rows'][-1]['model']}.safetensors"
    run, page, model = (shlex.quote(str(path)) for path in (folder, folder / "report.html", last))
    print(f"Next:  s2ap analyze {run}    # how sharp the loss is, how stable the masks are")
    print(f"       s2ap report {run} --html {page}    # all of it on one page")
    print(f"       s2ap evaluate {model} --attack autoattack    # stronger attacks")
    if "plain" in runs[0].results:
        print("       s2ap experiment compare    # with S2AP and without it, over five seeds")


def _show(run: Run) -> None:
    from .. import report, speed

    plots = report.write_plots(run)
    report.print_table(run.results)
    if "latency" in run.results:
        report.print_latency([speed.Latency(**row) for row in run.results["latency"]])
    if "latency_at_scale" in run.results:
        found = run.results["latency_at_scale"]
        title = f"inference of a {report.scale_of(found)}"
        report.print_latency([speed.Latency(**row) for row in found["rows"]], title)
    if plots:
        print(f"Plots: {', '.join(str(path) for path in plots)}")
