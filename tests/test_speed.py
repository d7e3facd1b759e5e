"""The measurements behind `s2ap profile`."""

import pytest
import torch
from torch import nn

from s2ap_ext import backend, sparsify, speed
from s2ap_ext.nn import cost

pytestmark = pytest.mark.skipif(backend().cpu != "C++", reason="without the kernels there is nothing to compare")


def test_calibration_finds_the_rates_that_the_measurements_follow(monkeypatch):
    rates = cost.Rates(dense=80.0, sparse=20.0, activations=3.0)

    def measured(name, layer, x):
        weight, density = tuple(layer.weight.shape), float((layer.weight != 0).float().mean())
        shape = cost.Shape.from_sizes(weight, x, layer.stride)
        ms = 2e3 * cost.dense_seconds(shape, rates), 2e3 * cost.sparse_seconds(shape, density, rates)
        return speed.Measured(name, weight, x, density, *ms, *ms, "sparse")

    monkeypatch.setattr(speed, "_measure", measured)
    got = speed.calibrate()
    assert got.dense == pytest.approx(80)
    assert got.sparse == pytest.approx(20)
    assert got.activations == pytest.approx(3)


def test_profile_measures_the_convolutions_at_their_sizes():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, padding="valid"), nn.Conv2d(8, 8, 3, padding="same"), nn.Flatten(), nn.Linear(8 * 49, 2))
    sparsify(net, 0.75, exclude="0")
    net.train()
    rows = speed.profile(net, torch.rand(9, 3, 15, 15))
    assert [(row.layer, row.weight, row.input) for row in rows] == [("0", (8, 3, 3, 3), (9, 3, 15, 15)), ("1", (8, 8, 3, 3), (9, 8, 7, 7))]
    assert [row.density for row in rows] == [1, 0.25]
    assert all(min(row.dense_ms, row.sparse_ms, row.predicted_dense_ms, row.predicted_sparse_ms) > 0 for row in rows)
    assert net.training
    with pytest.raises(ValueError, match="model: expected a convolution, found none"):
        speed.profile(nn.Linear(2, 2), torch.rand(1, 2))
