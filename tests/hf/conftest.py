"""A live model with adapters loaded."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from tests.conftest import Pack, PackMaker


@pytest.fixture
def pack(make_pack: PackMaker) -> Pack:
    return make_pack("plain")


@pytest.fixture
def model(pack: Pack) -> PreTrainedModel:
    """The base with adapters a, b and c loaded, none active."""
    return pack.loaded()
