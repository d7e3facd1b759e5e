"""Sweeps: Optuna looks for the settings of a recipe with which the finished model is most robust.

=======================  ==================================================================
sweep.toml               the recipe and the parameters
study.db                 Optuna's study, where no storage is named
trials/DIGEST/           the run folders of the trials, by what their recipes hold
shared/pretrain-DIGEST/  dense models that trials share
trials.csv               one row for each trial
=======================  ==================================================================

A trial is a run. One that is stopped is told to Optuna as failed, and its values are queued: the next trial takes them up and goes on in
the same folder. Each epoch of search and finetuning tells the robust accuracy so far, and a trial below the median of the others is ended.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import pipeline
from ..pipeline import Recipe, Stopped, progress
from ..pipeline.checkpoint import write_text
from ..pipeline.extras import optional
from ..pipeline.plan import number_of
from ..pipeline.recipe import from_table, override, to_table
from ..pipeline.run_folder import LOCK, METRICS, locked, read_metrics
from .jobs import Job, chain_of, do, is_done, open_data

SWEEP, STUDY, TRIALS = "sweep.toml", "study.db", "trials.csv"
KINDS = ("log", "uniform", "int", "choice")
ENDED, FOLDER = "ended", "folder"  # attributes of a trial: how it ended, and its run folder
DONE = "done"  # how a trial ended that has a finished model


@dataclass(frozen=True)
class Param:
    """One key of a recipe that a sweep varies.

    Attributes:
        key: as ``--set`` takes it.
        kind: log and uniform (numbers in [low, high], the former by their logarithm), int, or choice.
        low, high: the ends; unused by a choice.
        choices: the texts to choose from.
    """

    key: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Param:
        """What ``KEY=log:LOW:HIGH``, ``KEY=uniform:LOW:HIGH``, ``KEY=int:LOW:HIGH`` or ``KEY=choice:A,B`` says; ValueError for others."""
        name, _, spec = text.partition("=")
        kind, _, values = spec.partition(":")
        expected = "expected KEY=log:LOW:HIGH, KEY=uniform:LOW:HIGH, KEY=int:LOW:HIGH or KEY=choice:A,B"
        if not re.fullmatch(r"[\w.]+", name) or kind not in KINDS or not values:
            raise ValueError(f"--param {text:.100}: {expected}")
        if kind == "choice":
            return cls(name, kind, choices=tuple(value.strip() for value in values.split(",")))
        try:
            low, high = (int(end) if kind == "int" else float(end) for end in values.split(":"))
        except ValueError:
            raise ValueError(f"--param {text:.100}: {expected}") from None
        if not low < high or (kind == "log" and low <= 0):
            raise ValueError(f"--param {text:.100}: expected LOW < HIGH{', both > 0' if kind == 'log' else ''}")
        return cls(name, kind, low, high)

    def ends(self) -> list[str]:
        """The values between which, or of which, all others are, as texts."""
        return list(self.choices) or [str(self.low), str(self.high)]

    def suggest(self, trial: Any) -> str:
        """The value that the trial of Optuna gets, as text."""
        if self.kind == "choice":
            return str(trial.suggest_categorical(self.key, self.choices))
        if self.kind == "int":
            return str(trial.suggest_int(self.key, int(self.low), int(self.high)))
        return repr(trial.suggest_float(self.key, self.low, self.high, log=self.kind == "log"))


@dataclass(frozen=True)
class Sweep:
    """A valid sweep: a recipe, and the parameters as the command line has them. Trials have no control of their own (``prune.control``)."""

    recipe: Recipe
    params: tuple[str, ...]

    def __post_init__(self) -> None:
        parsed = [Param.parse(text) for text in self.params]
        if not parsed:
            raise ValueError("--param: expected at least one")
        for param in parsed:
            for value in param.ends():
                try:
                    override(self.recipe, [f"{param.key}={value}"])
                except ValueError as error:
                    raise ValueError(f"--param {str(error).removeprefix('--set ')}") from None
        if len({param.key for param in parsed}) < len(parsed):
            raise ValueError("--param: expected each key once")


def read_sweep(out: Path) -> Sweep:
    """The sweep in the folder ``out``; raises ValueError if it is not the folder of a sweep."""
    if not (out / SWEEP).is_file():
        raise ValueError(f"{out}: not the folder of a sweep (no {SWEEP} in it)")
    try:
        table = optional("tomllib", or_else="tomli").loads((out / SWEEP).read_text(encoding="utf-8", errors="replace"))
        return Sweep(from_table(table["recipe"], str(out / SWEEP)), tuple(table["params"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{out / SWEEP}: not as the sweep wrote it ({error})") from None


def run_sweep(
    sweep: Sweep,
    out: Path,
    *,
    trials: int,
    storage: str = "",
    show: progress.Silent | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Does trials until the study has ``trials`` that ended, and writes trials.csv.

    Args:
        storage: the URL of a database that other machines may share; "" is an SQLite file in ``out``. The recipe names the study.
        stop: asked after each step; when it says True the trial in progress is saved, to go on with later.

    Returns:
        the trials, the most robust first: ``trial`` (number), ``ended`` (done, pruned, or why it failed), ``robust`` (of the finished
        model, or None), the value of each parameter, and ``folder``.

    Raises:
        ValueError: ``out`` holds something else than this sweep; a storage that cannot be used.
        MissingExtra: Optuna is not installed.
    """
    optuna, show = optional("optuna"), show or progress.Silent()
    pipeline.pick_device(sweep.recipe.device)
    pipeline.check_prunable(sweep.recipe, open_data(sweep.recipe))
    _open(sweep, out)
    out = out.absolute()
    with locked(out):
        study = _study(optuna, sweep, storage or f"sqlite:///{out / STUDY}")
        _queue_again(optuna, study, out)
        while not stop() and sum(ENDED in trial.user_attrs for trial in study.get_trials(deepcopy=False)) < trials:
            if (line := _trial(optuna, study, sweep, out, stop)) is None:
                break
            show.say(line)
        found = _rows(study, sweep)
        _write(out / TRIALS, found)
    return found


def _open(sweep: Sweep, out: Path) -> None:
    if (out / SWEEP).is_file():
        if read_sweep(out) != sweep:
            raise ValueError(f"{out}: holds another sweep; choose another folder, or --resume {out}")
    elif out.exists() and (not out.is_dir() or any(entry.name != LOCK for entry in out.iterdir())):
        raise ValueError(f"out: {out} exists already and is not the folder of a sweep; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / SWEEP, optional("tomli_w").dumps({"params": list(sweep.params), "recipe": to_table(sweep.recipe)}))


def _study(optuna: ModuleType, sweep: Sweep, storage: str) -> Any:
    """The study, made or opened. Its sampler goes on with other random numbers than those of the trials that are there."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(study_name=sweep.recipe.name, storage=storage, direction="maximize", load_if_exists=True)
    except Exception as error:  # whatever the drivers of databases raise
        raise ValueError(f"--storage {storage}: cannot be used ({str(error).splitlines()[0]})") from error
    study.sampler = optuna.samplers.TPESampler(seed=sweep.recipe.seed + len(study.get_trials(deepcopy=False)))
    study.pruner = optuna.pruners.MedianPruner(n_warmup_steps=sweep.recipe.prune.warmup_epochs)
    return study


def _queue_again(optuna: ModuleType, study: Any, out: Path) -> None:
    """Queues the values of trials that a process was at here when it was killed."""
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        if Path(trial.user_attrs.get(FOLDER, "")).is_relative_to(out):
            study.enqueue_trial(trial.params)
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)


def _trial(optuna: ModuleType, study: Any, sweep: Sweep, out: Path, stop: Callable[[], bool]) -> str | None:
    """One trial; a line that tells of it, or None if it was stopped."""
    trial, states = study.ask(), optuna.trial.TrialState
    values = {param.key: param.suggest(trial) for param in map(Param.parse, sweep.params)}
    recipe = override(sweep.recipe, [*(f"{name}={value}" for name, value in values.items()), "prune.control=false"])
    first, (_, digest) = chain_of(recipe)[0], chain_of(recipe)[-1]
    folder, start = out / "trials" / digest, None
    trial.set_user_attr(FOLDER, str(folder))
    state, robust, ended = states.FAIL, None, DONE
    try:
        if first[0] == "pretrain" and first == chain_of(sweep.recipe)[0]:  # the parameters do not matter to it
            start = out / "shared" / f"pretrain-{first[1]}"
            shared = Job(start, to_table(sweep.recipe), ("pretrain",), None, "", recipe.seed)
            if not is_done(shared):
                do(shared, stop)
        job = Job(folder, to_table(recipe), pipeline.plan(recipe), start, digest, recipe.seed)
        robust, state = do(job, stop, _Reports(optuna, trial, folder))["robust"], states.COMPLETE
    except Stopped:
        study.enqueue_trial(trial.params)
        study.tell(trial, state=states.FAIL)
        return None
    except optuna.TrialPruned:
        state, ended = states.PRUNED, "pruned"
    except (ValueError, FloatingPointError) as error:
        ended = str(error)
    trial.set_user_attr(ENDED, ended)
    study.tell(trial, robust, state=state)
    said = " ".join(f"{name}={value:.6s}" for name, value in values.items())
    return f"trial {trial.number}  {said}  {ended if robust is None else f'robust {progress.percent(robust)}'}"


class _Reports(progress.Silent):
    """Tells Optuna of each epoch, those of earlier attempts included, and ends the trial where Optuna says so."""

    def __init__(self, optuna: ModuleType, trial: Any, folder: Path) -> None:
        self.optuna, self.trial = optuna, trial
        self.told: set[int] = set()
        for record in read_metrics(folder) if (folder / METRICS).is_file() else []:
            if "epoch" in record:
                self._tell(record)

    def epoch(self, record: dict[str, Any], epochs: int) -> None:
        self._tell(record)
        if self.trial.should_prune():
            raise self.optuna.TrialPruned

    def _tell(self, record: dict[str, Any]) -> None:
        """Under a number that grows from stage to stage: each has room for a million epochs, as many as a recipe may have."""
        step = 10**6 * (number_of(record["stage"]) - number_of("prune")) + record["epoch"]
        if step > 0 and step not in self.told:
            self.told.add(step)
            self.trial.report(record["robust"], step)


def _rows(study: Any, sweep: Sweep) -> list[dict[str, Any]]:
    names = [Param.parse(text).key for text in sweep.params]
    rows = [
        {"trial": t.number, "ended": t.user_attrs[ENDED], "robust": t.value if t.user_attrs[ENDED] == DONE else None}
        | {name: t.params.get(name) for name in names}
        | {"folder": t.user_attrs[FOLDER]}
        for t in study.get_trials(deepcopy=False)
        if ENDED in t.user_attrs
    ]
    return sorted(rows, key=lambda row: (row["robust"] is None, -(row["robust"] or 0), row["trial"]))


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())
