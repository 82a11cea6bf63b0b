"""Checkpoint names find their place in the live model: compared with what transformers saves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    PermuteForRope,
    Transpose,
    WeightConverter,
)

from dare_adapters.errors import UnsupportedParameterError
from dare_adapters.live import LiveParameter, check_patchable, locate, locate_all, name_variants
from tests.conftest import read_checkpoint, tiny_llama

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {
    "vocab_size": 50,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "head_dim": 8,
    **SMALL,
}


def bert_config(**changes: object) -> BertConfig:
    return BertConfig(vocab_size=50, intermediate_size=48, **{**SMALL, **changes})


def mixtral_config() -> MixtralConfig:
    return MixtralConfig(num_local_experts=3, **EXPERTS)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertModel(bert_config()),
    "bert with a head": lambda: BertForSequenceClassification(bert_config(num_labels=3)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)),
    "gpt2 bare": lambda: GPT2Model(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)),
    "llama": lambda: LlamaForCausalLM(tiny_llama()),
    "llama bare": lambda: LlamaModel(tiny_llama()),
    "llama tied": lambda: LlamaForCausalLM(tiny_llama(tie_word_embeddings=True)),
    "mixtral": lambda: MixtralForCausalLM(mixtral_config()),
    "phi3": lambda: Phi3ForCausalLM(
        Phi3Config(vocab_size=50, intermediate_size=48, pad_token_id=0, **SMALL)
    ),
    "qwen3 moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24, **EXPERTS)
    ),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(image_size=16, patch_size=4, num_labels=3, intermediate_size=48, **SMALL)
    ),
}


def distinct(model: PreTrainedModel) -> PreTrainedModel:
    """Every parameter random: ones and zeros would hide that two were mixed up."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def saved(model: PreTrainedModel, directory: Path) -> dict[str, torch.Tensor]:
    """What transformers itself writes for a model."""
    model.save_pretrained(directory)
    return read_checkpoint(directory)


def read(model: PreTrainedModel, place: LiveParameter) -> torch.Tensor:
    view = place.view(model)
    return view.take(0, view.rows, None).view(place.shape)


def assert_maps(
    model: PreTrainedModel, checkpoint: dict[str, torch.Tensor], lacking: tuple[str, ...] = ()
) -> None:
    """Each entry of the checkpoint is found, whole and a range of rows at a time."""
    places = locate(model, checkpoint)
    assert {name for name, place in places.items() if place is None} == set(lacking)
    for name, place in places.items():
        if place is None:
            continue
        expected = checkpoint[name]
        assert place.shape == tuple(expected.shape), name
        assert torch.equal(read(model, place), expected), name
        view = place.view(model)
        middle = view.rows // 2
        flat = expected.reshape(view.rows, view.columns)
        assert torch.equal(view.take(middle, view.rows, None), flat[middle:].reshape(-1)), name
        index = torch.tensor([0, flat[middle:].numel() - 1])
        assert torch.equal(view.take(middle, view.rows, index), flat[middle:].reshape(-1)[index]), (
            name
        )


def assert_writes(model: PreTrainedModel, before: dict[str, torch.Tensor], directory: Path) -> None:
    """What is written through the views is what transformers then saves: no view is a copy."""
    written = {}
    for number, (name, place) in enumerate(locate(model, before).items()):
        assert place is not None
        if not before[name].is_floating_point():
            continue
        view = place.view(model)
        written[name] = torch.randn(place.shape, generator=torch.Generator().manual_seed(number))
        view.put(0, view.rows, None, written[name].reshape(-1))
    after = saved(model, directory)
    assert after.keys() == before.keys()
    for name, value in written.items():
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize("kind", MODELS)
def test_every_saved_name_is_a_window_on_the_value_that_was_saved(kind: str, tmp_path: Path):
    model = distinct(MODELS[kind]())
    checkpoint = saved(model, tmp_path / "one")
    assert_maps(model, checkpoint)
    assert_writes(model, checkpoint, tmp_path / "two")


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_read_from_disk_has_the_names_of_its_checkpoint(kind: str, tmp_path: Path):
    model = distinct(MODELS[kind]())
    checkpoint = saved(model, tmp_path)
    assert_maps(type(model).from_pretrained(tmp_path), checkpoint)


def test_experts_are_found_one_by_one_under_their_checkpoint_names(tmp_path: Path):
    model = distinct(MODELS["mixtral"]())
    checkpoint = saved(model, tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    assert name in checkpoint
    place = locate(model, [name])[name]
    assert place is not None
    assert place.owner == "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(read(model, place), model.model.layers[1].mlp.experts.gate_up_proj[2, 48:])


def test_a_bare_encoder_checkpoint_is_found_under_a_task_head(tmp_path: Path):
    checkpoint = saved(distinct(MODELS["bert"]()), tmp_path)
    assert "embeddings.word_embeddings.weight" in checkpoint
    model = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert_maps(model, checkpoint)


def test_a_bare_model_has_all_of_a_task_checkpoint_but_the_head(tmp_path: Path):
    checkpoint = saved(distinct(MODELS["bert with a head"]()), tmp_path)
    model = BertModel.from_pretrained(tmp_path)
    assert_maps(model, checkpoint, lacking=("classifier.weight", "classifier.bias"))


@pytest.mark.parametrize("bare", [True, False])
def test_gpt2_names_with_and_without_the_prefix_are_the_same_places(bare: bool, tmp_path: Path):
    saved(distinct(MODELS["gpt2"]()), tmp_path)
    model = (GPT2Model if bare else GPT2LMHeadModel).from_pretrained(tmp_path)
    found = locate(model, ["h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"])
    short, long = found.values()
    assert short == long
    assert short is not None
    assert short.shape == (32, 96)  # Conv1D: inputs first


def test_legacy_names_of_layer_norms_are_found(tmp_path: Path):
    saved(distinct(MODELS["bert"]()), tmp_path)
    file = tmp_path / "model.safetensors"
    legacy = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in load_file(file).items()
    }
    assert any(name.endswith("LayerNorm.gamma") for name in legacy)
    save_file(legacy, file, {"format": "pt"})
    assert_maps(BertModel.from_pretrained(tmp_path), legacy)
    assert_maps(BertForSequenceClassification.from_pretrained(tmp_path), legacy)


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_still_shows_the_rows_of_the_checkpoint(tied: bool, tmp_path: Path):
    model = distinct(LlamaForCausalLM(tiny_llama(tie_word_embeddings=tied)))
    checkpoint = saved(model, tmp_path)
    model.resize_token_embeddings(104, mean_resizing=False)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name not in checkpoint:
            continue
        place = locate(model, [name])[name]
        assert place is not None
        assert place.shape == (104, 64)
        view = place.view(model, (97, 64))
        assert torch.equal(view.take(0, 97, None).view(97, 64), checkpoint[name])


def test_tied_weights_are_one_region_and_others_are_not():
    tied, free = MODELS["llama tied"](), MODELS["llama"]()
    for model, same in ((tied, True), (free, False)):
        table = locate_all(model)
        embedding, head = table["model.embed_tokens.weight"], table["lm_head.weight"]
        assert (embedding.region(model) == head.region(model)) is same
    for model in (free, MODELS["mixtral"](), interleaved(), rotated()):
        table = locate_all(model)
        assert len({place.region(model) for place in table.values()}) == len(table)


def rotated() -> PreTrainedModel:
    """A Llama whose checkpoint has queries and keys in Meta's order of rotary pairs."""
    model = LlamaForCausalLM(tiny_llama(num_key_value_heads=4))
    model._weight_conversions = [
        WeightConverter(
            rf"self_attn.w{letter}.weight",
            rf"self_attn.{letter}_proj.weight",
            [PermuteForRope(permute_layer_names=[f"w{letter}", f"{letter}_proj"])],
        )
        for letter in "qk"
    ]
    return model


def interleaved() -> PreTrainedModel:
    """A Phi-3 whose checkpoint has gate and up projections apart, their rows taking turns here."""
    model = MODELS["phi3"]()
    model._weight_conversions = [
        WeightConverter(
            ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            "mlp.gate_up_proj.weight",
            [Concatenate(dim=0), Interleave(dim=0, inverse=True)],
        )
    ]
    return model


def transposed() -> PreTrainedModel:
    model = MODELS["llama"]()
    model._weight_conversions = [
        WeightConverter("mlp.down.kernel", "mlp.down_proj.weight", [Transpose(0, 1)])
    ]
    return model


@pytest.mark.parametrize("make", [rotated, interleaved, transposed])
def test_conversions_that_reorder_entries_are_followed(
    make: Callable[[], PreTrainedModel], tmp_path: Path
):
    model = distinct(make())
    checkpoint = saved(model, tmp_path / "one")
    plain = distinct(MODELS["phi3"]()) if make is interleaved else model
    assert checkpoint.keys() != dict(plain.named_parameters()).keys()
    assert_maps(model, checkpoint)
    assert_writes(model, checkpoint, tmp_path / "two")


def test_only_what_no_strides_describe_is_kept_as_positions():
    places = locate_all(rotated())
    if "self_attn.q_proj.weight" in places:
        pytest.skip("this transformers loses the layer's name when it undoes PermuteForRope alone")
    by_position = {name for name, place in places.items() if place.positions is not None}
    assert by_position == {
        f"model.layers.{layer}.self_attn.{kind}.weight" for layer in (0, 1) for kind in ("wq", "wk")
    }


def test_a_checkpoint_parameter_made_of_several_live_ones_has_no_place(tmp_path: Path):
    model = distinct(LlamaForCausalLM(tiny_llama(num_key_value_heads=4)))
    model._weight_conversions = [
        WeightConverter(
            "self_attn.qkv.weight",
            ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
            [Chunk(dim=0)],
        )
    ]
    fused = tuple(f"model.layers.{layer}.self_attn.qkv.weight" for layer in (0, 1))
    assert_maps(model, saved(model, tmp_path), lacking=fused)


def test_locating_leaves_the_model_as_it_was():
    model = distinct(MODELS["mixtral"]())
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    locate_all(model)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_convolutions_in_channels_last_are_read_and_written_in_their_own_order(
    kind: str, tmp_path: Path
):
    model = distinct(MODELS[kind]())
    checkpoint = saved(model, tmp_path / "one")
    model.to(memory_format=torch.channels_last)
    assert any(not parameter.is_contiguous() for parameter in model.parameters())
    assert_maps(model, checkpoint)
    assert_writes(model, checkpoint, tmp_path / "two")


@given(st.data())
def test_a_window_with_any_strides_reads_like_the_view_it_stands_for(data: st.DataObject):
    owner_shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(owner_shape))
    window = module.weight.detach().permute(data.draw(st.permutations(range(len(owner_shape)))))
    for dim in range(window.dim()):
        start = data.draw(st.integers(0, window.shape[dim] - 1))
        window = window.narrow(dim, start, data.draw(st.integers(1, window.shape[dim] - start)))
    place = LiveParameter(
        "weight", tuple(window.shape), window.storage_offset(), tuple(window.stride())
    )
    try:
        view = place.view(module)
    except UnsupportedParameterError:
        return
    assert view.rows * view.columns == math.prod(window.shape)
    assert torch.equal(view.take(0, view.rows, None), window.reshape(-1))
    expected = torch.randn(window.shape)
    view.put(0, view.rows, None, expected.reshape(-1))
    assert torch.equal(window, expected)


@given(st.from_regex(r"[a-z]{1,4}(\.[a-z0-9]{1,4}){0,3}(\.gamma|\.beta)?", fullmatch=True))
def test_name_variants_begin_with_the_name_and_never_repeat(name: str):
    variants = name_variants(name, "bert")
    assert variants[0] == name
    assert len(set(variants)) == len(variants)
    assert name_variants(name, "")[0] == name


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.empty(2, device="meta"), "meta"),
        (torch.zeros(2, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, dtype=torch.int8), "int8"),
        (torch.zeros(2, dtype=torch.float8_e4m3fn), "float8"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.zeros(2).as_subclass(type("Packed", (torch.Tensor,), {})), "Packed"),
    ],
)
def test_what_is_not_a_plain_float_parameter_is_refused_by_name(tensor: torch.Tensor, reason: str):
    with pytest.raises(UnsupportedParameterError, match=rf"layer\.weight .*{reason}"):
        check_patchable("layer.weight", tensor)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_plain_float_parameters_are_accepted(dtype: torch.dtype):
    check_patchable("layer.weight", nn.Parameter(torch.zeros(2, dtype=dtype)))
    check_patchable("layer.buffer", torch.zeros(2, dtype=dtype))
