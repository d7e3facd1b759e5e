"""Side-by-side timing, and the table of ratios at the end of a run."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import s2ap_ext


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("s2ap_ext")
    group.addoption("--quick", action="store_true", help="tiny sizes: shows that the benchmarks run, measures nothing")
    group.addoption("--threads", type=int, default=None, help="threads of torch (default: as torch chooses)")
    group.addoption(
        "--table", default=None, metavar="FILE", help="write the table of ratios as Markdown, and FILE with .json for .md as data"
    )


def pytest_configure(config: pytest.Config) -> None:
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


ROWS: list[dict] = []


@pytest.fixture
def side_by_side(benchmark, quick, request):
    """``side_by_side({"ours": f, "other": g}, rounds=5, what="...")`` times all in turn, round by round, so that drifts meet all alike.

    The first is the one that pytest-benchmark reports; ``extra_info`` gets the median milliseconds of each and the ratios to the first.
    Returns the medians in seconds.
    """

    def run(functions: dict[str, Callable[[], object]], *, rounds: int, what: str) -> dict[str, float]:
        rounds = 1 if quick else rounds
        (first, ours), *others = functions.items()
        times: dict[str, list[float]] = {name: [] for name in functions}

        def timed(name: str, f: Callable[[], object]) -> None:
            start = time.perf_counter()
            f()
            times[name].append(time.perf_counter() - start)

        def others_in_turn() -> None:
            for name, f in others:
                timed(name, f)

        for f in functions.values():  # warm up
            f()
        gc.collect()
        gc.disable()
        try:
            benchmark.pedantic(lambda: timed(first, ours), setup=others_in_turn, rounds=rounds)
        finally:
            gc.enable()
        medians = {name: statistics.median(t) for name, t in times.items()}
        row = {
            "benchmark": what,
            "rounds": rounds,
            "median_ms": {name: 1e3 * m for name, m in medians.items()},
            "ratio_to_first": {name: m / medians[first] for name, m in medians.items()},
        }
        benchmark.extra_info.update(row)
        ROWS.append(row)
        return medians

    return run


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
        lines += ["", f"### {row['benchmark']}", "", f"| | median of {row['rounds']}, ms | time relative to {first} |", "|---|---:|---:|"]
        lines += [f"| {name} | {ms:.3g} | {row['ratio_to_first'][name]:.3g} |" for name, ms in row["median_ms"].items()]
    return "\n".join(lines) + "\n"


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not ROWS or config.getoption("--quick"):  # quick numbers would only mislead
        return
    text = table(ROWS)
    terminalreporter.section("side by side")
    terminalreporter.write(text)
    if file := config.getoption("--table"):
        write(Path(file), text)
        write(Path(file).with_suffix(".json"), json.dumps({"machine": machine(), "rows": ROWS}, indent=1) + "\n")


def write(path: Path, text: str) -> None:
    """Into a temporary file first, so that no half-written table is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
