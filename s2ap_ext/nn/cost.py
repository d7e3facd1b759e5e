"""Which convolutions are faster on their kept weights alone: a cost model of seven numbers.

Dense time is arithmetic at the machine's dense rate, and reading weights and activations. Sparse time is the kept part of the arithmetic
at a lower rate, looking up the kept weights, and what does not shrink with the density: reading, packing and writing the activations.
``s2ap profile`` shows what the model predicts for a network beside what it measures, and ``s2ap profile --calibrate`` fits the numbers to
this machine and keeps them in :func:`path`. The choice depends on these numbers alone and never on a measurement while training, so that a
run's results do not depend on how busy the machine was.
"""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn


@dataclass(frozen=True)
class Rates:
    """Of the machine, with all of torch's threads and float32, in 1e9 per second. The defaults are medians of five
    calibrations on two cores with AVX2.

    Attributes:
        dense, weights, dense_activations: multiply-adds, weights read, and numbers read and written by dense convolutions.
        sparse, entries: multiply-adds and kept weights looked up by sparse ones.
        activations, blocks: numbers that these read and write, packed for it, or in blocks.
    """

    dense: float = 85.0
    weights: float = 1.9
    dense_activations: float = 1.2
    sparse: float = 30.0
    entries: float = 0.4
    activations: float = 1.05
    blocks: float = 3.0


@dataclass(frozen=True)
class Shape:
    """What the cost of a convolution depends on, but for its density."""

    multiply_adds: int  # of the dense convolution
    activations: int  # numbers read and written
    weights: int
    batch: int

    @classmethod
    def of(cls, layer: nn.Conv2d, x: Tensor) -> Shape:
        return cls.from_sizes(tuple(layer.weight.shape), tuple(x.shape), layer.stride)

    @classmethod
    def from_sizes(cls, weight: tuple[int, ...], x: tuple[int, ...], stride: tuple[int, ...]) -> Shape:
        outputs = x[0] * math.prod(-(-n // s) for n, s in zip(x[2:], stride, strict=True))
        weights = math.prod(weight)
        return cls(outputs * weights, math.prod(x) + outputs * weight[0], weights, x[0])


SMALLEST = 20_000_000  # multiply-adds below which calling and placing entries would weigh too much


Terms = dict[str, float]  # how much of what each rate is of


def dense_terms(shape: Shape) -> Terms:
    return {"dense": shape.multiply_adds, "weights": shape.weights, "dense_activations": shape.activations}


def sparse_terms(shape: Shape, density: float, *, blocks: bool = False, computed: float = 1.0) -> Terms:
    """``blocks``: the activations lie in blocks. ``computed``: outputs that the kernel computes for each that is wanted."""
    moved = {"blocks" if blocks else "activations": shape.activations}
    return {"sparse": computed * density * shape.multiply_adds, "entries": density * shape.weights, **moved}


def seconds(terms: Terms, rates: Rates | None = None) -> float:
    rates = rates or load()
    taken: float = sum(amount / getattr(rates, name) for name, amount in terms.items())
    return 1e-9 * taken


def is_faster_sparse(shape: Shape, density: float) -> bool:
    """Of a layer that trains."""
    if shape.multiply_adds < SMALLEST or shape.batch < 8:
        return False
    return seconds(sparse_terms(shape, density)) < seconds(dense_terms(shape))


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
        kept = json.loads(path().read_text(encoding="utf-8"))
        rates = Rates(**kept)
        if kept.keys() != asdict(rates).keys():
            raise ValueError(f"expected {', '.join(asdict(rates))}, got {', '.join(kept)}")
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
