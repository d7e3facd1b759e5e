"""Deploys a pruned network on a CPU: compiled to its kept weights, saved, loaded, and timed beside the dense form.

``python examples/deploy.py``. It takes a few seconds; the network is pruned by the magnitude of its random weights, since its speed does
not depend on how it was trained.
"""

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch

from s2ap_ext import densify, sparsify
from s2ap_ext.engine import SparseNetwork, compile_sparse
from s2ap_ext.models import build_model


def milliseconds(network, images, calls):
    """The median over some calls, after one that is not counted."""
    times = []
    with torch.no_grad():
        network(images)
        for _ in range(calls):
            begin = time.perf_counter()
            network(images)
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--width", type=int, default=64, help="channels of ResNet-18's first stage")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--calls", type=int, default=5, help="how often each form is timed")
    args = parser.parse_args()

    images = torch.rand(args.batch, 3, 32, 32)
    model = sparsify(build_model("resnet18", num_classes=10, width=args.width), args.sparsity).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        compile_sparse(model, images[:1]).save(path)
        network = SparseNetwork.load(path)
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    dense = densify(copy.deepcopy(model))
    with torch.no_grad():
        print(f"logits differ by {(network(images) - dense(images)).abs().max():.1g} at most")
    for name, form in (("dense", dense), ("on its kept weights", network)):
        print(f"{name:20} {milliseconds(form, images, args.calls):8.1f} ms for {args.batch} images")


if __name__ == "__main__":
    main()
