"""The folder of a run under adverse conditions: two processes at once, kills at bad moments, nobody who reads the output."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import TINY as SMALLEST
from command_line import refused, settings

import s2ap_ext
from s2ap_ext.cli import main
from s2ap_ext.pipeline import RunFolder, Session, Stopped, checkpoint, load_recipe, open_data, run
from s2ap_ext.pipeline.records import sealed
from s2ap_ext.pipeline.run_folder import LOCK, read_metrics

TINY = [*SMALLEST, "data.train_size=64", *(f"{stage}.epochs=2" for stage in ("pretrain", "prune", "finetune"))]


def command(*words, settings=TINY):
    return [sys.executable, "-m", "s2ap_ext.cli", *map(str, words), *(w for s in settings for w in ("--set", s))]


def settled(folder):
    """All that a run's result consists of."""
    models = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
    return models, [{**record, "seconds": 0} for record in read_metrics(folder)]


def test_a_second_process_is_refused(tmp_path):
    recipe = load_recipe("digits")
    with RunFolder.create(tmp_path / "run", recipe):
        with pytest.raises(ValueError, match=rf"run: another process works in this folder \(process {os.getpid()}\)"):
            RunFolder.resume(tmp_path / "run")
        with pytest.raises(ValueError, match="exists already"):
            RunFolder.create(tmp_path / "run", recipe)
    assert not (tmp_path / "run" / LOCK).exists()
    RunFolder.resume(tmp_path / "run").close()


def test_a_process_that_died_locks_nobody_out(tmp_path):
    child = (
        "from s2ap_ext.pipeline import RunFolder, load_recipe; import os, sys; f = RunFolder.create(sys.argv[1], load_recipe('digits')); "
    )
    subprocess.run([sys.executable, "-c", child + "os._exit(9)", "run"], check=False, timeout=60, cwd=tmp_path)
    assert (tmp_path / "run" / LOCK).exists()
    RunFolder.resume(tmp_path / "run").close()


def test_what_a_killed_process_left_is_removed_or_made_use_of(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".config.toml.123.tmp").write_text("half")  # killed before the first file was in place
    (folder / LOCK).write_text("123\n")
    with pytest.raises(ValueError, match="nothing was done in it yet: start the run again with --out"):
        RunFolder.resume(folder)
    RunFolder.create(folder, load_recipe("digits")).close()
    (folder / ".state.safetensors.124.tmp").write_text("half")
    RunFolder.resume(folder).close()
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("line", ["[]", "3", "null", '{"epoch": 1}', "[" * 5000, "\x00"])
def test_records_that_are_none_are_named(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(sealed({"stage": "prune"}, tmp_path)) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: (not JSON|expected an object with a checksum)"):
        read_metrics(tmp_path)


@pytest.mark.slow
def test_nobody_needs_to_read_the_output(tmp_path):
    words = command("run", "digits", "--out", "run")
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # not where the sources may lie
    process.stdout.readline()
    process.stdout.close()  # as `| head -1` does it
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=120) == 0, errors
    assert errors == ""
    assert json.loads((tmp_path / "run/results.json").read_text())["rows"][-1]["model"] == "finetuned"


def test_a_state_is_saved_within_an_epoch(tmp_path):
    """So a process that is killed loses no more than the time after which a state is saved."""
    recipe = load_recipe("digits", [*TINY, "save_every=0.0001"])
    found = []

    def stop():  # asked before the state after this batch is saved
        if (tmp_path / "run/state.safetensors").exists():
            found.append(checkpoint.load(tmp_path / "run/state.safetensors")[1]["progress"]["batch"])
        return len(found) == 3

    with RunFolder.create(tmp_path / "run", recipe) as folder, pytest.raises(Stopped):
        run(Session(recipe, open_data(recipe), folder, stop=stop))
    assert found == [1, 2, 3]
    assert load_recipe("digits").save_every == 30


def test_a_disk_without_room_is_told_before_the_run_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    said = refused(capsys, "run", "digits", *settings(), "--out", tmp_path / "a/run")
    assert re.search(r"a/run: the files of the run take up to [\d.]+ MB, its disk has 0.0 MB left", said)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_names_the_file_and_leaves_the_old_one(tmp_path):
    """A limit on the size of files stands for the end of the disk."""
    child = (
        "import resource, signal, sys, torch; from s2ap_ext import _files; "
        "_files.save(sys.argv[1], {'a': torch.ones(4)}, {'good': 1}); "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "_files.save(sys.argv[1], {'a': torch.ones(100_000)}, {})"
    )
    path = tmp_path / "x.safetensors"
    process = subprocess.run([sys.executable, "-c", child, str(path)], capture_output=True, text=True, timeout=100, check=False)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == f"OSError: [Errno 27] File too large: '{path}'"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]
    assert checkpoint.load(path)[1] == {"good": 1}


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, capsys):
    recipe = load_recipe("digits", [*TINY, "save_every=0"])
    for name in ("stopped", "whole"):
        asked = iter([False] * 6 + [name == "stopped"] + [False] * 99)
        with RunFolder.create(tmp_path / name, recipe) as folder, contextlib.suppress(Stopped):
            run(Session(recipe, open_data(recipe), folder, stop=lambda asked=asked: next(asked)))
    state = tmp_path / "stopped/state.safetensors"
    content = bytearray(state.read_bytes())
    content[-5] ^= 4
    state.write_bytes(content)
    assert main(["run", "--resume", str(tmp_path / "stopped")]) == 0
    assert "state.safetensors: damaged: it has changed since it was written" in capsys.readouterr().out
    assert settled(tmp_path / "stopped") == settled(tmp_path / "whole")


def test_records_that_were_cut_off_between_two_lines_are_missed(tmp_path, capsys):
    recipe = load_recipe("digits", TINY)
    asked = iter([False] * 6 + [True])  # in the second epoch of the first stage
    with RunFolder.create(tmp_path / "run", recipe) as folder, contextlib.suppress(Stopped):
        run(Session(recipe, open_data(recipe), folder, stop=lambda: next(asked)))
    (tmp_path / "run/metrics.jsonl").write_text("")
    assert main(["run", "--resume", str(tmp_path / "run")]) == 2
    assert "expected metrics.jsonl to have all finished epochs of pretrain, found none of epoch 1" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_that_are_killed_at_any_moment_go_on_to_the_same_bits():
    result = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "kill_runs.py", "--times", "3"],
        env={**os.environ, "PYTHONPATH": str(Path(s2ap_ext.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("3 kills in ")
