"""The jobs of an experiment: which stages of its runs are the same and are done once, and how one job is done.

Two runs share a stage if their recipes agree in all that its model depends on, and so do all stages before it. Those stages become a job
of their own, with an ordinary run folder under ``shared/``, from which the runs take the models and the records: their folders hold
what they would hold had each run done everything itself.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import pipeline
from ..data import Dataset
from ..pipeline import STAGES, Recipe, RunFolder, Session, progress
from ..pipeline.recipe import from_table, to_table
from ..pipeline.records import CONFIG
from ..pipeline.run_folder import RESULTS, Locked, read_recipe, read_results
from .attacked import Settings, attack, is_attacked

PATIENCE = 30.0  # seconds: longer than a step takes, after which the process of a killed experiment ends


@dataclass(frozen=True)
class Job:
    """Some stages of a run, in a run folder of its own.

    Attributes:
        folder: the run folder.
        recipe: as :func:`s2ap_ext.pipeline.recipe.to_table` gives it.
        stages: what is trained here.
        start: the folder of the job whose models this one starts from; None if it starts from an untrained one.
        arm, seed: of which run it is; the arm is "" for a job that several share.
        attacked: further attacks on the last model, as in a plan.
    """

    folder: Path
    recipe: dict[str, Any]
    stages: tuple[str, ...]
    start: Path | None
    arm: str
    seed: int
    attacked: Mapping[str, Settings] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.arm or self.stages[-1]}, seed {self.seed}"


def jobs_of(runs: Iterable[tuple[str, int, Recipe]], out: Path, attacked: Mapping[str, Settings] | None = None) -> list[Job]:
    """The jobs that make ``runs``, ``(arm, seed, recipe)``, in ``out``: each after the one that it starts from.

    Args:
        attacked: further attacks on the last model of each run, as in a plan.

    Raises:
        ValueError: two arms whose recipes are the same.
    """
    runs = list(runs)
    chains = {(arm, seed): chain_of(recipe) for arm, seed, recipe in runs}
    followers: dict[str, set[str]] = {}
    whole: dict[str, str] = {}
    for (arm, _), chain in chains.items():
        if (other := whole.setdefault(chain[-1][1], arm)) != arm:
            raise ValueError(f"arms {other} and {arm}: expected recipes that differ, got the same")
        for (_, now), (_, following) in itertools.pairwise(chain):
            followers.setdefault(now, set()).add(following)
    jobs: dict[Path, Job] = {}
    for arm, seed, recipe in runs:
        start, todo = None, []
        for stage, digest in chains[arm, seed][:-1]:
            todo.append(stage)
            if len(followers[digest]) > 1:
                folder = out / "shared" / f"{stage}-{digest}"
                jobs.setdefault(folder, Job(folder, to_table(recipe), tuple(todo), start, "", seed))
                start, todo = folder, []
        folder = out / "runs" / arm / f"seed-{seed}"
        jobs[folder] = Job(folder, to_table(recipe), (*todo, chains[arm, seed][-1][0]), start, arm, seed, attacked or {})
    return sorted(jobs.values(), key=lambda job: job.seed)  # so that an experiment that is cut short has whole seeds


def chain_of(recipe: Recipe) -> list[tuple[str, str]]:
    """Each stage of the run with a digest of all that the model it leaves, and its records, depend on."""
    stages, chain = pipeline.plan(recipe), []
    for i, stage in enumerate(stages):
        table = to_table(recipe)
        for section in {"name", "save_every", *STAGES} - {*stages[: i + 1]}:
            del table[section]
        chain.append((stage, hashlib.sha256(json.dumps([stage, table], sort_keys=True).encode()).hexdigest()[:12]))
    return chain


def is_done(job: Job) -> bool:
    """Whether nothing is left to do.

    Raises:
        ValueError: the folder is that of another recipe, or damaged.
    """
    if not (job.folder / CONFIG).is_file():
        return False
    if to_table(read_recipe(job.folder)) != job.recipe:
        raise ValueError(f"{job.folder}: made by another recipe than that of the plan; choose another folder for this plan")
    return (job.folder / RESULTS).is_file() and bool(read_results(job.folder)) and is_attacked(job.folder, job.attacked)


def do(job: Job, stop: Callable[[], bool], show: progress.Silent | None = None) -> dict[str, Any]:
    """Does what is left of ``job``, and returns the row of its last model, as in ``results.json``.

    Args:
        stop: asked after each batch; when it says True the run is saved and :class:`Stopped` raised.
        show: is told of each epoch.

    Raises:
        Stopped: ``stop`` said so.
        ValueError, OSError, FloatingPointError: as :func:`s2ap_ext.pipeline.run`.
    """
    recipe = from_table(job.recipe)
    data = open_data(recipe)
    with _opened(job, recipe, stop) as folder:
        if job.start is not None:
            pipeline.take_over(job.start, folder, recipe, data)
        row = pipeline.run(Session(recipe, data, folder, show or progress.Silent(), stop), job.stages)[-1]
        for name, settings in job.attacked.items():
            attack(folder.path, name, settings, recipe, data, stop)
        return row


def _opened(job: Job, recipe: Recipe, stop: Callable[[], bool]) -> RunFolder:
    """The job's run folder, made or opened again. Another process may work there for ``PATIENCE`` seconds.

    For when an experiment is killed and goes on at once, the processes that did its jobs are about to end.
    """
    begin = time.monotonic()
    while True:
        try:
            return RunFolder.open(job.folder, recipe)
        except Locked:
            if stop() or time.monotonic() - begin > PATIENCE:
                raise
            time.sleep(0.1)


def open_data(recipe: Recipe) -> Dataset:
    """The images of ``recipe``; the last ones are kept, since jobs that follow each other have the same as a rule."""
    key = json.dumps(to_table(recipe)["data"], sort_keys=True)
    if key not in _data:
        _data.clear()
        _data[key] = pipeline.open_data(recipe)
    return _data[key]


_data: dict[str, Dataset] = {}
