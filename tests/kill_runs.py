"""Kills runs at random moments and looks whether they go on to the same bits.

    python tests/kill_runs.py --times 100 [--seed N]

Each run of the pipeline is killed (SIGKILL) again and again, at moments drawn at random from its first second on or at one of the
replacements of its files, and resumed each time, until so many kills were survived. At its end its models and records must be those of a
run that nobody killed. Prints how many kills fell where.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from command_line import TINY, settings

from s2ap_ext.cli import main
from s2ap_ext.pipeline.run_folder import read_metrics

STAGES = ("pretrain", "prune", "finetune")
SETTINGS = [*TINY, "data.train_size=64", "save_every=0", "prune.control=true", *(f"{stage}.epochs=2" for stage in STAGES)]
TIMEOUT = 300  # seconds

# Processes begin as copies of one that has imported all that a run needs, so that what is killed is runs and not their imports.
copies = multiprocessing.get_context("forkserver")
copies.set_forkserver_preload([__name__, "matplotlib.figure", "rich.progress", "torch.utils.tensorboard"])


def command_line(words: list[str], dies_at: int, errors: str) -> None:
    """Runs the command line; where ``dies_at`` is not 0, dies before or after the replacement of a file of which it is the number."""
    out, err = os.open(os.devnull, os.O_WRONLY), os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(err, 2)
    replace, left = os.replace, dies_at

    def dying(*arguments: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments)
        if left == -1:
            os.kill(os.getpid(), signal.SIGKILL)

    if dies_at:
        os.replace = dying
    sys.exit(main(words))


def start(words: list[str], errors: Path, dies_at: int = 0) -> multiprocessing.context.ForkServerProcess:
    process = copies.Process(target=command_line, args=(words, dies_at, str(errors)))
    process.start()
    return process


def ended(process: multiprocessing.context.ForkServerProcess, errors: Path) -> bool:
    """Waits; whether the run is over. Raises AssertionError where it neither ended well nor was killed."""
    process.join(TIMEOUT)
    assert process.exitcode in (0, -signal.SIGKILL), f"exit code {process.exitcode}: {errors.read_text()}"
    return process.exitcode == 0


def result(folder: Path) -> tuple:
    """All that a run's result consists of, and that of its control."""
    models = {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}
    return models, [{**record, "seconds": 0} for path in (folder, folder / "plain") for record in read_metrics(path)]


def place(folder: Path) -> str:
    """Where the run stands that was killed."""
    if not (folder / "config.toml").exists():
        return "before there was a recipe"
    if any(folder.rglob("state.safetensors")):
        return "within a stage, with a state"
    return "between two states" if any(folder.glob("*.safetensors")) else "before there was a state"


def kill() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    places: Counter[str] = Counter()
    runs = 0
    with tempfile.TemporaryDirectory() as temporary:
        whole, folder, errors = (Path(temporary, name) for name in ("whole", "killed", "errors"))
        begun = time.monotonic()
        new = ["run", "digits", *settings(base=SETTINGS), "--out"]
        assert ended(start([*new, str(whole)], errors), errors)
        seconds = time.monotonic() - begun
        while sum(places.values()) < options.times:
            shutil.rmtree(folder, ignore_errors=True)
            over = False
            while not over:
                resumes = (folder / "config.toml").exists()
                words = ["run", "--resume", str(folder)] if resumes else [*new, str(folder)]
                wants = sum(places.values()) < options.times
                at_a_file = wants and generator.random() < 0.5
                process = start(words, errors, generator.randint(1, 40) if at_a_file else 0)
                if wants and not at_a_file:
                    process.join(generator.uniform(0, 1.2 * seconds))
                    process.kill()  # which does nothing to a process that is over
                over = ended(process, errors)
                if not over:
                    places[place(folder) + (", at a file" if at_a_file else "")] += 1
            assert result(folder) == result(whole), f"run {runs + 1} ended with other bits, after kills {dict(places)}"
            runs += 1
            print(f"{sum(places.values())} kills in {runs} runs so far", file=sys.stderr, flush=True)
    told = ", ".join(f"{n} {where}" for where, n in sorted(places.items()))
    print(f"{sum(places.values())} kills in {runs} runs, all of which ended with the same bits: {told}")
    return 0


if __name__ == "__main__":
    sys.exit(kill())
