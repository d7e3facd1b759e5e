"""What tests of layers and of whole models share."""

import pytest
from helpers import small_net

from s2ap_ext import sparsify


@pytest.fixture
def net():
    return sparsify(small_net(), 0.9)
