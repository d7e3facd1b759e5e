"""The memory that a step of S2AP takes beyond what training has anyway. ResNet-18, sparsity 0.9.

pytest benchmarks/test_memory.py
"""

import pytest
import torch
from measure import ROWS

from s2ap_ext import S2AP, sparsify
from s2ap_ext.models import build_model
from s2ap_ext.nn import pruned_layers, train_scores
from s2ap_ext.speed import peak_extra_bytes


@pytest.mark.parametrize("defer_grads", [False, True])
def test_memory_of_a_step(side_by_side, quick, device, defer_grads):
    """The whole step but for the network's own forward and backward: gradients of the masked weights are there and stay.

    What is counted beyond weights, scores, the two gradients and the momentum: the memory of the masked weights, and what the peak needs
    on top of that.
    """
    net = train_scores(sparsify(build_model("resnet18", num_classes=10, width=4 if quick else 64, seed=0), 0.9)).to(device)
    layers = list(pruned_layers(net).values())
    base = torch.optim.SGD([layer.scores for layer in layers], lr=1e-3, momentum=0.9)
    optimizer = S2AP(net, base, gamma=1e-3, defer_grads=defer_grads)
    grads = [[1e-3 * torch.randn_like(layer.weight) for layer in layers] for _ in range(2)]  # of the first and of the second backward
    given = {"loss": 0}

    def closure():
        optimizer.zero_grad()
        for layer, grad in zip(layers, grads[given["loss"] % 2], strict=True):
            if defer_grads:
                layer.mask_state.tell(layer.scores, grad)  # as the backward of the layer does
            else:
                layer.scores.grad = grad
        given["loss"] += 1
        return torch.zeros((), device=device)

    def step():
        optimizer.step(closure)

    for _ in range(3):
        step()
    scores = sum(layer.scores.numel() * layer.scores.element_size() for layer in layers)
    masked = sum(layer.mask_state.memory.numel() * layer.mask_state.memory.element_size() for layer in layers)
    extra = peak_extra_bytes(step, device)
    side_by_side({f"S2AP step, defer_grads={defer_grads}": step}, rounds=5, what=f"memory of an S2AP step, defer_grads={defer_grads}")
    ROWS[-1]["note"] = (
        "Beyond weights, scores, both gradients and momentum: the masked weights, "
        f"{masked / scores:.1%} of the scores' bytes, and at the peak "
        + ("not measured here" if extra is None else f"{extra / scores:.1%}")
        + " more. The time is that of the step without the network's forwards and backwards."
    )
    ROWS[-1]["extra_share"] = None if extra is None else extra / scores
