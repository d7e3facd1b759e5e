"""A small vision transformer searched by every method: heads, neurons and weights; as recipes that stop and go on with the same bits."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny_transformers import digits, tiny_vit

from s2ap_ext import S2AP, densify
from s2ap_ext.nn import pruned_layers, sparsity_table
from s2ap_ext.parts import make
from s2ap_ext.pipeline import RunFolder, Session, Stopped, load_recipe, new_model, open_data, prune, reproducible

SMALL = [
    "model.name=tiny_transformers:build",
    "data.train_size=64",
    "data.test_size=8",
    "attack.steps=1",
    "prune.sparsity=0.5",
    "prune.gamma=0.3",
    "prune.warmup_epochs=0",
    "prune.epochs=2",
    "prune.batch_size=32",
    "evaluate.steps=1",
    "evaluate.images_per_epoch=8",
]


@pytest.mark.parametrize("granularity", ["head", "neuron", "weight"])
@pytest.mark.parametrize("name", ["harp", "hydra", "magnitude", "movement", "random", "rst"])
def test_every_method_searches(name, granularity):
    net, method = tiny_vit(), make("method", name)
    method.sparsify(net, 0.5, generator=torch.Generator().manual_seed(0), granularity=granularity)
    layers = pruned_layers(net)
    groups = [{key: group[key] for key in ("params", "weight_decay") if key in group} for group in method.parameters(net, perturbed=True)]
    optimizer = S2AP(net, torch.optim.SGD([group for group in groups if group["params"]] or [torch.zeros(1)], lr=0.1), gamma=0.5)
    before = {layer: (layer.scores.detach().clone(), [w.detach().clone() for w in layer.masked_parameters]) for layer in layers.values()}
    flips = 0
    for epoch in range(3):

        def closure(epoch=epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(digits()), torch.arange(8))
            penalty = method.penalty(epoch)
            (loss if penalty is None else loss + penalty).backward()
            return loss

        optimizer.step(closure)
        flips += optimizer.flips
        method.after_step(net)
    method.finish(net)
    assert flips > 0
    for layer, (scores, weights) in before.items():
        assert int(layer.mask.sum()) == int(layer.kept) >= 1
        assert torch.equal(layer.scores, scores) == (name == "random")
        moved = [not torch.equal(w, given) for w, given in zip(layer.masked_parameters, weights, strict=True)]
        assert moved == [name in ("magnitude", "movement")] * len(moved)
    with torch.no_grad():
        expected = net(digits())
        assert torch.equal(densify(net)(digits()), expected)


def search(folder, how, stop=lambda: False):
    recipe = load_recipe("digits", how)
    data = open_data(recipe)
    with RunFolder.resume(folder) if folder.exists() else RunFolder.create(folder, recipe) as opened, reproducible(recipe):
        return prune(Session(recipe, data, opened, stop=stop), new_model(recipe, data))


@pytest.mark.parametrize(("method", "granularity"), [("harp", "head"), ("movement", "neuron")])
def test_recipes_that_stop_go_on(method, granularity, tmp_path):
    how = [*SMALL, f"prune.method={method}", f"prune.granularity={granularity}"]
    model = search(tmp_path / "run", how)
    assert {row.granularity for row in sparsity_table(model).rows} == {granularity, "dense"}
    count = itertools.count(1)
    with pytest.raises(Stopped):
        search(tmp_path / "stopped", how, stop=lambda: next(count) == 3)  # in the second epoch
    state = search(tmp_path / "stopped", how).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
