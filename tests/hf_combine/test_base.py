"""Combinations leave the base's bits alone, whatever is active and in whatever order."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from tests.combine.test_api import METHODS
from tests.conftest import Pack, PackMaker, all_bytes, read_checkpoint
from tests.hf_combine.combined_models import SOME, assert_near, loaded, reference, tied_pack
from tests.test_patch import expected_sum


@pytest.mark.parametrize("kind", SOME)
def test_whatever_is_active_a_method_sees_the_base_itself(pack: Pack, kind: str):
    one, other = loaded(pack), loaded(pack)
    for model in (one, other):
        if model is other:
            model.set_dare_adapter({"c": 3.0})
        model.add_weighted_adapter(["a", "b"], [1, 1], "m", combination_type=kind, **SOME[kind])
        model.set_dare_adapter("m")
    assert all_bytes(one) == all_bytes(other)


@pytest.mark.parametrize("tied", [True, False])
def test_changes_in_any_order_leave_every_bit_of_the_base(
    make_pack: PackMaker, pack: Pack, tied: bool
):
    pack = tied_pack(make_pack) if tied else pack
    model = loaded(pack)
    before = all_bytes(model)
    for kind, options in SOME.items():
        model.add_weighted_adapter(["a", "b"], [1, 1], kind, combination_type=kind, **options)
    chance = random.Random(0)
    names = [*SOME, "a", "c"]
    seen: dict[frozenset[tuple[str, float]], dict[str, bytes]] = {}
    for _ in range(25):
        chosen = {n: chance.choice([1.0, -0.5]) for n in chance.sample(names, chance.randint(0, 3))}
        model.set_dare_adapter(chosen)
        if len(chosen) == 1:
            key = frozenset(chosen.items())
            assert seen.setdefault(key, all_bytes(model)) == all_bytes(model)
        if chance.random() < 0.4:
            model.disable_dare_adapters()
            assert all_bytes(model) == before
    model.disable_dare_adapters()
    assert all_bytes(model) == before


def test_active_combinations_are_summed_with_their_weights(pack: Pack):
    model = loaded(pack)
    parts = []
    for kind, weight in (("slerp", 0.5), ("ties", -1.0), ("karcher", 0.25)):
        model.add_weighted_adapter(["a", "b"], [1, 1], kind, combination_type=kind, **METHODS[kind])
        parts.append((reference(pack, "ab", [1, 1], kind, METHODS[kind]), weight))
    model.set_dare_adapter({"slerp": 0.5, "ties": -1.0, "karcher": 0.25})
    assert_near(model, expected_sum(read_checkpoint(pack.base), parts))


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize(
    "cast",
    [lambda model: model.to(torch.bfloat16), lambda model: model.double()],
    ids=["bfloat16", "double"],
)
def test_a_cast_with_a_combination_is_the_cast_base_with_it(
    pack: Pack, kind: str, cast: Callable[[PreTrainedModel], object]
):
    model, plain = loaded(pack), loaded(pack)
    cast(plain)
    base = all_bytes(plain)
    for one in (model, plain):
        one.add_weighted_adapter(["a", "b"], [1, 1], "m", combination_type=kind, **SOME[kind])
    model.set_dare_adapter("m")
    cast(model)
    plain.set_dare_adapter("m")
    assert all_bytes(model) == all_bytes(plain)
    model.disable_dare_adapters()
    assert all_bytes(model) == base
