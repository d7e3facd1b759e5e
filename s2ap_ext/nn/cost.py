"""Which convolutions are faster on their kept weights alone: a cost model of four numbers.

Dense time is arithmetic at the machine's dense rate. Sparse time is the kept part of the arithmetic at a lower rate, plus what does not
shrink with the density: reading, packing and writing the activations. ``s2ap profile`` shows what the model predicts for a network beside
what it measures, and ``s2ap profile --calibrate`` fits the numbers to this machine and keeps them in :func:`path`. The choice depends on
these numbers alone and never on a measurement while training, so that a run's results do not depend on how busy the machine was.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn


@dataclass(frozen=True)
class Rates:
    """Of the machine, with all of torch's threads and float32: multiply-adds in 1e9 per second, and 1e9 activations per second that are
    read or written. The defaults were measured on two cores with AVX2."""

    dense: float = 95.0
    sparse: float = 35.0
    activations: float = 1.4


@dataclass(frozen=True)
class Shape:
    """What the cost of a convolution depends on, but for its density."""

    multiply_adds: int  # of the dense convolution
    activations: int  # numbers read and written
    batch: int

    @classmethod
    def of(cls, layer: nn.Conv2d, x: Tensor) -> Shape:
        return cls.from_sizes(tuple(layer.weight.shape), tuple(x.shape), layer.stride)

    @classmethod
    def from_sizes(cls, weight: tuple[int, ...], x: tuple[int, ...], stride: tuple[int, ...]) -> Shape:
        outputs = x[0] * (x[2] // stride[0]) * (x[3] // stride[1])
        size = 1
        for n in weight:
            size *= n
        return cls(outputs * size, x[0] * x[1] * x[2] * x[3] + outputs * weight[0], x[0])


SMALLEST = 20_000_000  # multiply-adds below which calling and placing entries would weigh too much


def dense_seconds(shape: Shape, rates: Rates | None = None) -> float:
    return shape.multiply_adds / (1e9 * (rates or load()).dense)


def sparse_seconds(shape: Shape, density: float, rates: Rates | None = None) -> float:
    rates = rates or load()
    return density * shape.multiply_adds / (1e9 * rates.sparse) + shape.activations / (1e9 * rates.activations)


def prefers_sparse(shape: Shape, density: float) -> bool:
    if shape.multiply_adds < SMALLEST or shape.batch < 8:
        return False
    return sparse_seconds(shape, density) < dense_seconds(shape)


def path() -> Path:
    """Where this machine's calibration is kept: ``$XDG_CACHE_HOME/s2ap_ext/rates.json``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s2ap_ext" / "rates.json"


@functools.cache
def load() -> Rates:
    """The calibration of this machine, or the built-in numbers where there is none.

    Raises:
        ValueError: the file is there and is not a calibration.
    """
    if not path().exists():
        return Rates()
    try:
        rates = Rates(**json.loads(path().read_text(encoding="utf-8")))
        if not all(isinstance(rate, int | float) and rate > 0 for rate in asdict(rates).values()):
            raise ValueError("expected numbers above 0")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path()}: not a calibration ({error}); delete it, or run: s2ap profile --calibrate") from None
    return rates


def save(rates: Rates) -> Path:
    """Keeps ``rates`` as this machine's calibration."""
    path().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path().parent, delete=False, encoding="utf-8") as file:
        json.dump(asdict(rates), file, indent=1)
    os.replace(file.name, path())
    load.cache_clear()
    return path()
