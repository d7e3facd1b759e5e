"""How a run shows where it is: a bar for each stage on a terminal, a line for each stage elsewhere, nothing by default."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from .extras import optional

if TYPE_CHECKING:
    from rich.progress import Progress


class Stopped(Exception):
    """The run was asked to stop, and did. All it needs to go on is in its folder."""


class Silent:
    """Shows nothing; what the others look like from the pipeline."""

    def start(self, label: str, total: int, done: int = 0) -> None:
        """A stage or an evaluation of ``total`` steps begins, of which ``done`` were done before."""

    def advance(self, label: str, note: str) -> None:
        """One more step is done; ``label`` and ``note`` describe it."""

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        """An epoch is over; ``record`` is what metrics.jsonl gets."""

    def stop(self, note: str = "") -> None:
        """The stage or evaluation is over, or was interrupted; ``note`` is what it found."""

    def say(self, line: str) -> None:
        """One line worth telling."""


class Lines(Silent):
    """A plain line when a stage or an evaluation ends, and every ``PAUSE`` seconds one that says how long the rest will take.

    Args:
        verbose: a line for each epoch too.
    """

    PAUSE = 60.0

    def __init__(self, verbose: bool = False) -> None:
        self.verbose = verbose
        self._label, self._total, self._done, self._first = "", 0, 0, 0
        self._began = self._said = time.monotonic()
        self._last = ""  # the last epoch of the stage

    def start(self, label: str, total: int, done: int = 0) -> None:
        self._label, self._total, self._done, self._first, self._last = label, total, done, done, ""
        self._began = self._said = time.monotonic()

    def advance(self, label: str, note: str) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._said >= self.PAUSE:
            left = (now - self._began) / (self._done - self._first) * (self._total - self._done)
            self.say("  ".join(filter(None, (label, note, f"about {duration(left)} left"))))
            self._said = now

    def stop(self, note: str = "") -> None:
        took = f"{duration(time.monotonic() - self._began)}"
        if note:
            self.say(f"{self._label}  {note}  {took}")
        elif self._last:
            self.say(f"{self._last}  in {took}")

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        self._last = describe(record, epochs)
        if self.verbose:
            self.say(f"{self._last}  {record['seconds']:.1f} s")
            self._said = time.monotonic()

    def say(self, line: str) -> None:
        say(line)


class Bars(Silent):
    """A bar for each stage, with the loss and the robust accuracy so far."""

    def __init__(self) -> None:
        optional("rich.progress")
        self._bar: Progress | None = None

    def start(self, label: str, total: int, done: int = 0) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(bar_width=24), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
        self._bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), refresh_per_second=4)
        self._task = self._bar.add_task(f"{label:<18}", total=total, completed=done, note="")
        self._bar.start()

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        assert self._bar is not None
        self._bar.update(self._task, note=f"clean {percent(record['clean'])}  robust {percent(record['robust'])} (test)")

    def advance(self, label: str, note: str) -> None:
        assert self._bar is not None  # start() comes first
        self._bar.update(self._task, advance=1, description=f"{label:<18}", note=note)

    def stop(self, note: str = "") -> None:
        if self._bar is not None:
            if note:
                self._bar.update(self._task, note=note)
            self._bar.stop()
            self._bar = None

    def say(self, line: str) -> None:
        say(line)


class Prefixed(Silent):
    """Shows what belongs to another run as ``show`` does, with ``prefix`` before each label."""

    def __init__(self, prefix: str, show: Silent) -> None:
        self._prefix, self._show = prefix, show

    def start(self, label: str, total: int, done: int = 0) -> None:
        self._show.start(f"{self._prefix} {label}", total, done)

    def advance(self, label: str, note: str) -> None:
        self._show.advance(f"{self._prefix} {label}", note)

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        self._show.epoch(record | {"stage": f"{self._prefix} {record['stage']}"}, epochs)

    def stop(self, note: str = "") -> None:
        self._show.stop(note)

    def say(self, line: str) -> None:
        self._show.say(line)


def say(line: str) -> None:
    """Prints ``line``. Nobody may be reading any more (``s2ap run ... | head -1``): training goes on all the same."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        # What is still in the buffer, and all that comes, goes nowhere: Python would raise again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def for_this_terminal(verbose: bool = False) -> Silent:
    """Bars where standard output is a terminal, lines where it is not, or where each epoch is wanted."""
    return Bars() if optional("rich.console").Console().is_terminal and not verbose else Lines(verbose)


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 5 s`` or ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def percent(fraction: float) -> str:
    """``0.9012`` as ``"90.1 %"``."""
    return f"{100 * fraction:.1f} %"


def describe(record: dict[str, Any], epochs: int) -> str:
    """An epoch's record in one line."""
    parts = [
        f"{record['stage']} {record['epoch']}/{epochs}",
        f"loss {record['loss']:.3f}",
        f"robust {percent(record['train_robust'])} (train)",
    ]
    parts += [f"{percent(record['robust'])} (test)", f"clean {percent(record['clean'])} (test)"]
    if "mask_distance" in record:
        parts.append(f"mask moved {percent(record['mask_distance'])}")
    return "  ".join(parts)
