"""The sparse convolutions against torch's dense ones, on images in every layout and on blocks. The C++ kernels have tests of their own in
tests/native; what is shown here is that the ops, their checks and the fallback agree."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from s2ap_ext import backend
from s2ap_ext import sparse_reference as reference

OPS = torch.ops.s2ap

# batch, inputs, outputs, size, kernel, stride, padding, dilation, groups
CASES = {
    "3x3": (16, 6, 10, (8, 9), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "stride": (19, 6, 10, (8, 9), (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "1x1": (16, 6, 10, (8, 8), (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "groups": (3, 6, 9, (9, 7), (3, 2), (1, 2), (1, 0), (2, 1), 3),
    "one image": (1, 6, 10, (12, 12), (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "runs": (17, 40, 50, (6, 5), (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "runs of a few images": (2, 40, 20, (6, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "linear": (40, 30, 12, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1), 1),
}
ONE = ((1, 1), (1, 1), (0, 0), (1, 1), 1)  # a linear layer
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "batch innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


def lanes():
    if backend().cpu != "C++":
        return 8
    from s2ap_ext import _C

    return _C.lanes()


class Problem:
    def __init__(self, batch, inputs, outputs, size, kernel, stride, padding, dilation, groups, density=0.3):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch, inputs, *size, generator=generator)
        self.mask = torch.rand(outputs, inputs // groups, *kernel, generator=generator) < density
        self.weight = torch.randn(self.mask.shape, generator=generator) * self.mask
        self.convolution = (kernel, stride, padding, dilation, groups)
        self.settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        self.y = F.conv2d(self.x, self.weight, **self.settings)
        self.grad = torch.randn(self.y.shape, generator=generator)
        self.bias = torch.randn(outputs, generator=generator)
        self.starts, self.columns, self.input_starts, self.input_columns, order = OPS.sparse_pattern(self.weight, None, *self.convolution)
        self.values = self.of_entries(self.weight)
        self.input_values = self.values[order.long()]

    def of_entries(self, weight):
        return weight.flatten(1)[reference.rows_of(self.starts, len(weight)), self.columns.long()]

    def dense_grads(self):
        x, w = self.x.clone().requires_grad_(), self.weight.clone().requires_grad_()
        F.conv2d(x, w, **self.settings).backward(self.grad)
        return x.grad, w.grad


@pytest.fixture(params=CASES)
def problem(request):
    return Problem(*CASES[request.param])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_pattern(problem):
    for mask in (None, problem.mask):
        got = OPS.sparse_pattern(problem.weight, mask, *problem.convolution)
        for a, b in zip(got, reference.sparse_pattern(problem.weight, mask, *problem.convolution), strict=True):
            assert a.dtype == torch.int32
            assert torch.equal(a, b)
    assert torch.equal(reference.dense_weight(problem.starts, problem.columns, problem.values, problem.weight.shape), problem.weight)


def test_parts():
    """Rows that are long are cut into runs of channels; of the input gradient each residue has its own."""
    p = Problem(*CASES["runs"], density=2)
    assert len(p.starts) == 5 * 50 + 1  # 9 entries of an input channel, 20 of a run: 3 channels, but never fewer than 8
    assert len(p.input_starts) == 4 * 6 * 40 + 1  # 9 / 4 for each residue on average: 9 of the 50 channels
    even = p.input_columns[: p.input_starts[6 * 40]] % 9  # rows and columns of the input with even numbers: reached by the kernel's centre
    assert even.unique().tolist() == [4]


def test_a_kept_weight_of_zero_is_in_the_mask_alone():
    weight, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    assert len(OPS.sparse_pattern(weight, None, *ONE)[1]) == 0
    assert len(OPS.sparse_pattern(weight, mask, *ONE)[1]) == 6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images(problem, layout):
    p, stored = problem, LAYOUTS[layout]
    out, grad_x = stored(torch.empty_like(p.y)), stored(torch.empty_like(p.x))
    OPS.sparse_conv(stored(p.x), p.starts, p.columns, p.values, None, None, *p.convolution, 0, False, out)
    close(out, p.y)
    OPS.sparse_conv_input_grad(stored(p.grad), p.input_starts, p.input_columns, p.input_values, None, None, *p.convolution, 0, grad_x)
    dense_x, dense_w = p.dense_grads()
    close(grad_x, dense_x)
    grad_weight = torch.empty_like(p.weight)
    OPS.sparse_conv_weight_grad(stored(p.x), stored(p.grad), p.starts, p.columns, *p.convolution, grad_weight)
    close(grad_weight, torch.where(p.weight != 0, dense_w, 0))


@pytest.mark.parametrize("halo", [6])
def test_blocks(problem, halo):
    p, width = problem, lanes()

    def blocks(t):
        return reference.to_blocks(t, width, halo)

    residual, before, gate = torch.randn_like(p.y), torch.randn_like(p.x), torch.randn_like(p.x)
    out, grad_x = blocks(torch.zeros_like(p.y)), blocks(torch.zeros_like(p.x))
    OPS.sparse_conv(blocks(p.x), p.starts, p.columns, p.values, p.bias, blocks(residual), *p.convolution, halo, True, out)
    close(reference.from_blocks(out, halo, len(p.x)), (p.y + p.bias[:, None, None] + residual).relu())
    entries = p.input_starts, p.input_columns, p.input_values
    OPS.sparse_conv_input_grad(blocks(p.grad), *entries, blocks(before), blocks(gate), *p.convolution, halo, grad_x)
    dense_x, _ = p.dense_grads()
    close(reference.from_blocks(grad_x, halo, len(p.x)), torch.where(gate > 0, dense_x + before, 0))
    outside = out.clone()
    outside[:, :, halo:-halo, halo:-halo] = 0
    assert not outside.any()


def test_blocks_and_images_are_the_same_numbers():
    images = torch.randn(11, 3, 5, 4)
    assert torch.equal(reference.from_blocks(reference.to_blocks(images, 4, 2), 2, 11), images)


def test_nan_is_seen():
    p = Problem(*CASES["3x3"])
    p.x[3, :, 4, 4] = torch.nan
    for pack, halo in ((lambda t: t, 0), (lambda t: reference.to_blocks(t, lanes(), 1), 1)):
        out = pack(torch.zeros_like(p.y))
        OPS.sparse_conv(pack(p.x), p.starts, p.columns, p.values, None, None, *p.convolution, halo, True, out)
        got = out if out.dim() == 4 else reference.from_blocks(out, halo, len(p.x))
        reached = F.conv2d(p.x.isnan().float(), (p.weight != 0).float(), **p.settings) > 0  # by a kept weight
        assert got.isnan()[reached].all()  # the fallback multiplies the other weights, which are 0, too
        assert reached.any()


def test_bfloat16():
    p = Problem(*CASES["3x3"])
    out = torch.empty_like(p.y, dtype=torch.bfloat16)
    OPS.sparse_conv(p.x.bfloat16(), p.starts, p.columns, p.values, p.bias, None, *p.convolution, 0, True, out)
    torch.testing.assert_close(out.float(), (p.y + p.bias[:, None, None]).relu(), rtol=0.02, atol=0.1)


def arguments(name):
    p = Problem(*CASES["3x3"])
    return {
        "sparse_pattern": (p.weight, p.mask, *p.convolution),
        "sparse_conv": (p.x, p.starts, p.columns, p.values, p.bias, None, *p.convolution, 0, True, torch.empty_like(p.y)),
        "sparse_conv_input_grad": (
            *(p.grad, p.input_starts, p.input_columns, p.input_values, None, None, *p.convolution, 0),
            torch.empty_like(p.x),
        ),
        "sparse_conv_weight_grad": (p.x, p.grad, p.starts, p.columns, *p.convolution, torch.empty_like(p.weight)),
    }[name]


@pytest.mark.parametrize("name", ["sparse_pattern", "sparse_conv", "sparse_conv_input_grad", "sparse_conv_weight_grad"])
def test_opcheck(name):
    torch.library.opcheck(getattr(OPS, name).default, arguments(name))


def test_fake_pattern():
    with FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv()):
        starts, columns, *_ = OPS.sparse_pattern(torch.empty(4, 3, 2, 2), None, (2, 2), (1, 1), (0, 0), (1, 1), 1)
        assert starts.dim() == columns.dim() == 1
        assert starts.dtype == columns.dtype == torch.int32


@pytest.mark.skipif(backend().cpu != "C++", reason="the checks of the kernels")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.empty(16, 10, 8, 8)}, r"out: expected size 9 along axis 3, got 8"),
        ({"out": torch.empty(15, 10, 8, 9)}, r"out: expected a batch of 16, got 15"),
        ({"starts": torch.zeros(3, dtype=torch.int32)}, r"starts: expected 1 and a multiple of 10 elements, got 3"),
        ({"values": torch.zeros(3)}, r"values: expected \d+ elements, got 3"),
        ({"bias": torch.zeros(3)}, r"bias: expected 10 elements, got 3"),
        ({"residual": torch.zeros(16, 10, 8, 8)}, r"residual: expected a tensor of the size and dtype of out, got another"),
        ({"x": torch.zeros(16, 6, 8, 9, dtype=torch.float64)}, r"input: expected a CPU tensor of the dtype and the layout of out"),
        ({"columns": "shifted"}, r"columns: expected numbers in \[0, 54\), got \d+"),
    ],
    ids=lambda v: "",
)
def test_wrong_operands_are_refused_with_their_name(change, message):
    p = Problem(*CASES["3x3"])
    if "columns" in change:
        change = {"columns": p.columns + 54}
    a = {"x": p.x, "starts": p.starts, "columns": p.columns, "values": p.values, "bias": p.bias, "residual": None} | change
    out = a.pop("out", torch.empty_like(p.y))
    with pytest.raises(RuntimeError, match=message):
        OPS.sparse_conv(*a.values(), *p.convolution, 0, False, out)


@pytest.mark.skipif(backend().cpu != "C++", reason="the checks of the kernels")
def test_blocks_with_too_little_around_them_are_refused():
    p = Problem(*CASES["3x3"])
    blocks = reference.to_blocks(p.x, lanes(), 0)
    with pytest.raises(RuntimeError, match="halo: expected zeros as far as the kernel reaches, got 0"):
        OPS.sparse_conv(blocks, p.starts, p.columns, p.values, None, None, *p.convolution, 0, False, reference.to_blocks(p.y, lanes(), 0))


@pytest.mark.skipif(backend().cpu != "C++", reason="the checks of the kernels")
def test_blocks_that_are_too_large_for_offsets_are_refused():
    size = 64
    inputs = 2**31 // (size * size * lanes()) + 1
    starts, columns, *_ = OPS.sparse_pattern(torch.eye(1, inputs)[..., None, None], None, *ONE)
    large, out = torch.zeros(1).expand(1, inputs, size, size, lanes()), torch.zeros(1, 1, size, size, lanes())
    with pytest.raises(RuntimeError, match=r"input: expected fewer than 2\*\*31 elements in a group's channels of a block, got 21\d{8}"):
        OPS.sparse_conv(large, starts, columns, torch.ones(1), None, None, *ONE, 0, False, out)
