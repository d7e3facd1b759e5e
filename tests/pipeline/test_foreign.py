"""Dense models of others: from each kind of file, and what is refused."""

import os
import pickle

import pytest
import torch
from command_line import refused, settings
from helpers import assert_same_state
from torch import nn

from s2ap_ext.cli import main
from s2ap_ext.evaluation import evaluate
from s2ap_ext.models import build_model
from s2ap_ext.parts import make
from s2ap_ext.pipeline import load_model, load_recipe, open_data
from s2ap_ext.pipeline.foreign import import_model

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("pyautoattack")


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("digits", ["model.width=2", "data.train_size=32", "data.test_size=16"])


@pytest.fixture(scope="module")
def data(recipe):
    return open_data(recipe)


@pytest.fixture
def theirs():
    return build_model("digits_cnn", num_classes=10, width=2, seed=7)


FORMS = {
    "a state_dict": lambda state: state,
    "state_dict in a checkpoint": lambda state: {"epoch": 3, "state_dict": state, "best": 0.5},
    "net in a checkpoint": lambda state: {"net": state},
    "of DistributedDataParallel": lambda state: {f"module.{name}": t for name, t in state.items()},
    "of torch.compile and a wrapper": lambda state: {"model": {f"_orig_mod.net.{name}": t for name, t in state.items()}},
    "in float64": lambda state: {name: t.double() if t.is_floating_point() else t for name, t in state.items()},
    "without num_batches_tracked": lambda state: {name: t for name, t in state.items() if "num_batches" not in name},
}


@pytest.mark.parametrize("form", list(FORMS))
def test_files_of_torch_save(form, recipe, data, theirs, tmp_path):
    torch.save(FORMS[form](theirs.state_dict()), tmp_path / "theirs.pt")
    assert_same_state(import_model(tmp_path / "theirs.pt", recipe, data), theirs)


def test_safetensors(recipe, data, theirs, tmp_path):
    safetensors.save_file({f"module.{name}": t for name, t in theirs.state_dict().items()}, tmp_path / "theirs.safetensors")
    assert_same_state(import_model(tmp_path / "theirs.safetensors", recipe, data), theirs)


class Harmful:
    """What pickle runs when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def changed(state, **tensors):
    return {**state, **{name.replace("__", "."): t for name, t in tensors.items()}}


WRONG = {
    "another model": (lambda state: build_model("resnet18", num_classes=10, width=2).state_dict(), r"not the weights of .* is missing"),
    "a normalisation": (lambda state: changed(state, mean=torch.zeros(1)), "'mean' is not among its tensors"),
    "other shapes": (lambda state: {n: t[:1] if t.dim() else t for n, t in state.items()}, r"conv1.weight: expected torch.float32 \[2, 1"),
    "not finite": (
        lambda state: {n: t / 0 if t.is_floating_point() else t for n, t in state.items()},
        "conv1.weight has values that are not",
    ),
    "two of them": (lambda state: {"model": state, "ema": state}, "found 2 of them: model, ema"),
    "none": (lambda state: {"epoch": 3}, "expected a dictionary of tensors, .* found a dict"),
    "a list": (lambda state: [1, 2], "found a list"),
    "empty": (lambda state: {}, "expected a dictionary of tensors"),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_what_is_not_the_recipes_model(what, recipe, data, theirs, tmp_path):
    change, message = WRONG[what]
    torch.save(change(theirs.state_dict()), tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match=message) as error:
        import_model(tmp_path / "theirs.pt", recipe, data)
    assert str(error.value).startswith(str(tmp_path / "theirs.pt"))


def test_nothing_of_theirs_is_run(recipe, data, theirs, tmp_path):
    torch.save({"state_dict": theirs.state_dict(), "x": Harmful(tmp_path / "made")}, tmp_path / "harmful.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Harmful(tmp_path / "made"), protocol=2))
    torch.save(theirs, tmp_path / "module.pt")  # a whole module, whose class would have to be imported
    (tmp_path / "text.pt").write_text("no tensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "empty.pt").touch()
    for name in ("harmful.pt", "plain.pkl", "module.pt", "text.pt", "text.safetensors", "empty.pt", "nowhere.pt"):
        with pytest.raises(ValueError, match=name):
            import_model(tmp_path / name, recipe, data)
    assert not (tmp_path / "made").exists()


def test_the_command_makes_a_checkpoint_to_evaluate_and_to_prune(theirs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(theirs.state_dict(), "theirs.pt")
    assert main(["import", "theirs.pt", "digits", *settings(), "--out", "imported.safetensors"]) == 0
    assert "imported.safetensors: digits_cnn, " in capsys.readouterr().out
    assert_same_state(load_model("imported.safetensors")[0], theirs)
    assert main(["evaluate", "imported.safetensors", "--attack", "pgd", "--eps", "0.01"]) == 0
    assert main(["prune", "digits", *settings(), "--from", "imported.safetensors", "--out", "run"]) == 0
    assert "exists already" in refused(capsys, "import", "theirs.pt", "digits", *settings(), "--out", "imported.safetensors")
    assert "no such file" in refused(capsys, "import", "nobodys.pt", "digits", *settings())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_exported_program_is_evaluated_as_it_is():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval()
    x = torch.rand(12, 3, 4, 4)
    with torch.no_grad():
        y = network(x).argmax(1)
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()
    attacks = ["pgd", "fmn", make("attack", "square", eps=0.02, queries=5)]
    found, expected = (evaluate(model, x, y, attacks, eps=0.02).held for model in (exported, network))
    for name, held in expected.items():
        assert torch.equal(found[name], held)
