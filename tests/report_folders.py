"""Folders of runs and experiments whose records are made up, so that reports need no training."""

import csv
import json
import math

from s2ap_ext.pipeline import load_recipe
from s2ap_ext.pipeline.records import sealed
from s2ap_ext.pipeline.run_folder import _config_of

ROWS = [
    {"model": "dense", "clean": 0.95, "robust": 0.80, "images": 100, "weights": 1000, "kept": 1000, "sparsity": 0.0, "seconds": 10.0},
    {"model": "pruned", "clean": 0.90, "robust": 0.70, "images": 100, "weights": 1000, "kept": 100, "sparsity": 0.9, "seconds": 5.0},
    {"model": "finetuned", "clean": 0.94, "robust": 0.79, "images": 100, "weights": 1000, "kept": 100, "sparsity": 0.9, "seconds": 7.0},
]
LARGER = [{"batch": 8, "dense_ms": 160.0, "sparse_ms": 40.0}]
LATENCY = [{"batch": 1, "dense_ms": 4.0, "sparse_ms": 2.0}, {"batch": 64, "dense_ms": 40.0, "sparse_ms": 10.0}]
RESULTS = {
    "recipe": "mine",
    "attack": "PGD-20, linf, eps 8/255",
    "images": 100,
    "rows": ROWS,
    "density": {"a": 0.1, "b": 0.05},
    "latency": LATENCY,
    "latency_at_scale": {"network": "ResNet-18", "sparsity": 0.9, "threads": 2, "rows": LARGER},
    "environment": {"torch": "2.13.0", "device": "cpu", "threads": 1},
}
ATTACKS = {"pgd": 0.79, "apgd_ce": 0.78, "square": 0.85, "worst": 0.76}


def epoch(stage, number, **more):
    return {"stage": stage, "epoch": number, "loss": 1.0 / number, "clean": 0.9, "robust": 0.5 + 0.01 * number, **more}


def of_search(number):
    """The record of an epoch of a mask search with S2AP, of two layers."""
    layers = {
        "layer_distance": {"a": 0.04 / number, "b": 0.01 / number},
        "layer_flips": {"a": 0.003, "b": 0.001 * number},
        "layer_churn": {"a": 0.02 * (number - 1), "b": 0.0},
    }
    totals = {"mask_distance": 0.03 / number, "jaccard": 1 - 0.03 / number, "churn": 0.01 * (number - 1), "flips": 0.002 * number}
    return epoch("prune", number, passes=1.5, gamma={"a": 1e-3 * number, "b": 2e-3}, functional_distance=0.01 * number, **totals, **layers)


RECORDS = [epoch("pretrain", 1), epoch("pretrain", 2), *map(of_search, (1, 2, 3)), {"stage": "evaluate"}, epoch("finetune", 1)]


def of_model(name, spaces):
    """A model's entry in analysis.json."""
    steps = [-0.05, 0.0, 0.05]
    spectra = [
        {"space": space, "size": 1000 + len(space), "eigenvalues": [4.5, 2.25, 1.125], "trace": 30.5, "trace_error": 1.5}
        for space in spaces
    ]
    lines = [
        {"space": space, "along": along, "steps": steps, "losses": [0.5, 0.4, 0.7 + 0.1 * n], "flips": [6, 0, 8]}
        for space in spaces
        for n, along in enumerate(("ascent", "random", "random"))
    ]
    planes = [{"space": space, "steps": steps, "losses": [[0.5, 0.45, 0.6], [0.5, 0.4, 0.55], [0.7, 0.5, 0.8]]} for space in spaces]
    found = {"model": name, "loss": {"clean": 0.2, "robust": 0.4}, "spectra": spectra, "lines": lines, "planes": planes}
    if "scores" in spaces:
        found["curvature"] = {"radius": 0.01, "value": 6.25}
        found["ascent"] = {"flip_rate": 0.0031, "rise": 0.0625, "gradient_cosine": 0.985, "functional_distance": 0.0021}
    return found


ANALYSIS = {
    "images": 64,
    "attack": "PGD-20, linf, eps 8/255",
    "gamma": 1e-3,
    "models": [of_model("dense", ["weights"]), of_model("pruned", ["scores", "weights"])],
    "functional_distance": [{"from": "dense", "to": "pruned", "value": 0.0748}],
    "masks": {"runs": ["one", "two"], "overlap": 0.3, "chance": 0.0526},
}


def make_run(path, results=RESULTS, records=RECORDS, analysis=None, overrides=()):
    """A finished run at ``path``, without models."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.toml").write_text(_config_of(load_recipe("digits", overrides)))
    (path / "results.json").write_text(json.dumps(sealed(results, path)))
    (path / "metrics.jsonl").write_text("".join(json.dumps(sealed(record, path)) + "\n" for record in records))
    if analysis is not None:
        (path / "analysis.json").write_text(json.dumps(sealed(analysis, path)))
    return path


def make_experiment(path, gammas=(0.0005, 0.001, 0.002)):
    """An experiment at ``path``: three arms of three seeds, that differ in gamma."""
    path.mkdir(parents=True, exist_ok=True)
    rows = [
        {"arm": f"gamma {gamma}", "seed": seed, "model": "finetuned", "clean": 0.9 + 0.01 * seed, "robust": 0.7 + 10 * gamma + 0.02 * seed}
        | {"sparsity": 0.9, "images": 200, "seconds": 12.5, "gamma": gamma}
        for gamma in gammas
        for seed in (0, 1, 2)
    ]
    with open(path / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)

    def interval(arm, metric):
        values = [row[metric] for row in rows if row["arm"] == arm]
        mean = sum(values) / len(values)
        spread = 4.303 * math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))  # Student's t, 2 degrees
        return {"mean": mean, "low": mean - spread, "high": mean + spread}

    names = list(dict.fromkeys(row["arm"] for row in rows))
    arms = [{"arm": name, "n": 3, "robust": interval(name, "robust"), "clean": interval(name, "clean")} for name in names]
    compared = {"arm": names[2], "against": names[0], "metric": "robust", "difference": 0.015, "low": 0.01, "high": 0.02}
    summary = {"name": "gamma", "baseline": names[0], "metric": "robust", "arms": arms}
    summary |= {"comparisons": [compared | {"p": 0.0123, "p_corrected": 0.0246}], "verdict": "A larger gamma gives more <robust> models."}
    (path / "summary.json").write_text(json.dumps(summary))
    return path
