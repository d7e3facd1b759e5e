"""The folder of a run: what is in it, and how a run that was stopped goes on.

=====================  =====================================================================
config.toml            the complete recipe
metrics.jsonl          one JSON object for each training epoch and each evaluation
dense.safetensors      the models after pretrain, prune and finetune
pruned.safetensors
finetuned.safetensors
state.safetensors      while a stage trains: model, optimizer and place in the stage
results.json           the table
*.png                  the plots
events.out.tfevents.*  TensorBoard
=====================  =====================================================================
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import checkpoint
from .extras import optional
from .recipe import Recipe, load_recipe, to_toml

CONFIG, METRICS, STATE, RESULTS = "config.toml", "metrics.jsonl", "state.safetensors", "results.json"


class RunFolder:
    """An open run folder. Use :meth:`create` or :meth:`resume`, and :meth:`close` it at the end (or use it in a ``with``).

    Attributes:
        path: the folder.
        records: what metrics.jsonl holds.
    """

    def __init__(self, path: Path, records: list[dict[str, Any]]) -> None:
        self.path = path
        self.records = records
        self._writer = optional("torch.utils.tensorboard").SummaryWriter(str(path))

    @classmethod
    def create(cls, path: str | Path, recipe: Recipe) -> RunFolder:
        """Makes the folder with its config.toml; raises ValueError if ``path`` is there and not an empty folder."""
        path = Path(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"out: {path} exists already; choose another folder, or go on with: s2ap run --resume {path}")
        path.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(path / CONFIG, to_toml(recipe))
        return cls(path, [])

    @classmethod
    def resume(cls, path: str | Path) -> RunFolder:
        """Opens the folder of a run that was stopped; errors as :func:`read_recipe`."""
        read_recipe(path)
        return cls(Path(path), read_metrics(path))

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Ends the TensorBoard file."""
        self._writer.close()

    def log(self, record: dict[str, Any]) -> None:
        """Adds ``record`` (with a ``stage``, and an ``epoch`` in a training stage) to metrics.jsonl and to TensorBoard.

        An earlier record of the same stage and epoch is replaced: a resumed epoch is told once.
        """
        place = (record["stage"], record.get("epoch"), record.get("model"))
        self.records = [r for r in self.records if (r["stage"], r.get("epoch"), r.get("model")) != place] + [record]
        checkpoint.write_text(self.path / METRICS, "".join(json.dumps(r) + "\n" for r in self.records))
        for name, value in record.items():
            if isinstance(value, float):
                self._writer.add_scalar(f"{record.get('model', record['stage'])}/{name}", value, record.get("epoch", 0))
        self._writer.flush()

    def find(self, stage: str, **values: Any) -> list[dict[str, Any]]:
        """The records of ``stage`` that hold ``values``."""
        return [r for r in self.records if r["stage"] == stage and all(r.get(k) == v for k, v in values.items())]


def read_recipe(path: str | Path) -> Recipe:
    """The recipe of the run in folder ``path``; raises ValueError if it is not the folder of a run."""
    if not (Path(path) / CONFIG).is_file():
        raise ValueError(f"{path}: not the folder of a run (no {CONFIG} in it)")
    return load_recipe(Path(path) / CONFIG)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, none if it has not got that far; raises ValueError naming a line that is not JSON."""
    file = Path(path) / METRICS
    if not file.is_file():
        return []
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error})") from None
    return records
