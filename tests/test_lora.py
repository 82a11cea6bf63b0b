"""What PEFT saved of a LoRA is a source of PEFT's own deltas; what is not is refused by name."""

from __future__ import annotations

import copy
import json
import pickle
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from dare_adapters.adapter import Adapter
from dare_adapters.delta import STEP_ENTRIES, Delta, NewParameter, WeightedDelta
from dare_adapters.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    UnsupportedParameterError,
)
from dare_adapters.live import locate
from dare_adapters.lora import LoraAdapter, LowRankDelta
from dare_adapters.module_pattern import ModulePattern, name_matcher
from dare_adapters.open_source import open_source
from dare_adapters.row_sums import apply_rows
from tests.conftest import tiny_llama
from tests.golden.make_golden import GOLDEN

peft = pytest.importorskip("peft")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Json = dict[str, Any]


# --- models, and what PEFT makes of them


class Convolutions(nn.Module):
    """One convolution of each number of dimensions, a point-wise one, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.sound = nn.Conv1d(6, 10, 3)
        self.image = nn.Conv2d(4, 130, (3, 5))
        self.points = nn.Conv2d(4, 9, 1)
        self.video = nn.Conv3d(3, 8, (2, 3, 4))
        self.head = nn.Linear(7, 5)


class Attention(nn.Module):
    """torch's own attention, whose input projection has no module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2) for _ in range(2))


def llama(**changes: object) -> PreTrainedModel:
    return LlamaForCausalLM(tiny_llama(**changes))


def gpt2() -> PreTrainedModel:
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=16, **tokens)
    )


def bert() -> PreTrainedModel:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=97, intermediate_size=48, max_position_embeddings=24, **small)
    )


def vit() -> PreTrainedModel:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTModel(ViTConfig(intermediate_size=48, image_size=32, patch_size=8, **small))


def mixtral() -> PreTrainedModel:
    small = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, **small
        )
    )


def adapted(model: nn.Module, **options: Any) -> Any:
    """The model with a LoRA of random factors."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, **options}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return wrapped


def saved(wrapped: Any, directory: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(directory)
    return directory


def deltas_of(wrapped: Any) -> dict[str, torch.Tensor]:
    """What PEFT itself says that each parameter changes by."""
    found = {}
    for path, module in wrapped.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and module.r:
            name = path.removeprefix(PREFIX).replace(".base_layer.", ".")
            leaf = "weight"
            if isinstance(module, peft.tuners.lora.layer.MultiheadAttention):
                leaf = "in_proj_weight"
            found[f"{name}.{leaf}"] = module.get_delta_weight("default").detach()
    return found


EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[Callable[[], nn.Module], Json]] = {
    "llama": (llama, {"target_modules": EVERYTHING, "lora_alpha": 7}),
    "llama with embeddings and head": (
        llama,
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ),
    "llama, rsLoRA with patterns": (
        llama,
        {
            "target_modules": EVERYTHING,
            "use_rslora": True,
            "rank_pattern": {"down_proj": 5, "layers.1.self_attn.q_proj": 2, r".*\.[kv]_proj": 4},
            "alpha_pattern": {r"^model\.layers\.\d+\.mlp\.(up|gate)_proj": 16, "o_proj": 1},
        },
    ),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2 with embeddings": (gpt2, {"target_modules": ["c_attn", "c_proj", "wte", "wpe"]}),
    "bert": (bert, {"target_modules": ["query", "dense", "word_embeddings"]}),
    "vit": (vit, {"target_modules": ["projection", "query", "q_proj", "dense"]}),
    "convolutions": (
        Convolutions,
        {"target_modules": ["sound", "image", "points", "video", "head"], "use_rslora": True},
    ),
    "attention": (
        Attention,
        {"target_modules": ["layers.0", "layers.1"], "alpha_pattern": {"layers.1": 3}},
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A model with a LoRA, and the directory that PEFT saved it in."""
    make, options = CASES[request.param]
    torch.manual_seed(0)
    wrapped = adapted(make(), **options)
    return wrapped, saved(wrapped, tmp_path / "lora")


# --- deltas


def test_deltas_are_those_of_peft(case):
    wrapped, directory = case
    expected = deltas_of(wrapped)
    adapter = LoraAdapter.open(directory)
    assert sorted(adapter) == sorted(expected)
    for name, delta in adapter.items():
        assert isinstance(delta, Delta)
        assert delta.shape == tuple(expected[name].shape)
        assert torch.allclose(delta.dense(), expected[name], rtol=1e-6, atol=1e-6)
        assert float(expected[name].abs().max()) > 0.1


def test_rows_have_the_same_bits_however_they_are_asked_for(case):
    _, directory = case
    for delta in LoraAdapter.open(directory).values():
        index, whole = delta.read(0, delta.rows)
        assert index is None
        assert torch.equal(whole, delta.dense().reshape(-1))
        for start, stop in [(0, 1), (1, delta.rows), (delta.rows // 3, delta.rows // 2), (1, 1)]:
            index, part = delta.read(start, stop)
            assert index is None
            assert torch.equal(part, whole[start * delta.columns : stop * delta.columns])


def test_rows_of_several_blocks_have_the_same_bits_too():
    torch.manual_seed(0)
    b, a = torch.randn(700, 4), torch.randn(4, 1000)
    for delta in (LowRankDelta(b, a, 0.5), LowRankDelta(a.T, b.T, 0.5, transposed=True)):
        assert delta.rows * delta.columns > 2 * STEP_ENTRIES
        whole = delta.read(0, 700)[1].view(700, 1000)
        assert torch.allclose(whole, 0.5 * b @ a, rtol=1e-5, atol=1e-5)
        for start in range(0, 700, 97):
            part = delta.read(start, min(start + 97, 700))[1]
            assert torch.equal(part, whole[start : start + 97].reshape(-1))
        whole.zero_()  # the caller's own
        assert delta.read(5, 6)[1].abs().max() > 0


def test_reading_some_rows_does_not_make_the_whole_delta():
    delta = LowRankDelta(torch.ones(1 << 20, 1), torch.ones(1, 1 << 20), 2.0)  # 4 TiB
    assert delta.read(1 << 19, (1 << 19) + 2)[1].tolist()[:3] == [2.0, 2.0, 2.0]
    assert next(delta.row_ranges()) == (0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_of_any_float_dtype_make_a_float32_delta(tmp_path, dtype):
    wrapped = adapted(llama(), target_modules=["q_proj"], lora_alpha=5)
    save_dtype(saved(wrapped, tmp_path), dtype)
    stored = load_file(tmp_path / TENSORS)
    for name, delta in LoraAdapter.open(tmp_path).items():
        module = PREFIX + name.removesuffix(".weight")
        b, a = (stored[f"{module}.lora_{part}.weight"].double() for part in "BA")
        dense = delta.dense()
        assert dense.dtype == torch.float32
        assert torch.allclose(dense.double(), 5 / 3 * b @ a, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (llama, {"target_modules": EVERYTHING}),
        (gpt2, {"target_modules": ["c_attn", "c_proj"], "lora_bias": True}),
        (vit, {"target_modules": ["projection"], "lora_bias": True}),
    ],
)
def test_base_and_deltas_are_what_peft_merges(tmp_path, make, options):
    torch.manual_seed(0)
    base = make()
    wrapped = adapted(copy.deepcopy(base), **options)
    adapter = LoraAdapter.open(saved(wrapped, tmp_path))
    for name, place in locate(base, adapter).items():
        assert place is not None
        delta = adapter[name]
        assert isinstance(delta, Delta)
        for start, stop in delta.row_ranges():
            apply_rows(place.view(base), [WeightedDelta(delta)], start, stop)
    merged = wrapped.merge_and_unload().state_dict()
    changed = base.state_dict()
    assert changed.keys() == merged.keys()
    for name, value in merged.items():
        assert torch.allclose(changed[name], value, rtol=1e-6, atol=1e-6)


def test_a_bias_of_lora_b_is_a_delta(tmp_path):
    wrapped = adapted(bert(), target_modules=["query"], lora_bias=True, lora_alpha=6)
    adapter = LoraAdapter.open(saved(wrapped, tmp_path))
    name = "bert.encoder.layer.1.attention.self.query"
    layer = wrapped.get_submodule(PREFIX + name)
    assert torch.allclose(adapter[f"{name}.bias"].dense(), layer.lora_B["default"].bias * 2)
    assert not adapter.is_new(f"{name}.bias")


# --- what is saved whole


def test_modules_to_save_are_whole_values(tmp_path):
    wrapped = adapted(bert(), target_modules=["query"], modules_to_save=["classifier"])
    with torch.no_grad():
        wrapped.base_model.model.classifier.modules_to_save["default"].weight.fill_(3)
    adapter = LoraAdapter.open(saved(wrapped, tmp_path))
    head = adapter["classifier.weight"]
    assert isinstance(head, NewParameter)
    assert head.value.unique().tolist() == [3]
    assert {n for n in adapter if adapter.is_new(n)} == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_whole_values(tmp_path, bias):
    wrapped = adapted(bert(), target_modules=["query"], bias=bias)
    adapter = LoraAdapter.open(saved(wrapped, tmp_path))
    layer = "bert.encoder.layer.0.attention"
    value = adapter[f"{layer}.self.query.bias"]
    assert isinstance(value, NewParameter)
    assert value.shape == (32,)
    assert (f"{layer}.output.LayerNorm.bias" in adapter) == (bias == "all")
    assert all(adapter.is_new(name) == name.endswith(".bias") for name in adapter)


def test_biases_of_modules_to_save_are_there_once(tmp_path):
    wrapped = adapted(
        bert(), target_modules=["query"], bias="all", modules_to_save=["classifier", "pooler"]
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.fill_(7)
    adapter = LoraAdapter.open(saved(wrapped, tmp_path))
    whole = {n for n in adapter if "classifier" in n or "pooler" in n}
    heads = ("classifier", "bert.pooler.dense")
    assert whole == {f"{head}.{leaf}" for head in heads for leaf in ("weight", "bias")}
    assert all(adapter[name].value.unique().tolist() == [7] for name in whole)


def test_the_copy_of_the_base_beside_an_embedding_is_no_delta(tmp_path):
    base = llama()
    values = base.model.embed_tokens.weight.detach().clone()
    adapter = LoraAdapter.open(saved(adapted(base, target_modules=["embed_tokens"]), tmp_path))
    assert list(adapter) == ["model.embed_tokens.weight"] == list(adapter.base_copies)
    assert torch.equal(adapter.base_copy("model.embed_tokens.weight"), values)


def test_a_resized_embedding_is_a_whole_value(tmp_path):
    wrapped = adapted(llama(), target_modules=["q_proj"])
    wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    adapter = LoraAdapter.open(tmp_path)
    assert adapter.is_new("model.embed_tokens.weight")
    assert adapter.is_new("lm_head.weight")


# --- the source itself


def test_it_tells_what_it_is_of_and_depends_on_its_tensors_alone(tmp_path):
    wrapped = adapted(llama(), target_modules=["q_proj"])
    wrapped.peft_config["default"].base_model_name_or_path = "some/base"
    wrapped.peft_config["default"].revision = "v2"
    adapter = LoraAdapter.from_pretrained(saved(wrapped, tmp_path))
    assert (adapter.base_model_name_or_path, adapter.revision) == ("some/base", "v2")
    assert (adapter.base_architectures, dict(adapter.witness)) == ([], {})
    assert adapter.mask_seed(1) != adapter.mask_seed(2)
    edit(tmp_path, lambda config: config.update(task_type=None))
    assert LoraAdapter.open(tmp_path).identity == adapter.identity
    assert adapter.nbytes > 0
    assert "some/base" in repr(adapter)


def test_it_is_copied_and_pickled_as_its_directory(tmp_path):
    adapter = LoraAdapter.open(
        saved(adapted(gpt2(), target_modules=["c_proj"]), tmp_path), fan_in_fan_out=False
    )
    assert copy.deepcopy(adapter) is adapter
    again = pickle.loads(pickle.dumps(adapter))
    for name, delta in adapter.items():
        assert torch.equal(again[name].dense(), delta.dense())


def test_open_source_opens_each_kind(tmp_path):
    lora = saved(adapted(llama(), target_modules=["q_proj"]), tmp_path / "lora")
    assert isinstance(open_source(lora), LoraAdapter)
    assert isinstance(open_source(str(GOLDEN / "adapter_v1")), Adapter)
    for kind in ("LOHA", None, ["LORA"]):
        edit(lora, lambda config, kind=kind: config.update(peft_type=kind))
        with pytest.raises(AdapterFormatError, match=r"peft_type is .*DARE, LORA"):
            open_source(lora)
    with pytest.raises(AdapterNotFoundError):
        open_source(tmp_path / "nothing")
    with pytest.raises(AdapterNotFoundError, match="not an adapter"):
        open_source(tmp_path)


# --- Conv1D beside Linear


def test_a_head_beside_conv1d_is_refused_until_somebody_says_what_the_blocks_are(tmp_path):
    wrapped = adapted(gpt2(), target_modules=["c_attn", "c_proj", "lm_head"])
    expected = deltas_of(wrapped)
    directory = saved(wrapped, tmp_path)
    with pytest.raises(AdapterFormatError, match="fan_in_fan_out"):
        LoraAdapter.open(directory)
    plain = LoraAdapter.open(directory, fan_in_fan_out=False)
    assert plain["transformer.h.0.attn.c_attn.weight"].shape == (96, 32)
    told = LoraAdapter.open(directory, fan_in_fan_out=True)
    edit(directory, lambda config: config.update(fan_in_fan_out=True))
    for adapter in (told, LoraAdapter.open(directory)):
        for name, delta in adapter.items():
            assert torch.allclose(delta.dense(), expected[name], rtol=1e-6, atol=1e-6)


def test_a_convolution_beside_conv1d_is_not_transposed(tmp_path):
    wrapped = adapted(Convolutions(), target_modules=["image", "head"])
    directory = saved(wrapped, tmp_path)
    adapter = LoraAdapter.open(directory, fan_in_fan_out=True)
    assert adapter["image.weight"].shape == (130, 4, 3, 5)
    assert adapter["head.weight"].shape == (7, 5)


# --- patterns


PIECES = ["a", "b", ".", r"\.", r"\d", "1", "[ab]", "[^.]", "(a|b)", "(?:a1)?", "^", "$", "a|b"]
SIGNS = ["", "", "*", "+", "?", "{2}", "{1,}", "{,2}", "*?"]


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(SIGNS)), max_size=6),
    group=st.booleans(),
    name=st.text("ab1.", max_size=12),
)
def test_patterns_match_what_pefts_regular_expressions_match(pieces, group, name):
    parts = [p + ("" if p in ("^", "$", "a|b") or "?" in p[-1:] else sign) for p, sign in pieces]
    pattern = f"({''.join(parts)})+" if group else "".join(parts)
    expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
    assert ModulePattern(pattern).matches(name) == expected
    assert name_matcher(pattern)(name) == expected


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "(.*)*b", ".*" * 40 + "b", "((a?){99}){99}"]
)
def test_a_pattern_that_would_take_forever_does_not(pattern):
    started = time.perf_counter()
    assert not name_matcher(pattern)("a" * 200 + "c")
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    "pattern",
    ["(", ")", "a)|(b", "[a", "*", "a**", r"(a)\1", "(?=a)", "(?i)a", "\\", "(" * 99, "[b-a]+"],
)
def test_a_pattern_that_is_not_read_is_refused_by_name(tmp_path, pattern):
    directory = saved(adapted(llama(), target_modules=["q_proj"]), tmp_path)
    edit(directory, lambda config: config.update(alpha_pattern={pattern: 2}))
    with pytest.raises(AdapterFormatError, match=r"alpha_pattern.*pattern"):
        LoraAdapter.open(directory)


# --- refusals


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA of one projection in each of two layers."""
    return saved(adapted(llama(), target_modules=["q_proj"]), tmp_path / "lora")


FIRST = f"{PREFIX}model.layers.0.self_attn.q_proj"


def edit(directory: Path, change: Callable[[Json], object]) -> None:
    config = json.loads((directory / CONFIG).read_text())
    change(config)
    (directory / CONFIG).write_text(json.dumps(config))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {key: value.clone() for key, value in load_file(directory / TENSORS).items()}
    change(tensors)
    save_file(tensors, directory / TENSORS)


def save_dtype(directory: Path, dtype: torch.dtype) -> None:
    rewrite(directory, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (llama, {"target_modules": ["q_proj"], "use_dora": True}, "DoRA"),
        (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "token_indices"),
        (mixtral, {"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        (
            llama,
            {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
            "'pissa'.*conversion",
        ),
        (
            llama,
            {"target_modules": ["q_proj"], "init_lora_weights": "olora"},
            "'olora'.*conversion",
        ),
        (llama, {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}, "repeats"),
    ],
)
def test_what_is_no_change_of_the_base_is_refused_by_its_name(tmp_path, make, options, match):
    directory = saved(adapted(make(), **options), tmp_path)
    with pytest.raises(UnsupportedParameterError, match=match):
        LoraAdapter.open(directory)


def test_dora_and_the_like_are_known_by_their_tensors_too(tmp_path):
    for options, key in (
        ({"use_dora": True}, "use_dora"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ):
        directory = saved(adapted(llama(), target_modules=["q_proj"], **options), tmp_path / key)
        edit(directory, lambda config, key=key: config.pop(key))
        with pytest.raises(UnsupportedParameterError):
            LoraAdapter.open(directory)


def test_pissa_that_peft_converted_is_plain_lora(tmp_path):
    torch.manual_seed(0)
    base = llama()
    original = base.state_dict()["model.layers.0.self_attn.q_proj.weight"].clone()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    wrapped = peft.get_peft_model(base, config)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "initial")
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "initial"
    )
    delta = LoraAdapter.open(tmp_path / "converted")["model.layers.0.self_attn.q_proj.weight"]
    merged = wrapped.merge_and_unload().state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(original + delta.dense(), merged, atol=1e-5)


def test_a_convolution_in_groups_is_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    directory = saved(adapted(model, r=4, target_modules=["0"]), tmp_path)
    with pytest.raises(UnsupportedParameterError, match="2 groups"):
        LoraAdapter.open(directory)


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "DARE"},
        {"peft_type": None},
        {"r": 4},
        {"r": 0},
        {"r": "3"},
        {"r": True},
        {"r": 10**400},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": "1"},
        {"lora_alpha": 10**400},
        {"rank_pattern": {"q_proj": 2}},
        {"rank_pattern": {"q_proj": [2]}},
        {"rank_pattern": ["q_proj"]},
        {"alpha_pattern": {"q_proj": "x"}},
        {"use_rslora": 1},
        {"fan_in_fan_out": "yes"},
        {"base_model_name_or_path": 3},
        {"init_lora_weights": {}},
        {"modules_to_save": "head"},
    ],
)
def test_a_config_that_peft_would_not_write_is_refused(lora, change):
    edit(lora, lambda config: config.update(change))
    with pytest.raises(AdapterFormatError, match=next(iter(change)).split("_")[0]) as caught:
        LoraAdapter.open(lora)
    assert len(str(caught.value)) < 1000


def test_an_initialisation_that_nobody_knows_is_refused(lora):
    edit(lora, lambda config: config.update(init_lora_weights="new"))
    with pytest.raises(UnsupportedParameterError, match="'new'"):
        LoraAdapter.open(lora)


TAMPERED: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "no partner": lambda t: t.pop(f"{FIRST}.lora_A.weight"),
    "other rank": lambda t: t.update({f"{FIRST}.lora_A.weight": torch.zeros(2, 64)}),
    "partner of other rank": lambda t: t.update({f"{FIRST}.lora_B.weight": torch.zeros(64, 4)}),
    "one dimension": lambda t: t.update({f"{FIRST}.lora_A.weight": torch.zeros(3)}),
    "three dimensions": lambda t: t.update({f"{FIRST}.lora_A.weight": torch.zeros(3, 64, 1)}),
    "empty": lambda t: t.update({f"{FIRST}.lora_A.weight": torch.zeros(3, 0)}),
    "integers": lambda t: t.update({f"{FIRST}.lora_A.weight": torch.zeros(3, 64).int()}),
    "eight bits": lambda t: t.update(
        {f"{FIRST}.lora_A.weight": torch.zeros(3, 64).to(torch.float8_e4m3fn)}
    ),
    "nan": lambda t: t[f"{FIRST}.lora_A.weight"][1, 2].fill_(float("nan")),
    "infinity": lambda t: t[f"{FIRST}.lora_B.weight"][1, 2].fill_(float("inf")),
    "beyond float32": lambda t: [value.fill_(1e25) for value in t.values()],
    "beyond float32 before scaling": lambda t: t.update(
        {
            f"{FIRST}.lora_A.weight": torch.full((3, 64), 1e300, dtype=torch.float64),
            f"{FIRST}.lora_B.weight": torch.full((64, 3), 1e-300, dtype=torch.float64),
        }
    ),
    "no prefix": lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
    "an adapter's name": lambda t: t.update({f"{FIRST}.lora_A.default.weight": torch.zeros(3)}),
    "modules_to_save": lambda t: t.update(
        {f"{PREFIX}head.modules_to_save.default.weight": torch.zeros(3)}
    ),
    "unknown part": lambda t: t.update({f"{FIRST}.lora_C.weight": torch.zeros(3)}),
    "unwanted bias": lambda t: t.update({f"{FIRST}.lora_B.bias": torch.zeros(64)}),
    "two kinds": lambda t: t.update({f"{FIRST}.lora_embedding_A": torch.zeros(3, 64)}),
    "copy of another shape": lambda t: t.update({f"{FIRST}.base_layer.weight": torch.zeros(3)}),
    "copy of nothing": lambda t: t.update({f"{PREFIX}norm.base_layer.weight": torch.zeros(3)}),
    "quantised copy": lambda t: t.update({f"{FIRST}.base_layer.weight.absmax": torch.zeros(3)}),
    "not printable": lambda t: t.update({f"{PREFIX}a\nb.weight": torch.zeros(3)}),
    "long": lambda t: t.update({f"{PREFIX}{'a' * 9999}.weight": torch.zeros(3)}),
    "nothing": lambda t: t.clear(),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_tensors_that_do_not_fit_are_refused(lora, kind):
    rewrite(lora, TAMPERED[kind])
    with pytest.raises(AdapterFormatError) as caught:
        LoraAdapter.open(lora)
    assert len(str(caught.value)) < 1500


def test_a_factor_pair_beyond_any_model_is_refused(lora):
    size = (1 << 20) + 1
    edit(lora, lambda config: config.update(r=1))
    parts = {"A": torch.zeros(1, size), "B": torch.zeros(size, 1)}
    save_file({f"{FIRST}.lora_{k}.weight": v for k, v in parts.items()}, lora / TENSORS)
    with pytest.raises(AdapterFormatError, match="entries"):
        LoraAdapter.open(lora)


def test_a_layer_of_modules_to_save_with_factors_is_refused(lora):
    edit(lora, lambda config: config.update(modules_to_save=["q_proj"]))
    rewrite(lora, lambda t: t.update({f"{FIRST}.weight": torch.zeros(64, 64)}))
    with pytest.raises(AdapterFormatError, match="modules_to_save"):
        LoraAdapter.open(lora)


def test_nested_factors_are_refused(lora):
    def nest(tensors: dict[str, torch.Tensor]) -> None:
        for part in "AB":
            value = tensors[f"{FIRST}.lora_{part}.weight"].clone()
            tensors[f"{FIRST}.base_layer.lora_{part}.weight"] = value

    rewrite(lora, nest)
    with pytest.raises(UnsupportedParameterError, match="target_parameters"):
        LoraAdapter.open(lora)


def test_pickled_weights_are_not_read(lora):
    (lora / TENSORS).unlink()
    with pytest.raises(AdapterNotFoundError, match=TENSORS):
        LoraAdapter.open(lora)
    (lora / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(AdapterFormatError, match=r"pickled.*save_pretrained"):
        LoraAdapter.open(lora)


def test_damaged_files_are_refused(lora):
    whole = (lora / TENSORS).read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], whole + b"x"):
        (lora / TENSORS).write_bytes(damaged)
        with pytest.raises(AdapterFormatError, match="safetensors"):
            LoraAdapter.open(lora)
    (lora / CONFIG).write_text("[]")
    with pytest.raises(AdapterFormatError, match="JSON"):
        LoraAdapter.open(lora)
    (lora / CONFIG).unlink()
    with pytest.raises(AdapterNotFoundError, match="not an adapter"):
        LoraAdapter.open(lora)
