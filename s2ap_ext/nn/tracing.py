"""Whether a block ties what belongs together, found out by running it.

Some units of the block have their columns set to 0, and then their rows to anything else. If the rows belong to these units alone, the
block's output does not move; with the columns in place it does. Both are asked of two halves of the units, drawn at random, so rows that
belong to other units are noticed. The numbers set are of the size of 1 whatever the weights are, so nothing hides behind small ones.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .structure import Block

TOKENS = (2, 4)  # images and tokens of the inputs that are made up


class NotRunnable(RuntimeError):
    """There is no input that the block can be run with."""


class Trace:
    """The inputs of blocks, as one forward of the model gives them.

    Args:
        model: what the blocks belong to.
        blocks: those that will be run.
        example: the model's input: a tensor, a tuple of arguments or a mapping of named ones. None: models of Hugging Face's
            ``transformers``, also within others, are run with what their configurations tell, and blocks of others with random tokens.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[Block], example: Any = None) -> None:
        self.model = model
        self._inputs: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        calls = configured_calls(model) if example is None else [(model, example)]

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module not in self._inputs:
                self._inputs[module] = copy.deepcopy((args, kwargs))  # there may be caches among them, which a forward changes

        handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in {block.module for block in blocks}]
        try:
            with _evaluating(model):
                for module, inputs in calls:  # an input that a configuration tells may be none after all; the user's own has to be one
                    with contextlib.nullcontext() if example is not None else contextlib.suppress(Exception):
                        _call(module, inputs)
        finally:
            for handle in handles:
                handle.remove()

    def run(self, block: Block) -> list[Tensor]:
        """The outputs of the block's last layer, and the first that the block itself returns.

        Raises:
            NotRunnable: the block was not called in the forward, and random tokens do not suit it either.
        """
        if block.columns.weight.is_meta:
            raise NotRunnable("the model is on the meta device")
        outputs: list[Tensor] = []
        handle = block.columns.register_forward_hook(lambda module, args, output: outputs.append(output))
        args, kwargs = copy.deepcopy(self._inputs.get(block.module)) or ((_tokens(block),), {})
        try:
            with _evaluating(self.model):
                returned = block.module(*args, **kwargs)
        except Exception as error:
            raise NotRunnable(f"{type(error).__name__}: {error}".splitlines()[0]) from error
        finally:
            handle.remove()
        return [*outputs, *_first_tensor(returned)]

    def holds(self, block: Block) -> bool:
        """Whether the rows of each unit matter to its own columns, and to nothing else.

        Raises:
            NotRunnable: as for :meth:`run`.
        """
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(block.count, generator=generator)
        halves = [half for half in order.chunk(2) if len(half)]
        columns = block.columns.weight
        saved = [(tensor, tensor.detach().clone()) for tensor in (*(rows.tensor for rows in block.rows), columns)]
        try:
            with torch.no_grad():
                for tensor, _ in saved:
                    _set_random(tensor, generator)
                whole = columns.detach().clone()
                for half in halves:
                    before = self.run(block)
                    self._replace_rows(block, half, generator)
                    moved = not same(before, self.run(block))
                    columns.view(len(columns), block.count, -1)[:, half.to(columns.device)] = 0
                    before = self.run(block)
                    self._replace_rows(block, half, generator)
                    if not moved or not same(before, self.run(block)):
                        return False
                    columns.copy_(whole)
        finally:
            with torch.no_grad():
                for tensor, value in saved:
                    tensor.copy_(value)
        return True

    def _replace_rows(self, block: Block, units: Tensor, generator: torch.Generator) -> None:
        for rows in block.rows:
            by_unit = rows.by_unit(block.count)
            for part in by_unit:
                fresh = torch.empty_like(part)
                _set_random(fresh, generator)
                part[units.to(part.device)] = fresh[units.to(part.device)]


def same(before: Iterable[Tensor], after: Iterable[Tensor]) -> bool:
    """Whether outputs are equal, but for rounding."""
    for a, b in zip(before, after, strict=True):
        size = float(a.abs().max()) if a.numel() else 0.0
        if not torch.allclose(a, b, rtol=0, atol=torch.finfo(a.dtype).eps ** 0.75 * size):  # 6e-6 for float32, 0.03 for bfloat16
            return False
    return True


def configured_calls(model: nn.Module) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """The models of ``transformers`` that ``model`` is or holds, the outermost only, each with an input that its configuration tells."""
    calls: list[tuple[nn.Module, dict[str, Tensor]]] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module not in inside and (inputs := _configured_example(module)) is not None:
            calls.append((module, inputs))
            inside.update(module.modules())
    return calls


def _configured_example(model: nn.Module) -> dict[str, Tensor] | None:
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    parameter = next(model.parameters(), None)
    if config is None or parameter is None:
        return None
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        images = torch.rand(1, getattr(config, "num_channels", 3), height, width, generator=torch.Generator().manual_seed(0))
        return {name: images.to(parameter)}
    if name == "input_ids" and hasattr(config, "vocab_size"):
        return {name: torch.arange(8, device=parameter.device).view(1, 8) % config.vocab_size}
    return None


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _tokens(block: Block) -> Tensor:
    weight = block.rows[0].tensor
    return torch.randn(*TOKENS, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)


def _set_random(tensor: Tensor, generator: torch.Generator) -> None:
    """Numbers with which a linear layer keeps the size of what it gets."""
    scale = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1.0
    tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))


def _first_tensor(returned: Any) -> list[Tensor]:
    while isinstance(returned, (tuple, list, Mapping)) and len(returned):
        returned = next(iter(returned.values())) if isinstance(returned, Mapping) else returned[0]
    return [returned] if isinstance(returned, Tensor) else []


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no graph; modes and random numbers are afterwards what they were."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module in training:
            module.training = True
