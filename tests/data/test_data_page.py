"""What docs/data.md says is run as it stands there, on small files."""

import io
import re
import shlex
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from image_files import encoded, pictures, write_folders

from s2ap_ext.data import Batches, Stream, load_data
from s2ap_ext.pipeline import load_recipe

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with the page's modules of one's own in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    _, stripes, tars = blocks("python")
    Path("mine.py").write_text(stripes)
    Path("tars.py").write_text(tars)
    yield tmp_path
    for name in ("mine", "tars"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("command", [line for block in blocks("bash") for line in block.splitlines()])
def test_the_commands_name_what_there_is(command, here):
    program, verb, recipe, *words = shlex.split(command)
    assert (program, verb) == ("s2ap", "run")
    overrides, folder = [], None
    for option, value in zip(words[0::2], words[1::2], strict=True):
        assert option in ("--set", "--data-dir")
        if option == "--set":
            overrides.append(value)
        else:
            folder = value
    read = load_recipe(recipe, [*overrides, f"data.dir={folder}"])
    assert read.data.source.dir == folder
    assert read.data.source.make().name == read.data.source.name


def test_streaming_from_a_place_on(here):
    write_folders(Path("photos"), [f"{i:02}" for i in range(20)], each=10)
    space = {}
    exec(blocks("python")[0], space)
    assert isinstance(space["data"].train, Stream)
    assert space["images"].shape[1:] == (3, 64, 64)
    assert len(space["later"]) == 2
    assert torch.equal(space["later"][-1][0], space["images"])


def test_a_function_of_ones_own(here):
    data = load_data("mine:stripes")
    assert (data.shape, data.classes, len(data.train), len(data.test)) == ((3, 8, 8), ("thin", "thick"), 100, 20)


def test_a_streamed_set_of_ones_own(here):
    Path("shards").mkdir()
    shown = pictures(24, shape=(20, 20, 3))
    for name, numbers in (("train-0", range(10)), ("train-1", range(10, 20)), ("test-0", range(20, 24))):
        with tarfile.open(f"shards/{name}.tar", "w") as tar:
            for i in numbers:
                content = encoded(shown[i])
                member = tarfile.TarInfo(f"{i:06}.{i % 10}.png")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    memory = load_data("tars:Tars", data_dir="shards")
    stream = load_data("tars:Tars", data_dir="shards", stream="always", workers=1)
    assert (len(memory.train), len(memory.test)) == (20, 4)
    assert memory.train.labels.tolist() == [i % 10 for i in range(20)]
    assert torch.equal(torch.cat([x for x, _ in Batches(stream.train, 8)]), memory.train.floats())
    through = list(Batches(stream.train, 8).epoch(0))
    assert torch.equal(through[2][0], next(Batches(stream.train, 8).epoch(0, 2))[0])
    assert list(memory.files.checksums) == ["train-0.tar", "train-1.tar", "test-0.tar"]
