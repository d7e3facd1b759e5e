"""The tables that commands print on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..pipeline.extras import optional
from .evaluations import attack_table
from .records import rows_of
from .verdict import verdict

if TYPE_CHECKING:
    from ..pipeline.step_profile import StepCost
    from ..speed import Latency, Measured

BAR_WIDTH = 40  # characters
GAIN = 1.5  # times as fast: less than that is called little


def print_table(results: dict[str, Any]) -> None:
    """Prints the models' accuracies, sparsity and training time, each compared with the dense model, and the outcome in a sentence."""
    console_module, table_module = optional("rich.console"), optional("rich.table")
    rows = rows_of(results)
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
    if console.is_terminal:
        console.print(_bars(rows))
    if "attacks" in results:
        console.print(attack_table(results["attacks"], rows))
    if len(rows) > 1:
        console.print(verdict(results), highlight=False)


def _bars(rows: Sequence[dict[str, Any]]) -> Any:
    """The robust accuracy of each model as a bar, whose full length is 100 %."""
    bar_module, table_module = optional("rich.bar"), optional("rich.table")
    grid = table_module.Table.grid(padding=(0, 1), pad_edge=True)
    for row in rows:
        bar = bar_module.Bar(size=1, begin=0, end=row["robust"], width=BAR_WIDTH, color="green")
        grid.add_row(row["model"], bar, f"{100 * row['robust']:.1f} % robust")
    return grid


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


def print_latency(rows: Sequence[Latency], of: str = "inference on the CPU") -> None:
    """Prints how long batches of images take, dense and on the kept weights, and a remark where the zeros gain little.

    Args:
        of: the table's title.
    """
    console_module, table_module = optional("rich.console"), optional("rich.table")
    table = table_module.Table(title=of, title_style="bold")
    for column in ("batch", "dense ms", "sparse ms", "ratio", "dense images/s", "sparse images/s"):
        table.add_column(column, justify="right")
    for row in rows:
        rates = [f"{1e3 * row.batch / ms:,.0f}" for ms in (row.dense_ms, row.sparse_ms)]
        table.add_row(str(row.batch), f"{row.dense_ms:.2f}", f"{row.sparse_ms:.2f}", f"{row.dense_ms / row.sparse_ms:.1f}", *rates)
    console = console_module.Console()
    console.print(table)
    if max(row.dense_ms / row.sparse_ms for row in rows) < GAIN:
        line = "The zeros gain little here; in a larger network, or with more of them, they do (docs/sparse.md, examples/deploy.py)."
        console.print(line, highlight=False)


def _accuracy(row: dict[str, Any], dense: dict[str, Any] | None, kind: str) -> str:
    change = f" ({100 * (row[kind] - dense[kind]):+.1f})" if dense is not None else ""
    return f"{100 * row[kind]:.1f}{change}"


def print_steps(title: str, rows: Sequence[StepCost]) -> None:
    """Prints where steps go: the time of each phase in each form, their sum, the whole step without the profiler, and the memory."""
    console_module, table_module = optional("rich.console"), optional("rich.table")
    table = table_module.Table(title=title, title_style="bold")
    table.add_column("ms per step")
    for row in rows:
        table.add_column(row.form, justify="right")
        table.add_column("%", justify="right")
    sums = [sum(row.phases.values()) for row in rows]
    for phase in rows[0].phases:
        cells = [(row.phases[phase], 100 * row.phases[phase] / total) for row, total in zip(rows, sums, strict=True)]
        table.add_row(phase, *(text for ms, share in cells for text in (f"{ms:.2f}", f"{share:.1f}")))
    table.add_section()
    table.add_row("sum", *(cell for total in sums for cell in (f"{total:.2f}", "100.0")))
    table.add_row("whole step, not profiled", *(cell for row in rows for cell in (f"{row.step:.2f}", "")))
    memory = ["not known" if row.peak is None else f"{row.peak / 1e6:.1f} MB" for row in rows]
    table.add_row("memory at the peak beyond that before", *(cell for text in memory for cell in (text, "")))
    console_module.Console().print(table)


def print_analysis(title: str, analysis: dict[str, Any]) -> None:
    """Prints the figures of an analysis.json that are numbers: sharpness of each model, and what an ascent of its scores changes."""
    console_module, table_module = optional("rich.console"), optional("rich.table")
    heading = f"{title}: robust loss on {analysis['images']} test images, {analysis['attack']}"
    table = table_module.Table(title=heading, title_style="bold")
    for column in ("model", "space", "dimensions", "lambda_max", "trace"):
        table.add_column(column, justify="left" if column in ("model", "space") else "right")
    for entry in analysis["models"]:
        for found in entry["spectra"]:
            trace = f"{found['trace']:.4g} +- {found['trace_error']:.2g}"
            table.add_row(entry["model"], found["space"], f"{found['size']:,}", f"{found['eigenvalues'][0]:.4g}", trace)
    console = console_module.Console()
    console.print(table)
    for entry in analysis["models"]:
        if "ascent" in entry:
            ascent = entry["ascent"]
            line = (
                f"{entry['model']}: a perturbation of the scores by gamma {analysis['gamma']:g} flips {100 * ascent['flip_rate']:.2f} % of "
                f"the kept weights and changes the robust loss by {ascent['rise']:+.4g}; the gradients before and after have the cosine "
                f"{ascent['gradient_cosine']:.3f}."
            )
            console.print(line, highlight=False)
    if "masks" in analysis:
        masks = analysis["masks"]
        line = f"Masks of {len(masks['runs'])} runs: overlap {masks['overlap']:.3f}, of random masks {masks['chance']:.3f}."
        console.print(line, highlight=False)
