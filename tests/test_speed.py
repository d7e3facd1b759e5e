"""The measurements behind `s2ap profile`."""

import dataclasses

import pytest
import torch
from torch import nn

from s2ap_ext import backend, sparsify, speed
from s2ap_ext.engine.choice import lanes
from s2ap_ext.nn import cost

pytestmark = pytest.mark.skipif(backend().cpu != "C++", reason="without the kernels there is nothing to compare")


def measurements_that_follow(rates, monkeypatch):
    def training(name, layer, x):
        density = float((layer.weight != 0).float().mean())
        shape = cost.Shape.from_sizes(tuple(layer.weight.shape), x, layer.stride)
        ms = 2e3 * cost.seconds(cost.dense_terms(shape), rates), 2e3 * cost.seconds(cost.sparse_terms(shape, density), rates)
        return speed.Measured(name, tuple(layer.weight.shape), x, density, *ms, *ms, "sparse")

    def inference(layer, batch, size):
        shape, density = speed._shape(layer, batch, size), float((layer.weight != 0).float().mean())
        wanted = size * size if batch == 1 else batch
        positions = (size - 1) * (size + 2) + size  # of the padded plane, up to the last output
        vectors = -(-positions // lanes()) if batch == 1 else -(-batch // lanes())
        terms = cost.sparse_terms(shape, density, blocks=batch > 1, computed=vectors * lanes() / wanted)
        return cost.seconds(cost.dense_terms(shape), rates), cost.seconds(terms, rates)

    monkeypatch.setattr(speed, "_measure", training)
    monkeypatch.setattr(speed, "_measure_inference", inference)


def test_calibration_finds_the_rates_that_the_measurements_follow(monkeypatch):
    rates = cost.Rates(dense=80.0, weights=3.0, dense_activations=5.0, sparse=20.0, entries=0.5, activations=3.0, blocks=6.0)
    measurements_that_follow(rates, monkeypatch)
    assert dataclasses.asdict(speed.calibrate()) == pytest.approx(dataclasses.asdict(rates))


def test_calibration_takes_what_costs_nothing_for_free(monkeypatch):
    measurements_that_follow(cost.Rates(weights=1e9), monkeypatch)
    got = speed.calibrate()
    assert got.weights == 1000
    assert got.dense == pytest.approx(cost.Rates().dense)


def test_calibration_of_measurements_without_sense(monkeypatch):
    measurements_that_follow(cost.Rates(dense=1e9), monkeypatch)
    with pytest.raises(ValueError, match="calibrate: the measurements contradict each other"):
        speed.calibrate()


def test_profile_measures_the_convolutions_at_their_sizes():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, padding="valid"), nn.Conv2d(8, 8, 3, padding="same"), nn.Flatten(), nn.Linear(8 * 49, 2))
    sparsify(net, 0.75, exclude="0")
    net[1].eval()
    rows = speed.profile(net, torch.rand(9, 3, 15, 15))
    assert [(row.layer, row.weight, row.input) for row in rows] == [("0", (8, 3, 3, 3), (9, 3, 15, 15)), ("1", (8, 8, 3, 3), (9, 8, 7, 7))]
    assert [row.density for row in rows] == [1, 0.25]
    assert all(min(row.dense_ms, row.sparse_ms, row.predicted_dense_ms, row.predicted_sparse_ms) > 0 for row in rows)
    assert [module.training for module in net] == [True, False, True, True]
    with pytest.raises(ValueError, match="model: expected a convolution, found none"):
        speed.profile(nn.Linear(2, 2), torch.rand(1, 2))
