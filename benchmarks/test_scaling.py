"""How the ops scale: one layer of 1e3 to 1e8 scores, many layers against one, and scores that are hard to select from. Sparsity 0.9.

pytest benchmarks/test_scaling.py
"""

import io

import pytest
import torch
from measure import ROWS, SCALING
from test_ops import SGD, STREAM, Layers

from s2ap_ext import ops
from s2ap_ext.baselines import MASKS

SLOW = {"sort form": 10**7, "topk form": 10**7, "kthvalue form": 10**7}  # beyond these sizes they would take minutes


@pytest.mark.parametrize("exponent", [3, 4, 5, 6, 7, 8])
def test_one_layer(side_by_side, quick, device, exponent):
    n = 10 ** min(exponent, 4 if quick else exponent)
    layers = Layers([(1, n)], device)
    arguments = layers.scores, layers.weights, layers.kept
    repeats = max(1, 10**5 // n)  # so that a time is never less than some microseconds

    def repeated(f):
        def run():
            for _ in range(repeats):
                f()

        return run

    functions = {
        "select": lambda: ops.select(*arguments, out=layers.out, cuts=layers.cuts),
        "perturb": lambda: ops.perturb(
            arguments[0], layers.grads, *arguments[1:], layers.cuts, gamma=1e-3, out=layers.out, new_cuts=layers.new_cuts
        ),
        "update": lambda: ops.update(layers.scores, layers.grads, layers.buffers, **SGD),
        "update_select": lambda: ops.update_select(
            arguments[0], layers.grads, layers.buffers, *arguments[1:], layers.cuts, **SGD, out=layers.out, new_cuts=layers.new_cuts
        ),
        STREAM: layers.stream,
    }
    for name, make in MASKS.items():
        if n <= SLOW[f"{name} form"]:
            functions[f"{name} form"] = lambda make=make: layers.select(make)
    medians = side_by_side(
        {name: repeated(f) for name, f in functions.items()}, rounds=5, what=f"one layer of {n:,} scores, {repeats} times"
    )
    SCALING.extend({"op": name, "n": n, "ms": 1e3 * seconds / repeats} for name, seconds in medians.items())


def test_many_layers(side_by_side, quick, device):
    count, n = (10, 1000) if quick else (1000, 10_000)
    one, many = Layers([(1, count * n)], device), Layers([(1, n)] * count, device)

    def select(layers):
        return lambda: ops.select(layers.scores, layers.weights, layers.kept, out=layers.out, cuts=layers.cuts)

    def op_alone(layers):  # without the checks in Python, which are per tensor
        return lambda: torch.ops.s2ap.select(layers.scores, layers.weights, layers.kept, [], layers.out, layers.cuts)

    side_by_side(
        {
            f"one layer of {count * n:,}": select(one),
            f"{count:,} layers of {n:,}": select(many),
            f"{count:,} layers of {n:,}, torch.ops.s2ap.select itself": op_alone(many),
        },
        rounds=7,
        what="select: many layers against one",
    )


def test_hard_scores(side_by_side, quick, device):
    """What makes the sample mislead, or leaves it nothing to go by, costs more sweeps and nothing else."""
    n = 10_000 if quick else 10_000_000
    layers = Layers([(1, n)], device)
    normal = layers.scores[0]
    every = torch.arange(n, device=device)

    def hard(scores):
        scores = [scores.view(1, n).contiguous()]
        return lambda: ops.select(scores, layers.weights, layers.kept, out=layers.out, cuts=layers.cuts)

    kinds = {
        "normal": normal,
        "all equal": torch.ones_like(normal),
        "two values, one kept in ten": (every % 10 == 0).float() + 0.5,
        "two values, half of each": (every % 2).float() + 0.5,
        "all but one equal": torch.ones(n, device=device).index_fill_(0, every[n // 3 : n // 3 + 1], 0.5),
        "denormal": normal * 1e-38,
        "infinite above 1": torch.where(normal.abs() > normal.abs().median(), torch.inf, normal),
        "ascending": normal.abs().flatten().sort().values,
        "descending": normal.abs().flatten().sort(descending=True).values,
        "the larger ones in one place": torch.cat([normal.flatten()[: n - n // 8], 10 + normal.flatten()[n - n // 8 :].abs()]),
        "over all exponents": (60 * torch.rand(n, device=device) - 30).exp(),
    }
    side_by_side({name: hard(scores) for name, scores in kinds.items()}, rounds=5, what=f"select: hard scores, one layer of {n:,}")


def plot(points, about):
    """Time per score over the number of scores, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for op in dict.fromkeys(point["op"] for point in points):
        mine = [point for point in points if point["op"] == op]
        ours = "form" not in op and op != STREAM
        style = {"linewidth": 2.2, "marker": "o"} if ours else {"linewidth": 1.1, "marker": ".", "linestyle": "--" if op != STREAM else ":"}
        axes.loglog([p["n"] for p in mine], [1e6 * p["ms"] / p["n"] for p in mine], label=op, **style)
    axes.set_xlabel("scores in one layer")
    axes.set_ylabel("nanoseconds per score")
    axes.set_title(
        f"{about['gpu'] if about['gpu'] != 'none' else about['cpu']}, torch {about['torch']}, float32, sparsity 0.9", fontsize=10
    )
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def test_linearity_is_noted():
    """The ratios that show whether the cost is linear, as a note under the last row of the scaling."""
    per_score = {(p["op"], p["n"]): p["ms"] / p["n"] for p in SCALING}
    ratios = {op: t / per_score[op, 10**7] for (op, n), t in per_score.items() if n == 10**8 and (op, 10**7) in per_score}
    row = next((row for row in ROWS if row["benchmark"].startswith("one layer of 100,000,000")), None)
    if row is None:
        pytest.skip("needs the sizes 1e7 and 1e8 of test_one_layer in the same run")
    row["note"] = "Time per score at 1e8 relative to that at 1e7: " + ", ".join(f"{op} {ratio:.2f}" for op, ratio in ratios.items()) + "."
