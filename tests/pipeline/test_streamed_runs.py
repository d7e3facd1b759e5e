"""Runs on streamed images: stopped or killed and resumed to the same bits, and bound to the checksums of the files."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from image_files import encoded, pictures, write

from s2ap_ext.cli import main
from s2ap_ext.pipeline import RunFolder, Session, Stopped, load_recipe, open_data, run
from s2ap_ext.pipeline.model_file import identity

pytest.importorskip("pyarrow")

SMALL = [
    "model.width=2",
    "attack.steps=1",
    "evaluate.steps=1",
    "evaluate.images_per_epoch=8",
    "evaluate.latency_at_scale=false",
    "prune.control=false",
    "data.flip=true",
    "save_every=0",
]
SMALL += [f"{stage}.{key}" for stage in ("pretrain", "prune", "finetune") for key in ("epochs=1", "batch_size=16")]
SMALL += ["pretrain.epochs=2"]
MODELS = ("dense", "pruned", "finetuned")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, n in (("train", 40), ("test", 12)):
        write(root / f"{split}.parquet", [encoded(pictures(1, i, (12 + i % 3, 14, 3))[0]) for i in range(n)], [i % 4 for i in range(n)])
    return root


def recipe(images, *overrides):
    return load_recipe("digits", [*SMALL, "data.name=my/set", f"data.dir={images}", "data.size=8", "data.workers=1", *overrides])


def start(folder, images, *overrides, stop=lambda: False):
    made = recipe(images, *overrides)
    with RunFolder.create(folder, made) as opened:
        return run(Session(made, open_data(made), opened, stop=stop))


def go_on(folder, stop=lambda: False):
    made = load_recipe(folder / "config.toml")
    with RunFolder.resume(folder) as opened:
        return run(Session(made, open_data(made), opened, stop=stop))


def same_models(a, b):
    return all((a / f"{name}.safetensors").read_bytes() == (b / f"{name}.safetensors").read_bytes() for name in MODELS)


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed") / "run"
    start(folder, images)
    return folder


def test_a_run_that_is_stopped_again_and_again_arrives_at_the_same_bits(finished, images, tmp_path):
    """Every other batch, so in the middle of epochs and at their ends."""
    folder = tmp_path / "stopped"

    def twice():
        count = itertools.count(1)
        return lambda: next(count) == 2

    with pytest.raises(Stopped):
        start(folder, images, stop=twice())
    for _ in range(100):
        try:
            go_on(folder, stop=twice())
            break
        except Stopped:
            continue
    assert same_models(finished, folder)


@pytest.mark.slow
def test_a_run_that_is_killed_arrives_at_the_same_bits(finished, images, tmp_path):
    """The process is killed in the middle of an epoch, which leaves its lock and its decoding processes no time."""
    words = [word for setting in SMALL for word in ("--set", setting)]
    words += ["--set", "data.name=my/set", "--set", "data.size=8", "--set", "data.workers=1", "--data-dir", str(images)]
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "s2ap_ext.cli", "run", "digits", *words, "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 100
    while not (folder / "state.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output.decode()
    assert not (folder / "results.json").exists()
    time.sleep(0.1)
    go_on(folder)
    assert same_models(finished, folder)


def test_neither_the_folder_nor_the_processes_make_another_run(images, tmp_path):
    shutil.copytree(images, tmp_path / "elsewhere")
    ours, theirs = recipe(images), recipe(tmp_path / "elsewhere", "data.workers=3")
    assert identity(ours, open_data(ours)) == identity(theirs, open_data(theirs))
    other = recipe(images, "data.scale=0.5")
    assert identity(other, open_data(other)) != identity(ours, open_data(ours))


def test_other_images_make_another_run(images, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(images, other)
    content = bytearray((other / "train.parquet").read_bytes())
    content[100] ^= 1
    (other / "train.parquet").write_bytes(content)
    ours, theirs = recipe(images), recipe(other)
    assert identity(ours, open_data(ours)) != identity(theirs, open_data(theirs))


def test_the_run_keeps_the_checksums_of_the_files(finished, images):
    kept = json.loads((finished / "data.json").read_text())["files"]
    assert list(kept) == ["train.parquet", "test.parquet"]
    size, crc = kept["train.parquet"].split()
    assert int(size) == (images / "train.parquet").stat().st_size
    assert len(crc) == 8


@pytest.mark.parametrize("streamed", [True, False])
def test_a_file_that_has_changed_is_named(images, tmp_path, capsys, streamed):
    mine = tmp_path / "mine"
    shutil.copytree(images, mine)
    how = [] if streamed else ["data.scale=1"]
    with pytest.raises(Stopped):
        start(tmp_path / "run", mine, *how, stop=lambda: True)
    write(mine / "test.parquet", [encoded(pictures(1, i + 7, (12, 14, 3))[0]) for i in range(12)], [i % 4 for i in range(12)])
    assert main(["run", "--resume", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "mine/test.parquet: not as it was when the run began (size and CRC-32 were" in said
    assert "run/data.json" in said


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {}, "checksum": "00000000"}'])
def test_a_damaged_record_of_the_files_is_named(finished, tmp_path, capsys, content):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/data.json").write_text(content)
    assert main(["run", "--resume", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "run/data.json: " in said


def test_a_model_is_evaluated_at_the_size_that_is_named(finished, images, capsys):
    checkpoint = str(finished / "finetuned.safetensors")
    assert main(["evaluate", checkpoint, "--data-dir", str(images)]) == 2
    assert "its images were brought to another size than by default; add --set data.size=8\n" in capsys.readouterr().err
    assert main(["evaluate", checkpoint, "--data-dir", str(images), "--set", "data.size=8"]) == 0
