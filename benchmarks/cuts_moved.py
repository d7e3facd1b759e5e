"""How far the thresholds of layers move in a perturbation and in a step, while masks are searched, and what a bracket around them holds.

    python benchmarks/cuts_moved.py --data-dir CIFAR10 > benchmarks/results/cuts-moved.md

The CUDA kernels of perturb and update_select rely on this for their speed (csrc/cuda/bracket.cuh): they look for the new threshold
within a 32nd of an octave (1.6 to 3.1 %) of the old one, and where it is not there they read the scores again. Every fifth step is looked
at, in layers of more than 4,096 scores. Without --data-dir, the digits alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from s2ap_ext import ops
from s2ap_ext.pipeline import RunFolder, Session, load_recipe, new_model, open_data, prune, reproducible
from s2ap_ext.pipeline import pretrain as pretrained

REACH = 1 << 18  # of the keys of float32 scores: a 32nd of an octave
EVERY, SMALL = 5, 4096
CIFAR = (
    *("model.width=16", "data.train_size=2000", "data.test_size=100", "attack.steps=1", "attack.step_size=8/255"),
    *("evaluate.images_per_epoch=50", "pretrain.loss=n_fgsm", "pretrain.epochs=2", "pretrain.batch_size=64", "pretrain.lr=0.05"),
    *("prune.loss=n_fgsm", "prune.epochs=3", "prune.batch_size=64", "prune.warmup_epochs=1"),
)


class Watch:
    """An op in whose place it stands, and how far the layers' thresholds moved in its calls: shares of the old ones, and what was near."""

    def __init__(self, op: Callable, cuts_at: int) -> None:
        self.op, self.cuts_at, self.calls = op, cuts_at, 0
        self.moved: list[float] = []
        self.inside: list[float] = []
        self.missed = 0

    def __call__(self, scores: Sequence[torch.Tensor], *arguments, **how):
        before = arguments[self.cuts_at][:, 0].clone()
        found = self.op(scores, *arguments, **how)
        if self.calls % EVERY == 0:
            for s, old, new in zip(scores, before.tolist(), found[1][:, 0].tolist(), strict=True):
                if s.numel() > SMALL:
                    self._look(s.detach(), old, new)
        self.calls += 1
        return found

    def _look(self, scores: torch.Tensor, old: int, new: int) -> None:
        values = torch.tensor([old, new], dtype=torch.int32).view(torch.float32)
        self.moved.append(float((values[1] - values[0]).abs() / values[0]))
        self.inside.append(float(((scores.abs().view(torch.int32) - old).abs() <= REACH).float().mean()))
        self.missed += abs(new - old) > REACH


def watched(recipe_name: str, settings: Sequence[str]) -> dict[str, Watch]:
    """Searches a mask, and gives what was seen of each op."""
    recipe = load_recipe(recipe_name, settings)
    data = open_data(recipe)
    watches = {"perturb": Watch(ops.perturb, 3), "update_select": Watch(ops.update_select, 4)}
    own = {name: getattr(ops, name) for name in watches}
    with tempfile.TemporaryDirectory() as place, RunFolder.create(Path(place) / "run", recipe) as folder, reproducible(recipe):
        session = Session(recipe, data, folder)
        model = pretrained(session, new_model(recipe, data))
        try:
            for name, watch in watches.items():
                setattr(ops, name, watch)
            prune(session, model)
        finally:
            for name, op in own.items():
                setattr(ops, name, op)
    return watches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="parquet files of uoft-cs/cifar10")
    data_dir = parser.parse_args().data_dir
    print("Each layer in every fifth step of a mask search with S2AP, gamma 0.001, 90 % sparsity, one seed.")
    print("The bracket: a 32nd of an octave to either side of the old threshold.\n")
    print("| run | op | layers seen | threshold moved, median | at most | scores in the bracket, median | at most | new one outside |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    runs = [("digits, HYDRA", "digits", ("prune.warmup_epochs=5",))]
    if data_dir is not None:
        for method in ("hydra", "harp"):
            settings = (*CIFAR, f"data.dir={data_dir}", f"prune.method={method}")
            runs.append((f"CIFAR-10, 2,000 images, ResNet-18 of width 16, {method.upper()}", "cifar10-resnet18", settings))
    for title, recipe, settings in runs:
        for op, watch in watched(recipe, settings).items():
            cells = [statistics.median(watch.moved), max(watch.moved), statistics.median(watch.inside), max(watch.inside)]
            shown = " | ".join(f"{100 * cell:.2g} %" for cell in cells)
            print(f"| {title} | `{op}` | {len(watch.moved)} | {shown} | {watch.missed} |", flush=True)


if __name__ == "__main__":
    main()
