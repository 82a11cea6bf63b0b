"""The pack whose adapters are combined."""

from __future__ import annotations

import pytest
import torch

from tests.combine.test_api import small_llama
from tests.conftest import Pack, PackMaker


@pytest.fixture
def pack(make_pack: PackMaker) -> Pack:
    return make_pack("combine", config=small_llama(), dtype=torch.float32)
