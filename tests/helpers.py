"""What several test files use: a small network, its inputs and its training, a naive mask, and a counter of selections."""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


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
