"""The networks of torchvision, timm and transformers by name, and what a checkpoint that names one may do."""

import hashlib
import importlib.machinery
import json
import pickle
import shutil
import socket
import sys
import types

import pytest
import torch
from command_line import refused
from helpers import assert_same_state
from torch import nn

from s2ap_ext import parts
from s2ap_ext.models import build_model
from s2ap_ext.pipeline import check_prunable, checkpoint, load_model, load_recipe, open_data
from s2ap_ext.pipeline.model_file import new_model, save_model, start_from
from s2ap_ext.pipeline.recipe import to_table

TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "patch_size": 4}


class Small(nn.Sequential):
    """What the stand-ins for torchvision and timm build."""

    def __init__(self, classes, channels=3):
        super().__init__(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, classes)


def module(name, **contents):
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__dict__.update(contents)
    return made


@pytest.fixture
def torchvision(monkeypatch, tmp_path):
    """A stand-in with the functions that are used, as torchvision documents them, and weights for 5 classes. Gives what was asked for."""
    asked = []
    file = tmp_path / "weights"
    torch.save(Small(5).state_dict(), file)
    named = tmp_path / f"small-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth"
    file.rename(named)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def get_model(name, *, weights, num_classes, **options):
        asked.append((name, weights, options))
        return Small(num_classes)

    weights = types.SimpleNamespace(DEFAULT=types.SimpleNamespace(url=named.as_uri()))
    models = module("torchvision.models", get_model=get_model, get_model_weights=lambda name: weights)
    models.list_models = lambda module=None: ["googlenet", "small", "vit_b_16"] if module is models else ["raft_small"]
    for made in (module("torchvision", models=models), models):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    return asked


@pytest.fixture
def timm(monkeypatch):
    """A stand-in with the functions that are used, as timm documents them. Gives what was asked for."""
    asked = []

    def create_model(name, *, pretrained, num_classes, in_chans, **options):
        asked.append((name, pretrained, options))
        return Small(num_classes, in_chans)

    def get_pretrained_cfg(name):
        fixed = name.startswith("vit")
        return types.SimpleNamespace(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), fixed_input_size=fixed)

    names = {"is_model": lambda name: name.partition(".")[0] in ("small", "vit_tiny"), "list_models": lambda: ["small", "vit_tiny"]}
    monkeypatch.setitem(sys.modules, "timm", module("timm", create_model=create_model, get_pretrained_cfg=get_pretrained_cfg, **names))
    return asked


@pytest.fixture
def nothing_outside(monkeypatch):
    """The test fails where something is downloaded, or read as a file of transformers."""

    def refuse(*args, **kwargs):
        pytest.fail("something outside was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    transformers = pytest.importorskip("transformers")
    for name in ("AutoConfig", "AutoModelForImageClassification"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", refuse)


# ------------------------------------------------------------------------------------------------------------ torchvision and timm


def test_torchvision(torchvision):
    model = build_model("torchvision:small", num_classes=7, image_size=(8, 8))
    assert torchvision == [("small", None, {})]
    x = torch.rand(2, 3, 8, 8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(model(x), model.model((x - mean[:, None, None]) / std[:, None, None]))
    build_model("torchvision:vit_b_16", num_classes=7, image_size=(64, 64))
    build_model("torchvision:googlenet", num_classes=7)
    assert [options for _, _, options in torchvision[1:]] == [{"image_size": 64}, {"aux_logits": False, "init_weights": True}]


@pytest.mark.parametrize("classes", [5, 3])
def test_pretrained_torchvision(torchvision, classes, tmp_path):
    part = parts.make("model", "torchvision:small", pretrained=True)
    assert part.count_parameters(num_classes=classes, in_channels=3) == 4 * 27 + 4 + 4 * classes + classes
    assert not (tmp_path / "hub").exists(), "counting needs no weights"
    model = part.build(num_classes=classes, in_channels=3).model
    (file,) = tmp_path.glob("*.pth")
    weights = torch.load(file, weights_only=True)
    assert torch.equal(model[0].weight, weights["0.weight"])
    assert torch.equal(model.head.weight, weights["head.weight"]) == (classes == 5)
    assert model.head.weight.shape == (classes, 4)


def test_pretrained_weights_that_do_not_fit(torchvision, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: {"0.weight": torch.zeros(4, 3, 3, 3)})
    with pytest.raises(ValueError, match=r"model torchvision:small: its pretrained weights do not fit: 0\.bias, head\.weight, head\.bias"):
        build_model("torchvision:small", num_classes=7, pretrained=True)


def test_timm(timm):
    model = build_model("timm:small.some_tag", num_classes=7, in_channels=1, pretrained=True)
    assert timm == [("small.some_tag", True, {})]
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(model(x), model.model((x - 0.5) / 0.25))
    build_model("timm:vit_tiny", num_classes=7, image_size=(32, 48))
    assert timm[1:] == [("vit_tiny", False, {"img_size": (32, 48)})]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torchvision:smal", {}, "model torchvision:smal: the package has no smal; did you mean small"),
        ("torchvision:raft_small", {}, "the package has no raft_small"),
        ("torchvision:small", {"in_channels": 1}, "take images of 3 channels, got 1"),
        ("torchvision:vit_b_16", {"image_size": (8, 16)}, "expected square images, got 8x16"),
        ("torchvision:small", {"width": 3}, "unknown key width; it takes pretrained"),
        ("timm:smal", {}, "model timm:smal: the package has no smal; did you mean small"),
        ("timm:hf-hub:a/b", {}, "model: expected one of"),
        ("torchvision:os.path", {}, "model: expected one of"),
    ],
)
@pytest.mark.usefixtures("torchvision", "timm")
def test_names_and_images_that_do_not_fit(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, **{"num_classes": 3, **options})


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("torchvision:x", "torchvision", "torchvision"), ("timm:x", "timm", "timm"), ("hf:vit", "transformers", "hf")],
)
def test_a_missing_package_is_told_with_the_command_that_installs_it(name, package, extra, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, "run", "digits", "--set", f"model.name={name}")
    assert f'{package} missing; install with: pip install "s2ap_ext[{extra}]"' in said
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_cannot_be_imported(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"timm is installed and cannot be imported \(RuntimeError: operator torchvision::nms"):
        build_model("timm:small", num_classes=3)


def test_what_a_package_raises_is_told_with_the_images(timm, monkeypatch):
    def create_model(name, **options):
        raise ZeroDivisionError("by 0")

    monkeypatch.setattr(sys.modules["timm"], "create_model", create_model)
    with pytest.raises(ValueError, match=r"timm:small: cannot be built for 3 channels of 8x9 pixels \(ZeroDivisionError: by 0\)"):
        build_model("timm:small", num_classes=3, image_size=(8, 9))


# ---------------------------------------------------------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pretrained ViT for images of 8x8 with 1 channel and 5 classes, as the hub has its networks."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    torch.manual_seed(0)
    config = transformers.ViTConfig(**TINY, image_size=8, num_channels=1, num_labels=5)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.25], "image_std": [0.125]}))
    return folder


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("vit", TINY),
        ("deit", TINY),
        ("swin", {"embed_dim": 4, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2, "patch_size": 2}),
        ("convnext", {"num_stages": 2, "hidden_sizes": [4, 4], "depths": [1, 1]}),
        ("resnet", {"embedding_size": 4, "hidden_sizes": [4, 4], "depths": [1, 1]}),
    ],
)
def test_architectures_of_transformers(name, config):
    pytest.importorskip("transformers")
    part = parts.make("model", f"hf:{name}", config=json.dumps(config))
    assert part.outside() == ""
    sizes = {"num_classes": 7, "in_channels": 3, "image_size": (16, 16)}
    model = part.build(**sizes).eval()
    assert part.count_parameters(**sizes) == sum(p.numel() for p in model.parameters())
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model(x), model.model(2 * x - 1).logits)
    assert model(x).shape == (2, 7)
    again = build_model(f"hf:{name}", config=json.dumps(config), **sizes, seed=1)
    assert_same_state(again, build_model(f"hf:{name}", config=json.dumps(config), **sizes, seed=1))


def test_pretrained_weights_of_a_folder(folder):
    transformers = pytest.importorskip("transformers")
    original = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    sizes = {"in_channels": 1, "image_size": (8, 8)}
    model = build_model(f"hf:{folder}", num_classes=5, pretrained=True, **sizes).eval()
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(model(x), original((x - 0.25) / 0.125).logits)
    other = build_model(f"hf:{folder}", num_classes=3, pretrained=True, **sizes)
    assert other(x).shape == (2, 3)
    assert torch.equal(other.model.vit.embeddings.position_embeddings, original.vit.embeddings.position_embeddings)
    fresh = build_model(f"hf:{folder}", num_classes=5, **sizes)
    assert not torch.equal(fresh.model.classifier.weight, original.classifier.weight)
    with pytest.raises(ValueError, match=r"its pretrained weights do not fit: classifier\.bias, .*position_embeddings"):
        build_model(f"hf:{folder}", num_classes=3, in_channels=1, image_size=(16, 16), pretrained=True)


def test_weights_are_never_read_from_a_pickle(folder, tmp_path):
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self):
            return (touched.write_text, ("",))

    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text((folder / "config.json").read_text())
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(OSError, match=r"safetensors"):
        build_model(f"hf:{copy}", num_classes=5, in_channels=1, image_size=(8, 8), pretrained=True)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hf:vitt", {}, "hf:vitt: expected an architecture such as vit, or owner/name, got 'vitt'; did you mean vit"),
        ("hf:bert", {}, "expected an architecture such as vit"),
        ("hf:timm_wrapper", {}, "expected an architecture such as vit"),
        ("hf:vit", {"config": "{"}, "config: not JSON"),
        ("hf:vit", {"config": "[" * 10**5}, "config: not JSON"),
        ("hf:vit", {"config": "[1]"}, r"config: expected a JSON object, got \[1\]"),
        ("hf:vit", {"config": '{"layers": 3}'}, "config: unknown key layers"),
        ("hf:vit", {"config": '{"hidden_size": "x"}'}, "cannot be built for 3 channels of 16x16 pixels"),
        ("hf:vit", {"config": '{"hidden_size": 10000000}'}, r"config: hidden_size: expected a number up to 1,000,000, got 10000000"),
        ("hf:vit", {"config": '{"_attn_implementation": "owner/kernel"}'}, "_attn_implementation says what is loaded"),
        ("hf:vit", {"config": '{"attn_implementation": "owner/kernel"}'}, "attn_implementation says what is loaded"),
        ("hf:vit", {"config": '{"auto_map": {}}'}, "auto_map says what is loaded"),
        ("hf:clip", {"config": '{"vision_config": {"auto_map": {}}}'}, "auto_map says what is loaded"),
        ("hf:vit", {"config": '{"backbone": "resnet"}'}, "backbone says what is loaded"),
        ("hf:vit", {"config": '{"model_type": "timm_wrapper"}'}, "expected an architecture such as vit"),
        ("hf:vit", {"config": '{"model_type": ["vit"]}'}, "expected an architecture such as vit"),
        ("hf:vit", {"pretrained": True}, "pretrained: an architecture by itself has no weights"),
    ],
)
@pytest.mark.usefixtures("nothing_outside")
def test_configurations_that_cannot_be_used(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, num_classes=3, image_size=(16, 16), **options)


# ---------------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_a_folders_network_needs_the_folder_no_more(folder, tmp_path, request):
    path = tmp_path / "dense.safetensors"
    here = shutil.copytree(folder, tmp_path / "tiny")
    recipe = load_recipe("digits", [f"model.name=hf:{here}", "model.pretrained=true", 'model.config={"hidden_dropout_prob": 0.5}'])
    data = open_data(recipe)
    check_prunable(recipe, data)
    model = new_model(recipe, data)
    shutil.rmtree(here)  # after the start of a run, which then saves its model
    save_model(path, model, "dense", recipe, "0", data)
    assert start_from(recipe, "prune", path, data).model == recipe.model
    request.getfixturevalue("nothing_outside")
    again, made_by, _ = load_model(path, data=data)
    assert_same_state(again, model)
    assert torch.equal(again.normalize.mean, torch.tensor([[[0.25]]]))
    assert not made_by.model.pretrained
    config = json.loads(made_by.model.config)
    assert config.items() >= {**TINY, "model_type": "vit", "hidden_dropout_prob": 0.5}.items()
    assert again.model.config.hidden_dropout_prob == 0.5


@pytest.mark.parametrize(("name", "fixture"), [("torchvision:small", "torchvision"), ("timm:small.tag", "timm")])
def test_a_checkpoint_of_a_packages_network_holds_no_wish_for_weights(name, fixture, tmp_path, request, monkeypatch):
    asked = request.getfixturevalue(fixture)
    recipe = load_recipe("digits", [f"model.name={name}", "model.pretrained=true"])
    part = recipe.model.make()
    model = part.build(num_classes=10, in_channels=3, image_size=(8, 8))
    data = open_data(recipe)
    monkeypatch.setattr(type(data), "shape", (3, 8, 8))
    save_model(tmp_path / "dense.safetensors", model, "dense", recipe, "0", data)
    request.getfixturevalue("nothing_outside")
    asked.clear()
    assert_same_state(load_model(tmp_path / "dense.safetensors")[0], model)
    assert [weights for _, weights, _ in asked] == [asked[0][1]] * 2
    assert asked[0][1] in (None, False)


def forged(path, tensors=None, **model):
    """A checkpoint that somebody wrote by hand."""
    table = to_table(load_recipe("digits")) | {"model": model}
    about = {"model": "dense", "recipe": table, "shape": {"num_classes": 10, "in_channels": 1, "image_size": [8, 8]}, "run": "0"}
    checkpoint.save(path, tensors or {"a": torch.zeros(3)}, about)
    return path


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "hf:owner/name"}, "its model needs the configuration of owner/name, and a checkpoint does not choose what is read"),
        ({"name": "hf:/etc/x"}, "its model needs the configuration of /etc/x"),
        ({"name": "hf:owner/name", "config": '{"model_type": "vit"}', "pretrained": True}, "needs pretrained weights of owner/name"),
        ({"name": "torchvision:small", "pretrained": True}, "needs pretrained weights of small"),
        ({"name": "timm:small", "pretrained": True}, "needs pretrained weights of small"),
        ({"name": "timm:hf-hub:a/b"}, "expected one of"),
        ({"name": "hf:vit", "config": '{"auto_map": {"AutoConfig": "a/b--c.D"}}'}, "auto_map says what is loaded"),
        ({"name": "hf:vit", "config": '{"num_hidden_layers": 1000000}'}, "does not fit the model: it has more than 1,006 parameters"),
        ({"name": "hf:vit", "config": '{"hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1}'}, "does not fit the model"),
    ],
)
@pytest.mark.usefixtures("torchvision", "timm", "nothing_outside")
def test_a_forged_checkpoint_chooses_nothing_that_is_read(model, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_model(forged(tmp_path / "dense.safetensors", **model))


def test_a_librarys_name_is_never_one_of_a_module(monkeypatch):
    """``timm:create_model`` has the form of a name in a module of the user's own."""
    monkeypatch.setitem(sys.modules, "timm", None)
    for name in ("timm:create_model", "torchvision:models", "hf:pipeline"):
        assert parts.find("model", name).pattern != parts.OWN
    for name in ("timm:create_model", "hf:pipeline"):
        with pytest.raises(ValueError, match="data: expected one of"):
            parts.find("data", name)
    assert parts.find("data", "torchvision:models").pattern != parts.OWN
