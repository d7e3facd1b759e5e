"""The tables of attacks that commands print on a terminal: evaluations, and the check for gradient masking."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..pipeline import progress
from ..pipeline.evaluation import radius
from ..pipeline.extras import optional

if TYPE_CHECKING:
    from ..evaluation import Evaluation, GradientCheck


def attack_table(attacks: dict[str, str], rows: Sequence[dict[str, Any]]) -> Any:
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
