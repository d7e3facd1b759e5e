"""Every op in every dtype on layers of awkward sizes, once: what a sanitizer watches. It compares nothing; the tests do."""

from __future__ import annotations

import argparse

import torch

from s2ap_ext import ops
from s2ap_ext.reference import GROUP, WINDOW, Pattern

SIZES = (1, 33, 4097, 20_000)
PATTERNS = (Pattern(WINDOW, 4, 9), Pattern(GROUP, 64, 27))
PATTERNED = (64 * 16 * 9, 64 * 27)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


def run(dtype: torch.dtype, device: str) -> None:
    """A step of S2AP in single ops, and one in which the update selects, with single weights, windows and groups."""
    generator = torch.Generator().manual_seed(0)
    sizes, patterns = (*SIZES, *PATTERNED), [*(Pattern() for _ in SIZES), *PATTERNS]

    def randn() -> list[torch.Tensor]:
        return [torch.randn(n, generator=generator).to(device, dtype) for n in sizes]

    scores, grads, weights, buffers = randn(), randn(), randn(), randn()
    kept = [n // 10 for n in SIZES] + [2, 30]
    _, cuts = ops.select(scores, weights, kept, patterns=patterns)
    ops.perturb(scores, grads, weights, kept, torch.zeros_like(cuts), gamma=0.05, patterns=patterns)  # the cuts are not near these
    for straight_through in (False, True):
        how = {"patterns": patterns, "straight_through": straight_through}
        _, _, scales = ops.perturb(scores, grads, weights, kept, cuts, gamma=0.05, **how)
        ascent = (grads, scales) if straight_through else None
        _, cuts, _ = ops.update_select(scores, grads, buffers, weights, kept, cuts, ascent=ascent, **SGD, **how)
    ops.update(scores, grads, buffers, **SGD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    for dtype in DTYPES:
        run(dtype, device)
        print(f"{dtype}: select, perturb, update and update_select ran on {device}", flush=True)


if __name__ == "__main__":
    main()
