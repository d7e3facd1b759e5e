"""The folder of a run under adverse conditions: two processes at once, kills at bad moments, nobody who reads the output."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from s2ap_ext.pipeline import RunFolder, load_recipe
from s2ap_ext.pipeline.records import sealed
from s2ap_ext.pipeline.run_folder import LOCK, read_metrics

TINY = ["model.width=2", "data.train_size=64", "data.test_size=16", "attack.steps=1", "evaluate.steps=1", "evaluate.images_per_epoch=8"]
TINY += [f"{stage}.{key}" for stage in ("pretrain", "prune", "finetune") for key in ("epochs=2", "batch_size=16")]


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
    subprocess.run([sys.executable, "-c", child + "os._exit(9)", str(tmp_path / "run")], check=False, timeout=60)
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


def test_nobody_needs_to_read_the_output(tmp_path):
    process = subprocess.Popen(command("run", "digits", "--out", tmp_path / "run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()  # as `| head -1` does it
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=120) == 0, errors
    assert errors == ""
    assert json.loads((tmp_path / "run/results.json").read_text())["rows"][-1]["model"] == "finetuned"


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_bits(tmp_path):
    """Kills at moments spread from the first instant to the end, several in one run."""
    settings = [*TINY, "save_every=0"]
    subprocess.run(command("run", "digits", "--out", tmp_path / "whole", settings=settings), check=True, capture_output=True, timeout=120)
    for number, wait in enumerate([0.0, 1.5, 2.2, 2.6, 3.0, 3.4, 3.8]):
        folder = tmp_path / f"killed-{number}"
        words = ["run", "digits", "--out", folder]
        for _ in range(20):
            resumes = words[1] == "--resume"
            process = subprocess.Popen(
                command(*words, settings=[] if resumes else settings), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            errors = process.communicate(timeout=60)[1].decode()
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, errors
            words = ["run", "--resume", folder] if (folder / "config.toml").exists() else words
            wait += 0.7
        assert process.returncode == 0, "the run never ended"
        assert settled(folder) == settled(tmp_path / "whole")
