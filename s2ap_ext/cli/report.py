"""``s2ap report``: the table and the plots of a finished run."""

from __future__ import annotations

import argparse
from pathlib import Path

from .parser import Commands


def add(commands: Commands) -> None:
    parser = commands.add("report", _report, "the table and the plots of a finished run")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)


def _report(arguments: argparse.Namespace) -> int:
    from ..pipeline import extras

    extras.require()
    show(arguments.run_dir)
    return 0


def show(folder: Path) -> None:
    """Prints the tables of the finished run in ``folder`` and draws its plots."""
    from .. import report, speed
    from ..pipeline.run_folder import read_results

    results = read_results(folder)
    plots = report.write_plots(folder)
    report.print_table(results)
    if "latency" in results:
        report.print_latency(speed.Latency(**row) for row in results["latency"])
    if plots:
        print(f"Plots: {', '.join(str(path) for path in plots)}")
