"""Kills runs at random moments and looks whether they go on to the same bits.

    python tests/kill_runs.py --times 100 [--seed N]

Each run of the pipeline is killed (SIGKILL) again and again, at moments drawn at random from its first second on or at one of the
replacements of its files, and resumed each time, until so many kills were survived. At its end its models and records must be those of a
run that nobody killed. Prints how many kills fell where.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from command_line import TINY, settings

from s2ap_ext.pipeline.run_folder import read_metrics

SETTINGS = [*TINY, "data.train_size=64", "save_every=0", *(f"{stage}.epochs=2" for stage in ("pretrain", "prune", "finetune"))]
TIMEOUT = 300  # seconds

# Runs the command line, and dies before or after the replacement of a file of which the environment tells the number.
DYING = """
import os, signal, sys
replace, left = os.replace, int(os.environ["DIES_AT"])
def dying(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*arguments)
    if left == -1:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = dying
from s2ap_ext.cli import main
sys.exit(main())
"""


def start(words: list[str], dies_at: int = 0) -> subprocess.Popen:
    program = ["-c", DYING] if dies_at else ["-m", "s2ap_ext.cli"]
    environment = {**os.environ, "DIES_AT": str(dies_at)}
    return subprocess.Popen([sys.executable, *program, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def ended(process: subprocess.Popen) -> bool:
    """Waits; whether the run is over. Raises AssertionError where it neither ended well nor was killed."""
    errors = process.communicate(timeout=TIMEOUT)[1].decode()
    assert process.returncode in (0, -signal.SIGKILL), f"exit code {process.returncode}: {errors}"
    return process.returncode == 0


def result(folder: Path) -> tuple:
    """All that a run's result consists of."""
    models = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
    return models, [{**record, "seconds": 0} for record in read_metrics(folder)]


def place(folder: Path) -> str:
    """Where the run stands that was killed."""
    if not (folder / "config.toml").exists():
        return "before there was a recipe"
    if (folder / "state.safetensors").exists():
        return "within a stage, with a state"
    return "between two states" if any(folder.glob("*.safetensors")) else "before there was a state"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    places: Counter[str] = Counter()
    runs = 0
    with tempfile.TemporaryDirectory() as temporary:
        whole, folder = Path(temporary, "whole"), Path(temporary, "killed")
        begun = time.monotonic()
        new = ["run", "digits", *settings(base=SETTINGS), "--out"]
        assert ended(start([*new, str(whole)]))
        seconds = time.monotonic() - begun
        while sum(places.values()) < options.times:
            shutil.rmtree(folder, ignore_errors=True)
            over = False
            while not over:
                resumes = (folder / "config.toml").exists()
                words = ["run", "--resume", str(folder)] if resumes else [*new, str(folder)]
                wants = sum(places.values()) < options.times
                at_a_file = wants and generator.random() < 0.5
                process = start(words, generator.randint(1, 40) if at_a_file else 0)
                if wants and not at_a_file:
                    try:
                        process.wait(generator.uniform(0, 1.2 * seconds))
                    except subprocess.TimeoutExpired:
                        process.kill()
                over = ended(process)
                if not over:
                    places[place(folder) + (", at a file" if at_a_file else "")] += 1
            assert result(folder) == result(whole), f"run {runs + 1} ended with other bits, after kills {dict(places)}"
            runs += 1
            print(f"{sum(places.values())} kills in {runs} runs so far", file=sys.stderr, flush=True)
    told = ", ".join(f"{n} {where}" for where, n in sorted(places.items()))
    print(f"{sum(places.values())} kills in {runs} runs, all of which ended with the same bits: {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
