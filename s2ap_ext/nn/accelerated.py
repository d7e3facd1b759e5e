"""The forwards of a model in lower precision, in the channels_last layout, or compiled: what makes a training step fast on a GPU.

The parameters stay as they are, in float32 and in their own layout, and so do the kernels that select, perturb and update.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layers import pruned_layers, refresh

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", "tf32", *AUTOCAST)


class Accelerated(nn.Module):
    """Calls ``model`` under autocast, with images in the channels_last layout, or compiled; the logits are float32.

    It holds the model and nothing else, so whatever looks for parameters, modes or pruned layers finds those of the model. Autocast spans
    one forward and neither the loss nor the backward: a weight that moves between two forwards, as in AWP, is cast anew.

    With ``compiled_batch``, ``torch.compile`` gets the model without its selections. The masked weights are made before, by the layers
    themselves, once per change of the scores, and are inputs of the compiled graph. So gradients that are deferred or listened to
    (S2AP's, HARP's) are the same as without. Batches of other sizes run as they would without, so that nothing is compiled for the last
    batch of an epoch.

    Args:
        model: gives logits [N, K] for images [N, C, H, W].
        precision: ``"bf16"`` and ``"fp16"`` are those of autocast. ``"fp32"`` and ``"tf32"`` change nothing here: the latter is a mode of
            CUDA's (:func:`matmul_precision`).
        channels_last: the images are given in this layout, which torch's convolutions keep.
        compiled_batch: batches of so many images run compiled; 0: none do.
        cuda_graphs: these run in CUDA graphs too (``torch.compile``'s mode ``reduce-overhead``), which spares their kernels' launches.
            What a graph gives stays in its own memory, which its next run writes over: the logits are copied out of it, and gradients
            must have been used by then, as they have in a step.
        backend: of ``torch.compile``.

    Raises:
        ValueError: an unknown ``precision``, a negative ``compiled_batch``, or ``cuda_graphs`` without one.

    Equivalent to::

        logits: Tensor
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            logits = torch.compile(model)(x.contiguous(memory_format=torch.channels_last))
        logits = logits.float()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: str = "fp32",
        channels_last: bool = False,
        compiled_batch: int = 0,
        cuda_graphs: bool = False,
        backend: str = "inductor",
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
        if compiled_batch < 0:
            raise ValueError(f"compiled_batch: expected an integer >= 0, got {compiled_batch}")
        if cuda_graphs and not compiled_batch:
            raise ValueError("cuda_graphs: expected a compiled_batch above 0 with it, got 0")
        self.model = model
        self.dtype = AUTOCAST.get(precision)
        self.channels_last = channels_last
        self.compiled_batch = compiled_batch
        self.cuda_graphs = cuda_graphs
        how: dict[str, Any] = {"mode": "reduce-overhead"} if cuda_graphs else {}
        self._compiled: Any = torch.compile(self._call, backend=backend, dynamic=False, **how) if compiled_batch else None

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        logits: Tensor
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            if self.compiled_batch and len(x) == self.compiled_batch:
                with masked_weights_made(self.model):
                    logits = self._compiled(x)
                    if self.cuda_graphs:
                        logits = logits.clone()
            else:
                logits = self.model(x)
        return logits.float() if self.dtype is not None else logits

    def _call(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits


@contextmanager
def masked_weights_made(model: nn.Module) -> Iterator[None]:
    """Within it the pruned layers of ``model`` compute with the masked weights that they have now, gradients included."""
    layers = pruned_layers(model).values()
    refresh(layers)
    try:
        for layer in layers:
            layer.mask_state.made = layer._masked_weight()
        yield
    finally:
        for layer in layers:
            layer.mask_state.made = None


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Within it CUDA rounds the operands of float32 products and convolutions to TF32, if ``precision`` is ``"tf32"``.

    For any other precision torch's settings stay as they are. By those of torch itself, convolutions use TF32 and products do not.
    """
    if precision != "tf32":
        yield
        return
    # Not by torch's newer fp32_precision: torch.compile reads these settings, and torch refuses to give them where both forms were used.
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def check_precision(precision: str, device: torch.device) -> None:
    """Raises ValueError if ``device`` does not compute in ``precision``."""
    if precision in ("tf32", "fp16") and device.type != "cuda":
        raise ValueError(f"precision: {precision} needs a CUDA device, got {device.type}; bf16 and fp32 run on every one")


def check_cuda_graphs(wanted: bool, compiled: bool, device: torch.device) -> None:
    """Raises ValueError if CUDA graphs are ``wanted`` where nothing is ``compiled``, or on another ``device``."""
    if wanted and not compiled:
        raise ValueError("cuda_graphs: expected compile = true with it, since compiled models run in them, got compile = false")
    if wanted and device.type != "cuda":
        raise ValueError(f"cuda_graphs: needs a CUDA device, got {device.type}")
