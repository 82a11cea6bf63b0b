"""Changes go into live weights and come out again without a trace."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import dare_adapters
from dare_adapters import delta as delta_module
from dare_adapters import patch as patch_module
from dare_adapters import vocabulary
from dare_adapters.adapter import Adapter
from dare_adapters.delta import DenseDelta, NewParameter, WeightedDelta
from dare_adapters.errors import (
    ArchitectureMismatchError,
    BaseMismatchError,
    UnsupportedParameterError,
)
from dare_adapters.live import LiveParameter, locate_all
from dare_adapters.mask import BernoulliSupport, BlockedSupport, matrix_shape
from dare_adapters.patch import Change, Patch
from dare_adapters.sparse_delta import SparseDelta
from tests.conftest import (
    FamilyMaker,
    Pack,
    PackMaker,
    all_bytes,
    raw_bytes,
    read_checkpoint,
    tiny_llama,
)
from tests.test_live import mixtral_config

EXACT = {"drop_rate": 0.0, "bits": 32}
EXACT_KINDS = {"a": EXACT, "b": EXACT, "c": EXACT}


def dense_deltas(pack: Pack, name: str) -> dict[str, torch.Tensor]:
    """What an adapter adds to each parameter, float32, zeros where nothing survived."""
    adapter = Adapter.open(pack.adapters[name])
    found = {}
    for parameter in adapter:
        delta = adapter[parameter]
        assert not isinstance(delta, NewParameter)
        found[parameter] = delta.dense()
    return found


def true_deltas(pack: Pack, name: str) -> dict[str, torch.Tensor]:
    """The same from the two checkpoints, without this library."""
    base, finetuned = read_checkpoint(pack.base), read_checkpoint(pack.finetuned[name])
    return {key: finetuned[key].float() - value.float() for key, value in base.items()}


def expected_sum(
    base: dict[str, torch.Tensor], parts: list[tuple[dict[str, torch.Tensor], float]]
) -> dict[str, torch.Tensor]:
    """Base plus all changes: summed in float32, rounded once."""
    found = {}
    for name, value in base.items():
        total = torch.zeros(value.shape)
        for deltas, weight in parts:
            if name in deltas:
                total = total + deltas[name] * weight
        found[name] = (value.float() + total).to(value.dtype)
    return found


def assert_holds(model: PreTrainedModel, expected: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in expected.items():
        assert torch.equal(parameters[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_hundred_changes_in_random_order_leave_every_bit_of_the_base(
    make_pack: PackMaker, dtype: torch.dtype
):
    pack = make_pack(f"tied-{dtype}", config=tiny_llama(tie_word_embeddings=True), dtype=dtype)
    model = pack.live()
    base = read_checkpoint(pack.base)
    before = all_bytes(model)
    deltas = {name: dense_deltas(pack, name) for name in pack.adapters}
    for name, path in pack.adapters.items():
        model.load_dare_adapter(path, name, activate=False)
    chance = random.Random(0)
    for step in range(100):
        chosen = {
            name: chance.choice([1.0, 0.5, -0.7, 2.25])
            for name in chance.sample(sorted(pack.adapters), chance.randint(0, 3))
        }
        model.set_dare_adapter(chosen)
        if step % 10 == 0:
            parts = [(deltas[name], weight) for name, weight in chosen.items()]
            assert_holds(model, expected_sum(base, parts))
        if chance.random() < 0.5:
            model.disable_dare_adapters()
            assert all_bytes(model) == before
    model.disable_dare_adapters()
    assert all_bytes(model) == before
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.25, -1.0, 3.5), (0.0, 1e-3, 1.0)])
def test_several_adapters_are_summed_in_float32_and_rounded_once(
    make_pack: PackMaker, dtype: torch.dtype, weights: tuple[float, ...]
):
    pack = make_pack(f"exact-{dtype}", dtype=dtype, kinds=EXACT_KINDS)
    model = pack.loaded()
    model.set_dare_adapter(list(pack.adapters), weights=weights)
    parts = [(true_deltas(pack, n), w) for n, w in zip(pack.adapters, weights, strict=True)]
    assert_holds(model, expected_sum(read_checkpoint(pack.base), parts))


def test_storage_shared_by_tied_weights_is_patched_once(make_pack: PackMaker):
    pack = make_pack("exact-tied", config=tiny_llama(tie_word_embeddings=True), kinds={"a": EXACT})
    finetuned = read_checkpoint(pack.finetuned["a"])["model.embed_tokens.weight"]
    model = pack.live()
    model.load_dare_adapter(pack.adapters["a"])
    assert torch.equal(model.lm_head.weight, finetuned)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_untied_live_model_takes_an_adapter_of_a_tied_base(make_pack: PackMaker):
    pack = make_pack("exact-tied", config=tiny_llama(tie_word_embeddings=True), kinds={"a": EXACT})
    model = pack.live()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    before = all_bytes(model)
    model.load_dare_adapter(pack.adapters["a"])
    finetuned = read_checkpoint(pack.finetuned["a"])
    assert torch.equal(model.model.embed_tokens.weight, finetuned["model.embed_tokens.weight"])
    model.disable_dare_adapters()
    assert all_bytes(model) == before


@pytest.mark.parametrize("failing_call", [1, 2, 5, 17])
@pytest.mark.parametrize("active", [(), ("b",)])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_while_applying_restores_what_was_there(
    make_pack: PackMaker,
    monkeypatch: pytest.MonkeyPatch,
    failing_call: int,
    active: tuple[str, ...],
    error: type[BaseException],
):
    pack = make_pack("plain")
    model = pack.loaded()
    base = all_bytes(model)
    model.set_dare_adapter(list(active))
    before = all_bytes(model)
    calls = 0

    def failing(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise error("no more memory")
        return real(*args)

    real = patch_module.apply_rows
    monkeypatch.setattr(patch_module, "apply_rows", failing)
    with pytest.raises(error):
        model.set_dare_adapter(["a", "c"])
    assert calls >= failing_call
    assert all_bytes(model) == before
    assert model.active_dare_adapters == list(active)
    model.set_dare_adapter("a")  # the second time it works
    model.disable_dare_adapters()
    assert all_bytes(model) == base


def grown_pack(make_pack: PackMaker, tied: bool, **changes: object) -> Pack:
    """A fine-tune with five more tokens than its base."""

    def grow(model: PreTrainedModel) -> None:
        model.resize_token_embeddings(102, mean_resizing=False)

    return make_pack(
        f"grown-{tied}",
        config=tiny_llama(tie_word_embeddings=tied),
        kinds={"a": EXACT, "b": {"drop_rate": 0.9, "bits": 4}},
        change=grow,
    )


def shape_facts(model: PreTrainedModel) -> tuple[object, ...]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return (
        tuple(embedding.weight.shape),
        embedding.num_embeddings,
        tuple(head.weight.shape),
        head.out_features,
        model.config.vocab_size,
        model.vocab_size,
        model.model.vocab_size,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_vocabulary_comes_and_goes_with_the_adapter(make_pack: PackMaker, tied: bool):
    pack = grown_pack(make_pack, tied)
    model = pack.live()
    before, facts = all_bytes(model), shape_facts(model)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) is tied
    model.load_dare_adapter(pack.adapters["a"], "a")
    wide = (102, 64)
    assert shape_facts(model) == (wide, 102, wide, 102, 102, 102, 102)
    assert_holds(model, read_checkpoint(pack.finetuned["a"]))
    finetuned = LlamaForCausalLM.from_pretrained(pack.finetuned["a"], dtype="auto").eval()
    tokens = torch.tensor([[1, 99, 101, 5]])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, finetuned(tokens).logits)
        loss = model(tokens, labels=tokens).loss
        assert torch.equal(loss, finetuned(tokens, labels=tokens).loss)
    made = model.generate(tokens, max_new_tokens=6, do_sample=False)
    assert torch.equal(made, finetuned.generate(tokens, max_new_tokens=6, do_sample=False))
    assert model.get_input_embeddings().weight is embedding
    model.disable_dare_adapters()
    assert shape_facts(model) == facts
    assert all_bytes(model) == before
    assert model.get_input_embeddings().weight is embedding
    assert model.get_output_embeddings().weight is head


def test_two_adapters_with_grown_vocabularies_can_be_active_and_leave_in_any_order(
    make_pack: PackMaker,
):
    pack = grown_pack(make_pack, tied=False)
    model = pack.live()
    before, facts = all_bytes(model), shape_facts(model)
    for name, path in pack.adapters.items():
        model.load_dare_adapter(path, name, activate=False)
    added = read_checkpoint(pack.finetuned["b"])["model.embed_tokens.weight"][97:]
    model.set_dare_adapter(["b", "a"])
    assert torch.equal(model.model.embed_tokens.weight[97:], added)  # of the first that has them
    model.delete_dare_adapter("b")
    model.set_dare_adapter({"a": 0.5})
    model.disable_dare_adapters()
    assert shape_facts(model) == facts
    assert all_bytes(model) == before


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [99, 102, 128])
def test_a_vocabulary_that_the_user_resized_takes_the_added_rows(
    make_pack: PackMaker, tied: bool, rows: int
):
    pack = grown_pack(make_pack, tied)
    model = pack.live()
    model.resize_token_embeddings(rows, mean_resizing=False)
    before, facts = all_bytes(model), shape_facts(model)
    model.load_dare_adapter(pack.adapters["a"])
    finetuned = read_checkpoint(pack.finetuned["a"])
    for name, value in finetuned.items():
        live = dict(model.named_parameters())[name]
        assert torch.equal(live[: len(value)], value), name
    assert len(model.model.embed_tokens.weight) == max(rows, 102)
    model.disable_dare_adapters()
    assert shape_facts(model) == facts
    assert all_bytes(model) == before


def test_a_resized_t5_vocabulary_takes_an_adapter_of_the_smaller_one(make_pack: PackMaker):
    config = T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, pad_token_id=0
    )
    pack = make_pack("t5", T5ForConditionalGeneration, config, kinds={"a": EXACT})
    model = pack.live()
    model.resize_token_embeddings(64, mean_resizing=False)
    before = all_bytes(model)
    model.load_dare_adapter(pack.adapters["a"])
    finetuned = read_checkpoint(pack.finetuned["a"])
    assert torch.equal(model.shared.weight[:50], finetuned["shared.weight"])
    model.disable_dare_adapters()
    assert all_bytes(model) == before


def test_a_resized_vocabulary_is_no_obstacle_where_the_fine_tune_left_it_frozen(
    make_family: FamilyMaker, tmp_path: Path
):
    family = make_family()
    finetuned = LlamaForCausalLM.from_pretrained(family.finetuned, dtype="auto")
    base = read_checkpoint(family.base)
    with torch.no_grad():
        finetuned.model.embed_tokens.weight.copy_(base["model.embed_tokens.weight"])
        finetuned.lm_head.weight.copy_(base["lm_head.weight"])
    finetuned.save_pretrained(tmp_path / "frozen")
    dare_adapters.extract(
        family.base, tmp_path / "frozen", tmp_path / "adapter", progress=False, **EXACT
    )
    model = family.live()
    model.resize_token_embeddings(128, mean_resizing=False)
    model.load_dare_adapter(tmp_path / "adapter")
    other = LlamaForCausalLM(tiny_llama()).to(torch.bfloat16)
    other.resize_token_embeddings(128, mean_resizing=False)
    with pytest.raises(BaseMismatchError):
        other.load_dare_adapter(tmp_path / "adapter")


def test_a_failure_while_growing_restores_the_rows_that_were_there(
    make_pack: PackMaker, monkeypatch: pytest.MonkeyPatch
):
    pack = grown_pack(make_pack, tied=False)
    model = pack.live()
    model.resize_token_embeddings(99, mean_resizing=False)
    before, facts = all_bytes(model), shape_facts(model)
    model.load_dare_adapter(pack.adapters["a"], "a", activate=False)

    def no_memory(*_: object) -> None:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(vocabulary.torch, "cat", no_memory)
    with pytest.raises(RuntimeError, match="no more memory"):
        model.set_dare_adapter("a")
    monkeypatch.undo()
    assert all_bytes(model) == before
    assert shape_facts(model) == facts


def test_changes_of_one_parameter_must_agree_on_its_shape():
    model = LlamaForCausalLM(tiny_llama())
    target = locate_all(model)["model.embed_tokens.weight"]
    before = all_bytes(model)
    deltas = [WeightedDelta(DenseDelta(torch.ones(rows, 64))) for rows in (90, 97)]
    for order in (deltas, deltas[::-1]):
        with pytest.raises(ArchitectureMismatchError, match=r"embed_tokens\.weight"):
            Patch().apply(model, [Change("model.embed_tokens.weight", target, order)])
        assert all_bytes(model) == before


def test_backward_through_weights_that_changed_since_forward_raises(make_pack: PackMaker):
    pack = make_pack("plain")
    model = pack.live()
    for change in (
        lambda: model.load_dare_adapter(pack.adapters["a"], "a"),
        lambda: model.load_dare_adapter(pack.adapters["b"], "b"),
        model.disable_dare_adapters,
    ):
        loss = model(torch.arange(6).view(1, 6)).logits.float().sum()
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    model(torch.arange(6).view(1, 6)).logits.float().sum().backward()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: nn.Parameter(torch.empty_like(p, device="meta")), "meta"),
        (lambda p: nn.Parameter(p.detach().to(torch.int8), requires_grad=False), "int8"),
        (
            lambda p: nn.Parameter(
                torch.zeros(p.numel() // 2, 1, dtype=torch.uint8), requires_grad=False
            ),
            "uint8",
        ),
        (
            lambda p: nn.Parameter(p.detach().to(torch.float8_e4m3fn), requires_grad=False),
            "float8",
        ),
    ],
    ids=["meta", "int8", "packed 4 bit", "float8"],
)
def test_parameters_that_are_not_there_or_packed_are_refused_by_name(
    make_pack: PackMaker, spoil: Callable[[nn.Parameter], nn.Parameter], reason: str
):
    pack = make_pack("plain")
    model = pack.live()
    projection = model.model.layers[1].mlp.up_proj
    projection.weight = spoil(projection.weight)
    before = {n: b for n, b in named_bytes(model).items() if "up_proj" not in n}
    with pytest.raises(
        UnsupportedParameterError, match=rf"model\.layers\.1\.mlp\.up_proj\.weight .*{reason}"
    ):
        model.load_dare_adapter(pack.adapters["a"])
    assert model.dare_adapters == []
    assert {n: b for n, b in named_bytes(model).items() if "up_proj" not in n} == before


def named_bytes(model: PreTrainedModel) -> dict[str, bytes]:
    return {name: raw_bytes(p) for name, p in model.named_parameters() if not p.is_meta}


def test_a_parameter_that_is_offloaded_to_disk_is_refused_by_name(
    make_pack: PackMaker, tmp_path: Path
):
    pytest.importorskip("accelerate")
    pack = make_pack("plain")
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    model = LlamaForCausalLM.from_pretrained(
        pack.base, dtype="auto", device_map=device_map, offload_folder=tmp_path
    )
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    with pytest.raises(UnsupportedParameterError, match=r"model\.layers\.1\.\S+ .*meta"):
        model.load_dare_adapter(pack.adapters["a"])


def test_an_offloaded_parameter_that_the_adapter_leaves_alone_is_no_obstacle(
    make_family: FamilyMaker, tmp_path: Path
):
    family = make_family()
    finetuned = LlamaForCausalLM.from_pretrained(family.finetuned, dtype="auto")
    with torch.no_grad():
        frozen = read_checkpoint(family.base)["model.layers.1.mlp.up_proj.weight"]
        finetuned.model.layers[1].mlp.up_proj.weight.copy_(frozen)
    finetuned.save_pretrained(tmp_path / "frozen")
    dare_adapters.extract(family.base, tmp_path / "frozen", tmp_path / "adapter", progress=False)
    for spoilt in (
        nn.Parameter(torch.empty(136, 64, device="meta")),
        nn.Parameter(torch.zeros(136 * 32, 1, dtype=torch.uint8), requires_grad=False),
    ):
        model = family.live()
        model.model.layers[1].mlp.up_proj.weight = spoilt
        model.load_dare_adapter(tmp_path / "adapter")
        assert model.active_dare_adapters == ["adapter"]


def test_convolutions_in_channels_last_are_patched_and_restored(make_pack: PackMaker):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    kinds = {"a": EXACT, "b": {"drop_rate": 0.5, "bits": 4}, "c": {"drop_rate": 0.9, "bits": 8}}
    pack = make_pack("resnet", ResNetForImageClassification, config, kinds=kinds)
    plain, model = pack.live(), pack.live().to(memory_format=torch.channels_last)
    strides = {name: parameter.stride() for name, parameter in model.named_parameters()}
    before = all_bytes(model)
    for name, path in pack.adapters.items():
        plain.load_dare_adapter(path, name, activate=False)
        model.load_dare_adapter(path, name, activate=False)
    for chosen in ({"a": 1.0}, {"b": 1.0}, {"b": 0.5, "c": 2.0}):
        plain.set_dare_adapter(chosen)
        model.set_dare_adapter(chosen)
        assert all_bytes(model) == all_bytes(plain)
        assert {n: p.stride() for n, p in model.named_parameters()} == strides
        if chosen == {"a": 1.0}:
            assert_holds(model, read_weights(pack.finetuned["a"]))
    model.disable_dare_adapters()
    assert all_bytes(model) == before


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """A checkpoint without its statistics and counters, which no fine-tune here has moved."""
    found = read_checkpoint(directory)
    return {n: v for n, v in found.items() if not n.endswith(("_mean", "_var", "_tracked"))}


def test_fused_experts_are_patched_from_deltas_of_single_experts(make_pack: PackMaker):
    kinds = {"a": EXACT, "b": {"drop_rate": 0.75, "bits": 4}, "c": {"drop_rate": 0.5, "bits": 16}}
    pack = make_pack("mixtral", MixtralForCausalLM, mixtral_config(), kinds=kinds)
    model = pack.live()
    before = all_bytes(model)
    for name, path in pack.adapters.items():
        model.load_dare_adapter(path, name, activate=False)
    model.set_dare_adapter("a")
    finetuned = MixtralForCausalLM.from_pretrained(pack.finetuned["a"], dtype="auto")
    assert all_bytes(model) == all_bytes(finetuned)
    model.set_dare_adapter({"b": 1.0, "c": -0.5})
    parts = [(dense_deltas(pack, "b"), 1.0), (dense_deltas(pack, "c"), -0.5)]
    expected = expected_sum(read_checkpoint(pack.base), parts)
    merged = expected["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj[1, :48], merged)
    model.disable_dare_adapters()
    assert all_bytes(model) == before


def test_what_is_held_to_restore_is_counted_and_let_go(make_pack: PackMaker):
    pack = make_pack("plain")
    model = pack.live()
    model.load_dare_adapter(pack.adapters["a"], "a")
    held = model._dare_live_adapters.patch
    assert held
    whole = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    sparse = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert held.nbytes < 2 * (whole + 0.2 * sparse)  # bfloat16, a tenth of the matrices
    model.disable_dare_adapters()
    assert not held
    assert held.nbytes == 0


def test_a_value_of_another_shape_is_refused_before_anything_changes():
    model = LlamaForCausalLM(tiny_llama())
    table = locate_all(model)
    before = all_bytes(model)
    fine = Change("model.norm.weight", table["model.norm.weight"], value=torch.zeros(64))
    wrong = Change("lm_head.weight", table["lm_head.weight"], value=torch.zeros(5, 64))
    with pytest.raises(ArchitectureMismatchError, match="num_labels"):
        Patch().apply(model, [fine, wrong])
    assert all_bytes(model) == before


def test_a_replaced_value_comes_back(make_pack: PackMaker):
    model = make_pack("plain").live()
    table, before = locate_all(model), all_bytes(model)
    value = torch.randn(97, 64)
    patch = Patch()
    patch.apply(model, [Change("lm_head.weight", table["lm_head.weight"], value=value)])
    assert torch.equal(model.lm_head.weight, value.to(torch.bfloat16))
    patch.restore(model)
    assert all_bytes(model) == before


def test_positions_beyond_32_bits_are_kept_whole(monkeypatch: pytest.MonkeyPatch):
    model = LlamaForCausalLM(tiny_llama())
    table, before = locate_all(model), all_bytes(model)
    monkeypatch.setattr(patch_module, "_INT32_ENTRIES", 100)  # as though the matrix were huge
    delta = torch.zeros(97, 64)
    delta[::3] = 1
    name = "lm_head.weight"
    patch = Patch()
    patch.apply(model, [Change(name, table[name], [WeightedDelta(DenseDelta(delta))] * 2)])
    patch.restore(model)
    assert all_bytes(model) == before


def test_a_copy_of_a_patched_model_restores_itself_alone(make_pack: PackMaker):
    pack = make_pack("plain")
    model = pack.live()
    before = all_bytes(model)
    model.load_dare_adapter(pack.adapters["b"], "b")
    patched = all_bytes(model)
    other = copy.deepcopy(model)
    other.disable_dare_adapters()
    assert all_bytes(other) == before
    assert all_bytes(model) == patched


def random_delta(draw: st.DrawFn, shape: tuple[int, ...], number: int) -> WeightedDelta:
    """A dense or a sparse change of any parameter, values in float32."""
    rows, columns = matrix_shape(shape)
    name, seed = f"p{number}", draw(st.integers(0, (1 << 64) - 1))
    weight = draw(st.floats(-4, 4, width=32))
    generator = torch.Generator().manual_seed(number)
    kind = draw(st.sampled_from(["dense", "blocked", "bernoulli"]))
    if kind == "dense":
        return WeightedDelta(DenseDelta(torch.randn(shape, generator=generator)), weight)
    support = (
        BlockedSupport(seed, name, rows, columns, draw(st.integers(1, 9)))
        if kind == "blocked"
        else BernoulliSupport(seed, name, rows, columns, draw(st.floats(0, 0.99)))
    )
    values = torch.randn(support.slot_count, generator=generator)
    return WeightedDelta(SparseDelta(shape, support, 32, values), weight)


@st.composite
def random_change(draw: st.DrawFn) -> tuple[tuple[int, ...], list[WeightedDelta]]:
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    return shape, [random_delta(draw, shape, n) for n in range(draw(st.integers(1, 3)))]


@settings(max_examples=60, deadline=None)
@given(
    random_change(),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from([1, 7, 1 << 17]),
)
def test_any_changes_are_rounded_once_and_undone_bit_for_bit(
    change: tuple[tuple[int, ...], list[WeightedDelta]], dtype: torch.dtype, step: int
):
    shape, deltas = change
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(shape).to(dtype))
    target = LiveParameter("weight", shape, 0, torch.empty(shape).stride())
    parts = [({"weight": each.delta.dense()}, each.weight) for each in deltas]
    expected = expected_sum({"weight": module.weight.detach().clone()}, parts)["weight"]
    before = raw_bytes(module.weight)
    patch = Patch()
    with mock.patch.object(delta_module, "STEP_ENTRIES", step):  # ranges of few rows
        patch.apply(module, [Change("weight", target, deltas)])
        assert torch.equal(module.weight, expected)
        patch.restore(module)
        assert raw_bytes(module.weight) == before
        # Restoring moves bits, whatever they mean: NaN, infinity, negative zero.
        width = torch.int16 if dtype.itemsize == 2 else torch.int32
        limits = torch.iinfo(width)
        bits = torch.randint(limits.min, limits.max, (math.prod(shape),), dtype=width)
        module.weight.data = bits.view(dtype).view(shape)
        before = raw_bytes(module.weight)
        patch.apply(module, [Change("weight", target, deltas)])
        patch.restore(module)
    assert raw_bytes(module.weight) == before


@pytest.mark.parametrize("kind", ["plain", "grown"])
@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("detached", [True, False])
def test_inference_mode_around_some_of_the_calls_does_no_harm(
    make_pack: PackMaker, kind: str, attached: bool, detached: bool
):
    pack = grown_pack(make_pack, tied=False) if kind == "grown" else make_pack("plain")
    model = pack.live()
    before = all_bytes(model)
    with torch.inference_mode(attached):
        for name, path in pack.adapters.items():
            model.load_dare_adapter(path, name)
        model.set_dare_adapter(["a", "b"])
    with torch.inference_mode(detached):
        model.disable_dare_adapters()
    assert all_bytes(model) == before
    model.set_dare_adapter("a")
    model(torch.arange(6).view(1, 6)).logits.float().sum().backward()


def test_a_model_made_in_inference_mode_can_be_patched_outside_it(make_pack: PackMaker):
    pack = grown_pack(make_pack, tied=True)
    with torch.inference_mode():
        model = LlamaForCausalLM(tiny_llama(tie_word_embeddings=True)).to(torch.bfloat16)
        model.load_state_dict(pack.live().state_dict())
    assert model.lm_head.weight.is_inference()
    before = all_bytes(model)
    for name, path in pack.adapters.items():
        model.load_dare_adapter(path, name)
    model.set_dare_adapter(["a", "b"])
    model.disable_dare_adapters()
    assert all_bytes(model) == before
