"""The results of runs as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from ..intervals import wilson
from .of_experiments import tables
from .of_runs import results_table
from .page import Table
from .records import Experiment, Run
from .verdict import verdict_of_runs

COLUMNS = (
    "run",
    "model",
    "clean",
    "clean_low",
    "clean_high",
    "robust",
    "robust_low",
    "robust_high",
    "sparsity",
    "kept",
    "images",
    "seconds",
)


def to_csv(runs: Sequence[Run]) -> str:
    """A row for each run and model, accuracies and the ends of their 95 % intervals in [0, 1].

    Raises:
        ValueError: no runs; the results of an experiment are a CSV file already.
    """
    if not runs:
        raise ValueError("--csv: expected the folder of a run; the results of an experiment are in its table.csv")
    written = io.StringIO()
    writer = csv.DictWriter(written, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for run in runs:
        for row in run.rows:
            ends = {}
            for kind in ("clean", "robust"):
                ends[f"{kind}_low"], ends[f"{kind}_high"] = wilson(row[kind], row["images"])
            writer.writerow({"run": run.name, **row, **ends})
    return written.getvalue()


def to_markdown(runs: Sequence[Run], experiments: Sequence[Experiment] = ()) -> str:
    """The verdict and the tables of results, without figures."""
    parts = []
    for one in experiments:
        parts += [f"# Experiment: {one.name}", one.summary["verdict"], *map(_table, tables(one))]
    if runs:
        parts += [f"# {', '.join(run.name for run in runs)}", verdict_of_runs(runs), _table(results_table(runs))]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    rows = [table.columns, ["---", *("---:" for _ in table.columns[1:])], *table.rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return f"**{table.caption}**\n\n" + "\n".join(lines)
