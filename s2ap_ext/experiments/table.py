"""The table of an experiment: one row for each arm, seed and model, in ``table.csv``; all figures and verdicts are computed from it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..pipeline import STAGES
from ..pipeline.checkpoint import write_text
from ..pipeline.run_folder import read_analysis, read_metrics, read_results
from .attacked import read_attacked
from .jobs import Job

TABLE = "table.csv"
FIRST = ("arm", "seed", "model", "clean", "robust", "sparsity", "images", "seconds")  # columns that each table has, in front
NAMES = {"arm", "model"}  # columns that hold texts; all others hold numbers
# Of a record, what is told in another way.
LOST = {"stage", "epoch", "lr", "clean", "robust", "seconds", "steps", "flips", "unflipped", "passes", "gamma"}
Row = dict[str, Any]


def rows_of(job: Job) -> list[Row]:
    """The rows of a finished run, one for each of its models.

    The columns beside those of :data:`FIRST` are what the evaluation tells besides, by names with dots where it is nested, and of the
    training stage that left the model:

    * ``seconds_per_step``, over all epochs;
    * ``flips`` (mask entries that a perturbation flipped, per step, relative to the kept weights), over the epochs with perturbed steps;
    * ``unflipped``, the share of the layers in a step whose mask the perturbation did not change, over the same epochs;
    * ``passes`` (backward passes per step), over the same epochs, or over all where there are none;
    * ``gamma``, the mean over the layers and those epochs;
    * every other number in its records, such as ``mask_distance``, as the last epoch has it.

    Where ``s2ap analyze`` was asked about the run, ``lambda_max.scores`` and ``lambda_max.weights`` are the largest eigenvalues of the
    Hessian of the robust loss in the model's scores and in its kept weights.

    The row of the last model has the accuracies under the plan's further attacks too, as ``NAME.ATTACK`` and, under all of them,
    ``NAME.worst``.
    """
    records = read_metrics(job.folder)
    spectra = {model["model"]: model["spectra"] for model in (read_analysis(job.folder) or {"models": []})["models"]}
    stages = {model: stage for stage, model in STAGES.items()}
    rows = []
    for evaluated in read_results(job.folder)["rows"]:
        epochs = [record for record in records if record["stage"] == stages[evaluated["model"]] and "epoch" in record]
        about = {name: value for name, value in _numbers(evaluated).items() if name not in ("stage", "model")}
        sharpness = {f"lambda_max.{one['space']}": one["eigenvalues"][0] for one in spectra.get(evaluated["model"], [])}
        rows.append({"arm": job.arm, "seed": job.seed, "model": evaluated["model"]} | about | _of_training(epochs) | sharpness)
    rows[-1] |= read_attacked(job.folder, job.attacked)
    return rows


def _of_training(epochs: Sequence[Mapping[str, Any]]) -> Row:
    if not epochs:
        return {}
    row = {"seconds_per_step": sum(e["seconds"] for e in epochs) / max(sum(e["steps"] for e in epochs), 1)}
    perturbed = [e for e in epochs if "gamma" in e]
    if perturbed:
        row["flips"] = _mean(e["flips"] for e in perturbed)
        row["unflipped"] = _mean(e["unflipped"] for e in perturbed)
        row["gamma"] = _mean(value for e in perturbed for value in e["gamma"].values())
    if "passes" in epochs[0]:
        row["passes"] = _mean(e["passes"] for e in perturbed or epochs)
    return row | _numbers({name: value for name, value in epochs[-1].items() if name not in LOST})


def _numbers(table: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in ``table``, those of tables in it by dotted names."""
    found: dict[str, float] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)):
            found[f"{prefix}{name}"] = value
    return found


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Writes ``rows`` to the CSV file ``path``: the columns of :data:`FIRST`, then all others by name; what a row has not is left empty."""
    columns = [*FIRST, *sorted({name for row in rows for name in row} - {*FIRST})]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_table(path: str | Path) -> list[Row]:
    """The rows of a table that :func:`write_table` wrote, with the numbers as numbers and without what was left empty.

    Raises:
        ValueError: no such file, or one that is no such table, naming the line.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such table")
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ())[: len(FIRST)] != FIRST:
            raise ValueError(
                f"{path}: expected a table whose first columns are {', '.join(FIRST)}, got {', '.join(reader.fieldnames or ())[:80]}"
            )
        return [_parsed(row, f"{path}, line {number}") for number, row in enumerate(reader, 2)]


def _parsed(row: Mapping[str, str], where: str) -> Row:
    parsed: Row = {}
    for name, text in row.items():
        if name is None or text is None:
            raise ValueError(f"{where}: expected a value for each column")
        if text == "":
            continue
        try:
            parsed[name] = text if name in NAMES else int(text) if name == "seed" else float(text)
        except ValueError:
            raise ValueError(f"{where}: {name}: expected a number, got {text[:80]!r}") from None
        if isinstance(parsed[name], float) and not math.isfinite(parsed[name]):
            raise ValueError(f"{where}: {name}: expected a finite number, got {text}")
    return parsed
