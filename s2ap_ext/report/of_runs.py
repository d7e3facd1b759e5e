"""The sections of a page about runs, from their records."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..intervals import difference, wilson
from . import plots
from .page import Artist, Figure, Section, Table, percents, points, span
from .records import Run

TRAINED_BY = {"dense": "pretrain", "pruned": "prune", "finetuned": "finetune"}
HEAT = {
    "layer_distance": ("mask distance", "entries that changed in the epoch, %"),
    "layer_flips": ("flips by perturbations", "entries that a step's perturbation flips, % of the kept weights"),
    "layer_churn": ("churn", "kept weights that came back, %"),
}


def named(runs: Sequence[Run], run: Run, text: str) -> str:
    """``text``, with the name of ``run`` in front where there are others."""
    return f"{run.name}: {text}" if len(runs) > 1 else text


def titled(runs: Sequence[Run], run: Run, text: str) -> str:
    """The same, to stand by itself: with a capital letter, unless it starts with a name."""
    return named(runs, run, text) if len(runs) > 1 else f"{text[:1].upper()}{text[1:]}"


def results(runs: Sequence[Run], artist: Artist) -> Section:
    """The table of all models, and a dot with its interval for each."""
    section = Section(
        "results",
        "Results",
        "Accuracies on the test images, with 95 % Wilson intervals. "
        "Robust accuracy counts the images that are classified correctly as they are and under the attack.",
    )
    section.tables.append(results_table(runs))
    names = [named(runs, run, row["model"]) for run in runs for row in run.rows]
    marks = {kind: [_mark(row, kind) for run in runs for row in run.rows] for kind in ("robust", "clean")}
    alt = "Robust and clean accuracy of each model with 95 % intervals; the numbers are in the table above."
    text = "The intervals say how far an accuracy may be from that on all images of this kind. The seed's own effect is not in them."
    section.figures.append(
        artist.figure(plots.intervals, names, marks, "accuracy, %", title="Accuracies and their intervals", text=text, alt=alt)
    )
    return section


def results_table(runs: Sequence[Run]) -> Table:
    """A row for each model of each run."""
    rows = []
    for run in runs:
        dense = next((row for row in run.rows if row["model"] == "dense"), None)
        for row in run.rows:
            size = [percents(row["sparsity"]), f"{row['kept']:,}", f"{row['seconds']:.1f}"]
            rows.append([named(runs, run, row["model"]), *_accuracies(row, dense), *size])
    columns = ["model", "clean, %", "95 % interval", "robust, %", "95 % interval", "robust against dense, points", "95 % interval"]
    attacks = "; ".join(dict.fromkeys(f"{run.results['attack']}, {run.results['images']:,} test images" for run in runs))
    return Table(attacks, [*columns, "sparsity, %", "weights kept", "training, s"], rows)


def _mark(row: Mapping[str, Any], kind: str) -> tuple[float, float, float]:
    """An accuracy and the ends of its interval, in percent."""
    low, high = wilson(row[kind], row["images"])
    return 100 * row[kind], 100 * low, 100 * high


def _accuracies(row: Mapping[str, Any], dense: Mapping[str, Any] | None) -> list[str]:
    cells = []
    for kind in ("clean", "robust"):
        cells += [percents(row[kind]), span(wilson(row[kind], row["images"]))]
    if dense is None or dense is row:
        return [*cells, "", ""]
    gap = difference(row["robust"], dense["robust"], row["images"], dense["images"])
    return [*cells, points(row["robust"] - dense["robust"]), span(gap)]


def training(runs: Sequence[Run], artist: Artist) -> Section:
    """Curves of every run."""
    section = Section("training", "Training")
    for run in runs:
        if run.epochs:
            moved = [100 * record["robust"] for record in run.epochs]
            alt = f"Training loss and test accuracies by epoch; robust accuracy goes from {moved[0]:.1f} to {moved[-1]:.1f} %."
            text = "Above the training loss, below the accuracies on the test images that are watched, one stage after the other."
            rows = [_epoch(record) for record in run.epochs]
            columns = ["epoch", "training loss", "clean, %", "robust, %", "functional distance, nats"]
            numbers = Table("By epoch", columns, rows)
            title = titled(runs, run, "loss and accuracy")
            section.figures.append(artist.figure(plots.curves, run.epochs, title=title, text=text, alt=alt, numbers=numbers))
    return section


def _epoch(record: Mapping[str, Any]) -> list[str]:
    moved = f"{record['functional_distance']:.4f}" if "functional_distance" in record else ""
    return [f"{record['stage']} {record['epoch']}", f"{record['loss']:.4f}", percents(record["clean"]), percents(record["robust"]), moved]


def mask(runs: Sequence[Run], artist: Artist) -> Section:
    """How the mask of every run moves, over all layers and layer by layer, and what each layer keeps at the end."""
    tops = {key: max((max(record.get(key, {}).values(), default=0) for run in runs for record in run.search), default=0) for key in HEAT}
    figures = [_of_mask(run, functools.partial(titled, runs, run), tops, artist) for run in runs]
    return Section("mask", "The mask", figures=side_by_side(figures))


def side_by_side(figures: Sequence[Mapping[str, Figure]]) -> list[Figure]:
    """The figures of several runs, each run's by what they show: the same ones next to each other."""
    kinds = dict.fromkeys(kind for of_run in figures for kind in of_run)
    return [of_run[kind] for kind in kinds for of_run in figures if kind in of_run]


def _of_mask(run: Run, title: Callable[[str], str], tops: Mapping[str, float], artist: Artist) -> dict[str, Figure]:
    found = {}
    if run.search:
        found["moves"] = _moves(run, title("how far the mask moves"), artist)
    for key, (name, _) in HEAT.items():
        if run.search and all(key in record for record in run.search) and any(any(record[key].values()) for record in run.search):
            found[key] = _heat(run, title(f"{name} by layer and epoch"), key, tops[key], artist)
    if perturbed := [record for record in run.search if "gamma" in record]:
        found["perturbation"] = _perturbation(perturbed, title("perturbations of the scores"), artist)
    if density := run.results["density"]:
        numbers = Table("By layer", ["layer", "density, %"], [[name, percents(value)] for name, value in density.items()])
        text = "The fraction of its weights that each layer keeps in the last model."
        alt = f"Density by layer, from {percents(min(density.values()))} to {percents(max(density.values()))} %."
        found["density"] = artist.figure(plots.density, density, title=title("density by layer"), text=text, alt=alt, numbers=numbers)
    return found


def _moves(run: Run, title: str, artist: Artist) -> Figure:
    keys = [key for key in ("mask_distance", "jaccard", "churn", "flips") if all(key in record for record in run.search)]
    names = {"mask_distance": "mask distance, %", "jaccard": "Jaccard index", "churn": "churn, %", "flips": "flips per step, %"}
    rows = []
    for record in run.search:
        rows.append([str(record["epoch"]), *(f"{record[key]:.4f}" if key == "jaccard" else f"{100 * record[key]:.3f}" for key in keys)])
    first, last = (100 * run.search[place]["mask_distance"] for place in (0, -1))
    return artist.figure(
        plots.mask_moves,
        run.search,
        title=title,
        text="The share of all mask entries that differ between the start and the end of an epoch. Kept weights that came back had been "
        "kept at the start of an earlier epoch and not at the start of this one.",
        alt=f"Mask distance by epoch, from {first:.2f} % in the first to {last:.2f} % in the last epoch.",
        numbers=Table("By epoch of the search", ["epoch", *(names[key] for key in keys)], rows),
    )


def _heat(run: Run, title: str, key: str, top: float, artist: Artist) -> Figure:
    name, label = HEAT[key]
    epochs = [record["epoch"] for record in run.search]
    values = {layer: [100 * record[key][layer] for record in run.search] for layer in run.search[0][key]}
    rows = [[layer, *(f"{value:.2f}" for value in line)] for layer, line in values.items()]
    most = max(values, key=lambda layer: sum(values[layer]))
    return artist.figure(
        plots.heatmap,
        values,
        epochs,
        "%",
        100 * top,
        title=title,
        text=f"{label[0].upper() + label[1:]}.",
        alt=f"{name[0].upper()}{name[1:]} for each layer and epoch. It is largest in the layer {most}.",
        numbers=Table(label, ["layer", *(f"epoch {epoch}" for epoch in epochs)], rows),
    )


def _perturbation(perturbed: Sequence[Mapping[str, Any]], title: str, artist: Artist) -> Figure:
    layers = list(perturbed[0]["gamma"])
    rows = [
        [str(record["epoch"]), f"{100 * record['flips']:.3f}", *(f"{record['gamma'][layer]:.4g}" for layer in layers)]
        for record in perturbed
    ]
    return artist.figure(
        plots.perturbation,
        perturbed,
        title=title,
        text="Gamma is the size of S2AP's perturbation relative to the norm of a layer's scores. Flips are the mask entries that it "
        "changes while the gradient is taken.",
        alt=f"Gamma by layer, and flips per step from {100 * perturbed[0]['flips']:.3f} to {100 * perturbed[-1]['flips']:.3f} %.",
        numbers=Table("By epoch of the search", ["epoch", "flips per step, %", *(f"gamma of {layer}" for layer in layers)], rows),
    )


def attacks(runs: Sequence[Run]) -> Section:
    """The accuracy under each attack, where the rows tell of several."""
    section = Section("attacks", "Attack by attack")
    for run in runs:
        names = [*run.results.get("attacks", {}), "worst"]
        rows = [row for row in run.rows if row.keys() >= set(names)]
        if rows:
            cells = [[row["model"], *(_under(row, name) for name in names)] for row in rows]
            section.tables.append(Table(titled(runs, run, "accuracy under each attack, %, with 95 % intervals"), ["model", *names], cells))
    return section


def _under(row: Mapping[str, Any], name: str) -> str:
    return f"{percents(row[name])} ({span(wilson(row[name], row['images']))})"


def cost(runs: Sequence[Run], artist: Artist) -> Section:
    """The seconds of each stage and, where it was measured, of inference."""
    section = Section(
        "cost", "Cost", "Seconds of training, without the evaluations between epochs. Times of different machines do not compare."
    )
    for run in runs:
        seconds = {TRAINED_BY.get(row["model"], row["model"]): row["seconds"] for row in run.results["rows"]}
        total = sum(seconds.values())
        epochs = {stage: sum(record["stage"] == stage for record in run.epochs) for stage in seconds}
        rows = [
            [stage, f"{value:.1f}", percents(value / total) if total else "", str(epochs[stage]), _passes(run, stage)]
            for stage, value in seconds.items()
        ]
        numbers = Table("By stage", ["stage", "seconds", "share, %", "epochs", "backward passes per step"], rows)
        alt = ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items())
        title, text = titled(runs, run, "training time by stage"), f"All stages together took {total:.1f} s."
        figure = artist.figure(plots.bars, seconds, "seconds", title=title, text=text, alt=f"Training time: {alt}.", numbers=numbers)
        section.figures.append(figure)
        if latency := run.results.get("latency"):
            section.tables.append(_latency(titled(runs, run, "inference on the CPU, dense and on the kept weights alone"), latency))
        if larger := run.results.get("latency_at_scale"):
            section.tables.append(_latency(titled(runs, run, f"the same of a {scale_of(larger)}"), larger["rows"]))
    return section


def _latency(caption: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = [
        [f"{row['batch']}", f"{row['dense_ms']:.2f}", f"{row['sparse_ms']:.2f}", f"{row['dense_ms'] / row['sparse_ms']:.1f}"]
        for row in rows
    ]
    return Table(caption, ["images at once", "dense, ms", "sparse, ms", "ratio"], cells)


def scale_of(larger: Mapping[str, Any]) -> str:
    """What the ``latency_at_scale`` of a run's results was measured on, such as ``"ResNet-18 at 90.0 % sparsity, 2 threads"``."""
    threads = larger["threads"]
    return f"{larger['network']} at {percents(larger['sparsity'])} % sparsity, {threads} thread{'s' if threads > 1 else ''}"


def _passes(run: Run, stage: str) -> str:
    found = [record["passes"] for record in run.epochs if record["stage"] == stage and "passes" in record]
    return f"{sum(found) / len(found):.2f}" if found else ""


def configuration(runs: Sequence[Run]) -> Section:
    """What tells the runs apart, where they ran, and their whole recipes."""
    section = Section("configuration", "Configuration and environment")
    recipes = [run.recipe() for run in runs]
    keys = list(dict.fromkeys(key for recipe in recipes for key in recipe))
    different = [key for key in keys if len({repr(recipe.get(key)) for recipe in recipes}) > 1]
    if different:
        rows = [[key, *(_shown(recipe.get(key)) for recipe in recipes)] for key in different]
        section.tables.append(Table("What the recipes differ in", ["key", *(run.name for run in runs)], rows))
    environments = [run.results.get("environment", {}) for run in runs]
    if names := list(dict.fromkeys(name for environment in environments for name in environment)):
        rows = [[name, *(_shown(environment.get(name)) for environment in environments)] for name in names]
        section.tables.append(Table("Environment", ["", *(run.name for run in runs)], rows))
    section.code = {f"Recipe of {run.name}": run.config() for run in runs}
    return section


def _shown(value: Any) -> str:
    return "" if value is None else str(value)
