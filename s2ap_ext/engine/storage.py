"""Networks as files: tensors in safetensors, the programs as JSON in its header. Nothing passes through pickle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _files
from ..nn.kept_weights import KeptWeights
from .network import SparseNetwork
from .steps import STEPS, Step
from .weights import Dense, Scale, Source

KIND = "sparse network"
VERSION = 4
WEIGHTS = {cls.__name__: cls for cls in (KeptWeights, Dense, Scale)}


def save(network: SparseNetwork, path: str | Path) -> None:
    if network.dense_parts:
        names = "; ".join(f"{part.name} ({part.reason})" for part in network.dense_parts)
        raise ValueError(f"network: cannot be saved, for only the model's own code can compute its dense parts: {names}")
    tensors, weights = {}, []
    for i, own in enumerate(network._weights):
        weights.append(type(own).__name__)
        for field in dataclasses.fields(own):
            if (tensor := getattr(own, field.name)) is not None:
                tensors[f"{i}.{field.name}"] = tensor
    about = {
        "kind": KIND,
        "version": VERSION,
        "steps": _described(network._steps),
        "small_batch_steps": _described(network._small_batch_steps),
        "shapes": network._shapes,
        "output": network._output,
        "weights": weights,
        "sources": [dataclasses.asdict(source) for source in network._sources],
        "layers": network.layers,
        "small_batch_layers": network.small_batch_layers,
        "chunk": network.chunk,
    }
    _files.save(path, tensors, about)


def load(path: str | Path) -> SparseNetwork:
    tensors, about = _files.load(path)
    if about.get("kind") != KIND:
        raise ValueError(f"network {path}: not a file that SparseNetwork.save wrote")
    if about["version"] != VERSION:
        raise ValueError(f"network {path}: of version {about['version']}, this program reads version {VERSION}")
    try:
        steps, small_batch_steps = (
            [STEPS[described.pop("step")](**_tuples(described)) for described in about[which]] for which in ("steps", "small_batch_steps")
        )
        shapes, sources = _tuples(about["shapes"]), [Source(**_tuples(source)) for source in about["sources"]]
        layers = {"layers": about["layers"], "small_batch_layers": about["small_batch_layers"]}
        network = SparseNetwork(steps, small_batch_steps, shapes, about["output"], sources, chunk=about["chunk"], **layers)
        network._weights = tuple(_weights(WEIGHTS[kind], i, tensors) for i, kind in enumerate(about["weights"]))
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"network {path}: damaged ({type(error).__name__}: {error})") from None
    return network


def _described(steps: Sequence[Step]) -> list[dict[str, Any]]:
    return [{"step": type(step).__name__, **dataclasses.asdict(step)} for step in steps]


def _weights(cls: type, index: int, tensors: dict[str, Tensor]) -> KeptWeights | Dense | Scale:
    weights = cls(**{field.name: tensors.get(f"{index}.{field.name}") for field in dataclasses.fields(cls)})
    if isinstance(weights, Dense) and weights.weight.dim() == 4:  # files hold tensors without their memory format
        return dataclasses.replace(weights, weight=weights.weight.contiguous(memory_format=torch.channels_last))
    if isinstance(weights, KeptWeights):
        # The kernels look at the first and the last column of a row and rely on those between.
        for starts, columns in ((weights.starts, weights.columns), (weights.input_starts, weights.input_columns)):
            ascends = columns.diff() > 0
            firsts = starts[1:-1].long() - 1  # steps from one row to the next
            ascends[firsts[(firsts >= 0) & (firsts < len(ascends))]] = True
            if not ascends.all() or (starts.diff() < 0).any():
                raise ValueError(f"weights {index}: columns do not ascend")
        if not torch.equal(weights.order.sort().values.long(), torch.arange(len(weights.values))):
            raise ValueError(f"weights {index}: order is no permutation")
    return weights


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
