"""Gradients of the pruned weights in a random share of the channels: unbiased, exact at the kept weights, off by default."""

import pytest
import torch
from torch import nn

from s2ap_ext import backend, sparsify
from s2ap_ext.nn import cost, dense_kernels, pruned_layers, sampled_gradients, train_scores
from s2ap_ext.pipeline import RunFolder, Session, load_recipe, new_model, open_data, prune, reproducible

needs_kernels = pytest.mark.skipif(backend().cpu != "C++", reason="without the kernels layers are dense")
X = torch.rand(9, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def always_sparse(monkeypatch):
    monkeypatch.setattr(cost, "is_faster_sparse", lambda shape, density: True)


def net():
    torch.manual_seed(0)
    return train_scores(sparsify(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2)), 0.8))


def score_gradients(model):
    model.zero_grad()
    model(X).square().sum().backward()
    return [layer.scores.grad.clone() for layer in pruned_layers(model).values()]


@needs_kernels
@pytest.mark.usefixtures("always_sparse")
def test_one_channel_at_a_time_adds_up_to_the_exact_gradient(monkeypatch):
    model = net()
    exact = score_gradients(model)
    masks = [layer.mask for layer in pruned_layers(model).values()]
    for number, layer in enumerate(pruned_layers(model).values()):
        total, channels = torch.zeros_like(layer.scores), len(layer.weight)
        for channel in range(channels):
            order = [channel, *(c for c in range(channels) if c != channel)]
            monkeypatch.setattr(torch, "randperm", lambda n, order=order, **_: torch.tensor([c for c in order if c < n]))
            with sampled_gradients(model, 1e-3):  # one channel
                got = score_gradients(model)[number]
            kept = masks[number]
            torch.testing.assert_close(got[kept], exact[number][kept], rtol=1e-4, atol=1e-5)
            others = torch.arange(channels) != channel
            assert not got[others][~kept[others]].any()
            total += got
        torch.testing.assert_close(total / channels, exact[number], rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.usefixtures("always_sparse")
def test_the_channels_are_drawn_by_the_generator_and_forgotten():
    model = net()
    with sampled_gradients(model, 0.5, generator=torch.Generator().manual_seed(3)):
        one = score_gradients(model)
        drawn = [layer.mask_state.sampled_channels for layer in pruned_layers(model).values()]
    assert [len(channels) for channels in drawn] == [3, 2]
    with sampled_gradients(model, 0.5, generator=torch.Generator().manual_seed(3)):
        two = score_gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(layer.mask_state.sampled_channels is None for layer in pruned_layers(model).values())


@pytest.mark.usefixtures("always_sparse")
def test_all_channels_and_dense_layers_are_exact():
    model = net()
    exact = score_gradients(model)
    with sampled_gradients(model, 1.0):
        assert all(torch.equal(a, b) for a, b in zip(score_gradients(model), exact, strict=True))
    with dense_kernels():
        exact = score_gradients(model)
        with sampled_gradients(model, 0.2):
            assert all(torch.equal(a, b) for a, b in zip(score_gradients(model), exact, strict=True))


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan")])
def test_shares_out_of_range(share):
    with pytest.raises(ValueError, match="share: expected a number above 0 and up to 1, got"), sampled_gradients(net(), share):
        pass


@needs_kernels
@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("ascent", ["exact", "reuse"])
def test_a_search_finds_another_mask_and_the_same_again(ascent, tmp_path):
    small = [
        "model.width=4",
        "data.train_size=64",
        "data.test_size=16",
        "attack.steps=1",
        "evaluate.images_per_epoch=8",
        *(f"prune.{key}" for key in ("epochs=2", "batch_size=32", "warmup_epochs=0", f"ascent={ascent}")),
    ]

    def search(name, *overrides):
        recipe = load_recipe("digits", [*small, *overrides])
        data = open_data(recipe)
        with RunFolder.create(tmp_path / name, recipe) as folder, reproducible(recipe):
            model = prune(Session(recipe, data, folder), new_model(recipe, data))
        return torch.cat([layer.scores.detach().flatten() for layer in pruned_layers(model).values()])

    exact, one, two = search("exact"), search("one", "prune.sampled_gradients=0.25"), search("two", "prune.sampled_gradients=0.25")
    assert torch.equal(one, two)
    assert not torch.equal(one, exact)
