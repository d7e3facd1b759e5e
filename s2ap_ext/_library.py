"""Defines the ops in torch's dispatcher and loads their kernels.

Every op has one schema, here. The reference implementation is registered for all devices, and the compiled
libraries, where they load, register faster kernels for the CPU and CUDA keys, which the dispatcher prefers. So ``torch.ops.s2ap.*`` exists and
works in every installation, and importing the package never fails because a library is missing or stale.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from . import reference

SCHEMAS = {
    "select": "(Tensor[] scores, Tensor[] weights, Tensor kept, Tensor(a!)[] masked, Tensor(b!) cuts) -> ()",
    "perturb": "(Tensor[] scores, Tensor[] grads, Tensor[] weights, Tensor kept, Tensor cuts, float gamma, float eps, "
    "Tensor(a!)[] masked, Tensor(b!) new_cuts, Tensor(c!) scales) -> ()",
    "update": "(Tensor(a!)[] scores, Tensor[] grads, Tensor(b!)[] momentum_buffers, float lr, float momentum, "
    "float dampening, float weight_decay, bool nesterov) -> ()",
}


def _select(scores, weights, kept, masked, cuts) -> None:
    for i, (s, w) in enumerate(zip(scores, weights, strict=True)):
        out, cuts[i] = reference.select(s, w, int(kept[i]))
        masked[i].copy_(out)


def _perturb(scores, grads, weights, kept, cuts, gamma, eps, masked, new_cuts, scales) -> None:
    for i, (s, g, w) in enumerate(zip(scores, grads, weights, strict=True)):
        out, new_cuts[i], scales[i] = reference.perturb(s, g, w, int(kept[i]), cuts[i], gamma, eps)
        masked[i].copy_(out)


def _update(scores, grads, momentum_buffers, lr, momentum, dampening, weight_decay, nesterov) -> None:
    for i, (s, g) in enumerate(zip(scores, grads, strict=True)):
        buffer = momentum_buffers[i] if momentum_buffers else None
        reference.update(s, g, buffer, lr, momentum, dampening, weight_decay, nesterov)


def _define() -> torch.library.Library:
    library = torch.library.Library("s2ap", "DEF")
    for name, implementation in {"select": _select, "perturb": _perturb, "update": _update}.items():
        library.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, implementation, "CompositeExplicitAutograd")
        # All three only write into buffers they are given, so there is no shape to infer.
        torch.library.register_fake(f"s2ap::{name}", lambda *args: None, lib=library)
    return library


@dataclass(frozen=True)
class Backend:
    """Which implementation runs, and why. ``str()`` of it is the answer in one line.

    Attributes:
        cpu: ``"C++"`` or ``"PyTorch"``: what runs on CPU tensors.
        cuda: ``"CUDA"``, ``"PyTorch"`` or ``"none"`` (no CUDA device): what runs on CUDA tensors.
        why: one line for each path that does not run its kernels, with the command that mends it.
        build: what the kernels were built with (empty without them): ``torch``, ``cuda``, ``compiler``, ``why_no_cuda``, ...
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


# Raised with every change of a schema or of a kernel's contract; csrc/ops.cpp and csrc/ops_cuda.cpp are compiled with the same number.
INTERFACE = 1
REBUILD = "reinstall with: pip install --force-reinstall --no-deps s2ap_ext (or pip install . in a checkout)"


def _build_record() -> dict[str, str]:
    """What setup.py wrote about the build: ``cpu`` and ``cuda``, each "built" or the reason why not."""
    path = Path(__file__).with_name("_build.json")
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def _load(name: str, record: dict[str, str], part: str) -> tuple[dict[str, str], str]:
    """Imports a compiled library. Returns its build info and why it does not run (one of the two is empty)."""
    if os.environ.get("S2AP_DISABLE_EXT", "0") not in ("", "0"):
        return {}, "disabled by S2AP_DISABLE_EXT"
    try:
        info = dict(importlib.import_module(f"s2ap_ext.{name}").build_info())
    except ModuleNotFoundError:
        why = record.get(part, "not built")
        return {}, f"{'not found' if why == 'built' else why}; {REBUILD}"
    except ImportError as error:  # built against another torch, or a library it links to is gone
        return {}, f"failed to load ({error}); {REBUILD}"
    if info["interface"] != str(INTERFACE):
        return {}, f"stale (interface {info['interface']}, this package needs {INTERFACE}); {REBUILD}"
    return info, ""


def _load_all() -> Backend:
    record = _build_record()
    why = []
    build, why_no_cpp = _load("_C", record, "cpu")
    if why_no_cpp:
        why.append(f"C++ kernels {why_no_cpp}")
    cuda = "none"
    if torch.version.cuda is not None:
        cuda_build, why_no_cuda = _load("_C_cuda", record, "cuda")
        build |= cuda_build
        if torch.cuda.is_available():
            cuda = "PyTorch" if why_no_cuda else "CUDA"
        if why_no_cuda:
            why.append(f"CUDA kernels {why_no_cuda}")
    if why and "disabled by" not in why[0]:
        for line in why:
            warnings.warn(f"s2ap_ext runs without kernels: {line}", RuntimeWarning, stacklevel=2)
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
