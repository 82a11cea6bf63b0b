"""Adapters of a live model combined by every method: the numbers."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, MixtralForCausalLM

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.combine.registry import get_method
from dare_adapters.errors import CombinationError
from tests.combine.test_api import METHODS, WEIGHTS, dense, small_llama
from tests.conftest import Pack, PackMaker, all_bytes, read_checkpoint
from tests.hf_combine.combined_models import (
    SOME,
    assert_near,
    bert_pack,
    changed,
    loaded,
    reference,
    tied_pack,
)
from tests.test_live import mixtral_config
from tests.test_patch import assert_holds, expected_sum


@pytest.mark.parametrize(
    ("of", "kind"),
    [*((of, kind) for of in ("llama", "bert") for kind in METHODS), *(("tied", k) for k in SOME)],
)
def test_a_combination_is_the_base_plus_the_formula_and_goes_without_a_trace(
    make_pack: PackMaker, pack: Pack, of: str, kind: str
):
    pack = {"llama": lambda _: pack, "bert": bert_pack, "tied": tied_pack}[of](make_pack)
    weights, options = WEIGHTS[kind], METHODS[kind]
    model = loaded(pack)
    before = all_bytes(model)
    model.add_weighted_adapter(["a", "b"], weights, "m", combination_type=kind, **options)
    assert all_bytes(model) == before
    model.set_dare_adapter("m")
    deltas = reference(pack, "ab", weights, kind, options)
    assert_near(model, changed(read_checkpoint(pack.base), deltas))
    assert all_bytes(model) != before
    if of == "tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight
    model.disable_dare_adapters()
    assert all_bytes(model) == before


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "della", "karcher"])
def test_in_bfloat16_the_sum_is_rounded_once(make_pack: PackMaker, kind: str):
    pack = make_pack("combine-bfloat16", config=small_llama())
    weights, options = WEIGHTS[kind], METHODS[kind]
    model = loaded(pack)
    model.add_weighted_adapter(["a", "b"], weights, "m", combination_type=kind, **options)
    model.set_dare_adapter("m")
    base = read_checkpoint(pack.base)
    expected = expected_sum(base, [(reference(pack, "ab", weights, kind, options), 1.0)])
    for name, parameter in model.named_parameters():
        # What is rounded once is equal, but for sums that end halfway between two numbers.
        same = parameter == expected[name]
        assert float(same.float().mean()) > 0.995
        torch.testing.assert_close(parameter, expected[name], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(("kind", "of"), [("fisher", "fisher"), ("regmean", "gram")])
def test_statistics_are_given_for_each_adapter(pack: Pack, kind: str, of: str):
    generator = torch.Generator().manual_seed(0)
    base = read_checkpoint(pack.base)
    statistics = []
    for _ in range(2):
        found = {}
        for name, value in base.items():
            if of == "fisher":
                found[name] = torch.rand(value.shape, generator=generator)
            elif value.dim() == 2 and "embed" not in name:
                inputs = torch.randn(200, value.shape[1], generator=generator)
                found[name] = inputs.T @ inputs / 200
        statistics.append(found)
    model = loaded(pack)
    before = all_bytes(model)
    how = {"combination_type": kind, "statistics": statistics}
    model.add_weighted_adapter(["a", "b"], [2.0, 1.0], "m", **how)
    model.set_dare_adapter("m")
    parts = [dense(Adapter.open(pack.adapters[name])) for name in "ab"]
    for name, start in base.items():
        tuned = [start + part[name] for part in parts]
        own = [found.get(name) for found in statistics]
        merged = get_method(kind).function(tuned, [2.0, 1.0], statistics=own)
        torch.testing.assert_close(model.get_parameter(name), merged, rtol=0, atol=1e-6)
    model.disable_dare_adapters()
    assert all_bytes(model) == before
    with pytest.raises(CombinationError, match="1 statistics for 2 adapters"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "n", combination_type=kind, statistics=[{}])
    with pytest.raises(CombinationError, match=r"statistics of every adapter.*dare-adapters stats"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "n", combination_type=kind)


@pytest.mark.parametrize("kind", METHODS)
def test_a_list_loaded_as_one_is_what_loaded_ones_make(pack: Pack, kind: str):
    weights, options = WEIGHTS[kind], METHODS[kind]
    one, other = loaded(pack), pack.live()
    one.add_weighted_adapter(["a", "b"], weights, "m", combination_type=kind, **options)
    one.set_dare_adapter("m")
    sources = [pack.adapters["a"], Adapter.open(pack.adapters["b"])]
    name = other.load_dare_adapter(sources, weight=weights, combination_type=kind, **options)
    assert name == "a+b"
    assert other.active_dare_adapters == ["a+b"]
    assert all_bytes(one) == all_bytes(other)


def test_seed_mask_and_pruning_are_passed_on(pack: Pack, tmp_path: Path):
    model = loaded(pack)
    seen = set()
    for number, how in enumerate(
        [
            {},
            {"seed": 1},
            {"mask": "bernoulli"},
            {"prune": "magnitude", "drop_rate": 0.9},
        ]
    ):
        model.add_weighted_adapter(
            ["a", "b"], [1, 1], f"m{number}", combination_type="dare_linear", density=0.5, **how
        )
        model.set_dare_adapter(f"m{number}")
        seen.add(all_bytes(model)["model.layers.0.mlp.up_proj.weight"])
        sources = [Adapter.open(pack.adapters[name]) for name in "ab"]
        out = dare_adapters.combine(
            sources, tmp_path / str(number), bits=32,
            combination_type="dare_linear", density=0.5, progress=False, **how,
        )  # fmt: skip
        assert_near(model, changed(read_checkpoint(pack.base), dense(out)), 1e-7)
    assert len(seen) == 4


def test_pieces_of_stacked_weights_have_a_base_of_their_own(make_pack: PackMaker, tmp_path: Path):
    # transformers stacks a Mixtral's experts; the checkpoint has a parameter for each.
    pack = make_pack("combine-mixtral", MixtralForCausalLM, mixtral_config(), dtype=torch.float32)
    base = read_checkpoint(pack.base)
    assert len(base) > len(loaded(pack).state_dict())
    for kind in ("slerp", "ties"):
        model = loaded(pack)
        before = all_bytes(model)
        options = METHODS[kind]
        model.add_weighted_adapter(["a", "b"], [1, 1], "m", combination_type=kind, **options)
        model.set_dare_adapter("m")
        expected = changed(base, reference(pack, "ab", [1, 1], kind, options))
        model.merge_dare_adapters()
        model.save_pretrained(tmp_path / kind)
        found = read_checkpoint(tmp_path / kind)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
        assert before != all_bytes(model)


def test_a_combination_of_combinations_is_computed_from_the_inside(pack: Pack):
    model = loaded(pack)
    before = all_bytes(model)
    model.add_weighted_adapter(["a", "b"], [1, 1], "inner", combination_type="slerp", t=0.3)
    model.add_weighted_adapter(["a", "c"], [1.0, -0.5], "sum")
    model.add_weighted_adapter(
        ["inner", "c", "sum"], [1.0, 0.5, 2.0], "outer", combination_type="ties", density=0.6
    )
    model.add_weighted_adapter(["outer", "a"], [1, 1], "last", combination_type="karcher")
    base = read_checkpoint(pack.base)
    own = {name: dense(Adapter.open(pack.adapters[name])) for name in "abc"}
    slerped = reference(pack, "ab", [1, 1], "slerp", {"t": 0.3})
    ties, karcher = get_method("ties").function, get_method("karcher").function
    expected = {}
    for name, start in base.items():
        deltas = [slerped[name], own["c"][name], own["a"][name] - 0.5 * own["c"][name]]
        values = [dare_adapters.delta.DenseDelta(delta) for delta in deltas]
        outer = ties(values, [1.0, 0.5, 2.0], density=0.6).dense()
        expected[name] = karcher([start + outer, start + own["a"][name]], [1, 1])
    model.set_dare_adapter("last")
    for name, value in expected.items():
        found = model.get_parameter(name)
        # An election may go the other way where it was a draw but for rounding.
        near = (found - value).abs() <= 1e-6
        assert float(near.float().mean()) > 0.999, name
    for name in ("inner", "sum", "outer", "a", "b", "c"):
        model.delete_dare_adapter(name)  # what they were made of stays
    model.set_dare_adapter({"last": 0.5})
    model.disable_dare_adapters()
    assert all_bytes(model) == before


@pytest.mark.parametrize("kind", SOME)
def test_a_saved_combination_loads_with_the_same_effect(pack: Pack, tmp_path: Path, kind: str):
    model = loaded(pack)
    model.add_weighted_adapter(["a", "b"], [1, 1], "m", combination_type=kind, **SOME[kind])
    model.set_dare_adapter("c")
    active = all_bytes(model)
    model.save_dare_adapter(tmp_path / "saved", "m")
    assert all_bytes(model) == active
    model.set_dare_adapter("m")
    again = pack.live()
    again.load_dare_adapter(tmp_path / "saved")
    found, start = dict(again.named_parameters()), read_checkpoint(pack.base)
    for name, parameter in model.named_parameters():
        error = (found[name] - parameter).norm() / (parameter - start[name]).norm()
        assert error.item() < 0.005, name  # of the finest input: 16 bits


def test_a_merged_combination_is_an_ordinary_fine_tune(pack: Pack, tmp_path: Path):
    model = loaded(pack)
    model.add_weighted_adapter(["a", "b"], [1, 1], "m", combination_type="slerp", t=0.5)
    model.set_dare_adapter("m")
    expected = {name: value.clone() for name, value in model.named_parameters()}
    assert model.merge_dare_adapters() == ["m"]
    model.save_pretrained(tmp_path)
    assert_holds(LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto"), expected)


def test_a_mix_directory_loads_under_its_name_and_is_combined_further(pack: Pack, tmp_path: Path):
    for name in "ab":
        shutil.copytree(pack.adapters[name], tmp_path / name)
    paths = [tmp_path / "a", tmp_path / "b"]
    dare_adapters.combine(paths, tmp_path / "mix", combination_type="slerp", t=0.3, as_mix=True)
    model = loaded(pack)
    before = all_bytes(model)
    assert model.load_dare_adapter(tmp_path / "mix") == "mix"
    deltas = reference(pack, "ab", [1, 1], "slerp", {"t": 0.3})
    base = read_checkpoint(pack.base)
    assert_near(model, changed(base, deltas))
    model.add_weighted_adapter(["mix", "c"], [1.0, 0.5], "more")
    model.set_dare_adapter("more")
    third = dense(Adapter.open(pack.adapters["c"]))
    assert_near(model, {n: v + deltas[n] + 0.5 * third[n] for n, v in base.items()})
    again = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    for other in (model, again, pickled):
        other.disable_dare_adapters()
        assert all_bytes(other) == before
