"""Checkpoints, states, run folders, data and files of networks that cannot be used: exit code 2 and one line that names the file."""

import json
import shutil

import numpy as np
import pytest
import torch
from command_line import refused, settings
from engine_models import all_sparse, images, pruned

from s2ap_ext import _files
from s2ap_ext.cli import main
from s2ap_ext.data.parquet import parquet_sources
from s2ap_ext.engine import SparseNetwork, compile_sparse
from s2ap_ext.pipeline import checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "run"
    assert main(["run", "digits", *settings(), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(value, *path):
    """A function that puts ``value`` at ``path`` of a nested dictionary."""

    def change(about):
        about = json.loads(json.dumps(about))
        inside = about
        for step in path[:-1]:
            inside = inside[step]
        inside[path[-1]] = value
        return about

    return change


def without(*path):
    def change(about):
        about = put(None, *path)(about)
        inside = about
        for step in path[:-1]:
            inside = inside[step]
        del inside[path[-1]]
        return about

    return change


def nested(depth):
    value = 1
    for _ in range(depth):
        value = {"a": value}
    return value


# ------------------------------------------------------------------------------------------------- headers of models, well sealed

HEADERS = {
    "a list": (lambda about: [1, 2], "expected an object in its header"),
    "null": (lambda about: None, "expected an object in its header"),
    "a number": (lambda about: 3, "expected an object in its header"),
    "a text": (lambda about: "x", "expected an object in its header"),
    "empty": (lambda about: {}, "expected a model, found something else"),
    "no recipe": (without("recipe"), "expected a model"),
    "no shape": (without("shape"), "expected a model"),
    "no model": (without("model"), "expected a model"),
    "no model but a stage": (lambda about: {"stage": [1]}, "the state of the stage"),
    "model a list": (put([], "model"), "model: expected one of dense, pruned, finetuned"),
    "model an object": (put({}, "model"), "model: expected one of"),
    "model null": (put(None, "model"), "model: expected one of"),
    "model unknown": (put("shrunk", "model"), "model: expected one of"),
    "model long": (put("x" * 9999, "model"), "model: expected one of"),
    "shape a text": (put("10", "shape"), "shape: expected in_channels and num_classes"),
    "shape a list": (put([1, 10], "shape"), "shape: expected in_channels"),
    "shape null": (put(None, "shape"), "shape: expected in_channels"),
    "shape empty": (put({}, "shape"), "shape: expected in_channels"),
    "shape with more": (put(1, "shape", "x"), "shape: expected in_channels"),
    "shape of texts": (put("10", "shape", "num_classes"), "shape: expected in_channels"),
    "shape of floats": (put(10.0, "shape", "num_classes"), "shape: expected in_channels"),
    "shape of truths": (put(True, "shape", "in_channels"), "shape: expected in_channels"),
    "shape 0": (put(0, "shape", "num_classes"), "shape: expected in_channels"),
    "shape -1": (put(-1, "shape", "in_channels"), "shape: expected in_channels"),
    "shape huge": (put(2**40, "shape", "num_classes"), "shape: expected in_channels"),
    "shape beyond 64 bits": (put(2**70, "shape", "in_channels"), "shape: expected in_channels"),
    "other classes": (put(11, "shape", "num_classes"), "the model is for 1 channels and 11 classes"),
    "other channels": (put(3, "shape", "in_channels"), "the model is for 3 channels"),
    "recipe a list": (put([], "recipe"), "expected a section"),
    "recipe a text": (put("digits", "recipe"), "expected a section"),
    "recipe null": (put(None, "recipe"), "expected a section"),
    "recipe deep": (put(nested(900), "recipe"), "nested too deeply"),
    "recipe deep inside": (put(nested(900), "recipe", "prune", "method"), "nested too deeply"),
    "name of a folder": (put("../x", "recipe", "name"), "name: expected"),
    "name with an escape": (put("\x1b[2J", "recipe", "name"), "name: expected"),
    "name with markup": (put("[/x]", "recipe", "name"), "name: expected"),
    "unknown key": (put(1, "recipe", "x"), "unknown key x"),
    "unknown part": (put("x", "recipe", "prune", "method"), "prune.method: expected one of"),
    "width huge": (put(10**7, "recipe", "model", "width"), "parameters"),
    "width beyond all": (put(10**9, "recipe", "model", "width"), "parameters"),
    "width of 64 bits": (put(2**64, "recipe", "model", "width"), "model.width: expected an integer in"),
    "width a text": (put("2", "recipe", "model", "width"), "model.width: expected an integer"),
    "width another": (put(3, "recipe", "model", "width"), "does not fit the model"),
    "width smaller": (put(1, "recipe", "model", "width"), "does not fit the model"),
    "another model": (put({"name": "resnet18", "width": 64}, "recipe", "model"), "does not fit the model"),
    "another small model": (put({"name": "resnet18", "width": 1}, "recipe", "model"), "does not fit the model"),
    "a function": (put({"name": "subprocess:run"}, "recipe", "model"), "needs the plugin subprocess"),
    "another function": (put({"name": "os:abort"}, "recipe", "data"), "needs the plugin os"),
    "a function of the package": (put({"name": "s2ap_ext.cli:main"}, "recipe", "model"), "needs the plugin s2ap_ext.cli"),
    "a function of a strange name": (put({"name": "é:x"}, "recipe", "model"), "needs the plugin é"),
    "a plugin": (put(["this"], "recipe", "plugins"), "needs the plugin this"),
    "plugins null": (put(None, "recipe", "plugins"), "plugins: expected a list of texts"),
    "a set of the hub": (put({"name": "a/b"}, "recipe", "data"), "add --data-dir DIR or --set data.name=a/b"),
    "a folder": (put({"name": "a/b", "dir": "/etc"}, "recipe", "data"), "add --data-dir DIR or --set data.name=a/b"),
    "threads": (put(10**5, "recipe", "threads"), "threads: expected an integer in"),
    "device": (put("meta", "recipe", "device"), "device: expected one that holds data"),
    "device of nobody": (put("x\ny", "recipe", "device"), "device: cannot use"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_says_nonsense(case, finished, here, capsys):
    change, message = HEADERS[case]
    tensors, about = checkpoint.load(finished / "dense.safetensors")
    checkpoint.save("x.safetensors", tensors, change(about))
    said = refused(capsys, "evaluate", "x.safetensors")
    assert message in said
    assert "x.safetensors" in said or message.startswith("device")
    assert [path.name for path in here.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("image", [None, 8, [8, 8], [1, 8, 0], [1, 8, 8.0], [1, True, 8], [1, 2**13, 2**13], [2**70, 1, 1], "1x8x8"])
def test_images_of_a_pruned_model_that_are_nonsense(image, finished, here, capsys):
    tensors, about = checkpoint.load(finished / "pruned.safetensors")
    checkpoint.save("x.safetensors", tensors, put(image, "image")(about))
    assert "image: expected channels, height and width" in refused(capsys, "evaluate", "x.safetensors")


def test_a_checkpoint_chooses_neither_folder_nor_download(finished, here, monkeypatch, capsys):
    """What its data section names is read once it is named on the command line, with nothing else of that section."""
    parquet(here / "mine", {"img": [png()], "label": [9]})
    parquet(here / "mine", {"img": [png()], "label": [0]}, "test")
    shutil.copytree("mine", "theirs")
    tensors, about = checkpoint.load(finished / "dense.safetensors")
    checkpoint.save("x.safetensors", tensors, put({"name": "some/set", "dir": str(here / "theirs")}, "recipe", "data")(about))
    read = []
    monkeypatch.setattr(
        "s2ap_ext.data.hub.parquet_sources", lambda folder, **how: read.append(str(folder)) or parquet_sources(folder, **how)
    )
    monkeypatch.setattr("s2ap_ext.data.hub._download", lambda name, *which: here / "mine")
    refused(capsys, "evaluate", "x.safetensors")
    assert read == []
    assert main(["evaluate", "x.safetensors", "--data-dir", "mine"]) == 0
    assert main(["evaluate", "x.safetensors", "--set", "data.name=some/set"]) == 0
    assert read == [str(here / "mine")] * 2
    assert main(["evaluate", "x.safetensors", "--set", "data.name=digits"]) == 0


TENSORS = {
    "none": (lambda t: {}, "does not fit the model"),
    "one less": (lambda t: {n: v for n, v in t.items() if n != "conv2.weight"}, "does not fit the model"),
    "a counter less": (lambda t: {n: v for n, v in t.items() if n != "bn1.num_batches_tracked"}, "bn1.num_batches_tracked is missing"),
    "one more": (lambda t: t | {"more": torch.ones(2)}, "'more' is not among its tensors"),
    "one of a strange name": (lambda t: t | {"\x1b[2J" + "x" * 3000: torch.ones(2)}, "is not among its tensors"),
    "transposed": (lambda t: t | {"linear.weight": t["linear.weight"].T.contiguous()}, "linear.weight: expected"),
    "flat": (lambda t: t | {"conv1.weight": t["conv1.weight"].flatten()}, "conv1.weight: expected"),
    "cut": (lambda t: t | {"bn1.weight": t["bn1.weight"][:1].clone()}, "does not fit the model"),
    "longer": (lambda t: t | {"bn1.weight": t["bn1.weight"].repeat(2)}, "bn1.weight: expected"),
    "double": (lambda t: t | {"conv1.weight": t["conv1.weight"].double()}, "conv1.weight: expected torch.float32"),
    "half": (lambda t: t | {"conv1.weight": t["conv1.weight"].half()}, "conv1.weight: expected torch.float32"),
    "integers": (lambda t: t | {"conv1.weight": t["conv1.weight"].long()}, "conv1.weight: expected torch.float32"),
    "complex": (lambda t: t | {"conv1.weight": t["conv1.weight"].to(torch.complex64)}, "conv1.weight: expected torch.float32"),
    "counter a float": (lambda t: t | {"bn1.num_batches_tracked": torch.tensor(1.0)}, "bn1.num_batches_tracked: expected torch.int64"),
    "scores less": (lambda t: {n: v for n, v in t.items() if n != "conv2.scores"}, "conv2.scores is missing"),
    "kept less": (lambda t: {n: v for n, v in t.items() if n != "conv2.kept"}, "conv2.kept is missing"),
    "kept -1": (lambda t: t | {"conv2.kept": torch.tensor(-1)}, "kept"),
    "kept huge": (lambda t: t | {"conv2.kept": torch.tensor(2**62)}, "kept"),
    "kept one too many": (lambda t: t | {"conv2.kept": torch.tensor(t["conv2.scores"].numel() + 1)}, "kept"),
    "kept of two": (lambda t: t | {"conv2.kept": torch.tensor([1, 1])}, "conv2.kept: expected torch.int64"),
    "scores NaN": (lambda t: t | {"conv2.scores": t["conv2.scores"] * float("nan")}, "conv2"),
}


@pytest.mark.parametrize("command", ["evaluate", "profile", "sparse"])
@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(case, command, finished, here, capsys):
    change, message = TENSORS[case]
    tensors, about = checkpoint.load(finished / "pruned.safetensors")
    checkpoint.save("x.safetensors", change(tensors), about)
    words = ["evaluate", "x.safetensors", "--engine", "sparse"] if command == "sparse" else [command, "x.safetensors"]
    assert message in refused(capsys, *words)


# ------------------------------------------------------------------------------------------------------------------------- states


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped in the middle of its mask search, with a state and the one before it."""
    from s2ap_ext.pipeline import RunFolder, Session, Stopped, load_recipe, open_data, run

    folder = tmp_path_factory.mktemp("states") / "run"
    options = ["prune.averaging=0.9", "prune.method=harp", "pretrain.loss=free_at", "prune.warmup_epochs=0", "finetune.epochs=0"]
    recipe = load_recipe("digits", settings(*options)[1::2])
    asked = iter([False] * 4 + [True])
    with RunFolder.create(folder, recipe) as opened, pytest.raises(Stopped):
        run(Session(recipe, open_data(recipe), opened, stop=lambda: next(asked)), None)
    assert checkpoint.load(folder / "state.safetensors")[1]["stage"] == "prune"
    return folder


def first(tensors, start, end=""):
    return next(name for name in tensors if name.startswith(start) and name.endswith(end))


def drop(start, end=""):
    return lambda t, about: ({n: v for n, v in t.items() if n != first(t, start, end)}, about)


def replace(start, end, value):
    return lambda t, about: ({**t, first(t, start, end): value(t[first(t, start, end)])}, about)


STATES = {
    "no stage": (lambda t, a: (t, without("stage")(a)), "expected the state of a stage"),
    "no place": (lambda t, a: (t, without("progress")(a)), "expected the state of a stage"),
    "no run": (lambda t, a: (t, without("run")(a)), "expected the state of a stage"),
    "another run": (lambda t, a: (t, put("x", "run")(a)), "belongs to another run"),
    "stage a list": (lambda t, a: (t, put([], "stage")(a)), "stage: expected one of"),
    "stage unknown": (lambda t, a: (t, put("x", "stage")(a)), "stage: expected one of"),
    "stage ahead": (lambda t, a: (t, put("finetune", "stage")(a)), "the state of finetune"),
    "place a list": (lambda t, a: (t, put([], "progress")(a)), "progress: expected"),
    "place null": (lambda t, a: (t, put(None, "progress")(a)), "progress: expected"),
    "place empty": (lambda t, a: (t, put({}, "progress")(a)), "progress: expected"),
    "place with more": (lambda t, a: (t, put(1, "progress", "x")(a)), "progress: expected"),
    "epoch -1": (lambda t, a: (t, put(-1, "progress", "epoch")(a)), "progress: expected"),
    "epoch a text": (lambda t, a: (t, put("1", "progress", "epoch")(a)), "progress: expected"),
    "epoch a float": (lambda t, a: (t, put(0.5, "progress", "epoch")(a)), "progress: expected"),
    "epoch beyond": (lambda t, a: (t, put(9, "progress", "epoch")(a)), "progress: expected"),
    "batch beyond": (lambda t, a: (t, put(99, "progress", "batch")(a)), "progress: expected"),
    "batch a list": (lambda t, a: (t, put([], "progress", "batch")(a)), "progress: expected"),
    "images -1": (lambda t, a: (t, put(-1, "progress", "images")(a)), "progress: expected"),
    "loss a text": (lambda t, a: (t, put("1", "progress", "loss")(a)), "progress: expected"),
    "loss null": (lambda t, a: (t, put(None, "progress", "loss")(a)), "progress: expected"),
    "no tensors": (lambda t, a: ({}, a), "does not fit the model"),
    "no momentum": (lambda t, a: ({n: v for n, v in t.items() if not n.startswith("optimizer/")}, a), "optimizer state"),
    "one momentum less": (drop("optimizer/"), "optimizer state"),
    "momentum of another shape": (replace("optimizer/", "", lambda v: v.flatten()[:1].clone()), "optimizer state"),
    "momentum of nobody": (lambda t, a: (t | {"optimizer/99.momentum_buffer": torch.ones(1)}, a), "optimizer state"),
    "something of an optimizer": (lambda t, a: (t | {"optimizer/0.exp_avg": torch.ones(1)}, a), "optimizer state"),
    "optimizer unreadable": (lambda t, a: (t | {"optimizer/x": torch.ones(1)}, a), "optimizer state"),
    "a part of nobody": (lambda t, a: (t | {"wing/x": torch.ones(1)}, a), "wing/x"),
    "a name without a part": (lambda t, a: (t | {"x": torch.ones(1)}, a), "'x'"),
    "one tensor of the model less": (drop("model/", "scores"), "does not fit the model"),
    "one tensor of the model more": (lambda t, a: (t | {"model/x": torch.ones(1)}, a), "does not fit the model"),
    "loss of nobody": (lambda t, a: (t | {"loss/x": torch.ones(1)}, a), "loss pgd_at: expected no state"),
    "no average": (lambda t, a: ({n: v for n, v in t.items() if not n.startswith("average/")}, a), "averages: expected"),
    "average of another shape": (replace("average/", "weight", lambda v: v.flatten()[:1].clone()), "averages: expected"),
    "no count of averages": (drop("average/updates"), "averages: expected"),
    "averages never counted": (replace("average/updates", "", lambda v: torch.tensor(-5)), "averages: expected"),
    "no counts": (drop("stage/counts"), "counts"),
    "counts of one": (replace("stage/counts", "", lambda v: v[:1].clone()), "counts"),
    "counts of floats": (replace("stage/counts", "", lambda v: v.float()), "counts"),
    "no masks": (lambda t, a: ({n: v for n, v in t.items() if not n.startswith("stage/mask/")}, a), "mask/"),
    "a mask of another shape": (replace("stage/mask/", "", lambda v: v.flatten()[:1].clone()), "mask/"),
    "a mask of numbers": (replace("stage/mask/", "", lambda v: v.float()), "mask/"),
    "no earlier masks": (lambda t, a: ({n: v for n, v in t.items() if not n.startswith("stage/earlier/")}, a), "earlier/"),
    "an earlier mask of numbers": (replace("stage/earlier/", "", lambda v: v.float()), "earlier/"),
    "logits of nobody": (lambda t, a: (t | {"drift/x": torch.ones(1)}, a), "drift: expected the logits of"),
    "logits of other images": (lambda t, a: (t | {"drift/logits": torch.ones(99, 10)}, a), "drift: expected the logits of"),
    "no rates": (drop("stage/method/rates"), "rates"),
    "rates of another shape": (replace("stage/method/rates", "", lambda v: v[:1].clone()), "rates"),
    "something of a method": (lambda t, a: (t | {"stage/method/x": torch.ones(1)}, a), "method harp"),
    "no recent images": (lambda t, a: ({n: v for n, v in t.items() if not n.startswith("recent/")}, a), "recent"),
    "a gap in the recent images": (drop("recent/0"), "recent"),
    "recent images of another shape": (replace("recent/0", "", lambda v: v[:, :, :3].clone()), "recent"),
    "too many recent images": (lambda t, a: (t | {f"recent/{i}": t["recent/0"].clone() for i in range(99)}, a), "recent"),
}


HARMLESS = {"no momentum", "one momentum less", "no recent images"}  # if the header says that it is so: then the stage had none


@pytest.mark.parametrize("forged", [False, True], ids=["header as it was", "header that fits"])
@pytest.mark.parametrize("case", STATES)
def test_a_state_that_says_nonsense(case, forged, stopped, here, capsys):
    if forged and case in HARMLESS:
        return
    change, message = STATES[case]
    shutil.copytree(stopped, "run")
    (here / "run/state-before.safetensors").unlink(missing_ok=True)
    before, _ = checkpoint.load("run/state.safetensors")
    tensors, about = change(*checkpoint.load("run/state.safetensors"))
    if forged:
        about["tensors"] = sorted(tensors)
    elif tensors.keys() != before.keys():
        message = "expected the tensors that its header lists"
    checkpoint.save("run/state.safetensors", tensors, about)
    code = main(["run", "--resume", "run"])
    out, err = capsys.readouterr()
    assert code == 2, out + err
    assert err.startswith("s2ap: error: "), err
    assert err.count("\n") == 1, err
    assert message in err
    assert "state.safetensors" in err


# -------------------------------------------------------------------------------------------------------------------- run folders

FOLDERS = {
    "results empty": ("results.json", b"", "results.json: not JSON"),
    "results {}": ("results.json", b"{}", "results.json: expected"),
    "results []": ("results.json", b"[]", "results.json: expected"),
    "results 3": ("results.json", b"3", "results.json: expected"),
    "results null": ("results.json", b"null", "results.json: expected"),
    "results no text": ("results.json", b"\xff\xfe", "results.json: not JSON"),
    "results deep": ("results.json", b"[" * 5000, "results.json: not JSON"),
    "results with markup": ("results.json", b'{"recipe": "[/x]", "rows": [], "attack": "", "density": {}}', "results.json: "),
    "metrics []": ("metrics.jsonl", b"[]\n", "metrics.jsonl, line 1: expected"),
    "metrics 3": ("metrics.jsonl", b"3\n", "metrics.jsonl, line 1: expected"),
    "metrics null": ("metrics.jsonl", b"null\n", "metrics.jsonl, line 1: expected"),
    "metrics no JSON": ("metrics.jsonl", b"\x00\n", "metrics.jsonl, line 1: not JSON"),
    "metrics deep": ("metrics.jsonl", b"[" * 5000 + b"\n", "metrics.jsonl, line 1: not JSON"),
    "metrics a stage alone": ("metrics.jsonl", b'{"stage": "prune"}\n', "metrics.jsonl, line 1: "),
    "metrics an epoch that is a text": ("metrics.jsonl", b'{"stage": "prune", "epoch": "1"}\n', "metrics.jsonl, line 1: "),
    "metrics a long number": ("metrics.jsonl", b"9" * 5000 + b"\n", "metrics.jsonl, line 1: not JSON"),
}


@pytest.mark.parametrize("command", ["report", "resume"])
@pytest.mark.parametrize("case", FOLDERS)
def test_records_that_say_nonsense(case, command, finished, here, capsys):
    name, content, message = FOLDERS[case]
    shutil.copytree(finished, "run")
    (here / "run" / name).write_bytes(content)
    if command == "resume":
        if name == "results.json":
            return  # it is written anew
        (here / "run/results.json").unlink()
    assert message in refused(capsys, *(["report", "run"] if command == "report" else ["run", "--resume", "run"]))


CONFIGS = {
    "empty": (b"", "config.toml: not as the run wrote it"),
    "another seed": (lambda text: text.replace(b"seed = 0", b"seed = 1"), "config.toml: not as the run wrote it"),
    "another batch size": (lambda text: text.replace(b"batch_size = 16", b"batch_size = 17", 1), "config.toml: not as the run wrote it"),
    "another granularity": (lambda text: text.replace(b'"weight"', b'"wdight"'), "config.toml: not as the run wrote it"),
    "a comment": (lambda text: text + b"# mine\n", "config.toml: not as the run wrote it"),
    "a key less": (lambda text: text.replace(b"seed = 0\n", b""), "config.toml: not as the run wrote it"),
    "no TOML": (b"\0", "config.toml: not as the run wrote it"),
    "no text": (b"\xff", "config.toml: not a TOML file"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_recipe_that_was_edited(case, finished, here, capsys):
    change, message = CONFIGS[case]
    shutil.copytree(finished, "run")
    config = here / "run/config.toml"
    config.write_bytes(change if isinstance(change, bytes) else change(config.read_bytes()))
    code = main(["run", "--resume", "run"])
    _, err = capsys.readouterr()
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_model_of_another_place_or_run(finished, here, capsys):
    assert main(["run", "digits", *settings("seed=1"), "--out", "other"]) == 0
    for source, place, message in (
        (finished / "finetuned.safetensors", "pruned", "expected the pruned model, found the finetuned one"),
        (finished / "dense.safetensors", "pruned", "expected the pruned model, found the dense one"),
        (finished / "pruned.safetensors", "dense", "expected the dense model, found the pruned one"),
        (here / "other/dense.safetensors", "dense", "belongs to another run"),
        (here / "other/pruned.safetensors", "pruned", "belongs to another run"),
        (here / "other/finetuned.safetensors", "finetuned", "belongs to another run"),
        (here / "other/metrics.jsonl", "metrics", "metrics.jsonl, line 1: "),
    ):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(finished, "run")
        name = "metrics.jsonl" if place == "metrics" else f"{place}.safetensors"
        shutil.copy(source, here / "run" / name)
        code = main(["run", "--resume", "run"])
        _, err = capsys.readouterr()
        assert (code, err.count("\n")) == (2, 1), (name, err)
        assert message in err
        assert name.partition(",")[0] in err


# --------------------------------------------------------------------------------------------------------------------------- data


def parquet(folder, columns, split="train", **options):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{split}.parquet", **options)


def png(shape=(8, 8)):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.zeros(shape, np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def encoded(kind, shape=(8, 8)):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.zeros(shape, np.uint8)).save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


DATA = {
    "no rows": ({"img": [], "label": []}, "train.parquet"),
    "no images": ({"label": [0]}, "expected the columns img"),
    "no labels": ({"img": [png()]}, "expected the columns img"),
    "images of numbers": ({"img": [1], "label": [0]}, "expected the columns img"),
    "images of bytes": ({"img": [b"x"], "label": [0]}, "expected the columns img"),
    "images without bytes": ({"img": [{"path": "x"}], "label": [0]}, "expected the columns img"),
    "bytes that are numbers": ({"img": [{"bytes": 3}], "label": [0]}, "train.parquet"),
    "bytes that are a text": ({"img": [{"bytes": "x"}], "label": [0]}, "train.parquet"),
    "bytes that are lists": ({"img": [{"bytes": [1, 2]}], "label": [0]}, "train.parquet"),
    "labels of texts": ({"img": [png()], "label": ["0"]}, "expected the columns img"),
    "labels of floats": ({"img": [png()], "label": [0.5]}, "expected the columns img"),
    "labels of truths": ({"img": [png()], "label": [True]}, "expected the columns img"),
    "labels of lists": ({"img": [png()], "label": [[0]]}, "expected the columns img"),
    "label none": ({"img": [png(), png()], "label": [0, None]}, "row 1: expected a label from 0 to"),
    "label -1": ({"img": [png()], "label": [-1]}, "row 0: expected a label from 0 to"),
    "label 2**40": ({"img": [png()], "label": [2**40]}, "row 0: expected a label from 0 to 65535"),
    "label 2**63": ({"img": [png()], "label": [2**63 - 1]}, "row 0: expected a label from 0 to 65535"),
    "image none": ({"img": [png(), None], "label": [0, 0]}, "row 1: expected the bytes of an image"),
    "image empty": ({"img": [{"bytes": b""}], "label": [0]}, "row 0: not a readable image"),
    "image cut": ({"img": [{"bytes": png()["bytes"][:40]}], "label": [0]}, "row 0: not a readable image"),
    "image of text": ({"img": [{"bytes": b"GIF89a"}], "label": [0]}, "row 0: not a readable image"),
    "image of another size": ({"img": [png(), png((9, 8))], "label": [0, 0]}, "row 1: expected an image of shape"),
    "image EPS": ({"img": [{"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"}], "label": [0]}, "row 0: "),
    "image PDF": ({"img": [encoded("PDF")], "label": [0]}, "row 0: "),
}


@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_used(case, here, capsys):
    columns, message = DATA[case]
    parquet(here / "data", columns)
    parquet(here / "data", {"img": [png()], "label": [0]}, "test")
    said = refused(capsys, "run", "digits", *settings("data.name=some/thing"), "--data-dir", "data")
    assert message in said
    assert "train.parquet" in said
    assert [path.name for path in here.iterdir()] == ["data"]


# --------------------------------------------------------------------------------------------------------- files of sparse networks

ENGINE = {
    "a list": lambda about: [],
    "no kind": without("kind"),
    "kind a list": put([], "kind"),
    "no version": without("version"),
    "version a text": put("4", "version"),
    "version a list": put([4], "version"),
    "version true": put(True, "version"),
    "no steps": without("steps"),
    "steps null": put(None, "steps"),
    "steps a text": put("x", "steps"),
    "steps of texts": put(["x"], "steps"),
    "steps of lists": put([[[]]], "steps"),
    "steps empty": put([], "steps"),
    "steps without a name": without("steps", 0, "step"),
    "steps of nobody": put("Part", "steps", 0, "step"),
    "steps of a builtin": put("__class__", "steps", 0, "step"),
    "steps with a list for a name": put([], "steps", 0, "step"),
    "steps with more": put(1, "steps", 0, "x"),
    "shapes null": put(None, "shapes"),
    "shapes of texts": put(["x"], "shapes"),
    "shapes negative": put([-1, 1, 1], "shapes", 0),
    "shapes huge": put([2**62, 2**62, 2**62], "shapes", 0),
    "shapes of floats": put([1.5, 1, 1], "shapes", 0),
    "output -1": put(-1, "output"),
    "output huge": put(10**9, "output"),
    "output a text": put("0", "output"),
    "chunk 0": put(0, "chunk"),
    "chunk a text": put("64", "chunk"),
    "weights null": put(None, "weights"),
    "weights of numbers": put([1], "weights"),
    "weights of nobody": put("Tensor", "weights", 0),
    "sources null": put(None, "sources"),
    "sources of texts": put(["x"], "sources"),
    "layers null": put(None, "layers"),
    "layers of texts": put(["x"], "layers"),
    "deep": put(nested(900), "steps"),
}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    model, size = pruned("digits_cnn")
    path = tmp_path_factory.mktemp("network") / "x.safetensors"
    compile_sparse(model, images(1, size), choose=all_sparse).save(path)
    return _files.load(path)


@pytest.mark.parametrize("case", ENGINE)
def test_a_network_that_says_nonsense(case, network, here):
    tensors, about = network
    _files.save("x.safetensors", tensors, ENGINE[case](json.loads(json.dumps(about))))
    with pytest.raises(ValueError, match=r"x\.safetensors") as error:
        SparseNetwork.load("x.safetensors")
    assert len(str(error.value)) < 2000
