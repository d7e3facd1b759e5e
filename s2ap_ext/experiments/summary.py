"""What an experiment found, computed from its table alone: means, comparisons, and a verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .plan import Plan
from .statistics import holm, interval, paired
from .table import NAMES, Row

ACCURACIES = ("clean", "robust")
ALPHA = 0.05
TOLD = 6  # comparisons that the verdict tells one by one
SHOWN = {
    "flips": "flips per step",
    "passes": "passes",
    "mask_distance": "mask moved",
    "gamma": "gamma",
    "seconds_per_step": "seconds per step",
}


def summarise(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """The summary of a table.

    Returns:
        ``name``, ``question``, ``seeds``, and the first ``baseline`` and ``metric`` of the plan;
        ``arms``: of each arm with a run its name (``arm``), the number of runs (``n``), the name of its last ``model``, ``clean`` and
        ``robust`` of that model as ``mean``, ``low`` and ``high``, and the same of every column, by model, in ``models``;
        ``comparisons``: ``arm``, ``against``, ``metric``, ``n`` pairs, ``difference``, ``low``, ``high``, ``p``, and ``p_corrected`` by
        Holm's method for the number of comparisons of a metric;
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
            found.append({"arm": arm, "against": against, "metric": metric, "n": len(seeds), **ends, "p_corrected": None})
    tested: list[dict[str, Any]] = [one for one in found if one["p"] is not None]
    for one, corrected in zip(tested, holm([one["p"] for one in tested]), strict=True):
        one["p_corrected"] = corrected
    return found


def values_of(metric: str, arm: str, rows: Sequence[Row]) -> dict[int, float]:
    """By seed, the column ``metric`` of the arm's last model, or of the model that ``metric`` names before a dot."""
    model, dot, column = metric.partition(".")
    if not dot or model not in ("dense", "pruned", "finetuned"):
        column, model = metric, next((row["model"] for row in reversed(rows) if row["arm"] == arm), "")
    return {row["seed"]: row[column] for row in rows if row["arm"] == arm and row["model"] == model and column in row}


# ---------------------------------------------------------------------------------------------------------------------- in words


def verdict(summary: dict[str, Any]) -> str:
    """What follows from the comparisons of the first metric, and what does not, in one line."""
    metric = summary["metric"]
    told = [one for one in summary["comparisons"] if one["metric"] == metric]
    what = "Robust accuracy" if metric == "robust" else "Clean accuracy" if metric == "clean" else metric
    if not told:
        return f"{what}: nothing was compared, so nothing follows."
    tested = [one for one in told if one["p_corrected"] is not None]
    if not tested:
        return f"{what}: one seed each, so no difference can be told from chance and nothing follows."
    clear = sorted((one for one in tested if one["p_corrected"] < ALPHA), key=lambda one: one["p_corrected"])
    open_ones = [one for one in tested if one["p_corrected"] >= ALPHA]
    parts = []
    if clear:
        lines = [
            f"{one['arm']} is {'above' if one['difference'] > 0 else 'below'} {one['against']} by {_difference(one, metric)}"
            for one in clear
        ]
        more = f"; and {len(lines) - TOLD} more such differences" if len(lines) > TOLD else ""
        parts.append(f"{'; '.join(lines[:TOLD])}{more}.")
    if open_ones:
        lines = [f"{one['arm']} against {one['against']}, {_difference(one, metric)}" for one in open_ones]
        reach = max(abs(end) for one in open_ones for end in (one["low"], one["high"]))
        names = "; ".join(lines) if len(lines) <= TOLD else f"the {'other ' if clear else ''}{len(lines)} comparisons"
        equal = f"that is no evidence of equality, since the intervals leave room for differences of up to {_amount(reach, metric)}"
        parts.append(f"No difference is shown for {names}: {equal}.")
    count, seeds = len(tested), sorted({one["n"] for one in tested})
    over = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    family = f", p corrected for {count} comparisons" if count > 1 else ""
    return f"{what} over {over} seeds (95 % intervals{family}): {' '.join(parts)}"


def _difference(one: dict[str, Any], metric: str) -> str:
    sign = "+" if one["p_corrected"] >= ALPHA else ""
    low, high = (_amount(one[end], metric, "+", unit=False) for end in ("low", "high"))
    mean = _amount(one["difference"] if sign else abs(one["difference"]), metric, sign)
    return f"{mean} ({low} to {high}, p = {one['p_corrected']:.2g})"


def _amount(value: float, metric: str, sign: str = "", *, unit: bool = True) -> str:
    if metric.rpartition(".")[2] in ACCURACIES:
        return f"{100 * value:{sign}.1f}{' points' if unit else ''}"
    return f"{value:{sign}.3g}"


def to_markdown(summary: dict[str, Any]) -> str:
    """The summary as a page: question, verdict, a table of the arms and one of the comparisons."""
    arms = summary["arms"]
    extra = [name for name in SHOWN if any(name in arm["models"].get("pruned", {}) for arm in arms)]
    head = ["arm", "runs", "clean %", "robust %", "mask's robust %", "sparsity %", *(SHOWN[name] for name in extra)]
    lines = [f"# {summary['name']}", "", summary["question"], "", f"**{summary['verdict']}**", ""]
    lines += ["Mean over seeds, in brackets the 95 % interval. Columns to the right of the sparsity are those of the mask search.", ""]
    lines += [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for arm in arms:
        last, searched = arm["models"][arm["model"]], arm["models"].get("pruned", {})
        cells = [arm["arm"], str(arm["n"]), percent(last["clean"]), percent(last["robust"])]
        cells += [percent(searched["robust"]) if searched else "", f"{100 * last['sparsity']['mean']:.1f}"]
        cells += [f"{searched[name]['mean']:.3g}" if name in searched else "" for name in extra]
        lines.append(f"| {' | '.join(cells)} |")
    if summary["comparisons"]:
        lines += [
            "",
            "Differences over the same seeds. p is that of the paired t-test, corrected for the number of comparisons by Holm's method.",
            "",
        ]
        lines += ["| arm | against | of | seeds | difference | 95 % interval | p | corrected |", "|---|---|---|---:|---:|---:|---:|---:|"]
    for one in summary["comparisons"]:
        ends = [_amount(one[end], one["metric"], "+", unit=False) if one[end] is not None else "" for end in ("low", "high")]
        ps = [f"{one[p]:.2g}" if one[p] is not None else "" for p in ("p", "p_corrected")]
        cells = [
            one["arm"],
            one["against"],
            one["metric"],
            str(one["n"]),
            _amount(one["difference"], one["metric"], "+"),
            " to ".join(ends),
            *ps,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def percent(found: Mapping[str, Any]) -> str:
    """A mean accuracy with its interval, as in a summary, in percent."""
    if found["low"] is None:
        return f"{100 * found['mean']:.1f}"
    return f"{100 * found['mean']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
