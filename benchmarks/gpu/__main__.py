"""The command line of the work list."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .parts import Setting, parts
from .runner import WorkList, commit_of


def main(words: list[str] | None = None) -> int:
    """Runs the work list, or shows it. Returns 0 if everything that was tried is done, 1 otherwise, 2 for options that make no sense."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=12, help="a part starts only if its estimate fits what is left (default: 12)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="where results are written (default: runs/gpu)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="parquet files of uoft-cs/cifar10; without it, the hub is asked")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="only this part, or those that start with PART/")
    parser.add_argument("--list", action="store_true", help="show the parts, their estimates and what is done, and run nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu goes with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: shows that the parts run, measures nothing")
    parser.add_argument("--commit", help="what results are bound to where there is no git (default: that of the checkout)")
    given = parser.parse_args(words)
    if given.device == "cpu" and not given.tiny:
        parser.error("--device cpu: expected --tiny beside it; at full size the parts take days on a CPU")
    commit = given.commit or commit_of()
    folder = given.out.resolve() / commit
    every = parts(Setting(folder, given.device, given.tiny, given.data_dir.resolve() if given.data_dir else None))
    chosen = [part for part in every if not given.only or any(part.name == o or part.name.startswith(f"{o}/") for o in given.only)]
    if not chosen:
        parser.error(f"--only: expected one of {', '.join(part.name for part in every)}")
    work = WorkList(folder, commit, given.device)
    if given.list:
        for part in chosen:
            print(f"{part.name:24} {part.minutes:4.1f} min  {work.state(part):8} {part.what}")
        return 0
    return 0 if work.run(chosen, given.minutes) else 1


if __name__ == "__main__":
    sys.exit(main())
