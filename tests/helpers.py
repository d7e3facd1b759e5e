"""What several test files use: a small network, its inputs and its training, naive masks and projections, a counter of selections."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

FIXTURES = json.loads((Path(__file__).parent / "fixtures.json").read_text())  # worked numbers


class Selections(TorchDispatchMode):
    """Counts how many layers are selected, by op."""

    def __init__(self):
        super().__init__()
        self.layers = Counter()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "s2ap":
            name = func._schema.name.removeprefix("s2ap::")
            self.layers[name] += len(args[0])
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 36, 10)
    )


def oracle_mask(scores, kept):
    order = scores.abs().flatten().argsort(stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[scores.numel() - kept :]] = True
    return mask.view(scores.shape)


def images(n=4, seed=0):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 1, 2, 3])


def closure_for(net, optimizer, x=None):
    """What ``optimizer.step`` calls to train ``small_net()`` on four images."""
    x = images() if x is None else x

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), LABELS)
        loss.backward()
        return loss

    return closure


def assert_same_state(one, two):
    """Two modules hold the same bits."""
    for (name, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def l1_projection(x, moved, eps):
    """Onto the l1 ball around ``x`` and [0, 1], for one image, by bisection on what every pixel gives up."""
    x, moved = (t.double().flatten().numpy() for t in (x, moved))

    def at(given_up):
        shift = moved - x
        return np.clip(x + np.sign(shift) * np.maximum(np.abs(shift) - given_up, 0), 0, 1)

    low, high = 0.0, np.abs(moved - x).max()
    if np.abs(at(0) - x).sum() <= eps:
        return torch.from_numpy(at(0))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.abs(at(middle) - x).sum() > eps else (low, middle)
    return torch.from_numpy(at(high))


def snapshot(model):
    def grad(p):
        return None if p.grad is None else p.grad.clone()

    parameters = {name: (p.requires_grad, grad(p), p.detach().clone()) for name, p in model.named_parameters()}
    return [m.training for m in model.modules()], parameters, {k: v.clone() for k, v in model.state_dict().items()}


def assert_as_found(model, before):
    modes, parameters, state = before
    assert [m.training for m in model.modules()] == modes
    for name, p in model.named_parameters():
        requires_grad, grad, value = parameters[name]
        assert p.requires_grad == requires_grad
        assert torch.equal(p.detach(), value)
        assert p.grad is None if grad is None else torch.equal(p.grad, grad)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
