"""What is printed on a terminal."""

from report_folders import ANALYSIS, RESULTS, ROWS

from s2ap_ext import report
from s2ap_ext.speed import Latency


def cells(text, word):
    """The cells of the first line of a table that holds ``word``."""
    line = next(line for line in text.splitlines() if f" {word} " in line)
    return [cell.strip() for cell in line.replace("│", "|").strip("|").split("|")]


def test_the_table_of_latencies(capsys):
    report.print_latency([Latency(batch=64, dense_ms=40.0, sparse_ms=10.0)])
    out = capsys.readouterr().out
    assert cells(out, "64") == ["64", "40.00", "10.00", "4.0", "1,600", "6,400"]
    assert "gain little" not in out


def test_the_table_of_a_larger_network_has_its_name(capsys):
    larger = {"network": "ResNet-18", "sparsity": 0.9, "threads": 2}
    report.print_latency([Latency(batch=1, dense_ms=40.0, sparse_ms=10.0)], f"inference of a {report.scale_of(larger)}")
    assert "inference of a ResNet-18 at 90.0 % sparsity, 2 threads" in " ".join(capsys.readouterr().out.split())
    assert report.scale_of({**larger, "threads": 1}).endswith("1 thread")


def test_where_zeros_gain_little_it_is_told(capsys):
    report.print_latency([Latency(batch=1, dense_ms=1.0, sparse_ms=1.0), Latency(batch=8, dense_ms=7.0, sparse_ms=5.0)])
    assert "The zeros gain little here" in capsys.readouterr().out


def test_the_table_compares_with_the_dense_model(capsys):
    report.print_table(RESULTS)
    out = capsys.readouterr().out
    assert "mine: 100 test images, PGD-20, linf, eps 8/255" in out
    assert "90.0 (-5.0)" in out
    assert "79.0 (-1.0)" in out
    assert " ".join(out.split()).endswith(report.verdict(RESULTS))
    assert all(len(line) <= 80 for line in out.splitlines())


def test_a_control_stands_before_what_it_is_compared_with(capsys):
    report.print_table(RESULTS | {"plain": ROWS[1] | {"robust": 0.75, "clean": 0.91}})
    out = capsys.readouterr().out
    models = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert models == ["dense", "no S2AP", "pruned", "finetuned"]
    assert "75.0 (-5.0)" in out
    sentence = (
        "The mask found with S2AP has 70.0 % robust accuracy, 5.0 points below the one found without it, which 100 test images do not"
    )
    assert sentence in " ".join(out.split())
    assert all(len(line) <= 80 for line in out.splitlines())


def test_a_single_model_is_compared_with_nothing(capsys):
    report.print_table(RESULTS | {"rows": ROWS[2:]})
    out = capsys.readouterr().out
    assert "79.0 " in out
    assert "(" not in out
    assert "against" not in out


def test_a_terminal_gets_bars_of_robust_accuracy(capsys, monkeypatch):
    report.print_table(RESULTS)
    assert "█" not in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    report.print_table(RESULTS)
    bars = [line for line in capsys.readouterr().out.splitlines() if line.rstrip().endswith("% robust")]
    assert [line.count("█") for line in bars] == [int(40 * row["robust"]) for row in ROWS]


def test_an_analysis_in_numbers(capsys):
    report.print_analysis("runs/mine", ANALYSIS)
    out = capsys.readouterr().out
    assert "runs/mine: robust loss on 64 test images, PGD-20, linf, eps 8/255" in " ".join(out.split())
    assert cells(out, "scores") == ["pruned", "scores", "1,006", "4.5", "30.5 +- 1.5"]
    flat = " ".join(out.split())
    assert "pruned: a perturbation of the scores by gamma 0.001 flips 0.31 % of the kept weights" in flat
    assert "changes the robust loss by +0.0625; the gradients before and after have the cosine 0.985." in flat
    assert "Masks of 2 runs: overlap 0.300, of random masks 0.053." in flat
