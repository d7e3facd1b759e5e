"""What the numbers say, in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..intervals import difference, wilson
from .records import Run


def percent(fraction: float) -> str:
    """``0.9012`` as ``"90.1 %"``."""
    return f"{100 * fraction:.1f} %"


def verdict(results: dict[str, Any]) -> str:
    """How the last model of a run compares with its dense one, or, where it has no other model, how accurate that is."""
    rows = results["rows"]
    last, dense = rows[-1], next((row for row in rows if row["model"] == "dense"), None)
    low, high = wilson(last["robust"], last["images"])
    robust = f"{percent(last['robust'])} robust accuracy (95 % interval {100 * low:.1f} to {100 * high:.1f})"
    if dense is None or dense is last:
        return f"The {last['model']} model has {robust} and {percent(last['clean'])} clean accuracy on {last['images']:,} test images."
    found = (
        f"At {percent(last['sparsity'])} sparsity the {last['model']} model has {robust}, {_against(last, dense, 'robust')} the dense one, "
        f"{_told(last, dense)}; its clean accuracy is {percent(last['clean'])}, {_against(last, dense, 'clean')} the dense one's."
    )
    return f"{found} {_without_s2ap(results)}" if "plain" in results else found


def _without_s2ap(results: dict[str, Any]) -> str:
    """How the mask of the search with S2AP compares with that of the same search without it."""
    plain, pruned = results["plain"], next(row for row in results["rows"] if row["model"] == "pruned")
    return (
        f"The mask found with S2AP has {percent(pruned['robust'])} robust accuracy, {_against(pruned, plain, 'robust')} the one found "
        f"without it, {_told(pruned, plain)}."
    )


def verdict_of_runs(runs: Sequence[Run]) -> str:
    """:func:`verdict` for a single run; for several, which of their last models is the most robust."""
    if len(runs) == 1:
        return verdict(runs[0].results)
    ranked = sorted(runs, key=lambda run: -run.rows[-1]["robust"])
    best, next_best = (run.rows[-1] for run in ranked[:2])
    low, high = wilson(best["robust"], best["images"])
    return (
        f"Of the {len(runs)} runs, {ranked[0].name} ends with the highest robust accuracy, {percent(best['robust'])} "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f}), {_against(best, next_best, 'robust')} {ranked[1].name}, "
        f"{_told(best, next_best)}."
    )


def _against(row: dict[str, Any], other: dict[str, Any], kind: str) -> str:
    """Such as ``"1.2 points above"``; ``"as much as"`` where there is no difference."""
    gap = round(100 * (row[kind] - other[kind]), 1)
    return "as much as" if gap == 0 else f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}"


def _told(row: dict[str, Any], other: dict[str, Any]) -> str:
    low, high = difference(row["robust"], other["robust"], row["images"], other["images"])
    if low <= 0 <= high:
        return f"which {row['images']:,} test images do not tell from no difference"
    return f"more than chance explains on {row['images']:,} test images"
