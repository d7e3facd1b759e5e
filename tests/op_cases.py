"""What the tests of the ops share: hard inputs, and comparisons to the bit."""

import pytest
import torch

from s2ap_ext import backend, reference

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
compiled = pytest.mark.skipif(backend().cpu != "C++", reason="the C++ kernels are not built; the reference would be compared with itself")


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(INTEGERS[a.element_size()]), b.view(INTEGERS[b.element_size()]))


def same_numbers(a, b):
    """The same bits, but for those of NaN: torch gives them various ones when it converts to half precision."""
    return torch.equal(a.isnan(), b.isnan()) and same_bits(torch.where(a.isnan(), 0, a), torch.where(b.isnan(), 0, b))


def randn(*shape, seed=0, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_same(cut, masked, expected_cut, expected, kept):
    if kept > 0 and expected_cut[reference.NANS] >= kept:
        # Only NaN stay. Which of them is an accident: torch gives them various bits when it converts to half precision.
        assert cut[reference.NANS] == expected_cut[reference.NANS]
    else:
        assert cut.tolist() == expected_cut.tolist(), kept
        assert same_bits(masked, expected), kept


# Inputs that are hard on a selection, as functions of normal scores.
HARD = {
    "normal": lambda x: x,
    "equal": torch.ones_like,
    "zeros": lambda x: torch.where(x > 0, 0.0, -0.0),
    "two values": lambda x: (x > 1.2816) + 0.5,
    "two values, half of each": lambda x: (x > 0) + 0.5,
    "all but one equal": lambda x: (
        torch.ones_like(x).index_fill(0, torch.tensor([x.numel() // 3], dtype=torch.int64), 0.5) if x.numel() else x
    ),
    "few values": lambda x: (2 * x).round(),
    "denormal": lambda x: x * 1e-41,
    "infinite": lambda x: torch.where(x > 1, torch.inf, torch.where(x < -1, -torch.inf, x)),
    "ascending": lambda x: x.abs().sort().values,
    "descending": lambda x: x.abs().sort(descending=True).values,
    "wide": lambda x: (10 * x).exp(),
    "NaN among numbers": lambda x: x.index_fill(0, torch.arange(0, x.numel(), 97), torch.nan),
}
