"""Networks of the sparse engine as files."""

import json
import pickle

import pytest
import torch
from engine_models import MODELS, all_sparse, gradient, images, pruned

from s2ap_ext import _files
from s2ap_ext.engine import SparseNetwork, compile_sparse


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load(name, tmp_path):
    model, size = pruned(name)
    network = compile_sparse(model, images(1, size), choose=all_sparse)
    network.save(tmp_path / "x.safetensors")
    loaded = SparseNetwork.load(tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert repr(loaded) == repr(network)
    for n in (3, 13):
        direction = torch.ones_like(network(images(n, size)))
        a, b = (gradient(net, images(n, size), direction) for net in (network, loaded))
        assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))
    with pytest.raises(RuntimeError, match="loaded from a file"):
        loaded.refresh()


def test_files_that_are_not_networks(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        SparseNetwork.load(tmp_path / "none.safetensors")
    path = tmp_path / "x.safetensors"
    _files.save(path, {"a": torch.ones(2)}, {"model": "dense"})
    with pytest.raises(ValueError, match=r"x.safetensors: not a file that SparseNetwork.save wrote"):
        SparseNetwork.load(path)

    model, size = pruned("digits_cnn")
    compile_sparse(model, images(1, size), choose=all_sparse).save(path)
    tensors, about = _files.load(path)
    _files.save(path, tensors, {**about, "version": 99})
    with pytest.raises(ValueError, match="of version 99"):
        SparseNetwork.load(path)

    def damaged(tensors, about):
        _files.save(path, tensors, about)
        with pytest.raises(ValueError, match="damaged"):
            SparseNetwork.load(path)

    columns, starts = tensors["1.columns"].clone(), tensors["1.starts"]
    row = int(starts.diff().argmax())
    columns[starts[row]] = 1 << 30  # a kernel that believed it would read far outside
    damaged(tensors | {"1.columns": columns}, about)
    order = tensors["1.order"].clone()
    order[0] = order[1]
    damaged(tensors | {"1.order": order}, about)
    damaged({name: t for name, t in tensors.items() if name != "0.values"}, about)
    damaged(tensors, {**about, "steps": [{**about["steps"][0], "step": "Part"}]})
    damaged(tensors, {**about, "steps": json.loads(json.dumps(about["steps"]).replace('"out"', '"in"'))})


def test_networks_are_not_pickled():
    model, size = pruned("digits_cnn")
    network = compile_sparse(model, images(1, size))
    with pytest.raises(TypeError, match=r"use save\(path\)"):
        pickle.dumps(network)
    assert network.state_dict() == {}


def test_files_of_transformers_whose_contents_do_not_belong_together(tmp_path):
    path = tmp_path / "x.safetensors"
    model, size = pruned("vit")
    compile_sparse(model, images(1, size), choose=all_sparse).save(path)
    tensors, about = _files.load(path)

    def damaged(message, changed=None, **step):
        name, settings = next(iter(step.items())) if step else ("", {})
        steps = [{**described, **(settings if described["step"] == name else {})} for described in about["steps"]]
        _files.save(path, tensors | (changed or {}), {**about, "steps": steps})
        with pytest.raises(ValueError, match=f"damaged.*{message}"):
            SparseNetwork.load(path)

    damaged("heads: expected a divisor of a third of 48, got 5", Attention={"heads": 5})
    damaged("kind: expected one of gelu, gelu_tanh, silu, got 'tan'", Activation={"kind": "tan"})
    damaged("position: expected one of 21, got 21", Select={"position": 21})
    damaged("eps: expected float, got -1.0", LayerNorm={"eps": -1.0})
    damaged("weights: expected Constant weights", Shift={"weights": 0})
    (token, *_) = [name for name in tensors if name.endswith(".values") and tensors[name].shape == (16, 1, 1)]
    damaged(r"values: expected finite float32 numbers of shape \(16, 1, 1\)", {token: torch.ones(16, 1, 2)})
