"""Looks for arguments and files that end in anything but a result or a clear error.

    python tests/fuzz_native.py --seconds 3600 [--seed N] [--case N]

Valid calls of the raw ops (``torch.ops.s2ap``), of the functions of ``s2ap_ext.ops``, and valid files of networks are changed at random and
tried in a process of their own. A case fails if that process crashes or hangs, or if it raises something else than ``EXPECTED``; a file
that loads must also run, forward and backward. Every case follows from the seed and its number, so ``--seed N --case N`` tries one again.
"""

from __future__ import annotations

import math
import random
import struct
import sys
import tempfile
from pathlib import Path

import fuzzing
import torch
from engine_models import all_sparse, images, pruned

from s2ap_ext import _files, ops
from s2ap_ext.engine import SparseNetwork, compile_sparse
from s2ap_ext.engine.choice import lanes
from s2ap_ext.sparse_reference import to_blocks

EXPECTED = (RuntimeError, ValueError, TypeError)
NUMBERS = [-1, 0, 1, 2, 3, 5, 7, 64, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**31), -(2**63)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool, torch.uint8]
OTHER = [None, True, "x", 1.5, [], {}, [[[]]], [1, [2]], -1, 2**70, float("nan"), float("inf")]


# ---- Calls


def convolution(generator: random.Random) -> tuple[dict, dict]:
    """The settings of a convolution, and sizes that fit them."""
    groups = generator.choice([1, 1, 2])
    settings = {
        "kernel": [generator.randint(1, 3), generator.randint(1, 3)],
        "stride": [generator.randint(1, 2), generator.randint(1, 2)],
        "padding": [generator.randint(0, 2), generator.randint(0, 2)],
        "dilation": [generator.randint(1, 2), generator.randint(1, 2)],
        "groups": groups,
    }
    size = [generator.randint(5, 9), generator.randint(5, 9)]
    left = [n + 2 * p - d * (k - 1) - 1 for n, k, p, d in zip(size, *(settings[s] for s in ("kernel", "padding", "dilation")), strict=True)]
    channels = groups * generator.randint(1, 12), groups * generator.randint(1, 12)
    sizes = {"in": size, "out": [n // s + 1 for n, s in zip(left, settings["stride"], strict=True)], "channels": channels}
    return settings, sizes


def sparse_calls(generator: random.Random) -> dict[str, dict]:
    settings, sizes = convolution(generator)
    inputs, outputs = sizes["channels"]
    n = generator.choice([1, 2, lanes(), lanes() + 3])
    weight = torch.randn(outputs, inputs // settings["groups"], *settings["kernel"]) * (torch.rand(1) > 0.2)
    weight *= torch.rand_like(weight) < 0.4
    starts, columns, input_starts, input_columns, order = torch.ops.s2ap.sparse_pattern(weight, None, *settings.values())
    values = weight[weight != 0][: len(columns)].clone()
    x, y = torch.randn(n, inputs, *sizes["in"]), torch.randn(n, outputs, *sizes["out"])
    halo, pack = 0, lambda t: t
    if generator.random() < 0.5:
        halo = generator.choice([4, 4, 6])
        pack = lambda t: to_blocks(t, lanes(), halo)  # noqa: E731
    some = lambda t: pack(t.clone()) if generator.random() < 0.5 else None  # noqa: E731
    entries = {"starts": starts, "columns": columns, "values": values}
    input_entries = {"starts": input_starts, "columns": input_columns, "values": values[order.long()]}
    return {
        "sparse_pattern": {"weight": weight, "mask": weight != 0 if generator.random() < 0.5 else None, **settings},
        "sparse_conv": {
            **{"input": pack(x), **entries, "bias": torch.randn(outputs), "residual": some(y), **settings},
            **{"halo": halo, "relu": generator.random() < 0.5, "out": pack(torch.zeros_like(y))},
        },
        "sparse_conv_input_grad": {
            **{"grad": pack(y), **input_entries, "residual": some(x), "gate": some(x), **settings},
            **{"halo": halo, "out": pack(torch.zeros_like(x))},
        },
        "sparse_conv_weight_grad": {
            **{"input": x, "grad": y, "starts": starts, "columns": columns, **settings},
            "out": torch.zeros_like(weight),
        },
    }


def dense_calls(generator: random.Random) -> tuple[dict[str, dict], dict[str, dict]]:
    """Arguments of the raw ops, and of the functions."""
    sizes = [generator.choice([1, 12, 300, 5000, 20000]) for _ in range(generator.randint(1, 4))]
    dtype = generator.choice(DTYPES[:4])
    scores, grads, weights, buffers, masked, ascent = ([torch.randn(n).to(dtype) for n in sizes] for _ in range(6))
    patterns = [ops.Pattern(*generator.choice([(0, 0, 1)] + [(k, 4, 1) for k in (1, 2) if n % 4 == 0])) for n in sizes]
    kept = torch.tensor([generator.randint(0, n if p.kind == 0 else p.size) for n, p in zip(sizes, patterns, strict=True)])
    flat = [number for pattern in patterns for number in pattern]
    cuts, new_cuts = (torch.zeros(len(sizes), 5, dtype=torch.int64) for _ in range(2))
    scales, gamma, squares = (torch.rand(len(sizes), dtype=torch.float64) for _ in range(3))
    sgd = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 5e-4, "nesterov": generator.random() < 0.5}
    straight = generator.random() < 0.5
    step = {"scores": scores, "grads": grads, "momentum_buffers": buffers}
    given = {"patterns": patterns, "straight_through": straight, "out": masked}
    raw = {
        "select": {"scores": scores, "weights": weights, "kept": kept, "patterns": flat, "masked": masked, "cuts": cuts},
        "perturb": {
            **{"scores": scores, "grads": grads, "weights": weights, "kept": kept, "patterns": flat, "cuts": cuts, "squares": squares},
            **{"gamma": gamma, "eps": 1e-12, "straight_through": straight, "masked": masked, "new_cuts": new_cuts, "scales": scales},
        },
        "update": {**step, **sgd},
        "update_select": {
            **{"scores": scores, "grads": grads, "ascent_grads": ascent if straight else [], "scales": scales, "momentum_buffers": buffers},
            **{"weights": weights, "kept": kept, "patterns": flat, "cuts": cuts, **sgd, "straight_through": straight},
            **{"masked": masked, "new_cuts": new_cuts, "squares": squares},
        },
    }
    functions = {
        "select": {"scores": scores, "weights": weights, "kept": kept.tolist(), "patterns": patterns, "out": masked, "cuts": new_cuts},
        "perturb": {
            **{"scores": scores, "grads": grads, "weights": weights, "kept": kept, "cuts": cuts, "gamma": gamma, "squares": squares},
            **{**given, "new_cuts": new_cuts},
        },
        "update": {**step, **sgd},
        "update_select": {
            **{**step, "weights": weights, "kept": kept, "cuts": cuts, **sgd, **given, "new_cuts": new_cuts},
            "ascent": (ascent, scales) if straight else None,
        },
    }
    return raw, functions


def is_plain(t: object) -> bool:
    """Whether it is a tensor that torch itself can copy: neither huge nor without its memory, as one that was changed already may be."""
    return isinstance(t, torch.Tensor) and t.nbytes <= t.untyped_storage().nbytes() - t.storage_offset() * t.element_size()


def changed_tensor(t: torch.Tensor, arguments: dict, generator: random.Random) -> object:
    if not is_plain(t):
        return t
    kind = generator.randrange(12)
    flat = t.reshape(-1)
    if kind < 4 and flat.numel() and not t.is_floating_point():  # its numbers
        t = t.clone()
        for _ in range(generator.randint(1, 3)):
            number = generator.choice([*NUMBERS, len(flat), int(flat[generator.randrange(len(flat))]) + generator.choice([-1, 1])])
            limits = torch.iinfo(t.dtype) if t.dtype != torch.bool else None
            number = bool(number % 2) if limits is None else min(max(number, limits.min), limits.max)
            t.reshape(-1)[generator.randrange(len(flat))] = number
        return t
    if kind < 4 and flat.numel():
        t = t.clone()
        t.reshape(-1)[generator.randrange(len(flat))] = generator.choice([0.0, -0.0, 1e30, float("inf"), float("nan")])
        return t
    if kind == 4:
        return t.to(generator.choice(DTYPES))
    if kind == 5:
        return flat[: generator.randrange(len(flat) + 1)].clone()
    if kind == 6:
        return torch.cat([flat, flat[: generator.randint(1, 3)]])
    if kind == 7:
        shape = [generator.choice([size, size, 0, 1, size + 1, *NUMBERS[2:8]]) for size in t.shape]
        return torch.zeros(shape, dtype=t.dtype) if math.prod(shape) < 10**6 else t[:0]
    if kind == 8 and flat.numel():  # huge, and of no memory
        shape = [generator.choice([size, size, 2**16, 2**31]) for size in t.shape]
        return flat[:1].reshape([1] * t.dim()).expand(shape) if math.prod(shape) < 2**60 else t
    if kind == 9:
        return torch.stack([t, t], dim=-1)[..., 0]
    if kind == 10 and flat.numel():
        t = t.clone()
        t.untyped_storage().resize_(generator.randrange(t.untyped_storage().nbytes()))
        return t
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in arguments.values()]
    others = [other for tensors in lists for other in tensors if is_plain(other)]
    other = generator.choice([t, *others]).reshape(-1)  # the memory of another argument, or some of it
    if generator.random() < 0.5 and other.is_contiguous():
        try:
            other = other.view(t.dtype)
        except RuntimeError:
            return other
    first = generator.randrange(2)
    return other[first : first + t.numel()].view(t.shape) if first + t.numel() <= other.numel() else other


def changed(value: object, arguments: dict, generator: random.Random) -> object:
    if isinstance(value, torch.Tensor):
        return changed_tensor(value, arguments, generator) if generator.random() < 0.95 else generator.choice(OTHER)
    if isinstance(value, (list, tuple)) and value and generator.random() < 0.9:
        value, i = list(value), generator.randrange(len(value))
        kind = generator.randrange(8)
        if kind == 0:
            return value[:i]
        if kind == 1:
            return [*value, value[i]]
        value[i] = changed(value[i], arguments, generator)
        return value
    if isinstance(value, (int, float)):
        return generator.choice([*NUMBERS, value + 1, value - 1, *OTHER[:4]])
    return generator.choice([*OTHER, *arguments.values()])


def call(generator: random.Random) -> str:
    torch.manual_seed(generator.randrange(2**32))
    if generator.random() < 0.5:
        calls, owner = sparse_calls(generator), torch.ops.s2ap
    else:
        raw, functions = dense_calls(generator)
        calls, owner = generator.choice([(raw, torch.ops.s2ap), (functions, ops)])
    name = generator.choice(sorted(calls))
    arguments = calls[name]
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        which = generator.choice(sorted(arguments))
        arguments[which] = changed(arguments[which], arguments, generator)
    try:
        getattr(owner, name)(**arguments)
    except EXPECTED:
        return "refused"
    except AttributeError:  # torch takes None for a tensor, and where there is no other tensor, the fallback gets it
        if owner is torch.ops.s2ap and None in [a for a in arguments.values() if not isinstance(a, torch.Tensor)]:
            return "refused"
        raise
    return "ran"


# ---- Files


def networks() -> list[tuple[dict, dict]]:
    """Tensors and headers of files."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("digits_cnn", "resnet18"):
            model, size = pruned(name)
            for how in (all_sparse, lambda layer: "sparse" if layer.batch > 1 else "dense"):
                compile_sparse(model, images(1, size), choose=how).save(Path(folder) / "x")
                found.append(_files.load(Path(folder) / "x"))
    return found


def changed_json(value: object, generator: random.Random) -> object:
    """With one thing in it changed."""
    if isinstance(value, dict) and value and generator.random() < 0.97:
        key = generator.choice(sorted(value))
        kind = generator.randrange(20)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {**value, "other": value[key]}
        return {**value, key: changed_json(value[key], generator)}
    if isinstance(value, list) and value and generator.random() < 0.97:
        i, kind = generator.randrange(len(value)), generator.randrange(12)
        if kind == 0:
            return value[:i] + value[i + 1 :]
        if kind == 1:
            return [*value, value[i]]
        if kind == 2:
            return [*value[:i], value[generator.randrange(len(value))], *value[i + 1 :]]
        return [*value[:i], changed_json(value[i], generator), *value[i + 1 :]]
    if isinstance(value, bool):
        return generator.choice([not value, *OTHER])
    if isinstance(value, int):
        return generator.choice([*NUMBERS, value + 1, value - 1, *OTHER])
    return generator.choice([*OTHER, "SparseConv", "Part", "ToBlocks", "dense", "sparse"])


def file(bases: list[tuple[dict, dict]], path: Path, generator: random.Random) -> str:
    tensors, about = generator.choice(bases)
    tensors = dict(tensors)
    kind = generator.random()
    for _ in range(generator.choice([1, 1, 2])):
        if kind < 0.5:
            about = changed_json(about, generator)
        else:
            name = generator.choice(sorted(tensors))
            changed_one = changed_tensor(tensors[name], tensors, generator) if generator.random() < 0.95 else None
            if is_plain(changed_one):
                tensors[name] = changed_one
            elif changed_one is None:
                del tensors[name]
    _files.save(path, tensors, about)
    if kind > 0.9:  # the bytes of the file
        content = bytearray(path.read_bytes())
        header = 8 + struct.unpack("<Q", content[:8])[0]
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(generator.choice([8, header, len(content)]))] = generator.randrange(256)
        path.write_bytes(content[: generator.choice([len(content), generator.randrange(len(content))])])
    try:
        network = SparseNetwork.load(path)
    except ValueError as error:
        if path.name not in str(error):
            raise AssertionError(f"an error that does not name the file: {error}") from error
        return "refused"
    shape = network._blocks.slots[0].shape
    repr(network)
    if torch.Size(shape).numel() > 10**5 or network._blocks.halo > 64:
        return "loaded"
    for n in (1, lanes() + 1):
        x = torch.randn(n, *shape, requires_grad=True)
        network(x).sum().backward()
    return "ran"


# ---- Cases


def run_case(seed: int, case: int, bases: list[tuple[dict, dict]], path: Path) -> str:
    generator = random.Random(f"{seed}:{case}")
    return call(generator) if generator.random() < 0.7 else "file " + file(bases, path, generator)


def prepare(folder: Path):
    bases = networks()
    return lambda seed, case: run_case(seed, case, bases, folder / "fuzzed.safetensors")


if __name__ == "__main__":
    sys.exit(fuzzing.main(__file__, __doc__, prepare))
