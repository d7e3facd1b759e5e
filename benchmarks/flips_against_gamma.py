"""How many mask entries a perturbation of the scores flips, for each gamma, while masks are searched on the digits.

    python benchmarks/flips_against_gamma.py > benchmarks/results/flips-against-gamma.md

HYDRA with S2AP at its default gamma of 0.001, from one pretrained network, at several sparsities. In every tenth step all gammas of the
table are tried on the step's own gradient; only the default one is taken. Flips are counted in all layers, per kept weight.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from s2ap_ext.nn import pruned_layers
from s2ap_ext.nn.selection import flips_at
from s2ap_ext.optim.ascents.exact import Exact
from s2ap_ext.parts import register
from s2ap_ext.pipeline import RunFolder, Session, load_recipe, new_model, open_data, pretrain, prune, reproducible

SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
GAMMAS = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
EPOCHS = 10
LATE = 7  # epochs from here on count as late

flipped: dict[tuple[float, str], list[float]] = defaultdict(list)  # flips per kept weight, by gamma and time


@register("counting")
class Counting(Exact):
    """The steps of ``exact``; in some of them the flips of other gammas are counted."""

    steps = 0

    def step(self, at, backward):
        backward()
        if self.steps % 10 == 0:
            layers = list(pruned_layers(at.model).values())
            gradients, scores = at.gradients(), at.perturbed_parameters()
            count = flips_at(layers, {scores[name]: g for name, g in gradients.items()}, eps=at.eps, straight_through=False)
            kept = sum(int(layer.kept) for layer in layers)
            every = torch.ones(len(layers), dtype=torch.bool)
            for gamma in GAMMAS:
                flips = int(count(torch.full((len(layers),), gamma, dtype=torch.float64), every).sum())
                flipped[gamma, "late" if at.epoch >= LATE else "early"].append(flips / kept)
        self.steps += 1
        at.move()
        backward()


def main() -> None:
    common = ["pretrain.epochs=20", f"prune.epochs={EPOCHS}", "prune.warmup_epochs=0", "prune.ascent=counting"]
    recipe = load_recipe("digits", common)
    data = open_data(recipe)
    with tempfile.TemporaryDirectory() as place:
        with RunFolder.create(Path(place) / "dense", recipe) as folder, reproducible(recipe):
            dense = pretrain(Session(recipe, data, folder), new_model(recipe, data)).state_dict()
        print("Flips per kept weight and step, in %: first 7 of 10 epochs / last 3. Digits, a 4-layer CNN, HYDRA, one seed.\n")
        print("| sparsity | " + " | ".join(f"gamma {gamma:g}" for gamma in GAMMAS) + " |")
        print("|---|" + "---|" * len(GAMMAS))
        for sparsity in SPARSITIES:
            recipe = load_recipe("digits", [*common, f"prune.sparsity={sparsity}"])
            flipped.clear()
            with RunFolder.create(Path(place) / str(sparsity), recipe) as folder, reproducible(recipe):
                model = new_model(recipe, data)
                model.load_state_dict(dense)
                prune(Session(recipe, data, folder), model)
            means = {at: 100 * sum(values) / len(values) for at, values in flipped.items()}
            cells = [f"{means[gamma, 'early']:.2f} / {means[gamma, 'late']:.2f}" for gamma in GAMMAS]
            print(f"| {100 * sparsity:g} % | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
