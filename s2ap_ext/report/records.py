"""What a report is made of: the records of runs and the results of experiments, read from their folders and checked."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pipeline.recipe import to_table, to_toml
from ..pipeline.run_folder import read_analysis, read_metrics, read_recipe, read_results

SUMMARY, TABLE = "summary.json", "table.csv"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: of its folder; with the folder above where two runs of a report have the same name.
        path: the folder.
        results: its results.json.
        epochs: the records of its training epochs.
        analysis: its analysis.json, None where ``s2ap analyze`` was not asked.
    """

    name: str
    path: Path
    results: dict[str, Any]
    epochs: list[dict[str, Any]]
    analysis: dict[str, Any] | None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row for each model (:func:`rows_of`)."""
        return rows_of(self.results)

    @property
    def search(self) -> list[dict[str, Any]]:
        """The records of the mask search's epochs."""
        return [record for record in self.epochs if record["stage"] == "prune"]

    def recipe(self) -> dict[str, Any]:
        """The recipe's keys, as ``--set`` takes them, with their values."""
        return _flat(to_table(read_recipe(self.path)))

    def config(self) -> str:
        """The recipe as TOML."""
        return to_toml(read_recipe(self.path))


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each model in results.json, in the order of the stages; the plain search's before that of the search with S2AP."""
    rows = list(results["rows"])
    if "plain" in results:
        rows.insert([row["model"] for row in rows].index("pruned"), results["plain"] | {"model": "no S2AP"})
    return rows


@dataclass(frozen=True)
class Experiment:
    """The results of an experiment.

    Attributes:
        name: of the experiment.
        path: its folder.
        summary: its summary.json: ``arms`` with their means and intervals, ``comparisons``, and the ``verdict``.
        table: its table.csv, a row for each arm, seed and model; numbers are floats.
    """

    name: str
    path: Path
    summary: dict[str, Any]
    table: list[dict[str, Any]]


def read(path: str | Path) -> Run | Experiment:
    """What the folder ``path`` holds.

    Raises:
        ValueError: neither the folder of a finished run nor that of an experiment; records that are not as they were written.
    """
    path = Path(path)
    return _read_experiment(path) if (path / SUMMARY).is_file() else _read_run(path)


def read_all(paths: list[Path]) -> tuple[list[Run], list[Experiment]]:
    """What the folders hold, runs and experiments apart; runs of one name are told apart by the folder above. Errors as :func:`read`."""
    found = [read(path) for path in paths]
    runs = [one for one in found if isinstance(one, Run)]
    names = [run.name for run in runs]
    runs = [run if names.count(run.name) == 1 else Run(str(run.path), run.path, run.results, run.epochs, run.analysis) for run in runs]
    return runs, [one for one in found if isinstance(one, Experiment)]


def _read_run(path: Path) -> Run:
    results = read_results(path)
    epochs = [record for record in read_metrics(path) if "epoch" in record]
    return Run(path.resolve().name, path, results, epochs, read_analysis(path))


def _read_experiment(path: Path) -> Experiment:
    file = path / SUMMARY
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        name, arms, verdict = summary["name"], summary["arms"], summary["verdict"]
        for arm in arms:
            for metric in ("clean", "robust"):
                _ = [float(arm[metric][key]) for key in ("mean", "low", "high")]
            _ = arm["arm"], int(arm["n"])
        for row in summary["comparisons"]:
            _ = row["arm"], row["against"], row["metric"], [float(row[key]) for key in ("difference", "low", "high", "p", "p_corrected")]
        if not arms or not isinstance(verdict, str):
            raise ValueError("no arms, or no verdict")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: not the summary of an experiment ({type(error).__name__}: {error})") from None
    table = path / TABLE
    if not table.is_file():
        raise ValueError(f"{path}: expected {TABLE} beside {SUMMARY}, found none")
    with open(table, newline="", encoding="utf-8", errors="replace") as lines:
        rows = [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(lines)]
    if missing := {"arm", "seed", "model", "clean", "robust"} - set(rows[0] if rows else ()):
        raise ValueError(f"{table}: expected the columns arm, seed, model, clean and robust, found no {', '.join(sorted(missing))}")
    return Experiment(str(name), path, summary, rows)


def _number(text: Any) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
