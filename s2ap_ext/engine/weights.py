"""What steps compute with, taken from a model: kept weights, dense weights, per-channel scales; normalisations folded in."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modes import evaluation_mode
from ..nn import S2APConv2d, S2APLinear
from ..nn.kept_weights import Convolution, KeptWeights
from ..sparse_reference import rows_of


@dataclass(frozen=True)
class Dense:
    """The weight of a layer that runs dense."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Scale:
    """``scale * x + shift`` for each channel."""

    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Constant:
    """What is the same for every image, [C, H, W]."""

    values: Tensor


@dataclass(frozen=True)
class Source:
    """Where a step's weights come from: a layer, and what is done to its output channels, in order.

    Attributes:
        kind: ``"sparse"``, ``"dense"``, ``"scale"`` (no layer) or ``"constant"`` (tokens, their tensor's name in ``layer``).
        channels: of the output.
        layer: name of the module with the weight, or None.
        changes: ``("norm", name of a BatchNorm)``, ``("affine", name of a LayerNorm)``, or ``("add" | "sub" | "mul" | "div", a number or
            the name of a tensor)``.
        convolution: kernel size, stride, padding, dilation and groups.
        tensor: what the module calls the weight.
    """

    kind: str
    channels: int
    layer: str | None = None
    changes: tuple[tuple[str, str | float], ...] = ()
    convolution: Convolution = ((1, 1), (1, 1), (0, 0), (1, 1), 1)
    tensor: str = "weight"

    def followed_by(self, later: Source) -> Source:
        return replace(self, changes=self.changes + later.changes)

    def take(self, model: nn.Module) -> KeptWeights | Dense | Scale | Constant:
        """The weights as they are in ``model`` now; nothing of them shares memory with it."""
        if self.kind == "constant" and self.layer is not None:
            tokens = tensor_of(model, self.layer).reshape(-1, self.channels)
            return Constant(self._finite(tokens.t()[:, None].clone(memory_format=torch.contiguous_format)))
        scale, shift = _scale_and_shift(model, self.changes, self.channels)
        if self.layer is None:
            return Scale(self._finite(scale.float()), self._finite(shift.float()))
        module = model.get_submodule(self.layer)
        weight, bias = weight_of(module, self.tensor), getattr(module, self.tensor.replace("weight", "bias"))
        assert bias is None or isinstance(bias, Tensor)
        if self.changes:
            bias = (shift if bias is None else scale * bias + shift).float()
        if bias is not None:
            bias = self._finite(bias.detach().clone())
        if self.kind == "dense":
            factor = scale.float().view(-1, *[1] * (weight.dim() - 1))
            weight = self._finite(weight * factor if self.changes else weight.clone())
            return Dense(weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight, bias)
        kept = KeptWeights.of(weight, None, self.convolution)
        values = kept.values * scale.float().index_select(0, rows_of(kept.starts, len(weight))) if self.changes else kept.values
        return replace(kept, values=self._finite(values), bias=bias, flat=None)

    def _finite(self, tensor: Tensor) -> Tensor:
        """``tensor``, checked: a ReLU in the kernels makes 0 of NaN, so none may come into being."""
        if not tensor.isfinite().all():
            names = [name for name in (self.layer, *(operand for _, operand in self.changes)) if isinstance(name, str)]
            raise ValueError(f"model: NaN or infinity in the tensors of {', '.join(names)}")
        return tensor


@dataclass(frozen=True)
class PartSource:
    """A piece of the model's graph, with copies of the modules that it calls."""

    graph: fx.Graph

    def take(self, model: nn.Module) -> fx.GraphModule:
        return copy.deepcopy(fx.GraphModule(model, self.graph)).eval().requires_grad_(False)


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """The weight of this name that a layer computes with, contiguous. To be read at once: the next selection may write there."""
    weight = module._masked_weight() if isinstance(module, (S2APConv2d, S2APLinear)) else getattr(module, name)
    assert isinstance(weight, Tensor)
    return weight.detach().contiguous()


def _scale_and_shift(model: nn.Module, changes: tuple[tuple[str, str | float], ...], channels: int) -> tuple[Tensor, Tensor]:
    """The changes as one scale and one shift, in double precision."""
    scale, shift = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    for change, operand in changes:
        if change == "norm":
            norm = model.get_submodule(str(operand))
            assert isinstance(norm, _BatchNorm)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            factor = (norm.running_var.double() + norm.eps).rsqrt()
            if norm.weight is not None:
                factor = factor * norm.weight.double()
            scale, shift = scale * factor, (shift - norm.running_mean.double()) * factor
            if norm.bias is not None:
                shift = shift + norm.bias.double()
            continue
        if change == "affine":
            layer_norm = model.get_submodule(str(operand))
            assert isinstance(layer_norm, nn.LayerNorm)
            if layer_norm.elementwise_affine:
                scale, shift = scale * layer_norm.weight.double(), shift * layer_norm.weight.double()
            if layer_norm.bias is not None:
                shift = shift + layer_norm.bias.double()
            continue
        value = tensor_of(model, operand).double().reshape(-1) if isinstance(operand, str) else operand
        if change in ("mul", "div"):
            times = value if change == "mul" else 1 / value
            scale, shift = scale * times, shift * times
        else:
            shift = shift + value if change == "add" else shift - value
    return scale, shift


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer called ``name``."""
    owner, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), attribute)
    return tensor.detach()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it all modules are in evaluation mode, and autograd and autocast are off."""
    with evaluation_mode(model, freeze=False), torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield
