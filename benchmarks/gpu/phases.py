"""How long each phase of an op's launch takes, and what a grid barrier costs, on one layer of each size.

    python -m benchmarks.gpu.phases

Each op is timed as it is, one launch, and then in another process with a launch for each phase, where the profiler tells the phases apart.
The L2 cache is overwritten before each call. What the one launch takes beyond the sum of its phases is due to its barriers; a launch of its
own starts with idle multiprocessors, so that is a guess from below.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
from measure import Clock
from test_ops import SGD, Layers

from s2ap_ext import ops

from .parts import APART

SIZES = (10**5, 11_000_000, 10**8)
OPS = ("select", "perturb", "update_select")
SEARCH = ("sweep", "pass 1", "pass 2", "pass 3", "apply", "settle")  # of float32 scores
FIRST = {"select": "guess", "perturb": "norms", "update_select": "update"}
CALLS = 10


def calls(n: int, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each op on one layer of ``n`` scores, a tenth of which is kept."""
    layers = Layers([(1, n)], device)
    arguments = layers.weights, layers.kept
    yield "select", lambda: ops.select(layers.scores, *arguments, out=layers.out, cuts=layers.cuts)
    yield (
        "perturb",
        lambda: ops.perturb(layers.scores, layers.grads, *arguments, layers.cuts, gamma=1e-3, out=layers.out, new_cuts=layers.new_cuts),
    )
    yield (
        "update_select",
        lambda: ops.update_select(
            layers.scores, layers.grads, layers.buffers, *arguments, layers.cuts, **SGD, out=layers.out, new_cuts=layers.cuts
        ),
    )


def launches(op: str, call: Callable[[], object], flush: torch.Tensor) -> list[list[float]]:
    """Microseconds of the op's kernels, launch by launch, for each of some calls."""
    found = []
    for _ in range(CALLS):
        flush.zero_()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        ours = [event for event in profile.events() if f"{op}_kernel" in event.name]
        found.append([event.device_time for event in sorted(ours, key=lambda event: event.time_range.start)])
    return found


def apart(sizes: list[int]) -> dict[str, dict[str, list[float]]]:
    """Medians of the phases by size and op; in a process in which each is a launch."""
    device = torch.device("cuda")
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    return {
        str(n): {op: [statistics.median(phase) for phase in zip(*launches(op, call, flush), strict=True)] for op, call in calls(n, device)}
        for n in sizes
    }


def names(op: str, count: int) -> list[str]:
    """What the phases of an op are called, of which there are ``count``: those that are left over are levels of sums."""
    return [FIRST[op], *["sums"] * (count - 1 - len(SEARCH)), *SEARCH]


def report(op: str, n: int, whole: float, phases: list[float]) -> str:
    told = ", ".join(f"{name} {us:.1f}" for name, us in zip(names(op, len(phases)), phases, strict=True))
    barriers = len(phases) - 3  # two passes of the search are usually left out with their barriers
    return (
        f"{n:,} scores, {op}: {whole:.1f} us in one launch; {sum(phases):.1f} us phase by phase ({told}); "
        f"{(whole - sum(phases)) / barriers:+.1f} us for each of {barriers} barriers"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scores", type=int, action="append", help="sizes of the layer (default: 1e5, 1.1e7, 1e8)")
    parser.add_argument("--apart", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = given.scores or list(SIZES)
    if given.apart:
        print(json.dumps(apart(sizes)))
        return
    device = torch.device(given.device)
    found: dict[str, dict[str, list[float]]] = {str(n): {op: [] for op in OPS} for n in sizes}
    if device.type == "cuda":
        words = [sys.executable, "-m", "benchmarks.gpu.phases", "--apart", *(word for n in sizes for word in ("--scores", str(n)))]
        done = subprocess.run(words, env={**os.environ, **APART}, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
    clock = Clock(device)
    for n in sizes:
        for op, call in calls(n, device):
            call()
            whole = 1e6 * statistics.median(clock.seconds(call) for _ in range(CALLS))
            phases = found[str(n)][op]
            print(report(op, n, whole, phases) if phases else f"{n:,} scores, {op}: {whole:.1f} us; a CPU has no phases", flush=True)


if __name__ == "__main__":
    main()
