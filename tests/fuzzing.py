"""The loop of the fuzzers: cases by number in a process of their own, so that a crash or a hang ends that process and names its case."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

HANGS = 300  # seconds: a busy machine is no hang


def _work(seed: int, first: int, seconds: float, count: int, prepare: Callable[[Path], Callable[[int, int], str]]) -> None:
    """Tries cases from the first on, and writes the number of each before it begins, and at the end how many ended how."""
    faulthandler.enable()
    torch.set_num_threads(2)
    done: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        run_case = prepare(Path(folder))
        end = time.monotonic() + seconds
        for case in range(first, first + count):
            if time.monotonic() > end:
                break
            print(case, flush=True)
            if case % 16 == 0 or case == first:  # which takes as long as a case
                faulthandler.dump_traceback_later(HANGS, exit=True)
            done[run_case(seed, case)] += 1
    print(json.dumps(done), flush=True)


def main(file: str, about: str, prepare: Callable[[Path], Callable[[int, int], str]]) -> int:
    """The command line of the fuzzer ``file``.

    Args:
        about: the text of its help.
        prepare: takes an empty folder and returns what runs a case, ``(seed, number) -> how it ended``, and raises where the case fails.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--count", type=int, default=sys.maxsize, help="so many cases at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # the first case
    options = parser.parse_args()
    if options.worker is not None:
        _work(options.seed, options.worker, options.seconds, 1 if options.case is not None else options.count, prepare)
        return 0
    command = [sys.executable, file, "--seed", str(options.seed), "--seconds", str(options.seconds), "--count", str(options.count)]
    command += ["--worker", str(options.case or 0)] + (["--case", str(options.case)] if options.case is not None else [])
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # threads that wait take no time from those of other processes
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    *cases, last = process.stdout.split("\n")[:-1] or [""]
    if process.returncode == 0:
        print(f"{len(cases)} executions: {', '.join(f'{n} {how}' for how, n in sorted(json.loads(last).items()))}")
        return 0
    print(f"case {last} failed with status {process.returncode}; again: {file} --seed {options.seed} --case {last}")
    return 1
