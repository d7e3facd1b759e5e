"""The folder of a run: what is in it, and how a run that was stopped goes on.

=====================  =====================================================================
config.toml            the complete recipe
data.json              size and checksum of each file that the images came from
metrics.jsonl          one JSON object for each training epoch and each evaluation
dense.safetensors      the models after pretrain, prune and finetune
pruned.safetensors
finetuned.safetensors
state.safetensors      while a stage trains: model, optimizer and place in the stage;
state-before.safetensors  and the last one before it, for the case that it gets damaged
plain                  where the recipe asks for it: the run of the same search without S2AP
evaluations            finished batches of attacks on the models
results.json           the table
analysis.json          what s2ap analyze found, where it was asked
*.png                  the plots
events.out.tfevents.*  TensorBoard
.lock                  while a process works here: its number
=====================  =====================================================================
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from ..data import Files
from . import checkpoint
from .extras import optional
from .plan import STAGES
from .recipe import load_recipe, to_toml
from .records import CONFIG, sealed, unsealed
from .sections import Recipe

METRICS, RESULTS, ANALYSIS, FILES, LOCK = "metrics.jsonl", "results.json", "analysis.json", "data.json", ".lock"
PLAIN = "plain"
CHECKSUM = "\n# checksum: "  # of config.toml, in its last line
STATE, STATE_BEFORE = "state.safetensors", "state-before.safetensors"


class Locked(ValueError):
    """Another process works in the folder."""


class RunFolder:
    """An open run folder. Use :meth:`create` or :meth:`resume`, and :meth:`close` it at the end (or use it in a ``with``).

    Attributes:
        path: the folder.
        records: what metrics.jsonl holds.
    """

    def __init__(self, path: Path, lock: IO[str], records: list[dict[str, Any]]) -> None:
        self.path = path
        self.records = records
        self._lock = lock
        for left_over in path.glob(f".*{checkpoint.TEMPORARY}"):  # of a process that was killed while it wrote
            left_over.unlink()
        self._writer = optional("torch.utils.tensorboard").SummaryWriter(str(path))

    @classmethod
    def create(cls, path: str | Path, recipe: Recipe) -> RunFolder:
        """Makes the folder with its config.toml.

        Raises:
            ValueError: ``path`` is there and is not an empty folder.
            Locked: another process works in it.
        """
        path = Path(path)
        # What a process left that was killed before its config.toml was in place is nothing to lose.
        if path.exists() and (not path.is_dir() or any(not _is_left_over(entry) for entry in path.iterdir())):
            raise ValueError(f"out: {path} exists already; choose another folder, or go on with: s2ap run --resume {path}")
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        checkpoint.write_text(path / CONFIG, _config_of(recipe))
        return cls(path, lock, [])

    @classmethod
    def resume(cls, path: str | Path) -> RunFolder:
        """Opens the folder of a run that was stopped.

        Raises:
            ValueError: as :func:`read_recipe` and :func:`read_metrics`.
            Locked: another process works in it.
        """
        read_recipe(path)
        path = Path(path)
        lock = _lock(path)
        try:
            return cls(path, lock, read_metrics(path))
        except BaseException:
            (path / LOCK).unlink(missing_ok=True)
            lock.close()
            raise

    @classmethod
    def open(cls, path: Path, recipe: Recipe) -> RunFolder:
        """:meth:`resume` for a folder in which a run has begun, which must be that of ``recipe``; else :meth:`create`."""
        return cls.resume(path) if (path / CONFIG).is_file() else cls.create(path, recipe)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the TensorBoard file and lets other processes work here."""
        self._writer.close()
        (self.path / LOCK).unlink(missing_ok=True)
        self._lock.close()

    def log(self, record: dict[str, Any]) -> None:
        """Adds ``record`` (with a ``stage``, and an ``epoch`` in a training stage) to metrics.jsonl and to TensorBoard.

        An earlier record of the same stage and epoch is replaced: a resumed epoch is told once.
        """
        place = (record["stage"], record.get("epoch"), record.get("model"))
        self.records = [r for r in self.records if (r["stage"], r.get("epoch"), r.get("model")) != place] + [record]
        checkpoint.write_text(self.path / METRICS, "".join(json.dumps(sealed(r, self.path)) + "\n" for r in self.records))
        for name, value in record.items():
            if isinstance(value, float):
                self._writer.add_scalar(f"{record.get('model', record['stage'])}/{name}", value, record.get("epoch", 0))
        self._writer.flush()

    def check_files(self, files: Files) -> None:
        """Writes data.json; where the run has one already, compares it with ``files``.

        Raises:
            ValueError: a file of the images is not as it was when the run began, or data.json is not as the run wrote it.
        """
        if not files.groups:
            return
        path = self.path / FILES
        if not path.is_file():
            checkpoint.write_text(path, json.dumps(sealed({"files": files.checksums}, self.path), indent=2) + "\n")
            return
        began = unsealed(path.read_text(encoding="utf-8", errors="replace"), self.path, str(path)).get("files")
        if began != files.checksums:
            began = began if isinstance(began, dict) else {}
            names = sorted(set(began) | set(files.checksums))
            name = next(name for name in names if began.get(name) != files.checksums.get(name))
            was, now = (f"{sums[name]}" if name in sums else "missing" for sums in (began, files.checksums))
            raise ValueError(f"{files.folder / name}: not as it was when the run began (size and CRC-32 were {was}, now {now}; see {path})")

    def save_results(self, results: dict[str, Any]) -> None:
        """Writes results.json."""
        checkpoint.write_text(self.path / RESULTS, json.dumps(sealed(results, self.path), indent=2) + "\n")

    def save_state(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Writes state.safetensors; the one before it is kept beside it."""
        state, before = self.path / STATE, self.path / STATE_BEFORE
        if state.exists():
            with checkpoint.replacing(before) as temporary:
                os.link(state, temporary)
        checkpoint.save(state, tensors, about)

    def load_state(self, run: str, say: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
        """The last good state, ``(tensors, about, path)``; nothing in ``about`` where there is none.

        Args:
            run: the identity of the run.
            say: takes a line that says so where the last state is damaged and the one before it is used.

        Raises:
            ValueError: a state of another run, or none that is good.
        """
        state, before = self.path / STATE, self.path / STATE_BEFORE
        if not state.exists():
            return {}, {}, state
        path = state
        try:
            tensors, about = checkpoint.load(state)
        except ValueError as error:
            if not before.exists():
                raise
            say(f"{error}; going on from {before.name}, which is a little older")
            path = before
            tensors, about = checkpoint.load(before)
        if not {"stage", "progress", "run"} <= about.keys():
            raise ValueError(f"checkpoint {path}: expected the state of a stage, found something else")
        if about["stage"] not in list(STAGES):
            raise ValueError(f"checkpoint {path}: stage: expected one of {', '.join(STAGES)}, got {str(about['stage'])[:80]}")
        check_run(path, about, run)
        return tensors, about, path

    def remove_state(self) -> None:
        """The stage is over."""
        for name in (STATE, STATE_BEFORE):
            (self.path / name).unlink(missing_ok=True)

    def find(self, stage: str, **values: Any) -> list[dict[str, Any]]:
        """The records of ``stage`` that hold ``values``."""
        return [r for r in self.records if r["stage"] == stage and all(r.get(k) == v for k, v in values.items())]


def check_space(path: str | Path, needed: int) -> None:
    """Raises ValueError if the disk of the folder ``path``, which need not exist yet, has fewer than ``needed`` bytes left."""
    there = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise ValueError(f"{path}: the files of the run take up to {needed / 1e6:,.1f} MB, its disk has {free / 1e6:,.1f} MB left")


def check_run(path: Path, about: dict[str, Any], run: str) -> None:
    """Raises ValueError unless the file ``path`` was written by the run of this identity."""
    if about.get("run") != run:
        raise ValueError(
            f"checkpoint {path}: belongs to another run (another recipe, seed or data); was {CONFIG} edited, or the file put here by hand?"
        )


def read_recipe(path: str | Path) -> Recipe:
    """The recipe of the run in folder ``path``; raises ValueError if it is not the folder of a run."""
    if not (Path(path) / CONFIG).is_file():
        again = "; nothing was done in it yet: start the run again with --out" if _holds_nothing(Path(path)) else ""
        raise ValueError(f"{path}: not the folder of a run (no {CONFIG} in it){again}")
    config = Path(path) / CONFIG
    try:
        text = config.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{config}: not a TOML file ({error})") from None
    # Damage may leave a valid recipe, with which hours would be spent: so the checksum comes before all else.
    toml, _, checksum = text.rpartition(CHECKSUM)
    if checksum != f"{zlib.crc32(toml.encode()):08x}\n":
        raise ValueError(f"{config}: not as the run wrote it; start a run of your own from it: s2ap run {config}")
    return load_recipe(config)


def _config_of(recipe: Recipe) -> str:
    """The text of config.toml: the complete recipe, and in a comment its checksum."""
    toml = to_toml(recipe)
    return f"{toml}{CHECKSUM}{zlib.crc32(toml.encode()):08x}\n"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, none if it has not got that far; raises ValueError naming a line that is no record."""
    file = Path(path) / METRICS
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    records = [unsealed(line, Path(path), f"{file}, line {number}") for number, line in enumerate(lines, 1)]
    for number, record in enumerate(records, 1):
        if not isinstance(record.get("stage"), str):
            raise ValueError(f"{file}, line {number}: expected an object with a stage, got {lines[number - 1][:80]}")
    return records


def read_results(path: str | Path) -> dict[str, Any]:
    """The results.json of a finished run.

    Raises:
        ValueError: no such folder, a run that has not finished, or a file that is not as the run wrote it.
    """
    file = Path(path) / RESULTS
    if not file.is_file():
        if (Path(path) / METRICS).is_file():
            raise ValueError(f"{path}: the run has not finished; go on with: s2ap run --resume {path}")
        raise ValueError(f"{path}: not the folder of a run (no {RESULTS} in it)")
    return unsealed(file.read_text(encoding="utf-8", errors="replace"), Path(path), str(file))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within it no other process can work in the folder ``path``; raises :class:`Locked` if one does."""
    lock = _lock(path)
    try:
        yield
    finally:
        (path / LOCK).unlink(missing_ok=True)
        lock.close()


def read_analysis(path: str | Path) -> dict[str, Any] | None:
    """The analysis.json of a run, None where there is none; raises ValueError for a file that is not as it was written."""
    file = Path(path) / ANALYSIS
    return unsealed(file.read_text(encoding="utf-8", errors="replace"), Path(path), str(file)) if file.is_file() else None


def _lock(path: Path) -> IO[str]:
    """Locks the folder ``path`` for this process, until the file that is returned is closed or the process ends, however it ends."""
    while True:
        file = open(path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (it stays open)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip()
            file.close()
            raise Locked(f"{path}: another process works in this folder{f' (process {owner})' if owner else ''}") from None
        if _is_still(file, path / LOCK):
            break
        file.close()  # its owner has just removed it
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _is_still(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _is_left_over(entry: Path) -> bool:
    return entry.name == LOCK or (entry.name.startswith(".") and entry.name.endswith(checkpoint.TEMPORARY))


def _holds_nothing(path: Path) -> bool:
    return path.is_dir() and all(_is_left_over(entry) for entry in path.iterdir())
