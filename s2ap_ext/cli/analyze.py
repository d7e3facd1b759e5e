"""``s2ap analyze``: sharpness, landscapes and stability of the models of runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from .parser import Commands, count


def add(commands: Commands) -> None:
    parser = commands.add("analyze", _analyze, "sharpness, landscapes and stability of a run's models, for its report")
    parser.add_argument("run_dirs", metavar="RUN", type=Path, nargs="+", help="the folder of a run; of several, the masks are compared too")
    parser.add_argument("--images", type=count, default=128, metavar="N", help="the first so many test images (default: 128)")


def _analyze(arguments: argparse.Namespace) -> int:
    from .. import report
    from ..pipeline import extras, progress
    from ..pipeline.analyze import analyze, compare_masks

    extras.require()
    show = progress.for_this_terminal()
    masks = compare_masks(arguments.run_dirs) if len(arguments.run_dirs) > 1 else None
    for folder in arguments.run_dirs:
        report.print_analysis(str(folder), analyze(folder, images=arguments.images, masks=masks, tell=show.say))
    return 0
