"""An experiment as a whole: its folder, the runs that are left, and what was found.

=======================  ==================================================================
plan.toml                the plan with all that the command line changed: a plan again
runs/ARM/seed-K/         the run folders
shared/STAGE-DIGEST/     run folders of stages that several runs share
table.csv                one row for each arm, seed and model
summary.json             means, comparisons and the verdict, all computed from the table
summary.md               the same to read
=======================  ==================================================================
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import pipeline
from ..pipeline import progress
from ..pipeline.checkpoint import write_text
from ..pipeline.extras import optional
from ..pipeline.run_folder import LOCK, check_space, locked
from .attacked import check
from .jobs import Job, is_done, jobs_of, open_data
from .plan import Plan, from_table, load_plan, to_toml
from .summary import summarise
from .table import TABLE, read_table, rows_of, write_table
from .words import to_markdown
from .workers import Done, Failed, work

PLAN, SUMMARY, PAGE = "plan.toml", "summary.json", "summary.md"


@dataclass(frozen=True)
class Result:
    """What :func:`run` left.

    Attributes:
        summary: what :func:`s2ap_ext.experiments.summarise` gives of the runs that are done; None where none is.
        failed: the jobs that cannot be done, by their labels, and why.
        finished: whether all runs are done.
    """

    summary: dict[str, Any] | None
    failed: dict[str, str]
    finished: bool


def run(
    plan: Plan,
    out: Path,
    *,
    workers: int | None = None,
    show: progress.Silent | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Does the runs of ``plan`` that are not done yet in ``out``, and writes the table and the summary of those that are.

    Args:
        workers: runs at a time; None: as many as there are cores for this process on a CPU, one on a GPU.
        stop: asked after each step of each run; when it says True everything is saved, to go on with the same ``out``.

    Raises:
        ValueError: arms with the same or an invalid recipe; ``out`` holds something else than a part of this plan; too little disk.
    """
    jobs = _checked_jobs(plan, out)
    _open(plan, out)
    with locked(out):
        return _run(plan, out, jobs, workers or _default_workers(jobs), show or progress.Silent(), stop)


def _run(plan: Plan, out: Path, jobs: Sequence[Job], workers: int, show: progress.Silent, stop: Callable[[], bool]) -> Result:
    write_text(out / PLAN, to_toml(plan))
    done = {job.folder for job in jobs if is_done(job)}
    todo = _needed([job for job in jobs if job.folder not in done])
    failed: dict[str, str] = {}
    started, total = time.monotonic(), len(todo)
    show.start(plan.name, total)
    try:
        for number, (job, outcome) in enumerate(work(todo, workers, stop), 1):
            left = (total - number) * (time.monotonic() - started) / number
            show.say(
                f"{number}/{total}  {job.label}: {_told(outcome)}{f'  about {progress.duration(left)} left' if number < total else ''}"
            )
            show.advance(plan.name, "")
            if isinstance(outcome, Failed):
                failed[job.label] = outcome.why
            else:
                done.add(job.folder)
    finally:
        show.stop()
    finished = [job for job in jobs if job.arm and job.folder in done]
    summary = write_results(plan, out, finished) if finished else None
    return Result(summary, failed, len(finished) == sum(1 for job in jobs if job.arm))


def write_results(plan: Plan, out: Path, finished: Sequence[Job]) -> dict[str, Any]:
    """Writes the table of the finished runs, and the summary from the table."""
    order = list(plan.all_arms())
    rows = [row for job in sorted(finished, key=lambda job: (order.index(job.arm), job.seed)) for row in rows_of(job)]
    write_table(out / TABLE, rows)
    summary = summarise(plan, read_table(out / TABLE))
    write_text(out / SUMMARY, json.dumps(summary, indent=2) + "\n")
    write_text(out / PAGE, to_markdown(summary))
    return summary


def read_plan(out: str | Path) -> Plan:
    """The plan of the experiment in folder ``out``; raises ValueError if it is not the folder of an experiment."""
    if not (Path(out) / PLAN).is_file():
        raise ValueError(f"{out}: not the folder of an experiment (no {PLAN} in it)")
    return load_plan(Path(out) / PLAN)


def _checked_jobs(plan: Plan, out: Path) -> list[Job]:
    """All jobs of the plan; nothing is left that could be wrong with its recipes."""
    runs = plan.runs()
    jobs = jobs_of(runs, out.absolute(), plan.attacked)
    first = [recipe for _, seed, recipe in runs if seed == 0]
    pipeline.pick_device(first[0].device)
    needed = sum(plan.seeds * pipeline.check_prunable(recipe, open_data(recipe)) for recipe in first)
    if not out.exists():
        check_space(out, needed)
    for name, settings in plan.attacked.items():
        check(first[0], open_data(first[0]), name, settings)
    return jobs


def _open(plan: Plan, out: Path) -> None:
    """Makes the folder, or sees that it is this plan's; more seeds than it had are fine."""
    if (out / PLAN).is_file():
        before = read_plan(out)
        if replace(before, seeds=plan.seeds) != _read_back(plan):
            raise ValueError(f"{out}: holds another plan, or this one with other settings; choose another folder, or --resume {out}")
        if before.seeds > plan.seeds:
            raise ValueError(f"{out}: has {before.seeds} seeds already, expected at least as many, got {plan.seeds}")
    elif out.exists() and (not out.is_dir() or any(entry.name != LOCK for entry in out.iterdir())):
        raise ValueError(f"out: {out} exists already and is not the folder of an experiment; choose another folder")
    out.mkdir(parents=True, exist_ok=True)


def _read_back(plan: Plan) -> Plan:
    return from_table(optional("tomllib", or_else="tomli").loads(to_toml(plan)))


def _needed(jobs: Sequence[Job]) -> list[Job]:
    """Those of ``jobs``, which are not done, that are runs or that one of these starts from."""
    needed: dict[Path, Job] = {}
    for job in reversed(jobs):
        if job.arm or any(later.start == job.folder for later in needed.values()):
            needed[job.folder] = job
    return [job for job in jobs if job.folder in needed]


def _default_workers(jobs: Sequence[Job]) -> int:
    on_cpu = pipeline.pick_device(jobs[0].recipe["device"]).type == "cpu"
    return len(os.sched_getaffinity(0)) if on_cpu else 1


def _told(outcome: Done | Failed) -> str:
    if isinstance(outcome, Failed):
        return f"failed: {outcome.why}"
    row = outcome.row
    return f"{row['model']}  clean {progress.percent(row['clean'])}  robust {progress.percent(row['robust'])}  {row['seconds']:.1f} s"
