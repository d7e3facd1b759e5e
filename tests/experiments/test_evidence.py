"""The page of evidence says what its data say."""

import re
from pathlib import Path

import pytest

from s2ap_ext.experiments import load_plan, summarise
from s2ap_ext.experiments.table import read_table
from s2ap_ext.experiments.words import percent

ROOT = Path(__file__).parents[2]


def summary_of(plan, file):
    return summarise(load_plan(plan), read_table(ROOT / "benchmarks/results" / file))


@pytest.mark.parametrize(
    ("plan", "file", "arms"),
    [
        ("causal", "causal-digits.csv", 8),
        ("compare", "compare-digits.csv", 6),
        ("gamma", "gamma-digits.csv", 5),
        ("policies", "policies-digits.csv", 11),
        ("policies --set prune.method=harp", "policies-harp-digits.csv", 11),
        ("policies --set prune.sparsity=0.98", "policies-98-digits.csv", 11),
        ("policies --set prune.sparsity=0.9", "policies-90-digits.csv", 11),
        ("policies --set prune.method=harp --set prune.sparsity=0.9", "policies-harp-90-digits.csv", 11),
        ("policies --set prune.method=harp --set prune.sparsity=0.98", "policies-harp-98-digits.csv", 11),
        ("policies-cifar10", "policies-cifar10-cut-down.csv", 6),
        ("flips", "flips-digits.csv", 24),
        ("flips-vit", "flips-vit-digits.csv", 20),
        ("finetune", "finetune-digits.csv", 2),
        ("compare-cifar10", "compare-cifar10-cut-down.csv", 2),
    ],
)
def test_the_table_of_a_section_is_that_of_the_rows(plan, file, arms):
    summary = summary_of(plan.partition(" ")[0], file)
    page = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    section = next(part for part in re.split("\n##+ ", page) if re.search(rf"^s2ap experiment {plan}( |$)", part, re.MULTILINE))
    assert len(summary["arms"]) == arms
    for arm in summary["arms"]:
        last, mask = arm["models"][arm["model"]], arm["models"]["pruned"]
        assert f"| {arm['arm']} | {percent(last['clean'])} | {percent(last['robust'])} | {percent(mask['robust'])} |" in section
        for name in ("lambda_max.scores", "lambda_max.weights"):
            if name in mask:
                assert "| {mean:.1f} [{low:.1f}, {high:.1f}] |".format(**mask[name]) in section


def test_what_is_said_of_the_methods():
    summary = summary_of("compare", "compare-digits.csv")
    clear = [(one["arm"], one["metric"]) for one in summary["comparisons"] if one["p_corrected"] < 0.05]
    assert clear == [("rst-s2ap", "pruned.mask_distance")]


def test_what_is_said_of_gamma():
    summary = summary_of("gamma", "gamma-digits.csv")
    assert min(one["p_corrected"] for one in summary["comparisons"]) > 0.05
    robust = [100 * arm["models"]["finetuned"]["robust"]["mean"] for arm in summary["arms"][1:]]
    assert robust == sorted(robust, reverse=True)
    assert round(robust[0] - robust[-1], 1) == 0.8


def test_what_is_said_of_the_budget_of_flips():
    summary = summary_of("flips", "flips-digits.csv")
    assert min(one["p_corrected"] for one in summary["comparisons"]) > 0.05
    robust = {one["arm"]: one for one in summary["comparisons"] if one["metric"] == "robust"}
    grid = {place: [one for arm, one in robust.items() if arm.startswith(f"{place}-0.")] for place in (80, 90, 95, 98)}
    best = {place: max(arms, key=lambda one: one["difference"]) for place, arms in grid.items()}
    assert [one["arm"] for one in best.values()] == ["80-0.0005", "90-0.001", "95-0.001", "98-0.002"]
    assert [round(100 * one["difference"], 1) for one in best.values()] == [0.1, -0.2, -0.5, -0.6]
    reach = [100 * (one["high"] - one["low"]) / 2 for one in best.values()]
    assert (round(min(reach), 1), round(max(reach), 1)) == (0.8, 3.7)
    assert [round(100 * robust[f"{place}-track"]["difference"], 1) for place in (95, 98)] == [-0.7, -1.2]


def test_what_is_said_of_the_budget_of_flips_in_a_transformer():
    summary = summary_of("flips-vit", "flips-vit-digits.csv")
    assert min(one["p_corrected"] for one in summary["comparisons"]) > 0.05
    robust = {
        one["arm"]: [round(100 * one[key], 1) for key in ("difference", "low", "high")]
        for one in summary["comparisons"]
        if one["metric"] == "robust"
    }
    assert max(robust["90-0.0005"], robust["90-0.001"], robust["90-0.002"], robust["90-0.005"]) == robust["90-0.002"] == [0.2, -3.1, 3.5]
    assert max(robust[f"80-{gamma}"] for gamma in (0.0005, 0.001, 0.002, 0.005)) == robust["80-0.0005"] == [0.1, -1.5, 1.7]
    assert (robust["95-0.0005"], robust["98-0.0005"]) == ([4.8, -4.9, 14.5], [3.8, -4.2, 11.8])
    flips = {arm["arm"]: round(100 * arm["models"]["pruned"]["flips"]["mean"], 1) for arm in summary["arms"]}
    assert (flips["95-flips"], flips["98-flips"]) == (1.6, 4.0)


def test_what_is_said_of_the_policies():
    summary = summary_of("policies", "policies-digits.csv")
    accuracies = [one for one in summary["comparisons"] if one["metric"] in ("robust", "clean", "pruned.robust")]
    assert len(accuracies) == 3 * 27
    assert min(one["p_corrected"] for one in accuracies) > 0.05
    robust = {(one["arm"], one["against"]): one for one in accuracies if one["metric"] == "robust"}
    assert round(100 * max(max(-one["low"], one["high"]) for one in robust.values()), 1) == 1.5
    momentum = robust["momentum", "plain"]
    assert [round(100 * momentum[key], 1) for key in ("difference", "low", "high")] == [0.5, 0.2, 0.8]
    assert (round(momentum["p"], 3), round(momentum["p_corrected"], 2)) == (0.009, 0.23)
    rows = read_table(ROOT / "benchmarks/results/policies-digits.csv")
    exact, skip = (
        [{k: v for k, v in row.items() if k in ("clean", "robust", "mask_distance", "flips")} for row in rows if row["arm"] == arm]
        for arm in ("exact", "skip")
    )
    assert exact == skip
    moved = {
        one["arm"]: one["p_corrected"]
        for one in summary["comparisons"]
        if (one["metric"], one["against"]) == ("pruned.mask_distance", "plain")
    }
    assert [arm for arm, p in moved.items() if p < 0.05] == ["every"]


@pytest.mark.parametrize(
    ("file", "sharpness", "reach", "moved"),
    [
        ("policies-90-digits.csv", 12, 1.2, {("every", "exact"): 0.05, ("every", "plain"): 0.05, ("late", "random"): 0.01}),
        ("policies-harp-digits.csv", 12, 1.8, {("every", "exact"): 0.01, ("every", "plain"): 0.02}),
        ("policies-98-digits.csv", 12, 2.3, {("momentum", "exact"): 0.05, ("momentum", "random"): 0.03}),
        ("policies-harp-90-digits.csv", 12, 1.2, {}),
        ("policies-harp-98-digits.csv", 12, 2.0, {("every", "plain"): 0.0, ("momentum", "plain"): 0.0}),
    ],
)
def test_what_is_said_of_the_policies_elsewhere(file, sharpness, reach, moved):
    summary = summary_of("policies", file)
    shown = {(one["metric"], one["arm"], one["against"]): one for one in summary["comparisons"] if one["p_corrected"] < 0.05}
    found = {
        (one["arm"], one["against"]): round(one["p_corrected"], 2) for one in shown.values() if one["metric"] == "pruned.mask_distance"
    }
    assert found == moved
    others = {place for place in shown if place[0] != "pruned.mask_distance"}
    of_harp = {("robust", "previous", "exact"), ("pruned.lambda_max.scores", "flips", "random")}
    assert others == (of_harp if file == "policies-harp-90-digits.csv" else set())
    robust = [one for one in summary["comparisons"] if one["metric"] == "robust"]
    assert round(100 * max(max(-one["low"], one["high"]) for one in robust), 1) == reach
    assert sum(one["metric"] == "pruned.lambda_max.scores" for one in summary["comparisons"]) == sharpness


def test_what_is_said_of_previous():
    """The one difference in accuracy that a table of the policies shows, against the tables of the digits together."""
    files = [f"policies-{name}digits.csv" for name in ("", "harp-", "98-", "90-", "harp-98-", "harp-90-")]
    robust = [[one for one in summary_of("policies", file)["comparisons"] if one["metric"] == "robust"] for file in files]
    *others, harp = [next(one for one in table if (one["arm"], one["against"]) == ("previous", "exact")) for table in robust]
    assert [round(100 * harp[key], 1) for key in ("difference", "low", "high")] == [-0.7, -0.9, -0.5]
    assert (round(harp["p"], 4), round(harp["p_corrected"], 3)) == (0.0006, 0.016)
    assert sum(map(len, robust)) == 162
    assert round(162 * harp["p"], 2) == 0.10
    assert sorted(round(100 * one["difference"], 1) for one in others)[:: len(others) - 1] == [0.1, 0.7]
    sharpness = [one for one in summary_of("policies", files[5])["comparisons"] if one["metric"] == "pruned.lambda_max.scores"]
    flips = next(one for one in sharpness if (one["arm"], one["against"]) == ("flips", "random"))
    assert [round(flips[key], 2) for key in ("difference", "low", "high")] == [-0.14, -0.20, -0.07]
    every = next(one for one in robust[4] if (one["arm"], one["against"]) == ("every", "plain"))
    assert [round(100 * every[key], 1) for key in ("difference", "low", "high")] == [-1.1, -1.5, -0.6]
    assert (round(every["p"], 3), round(every["p_corrected"], 2)) == (0.003, 0.08)


def test_what_is_said_of_the_policies_on_cifar10():
    comparisons = summary_of("policies-cifar10", "policies-cifar10-cut-down.csv")["comparisons"]
    assert min(one["p_corrected"] for one in comparisons) > 0.05
    robust = {(one["arm"], one["against"]): one for one in comparisons if one["metric"] == "robust"}
    assert round(100 * max(max(-one["low"], one["high"]) for one in robust.values()), 1) == 2.0
    flips = robust["flips", "plain"]
    assert [round(100 * flips[key], 1) for key in ("difference", "low", "high")] == [-0.5, -0.7, -0.3]
    assert (round(flips["p"], 2), round(flips["p_corrected"], 2)) == (0.01, 0.16)


def test_what_is_said_of_finetuning():
    (robust,) = [one for one in summary_of("finetune", "finetune-digits.csv")["comparisons"] if one["metric"] == "robust"]
    assert robust["p"] > 0.05
    assert round(100 * max(-robust["low"], robust["high"]), 1) == 0.5


def test_what_is_said_of_cifar10():
    assert min(one["p"] for one in summary_of("compare-cifar10", "compare-cifar10-cut-down.csv")["comparisons"]) > 0.05


def test_what_is_said_of_the_controls():
    summary = summary_of("causal", "causal-digits.csv")
    last = [one for one in summary["comparisons"] if one["metric"] == "robust"]
    assert len(last) == 13
    assert min(one["p_corrected"] for one in last) > 0.05
    below = [one for one in summary["comparisons"] if one["metric"] == "pruned.robust" and one["p_corrected"] < 0.02]
    assert [(one["arm"], round(100 * one["difference"], 1)) for one in below] == [("descent", -3.7)] * 2
