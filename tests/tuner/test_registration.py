"""`import dare_adapters` makes "DARE" a method of PEFT, whichever is imported first."""

from __future__ import annotations

import copy
import enum
import json
import pickle
import subprocess
import sys

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


ORDERS = {
    "ours first": "import dare_adapters, importlib.util as u; u.find_spec('peft'); import peft",
    "peft first": "import peft, dare_adapters",
    "a part of ours": "import dare_adapters.tuner.config, peft",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_imports_does_not_matter(order: str) -> None:
    code = f"{ORDERS[order]}\nfrom peft import PeftConfig, PeftType\nassert PeftType('DARE')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_alone_imports_neither_peft_nor_transformers() -> None:
    code = "import dare_adapters, sys; assert not {'peft', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
