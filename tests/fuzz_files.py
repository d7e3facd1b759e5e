"""Looks for files that end in anything but a result or a clear error.

    python tests/fuzz_files.py --seconds 3600 [--count N] [--seed N] [--case N]

Recipes, checkpoints, parquet files and the files of runs are changed at random and read in a process of their own. A case fails if that
process crashes or hangs, if reading ends in anything but ``ValueError`` or ``OSError``, if the error does not name the file, or if a
file of a run was damaged and going on with it gave other bits than the run had given. Every case follows from the seed and its number.
"""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import fuzzing
import numpy as np
import torch
from command_line import TINY, settings
from fuzz_native import changed_json, changed_tensor, is_plain

from s2ap_ext import cli
from s2ap_ext.data import Batches, load_data, load_parquet
from s2ap_ext.pipeline import RunFolder, Session, Stopped, checkpoint, load_model, load_recipe, open_data, run
from s2ap_ext.pipeline.recipe import to_table, to_toml
from s2ap_ext.pipeline.run_folder import read_results

REFUSALS = (ValueError, OSError)
WORDS = [
    b"1e999",
    b"nan",
    b"-1",
    b"[",
    b"]",
    b"{",
    b"=",
    b'"',
    b"'",
    b"\\u0000",
    b"\xff",
    b"9" * 5000,
    b"../x",
    b"1979-05-27",
    b"[[a]]",
    b"a.b",
]
MODELS = ("dense", "pruned", "finetuned")
FILES = ("config.toml", "metrics.jsonl", "results.json", *(f"{name}.safetensors" for name in MODELS))


def changed_bytes(content: bytes, generator: random.Random) -> bytes:
    """``content`` with a bit flipped, some bytes replaced, cut off, zeroed, put in or taken out: never the same."""
    changed = bytearray(content)
    while bytes(changed) == content:
        place = generator.randrange(len(changed)) if changed else 0
        kind = generator.randrange(10) if changed else 9
        if kind < 5:
            changed[place] ^= 1 << generator.randrange(8)
        elif kind == 5:
            del changed[place:]
        elif kind == 6:
            changed[place : place + generator.choice([1, 16, 512])] = bytes(min(len(changed) - place, 16))
        elif kind == 7:
            del changed[place : place + generator.randint(1, 40)]
        elif kind == 8:
            changed[place:place] = changed[place : place + generator.randint(1, 40)]
        else:
            changed[place:place] = generator.choice(WORDS)
    return bytes(changed)


class Fuzzer:
    """Reads changed files in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with contextlib.redirect_stdout(io.StringIO()):
            for name, seed in (("run", 0), ("other", 1)):
                assert cli.main(["run", "digits", *settings(f"seed={seed}", "prune.averaging=0.9"), "--out", str(folder / name)]) == 0
                self._stop(name, seed)
        self.models = [checkpoint.load(folder / "run" / f"{name}.safetensors") for name in MODELS]
        self.table = to_table(load_recipe("digits", TINY))
        self._write_images(folder / "images")

    def _stop(self, name: str, seed: int) -> None:
        """A run that was stopped in its mask search, with two states."""
        recipe = load_recipe("digits", [*TINY, f"seed={seed}", "prune.averaging=0.9", "save_every=0"])
        asked = iter([False] * 4 + [True])
        with RunFolder.create(self.folder / f"{name}-stopped", recipe) as opened, contextlib.suppress(Stopped):
            run(Session(recipe, open_data(recipe), opened, stop=lambda: next(asked)))

    def _write_images(self, folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq
        from PIL import Image

        def encoded(seed: int) -> dict:
            file = io.BytesIO()
            Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)).save(file, ("PNG", "JPEG", "BMP")[seed % 3])
            return {"bytes": file.getvalue(), "path": None}

        folder.mkdir()
        for split in ("train", "test"):
            pq.write_table(pa.table({"img": [encoded(i) for i in range(9)], "label": list(range(9))}), folder / f"{split}.parquet")

    def case(self, seed: int, number: int) -> str:
        generator = random.Random(f"{seed}:{number}")
        torch.manual_seed(number)
        target = generator.choice([self.recipe, self.recipe_of_json, self.model, self.images, self.run, self.run])
        return f"{target.__name__}: {target(generator)}"

    def _read(self, function, path: Path) -> str:
        try:
            function()
        except REFUSALS as error:
            if path.name not in str(error):
                raise AssertionError(f"an error that does not name {path.name}: {error}") from error
            return "refused"
        return "read"

    def recipe(self, generator: random.Random) -> str:
        path = self.folder / "fuzzed.toml"
        path.write_bytes(changed_bytes(to_toml(load_recipe("digits", TINY)).encode(), generator))
        return self._read(lambda: to_toml(load_recipe(path)), path)

    def recipe_of_json(self, generator: random.Random) -> str:
        """A checkpoint whose recipe, or another part of its header, is another, with a checksum that fits."""
        tensors, about = generator.choice(self.models)
        for _ in range(generator.randint(1, 3)):
            about = changed_json(about, generator)
        path = self.folder / "fuzzed.safetensors"
        checkpoint.save(path, tensors, about)
        return self._read(lambda: load_model(path), path)

    def model(self, generator: random.Random) -> str:
        """A checkpoint of other tensors, with a checksum that fits; what is read must run."""
        tensors, about = generator.choice(self.models)
        tensors = dict(tensors)
        for _ in range(generator.randint(1, 3)):
            name = generator.choice(sorted(tensors))
            new = changed_tensor(tensors[name], tensors, generator) if generator.random() < 0.9 else None
            if is_plain(new):
                tensors[name] = new
            elif new is None and len(tensors) > 1:
                del tensors[name]
        path = self.folder / "fuzzed.safetensors"
        checkpoint.save(path, tensors, about)
        found = []
        how = self._read(lambda: found.append(load_model(path)[0]), path)
        for model in found:
            with contextlib.suppress(ValueError):  # NaN scores, a number of kept weights that the layer does not have
                model(torch.rand(2, 1, 8, 8)).sum().backward()
        return how

    def images(self, generator: random.Random) -> str:
        folder = self.folder / "images-changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / "images", folder)
        path = folder / f"{generator.choice(['train', 'test'])}.parquet"
        path.write_bytes(changed_bytes(path.read_bytes(), generator))
        return self._read(generator.choice([lambda: load_parquet(folder), lambda: self._stream(folder)]), folder)

    def _stream(self, folder: Path) -> None:
        """An epoch of both splits, decoded in this process."""
        data = load_data("my/images", data_dir=folder, size=4, stream="always", workers=1)
        for split in (data.train, data.test):
            list(Batches(replace(split, workers=0), 4).epoch(0))

    def run(self, generator: random.Random) -> str:
        """A file of a run that was damaged, or that another run or another file has taken the place of."""
        stopped = generator.random() < 0.4
        names = ["config.toml", "metrics.jsonl", "dense.safetensors", "state.safetensors"] if stopped else FILES
        source = "run-stopped" if stopped else "run"
        folder = self.folder / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / source, folder)
        name = generator.choice(names)
        path = folder / name
        before = generator.random() < 0.3 and stopped  # whether the state before this one is there
        if not before:
            (folder / "state-before.safetensors").unlink(missing_ok=True)
        kind = generator.choice(["damaged", "damaged", "of another run", "of another name"])
        if kind == "damaged":
            path.write_bytes(changed_bytes(path.read_bytes(), generator))
        elif kind == "of another run":
            shutil.copy(self.folder / source.replace("run", "other", 1) / name, path)
        else:
            shutil.copy(folder / generator.choice([other for other in names if other != name]), path)
        # A recipe alone is no contradiction: what tells that it is another's are the files beside it.
        how = self._go_on(folder, name)
        return f"{kind}, {'the state before it used' if before and name == 'state.safetensors' and how != 'refused' else how}"

    def _go_on(self, folder: Path, name: str) -> str:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(["report", str(folder)] if name == "results.json" else ["run", "--resume", str(folder)])
        line = said.getvalue()
        if code == 2:
            # A recipe that was changed into another one is found out by the first file that was written under the old one.
            suspects = FILES if name == "config.toml" else [name]
            if line.count("\n") != 1 or not line.startswith("s2ap: error: ") or not any(suspect in line for suspect in suspects):
                raise AssertionError(f"expected one line that names {name}, got {line}")
            return "refused"
        if name == "results.json":
            same = read_results(folder) == read_results(self.folder / "run")
        else:
            same = all(
                (folder / f"{model}.safetensors").read_bytes() == (self.folder / "run" / f"{model}.safetensors").read_bytes()
                or (folder / f"{model}.safetensors").read_bytes() == self._whole(model)
                for model in MODELS
            )
        if code != 0 or not same:
            raise AssertionError(f"{name} was taken as it is, and the result is another (exit code {code}): {line}")
        return "without effect"

    def _whole(self, model: str) -> bytes:
        """The model that the stopped run leads to."""
        folder = self.folder / "run-whole"
        if not folder.exists():
            shutil.copytree(self.folder / "run-stopped", folder)
            with contextlib.redirect_stdout(io.StringIO()):
                assert cli.main(["run", "--resume", str(folder)]) == 0
        return (folder / f"{model}.safetensors").read_bytes()


if __name__ == "__main__":
    sys.exit(fuzzing.main(__file__, __doc__, lambda folder: Fuzzer(folder).case))
