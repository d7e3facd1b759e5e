"""Defines the ops in torch's dispatcher and loads their kernels.

Every op has one schema, here. The reference implementation is registered for all devices, and the compiled libraries, where
they load, register faster kernels for the CPU and CUDA keys, which the dispatcher prefers. So ``torch.ops.s2ap.*`` exists and works
in every installation, and importing the package never fails because a library is missing or stale.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference, sparse_reference

CONVOLUTION = "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups"

# `patterns` holds the three numbers of each layer's reference.Pattern, one layer after the other; empty: all are plain.
SCHEMAS = {
    "select": "(Tensor[] scores, Tensor[] weights, Tensor kept, int[] patterns, Tensor(a!)[] masked, Tensor(b!) cuts) -> ()",
    "perturb": "(Tensor[] scores, Tensor[] grads, Tensor[] weights, Tensor kept, int[] patterns, Tensor cuts, Tensor? squares, "
    "Tensor gamma, float eps, bool straight_through, Tensor(a!)[] masked, Tensor(b!) new_cuts, Tensor(c!) scales) -> ()",
    "update": "(Tensor(a!)[] scores, Tensor[] grads, Tensor(b!)[] momentum_buffers, float lr, float momentum, "
    "float dampening, float weight_decay, bool nesterov) -> ()",
    # ascent_grads is empty where the gradients were taken at the scores themselves; scales is not read then.
    "update_select": "(Tensor(a!)[] scores, Tensor[] grads, Tensor[] ascent_grads, Tensor scales, Tensor(b!)[] momentum_buffers, "
    "Tensor[] weights, Tensor kept, int[] patterns, Tensor cuts, float lr, float momentum, float dampening, float weight_decay, "
    "bool nesterov, bool straight_through, Tensor(c!)[] masked, Tensor(d!) new_cuts, Tensor(e!) squares) -> ()",
    # The sparse convolutions, with kernels for the CPU only: sparse_reference.py tells what an entry, an input and blocks are.
    "sparse_pattern": f"(Tensor weight, Tensor? mask, {CONVOLUTION}) -> "
    "(Tensor starts, Tensor columns, Tensor input_starts, Tensor input_columns, Tensor order)",
    "sparse_conv": "(Tensor input, Tensor starts, Tensor columns, Tensor values, Tensor? bias, Tensor? residual, "
    f"{CONVOLUTION}, int halo, bool relu, Tensor(a!) out) -> ()",
    "sparse_conv_input_grad": "(Tensor grad, Tensor starts, Tensor columns, Tensor values, Tensor? residual, Tensor? gate, "
    f"{CONVOLUTION}, int halo, Tensor(a!) out) -> ()",
    "sparse_conv_weight_grad": f"(Tensor input, Tensor grad, Tensor starts, Tensor columns, {CONVOLUTION}, Tensor(a!) out) -> ()",
}
CPU_ONLY = ("sparse_pattern", "sparse_conv", "sparse_conv_input_grad", "sparse_conv_weight_grad")  # no CUDA kernels


def _pattern(patterns: Sequence[int], i: int) -> reference.Pattern:
    return reference.Pattern(*patterns[3 * i : 3 * i + 3])


def _select(
    scores: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Tensor,
    patterns: Sequence[int],
    masked: Sequence[Tensor],
    cuts: Tensor,
) -> None:
    for i, (s, w) in enumerate(zip(scores, weights, strict=True)):
        out, cuts[i] = reference.select(s, w, int(kept[i]), _pattern(patterns, i))
        masked[i].copy_(out)


def _perturb(
    scores: Sequence[Tensor],
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Tensor,
    patterns: Sequence[int],
    cuts: Tensor,
    squares: Tensor | None,
    gamma: Tensor,
    eps: float,
    straight_through: bool,
    masked: Sequence[Tensor],
    new_cuts: Tensor,
    scales: Tensor,
) -> None:
    for i, (s, g, w) in enumerate(zip(scores, grads, weights, strict=True)):
        square = None if squares is None else squares[i]
        out, new_cuts[i], scales[i] = reference.perturb(
            s, g, w, int(kept[i]), cuts[i], gamma[i].item(), eps, _pattern(patterns, i), straight_through, square
        )
        masked[i].copy_(out)


def _update(
    scores: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    for i, (s, g) in enumerate(zip(scores, grads, strict=True)):
        buffer = momentum_buffers[i] if momentum_buffers else None
        reference.update(s, g, buffer, lr, momentum, dampening, weight_decay, nesterov)


def _update_select(
    scores: Sequence[Tensor],
    grads: Sequence[Tensor],
    ascent_grads: Sequence[Tensor],
    scales: Tensor,
    momentum_buffers: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Tensor,
    patterns: Sequence[int],
    cuts: Tensor,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    straight_through: bool,
    masked: Sequence[Tensor],
    new_cuts: Tensor,
    squares: Tensor,
) -> None:
    for i, (s, g, w) in enumerate(zip(scores, grads, weights, strict=True)):
        ascent = (ascent_grads[i], scales[i]) if ascent_grads else None
        buffer = momentum_buffers[i] if momentum_buffers else None
        sgd = (lr, momentum, dampening, weight_decay, nesterov)
        out, new_cuts[i], squares[i] = reference.update_select(
            s, g, ascent, buffer, w, int(kept[i]), cuts[i], *sgd, _pattern(patterns, i), straight_through
        )
        masked[i].copy_(out)


def _fake_sparse_pattern(weight: Tensor, mask: Tensor | None, *convolution: Any) -> tuple[Tensor, ...]:
    starts, entries, input_starts = (torch.library.get_ctx().new_dynamic_size() for _ in range(3))
    return tuple(weight.new_empty(size, dtype=torch.int32) for size in (starts, entries, input_starts, entries, entries))


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "select": _select,
    "perturb": _perturb,
    "update": _update,
    "update_select": _update_select,
    "sparse_pattern": sparse_reference.sparse_pattern,
    "sparse_conv": sparse_reference.sparse_conv,
    "sparse_conv_input_grad": sparse_reference.sparse_conv_input_grad,
    "sparse_conv_weight_grad": sparse_reference.sparse_conv_weight_grad,
}
FAKES = {"sparse_pattern": _fake_sparse_pattern}  # all others only write into buffers they are given: there is no shape to infer


def _define() -> torch.library.Library:
    library = torch.library.Library("s2ap", "DEF")
    for name, implementation in IMPLEMENTATIONS.items():
        library.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"s2ap::{name}", FAKES.get(name, lambda *args: None), lib=library)
    return library


@dataclass(frozen=True)
class Backend:
    """Which implementation runs, and why. ``str()`` of it is the answer in one line.

    Attributes:
        cpu: ``"C++"`` or ``"PyTorch"``: what runs on CPU tensors.
        cuda: ``"CUDA"``, ``"PyTorch"`` or ``"none"`` (no CUDA device): what runs on CUDA tensors.
        why: one line for each path that does not run its kernels, with the command that mends it.
        build: what the loaded kernels were built with (empty without them): ``torch``, ``python``, ``compiler``, ``flags``, and for the
            CUDA kernels ``cuda`` (the toolkit) and ``gpus`` (compute capabilities).
        torch: the version of torch found.
        torch_cuda: the CUDA version of the torch found, or None.
    """

    cpu: str
    cuda: str
    why: tuple[str, ...]
    build: dict[str, str]
    torch: str
    torch_cuda: str | None

    def __str__(self) -> str:
        line = f"CPU: {self.cpu}, CUDA: {self.cuda} (torch {self.torch}, CUDA {self.torch_cuda or 'none'})"
        return "; ".join([line, *self.why])


# Raised with every change of a schema or of a kernel's contract. setup.py compiles it into both libraries and writes it into _build.json.
INTERFACE = 5
REBUILD = "to mend it, run in the checkout: pip install --force-reinstall --no-deps ."


def build_record() -> dict[str, str]:
    """What setup.py wrote when it built this package: ``interface``, and for ``cpu`` and ``cuda`` "built" or why not."""
    reason = "not built: these are sources that were never installed"
    record = {"interface": "unknown", "cpu": reason, "cuda": reason}
    try:
        written: dict[str, str] = json.loads(Path(__file__).with_name("_build.json").read_text(encoding="utf-8"))
        return record | written
    except (OSError, ValueError, TypeError):  # missing, or not what setup.py writes
        return record


def _load(name: str, part: str, key: str) -> tuple[dict[str, str], str]:
    """Imports a compiled library. Returns its build info and why it does not run (one of the two is empty)."""
    if os.environ.get("S2AP_DISABLE_EXT", "0") not in ("", "0"):
        return {}, "disabled by S2AP_DISABLE_EXT"
    record = build_record()
    if record[part] != "built":
        return {}, f"{record[part]}; {REBUILD}"
    # Loading a library registers its kernels, and torch aborts the process if they do not fit the schemas. So look before.
    if record["interface"] != str(INTERFACE):
        return {}, f"stale (built for interface {record['interface']}, this is {INTERFACE}); {REBUILD}"
    try:
        info = dict(importlib.import_module(f"s2ap_ext.{name}").build_info())
    except Exception as error:  # lost, or built for another Python or torch, or a library that it links to is gone
        return {}, f"failed to load ({error}); {REBUILD}"
    if info["interface"] != str(INTERFACE):  # not the library that the record is about
        for op, implementation in IMPLEMENTATIONS.items():
            _LIBRARY.impl(op, implementation, key, allow_override=True)
        return {}, f"stale (interface {info['interface']}, this is {INTERFACE}); {REBUILD}"
    return info, ""


def _load_all() -> Backend:
    build, why_no_cpp = _load("_C", "cpu", "CPU")
    why = [f"C++ kernels {why_no_cpp}"] if why_no_cpp else []
    missed = list(why)
    cuda = "none"
    if torch.version.cuda is not None:
        has_device = torch.cuda.device_count() > 0  # unlike is_available(), leaves CUDA usable in forked processes
        cuda_build, why_no_cuda = _load("_C_cuda", "cuda", "CUDA")
        build |= cuda_build
        if has_device:
            cuda = "PyTorch" if why_no_cuda else "CUDA"
        if why_no_cuda:
            why.append(f"CUDA kernels {why_no_cuda}")
            missed += why[-1:] if has_device else []
    if missed and "disabled by" not in missed[0]:
        warnings.warn(f"s2ap_ext runs without kernels: {'; '.join(missed)}", RuntimeWarning, stacklevel=2)
    return Backend(
        cpu="PyTorch" if why_no_cpp else "C++",
        cuda=cuda,
        why=tuple(why),
        build=build,
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
    )


_LIBRARY = _define()  # the dispatcher forgets the ops when this object dies
_BACKEND = _load_all()


def backend() -> Backend:
    """Which implementation of the ops runs on which device, why, and what it was built for."""
    return _BACKEND
