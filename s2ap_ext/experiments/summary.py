"""What an experiment found, computed from its table alone: means and comparisons; :mod:`.words` puts them into words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..pipeline import STAGES
from .plan import Plan
from .statistics import holm, interval, paired
from .table import NAMES, Row
from .words import verdict

ACCURACIES = ("clean", "robust")


def summarise(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """The summary of a table.

    Returns:
        ``name``, ``question``, ``seeds``, and the first ``baseline`` and ``metric`` of the plan;
        ``arms``: of each arm with a run its name (``arm``), the number of runs (``n``), the name of its last ``model``, ``clean`` and
        ``robust`` of that model as ``mean``, ``low`` and ``high``, and the same of every column, by model, in ``models``;
        ``comparisons``: ``arm``, ``against``, ``metric``, its ``unit`` (points for accuracies, or none), ``n`` pairs, ``difference``,
        ``low``, ``high``, ``p``, and ``p_corrected`` by Holm's method for the number of comparisons of a metric;
        ``attacked``: the names of the plan's further attacks;
        ``verdict``: a line in words. Ends and ps that a single run does not give are None.
    """
    arms = [found for arm in plan.all_arms() if (found := _arm(arm, [row for row in rows if row["arm"] == arm])) is not None]
    comparisons = [one for metric in plan.metric for one in _comparisons(plan, metric, rows)]
    summary = {
        "name": plan.name,
        "question": plan.question,
        "baseline": plan.baseline[0] if plan.baseline else None,
        "metric": plan.metric[0],
        "seeds": plan.seeds,
        "attacked": list(plan.attacked),
        "arms": arms,
        "comparisons": comparisons,
    }
    return summary | {"verdict": verdict(summary)}


def _arm(arm: str, rows: Sequence[Row]) -> dict[str, Any] | None:
    if not rows:
        return None
    models = {model: _columns([row for row in rows if row["model"] == model]) for model in dict.fromkeys(row["model"] for row in rows)}
    last = list(models)[-1]
    runs = len({row["seed"] for row in rows})
    return {"arm": arm, "n": runs, "model": last, **{name: models[last][name] for name in ACCURACIES}, "models": models}


def _columns(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    columns = dict.fromkeys(name for row in rows for name in row if name not in NAMES and name != "seed")
    return {name: asdict(interval([row[name] for row in rows if name in row])) for name in columns}


def _comparisons(plan: Plan, metric: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for arm, against in plan.comparisons():
        ours, theirs = values_of(metric, arm, rows), values_of(metric, against, rows)
        seeds = [seed for seed in ours if seed in theirs]
        if seeds:
            difference = paired([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
            ends = {"difference": difference.mean, "low": difference.low, "high": difference.high, "p": difference.p}
            of = {"metric": metric, "unit": "points" if _is_accuracy(metric, plan) else "", "n": len(seeds)}
            found.append({"arm": arm, "against": against, **of, **ends, "p_corrected": None})
    tested: list[dict[str, Any]] = [one for one in found if one["p"] is not None]
    for one, corrected in zip(tested, holm([one["p"] for one in tested]), strict=True):
        one["p_corrected"] = corrected
    return found


def values_of(metric: str, arm: str, rows: Sequence[Row]) -> dict[int, float]:
    """By seed, the column ``metric`` of the arm's last model, or of the model that ``metric`` names before a dot."""
    model, dot, column = metric.partition(".")
    if not dot or model not in STAGES.values():
        column, model = metric, next((row["model"] for row in reversed(rows) if row["arm"] == arm), "")
    return {row["seed"]: row[column] for row in rows if row["arm"] == arm and row["model"] == model and column in row}


def _is_accuracy(metric: str, plan: Plan) -> bool:
    first, _, last = metric.rpartition(".")
    return last in ACCURACIES or first in plan.attacked
