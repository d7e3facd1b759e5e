"""The README's example runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(not README.exists(), reason="the README is not beside the tests")
def test_the_example_trains():
    (code,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    generator = torch.Generator().manual_seed(0)
    loader = [(torch.rand(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3])) for _ in range(2)]
    namespace = {"loader": loader}
    exec(code, namespace)
    assert namespace["optimizer"].flips > 0
    assert int(namespace["net"][0].mask.sum()) == 87
