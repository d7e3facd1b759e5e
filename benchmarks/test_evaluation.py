"""What attacks of others cost: APGD, with gradients, and Square, without, on ResNet-18 for CIFAR, on its kept weights and dense.

The attacks are the code of pyautoattack; what computes logits and gradients differs. pytest benchmarks/test_evaluation.py
"""

import pytest
import torch

from s2ap_ext import backend, compile_sparse, densify, sparsify
from s2ap_ext.evaluation import evaluate
from s2ap_ext.models import build_model
from s2ap_ext.parts import make

pytestmark = [
    pytest.mark.skipif(backend().cpu != "C++", reason="needs the C++ kernels"),
    pytest.mark.filterwarnings("ignore"),  # torch's compiler warns of itself
]
pyautoattack = pytest.importorskip("pyautoattack")

SPARSITIES = (0.9, 0.95, 0.99)
EPS = 1e-4  # so small that hardly an image is fooled: then every form has the same work, since Square leaves fooled images out


def network(quick):
    return build_model("resnet18", num_classes=10, width=8 if quick else 64, seed=0)


def questions(model, quick):
    """Images with the classes that the model gives them, so that all of them are attacked."""
    x = torch.rand(4 if quick else 64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return x, model(x).argmax(dim=1)


@pytest.fixture
def short(monkeypatch):
    """APGD with 10 of its 100 steps; Square has 50 of its 5,000 queries. Their times are proportional to these."""
    original = pyautoattack.AutoAttack._set_version

    def set_version(self, version="standard"):
        original(self, version)
        self.apgd.n_iter = self.apgd.n_iter_orig = 10

    monkeypatch.setattr(pyautoattack.AutoAttack, "_set_version", set_version)


@pytest.mark.parametrize(("name", "options"), [("apgd_ce", {}), ("square", {"queries": 50})])
def test_attack(side_by_side, quick, short, name, options):
    options = {"queries": 5} if quick and options else options
    functions = {}

    def attack(model, x, y):
        part = make("attack", name, eps=EPS, **options)
        return lambda: evaluate(model, x, y, [part], eps=EPS, batch_size=64)

    for sparsity in SPARSITIES:
        dense = densify(sparsify(network(quick), sparsity)).eval()
        x, y = questions(dense, quick)
        functions[f"ours, {1 - sparsity:.0%} kept"] = attack(compile_sparse(dense, x[:1]), x, y)
    dense = densify(sparsify(network(quick), 0.95)).eval()
    x, y = questions(dense, quick)
    functions["dense, contiguous"] = attack(dense, x, y)
    functions["dense, channels_last"] = attack(
        densify(sparsify(network(quick), 0.95)).eval().to(memory_format=torch.channels_last),
        x.contiguous(memory_format=torch.channels_last),
        y,
    )
    if not quick:
        functions["dense, torch.compile"] = attack(torch.compile(dense), x, y)
    side_by_side(functions, rounds=3, what=f"{name}, ResNet-18, batch {len(x)}")
