"""Several adapters at once, and adapters of other methods on the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from dare_adapters import Adapter, DareConfig
from dare_adapters.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    CombinationError,
    PatchedStateWarning,
)
from dare_adapters.tuner import allow_in_mixed_models
from tests.conftest import Pack, PackMaker, all_bytes
from tests.tuner.architectures import ARCHITECTURES, ids, logits

INPUTS = {"input_ids": ids()}


@pytest.fixture
def pack(make_pack: PackMaker) -> Pack:
    return ARCHITECTURES["llama"].pack(make_pack, "llama")


@pytest.fixture
def model(pack: Pack) -> PeftModel:
    model = PeftModel.from_pretrained(pack.live(), pack.adapters["a"], adapter_name="a")
    model.load_adapter(pack.adapters["b"], "b")
    return model


@pytest.fixture
def patched(pack: Pack) -> PreTrainedModel:
    """The same adapters, in place."""
    model = pack.live()
    for name in ("a", "b"):
        model.load_dare_adapter(pack.adapters[name], adapter_name=name, activate=False)
    return model


def lora() -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def with_lora(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    model.add_adapter(lora(), "lora")
    return model


def test_active_adapters_are_summed_and_rounded_once(
    model: PeftModel, patched: PreTrainedModel
) -> None:
    model.base_model.set_adapter(["a", "b"])
    patched.set_dare_adapter(["a", "b"])
    expected = logits(patched, INPUTS)
    assert torch.equal(logits(model, INPUTS), expected)
    model.merge_adapter()
    assert torch.equal(logits(model, INPUTS), expected)


def test_merging_one_after_the_other_is_merging_both(model: PeftModel) -> None:
    before = all_bytes(model)
    model.merge_adapter(["a", "b"])
    both = all_bytes(model)
    model.unmerge_adapter()
    model.merge_adapter(["a"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["b"])
    assert all_bytes(model) == both
    model.unmerge_adapter()
    assert all_bytes(model) == before


def test_merging_loses_no_bit_where_lora_drifts(make_pack: PackMaker) -> None:
    pack = make_pack("tuner-bfloat16", dtype=torch.bfloat16, spread=0.02)
    dare = PeftModel.from_pretrained(pack.live(), pack.adapters["a"])
    torch.manual_seed(0)
    drifting = get_peft_model(pack.live(), lora())
    for model, keeps in ((dare, True), (drifting, False)):
        before = all_bytes(model)
        for _ in range(5):
            model.merge_adapter()
            model.unmerge_adapter()
        assert (all_bytes(model) == before) is keeps


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {}),
        ("ties", {"density": 0.3}),
        ("dare_ties", {"density": 0.5}),
        ("magnitude_prune", {"density": 0.2}),
    ],
)
def test_a_weighted_adapter_is_that_of_load_dare_adapter(
    model: PeftModel, patched: PreTrainedModel, kind: str, options: dict, tmp_path: Path
) -> None:
    for one in (model, patched):
        one.add_weighted_adapter(["a", "b"], [1.0, 0.5], "mix", combination_type=kind, **options)
    model.set_adapter("mix")
    patched.set_dare_adapter("mix")
    assert torch.equal(logits(model, INPUTS), logits(patched, INPUTS))
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    adapter = Adapter.open(tmp_path / "mix")
    patched.load_dare_adapter(adapter, "again")
    assert torch.equal(logits(model, INPUTS), logits(patched, INPUTS))


def test_weighted_adapters_of_nothing_are_refused(model: PeftModel) -> None:
    with pytest.raises(AdapterNotFoundError, match="'c'"):
        model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "mix")
    with pytest.raises(AdapterExistsError, match="'b'"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "b")
    with pytest.raises(CombinationError, match="density"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "mix", "ties", density=7.0)
    model.merge_adapter()
    with pytest.raises(CombinationError, match="unmerge_adapter"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "mix")


def test_deleting_leaves_the_others(model: PeftModel, patched: PreTrainedModel) -> None:
    model.set_adapter("b")
    model.delete_adapter("a")
    patched.set_dare_adapter("b")
    assert torch.equal(logits(model, INPUTS), logits(patched, INPUTS))
    assert not any(name.endswith(".a") for name in model.state_dict())


def test_status_tells_of_every_layer(model: PeftModel) -> None:
    status = model.get_model_status()
    assert status.peft_types == {"a": "DARE", "b": "DARE"}
    assert status.available_adapters == ["a", "b"]
    assert status.active_adapters == ["a"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"a": False, "b": False}
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["a"]
    assert {layer.module_type for layer in model.get_layer_status()} == {"dare.DareLayer"}


@pytest.mark.parametrize("order", ["lora first", "dare first"])
def test_lora_and_dare_act_alone_and_together_in_either_order(pack: Pack, order: str) -> None:
    alone = {"lora": logits(with_lora(pack.live()), INPUTS)}
    dare = pack.live()
    dare.load_dare_adapter(pack.adapters["a"])
    alone["dare"] = logits(dare, INPUTS)
    dare.merge_dare_adapters()
    both = logits(with_lora(dare), INPUTS)

    def made() -> PreTrainedModel:
        model = pack.live()
        if order == "lora first":
            with_lora(model)
        model.load_adapter(str(pack.adapters["a"]), adapter_name="dare")
        if order == "dare first":
            with_lora(model)
        return model

    model = made()
    model.set_adapter(["lora", "dare"])
    assert torch.allclose(logits(model, INPUTS), both, atol=1e-5)
    for name, expected in alone.items():
        model.set_adapter(name)
        assert torch.equal(logits(model, INPUTS), expected), name
    for left, gone in (("dare", "lora"), ("lora", "dare")):
        model = made()
        model.set_adapter(["lora", "dare"])
        model.delete_adapter(gone)
        assert torch.equal(logits(model, INPUTS), alone[left]), left


def test_a_peft_model_in_a_peft_model_holds_both(pack: Pack) -> None:
    dare = pack.live()
    dare.load_dare_adapter(pack.adapters["a"])
    dare.merge_dare_adapters()
    expected = logits(with_lora(dare), INPUTS)
    torch.manual_seed(0)
    outside = PeftModel.from_pretrained(get_peft_model(pack.live(), lora()), pack.adapters["a"])
    assert torch.allclose(logits(outside, INPUTS), expected, atol=1e-5)
    inside = PeftModel.from_pretrained(pack.live(), pack.adapters["a"])
    torch.manual_seed(0)
    assert torch.allclose(
        logits(get_peft_model(inside, lora(), "two"), INPUTS), expected, atol=1e-5
    )


def test_a_mixed_model_takes_both_for_who_asks(pack: Pack) -> None:
    recipe = DareConfig(drop_rate=0.5, init_weights=False, seed=1)
    allow_in_mixed_models()
    allow_in_mixed_models()
    torch.manual_seed(0)
    model = get_peft_model(pack.live(), lora(), "lora", mixed=True)
    model.add_adapter("dare", recipe)
    seen = {}
    for names in (["lora"], ["dare"], ["lora", "dare"]):
        model.set_adapter(names)
        seen[tuple(names)] = logits(model, INPUTS)
    assert len({tensor.sum().item() for tensor in seen.values()}) == 3
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged, INPUTS), seen["lora", "dare"], atol=1e-4)


def test_load_dare_adapter_works_beside_a_peft_adapter(pack: Pack) -> None:
    plain = pack.live()
    plain.load_dare_adapter(pack.adapters["b"])
    plain.merge_dare_adapters()
    expected = logits(with_lora(plain), INPUTS)
    model = with_lora(pack.live())
    model.load_dare_adapter(pack.adapters["b"])
    assert torch.allclose(logits(model, INPUTS), expected, atol=1e-5)


@pytest.mark.parametrize("order", ["patched first", "layers first"])
def test_a_patch_comes_off_whatever_layers_came_and_went_around_it(pack: Pack, order: str) -> None:
    model = pack.live()
    before = all_bytes(model)
    if order == "patched first":
        model.load_dare_adapter(pack.adapters["a"])
    tuned = get_peft_model(model, DareConfig(drop_rate=0.5, init_weights=False, seed=1))
    if order == "layers first":
        model.load_dare_adapter(pack.adapters["a"])
    model.disable_dare_adapters()
    assert {name.replace(".base_layer", ""): one for name, one in all_bytes(model).items()
            if ".dare_" not in name} == before  # fmt: skip
    model.set_dare_adapter(model.dare_adapters[0])
    tuned.unload()
    model.disable_dare_adapters()
    assert all_bytes(model) == before


@pytest.mark.parametrize("order", ["patched first", "layers first"])
def test_an_adapter_that_trains_beside_a_patch_is_one_of_the_base(
    pack: Pack, order: str, tmp_path: Path
) -> None:
    model = pack.live()
    if order == "patched first":
        model.load_dare_adapter(pack.adapters["a"], "patch")
    tuned = get_peft_model(model, DareConfig(drop_rate=0.5, init_weights=False, seed=1))
    if order == "layers first":
        model.load_dare_adapter(pack.adapters["a"], "patch")
    answers = logits(tuned, INPUTS)
    with pytest.warns(PatchedStateWarning):  # PEFT takes the whole state dict, and picks
        tuned.save_pretrained(tmp_path)
    assert torch.equal(logits(tuned, INPUTS), answers), "the patch is back"
    again = pack.live()  # which is compared with what the adapter says of its base
    again.load_dare_adapter(tmp_path, "trained")
    again.load_dare_adapter(pack.adapters["a"], "patch")
    again.set_dare_adapter(["patch", "trained"])
    assert torch.allclose(logits(again, INPUTS), answers, atol=1e-5)
