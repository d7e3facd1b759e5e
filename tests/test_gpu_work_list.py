"""The work list for a GPU (benchmarks/gpu): its rules on parts of a second, and the list itself at tiny size on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import __main__ as command_line
from gpu.parts import Command, Part, Setting, parts
from gpu.runner import WorkList, call
from gpu.table import table


def part(name, code="", *, minutes=0.01, after=()):
    return Part(name, minutes, "a test", lambda: [Command([sys.executable, "-c", code])], after)


@pytest.fixture
def work(tmp_path):
    return WorkList(tmp_path, "abc", "cpu")


def result(work, name):
    return json.loads((work.folder / f"{name}.json").read_text())


def test_every_part_leaves_a_result_and_failures_stop_nothing(work):
    failing = part("first", "print('why'); raise SystemExit(3)")
    missing = Part("second", 0.01, "a test", lambda: [Command(["no-such-program"]), Command([sys.executable])])
    assert not work.run([failing, missing, part("deep/third", "print(42)")], minutes=1)
    assert [work.state(p) for p in (failing, missing, part("deep/third"))] == ["failed", "failed", "done"]
    first, second, third = (result(work, name) for name in ("first", "second", "deep/third"))
    assert (first["commands"][0]["exit"], first["commands"][0]["output"]) == (3, "why\n")
    assert "no-such-program" in second["commands"][0]["output"]
    assert len(second["commands"]) == 1
    assert third["commands"][0]["output"] == "42\n"
    assert third["machine"]["commit"] == "abc"
    assert {"cpu", "gpu", "torch", "backend"} < third["machine"].keys()
    assert third["clocks_before"]
    assert sorted(path.suffix for path in work.folder.rglob("*") if path.is_file()) == [".json"] * 3


def test_what_is_done_is_not_done_again_and_what_failed_is(work, tmp_path):
    counting = "open('{0}/count', 'a').write('x'); raise SystemExit({1})"
    fails, works = part("p", counting.format(tmp_path, 1)), part("p", counting.format(tmp_path, 0))
    assert [work.run([p], 1) for p in (fails, works, works)] == [False, True, True]
    assert (tmp_path / "count").read_text() == "xx"
    (tmp_path / "p.json").write_text("{")  # damaged
    assert work.state(works) == "open"


def test_a_part_starts_only_where_its_estimate_fits_and_what_it_needs_is_there(work, capsys):
    assert work.run([part("long", minutes=5), part("later", after=("dense",)), part("short")], minutes=1)
    assert [work.state(part(name)) for name in ("long", "later", "short")] == ["open", "open", "done"]
    out = capsys.readouterr().out
    assert "long: needs about 5 min, 1.0 are left" in out
    assert "later: waits for dense" in out


def test_a_part_that_is_too_slow_is_stopped_and_its_output_kept(work):
    code, output, _ = call([sys.executable, "-c", "import time; print('began', flush=True); time.sleep(60)"], {}, 1)
    assert (code, output) == (None, "began\n")
    assert not work.run([part("slow", "import time; time.sleep(60)", minutes=0)], minutes=0.01)
    assert work.state(part("slow")) == "stopped"


def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit, match="no CUDA device"):
        WorkList(tmp_path, "abc", "cuda").run([part("any")], 1)
    for words, message in ((["--device", "cpu"], "expected --tiny"), (["--only", "nothing"], "expected one of tests, memcheck")):
        with pytest.raises(SystemExit):
            command_line.main([*words, "--out", str(tmp_path)])
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_arms_of_the_comparison_start_from_one_dense_network_and_go_on(tmp_path):
    at = Setting(tmp_path, "cuda", tiny=False, data_dir=Path("/data"))
    arms = [p for p in parts(at) if p.name.startswith("central/") and p.name != "central/dense"]
    assert len(arms) == 12
    assert {p.after for p in arms} == {("central/dense/dense.safetensors",)}
    search, finetune, _ = (command.words for command in arms[3].commands())
    assert search[3:5] == ["prune", "cifar10-5min"]
    assert {"prune.method=harp", "prune.s2ap=true", "prune.sparsity=0.90", "/data"} < set(search)
    assert search[search.index("--from") + 1] == str(tmp_path / "central/dense/dense.safetensors")
    assert finetune[finetune.index("--from") + 1] == str(tmp_path / "central/harp-s2ap-90-search/pruned.safetensors")
    (tmp_path / "central/harp-s2ap-90-search").mkdir(parents=True)
    (tmp_path / "central/harp-s2ap-90-search/config.toml").touch()
    assert arms[3].commands()[0].words[3:] == ["prune", "--resume", str(tmp_path / "central/harp-s2ap-90-search")]


def test_finished_networks_of_the_comparison_are_attacked_and_analysed(tmp_path):
    found = {p.name: p for p in parts(Setting(tmp_path, "cuda", tiny=False, data_dir=Path("/data")))}
    attack, examine = found["autoattack/harp-s2ap-95"], found["sharpness/dense"]
    assert (attack.after, examine.after) == (("central/harp-s2ap-95/results.json",), ("central/dense/results.json",))
    words = attack.commands()[0].words
    assert words[3:5] == ["evaluate", str(tmp_path / "central/harp-s2ap-95/finetuned.safetensors")]
    assert {"autoattack", "/data", str(tmp_path / "central/harp-s2ap-95/autoattack.json")} < set(words)
    assert examine.commands()[0].words[3:] == ["analyze", str(tmp_path / "central/dense")]


def test_the_comparison_has_a_line_for_each_arm_that_is_there(tmp_path):
    def run(name, robust, seconds, **record):
        folder = tmp_path / "central" / name
        folder.mkdir(parents=True)
        row = {"clean": 0.8, "robust": robust, "sparsity": 0.9, "images": 1000, "seconds": seconds}
        (folder / "results.json").write_text(json.dumps({"rows": [row], "attack": "PGD-20"}))
        (folder / "metrics.jsonl").write_text((json.dumps({"stage": "prune", **record}) + "\n") * 2)

    run("dense", 0.5, 60)
    for arm, robust in (("harp-plain-90", 0.4), ("hydra-s2ap-90", 0.45)):
        run(f"{arm}-search", robust - 0.1, 60, mask_distance=0.125)
        run(arm, robust, 120)
    run("hydra-s2ap-99-search", 0.1, 60, mask_distance=0.1)  # not finetuned yet
    (tmp_path / "central/harp-plain-90/autoattack.json").write_text(json.dumps({"attacks": {"autoattack": {"accuracy": 0.35}}}))
    spectra = [{"space": "scores", "eigenvalues": [1.5]}, {"space": "weights", "eigenvalues": [12.34567, 3.0]}]
    (tmp_path / "central/hydra-s2ap-90/analysis.json").write_text(json.dumps({"models": [{}, {"spectra": spectra}]}))
    lines = table(tmp_path).splitlines()
    assert lines[2:5] == [
        "| dense | 0 | 80.0% | 50.0% |  |  |  |  |  | 1.0 |",
        "| harp-plain-90 | 90.0% | 80.0% | 40.0% | 35.0% | 80.0% | 30.0% | 0.250 |  | 3.0 |",
        "| hydra-s2ap-90 | 90.0% | 80.0% | 45.0% |  | 80.0% | 35.0% | 0.250 | 12.35 | 3.0 |",
    ]
    assert lines[6].startswith("1000 test images, PGD-20.")


@pytest.mark.slow
def test_the_command_runs_from_a_checkout_at_tiny_size(tmp_path):
    words = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device", "cpu", "--out", str(tmp_path), "--commit", "abc"]
    done = subprocess.run([*words, "--only", "memcheck"], cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    output = json.loads((tmp_path / "abc/memcheck.json").read_text())["commands"][0]["output"]
    assert "torch.bfloat16: select, perturb, update and update_select ran on cpu" in output
