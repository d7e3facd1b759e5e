"""Measures one thing at a time, and writes what was measured as a table."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import s2ap_ext

ROWS: list[dict] = []
SCALING: list[dict] = []  # {"op", "n", "ms"}: what test_scaling.py measured
BREAK_EVEN: list[dict] = []  # {"batch", "density", "speedup"}: what test_sparse_networks.py measured
ROOFLINE: list[dict] = []  # {"layer", "density", "flops", "bytes", "seconds"}: what test_sparse_convolutions.py measured


class Clock:
    """Times one call: the time until it is done, or on CUDA that of the device alone.

    On CUDA the L2 cache is overwritten first, and the device is kept busy while the host hands over the work, so that what lies between the
    two events is what the device does and not how fast it is asked to. ``wall=True``: from the call until the device is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=device) if self.cuda else None
        self.head_start = 1e-4  # seconds

    def seconds(self, f: Callable[[], object], *, wall: bool = False) -> float:
        if not self.cuda or wall:
            self._wait()
            start = time.perf_counter()
            f()
            self._wait()
            return time.perf_counter() - start
        for _ in range(3):  # where the function waits for the device itself, the host never gets ahead
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._wait()
            self.flush.zero_()
            torch.cuda._sleep(int(self.head_start * 2e9))
            start = time.perf_counter()
            begin.record()
            f()
            end.record()
            host = time.perf_counter() - start
            self._wait()
            if host < self.head_start:
                break
            self.head_start = min(1.5 * host, 0.1)
        return begin.elapsed_time(end) / 1e3

    def host_seconds(self, f: Callable[[], object]) -> float:
        """How long the host is busy with the call while the device has nothing else to do."""
        self._wait()
        start = time.perf_counter()
        f()
        taken = time.perf_counter() - start
        self._wait()
        return taken

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def calls(f: Callable[[], object], device: torch.device) -> int:
    """By torch's profiler: kernels launched on a CUDA device; on the CPU, operators called from outside."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    f()
    with torch.profiler.profile(activities=activities) as profile:
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
    if device.type == "cuda":
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    return sum(event.cpu_parent is None for event in profile.events())


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return {
        "commit": commit.stdout.strip() or "unknown",
        "cpu": f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "backend": str(s2ap_ext.backend()),
    }


def table(rows: list[dict]) -> str:
    """Markdown: one line for each thing measured, under a heading for each benchmark."""
    lines = [f"- {name}: {value}" for name, value in machine().items()]
    for row in rows:
        first = next(iter(row["median_ms"]))
        columns = {
            f"median of {row['rounds']}, ms": [f"{ms:.3g}" for ms in row["median_ms"].values()],
            f"time relative to {first}": [f"{ratio:.3g}" for ratio in row["ratio_to_first"].values()],
        }
        if "bytes" in row:
            columns["bytes to move, MB"] = [_or_blank(row["bytes"], name, lambda b: f"{b / 1e6:.4g}") for name in row["median_ms"]]
            columns["share of the streaming floor"] = [
                _or_blank(row["share_of_floor"], name, lambda share: f"{share:.0%}") for name in row["median_ms"]
            ]
        if "calls" in row:
            if "host_us" in row:
                columns["host, us"] = [f"{us:.0f}" for us in row["host_us"].values()]
            columns["calls"] = [f"{count}" for count in row["calls"].values()]
            columns["extra memory, MB"] = ["" if b is None else f"{b / 1e6:.2f}" for b in row["extra_bytes"].values()]
        lines += ["", f"### {row['benchmark']}", "", "| | " + " | ".join(columns) + " |", "|---" + len(columns) * "|---:" + "|"]
        lines += ["| " + " | ".join(cells) + " |" for cells in zip(row["median_ms"], *columns.values(), strict=True)]
        lines += ["", row["note"]] if "note" in row else []
    return "\n".join(lines) + "\n"


def limits() -> tuple[float, float]:
    """The CPU's limits, measured: floating point operations per second (a matrix product), and bytes per second (torch.mul)."""
    a, b = torch.randn(1024, 1024), torch.randn(64 << 20)
    out, product = torch.empty_like(b), torch.empty_like(a)

    def best(f: Callable[[], object]) -> float:
        clock = Clock(torch.device("cpu"))
        f()
        return min(clock.seconds(f) for _ in range(7))

    flops = 2 * 1024**3 / best(lambda: torch.mm(a, a, out=product))
    return flops, 8 * b.numel() / best(lambda: torch.mul(b, 2.0, out=out))


def _or_blank(values: dict, name: str, text: Callable) -> str:
    return text(values[name]) if name in values else ""


def write(path: Path, content: bytes) -> None:
    """Into a temporary file first, so that no half-written table is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, delete=False) as file:
        file.write(content)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
