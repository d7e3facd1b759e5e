"""Distances of masks, worked by hand."""

import pytest
import torch
from helpers import small_net

from s2ap_ext import analysis, sparsify


def masks(*rows):
    return {f"layer{i}": torch.tensor(row, dtype=torch.bool) for i, row in enumerate(rows)}


A, B = masks([1, 1, 0, 0], [1, 0]), masks([1, 0, 1, 0], [1, 0])


def test_distances_by_hand():
    assert analysis.mask_distance(A, B) == pytest.approx(2 / 6)
    assert analysis.flip_rate(A, B) == pytest.approx(2 / 3)
    assert analysis.jaccard(A, B) == pytest.approx(2 / 4)
    assert analysis.mask_distance(A, A) == analysis.flip_rate(B, B) == 0
    assert analysis.jaccard(A, A) == analysis.jaccard(masks([0, 0]), masks([0, 0])) == 1
    assert analysis.by_layer(analysis.jaccard, A, B) == {"layer0": pytest.approx(1 / 3), "layer1": 1.0}
    assert analysis.by_layer(analysis.mask_distance, A, B) == {"layer0": 0.5, "layer1": 0.0}


def test_churn_counts_what_comes_back():
    there, away = masks([1, 0, 0]), masks([0, 1, 0])
    assert analysis.churn([there, away]) == 0  # the second entry has never been kept before
    assert analysis.churn([there, away, there]) == 1
    assert analysis.churn([there, away, there, away]) == 2
    assert analysis.churn([there, there, there]) == 0


def test_overlap_of_three_masks_and_of_chance():
    c = masks([0, 0, 1, 1], [1, 0])
    pairs = [analysis.jaccard(A, B), analysis.jaccard(A, c), analysis.jaccard(B, c)]
    assert analysis.overlap([A, B, c]) == pytest.approx(sum(pairs) / 3)
    both = 4 * 0.5 * 0.5 + 2 * 0.5 * 0.5
    assert analysis.chance_overlap([A, B]) == pytest.approx(both / (4 * 0.75 + 2 * 0.75))


def test_chance_is_what_random_masks_reach():
    generator = torch.Generator().manual_seed(0)
    random = [{"layer": torch.rand(200_000, generator=generator) < density} for density in (0.1, 0.3)]
    assert analysis.overlap(random) == pytest.approx(analysis.chance_overlap(random), rel=0.02)


def test_masks_of_models():
    net = sparsify(small_net(), 0.9)
    before = analysis.layer_masks(net)
    with torch.no_grad():
        net[3].scores.copy_(torch.randn_like(net[3].scores))
    changed = int((before["3"] != net[3].mask).sum())
    assert changed > 0
    assert analysis.mask_distance(before, net) == pytest.approx(changed / sum(m.numel() for m in before.values()))


@pytest.mark.parametrize("measure", [analysis.mask_distance, analysis.flip_rate, analysis.jaccard, lambda a, b: analysis.churn([a, b])])
def test_masks_that_do_not_match(measure):
    with pytest.raises(ValueError, match="only one has \\['layer1'\\]"):
        measure(masks([1], [1]), masks([1]))
    with pytest.raises(ValueError, match=r"layer layer0 has shape \(2,\) in one and \(1,\) in the other"):
        measure(masks([1, 0]), masks([1]))


def test_too_few_masks():
    with pytest.raises(ValueError, match="expected at least two to compare, got 1"):
        analysis.overlap([A])
    with pytest.raises(ValueError, match="expected at least one, got none"):
        analysis.churn([])
