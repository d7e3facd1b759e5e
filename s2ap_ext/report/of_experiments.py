"""The section of a page about an experiment, from its summary and its table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import plots
from .page import Artist, Figure, Section, Table, percents, points, span
from .records import Experiment

METRICS = ("robust", "clean")


def experiment(found: Experiment, number: int, artist: Artist) -> Section:
    """The arms with their intervals, the comparisons, and the sweep where the arms differ in gamma."""
    arms = found.summary["arms"]
    marks = {kind: [_mark(arm[kind]) for arm in arms] for kind in METRICS}
    best = max(arms, key=lambda arm: arm["robust"]["mean"])
    figure = artist.figure(
        plots.intervals,
        [arm["arm"] for arm in arms],
        marks,
        "accuracy, %",
        title="Arms and their intervals",
        text="Means over the seeds. An interval says how far the mean of so many seeds may be from that of all.",
        alt=f"Accuracies of each arm. {best['arm']} has the highest mean robust accuracy, {percents(best['robust']['mean'])} %.",
    )
    swept = _sweep(found, artist)
    return Section(
        f"experiment-{number}",
        f"Experiment: {found.name}",
        found.summary["verdict"],
        figures=[figure, *([] if swept is None else [swept])],
        tables=tables(found),
        folded=[_raw(found)],
    )


def tables(found: Experiment) -> list[Table]:
    """The arms with their intervals and, where there are some, the comparisons."""
    rows = [[arm["arm"], *(cell for kind in METRICS for cell in _cells(arm[kind])), str(arm["n"])] for arm in found.summary["arms"]]
    columns = ["arm", *(cell for kind in METRICS for cell in (f"{kind}, %", "95 % interval")), "seeds"]
    both = [Table("Mean over the seeds of each arm, with 95 % intervals", columns, rows)]
    if compared := found.summary["comparisons"]:
        rows = [
            [
                f"{row['arm']} against {row['against']}",
                row["metric"],
                *_difference(row),
                f"{row['p']:.3g}",
                f"{row['p_corrected']:.3g}",
            ]
            for row in compared
        ]
        columns = ["comparison", "metric", "difference (of accuracies in points)", "95 % interval", "p", "p, corrected"]
        both.append(Table("Paired by seed; p is corrected for the number of comparisons", columns, rows))
    return both


def _cells(value: Mapping[str, float]) -> list[str]:
    return [percents(value["mean"]), span((value["low"], value["high"]))]


def _difference(row: Mapping[str, Any]) -> list[str]:
    """The difference of two arms with its interval: that of accuracies in points, any other in the metric's own unit."""
    if row.get("unit", "points") == "points":
        return [points(row["difference"]), span((row["low"], row["high"]))]
    return [f"{row['difference']:+.3g}", f"{row['low']:.3g} to {row['high']:.3g}"]


def _mark(value: Mapping[str, float]) -> tuple[float, float, float]:
    return 100 * value["mean"], 100 * value["low"], 100 * value["high"]


def _sweep(found: Experiment, artist: Artist) -> Figure | None:
    """Accuracies over gamma, where the table tells one gamma for each arm and the arms differ in it."""
    gammas: dict[str, set[Any]] = {}
    for row in found.table:
        gammas.setdefault(row["arm"], set()).add(row.get("gamma"))
    swept = [arm for arm in found.summary["arms"] if len(one := gammas.get(arm["arm"], set())) == 1 and isinstance(next(iter(one)), float)]
    places = {arm["arm"]: next(iter(gammas[arm["arm"]])) for arm in swept}
    if len(set(places.values())) < 3:
        return None
    ordered = sorted(swept, key=lambda arm: places[arm["arm"]])
    rows = [[f"{places[arm['arm']]:g}", *(cell for kind in METRICS for cell in _cells(arm[kind]))] for arm in ordered]
    columns = ["gamma", *(cell for kind in METRICS for cell in (f"{kind}, %", "95 % interval"))]
    marks = {kind: [_mark(arm[kind]) for arm in ordered] for kind in METRICS}
    return artist.figure(
        plots.sweep,
        [places[arm["arm"]] for arm in ordered],
        marks,
        "gamma",
        title="The sweep over gamma",
        text="Means over the seeds, with their 95 % intervals as bands.",
        alt="Robust and clean accuracy over gamma.",
        numbers=Table("By gamma", columns, rows),
    )


def _raw(found: Experiment) -> Table:
    """Every row of the table that all else is computed from."""
    columns = list(found.table[0]) if found.table else ["arm"]
    rows = [[f"{cell:.6g}" if isinstance(cell, float) else str(cell or "") for cell in row.values()] for row in found.table]
    return Table("All results: a row for each arm, seed and model", columns, rows)
