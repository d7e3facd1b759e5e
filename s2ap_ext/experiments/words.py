"""The summary of an experiment in words: a verdict in one line, and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ALPHA = 0.05
TOLD = 6  # comparisons that the verdict tells one by one

# Columns of the mask search that the page shows, by what it calls them.
SEARCH = {
    "flips": "flips per step",
    "passes": "passes",
    "mask_distance": "mask moved",
    "gamma": "gamma",
    "lambda_max.scores": "lambda_max, scores",
    "lambda_max.weights": "lambda_max, weights",
    "seconds_per_step": "seconds per step",
}

Comparison = Mapping[str, Any]


def verdict(summary: Mapping[str, Any]) -> str:
    """What follows from the comparisons of the first metric, and what does not, in one line."""
    metric = summary["metric"]
    told = [one for one in summary["comparisons"] if one["metric"] == metric]
    what = {"robust": "Robust accuracy", "clean": "Clean accuracy"}.get(metric, metric)
    if not told:
        return f"{what}: nothing was compared, so nothing follows."
    tested = [one for one in told if one["p_corrected"] is not None]
    if not tested:
        return f"{what}: one seed each, so no difference can be told from chance and nothing follows."
    clear = sorted((one for one in tested if one["p_corrected"] < ALPHA), key=lambda one: one["p_corrected"])
    same = [one for one in tested if one["low"] == one["high"] == 0]
    others = [one for one in tested if one not in clear and one not in same]
    counts = sorted({one["n"] for one in tested})
    over = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    family = f", p corrected for {len(tested)} comparisons" if len(tested) > 1 else ""
    return f"{what} over {over} seeds (95 % intervals{family}): {' '.join([*_clear(clear), *_same(same), *_open(others)])}"


def _clear(comparisons: Sequence[Comparison]) -> list[str]:
    if not comparisons:
        return []
    lines = []
    for one in comparisons[:TOLD]:
        side = "above" if one["difference"] > 0 else "below"
        lines.append(f"{one['arm']} is {side} {one['against']} by {amount(abs(one['difference']), one['unit'])} {_ends(one)}")
    more = len(comparisons) - len(lines)
    return [f"{'; '.join(lines)}{f'; and {more} more such differences' if more else ''}."]


def _same(comparisons: Sequence[Comparison]) -> list[str]:
    if not comparisons:
        return []
    names = "; ".join(f"{one['arm']} and {one['against']}" for one in comparisons[:TOLD])
    more = len(comparisons) - TOLD
    return [f"The same in every run: {names}{f'; and {more} more pairs' if more > 0 else ''}."]


def _open(comparisons: Sequence[Comparison]) -> list[str]:
    if not comparisons:
        return []
    names = f"{len(comparisons)} comparisons"
    if len(comparisons) <= TOLD:
        names = "; ".join(
            f"{one['arm']} against {one['against']}, {amount(one['difference'], one['unit'], '+')} {_ends(one)}" for one in comparisons
        )
    widest = max(comparisons, key=lambda one: max(abs(one["low"]), abs(one["high"])))
    reach = amount(max(abs(widest["low"]), abs(widest["high"])), widest["unit"])
    equal = f"that is no evidence of equality, since the intervals leave room for differences of up to {reach}"
    return [f"No difference is shown for {names}: {equal}."]


def _ends(one: Comparison) -> str:
    low, high = (amount(one[end], one["unit"], "+", named=False) for end in ("low", "high"))
    return f"({low} to {high}, p = {one['p_corrected']:.2g})"


def amount(value: float, unit: str, sign: str = "", *, named: bool = True) -> str:
    """``value`` in its unit: accuracies in points."""
    if unit == "points":
        return f"{100 * value:{sign}.1f}{' points' if named else ''}"
    return f"{value:{sign}.3g}"


def percent(found: Mapping[str, Any]) -> str:
    """A mean accuracy with its interval, as in a summary, in percent."""
    if found["low"] is None:
        return f"{100 * found['mean']:.1f}"
    return f"{100 * found['mean']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def to_markdown(summary: Mapping[str, Any]) -> str:
    """The summary as a page: question, verdict, a table of the arms and one of the comparisons."""
    lines = [f"# {summary['name']}", "", summary["question"], "", f"**{summary['verdict']}**", ""]
    lines += ["Mean over seeds, in brackets the 95 % interval. Columns to the right of the sparsity are those of the mask search.", ""]
    lines += _arms(summary)
    if summary["comparisons"]:
        lines += ["", "Differences over the same seeds, with p of the paired t-test, and corrected for their number by Holm's method.", ""]
        lines += _comparisons(summary["comparisons"])
    return "\n".join(lines) + "\n"


def _arms(summary: Mapping[str, Any]) -> list[str]:
    arms = [(arm, arm["models"][arm["model"]], arm["models"].get("pruned", {})) for arm in summary["arms"]]
    attacked = list(dict.fromkeys(name for _, last, _ in arms for name in last if name.partition(".")[0] in summary["attacked"]))
    searched = [name for name in SEARCH if any(name in search for _, _, search in arms)]
    head = ["arm", "runs", "clean %", "robust %", *(f"{name} %" for name in attacked), "mask's robust %", "sparsity %"]
    rows = []
    for arm, last, search in arms:
        cells = [arm["arm"], str(arm["n"]), *(percent(last[name]) if name in last else "" for name in ("clean", "robust", *attacked))]
        cells += [percent(search["robust"]) if search else "", f"{100 * last['sparsity']['mean']:.1f}"]
        rows.append(cells + [f"{search[name]['mean']:.3g}" if name in search else "" for name in searched])
    return _table([*head, *(SEARCH[name] for name in searched)], rows, texts=1)


def _comparisons(comparisons: Sequence[Comparison]) -> list[str]:
    rows = []
    for one in comparisons:
        ends = [amount(one[end], one["unit"], "+", named=False) if one[end] is not None else "" for end in ("low", "high")]
        ps = [f"{one[p]:.2g}" if one[p] is not None else "" for p in ("p", "p_corrected")]
        cells = [one["arm"], one["against"], one["metric"], str(one["n"]), amount(one["difference"], one["unit"], "+")]
        rows.append([*cells, " to ".join(filter(None, ends)), *ps])
    return _table(["arm", "against", "of", "seeds", "difference", "95 % interval", "p", "corrected"], rows, texts=3)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> list[str]:
    """A table in Markdown, whose first columns, ``texts`` of them, hold texts and stand to the left."""
    line = "|---" * texts + "|---:" * (len(head) - texts) + "|"
    return [f"| {' | '.join(head)} |", line, *(f"| {' | '.join(row)} |" for row in rows)]
