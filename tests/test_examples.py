"""The examples run, cut down, and end with what they promise."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import settings

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
pytest.importorskip("safetensors")


@pytest.fixture
def run(monkeypatch, capsys):
    """``run("name.py", "--option", ...)`` gives the lines that the example prints."""

    def lines(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return lines


def test_a_plain_loop(run):
    lines = run("plain_loop.py", "--epochs", "1", "--images", "64")
    assert [line.split()[0] for line in lines if " robust " in line] == ["dense", "pruned", "finetuned", "densified"]
    assert lines[-1].split()[1:] == next(line for line in lines if line.startswith("finetuned")).split()[1:]
    assert any("90.00%" in line for line in lines)


def test_heads_of_a_hugging_face_transformer(run):
    pytest.importorskip("transformers")
    lines = run("prune_hf_vit.py", "--epochs", "1", "--images", "64")
    assert lines[0].startswith("dense ")
    assert lines[-1].startswith("smaller ")
    finetuned = next(line for line in lines if line.startswith("finetuned"))
    assert finetuned.split("parameters")[1] == lines[-1].split("parameters")[1]  # clean and robust accuracy


def test_a_network_is_deployed(run):
    lines = run("deploy.py", "--width", "8", "--batch", "2", "--calls", "1")
    assert lines[0].startswith("network.safetensors")
    assert float(re.search(r"by (\S+) at most", lines[1])[1]) < 1e-4
    assert [line.split(" ms ")[1] for line in lines[2:]] == ["for 2 images"] * 2


@pytest.mark.slow
def test_a_method_of_ones_own(tmp_path):
    command = [sys.executable, str(EXAMPLES / "taylor.py"), *settings(), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'name = "taylor"' in (tmp_path / "run" / "config.toml").read_text()


def test_the_method_is_that_of_the_page():
    (page,) = re.findall(r"^(@register.*?)^```$", (ROOT / "docs" / "your-own-method.md").read_text(), re.MULTILINE | re.DOTALL)
    assert page.strip() in (EXAMPLES / "taylor.py").read_text()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text(encoding="utf-8"))["cells"]
    space = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace("EPOCHS = 12", "EPOCHS = 1"), space)
    assert list(space["found"]) == ["dense", "pruned", "finetuned"]
    assert space["flips"] == sorted(space["flips"])
    assert space["flips"][-1] > 0
    assert "finetuned: " in capsys.readouterr().out
    space["plt"].close("all")
