"""What tests of evaluations share: a network with images of which some hold, and AutoAttack with few iterations."""

import torch
from torch import nn

EPS = {"linf": 0.012, "l2": 0.12, "l1": 1.0}  # with which some images of the network below hold and some do not


def small_network(classes=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, classes)).eval()


def images_of(model, n=12, wrong=2):
    """Images and the classes that the model gives them, except for the last ``wrong``."""
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    y[n - wrong :] = (y[n - wrong :] + 1) % logits.shape[1]
    return x, y


def cut_down(monkeypatch):
    """Makes every AutoAttack that is made from now on a short one, whoever makes it."""
    from pyautoattack import AutoAttack

    original = AutoAttack._set_version

    def set_version(self, version="standard"):
        original(self, version)
        for attack in (self.apgd, self.apgd_targeted):
            attack.n_iter = attack.n_iter_orig = 4
        self.apgd.n_restarts = min(self.apgd.n_restarts, 2)
        self.fab.n_restarts = min(self.fab.n_restarts, 2)
        self.apgd.eot_iter = min(self.apgd.eot_iter, 2)
        self.fab.n_iter, self.square.n_queries = 2, 20

    monkeypatch.setattr(AutoAttack, "_set_version", set_version)
