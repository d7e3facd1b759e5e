"""The plots of a report: each function draws one figure from records, in the colours of the present :class:`Palette`.

:func:`write_plots` saves those of a run as PNG files; :mod:`.svg` puts any of them into a page.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pipeline import checkpoint
from ..pipeline.extras import optional
from .records import Run

Records = Sequence[Mapping[str, Any]]
STAGES = ("pretrain", "prune", "finetune")
COLOURMAP = "cividis"  # readable on light and dark pages, and by colour-blind readers


@dataclass(frozen=True)
class Palette:
    """The colours of figures.

    Attributes:
        ink, muted, line: of text, of less important text, and of grids.
        surface: what lies behind the figure.
        series: of data, which colour-blind readers can tell apart.
    """

    ink: str
    muted: str
    line: str
    surface: str
    series: tuple[str, ...]


PAPER = Palette("#1b1d21", "#555b66", "#d9dce1", "#ffffff", ("#0b63a8", "#b8480a", "#0a7a55", "#8a4fa3", "#8a6100", "#5f656e"))


@contextlib.contextmanager
def drawn_in(palette: Palette) -> Iterator[None]:
    """Within it figures are drawn, and must be saved, in the colours of ``palette``."""
    matplotlib = optional("matplotlib")
    settings: dict[str, Any] = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), palette.ink)
    settings |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), palette.muted)
    settings |= dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), palette.surface)
    settings |= {"grid.color": palette.line, "axes.prop_cycle": optional("cycler").cycler(color=palette.series)}
    settings |= {"text.parse_math": False}  # a dollar in the name of a folder or a layer is one
    settings |= {"font.size": 9.5, "svg.fonttype": "none", "svg.hashsalt": "s2ap_ext", "axes.titlesize": "medium"}
    with matplotlib.rc_context(settings):
        yield


def write_plots(run: Run) -> list[Path]:
    """Saves the plots of ``run`` in its folder: curves.png, and where it pruned, mask_distance.png, density.png and perturbation.png."""
    perturbed = [record for record in run.search if "gamma" in record]
    with drawn_in(PAPER):
        figures = {
            "curves.png": curves(run.epochs) if run.epochs else None,
            "mask_distance.png": mask_moves(run.search) if run.search else None,
            "perturbation.png": perturbation(perturbed) if perturbed else None,
            "density.png": density(run.results["density"]) if run.results["density"] else None,
        }
        paths = []
        for name, figure in figures.items():
            if figure is not None:
                with checkpoint.replacing(run.path / name) as temporary:
                    figure.savefig(temporary, format="png", dpi=150)
                paths.append(run.path / name)
    return paths


def _figure(width: float = 4.4, height: float = 3.0, rows: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes, without pyplot and its global state."""
    figure = optional("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, 1, **options)
    for ax in axes if rows > 1 else [axes]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def _whole_numbers(axis: Any) -> None:
    axis.set_major_locator(optional("matplotlib.ticker").MaxNLocator(integer=True))


def _series(number: int) -> str:
    return f"C{number}"


def curves(records: Records) -> Any:
    """Loss and test accuracies by epoch, the stages one after the other."""
    figure, (above, below) = _figure(height=3.8, rows=2, sharex=True, height_ratios=(2, 3))
    start = 0
    for number, stage in enumerate(STAGES):
        part = [record for record in records if record["stage"] == stage]
        if not part:
            continue
        colour, epochs = _series(number), [start + record["epoch"] for record in part]
        above.plot(epochs, [record["loss"] for record in part], color=colour, marker="o", markersize=2.5)
        below.plot(epochs, [100 * record["robust"] for record in part], color=colour, marker="o", markersize=2.5)
        below.plot(epochs, [100 * record["clean"] for record in part], color=colour, linestyle="--")
        for ax in (above, below):
            if start:
                ax.axvline(start + 0.5, color=ax.spines["left"].get_edgecolor(), linewidth=0.8)
        above.text((epochs[0] + epochs[-1]) / 2, 1.03, stage, transform=above.get_xaxis_transform(), ha="center", color=colour)
        start = epochs[-1]
    muted = below.spines["left"].get_edgecolor()
    below.plot([], [], color=muted, linestyle="--", label="clean")
    below.plot([], [], color=muted, marker="o", markersize=2.5, label="robust")
    below.legend(loc="lower right", frameon=False)
    above.set_ylabel("training loss")
    above.set_ylim(bottom=0)
    below.set_ylabel("test accuracy, %")
    below.set_ylim(0, 101)
    below.set_xlabel("epoch")
    _whole_numbers(below.xaxis)
    return figure


def mask_moves(moves: Records) -> Any:
    """How far the mask moves in each epoch of the search, and where it is known how much of that comes back."""
    figure, ax = _figure()
    epochs = [record["epoch"] for record in moves]
    ax.plot(epochs, [100 * record["mask_distance"] for record in moves], marker="o", markersize=3, label="entries that changed")
    if all("churn" in record for record in moves):
        ax.plot(epochs, [100 * record["churn"] for record in moves], marker="s", markersize=3, label="kept weights that came back")
        ax.legend(frameon=False)
    ax.set_ylabel("%")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("epoch of the search")
    _whole_numbers(ax.xaxis)
    return figure


def perturbation(perturbed: Records) -> Any:
    """How many mask entries S2AP's perturbations flip and, where it changes, the gamma of each layer."""
    epochs = [record["epoch"] for record in perturbed]
    if len({gamma for record in perturbed for gamma in record["gamma"].values()}) > 1:
        figure, (above, below) = _figure(height=3.8, rows=2, sharex=True)
        for layer in perturbed[0]["gamma"]:
            above.plot(epochs, [record["gamma"][layer] for record in perturbed], marker="o", markersize=2.5, linewidth=0.8, label=layer)
        if len(perturbed[0]["gamma"]) <= 8:
            above.legend(frameon=False, fontsize="small")
        above.set_ylabel("gamma, by layer")
        above.set_ylim(bottom=0)
    else:
        figure, below = _figure()
    below.plot(epochs, [100 * record["flips"] for record in perturbed], color=_series(1), marker="o", markersize=3)
    below.set_ylabel("flips per step,\n% of the kept weights")
    below.set_ylim(bottom=0)
    below.set_xlabel("epoch of the search")
    _whole_numbers(below.xaxis)
    return figure


def density(by_layer: Mapping[str, float]) -> Any:
    """The fraction of weights that each layer keeps."""
    names = list(by_layer)
    figure, ax = _figure(height=0.9 + 0.2 * len(names))
    bars = ax.barh(names, [100 * value for value in by_layer.values()], height=0.7)
    ax.bar_label(bars, fmt="%.1f", padding=3, fontsize="small")
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.margins(x=0.14)
    ax.set_xlabel("density, %")
    return figure


def heatmap(values: Mapping[str, Sequence[float]], epochs: Sequence[int], label: str, top: float) -> Any:
    """A field for each layer and epoch; ``label`` says what the colours are, which go from 0 to ``top``."""
    figure, ax = _figure(height=1.3 + 0.18 * len(values))
    ax.grid(visible=False)
    extent = (epochs[0] - 0.5, epochs[-1] + 0.5, len(values) - 0.5, -0.5)
    shown = ax.imshow(list(values.values()), aspect="auto", cmap=COLOURMAP, vmin=0, vmax=top, extent=extent, interpolation="none")
    ax.set_yticks(range(len(values)), list(values))
    ax.set_xlabel("epoch of the search")
    _whole_numbers(ax.xaxis)
    _colourbar(figure, shown, ax, label)
    return figure


def _colourbar(figure: Any, shown: Any, ax: Any, label: str) -> None:
    bar = figure.colorbar(shown, ax=ax, label=label, pad=0.02)
    if bar.solids is not None:
        bar.solids.set_rasterized(True)  # one small picture, and not a path for each of its colours
    bar.outline.set_visible(False)


def lines(found: Records) -> Any:
    """The loss along lines through one space, of one model."""
    figure, ax = _figure()
    for number, line in enumerate(found):
        style = {"linewidth": 1.8} if line["along"] == "ascent" else {"linestyle": "--", "linewidth": 1.0}
        ax.plot(line["steps"], line["losses"], color=_series(min(number, 5)), label=line["along"], **style)
    ax.axvline(0, color=ax.spines["left"].get_edgecolor(), linewidth=0.8)
    ax.legend(frameon=False)
    ax.set_xlabel("step, relative to the norm of what moves")
    ax.set_ylabel("robust loss")
    return figure


def plane(found: Mapping[str, Any]) -> Any:
    """The loss over a plane, as a contour map."""
    figure, ax = _figure(height=3.4)
    ax.grid(visible=False)
    shown = ax.contourf(found["steps"], found["steps"], list(zip(*found["losses"], strict=True)), levels=12, cmap=COLOURMAP)
    ax.plot([0], [0], marker="+", markersize=9, color="#ffffff")
    ax.set_aspect("equal")
    ax.set_xlabel("first random direction")
    ax.set_ylabel("second")
    _colourbar(figure, shown, ax, "robust loss")
    return figure


def intervals(names: Sequence[str], marks: Mapping[str, Sequence[tuple[float, float, float]]], label: str) -> Any:
    """A dot and an interval for each name.

    Args:
        names: from top to bottom.
        marks: by what is measured, ``(value, low, high)`` for each of the names.
        label: of the axis.
    """
    figure, ax = _figure(height=1.0 + 0.22 * len(names) * len(marks))
    offsets = [0.3 * (number - (len(marks) - 1) / 2) for number in range(len(marks))]
    for number, (kind, values) in enumerate(marks.items()):
        for place, (value, low, high) in enumerate(values):
            at = place + offsets[number]
            ax.plot([low, high], [at, at], color=_series(number), linewidth=2)
            ax.plot([value], [at], color=_series(number), marker="o" if number == 0 else "D", markersize=5, label=None if place else kind)
    ax.set_yticks(range(len(names)), list(names))
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel(label)
    if len(marks) > 1:
        figure.legend(loc="outside upper center", frameon=False, ncols=len(marks))
    return figure


def bars(values: Mapping[str, float], label: str) -> Any:
    """A horizontal bar for each name."""
    figure, ax = _figure(height=0.9 + 0.25 * len(values))
    shown = ax.barh(list(values), list(values.values()), height=0.6)
    ax.bar_label(shown, fmt="%.1f", padding=3, fontsize="small")
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.margins(x=0.16)
    ax.set_xlabel(label)
    return figure


def sweep(places: Sequence[float], marks: Mapping[str, Sequence[tuple[float, float, float]]], label: str) -> Any:
    """Accuracies over a setting, with bands for their intervals; the arguments are as for :func:`intervals`."""
    figure, ax = _figure()
    for number, (kind, values) in enumerate(marks.items()):
        ax.plot(places, [value for value, _, _ in values], color=_series(number), marker="o", markersize=4, label=kind)
        ax.fill_between(places, [v[1] for v in values], [v[2] for v in values], color=_series(number), alpha=0.2, linewidth=0)
    if min(places) > 0:
        ax.set_xscale("log")
    ax.set_xticks(places, [f"{place:g}" for place in places])
    ax.minorticks_off()
    ax.set_xlabel(label)
    ax.set_ylabel("accuracy, %")
    ax.legend(frameon=False)
    return figure
