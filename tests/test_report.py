"""The table and the plots, from records that need no training."""

import json

import pytest

from s2ap_ext import report
from s2ap_ext.pipeline.records import sealed
from s2ap_ext.speed import Latency

ROWS = [
    {"model": "dense", "clean": 0.95, "robust": 0.80, "images": 100, "weights": 1000, "kept": 1000, "sparsity": 0.0, "seconds": 10.0},
    {"model": "pruned", "clean": 0.90, "robust": 0.70, "images": 100, "weights": 1000, "kept": 100, "sparsity": 0.9, "seconds": 5.0},
    {"model": "finetuned", "clean": 0.94, "robust": 0.79, "images": 100, "weights": 1000, "kept": 100, "sparsity": 0.9, "seconds": 7.0},
]
RESULTS = {"recipe": "mine", "attack": "PGD-20, linf, eps 8/255", "rows": ROWS, "density": {"a": 0.1, "b": 0.05}}


def epoch(stage, number, **more):
    return {"stage": stage, "epoch": number, "loss": 1.0 / number, "clean": 0.9, "robust": 0.5, **more}


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(sealed(RESULTS, tmp_path)))
    records = [
        epoch("pretrain", 1),
        epoch("pretrain", 2),
        epoch("prune", 1, mask_distance=0.01),
        {"stage": "evaluate"},
        epoch("finetune", 1),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(sealed(r, tmp_path)) + "\n" for r in records))
    return tmp_path


def test_the_table_of_latencies(capsys):
    report.print_latency(Latency(**row) for row in [{"batch": 64, "dense_ms": 40.0, "sparse_ms": 10.0}])
    line = next(line for line in capsys.readouterr().out.splitlines() if "64" in line)
    assert [cell for cell in line.replace("│", " ").split() if cell] == ["64", "40.00", "10.00", "4.0", "1,600", "6,400"]


def test_the_table_compares_with_the_dense_model(capsys):
    report.print_table(RESULTS)
    out = capsys.readouterr().out
    assert "mine: 100 test images, PGD-20, linf, eps 8/255" in out
    assert "90.0 (-5.0)" in out
    assert "79.0 (-1.0)" in out
    assert out.endswith("Finetuned at 90.0 % sparsity against dense: clean -1.0, robust -1.0 points.\n")
    assert all(len(line) <= 80 for line in out.splitlines())


def test_a_single_model_is_compared_with_nothing(capsys):
    report.print_table(RESULTS | {"rows": ROWS[2:]})
    out = capsys.readouterr().out
    assert "79.0 " in out
    assert "(" not in out
    assert "against" not in out


def test_plots_are_drawn_for_what_was_trained(run_dir):
    assert [path.name for path in report.write_plots(run_dir)] == ["curves.png", "mask_distance.png", "density.png"]
    for path in run_dir.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert not list(run_dir.glob(".*"))


def test_what_perturbations_did_is_drawn_where_there_were_some(run_dir):
    with open(run_dir / "metrics.jsonl", "a") as file:
        for number, gamma in enumerate([{"a": 1e-3, "b": 2e-3}, {"a": 2e-3, "b": 5e-4}], start=2):
            record = epoch("prune", number, mask_distance=0.01, flips=0.003 * number, gamma=gamma)
            file.write(json.dumps(sealed(record, run_dir)) + "\n")
    assert (run_dir / "perturbation.png") in report.write_plots(run_dir)
    records = [record for record in report.read_metrics(run_dir) if "gamma" in record]
    above, below = report._perturbation(records).axes
    assert [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in above.lines] == [
        ("a", [2, 3], [1e-3, 2e-3]),
        ("b", [2, 3], [2e-3, 5e-4]),
    ]
    assert list(below.lines[0].get_ydata()) == pytest.approx([0.6, 0.9])


def test_curves_show_every_epoch_once():
    records = [epoch("pretrain", 1), epoch("pretrain", 2), epoch("finetune", 1)]
    figure = report._curves(records, RESULTS)
    loss = figure.axes[0]
    curves = [(list(line.get_xdata()), list(line.get_ydata())) for line in loss.lines if line.get_marker() == "o"]
    assert curves == [([1, 2], [1.0, 0.5]), ([3], [1.0])]


def test_a_dense_model_alone_has_no_mask_to_plot(run_dir):
    (run_dir / "results.json").write_text(json.dumps(sealed(RESULTS | {"rows": ROWS[:1], "density": {}}, run_dir)))
    (run_dir / "metrics.jsonl").write_text(json.dumps(sealed(epoch("pretrain", 1), run_dir)) + "\n")
    assert [path.name for path in report.write_plots(run_dir)] == ["curves.png"]


def test_what_is_not_a_run_is_refused(run_dir, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match="not the folder of a run"):
        report.read_results(empty)
    (run_dir / "results.json").unlink()
    with pytest.raises(ValueError, match="has not finished; go on with: s2ap run --resume"):
        report.read_results(run_dir)
    (run_dir / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json: not JSON"):
        report.read_results(run_dir)


def test_a_broken_line_of_metrics_is_named(run_dir):
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"stage": "fine')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 6: not JSON"):
        report.write_plots(run_dir)
