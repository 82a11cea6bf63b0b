"""`import dare_adapters` makes "DARE" a method of PEFT."""

from __future__ import annotations

import copy
import enum
import json
import pickle

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING

from dare_adapters import DareConfig
from dare_adapters.enum_member import add_member
from dare_adapters.peft_method import register


def test_the_member_is_as_any_other() -> None:
    member = PeftType("DARE")
    assert member is PeftType["DARE"] is PeftType.DARE
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert json.loads(json.dumps({"type": member})) == {"type": "DARE"}
    assert member in list(PeftType)
    assert member == "DARE"
    assert PEFT_TYPE_TO_CONFIG_MAPPING["DARE"] is DareConfig
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "dare_"


def test_registering_again_changes_nothing() -> None:
    before = list(PeftType)
    register()
    assert list(PeftType) == before


def test_a_member_more_keeps_the_others() -> None:
    class Kind(str, enum.Enum):
        ONE = "ONE"

    made = add_member(Kind, "TWO", "TWO")
    assert [one.value for one in Kind] == ["ONE", "TWO"]
    assert len(Kind) == 2
    assert Kind("TWO") is made is add_member(Kind, "TWO", "TWO")
    with pytest.raises(ValueError, match="THREE"):
        Kind("THREE")
