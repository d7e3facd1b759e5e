"""A whole mask-search step of ResNet-18 on images of CIFAR's size: PGD-10, forward, backward, optimiser step. Batch 64, sparsity 0.9.

pytest benchmarks/test_step.py
"""

import pytest
import torch

from s2ap_ext import S2AP, sparsify
from s2ap_ext.attacks import Pgd
from s2ap_ext.baselines import mask_every_forward
from s2ap_ext.losses import PgdAt
from s2ap_ext.models import build_model
from s2ap_ext.nn import refresh, train_scores

SPARSITY = 0.9


@pytest.fixture(scope="module")
def size(quick):
    return {"batch": 4, "width": 4, "steps": 2} if quick else {"batch": 64, "width": 64, "steps": 10}


class Step:
    """One training step of a pruned network; ``gamma=None`` is a plain one."""

    def __init__(self, size, device, prune, gamma):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(size["batch"], 3, 32, 32, generator=generator).to(device)
        self.y = torch.randint(10, (size["batch"],), generator=generator).to(device)
        self.model = prune(build_model("resnet18", num_classes=10, width=size["width"], seed=0)).to(device)
        self.loss = PgdAt(adversary=Pgd(eps=8 / 255, step_size=2 / 255, steps=size["steps"]))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9, weight_decay=5e-4)
        self.s2ap = None if gamma is None else S2AP(self.model, self.optimizer, gamma=gamma)

    def __call__(self):
        refresh(self.model)
        x_adv = self.loss.attack(self.model, self.x, self.y)

        def closure():
            self.optimizer.zero_grad()
            value, _ = self.loss(self.model, self.x, x_adv, self.y)
            value.backward()
            return value

        if self.s2ap is not None:
            self.s2ap.step(closure)
        else:
            closure()
            self.optimizer.step()


def test_step(side_by_side, size, device):
    def ours(model):
        return train_scores(sparsify(model, SPARSITY))

    side_by_side(
        {
            "S2AP": Step(size, device, ours, gamma=1e-3),
            "plain": Step(size, device, ours, gamma=None),
            "plain, sort in every forward": Step(size, device, lambda m: mask_every_forward(m, SPARSITY), gamma=None),
            "plain, sort with a mask cache": Step(size, device, lambda m: mask_every_forward(m, SPARSITY, cached=True), gamma=None),
        },
        rounds=5,
        wall=True,
        what=f"training step with PGD-{size['steps']}, ResNet-18 of width {size['width']}, batch {size['batch']}",
    )
