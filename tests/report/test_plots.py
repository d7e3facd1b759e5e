"""What the figures show, read from their axes, and the files that a run gets."""

import json

import pytest
from report_folders import ANALYSIS, RESULTS, ROWS, epoch, make_run, of_search

from s2ap_ext.pipeline.records import sealed
from s2ap_ext.report import plots, read, write_plots


def test_plots_are_drawn_for_what_was_trained(tmp_path):
    run = read(make_run(tmp_path))
    names = ["curves.png", "mask_distance.png", "perturbation.png", "density.png"]
    assert [path.name for path in write_plots(run)] == names
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


def test_a_dense_model_alone_has_no_mask_to_plot(tmp_path):
    run = read(make_run(tmp_path, RESULTS | {"rows": ROWS[:1], "density": {}}, [epoch("pretrain", 1)]))
    assert [path.name for path in write_plots(run)] == ["curves.png"]


def points(line):
    return list(line.get_xdata()), list(line.get_ydata())


def test_curves_show_every_epoch_once():
    figure = plots.curves([epoch("pretrain", 1), epoch("pretrain", 2), epoch("finetune", 1)])
    loss = figure.axes[0]
    assert [points(line) for line in loss.lines if line.get_marker() == "o"] == [([1, 2], [1.0, 0.5]), ([3], [1.0])]


def test_what_perturbations_did():
    above, below = plots.perturbation([of_search(2), of_search(3)]).axes
    assert [(line.get_label(), *points(line)) for line in above.lines] == [("a", [2, 3], [2e-3, 3e-3]), ("b", [2, 3], [2e-3, 2e-3])]
    assert list(below.lines[0].get_ydata()) == pytest.approx([0.4, 0.6])
    (alone,) = plots.perturbation([of_search(2), of_search(2) | {"epoch": 3, "gamma": {"a": 2e-3}}]).axes
    assert list(alone.lines[0].get_ydata()) == pytest.approx([0.4, 0.4])  # a gamma that never changes needs no plot


def test_the_mask_and_what_comes_back():
    (ax,) = plots.mask_moves([of_search(1), of_search(2)]).axes
    assert [list(line.get_ydata()) for line in ax.lines] == [pytest.approx([3, 1.5]), pytest.approx([0, 1])]
    (ax,) = plots.mask_moves([epoch("prune", 1, mask_distance=0.02)]).axes  # of a run before there was churn
    assert list(ax.lines[0].get_ydata()) == [2]


def test_heatmaps_have_a_field_for_each_layer_and_epoch():
    ax, _ = plots.heatmap({"a": [1, 2, 3], "b": [0, 5, 0]}, [4, 5, 6], "%", 10).axes
    assert ax.images[0].get_array().tolist() == [[1, 2, 3], [0, 5, 0]]
    assert ax.images[0].get_clim() == (0, 10)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert list(ax.images[0].get_extent()) == [3.5, 6.5, 1.5, -0.5]


def test_lines_and_planes_of_an_analysis():
    entry = ANALYSIS["models"][0]
    (ax,) = plots.lines(entry["lines"]).axes
    assert [points(line) for line in ax.lines[:3]] == [(line["steps"], line["losses"]) for line in entry["lines"]]
    ax, _ = plots.plane(entry["planes"][0]).axes
    assert ax.lines[0].get_xdata() == ax.lines[0].get_ydata() == [0]


def test_dots_lie_within_their_intervals():
    (ax,) = plots.intervals(["a", "b"], {"robust": [(50, 40, 61), (70, 65, 75)]}, "%").axes
    assert [points(line) for line in ax.lines] == [([40, 61], [0, 0]), ([50], [0]), ([65, 75], [1, 1]), ([70], [1])]


def test_a_sweep_is_drawn_over_its_setting():
    (ax,) = plots.sweep([1e-3, 1e-2], {"robust": [(50, 40, 61), (70, 65, 75)]}, "gamma").axes
    assert points(ax.lines[0]) == ([1e-3, 1e-2], [50, 70])
    assert ax.get_xscale() == "log"


def test_what_is_not_a_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="not the folder of a run"):
        read(tmp_path / "empty")
    folder = make_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"stage": "fine')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 8: not JSON"):
        read(folder)
    (folder / "results.json").unlink()
    with pytest.raises(ValueError, match="has not finished; go on with: s2ap run --resume"):
        read(folder)
    (folder / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json: not JSON"):
        read(folder)
    make_run(folder)
    (folder / "analysis.json").write_text(json.dumps(sealed(ANALYSIS, folder)).replace("4.5", "1.5"))
    with pytest.raises(ValueError, match=r"analysis\.json: damaged, or of another run"):
        read(folder)
