"""The page: every number in it is computed anew from the records here, in other ways; and it needs nothing besides itself."""

import csv
import io
import json
import re
from html.parser import HTMLParser

import pytest
from report_folders import ANALYSIS, ATTACKS, LATENCY, RECORDS, RESULTS, ROWS, make_experiment, make_run
from scipy.stats import binomtest

from s2ap_ext.report import read_all, to_csv, to_html, to_markdown
from s2ap_ext.report.svg import STAND_INS

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """What a page holds: its tables by caption, its texts, the alternatives of its pictures, all tags, and whether these are balanced."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.alternatives, self.verdict, self.tags, self.addresses, self.ids = {}, [], "", [], [], []
        self._open, self._rows, self._texts = [], [], {}
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.addresses += [attrs[name] for name in ("src", "href", "action", "srcset", "data", "xlink:href") if name in attrs]
        assert not [name for name in attrs if name.startswith("on")]
        if tag == "img":
            self.alternatives.append(attrs["alt"])
        if tag not in VOID:
            self._open.append((tag, attrs))
        if tag == "table":
            self._rows = []
        if tag == "tr":
            self._rows.append([])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        opened, attrs = self._open.pop()
        assert opened == tag
        text = self._texts.pop(len(self._open), "").strip()
        if tag in ("th", "td"):
            self._rows[-1].append(text)
        if tag == "caption":
            self._caption = text
        if tag == "table":
            self.tables[self._caption] = self._rows
        if tag == "title":
            self.alternatives.append(text)
        if tag == "p" and attrs.get("class") == "verdict":
            self.verdict = text

    def handle_data(self, data):
        depth = len(self._open) - 1
        self._texts[depth] = self._texts.get(depth, "") + data


def wilson(fraction, images):
    found = binomtest(round(fraction * images), images).proportion_ci(method="wilson")
    return found.low, found.high


def span(low, high):
    return f"{100 * low:.1f} to {100 * high:.1f}"


def newcombe(a, b, images):
    (la, ha), (lb, hb) = wilson(a, images), wilson(b, images)
    return span(a - b - ((a - la) ** 2 + (hb - b) ** 2) ** 0.5, a - b + ((ha - a) ** 2 + (b - lb) ** 2) ** 0.5)


def results_table(rows):
    """The cells of the table of results, without its first row."""
    dense = rows[0]
    for row in rows:
        gap = ["", ""]
        if row is not dense:
            gap = [f"{100 * (row['robust'] - dense['robust']):+.1f}", newcombe(row["robust"], dense["robust"], row["images"])]
        accuracies = [cell for kind in ("clean", "robust") for cell in (f"{100 * row[kind]:.1f}", span(*wilson(row[kind], row["images"])))]
        yield [
            row["model"],
            *accuracies,
            *gap,
            f"{100 * row['sparsity']:.1f}",
            str(row["kept"]).replace("1000", "1,000"),
            f"{row['seconds']:.1f}",
        ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("folders")
    bare = {"results": RESULTS | {"density": {}}, "records": []}  # with few figures, which take most of the time
    two, three = (make_run(base / name, **bare, overrides=[f"seed={seed}"]) for name, seed in {"two": 1, "three": 2}.items())
    return {"two": two, "three": three, "sweep": make_experiment(base / "sweep")}


@pytest.fixture(scope="module")
def text(page_text):
    return page_text


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def checked_tables():
    """Every table of the page about one run, with its rows from the records; ``None`` for the caption's order."""
    search = [r for r in RECORDS if r["stage"] == "prune"]
    epochs = [r for r in RECORDS if "epoch" in r]
    entries = ANALYSIS["models"]
    tables = {
        "PGD-20, linf, eps 8/255, 100 test images": list(results_table(ROWS)),
        "By epoch": [
            [
                f"{r['stage']} {r['epoch']}",
                f"{r['loss']:.4f}",
                f"{100 * r['clean']:.1f}",
                f"{100 * r['robust']:.1f}",
                f"{r['functional_distance']:.4f}" if "functional_distance" in r else "",
            ]
            for r in epochs
        ],
        "By layer": [["a", "10.0"], ["b", "5.0"]],
        "Accuracy under each attack, %, with 95 % intervals": [
            ["finetuned", *(f"{100 * value:.1f} ({span(*wilson(value, 100))})" for value in ATTACKS.values())]
        ],
        "By stage": [
            ["pretrain", "10.0", f"{100 * 10 / 22:.1f}", "2", ""],
            ["prune", "5.0", f"{100 * 5 / 22:.1f}", "3", "1.50"],
            ["finetune", "7.0", f"{100 * 7 / 22:.1f}", "1", ""],
        ],
        "Inference on the CPU, dense and on the kept weights alone": [
            [str(r["batch"]), f"{r['dense_ms']:.2f}", f"{r['sparse_ms']:.2f}", f"{r['dense_ms'] / r['sparse_ms']:.1f}"] for r in LATENCY
        ],
        "The same of a ResNet-18 at 90.0 % sparsity, 2 threads": [["8", "160.00", "40.00", "4.0"]],
        "Environment": [["torch", "2.13.0"], ["device", "cpu"], ["threads", "1"]],
        "Spectrum of the Hessian of the robust loss": [
            [e["model"], s["space"], f"1,00{len(s['space'])}", "4.5", "2.25, 1.125", "30.5 \u00b1 1.5"]
            for e in entries
            for s in e["spectra"]
        ],
        "What a perturbation of the scores changes": [
            ["pruned", "0.2000", "0.4000", "6.25", "0.001", "0.31", "+0.0625", "0.985", "0.0021"]
        ],
        "How far the predictions move from model to model": [["dense to pruned", "0.0748"]],
        "Overlap of the masks of several runs": [["one, two", "0.3000", "0.0526"]],
        "Over the plane, a row for each step of the first direction": [
            [f"{s:+.4g}", *(f"{value:.4f}" for value in row)]
            for s, row in zip(entries[1]["planes"][1]["steps"], entries[1]["planes"][1]["losses"], strict=True)
        ],
        "Along the lines": [
            [f"{s:+.4g}", *(f"{line['losses'][i]:.4f}" for line in entries[1]["lines"][3:])]
            for i, s in enumerate(entries[1]["lines"][3]["steps"])
        ],
    }
    for key, caption in {
        "layer_distance": "entries that changed in the epoch, %",
        "layer_flips": "entries that a step's perturbation flips, % of the kept weights",
        "layer_churn": "kept weights that came back, %",
    }.items():
        tables[caption] = [[layer, *(f"{100 * r[key][layer]:.2f}" for r in search)] for layer in ("a", "b")]
    return tables


def test_every_number_in_the_tables_is_that_of_the_records(page):
    expected = checked_tables()
    by_epoch = page.tables.pop("By epoch of the search")  # there are two of this caption; the last one is of the perturbations
    assert by_epoch[1:] == [
        [str(r["epoch"]), f"{100 * r['flips']:.3f}", f"{r['gamma']['a']:.4g}", "0.002"] for r in RECORDS if r["stage"] == "prune"
    ]
    assert page.tables.keys() == expected.keys()
    for caption, rows in expected.items():
        assert page.tables[caption][1:] == rows, caption
        assert all(len(row) == len(page.tables[caption][0]) for row in rows), caption


def test_the_distances_of_the_mask_by_epoch(text):
    """The first of the two tables of that caption."""
    table = text[text.index("By epoch of the search") :]
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", table[: table.index("</table>")])
    rows = [cells[i : i + 5] for i in range(0, len(cells), 5)]
    assert rows[0] == ["epoch", "mask distance, %", "Jaccard index", "churn, %", "flips per step, %"]
    search = [r for r in RECORDS if r["stage"] == "prune"]
    assert rows[1:] == [
        [str(r["epoch"]), f"{100 * r['mask_distance']:.3f}", f"{r['jaccard']:.4f}", f"{100 * r['churn']:.3f}", f"{100 * r['flips']:.3f}"]
        for r in search
    ]


def test_the_numbers_in_sentences_are_those_of_the_records(page):
    low, high = wilson(0.79, 100)
    interval = ["95", f"{100 * low:.1f}", f"{100 * high:.1f}"]
    assert re.findall(r"[\d.]*\d", page.verdict) == ["90.0", "79.0", *interval, "1.0", "100", "94.0", "1.0"]
    told = {word for text in page.alternatives for word in re.findall(r"[\d.]*\d", text)}
    curve = {"51.0"}  # robust accuracy of the first and, as it happens, of the last epoch
    cost, mask, density, flips = {"10.0", "5.0", "7.0"}, {"3.00", "1.00"}, {"5.0", "10.0"}, {"0.200", "0.600"}
    assert told == curve | cost | mask | density | flips | {"95", "2"} | {"0.700"} | {"0.400", "0.800"}


def test_the_page_needs_nothing_besides_itself(page, text):
    assert len(text) < 3e6
    assert not {"script", "link", "iframe", "object", "embed", "form"} & set(page.tags)
    assert "://" not in text
    assert not re.search(r"@import|url\((?!#)", text)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert "default-src 'none'" in text


def test_ids_are_unique_and_links_lead_somewhere(page, text):
    assert len(set(page.ids)) == len(page.ids)
    wanted = {address[1:] for address in page.addresses if address.startswith("#")}
    wanted |= set(re.findall(r"url\(#([^)]*)\)", text)) | set(re.findall(r'aria-labelledby="([^"]*)"', text))
    assert wanted <= set(page.ids)


def test_figures_take_the_colours_of_the_page(text):
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--ink)" in drawn
    assert "var(--series-0)" in drawn
    assert not any(stand_in in drawn for stand_in in STAND_INS)
    assert "DejaVu" not in drawn


def test_pictures_say_what_they_show(page):
    assert all(len(alternative) > 10 for alternative in page.alternatives)
    assert page.tags.count("svg") + 1 == page.tags.count("title")


def test_names_are_text_and_no_markup(tmp_path):
    odd = make_run(tmp_path / "<b>odd & end", RESULTS | {"attack": "<script>alert(1)</script>", "density": {"$x^$": 0.1}}, [])
    text = to_html(*read_all([odd]))
    assert "<script" not in text
    assert "<b>odd" not in text
    assert "&lt;b&gt;odd &amp; end" in text
    assert ">$x^$</text>" in text


def test_what_is_missing_is_told(page, folders):
    text = to_html(*read_all([folders["two"]]))
    assert f"two was not analysed; s2ap analyze {folders['two']} computes what belongs here." in text
    assert "There are no images of two:" in text
    assert "expected a model, found none" in text
    assert "Attack by attack" not in text


def test_runs_stand_side_by_side(folders):
    page = Page(to_html(*read_all([folders["two"], folders["three"]])))
    assert page.tables["What the recipes differ in"] == [["key", "two", "three"], ["seed", "1", "2"]]
    rows = page.tables["PGD-20, linf, eps 8/255, 100 test images"][1:]
    assert rows == [[f"{run}: {cells[0]}", *cells[1:]] for run in ("two", "three") for cells in results_table(ROWS)]


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs, _ = read_all([make_run(tmp_path / place / "digits") for place in "ab"])
    assert [run.name for run in runs] == [str(tmp_path / "a/digits"), str(tmp_path / "b/digits")]


def test_an_experiment_in_numbers(folders):
    text = to_html(*read_all([folders["sweep"]]))
    page = Page(text)
    with open(folders["sweep"] / "table.csv", newline="") as file:
        raw = list(csv.DictReader(file))
    arms = list(dict.fromkeys(row["arm"] for row in raw))
    expected, swept = [], []
    for arm in arms:
        cells = []
        for metric in ("robust", "clean"):
            values = [float(row[metric]) for row in raw if row["arm"] == arm]
            mean = sum(values) / 3
            spread = 4.303 * (sum((v - mean) ** 2 for v in values) / 2 / 3) ** 0.5
            cells += [f"{100 * mean:.1f}", span(mean - spread, mean + spread)]
        expected.append([arm, *cells, "3"])
        swept.append([arm.removeprefix("gamma "), *cells])
    assert page.tables["Mean over the seeds of each arm, with 95 % intervals"][1:] == expected
    assert page.tables["By gamma"][1:] == swept
    compared = page.tables["Paired by seed; p is corrected for the number of comparisons"][1:]
    assert compared == [["gamma 0.002 against gamma 0.0005", "robust", "+1.5", "1.0 to 2.0", "0.0123", "0.0246"]]
    shown = page.tables["All results: a row for each arm, seed and model"]
    assert shown[0] == list(raw[0])
    for cells, row in zip(shown[1:], raw, strict=True):
        assert [cell if key in ("arm", "model") else float(cell) for key, cell in zip(row, cells, strict=True)] == [
            value if key in ("arm", "model") else pytest.approx(float(value), rel=1e-5) for key, value in row.items()
        ]
    assert page.verdict == "A larger gamma gives more <robust> models."


def test_differences_of_other_metrics_are_no_points(tmp_path):
    folder = make_experiment(tmp_path / "sweep")
    summary = json.loads((folder / "summary.json").read_text())
    (compared,) = summary["comparisons"]
    moved = compared | {"metric": "pruned.mask_distance", "unit": "", "difference": -0.001002, "low": -0.00136, "high": -0.000648}
    (folder / "summary.json").write_text(json.dumps(summary | {"comparisons": [moved]}))
    page = Page(to_html(*read_all([folder])))
    (row,) = page.tables["Paired by seed; p is corrected for the number of comparisons"][1:]
    assert row[1:4] == ["pruned.mask_distance", "-0.001", "-0.00136 to -0.000648"]


def test_experiments_and_runs_share_a_page(folders):
    page = Page(to_html(*read_all([folders["sweep"], folders["two"]])))
    assert "By gamma" in page.tables
    assert "By stage" in page.tables


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("arms"), "KeyError"),
        (lambda s: s.update(arms=[]), "no arms"),
        (lambda s: s["arms"][0]["robust"].pop("low"), "KeyError"),
        (lambda s: s.update(verdict=3), "no verdict"),
        (lambda s: s["comparisons"][0].update(p="x"), "ValueError"),
    ],
)
def test_a_summary_that_is_none(change, message, tmp_path):
    folder = make_experiment(tmp_path / "sweep")
    summary = json.loads((folder / "summary.json").read_text())
    change(summary)
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=rf"summary\.json: not the summary of an experiment .*{message}"):
        read_all([folder])


def test_an_experiment_without_its_table(tmp_path):
    folder = make_experiment(tmp_path / "sweep")
    (folder / "table.csv").write_text("arm,seed\na,1\n")
    with pytest.raises(ValueError, match=r"found no clean, model, robust"):
        read_all([folder])
    (folder / "table.csv").unlink()
    with pytest.raises(ValueError, match=r"expected table\.csv beside summary\.json"):
        read_all([folder])


def test_the_csv_has_the_numbers_unrounded(folders):
    runs, _ = read_all([folders["two"], folders["three"]])
    rows = list(csv.DictReader(io.StringIO(to_csv(runs))))
    assert [(row["run"], row["model"]) for row in rows] == [(run, r["model"]) for run in ("two", "three") for r in ROWS]
    for row, expected in zip(rows, ROWS * 2, strict=True):
        for kind in ("clean", "robust"):
            assert float(row[kind]) == expected[kind]
            assert (float(row[f"{kind}_low"]), float(row[f"{kind}_high"])) == pytest.approx(wilson(expected[kind], 100), abs=1e-9)
        assert float(row["sparsity"]) == expected["sparsity"]
    with pytest.raises(ValueError, match="expected the folder of a run; the results of an experiment are in its table"):
        to_csv([])


def test_the_markdown_has_the_table(folders):
    text = to_markdown(*read_all([folders["two"], folders["sweep"]]))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert all(cells in lines for cells in results_table(ROWS))
    assert "# Experiment: gamma" in text
    assert "# two" in text
