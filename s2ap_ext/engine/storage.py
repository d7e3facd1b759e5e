"""Networks as files: tensors in safetensors, the programs as JSON in its header. Nothing passes through pickle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _files
from ..nn.kept_weights import KeptWeights
from .steps import Step
from .validation import check_program, layers_of, of_type, shape_of, source_of, step_of
from .weights import Constant, Dense, Scale, Source

KIND = "sparse network"
VERSION = 5
WEIGHTS: dict[str, type[KeptWeights | Dense | Scale | Constant]] = {cls.__name__: cls for cls in (KeptWeights, Dense, Scale, Constant)}


class Stored(NamedTuple):
    """What a file holds of a network: what :class:`s2ap_ext.engine.SparseNetwork` is made from, and its weights."""

    steps: Sequence[Step]
    small_batch_steps: Sequence[Step]
    shapes: Sequence[tuple[int, ...]]
    output: int
    sources: Sequence[Source]
    chunk: int
    layers: dict[str, str]
    small_batch_layers: dict[str, str]
    weights: Sequence[KeptWeights | Dense | Scale | Constant]


def save(network: Stored, path: str | Path) -> None:
    """Writes ``network`` to ``path``, whole or not at all."""
    tensors, weights = {}, []
    for i, own in enumerate(network.weights):
        weights.append(type(own).__name__)
        for field in dataclasses.fields(own):
            if (tensor := getattr(own, field.name)) is not None:
                tensors[f"{i}.{field.name}"] = tensor
    about = {
        "kind": KIND,
        "version": VERSION,
        "steps": _described(network.steps),
        "small_batch_steps": _described(network.small_batch_steps),
        "shapes": network.shapes,
        "output": network.output,
        "weights": weights,
        "sources": [dataclasses.asdict(source) for source in network.sources],
        "layers": network.layers,
        "small_batch_layers": network.small_batch_layers,
        "chunk": network.chunk,
    }
    _files.save(path, tensors, about)


def load(path: str | Path) -> Stored:
    """Reads what :func:`save` wrote, all of it checked.

    Raises:
        ValueError: no such file, not a file of this kind, or one whose contents do not belong together.
    """
    tensors, about = _files.load(path)
    if about.get("kind") != KIND:
        raise ValueError(f"network {path}: not a file that SparseNetwork.save wrote")
    if about.get("version") != VERSION:
        raise ValueError(f"network {path}: of version {about.get('version')!r:.100}, this program reads version {VERSION}")
    try:
        return _stored(tensors, about)
    except (KeyError, ValueError) as error:
        raise ValueError(f"network {path}: damaged ({type(error).__name__}: {error})") from None


def _stored(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Stored:
    weights = [_weights(kind, i, tensors) for i, kind in enumerate(of_type(about["weights"], list, "weights"))]
    sources = [source_of(source, f"sources[{i}]") for i, source in enumerate(of_type(about["sources"], list, "sources"))]
    shapes = [shape_of(shape, f"shapes[{i}]") for i, shape in enumerate(of_type(about["shapes"], list, "shapes"))]
    output, chunk = of_type(about["output"], int, "output"), of_type(about["chunk"], int, "chunk")
    if chunk < 1 or len(sources) != len(weights):
        raise ValueError(f"expected a chunk of at least 1 and as many sources as weights, got {chunk}, {len(sources)}, {len(weights)}")
    steps, small_batch_steps = (
        [step_of(step, f"{which}[{i}]") for i, step in enumerate(of_type(about[which], list, which))]
        for which in ("steps", "small_batch_steps")
    )
    check_program(steps, shapes, output, weights, "steps")
    check_program(small_batch_steps, shapes, output, weights, "small_batch_steps")
    layers = {which: layers_of(about[which], which) for which in ("layers", "small_batch_layers")}
    return Stored(steps, small_batch_steps, shapes, output, sources, chunk, **layers, weights=weights)


def _described(steps: Sequence[Step]) -> list[dict[str, Any]]:
    return [{"step": type(step).__name__, **dataclasses.asdict(step)} for step in steps]


def _weights(kind: Any, index: int, tensors: Mapping[str, Tensor]) -> KeptWeights | Dense | Scale | Constant:
    if of_type(kind, str, f"weights[{index}]") not in WEIGHTS:
        raise ValueError(f"weights[{index}]: expected one of {', '.join(WEIGHTS)}, got {kind!r:.100}")
    cls = WEIGHTS[kind]
    fields: dict[str, Any] = {field.name: tensors.get(f"{index}.{field.name}") for field in dataclasses.fields(cls)}
    weights = cls(**fields)
    if isinstance(weights, Dense) and weights.weight is not None and weights.weight.dim() == 4:  # files hold no memory formats
        return dataclasses.replace(weights, weight=weights.weight.contiguous(memory_format=torch.channels_last))
    return weights
