"""The sentences."""

from report_folders import RESULTS, ROWS, make_run
from scipy.stats import binomtest

from s2ap_ext.report import read, verdict
from s2ap_ext.report.verdict import verdict_of_runs


def test_the_verdict_on_a_run():
    expected = binomtest(79, 100).proportion_ci(method="wilson")
    assert verdict(RESULTS) == (
        f"At 90.0 % sparsity the finetuned model has 79.0 % robust accuracy (95 % interval {100 * expected.low:.1f} to "
        f"{100 * expected.high:.1f}), 1.0 points below the dense one, which 100 test images do not tell from no difference; its clean "
        "accuracy is 94.0 %, 1.0 points below the dense one's."
    )
    far = [ROWS[0], ROWS[2] | {"robust": 0.3, "clean": 0.95}]
    assert "50.0 points below the dense one, more than chance explains on 100 test images" in verdict(RESULTS | {"rows": far})
    assert "its clean accuracy is 95.0 %, as much as the dense one's." in verdict(RESULTS | {"rows": far})
    assert verdict(RESULTS | {"rows": ROWS[:1]}).startswith("The dense model has 80.0 % robust accuracy (95 % interval 71.1 to 86.7)")


def test_the_verdict_on_several_runs(tmp_path):
    better = [ROWS[0], ROWS[2] | {"robust": 0.82}]
    runs = [read(make_run(tmp_path / "one")), read(make_run(tmp_path / "two", RESULTS | {"rows": better}))]
    sentence = verdict_of_runs(runs)
    assert sentence.startswith("Of the 2 runs, two ends with the highest robust accuracy, 82.0 %")
    assert "3.0 points above one, which 100 test images do not tell from no difference." in sentence
    assert verdict_of_runs(runs[:1]) == verdict(RESULTS)
