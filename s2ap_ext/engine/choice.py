"""Which layers of a network run on their kept weights: what :func:`s2ap_ext.engine.compile_sparse` does where nobody chooses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .._library import backend
from ..nn import cost
from ..nn.execution import sparse_kernels_run


@dataclass(frozen=True)
class Layer:
    """What is known of a convolution or linear layer when it is chosen how to run it.

    Attributes:
        name: in the model.
        weight: its weight's shape.
        density: the fraction of its weights that are not 0.
        input, output: shapes of an image's activations, without the batch.
        batch: images that run together: ``chunk`` of the network, or 1 where the images are too few for blocks.
        stride, groups: of the convolution.
    """

    name: str
    weight: tuple[int, ...]
    density: float
    input: tuple[int, ...]
    output: tuple[int, ...]
    batch: int
    stride: tuple[int, int] = (1, 1)
    groups: int = 1


def lanes() -> int:
    """Images in a block: the floats in a vector of this machine."""
    if backend().cpu == "C++":
        from .._C import lanes

        return int(lanes())
    return 8


FILLED = 0.5  # of a block's lanes: with fewer images, images beat blocks


def in_blocks(images: int) -> bool:
    """Whether so many images run in blocks."""
    return images >= FILLED * lanes()


def cheapest(layers: Sequence[Layer]) -> dict[str, str]:
    """``"sparse"`` or ``"dense"`` for each layer of a network, by the cost model (:mod:`s2ap_ext.nn.cost`); all of the same batch.

    A convolution is sparse where that is faster, counting that a dense one among sparse ones has to take its activations out of their
    blocks and to put them back. If the whole network is faster dense, all of it is dense.
    """
    if not sparse_kernels_run():
        return {layer.name: "dense" for layer in layers}
    costs = {layer.name: _seconds(layer) for layer in layers if len(layer.weight) == 4}
    sparse = {name for name, (on_kept, dense, moved) in costs.items() if on_kept < dense + moved}
    mixed = sum(on_kept if name in sparse else dense + moved for name, (on_kept, dense, moved) in costs.items())
    if mixed >= sum(dense for _, dense, _ in costs.values()):
        sparse = set()
    return {layer.name: "sparse" if layer.name in sparse else "dense" for layer in layers}


def _seconds(layer: Layer) -> tuple[float, float, float]:
    """On the kept weights; dense; and of moving the activations into blocks or out of them."""
    shape = cost.Shape.from_sizes(layer.weight, (layer.batch, *layer.input), layer.stride)
    blocks = in_blocks(layer.batch)
    moved = cost.seconds({"activations": shape.activations}) if blocks else 0.0
    on_kept = cost.sparse_terms(shape, layer.density, blocks=blocks, computed=computed(layer))
    return cost.seconds(on_kept), cost.seconds(cost.dense_terms(shape)), moved


def computed(layer: Layer) -> float:
    """Outputs that the kernel computes for each that is wanted: whole vectors of images, or of positions of the padded plane."""
    if in_blocks(layer.batch):
        return lanes() * -(-layer.batch // lanes()) / layer.batch
    height, width = layer.output[1:]
    spans = [-(-(k - 1) // s) for k, s in zip(layer.weight[2:], layer.stride, strict=True)]
    pitch = width + spans[1]
    positions = (layer.batch * (height + spans[0]) - spans[0]) * pitch - spans[1]  # up to the last output
    return lanes() * math.ceil(positions / lanes()) / (layer.batch * height * width)
