"""What the pages under docs/ say is run as it stands there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu.parts import Setting, parts

from s2ap_ext import sparsify
from s2ap_ext.cli import COMMANDS as COMMANDS_OF_THE_PROGRAM
from s2ap_ext.cli.parser import Commands
from s2ap_ext.pipeline import check_prunable, load_recipe, open_data

DOCS = Path(__file__).parent.parent / "docs"
TINY = ["model.width=2", "data.train_size=64", "data.test_size=16", "attack.steps=1", "evaluate.steps=1", "evaluate.images_per_epoch=8"]
TINY += [f"{stage}.{key}" for stage in ("pretrain", "prune", "finetune") for key in ("epochs=1", "batch_size=32")]


def blocks(page, language):
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(folder, *words):
    """Runs ``s2ap`` in ``folder``, cut down; the folder of the run."""
    words = [*words, *(word for setting in TINY for word in ("--set", setting)), "--out", "run"]
    done = subprocess.run([sys.executable, "-m", "s2ap_ext.cli", *words], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


@pytest.mark.parametrize("line", [0, 1])
def test_a_method_of_ones_own_is_one_file(line, tmp_path):
    (tmp_path / "taylor.py").write_text(blocks("your-own-method.md", "python")[0])
    words = blocks("your-own-method.md", "bash")[0].splitlines()[line].split()
    assert words.pop(0) == "s2ap"
    folder = run(tmp_path, *words)
    assert 'name = "taylor"' in (folder / "config.toml").read_text()
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["dense", "pruned", "finetuned"]
    assert rows[1]["sparsity"] == pytest.approx(0.9, abs=0.03)


def test_your_own_loop_runs_from_top_to_bottom(capsys):
    space = {}
    for block in blocks("your-own-loop.md", "python"):
        exec(block, space)
    assert "90.00%" in capsys.readouterr().out  # the table of the sparsities
    assert type(space["net"][4]) is torch.nn.Linear
    assert space["optimizer"].flips > 0


def test_a_fast_step_runs_on_a_cpu_too():
    space = {}
    (code,) = blocks("on-a-gpu.md", "python")
    exec(code, space)
    assert space["optimizer"].passes == 2
    assert space["fast"](space["x"]).dtype == torch.float32


def test_the_page_names_parts_of_the_work_list():
    named = re.findall(r"--only ([\w-]+)", (DOCS / "on-a-gpu.md").read_text(encoding="utf-8"))
    known = {part.name.partition("/")[0] for part in parts(Setting(Path("results"), "cuda", tiny=False))}
    assert len(named) >= 8
    assert set(named) - {"PART"} <= known


def test_the_sparse_network_of_the_page_is_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = sparsify(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()), 0.9).eval()
    space = {"torch": torch, "model": model, "images": torch.rand(2, 3, 32, 32)}
    exec(blocks("sparse.md", "python")[0], space)
    torch.testing.assert_close(space["logits"], model(space["images"]))


@pytest.mark.parametrize("page", ["getting-started.md"])
def test_the_commands_of_a_walk_can_be_parsed(page):
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("s2ap ")]
    assert len(commands) >= 8
    parser = Commands()
    for module in COMMANDS_OF_THE_PROGRAM:
        module.add(parser)
    for words in commands:
        arguments = parser.parser.parse_args(words)
        if words[0] == "run":
            load_recipe(arguments.recipe, arguments.set)


COMMANDS = [line for page in ("methods.md",) for block in blocks(page, "bash") for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_name_what_there_is(command):
    """Each recipe is read and its network pruned; the tests of the pipeline train."""
    program, verb, name, *words = shlex.split(command)
    assert (program, verb, name) == ("s2ap", "run", "digits")
    options = dict.fromkeys(words[0::2])
    assert set(options) <= {"--set", "--seed"}
    recipe = load_recipe(name, [word for option, word in zip(words[0::2], words[1::2], strict=True) if option == "--set"])
    check_prunable(recipe, open_data(recipe))


def test_its_settings_are_a_class_like_this_one(tmp_path):
    space = {}
    exec(blocks("your-own-method.md", "python")[1], space)
    assert space["Settings"]().memory == 0.99


def test_every_kind_of_part_may_come_from_a_file_outside(tmp_path):
    (tmp_path / "mine.py").write_text(
        """
from dataclasses import dataclass

import torch
from torch import nn

from s2ap_ext.allocations import Allocation
from s2ap_ext.attacks import Attack
from s2ap_ext.data import Data, load_digits
from s2ap_ext.losses import Loss
from s2ap_ext.models import Model
from s2ap_ext.optim import Ascent
from s2ap_ext.parts import register
from s2ap_ext.settings import key


@register("noise")
class Noise(Attack):
    @dataclass(frozen=True)
    class Settings:
        eps: float = key(0.1, "standard deviation of the noise", low=0)
        norm: str = key("linf", "what the test images are attacked in")

    def __call__(self, model, x, y, *, loss="ce", generator=None):
        return (x + self.settings.eps * torch.randn_like(x)).clamp(0, 1)


@register("squared")
class Squared(Loss):
    def __call__(self, model, x, x_adv, y):
        logits = model(x_adv)
        return (logits - nn.functional.one_hot(y, logits.shape[1])).square().mean(), logits


@register("two_layers")
class TwoLayers(Model):
    def build(self, *, num_classes, in_channels):
        return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, num_classes))


@register("some_digits")
class SomeDigits(Data):
    def load(self, *, limit=None, test_limit=None):
        return load_digits().limited(limit, test_limit)


@register("last_half")
class LastHalf(Allocation):
    def kept(self, layers, sparsity):
        return [layer.units // 2 for layer in layers]


@register("twice")
class Twice(Ascent):
    def step(self, at, backward):
        backward()
        at.move(gamma=2 * at.gamma)
        backward()
"""
    )
    chosen = ["plugins=mine", "model.name=two_layers", "data.name=some_digits", "prune.allocation=last_half", "prune.ascent=twice"]
    chosen += ["attack.name=noise", "attack.eps=0.2"]
    chosen += [f"{stage}.loss=squared" for stage in ("pretrain", "prune", "finetune")]
    settings = [setting for setting in TINY if not setting.startswith(("model.", "attack."))]
    words = ["run", "digits", *(word for setting in [*settings, *chosen] for word in ("--set", setting)), "--out", "run"]
    done = subprocess.run([sys.executable, "-m", "s2ap_ext.cli", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    density = json.loads((tmp_path / "run/results.json").read_text())["density"]
    assert density == {"0": 0.5, "4": 0.5}


def test_the_six_weights_of_the_theory(capsys):
    exec(blocks("theory.md", "python")[0], {})
    assert capsys.readouterr().out == blocks("theory.md", "text")[0]
