"""docs/experiments.md: what it names is there, and its commands and its plan are right."""

import re
import shlex
from pathlib import Path

import pytest

from s2ap_ext.cli import COMMANDS
from s2ap_ext.cli.parser import Commands
from s2ap_ext.experiments import known_plans, load_plan
from s2ap_ext.experiments.jobs import jobs_of
from s2ap_ext.experiments.sweep import Sweep
from s2ap_ext.parts import names
from s2ap_ext.pipeline import load_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


LINES = [line for block in blocks("bash") for line in block.splitlines()]


def test_the_page_lists_every_plan_and_control():
    plans, controls, _ = re.findall(r"^\| (?:plan|arm|file) \|.*?\n\n", PAGE, re.MULTILINE | re.DOTALL)
    listed = [plan for cell in re.findall(r"^\| (`.*?`) \|", plans, re.MULTILINE) for plan in re.findall(r"`([\w-]+)`", cell)]
    assert sorted(listed) == known_plans()
    arms = {arm for cell in re.findall(r"^\| (`.*?`) \|", controls, re.MULTILINE) for arm in re.findall(r"`([\w-]+)`", cell)}
    assert arms == load_plan("causal").arms.keys() - {"plain", "s2ap"}
    assert set(re.findall(r"prune\.ascent=(\w+)", controls)) <= set(names("ascent"))


@pytest.mark.parametrize("line", LINES)
def test_the_commands_are_right(line, tmp_path):
    program, *words = shlex.split(line)
    assert program == "s2ap"
    parser = Commands()
    for module in COMMANDS:
        module.add(parser)
    arguments = parser.parser.parse_args(words)
    if arguments.resume:
        return
    if words[0] == "sweep":
        Sweep(load_recipe(arguments.recipe, arguments.set), tuple(arguments.param))
    else:
        assert words[0] == "experiment"
        if arguments.plan == "smoothing.toml":
            arguments.plan = tmp_path / "smoothing.toml"
            arguments.plan.write_text(blocks("toml")[0])
        plan = load_plan(arguments.plan).changed(arguments.set, arguments.seeds)
        jobs = jobs_of(plan.runs(), tmp_path)
        assert {job.arm for job in jobs if job.arm} == plan.all_arms().keys()
