"""Averages of weights against their formula, and BatchNorm statistics against plain means."""

import copy

import numpy as np
import pytest
import torch
from helpers import images, small_net
from torch import nn

from s2ap_ext import S2APLinear, sparsify
from s2ap_ext.averaging import WeightAverage, reestimate_batchnorm
from s2ap_ext.nn import train_scores


def set_to(parameter, value):
    with torch.no_grad():
        parameter.copy_(value)


def walk(steps, shape=(3, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9995])
def test_the_average_is_the_formula(decay):
    layer = nn.Linear(4, 3, bias=False)
    average, points = WeightAverage(layer, decay), walk(30)
    for n, point in enumerate(points, 1):
        set_to(layer.weight, point)
        average.update()
        weights = np.array([decay ** (n - i) for i in range(1, n + 1)])
        expected = sum(w * p.double().numpy() for w, p in zip(weights, points, strict=False)) / weights.sum()
        np.testing.assert_allclose(average.state()["average/weight"].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_what_is_averaged():
    net = sparsify(small_net(), 0.9)
    train_scores(net)
    assert set(WeightAverage(net).state()) == {
        "updates",
        *(f"average/{name}" for name, p in net.named_parameters() if p.requires_grad),
    }
    assert "average/0.scores" in WeightAverage(net).state()
    assert "average/0.weight" not in WeightAverage(net).state()


def test_averages_of_half_precision_do_not_stand_still():
    layer = nn.Linear(4, 3, bias=False, dtype=torch.bfloat16)
    set_to(layer.weight, torch.ones(3, 4))
    average = WeightAverage(layer, 0.9995)
    for _ in range(2000):
        average.update()
    set_to(layer.weight, torch.full((3, 4), 2.0))
    for _ in range(500):
        average.update()
    assert average.state()["average/weight"].dtype == torch.float32
    assert average.state()["average/weight"].mean().item() == pytest.approx(1 + (1 - 0.9995**500) / (1 - 0.9995**2500), rel=1e-4)
    with average.swapped():
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(layer.weight, average.state()["average/weight"].bfloat16())


@pytest.mark.parametrize("fails", [False, True])
def test_swapped_puts_the_averages_in_and_everything_back(fails):
    net = small_net()
    average = WeightAverage(net, 0.5)
    for seed in range(3):
        for p in net.parameters():
            set_to(p, torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
        average.update()
    net(images())
    before = copy.deepcopy(net.state_dict())
    try:
        with average.swapped():
            for name, p in net.named_parameters():
                assert torch.equal(p, average.state()[f"average/{name}"])
            assert reestimate_batchnorm(net, [images(seed=1)]) == 1
            assert not torch.equal(net[1].running_mean, before["1.running_mean"])
            with pytest.raises(RuntimeError, match="within swapped"):
                average.update()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    average.update()
    assert average.updates == 4


def test_pruned_layers_follow_the_swap():
    layer = S2APLinear(4, 3, sparsity=0.5)
    average, (first, second) = WeightAverage(layer, 0.0), walk(2)
    set_to(layer.scores, first)
    average.update()
    masks = [layer.mask]
    set_to(layer.scores, second)
    masks.append(layer.mask)
    assert not torch.equal(*masks)
    with average.swapped():
        assert torch.equal(layer.mask, masks[0])
        assert torch.equal(layer.masked_weight != 0, masks[0])
    assert torch.equal(layer.mask, masks[1])
    assert torch.equal(layer.masked_weight != 0, masks[1])


def test_a_loaded_average_goes_on_to_the_same_bits():
    layer, points = nn.Linear(4, 3, bias=False), walk(6)
    whole = WeightAverage(layer, 0.9)
    for point in points[:3]:
        set_to(layer.weight, point)
        whole.update()
    state = {name: t.clone() for name, t in whole.state().items()}
    resumed = WeightAverage(layer, 0.9)
    resumed.load_state(state)
    for point in points[3:]:
        set_to(layer.weight, point)
        whole.update()
        resumed.update()
    for name, value in whole.state().items():
        assert torch.equal(resumed.state()[name], value)
    assert resumed.updates == 6


def test_bad_averages():
    layer = nn.Linear(4, 3)
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\), got"):
            WeightAverage(layer, decay)
    average = WeightAverage(layer)
    with pytest.raises(ValueError, match="only one of both has average/bias"):
        average.load_state({name: t for name, t in average.state().items() if name != "average/bias"})
    with pytest.raises(ValueError, match=r"expected average/bias of shape \(3,\), got \(4,\)"):
        average.load_state(average.state() | {"average/bias": torch.zeros(4)})


def norm_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))


def test_statistics_are_the_mean_over_the_batches():
    net = norm_net()
    for _ in range(3):
        net(torch.randn(4, 3, 8, 8))  # statistics of something else
    batches = [images(4, seed=1), images(6, seed=2), images(2, seed=3)]
    random = torch.get_rng_state()
    assert reestimate_batchnorm(net, iter(batches)) == 2
    assert torch.equal(torch.get_rng_state(), random), "dropout drew random numbers"
    means = {1: [], 5: []}
    with torch.no_grad():
        for x in batches:
            z = net[0](x)
            means[1].append((z.mean((0, 2, 3)), z.var((0, 2, 3))))
            shape = (1, -1, 1, 1)
            z = (z - z.mean((0, 2, 3)).view(shape)) / (z.var((0, 2, 3), unbiased=False).view(shape) + 1e-5).sqrt()
            z = net[4](z.relu())  # without dropout
            means[5].append((z.mean((0, 2, 3)), z.var((0, 2, 3))))
    for index, found in means.items():
        for ours, values in zip((net[index].running_mean, net[index].running_var), zip(*found, strict=True), strict=True):
            torch.testing.assert_close(ours, torch.stack(values).mean(0), rtol=1e-4, atol=1e-5)
        assert net[index].num_batches_tracked == 3
        assert net[index].momentum == 0.1


def test_frozen_and_untracked_norms_stay():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), nn.Dropout(0.5))
    net[0].eval()
    before = {name: t.clone() for name, t in net[0].state_dict().items()}
    assert reestimate_batchnorm(net, [images()]) == 1
    assert [m.training for m in net] == [False, True, True, True]
    assert all(torch.equal(t, before[name]) for name, t in net[0].state_dict().items())
    assert not torch.equal(net[1].running_mean, torch.zeros(3))
    assert reestimate_batchnorm(net.eval(), [images()]) == 0


def test_statistics_stay_where_reestimation_fails():
    net = norm_net()
    net(images())
    before = copy.deepcopy(net.state_dict())

    def failing():
        yield images(seed=1)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        reestimate_batchnorm(net, failing())
    with pytest.raises(ValueError, match="batches: expected at least one batch of images, got none"):
        reestimate_batchnorm(net, [])
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [net[1].momentum, net[5].momentum] == [0.1, 0.1]
    assert all(m.training for m in net.modules())
