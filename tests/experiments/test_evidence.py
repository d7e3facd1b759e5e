"""The page of evidence says what its data say."""

from pathlib import Path

from s2ap_ext.experiments import load_plan, summarise
from s2ap_ext.experiments.table import read_table
from s2ap_ext.experiments.words import percent

ROOT = Path(__file__).parents[2]


def test_the_table_of_the_controls_is_that_of_the_rows():
    summary = summarise(load_plan("causal"), read_table(ROOT / "benchmarks/results/causal-digits.csv"))
    page = (ROOT / "docs/evidence.md").read_text(encoding="utf-8")
    assert len(summary["arms"]) == 8
    for arm in summary["arms"]:
        last, mask = arm["models"][arm["model"]], arm["models"]["pruned"]
        assert f"| {arm['arm']} | {percent(last['clean'])} | {percent(last['robust'])} | {percent(mask['robust'])} |" in page
    last = [one for one in summary["comparisons"] if one["metric"] == "robust"]
    assert len(last) == 13
    assert min(one["p_corrected"] for one in last) > 0.05
    below = [one for one in summary["comparisons"] if one["metric"] == "pruned.robust" and one["p_corrected"] < 0.02]
    assert [(one["arm"], round(100 * one["difference"], 1)) for one in below] == [("descent", -3.7)] * 2
