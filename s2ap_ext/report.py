"""What a run found: the table and the plots."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pipeline import checkpoint, progress
from .pipeline.evaluation import radius
from .pipeline.extras import optional
from .pipeline.run_folder import read_metrics, read_results

if TYPE_CHECKING:
    from .evaluation import Evaluation, GradientCheck
    from .speed import Latency, Measured

# A palette that colour-blind readers can tell apart (Okabe and Ito).
COLOURS = {"pretrain": "#0072B2", "prune": "#D55E00", "finetune": "#009E73"}
GREY = "#777777"


def print_table(results: dict[str, Any]) -> None:
    """Prints the models' accuracies, sparsity and training time, each compared with the dense model, and the outcome in a sentence."""
    console_module, table_module = optional("rich.console"), optional("rich.table")
    rows = results["rows"]
    dense = next((row for row in rows if row["model"] == "dense"), None)
    table = table_module.Table(title=f"{results['recipe']}: {rows[-1]['images']} test images, {results['attack']}", title_style="bold")
    table.add_column("model")
    for column in ("clean %", "robust %", "sparsity %", "weights kept", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        against = dense if dense is not None and row is not dense else None
        table.add_row(
            row["model"],
            _accuracy(row, against, "clean"),
            _accuracy(row, against, "robust"),
            f"{100 * row['sparsity']:.1f}",
            f"{row['kept']:,}",
            f"{row['seconds']:.1f}" if row["seconds"] else "-",
        )
    console = console_module.Console()
    console.print(table)
    if "attacks" in results:
        console.print(_attack_table(results["attacks"], rows))
    if sentence := outcome(rows):
        print(sentence)


def _attack_table(attacks: dict[str, str], rows: Sequence[dict[str, Any]]) -> Any:
    """The models' accuracies under further attacks; ``attacks`` says whose code each is."""
    table = optional("rich.table").Table(title="further attacks, holds %", title_style="bold")
    table.add_column("attack")
    for row in rows:
        table.add_column(row["model"], justify="right")
    table.add_column("code")
    for name, code in [*attacks.items(), ("worst", "")]:
        table.add_row(name, *(f"{100 * row[name]:.1f}" for row in rows), code)
    return table


def print_evaluation(found: Evaluation, classes: Sequence[str]) -> None:
    """Prints the accuracy under each attack with its interval and whose code it is, and below it class by class."""
    console_module, table_module = optional("rich.console"), optional("rich.table")
    title = f"{found.n} images, {found.norm}, eps {radius(found.eps)}, seed {found.seed}"
    table = table_module.Table(title=title, title_style="bold")
    for column in ("attack", "holds %", "95 % interval", "images", "code"):
        table.add_column(column, justify="left" if column in ("attack", "code") else "right")
    for name, fraction in [*found.accuracy.items(), ("worst", found.worst)]:
        low, high = (100 * end for end in found.interval(name))
        code = found.implementations.get(name, "")
        table.add_row(name, f"{100 * fraction:.2f}", f"{low:.1f} to {high:.1f}", str(round(fraction * found.n)), code)
        for stage, after in found.stages.get(name, {}).items():
            table.add_row(f"  after {stage}", f"{100 * after:.2f}", "", str(round(after * found.n)), "")
    by_class = table_module.Table(title="class by class, holds %", title_style="bold")
    by_class.add_column("class")
    for column in ("images", *found.held, "worst"):
        by_class.add_column(column, justify="right")
    for number, count, fractions in found.per_class():
        name = classes[number] if number < len(classes) else str(number)
        by_class.add_row(name, str(count), *(f"{100 * fraction:.1f}" for fraction in fractions.values()))
    console = console_module.Console()
    console.print(table)
    console.print(by_class)


def print_gradient_check(check: GradientCheck) -> None:
    """Prints what a check for gradient masking found, and what of it is a sign of that, in words."""
    console_module, table_module = optional("rich.console"), optional("rich.table")
    table = table_module.Table(title=f"gradients, {check.images} images that are classified rightly", title_style="bold")
    for column in ("what", "of which", "found"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for count, loss in check.loss.items():
        table.add_row("mean loss after steps of PGD", str(count), f"{loss:.3f}")
    for count, held in check.held_by_steps.items():
        table.add_row("hold after steps that span the ball", str(count), progress.percent(held))
    for scale, held in check.held_by_radius.items():
        table.add_row("hold in a ball of", "all images" if math.isinf(scale) else f"{scale:g} eps", progress.percent(held))
    for count, held in check.held_by_starts.items():
        table.add_row("hold under random starts", str(count), progress.percent(held))
    table.add_row("hold under PGD and not under Square", "", progress.percent(check.only_black_box))
    table.add_row("gradient is 0 in every pixel", "", progress.percent(check.zero_gradients))
    console_module.Console().print(table)
    for sign in check.warnings:
        print(f"warning: {sign}")
    if not check.warnings:
        print("No sign of gradient masking. That is no proof: evaluate with AutoAttack.")


def print_profile(rows: Sequence[Measured], batch: int) -> None:
    """Prints what each convolution costs, forward and gradient with respect to the input, beside what the cost model expects."""
    console_module, table_module = optional("rich.console"), optional("rich.table")
    table = table_module.Table(title=f"forward and input gradient, batch {batch}, in ms (in brackets: expected)", title_style="bold")
    for column in ("layer", "weight", "input", "kept %", "dense", "sparse", "ratio", "training takes"):
        table.add_column(column, justify="left" if column in ("layer", "training takes") else "right")
    for row in rows:
        table.add_row(
            row.layer,
            "x".join(map(str, row.weight)),
            "x".join(map(str, row.input[1:])),
            f"{100 * row.density:.1f}",
            f"{row.dense_ms:.2f} ({row.predicted_dense_ms:.2f})",
            f"{row.sparse_ms:.2f} ({row.predicted_sparse_ms:.2f})",
            f"{row.dense_ms / row.sparse_ms:.1f}",
            row.choice,
        )
    console_module.Console().print(table)


def print_latency(rows: Iterable[Latency]) -> None:
    """Prints how long batches of images take, dense and on the kept weights."""
    console_module, table_module = optional("rich.console"), optional("rich.table")
    table = table_module.Table(title="inference on the CPU", title_style="bold")
    for column in ("batch", "dense ms", "sparse ms", "ratio", "dense images/s", "sparse images/s"):
        table.add_column(column, justify="right")
    for row in rows:
        rates = [f"{1e3 * row.batch / ms:,.0f}" for ms in (row.dense_ms, row.sparse_ms)]
        table.add_row(str(row.batch), f"{row.dense_ms:.2f}", f"{row.sparse_ms:.2f}", f"{row.dense_ms / row.sparse_ms:.1f}", *rates)
    console_module.Console().print(table)


def outcome(rows: list[dict[str, Any]]) -> str:
    """How the finetuned model compares with the dense one, in a sentence; empty if one of them is missing."""
    by_name = {row["model"]: row for row in rows}
    if not {"dense", "finetuned"} <= by_name.keys():
        return ""
    dense, finetuned = by_name["dense"], by_name["finetuned"]
    clean, robust = (100 * (finetuned[kind] - dense[kind]) for kind in ("clean", "robust"))
    return f"Finetuned at {100 * finetuned['sparsity']:.1f} % sparsity against dense: clean {clean:+.1f}, robust {robust:+.1f} points."


def _accuracy(row: dict[str, Any], dense: dict[str, Any] | None, kind: str) -> str:
    change = f" ({100 * (row[kind] - dense[kind]):+.1f})" if dense is not None else ""
    return f"{100 * row[kind]:.1f}{change}"


def write_plots(run_dir: str | Path) -> list[Path]:
    """Draws curves.png into ``run_dir``; where the run pruned mask_distance.png and density.png, and where with S2AP perturbation.png.

    Raises:
        ValueError: as :func:`read_results` and :func:`read_metrics`.
    """
    run_dir, results = Path(run_dir), read_results(run_dir)
    records = [record for record in read_metrics(run_dir) if "epoch" in record]
    figures = {}
    if records:
        figures["curves.png"] = _curves(records, results)
    if moves := [record for record in records if record["stage"] == "prune"]:
        figures["mask_distance.png"] = _mask_distance(moves)
    if perturbed := [record for record in records if "gamma" in record]:
        figures["perturbation.png"] = _perturbation(perturbed)
    if results["density"]:
        figures["density.png"] = _density(results["density"])
    paths = []
    for name, figure in figures.items():
        with checkpoint.replacing(run_dir / name) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        paths.append(run_dir / name)
    return paths


def _figure(width: float, height: float, rows: int = 1, **options: Any):
    """A figure and its axes, without pyplot and its global state."""
    figure = optional("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, 1, **options)
    for ax in axes if rows > 1 else [axes]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def _whole_numbers(axis) -> None:
    axis.set_major_locator(optional("matplotlib.ticker").MaxNLocator(integer=True))


def _curves(records: list[dict[str, Any]], results: dict[str, Any]):
    """Loss and test accuracies by epoch, the stages one after the other."""
    figure, (above, below) = _figure(8, 6, rows=2, sharex=True, height_ratios=(2, 3))
    start = 0
    for stage, colour in COLOURS.items():
        part = [record for record in records if record["stage"] == stage]
        if not part:
            continue
        epochs = [start + record["epoch"] for record in part]
        above.plot(epochs, [record["loss"] for record in part], color=colour, marker="o", markersize=3)
        below.plot(epochs, [100 * record["robust"] for record in part], color=colour, marker="o", markersize=3)
        below.plot(epochs, [100 * record["clean"] for record in part], color=colour, linestyle="--")
        for ax in (above, below):
            if start:
                ax.axvline(start + 0.5, color=GREY, linewidth=0.8)
        above.text((epochs[0] + epochs[-1]) / 2, 1.02, stage, transform=above.get_xaxis_transform(), ha="center", color=colour)
        start = epochs[-1]
    below.plot([], [], color=GREY, linestyle="--", label="clean")
    below.plot([], [], color=GREY, marker="o", markersize=3, label=f"robust ({results['attack']})")
    below.legend(loc="lower right", frameon=False)
    above.set_ylabel("training loss")
    above.set_ylim(bottom=0)
    below.set_ylabel("test accuracy, %")
    below.set_ylim(0, 101)
    below.set_xlabel("epoch")
    _whole_numbers(below.xaxis)
    return figure


def _mask_distance(moves: list[dict[str, Any]]):
    """How far the mask moves in each epoch of the search."""
    figure, ax = _figure(7, 3.5)
    epochs = [record["epoch"] for record in moves]
    ax.plot(epochs, [100 * record["mask_distance"] for record in moves], color=COLOURS["prune"], marker="o", markersize=4)
    ax.set_title("Mask distance over each epoch of the search", loc="left", fontsize="medium")
    ax.set_ylabel("entries that changed, %")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("epoch")
    _whole_numbers(ax.xaxis)
    return figure


def _perturbation(perturbed: list[dict[str, Any]]):
    """How far S2AP's perturbations go, layer by layer, and how many mask entries they flip."""
    figure, (above, below) = _figure(7, 5, rows=2, sharex=True)
    epochs = [record["epoch"] for record in perturbed]
    for layer in perturbed[0]["gamma"]:
        above.plot(epochs, [record["gamma"][layer] for record in perturbed], marker="o", markersize=3, linewidth=0.8, label=layer)
    if len(perturbed[0]["gamma"]) <= 8:
        above.legend(frameon=False, fontsize="small")
    above.set_title("Perturbations of the scores, one line for each layer", loc="left", fontsize="medium")
    above.set_ylabel("gamma")
    above.set_ylim(bottom=0)
    below.plot(epochs, [100 * record["flips"] for record in perturbed], color=COLOURS["prune"], marker="o", markersize=4)
    below.set_ylabel("flips per step,\n% of the kept weights")
    below.set_ylim(bottom=0)
    below.set_xlabel("epoch")
    _whole_numbers(below.xaxis)
    return figure


def _density(density: dict[str, float]):
    """The fraction of weights that each layer keeps."""
    names = list(density)
    figure, ax = _figure(7, 1.2 + 0.28 * len(names))
    values = [100 * value for value in density.values()]
    bars = ax.barh(names, values, color=COLOURS["prune"], height=0.7)
    ax.bar_label(bars, fmt="%.1f", padding=3, fontsize="small")
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.margins(x=0.12)
    ax.set_title("Weights kept, layer by layer", loc="left", fontsize="medium")
    ax.set_xlabel("density, %")
    return figure
