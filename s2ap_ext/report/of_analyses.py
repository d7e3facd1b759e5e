"""The section of a page about sharpness, landscapes and stability, from the analysis.json of runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import plots
from .of_runs import named, side_by_side, titled
from .page import Artist, Figure, Section, Table
from .records import Run

RELAXATIONS = (
    "The loss is piecewise constant in the scores, so a curvature there is that of a relaxation. In score space, lambda_max and trace are "
    "of the straight-through relaxation, in which the mask entries follow the scores' magnitudes and none flips. In weight space they are "
    "of the loss itself at the fixed mask. The curvature over a distance is of differences of the straight-through gradient, far enough "
    "apart for entries to flip. Lines and planes show the loss as it is. All are at fixed adversarial examples, made by attacking the "
    "same model."
)


def analysis(runs: Sequence[Run], artist: Artist) -> Section:
    """Tables of all numbers, and the lines and planes of each model. A run that was not analysed is told how it can be."""
    section = Section("sharpness", "Sharpness and landscape")
    for run in runs:
        if run.analysis is None:
            section.text += f"{run.name} was not analysed; s2ap analyze {run.path} computes what belongs here. "
    if analysed := [run for run in runs if run.analysis is not None]:
        section.text += RELAXATIONS
        section.tables += [table for table in (_spectra(analysed), _ascents(analysed), _moves(analysed), _masks(analysed)) if table.rows]
        section.figures = side_by_side([_of_landscape(run, functools.partial(titled, runs, run), artist) for run in analysed])
    return section


def _of(run: Run) -> dict[str, Any]:
    return run.analysis or {}


def _models(runs: Sequence[Run]) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """``(name, the model's entry, the analysis)`` of every model."""
    return [(named(runs, run, entry["model"]), entry, _of(run)) for run in runs for entry in _of(run)["models"]]


def _spectra(runs: Sequence[Run]) -> Table:
    rows = []
    for name, entry, _ in _models(runs):
        for found in entry["spectra"]:
            next_ones = ", ".join(f"{value:.4g}" for value in found["eigenvalues"][1:])
            trace = f"{found['trace']:.4g} \u00b1 {found['trace_error']:.2g}"
            rows.append([name, found["space"], f"{found['size']:,}", f"{found['eigenvalues'][0]:.4g}", next_ones, trace])
    columns = ["model", "space", "dimensions", "lambda_max", "next eigenvalues", "trace \u00b1 standard error"]
    return Table("Spectrum of the Hessian of the robust loss", columns, rows)


def _ascents(runs: Sequence[Run]) -> Table:
    rows = []
    for name, entry, found in _models(runs):
        if "ascent" in entry:
            ascent, curvature = entry["ascent"], entry["curvature"]
            rows.append(
                [
                    name,
                    f"{entry['loss']['clean']:.4f}",
                    f"{entry['loss']['robust']:.4f}",
                    f"{curvature['value']:.4g}",
                    f"{found['gamma']:g}",
                    f"{100 * ascent['flip_rate']:.2f}",
                    f"{ascent['rise']:+.4g}",
                    f"{ascent['gradient_cosine']:.3f}",
                    f"{ascent['functional_distance']:.4g}",
                ]
            )
    columns = ["model", "clean loss", "robust loss", "curvature over a distance", "gamma", "flips, % of kept", "change of the robust loss"]
    return Table("What a perturbation of the scores changes", [*columns, "gradient cosine", "functional distance, nats"], rows)


def _moves(runs: Sequence[Run]) -> Table:
    rows = [
        [named(runs, run, f"{step['from']} to {step['to']}"), f"{step['value']:.4f}"]
        for run in runs
        for step in _of(run)["functional_distance"]
    ]
    return Table("How far the predictions move from model to model", ["models", "functional distance, nats"], rows)


def _masks(runs: Sequence[Run]) -> Table:
    found = {tuple(masks["runs"]): masks for run in runs if (masks := _of(run).get("masks"))}
    rows = [[", ".join(names), f"{masks['overlap']:.4f}", f"{masks['chance']:.4f}"] for names, masks in found.items()]
    return Table("Overlap of the masks of several runs", ["runs", "mean Jaccard index", "of random masks"], rows)


def _of_landscape(run: Run, title: Callable[[str], str], artist: Artist) -> dict[str, Figure]:
    found = {}
    for entry in _of(run)["models"]:
        for space in dict.fromkeys(line["space"] for line in entry["lines"]):
            lines = [line for line in entry["lines"] if line["space"] == space]
            name = f"{entry['model']} model, lines through {space[:-1]} space"
            found[name] = _lines(lines, title(name), artist)
        for plane in entry["planes"]:
            name = f"{entry['model']} model, a plane through {plane['space'][:-1]} space"
            found[name] = _plane(plane, title(name), artist)
    return found


def _lines(lines: Sequence[Mapping[str, Any]], title: str, artist: Artist) -> Figure:
    """The lines through one space."""
    flips = lines[0]["space"] == "scores"
    rows = [
        [f"{step:+.4g}", *(f"{line['losses'][i]:.4f}" for line in lines), *(str(line["flips"][i]) for line in lines if flips)]
        for i, step in enumerate(lines[0]["steps"])
    ]
    names = [line["along"] if line["along"] == "ascent" else f"random {number}" for number, line in enumerate(lines)]
    return artist.figure(
        plots.lines,
        lines,
        title=title,
        text="The robust loss along the gradient and along random directions. A step along the ascent is the gamma of "
        f"{'S2AP' if flips else 'AWP'}.",
        alt=f"Robust loss along lines; along the ascent it reaches {max(lines[0]['losses']):.3f}.",
        numbers=Table("Along the lines", ["step", *(f"loss, {n}" for n in names), *(f"flips, {n}" for n in names if flips)], rows),
    )


def _plane(plane: Mapping[str, Any], title: str, artist: Artist) -> Figure:
    steps, losses = [f"{step:+.4g}" for step in plane["steps"]], plane["losses"]
    rows = [[step, *(f"{loss:.4f}" for loss in line)] for step, line in zip(steps, losses, strict=True)]
    scaled = "each layer scaled to its scores" if plane["space"] == "scores" else "each filter scaled to its weights"
    return artist.figure(
        plots.plane,
        plane,
        title=title,
        text=f"The robust loss along two random directions, {scaled}. The model is at the cross.",
        alt=f"Contour map of the robust loss, from {min(map(min, losses)):.3f} to {max(map(max, losses)):.3f}.",
        numbers=Table("Over the plane, a row for each step of the first direction", ["step", *steps], rows),
    )
