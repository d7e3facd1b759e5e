"""Hostile arguments and files: some seconds of the fuzzer, and by name what once crashed, hung or was taken for something else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_models import all_sparse, images, pruned

import s2ap_ext
from s2ap_ext import _files, backend
from s2ap_ext.engine import SparseNetwork, compile_sparse
from s2ap_ext.reference import CUT_COLUMNS

OPS = torch.ops.s2ap
kernels = pytest.mark.skipif(backend().cpu != "C++", reason="the checks of the kernels")


@pytest.mark.slow
@pytest.mark.parametrize("fuzzer", ["fuzz_native.py", "fuzz_files.py"])
def test_some_seconds_of_the_fuzzers(fuzzer, capsys):
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name(fuzzer), "--seconds", "5", "--seed", "1"],
        env={**os.environ, "PYTHONPATH": str(Path(s2ap_ext.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    with capsys.disabled():
        print(f"\n{fuzzer}: {result.stdout.strip()}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split(" executions")[0]) > 0


# ---- Raw ops


def convolution(**changes):
    """Arguments of sparse_conv: 3x3, 4 to 6 channels, one entry in each row."""
    arguments = {
        "input": torch.randn(2, 4, 8, 8),
        "starts": torch.arange(7, dtype=torch.int32),
        "columns": torch.arange(6, dtype=torch.int32),
        "values": torch.ones(6),
        "bias": None,
        "residual": None,
        "kernel": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "halo": 0,
        "relu": False,
        "out": torch.empty(2, 6, 8, 8),
    }
    return arguments | changes


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def resized(t):
    t.untyped_storage().resize_(8)
    return t


def shared(**places):
    """Tensors in one memory: name -> (first byte, tensor it is like)."""
    memory = torch.zeros(1 << 16, dtype=torch.uint8)
    size = {name: like.numel() * like.element_size() for name, (_, like) in places.items()}
    return {name: memory[first : first + size[name]].view(like.dtype).view(like.shape) for name, (first, like) in places.items()}


@kernels
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dilation": [2**62] * 2}, r"dilation: expected numbers in \[1, 2\*\*31\), got 4611686018427387904"),
        ({"kernel": [2**31 - 1] * 2}, r"kernel: expected fewer than 2\*\*16 positions"),
        ({"stride": [2**20] * 2}, r"stride: expected at most 2\*\*26 for the product of kernel and stride, got 9 \* 1099511627776"),
        ({"padding": [2**30] * 2}, r"out: expected size 2147483654 along axis 2, got 8"),
        ({"padding": [2**20] * 2, "dilation": [2**20] * 2}, r"padding: expected fewer than 2\*\*31 positions in a padded"),
        (
            {"padding": [2**14] * 2, "dilation": [2**14] * 2},
            r"dilation: expected at most 2\*\*28 inputs between an",
        ),
        ({"kernel": [3]}, r"kernel: expected two numbers, got 1"),
        ({"groups": 0}, r"groups: expected numbers in \[1, 2\*\*31\), got 0"),
        ({"groups": -(2**63)}, r"groups: expected numbers in"),
        ({"halo": 2**62}, r"halo: expected numbers in \[0, 2\*\*31\)"),
        ({"halo": -1}, r"halo: expected numbers in \[0, 2\*\*31\), got -1"),
        ({"columns": ints(0, 1, 2, 3, 4, 2**31 - 1)}, r"columns: expected numbers in \[0, 36\), got 2147483647"),
        ({"columns": ints(0, 1, -(2**31), 3, 4, 5)}, r"columns: expected numbers in \[0, 36\), got -2147483648"),
        ({"starts": ints(0, 2**31 - 1, -5, 3, 4, 5, 6)}, r"starts: expected none below the one before it, got -5 after 2147483647"),
        ({"starts": ints(0, 1, 2, 3, 4, 5, 7)}, r"starts: expected 0 to 6, got 0 to 7"),
        ({"starts": ints()}, r"starts: expected 1 and a multiple of 6 elements, got 0"),
        ({"values": resized(torch.ones(6))}, r"values: expected memory for all its elements"),
        ({"input": resized(torch.ones(2, 4, 8, 8))}, r"input: expected memory for all its elements"),
        (
            {"input": torch.empty(2, 0, 8, 8), "columns": ints(), "values": torch.ones(0), "starts": ints(*[0] * 7)},
            r"input: expected an",
        ),
        ({"out": torch.empty(1).expand(2, 6, 8, 8)}, r"out: expected memory of its own for each element"),
        (shared(out=(0, torch.empty(2, 6, 8, 8)), starts=(4, torch.zeros(7, dtype=torch.int32))), r"starts: expected 0 to 6, got 0 to 0"),
        (shared(out=(0, torch.empty(2, 6, 8, 8)), values=(4, torch.ones(6))), r"out: expected memory of its own, got that of values"),
        (
            shared(out=(0, torch.empty(2, 6, 8, 8)), input=(512, torch.ones(2, 4, 8, 8))),
            r"out: expected memory of its own, got that of in",
        ),
    ],
    ids=lambda v: "",
)
def test_convolutions_refuse(changes, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.sparse_conv(**convolution(**changes))


@kernels
def test_the_gradient_of_the_weight_writes_to_columns_of_the_weight_alone():
    a = convolution(columns=ints(0, 1, 2, 3, 4, 10**9))
    grad, out = a["out"].fill_(1), torch.empty(6, 4, 3, 3)
    with pytest.raises(RuntimeError, match=r"columns: expected numbers in \[0, 36\), got 1000000000"):
        OPS.sparse_conv_weight_grad(
            a["input"], grad, a["starts"], a["columns"], a["kernel"], a["stride"], a["padding"], a["dilation"], a["groups"], out
        )


@kernels
def test_entries_in_the_pass_of_another_residue_are_refused():
    """They would read one row more than their pass has."""
    weight, settings = torch.ones(3, 2, 3, 3), ([3, 3], [2, 2], [1, 1], [1, 1], 1)
    _, _, starts, columns, _ = OPS.sparse_pattern(weight, None, *settings)
    columns = columns.clone()
    assert columns[0] == 4  # of the first pass, rows and columns with even numbers: the kernel's centre
    columns[0] = 0
    with pytest.raises(RuntimeError, match="columns: expected kernel positions of pass 3 in that pass, got 0 in pass 0"):
        OPS.sparse_conv_input_grad(
            torch.ones(1, 3, 4, 4), starts, columns, torch.ones(len(columns)), None, None, *settings, 0, torch.empty(1, 2, 8, 8)
        )


@kernels
def test_patterns_of_hostile_weights_and_masks():
    ones = ([1, 1], [1, 1], [0, 0], [1, 1], 1)
    mask = torch.full((2, 8), 255, dtype=torch.uint8).view(torch.bool)  # more than one for each place
    starts, columns, *_ = OPS.sparse_pattern(torch.ones(2, 8), mask, *ones)
    assert (starts.tolist(), columns.tolist()) == ([0, 8, 16], [*range(8), *range(8)])
    with pytest.raises(RuntimeError, match=r"kernel: expected the size of the weight's, got 65025 elements"):
        OPS.sparse_pattern(torch.ones(2, 8), None, [255, 255], *ones[1:])
    with pytest.raises(RuntimeError, match=r"stride: expected fewer than 2\*\*31 rows of inputs"):
        OPS.sparse_pattern(torch.empty(0, 2**30), None, [1, 1], [8, 8], *ones[2:])
    with pytest.raises(RuntimeError, match=r"weight: expected float32, float64, float16 or bfloat16, got Int"):
        OPS.sparse_pattern(torch.ones(2, 8, dtype=torch.int32), None, *ones)


@kernels
@pytest.mark.parametrize("op", ["select", "update"])
def test_raw_ops_refuse_memory_that_is_shared_or_gone(op):
    scores, other = torch.randn(1000), torch.randn(1000)
    cuts = torch.zeros(1, CUT_COLUMNS, dtype=torch.int64)
    ops = {
        "select": lambda scores, out: OPS.select([scores], [other], torch.tensor([5]), [], [out], cuts),
        "update": lambda scores, out: OPS.update([scores], [other], [out], 0.1, 0.9, 0.0, 0.0, False),
    }
    memory = torch.randn(1500)
    with pytest.raises(RuntimeError, match=r"\[0\]: expected memory of its own, got that of"):
        ops[op](memory[:1000], memory[500:])
    with pytest.raises(RuntimeError, match=r"\[0\]: expected memory of its own, got that of"):
        ops[op](scores, other)
    with pytest.raises(RuntimeError, match=r"scores\[0\]: expected memory for all its elements"):
        ops[op](resized(torch.randn(1000)), torch.empty(1000))


@kernels
def test_cuts_that_nobody_made_give_some_mask():
    """Also where the index, taken from an element's place, would be no 64-bit integer."""
    scores, masked = torch.randn(40000), torch.empty(40000)
    cuts, new_cuts = (torch.zeros(1, CUT_COLUMNS, dtype=torch.int64) for _ in range(2))
    for key, index in ((0, -(2**63)), (2**63 - 1, 2**63 - 1), (-(2**63), 0), (1 << 40, -1)):
        cuts[0, :2] = torch.tensor([key, index])
        one, scales = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        OPS.perturb(
            [scores], [torch.randn(40000)], [scores.clone()], torch.tensor([7]), [], cuts, None, one, 0.0, False, [masked], new_cuts, scales
        )
        assert masked.count_nonzero() == 7
        assert 0 <= new_cuts[0, 3] <= 40000


# ---- Files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    model, size = pruned("digits_cnn")
    compile_sparse(model, images(1, size), choose=all_sparse).save(path)
    return path, *_files.load(path)


def replaced(tensors, name, values, at):
    t = tensors[name].clone()
    t[at] = torch.tensor(values, dtype=t.dtype)
    return {**tensors, name: t}


def first_step(about, **changes):
    return {**about, "steps": [{**about["steps"][0], **changes}, *about["steps"][1:]]}


TENSORS = {
    "columns whose 32-bit difference wraps": lambda t: replaced(t, "1.columns", [2**31 - 1, -(2**31) + 10], slice(1, 3)),
    "starts that go far and come back": lambda t: replaced(t, "1.starts", [2**31 - 1, -5], slice(1, 3)),
    "a start that is no 0": lambda t: replaced(t, "1.starts", [3], slice(0, 1)),
    "a column below 0": lambda t: replaced(t, "1.columns", [-1], slice(0, 1)),
    "a column beyond the row": lambda t: replaced(t, "1.columns", [10**6], slice(-1, None)),
    "an input's column elsewhere": lambda t: replaced(t, "1.input_columns", [1 + int(t["1.input_columns"][0])], slice(0, 1)),
    "NaN": lambda t: replaced(t, "1.values", [float("nan")], slice(0, 1)),
    "no starts": lambda t: {name: tensor for name, tensor in t.items() if name != "1.starts"},
    "two dimensions": lambda t: {**t, "1.values": t["1.values"][None]},
    "float64": lambda t: {**t, "1.values": t["1.values"].double()},
    "int64": lambda t: {**t, "1.starts": t["1.starts"].long()},
    "an empty order": lambda t: {**t, "1.order": t["1.order"][:0]},
    "a bias that is too short": lambda t: {**t, "0.bias": t["0.bias"][:-1]},
}


@pytest.mark.parametrize("change", TENSORS)
def test_files_with_hostile_tensors(saved, change, tmp_path):
    _, tensors, about = saved
    _files.save(tmp_path / "y.safetensors", TENSORS[change](tensors), about)
    with pytest.raises(ValueError, match=r"network .*y\.safetensors: damaged"):
        SparseNetwork.load(tmp_path / "y.safetensors")


ABOUT = {
    "no version": lambda a: {key: value for key, value in a.items() if key != "version"},
    "a version in a list": lambda a: {**a, "version": [[a["version"]]]},
    "no dictionary": lambda a: [a],
    "steps that are a string": lambda a: {**a, "steps": "steps"},
    "steps that are strings": lambda a: {**a, "steps": ["SparseConv"]},
    "a step of no name": lambda a: first_step(a, step=["SparseConv"]),
    "dilation 2**62": lambda a: first_step(a, dilation=[2**62, 2**62]),
    "dilation 2**30": lambda a: first_step(a, dilation=[2**30, 2**30]),
    "stride 0": lambda a: first_step(a, stride=[0, 1]),
    "no groups": lambda a: first_step(a, groups=0),
    "true for a number": lambda a: first_step(a, groups=True),
    "nested lists": lambda a: first_step(a, kernel=[[3, 3], [3]]),
    "an output among the inputs": lambda a: {**a, "output": 0},
    "an output from nowhere": lambda a: {**a, "output": 10**6},
    "a step twice": lambda a: {**a, "steps": [a["steps"][0], *a["steps"]]},
    "a step less": lambda a: {**a, "steps": a["steps"][1:]},
    "sources that are numbers": lambda a: {**a, "sources": [1] * len(a["sources"])},
    "layers in a list": lambda a: {**a, "layers": [{}]},
    "a layer of no kind": lambda a: {**a, "layers": {"a": ["sparse"]}},
    "an unknown kind of weights": lambda a: {**a, "weights": [{}] * len(a["weights"])},
    "a chunk of none": lambda a: {**a, "chunk": 0},
    "a chunk of text": lambda a: {**a, "chunk": "32"},
    "huge shapes": lambda a: {**a, "shapes": [[2**31 - 1] * 3 for _ in a["shapes"]]},
    "shapes of none": lambda a: {**a, "shapes": [[0, 8, 8], *a["shapes"][1:]]},
}


@pytest.mark.parametrize("change", ABOUT)
def test_files_with_hostile_headers(saved, change, tmp_path):
    _, tensors, about = saved
    _files.save(tmp_path / "y.safetensors", tensors, ABOUT[change](about))
    with pytest.raises(ValueError, match=r"(network|checkpoint) .*y\.safetensors: (damaged|of version|not a file|expected an object)"):
        SparseNetwork.load(tmp_path / "y.safetensors")


def test_files_whose_header_was_edited(saved, tmp_path):
    path, _, _ = saved
    content = path.read_bytes()
    (tmp_path / "y.safetensors").write_bytes(content.replace(b'{\\"chunk\\":', b'{\\"chunk\\";', 1))
    with pytest.raises(ValueError, match=r"y\.safetensors: damaged: it has changed since it was written"):
        SparseNetwork.load(tmp_path / "y.safetensors")
