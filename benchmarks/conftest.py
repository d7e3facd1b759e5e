"""Side-by-side timing, and the tables at the end of a run."""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from measure import BREAK_EVEN, ROOFLINE, ROWS, SCALING, Clock, calls, limits, machine, table, write

from s2ap_ext.speed import peak_extra_bytes


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("s2ap_ext")
    group.addoption("--quick", action="store_true", help="tiny sizes: shows that the benchmarks run, measures nothing")
    group.addoption("--device", default="cpu", help="cpu or cuda (default: cpu)")
    group.addoption("--threads", type=int, default=None, help="threads of torch (default: as torch chooses)")
    group.addoption("--images", type=int, default=20_000, help="images that test_streaming.py makes (default: 20,000)")
    group.addoption(
        "--table",
        default=None,
        metavar="FILE",
        help="write the tables as Markdown, and beside FILE with .json for .md the data and with .png the plot of the scaling",
    )


def pytest_configure(config: pytest.Config) -> None:
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def side_by_side(benchmark, quick, device):
    """``side_by_side({"ours": f, "other": g}, rounds=5, what="...")`` times all in turn, round by round, so that drifts meet all alike.

    The first is the one that pytest-benchmark reports; ``extra_info`` gets the median milliseconds of each and the ratios to the first.

    ``floor=(name, bytes, others)``: the function ``name`` streams so many bytes; ``others`` are names and the bytes that they have to
    move at least, and the table says how long that takes at the bandwidth of the former, as a share of their time. ``inspect``: also
    counts calls and memory. ``wall``: on CUDA, the time until the work is done, host included. ``warm``: each call follows one of the
    same function that is not timed, so that none pays for the caches and waiting threads that another one left. ``benchmarked=False`` for
    all but the last in a test, since pytest-benchmark takes one. Returns the medians in seconds.
    """
    clock = Clock(device)

    def run(
        functions: dict[str, Callable[[], object]],
        *,
        rounds: int,
        what: str,
        floor: tuple[str, int, dict[str, int]] | None = None,
        inspect: bool = False,
        wall: bool = False,
        warm: bool = False,
        benchmarked: bool = True,
    ) -> dict[str, float]:
        rounds = 1 if quick else rounds
        (first, ours), *others = functions.items()
        times: dict[str, list[float]] = {name: [] for name in functions}

        def measure(name: str, f: Callable[[], object]) -> None:
            times[name].append(clock.seconds(f, wall=wall))

        def before_ours() -> None:
            for name, f in others:
                if warm:
                    f()
                measure(name, f)
            if warm:
                ours()

        row: dict = {"benchmark": what, "rounds": rounds}
        if inspect:
            row["calls"] = {name: calls(f, device) for name, f in functions.items()}
            if device.type == "cuda":
                row["host_us"] = {name: 1e6 * statistics.median(clock.host_seconds(f) for _ in range(5)) for name, f in functions.items()}
            row["extra_bytes"] = {name: peak_extra_bytes(f, device) for name, f in functions.items()}
        for f in functions.values():  # warm up
            f()
        gc.collect()
        gc.disable()
        try:
            if benchmarked:
                benchmark.pedantic(lambda: measure(first, ours), setup=before_ours, rounds=rounds)
            else:
                for _ in range(rounds):
                    before_ours()
                    measure(first, ours)
        finally:
            gc.enable()
        medians = {name: statistics.median(t) for name, t in times.items()}
        row["median_ms"] = {name: 1e3 * m for name, m in medians.items()}
        row["ratio_to_first"] = {name: m / medians[first] for name, m in medians.items()}
        if floor:
            name, streamed, moved = floor
            bandwidth = streamed / medians[name]
            row["bytes"] = moved
            row["share_of_floor"] = {other: size / bandwidth / medians[other] for other, size in moved.items()}
        benchmark.extra_info.update(row)
        ROWS.append(row)
        return medians

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not ROWS or config.getoption("--quick"):  # quick numbers would only mislead
        return
    text = table(ROWS)
    terminalreporter.section("side by side")
    terminalreporter.write(text)
    if file := config.getoption("--table"):
        write(Path(file), text.encode())
        write(Path(file).with_suffix(".json"), json.dumps({"machine": machine(), "rows": ROWS}, indent=1).encode() + b"\n")
        if ROOFLINE:
            from test_sparse_convolutions import roofline

            write(Path(file).with_name(f"{Path(file).stem}-roofline.png"), roofline(ROOFLINE, machine(), *limits()))
        if BREAK_EVEN:
            from test_sparse_networks import break_even

            write(Path(file).with_name(f"{Path(file).stem}-break-even.png"), break_even(BREAK_EVEN, machine()))
        if SCALING:
            from test_scaling import plot

            write(Path(file).with_suffix(".png"), plot(SCALING, machine()))
