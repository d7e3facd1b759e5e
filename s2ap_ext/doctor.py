"""What runs here, and why: the text behind ``s2ap doctor``. Also ``python -m s2ap_ext.doctor``.

Needs nothing beyond the core install, and works where the kernels do not: that is when it is wanted.
"""

from __future__ import annotations

import platform
import sys

import torch

from . import __version__, ops, reference
from ._library import INTERFACE, backend, build_record

SIZES = (1, 37, reference.CHUNK, 3 * reference.CHUNK + 5)


def self_check(device: str) -> str:
    """Runs every op once on ``device`` against the reference. Returns what differs, or an empty string.

    The scores are small integers, so ties abound.
    """
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randint(-4, 5, (n,), generator=generator).float().to(device) for n in SIZES]
    grads = [torch.randn(n, generator=generator).to(device) for n in SIZES]
    weights = [torch.randn(n, generator=generator).to(device) for n in SIZES]
    kept = [n // 3 for n in SIZES]
    masked, cuts = ops.select(scores, weights, kept)
    again, new_cuts, scales = ops.perturb(scores, grads, weights, kept, cuts, gamma=0.1)
    stepped = [s.clone() for s in scores]
    ops.update(stepped, grads, [], lr=0.1, weight_decay=0.01)
    wrong = set()
    for i, (s, g, w) in enumerate(zip(scores, grads, weights, strict=True)):
        out, cut = reference.select(s, w, kept[i])
        if not (torch.equal(masked[i], out) and torch.equal(cuts[i], cut)):
            wrong.add("select")
        out, cut, scale = reference.perturb(s, g, w, kept[i], cut, 0.1, 1e-12)
        if not (torch.equal(again[i], out) and torch.equal(new_cuts[i], cut) and torch.equal(scales[i], scale)):
            wrong.add("perturb")
        expected = s.clone()
        reference.update(expected, g, None, 0.1, 0.0, 0.0, 0.01, False)
        if not torch.equal(stepped[i], expected):
            wrong.add("update")
    return ", ".join(sorted(wrong))


def report() -> tuple[list[tuple[str, str]], bool]:
    """Lines of (what, answer), and whether every op that runs here gives the bits of the reference."""
    b, record = backend(), build_record()
    runs = {"C++": "C++ kernels", "CUDA": "CUDA kernels", "PyTorch": "plain PyTorch, without kernels", "none": "no CUDA device here"}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines = [
        ("s2ap_ext", f"{__version__}, interface {INTERFACE}"),
        ("CPU tensors", runs[b.cpu]),
        ("CUDA tensors", runs[b.cuda]),
        *(("why", why) for why in b.why),
        ("CPU library", record["cpu"]),
        (
            "CUDA library",
            record["cuda"] + (" (not loaded: this torch has no CUDA)" if record["cuda"] == "built" and b.torch_cuda is None else ""),
        ),
        *((f"built for: {name}", value) for name, value in b.build.items() if name != "interface"),
        ("found: torch", b.torch),
        ("found: cuda", b.torch_cuda or "none"),
        ("found: gpus", ", ".join(devices) or "none"),
        ("found: python", f"{platform.python_version()} on {platform.platform()}, {torch.get_num_threads()} threads"),
    ]
    wrong = {device: self_check(device) for device in (["cpu", "cuda"] if devices else ["cpu"])}
    for device, ops_that_differ in wrong.items():
        verdict = f"WRONG RESULTS from {ops_that_differ}" if ops_that_differ else "every op gives the bits of the reference"
        lines.append((f"check on {device}", verdict))
    return lines, not any(wrong.values())


def doctor() -> int:
    """Prints the report. Returns the exit code: 0, or 1 if an op gives wrong results here."""
    lines, good = report()
    width = max(len(what) for what, _ in lines)
    for what, answer in lines:
        print(f"{what:<{width}}  {answer}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(doctor())
