"""The comparison as a table, of the arms that are there: ``central.md`` in the folder of the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from measure import write

from .parts import AUTOATTACK

HEAD = (
    *("arm", "sparsity", "clean", "robust", "AutoAttack", "clean before finetuning", "robust before finetuning"),
    *("mask distance", "lambda_max", "minutes"),
)


def table(folder: Path) -> str:
    """Markdown: one line for each arm with a finetuned model, after the dense network."""
    central = folder / "central"
    (dense,) = _rows(central / "dense")
    lines = [f"| {' | '.join(HEAD)} |", "|---" + "|---:" * (len(HEAD) - 1) + "|"]
    accuracies = [_percent(dense["clean"]), _percent(dense["robust"]), _autoattack(central / "dense")]
    lines.append(_line("dense", "0", *accuracies, "", "", "", _sharpness(central / "dense"), _minutes(dense)))
    for results in sorted(central.glob("*-search/results.json")):
        arm = results.parent.name.removesuffix("-search")
        if not (central / arm / "results.json").exists():
            continue
        pruned, finetuned = _rows(results.parent)[-1], _rows(central / arm)[-1]
        moved = sum(record["mask_distance"] for record in _records(results.parent) if "mask_distance" in record)
        first, last = ([_percent(row[kind]) for kind in ("clean", "robust")] for row in (pruned, finetuned))
        accuracies = [*last, _autoattack(central / arm), *first]
        found = [f"{moved:.3f}", _sharpness(central / arm), _minutes(pruned, finetuned)]
        lines.append(_line(arm, _percent(finetuned["sparsity"]), *accuracies, *found))
    attack = json.loads((central / "dense/results.json").read_text(encoding="utf-8"))["attack"]
    note = (
        f"{dense['images']} test images, {attack}. The mask distance is that from epoch to epoch, summed over the search; lambda_max is "
        "the largest eigenvalue of the Hessian of the robust loss with respect to the kept weights of the last network."
    )
    return "\n".join([*lines, "", note]) + "\n"


def _rows(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))["rows"]


def _records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _autoattack(run: Path) -> str:
    """Empty until the run's last network was attacked."""
    answers = run / AUTOATTACK
    return _percent(json.loads(answers.read_text(encoding="utf-8"))["attacks"]["autoattack"]["accuracy"]) if answers.exists() else ""


def _sharpness(run: Path) -> str:
    """Empty until the run was analysed."""
    if not (run / "analysis.json").exists():
        return ""
    last = json.loads((run / "analysis.json").read_text(encoding="utf-8"))["models"][-1]
    (spectrum,) = [spectrum for spectrum in last["spectra"] if spectrum["space"] == "weights"]
    return f"{spectrum['eigenvalues'][0]:.4g}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _minutes(*rows: dict[str, Any]) -> str:
    return f"{sum(row['seconds'] for row in rows) / 60:.1f}"


if __name__ == "__main__":
    results = Path(sys.argv[1])
    write(results / "central.md", table(results).encode())
