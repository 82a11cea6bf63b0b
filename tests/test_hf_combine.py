"""Adapters of a live model combined by every method: the numbers, the base's bits, the memory."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    MixtralForCausalLM,
    PreTrainedModel,
)

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.combine import registry
from dare_adapters.combine.registry import get_method, parameter_method
from dare_adapters.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    BaseMismatchError,
    CombinationError,
    UnusedParametersWarning,
)
from tests.combine.test_api import (
    METHODS,
    PARAMETER_METHODS,
    WEIGHTS,
    dense,
    dense_reference,
    small_llama,
)
from tests.conftest import Pack, PackMaker, all_bytes, read_checkpoint
from tests.test_live import bert_config, mixtral_config
from tests.test_patch import EXACT, assert_holds, expected_sum, grown_pack

Tensors = dict[str, torch.Tensor]
# One of each kind: sums, elections, masks, thresholds of the whole model, whole parameters.
SOME: dict[str, dict[str, Any]] = {
    "linear": {},
    "ties": {"density": 0.4, "trim_scope": "model"},
    "dare_ties": {"density": 0.5},
    "sce": {"select_topk": 0.5},
    "slerp": {"t": 0.3},
    "model_stock": {},
    "karcher": {},
}


@pytest.fixture
def pack(make_pack: PackMaker) -> Pack:
    return make_pack("combine", config=small_llama(), dtype=torch.float32)


def bert_pack(make_pack: PackMaker) -> Pack:
    config = bert_config(num_labels=3)
    return make_pack("combine-bert", BertForSequenceClassification, config, dtype=torch.float32)


def tied_pack(make_pack: PackMaker) -> Pack:
    config = small_llama()
    config.tie_word_embeddings = True
    return make_pack("combine-tied", config=config, dtype=torch.float32)


_models: dict[Path, PreTrainedModel] = {}
_references: dict[str, Tensors] = {}


def loaded(pack: Pack) -> PreTrainedModel:
    """The base with all adapters loaded, none active; a copy, which is quicker than loading."""
    if pack.base not in _models:
        model = _models[pack.base] = pack.live()
        for name, path in pack.adapters.items():
            model.load_dare_adapter(path, name, activate=False)
    return copy.deepcopy(_models[pack.base])


def reference(
    pack: Pack, names: str, weights: Sequence[float], kind: str, options: dict[str, Any]
) -> Tensors:
    """`dense_reference`, computed once a session."""
    key = repr((pack.base, names, tuple(map(float, weights)), kind, options))
    if key not in _references:
        _references[key] = dense_reference(pack, names, weights, kind, options)
    return _references[key]


def nbytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def assert_near(model: PreTrainedModel, expected: Tensors, tolerance: float = 1e-6) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, rtol=0, atol=tolerance)


def changed(base: Tensors, deltas: Tensors) -> Tensors:
    return {name: value + deltas[name] for name, value in base.items()}


# --- the numbers


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


# --- the base


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


# --- combinations of combinations


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


# --- names


@pytest.fixture
def encoders(tmp_path: Path) -> dict[str, Path]:
    """Adapters of one BERT: of the bare encoder, and of the model with a head."""
    torch.manual_seed(0)
    whole = BertForSequenceClassification(bert_config(num_labels=3)).float()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(std=0.02)
    whole.save_pretrained(tmp_path / "task-base")
    whole.bert.save_pretrained(tmp_path / "bare-base")
    found = {}
    for kind, model_class in (("bare", BertModel), ("task", BertForSequenceClassification)):
        base = tmp_path / f"{kind}-base"
        tuned = model_class.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.002)
        tuned.save_pretrained(tmp_path / f"{kind}-tuned")
        found[kind] = tmp_path / kind
        dare_adapters.extract(
            base, tmp_path / f"{kind}-tuned", found[kind], progress=False, **EXACT
        )
    return {**found, "base": tmp_path / "task-base"}


@pytest.mark.parametrize("order", [("bare", "task"), ("task", "bare")], ids="-".join)
@pytest.mark.parametrize("kind", ["linear", "average", "ties", "slerp", "karcher"])
def test_names_that_differ_by_a_prefix_are_one_parameter(
    encoders: dict[str, Path], tmp_path: Path, order: Sequence[str], kind: str
):
    model = BertForSequenceClassification.from_pretrained(encoders["base"], dtype=torch.float32)
    before, start = all_bytes(model), {n: p.clone() for n, p in model.named_parameters()}
    for name in ("bare", "task"):
        model.load_dare_adapter(encoders[name], name, activate=False)
    options = {"density": 0.5} if kind == "ties" else {}
    model.add_weighted_adapter(order, [1, 1], "m", combination_type=kind, **options)
    own = {name: dense(Adapter.open(encoders[name])) for name in order}
    own["bare"] = {f"bert.{name}": delta for name, delta in own["bare"].items()}
    method, expected = get_method(kind), {}
    for name, value in start.items():
        zero = torch.zeros(value.shape)
        deltas = [own[who].get(name, zero) for who in order]
        if method.on_parameters:
            expected[name] = method.function([value + delta for delta in deltas], [1, 1])
        else:
            merged = [dare_adapters.delta.DenseDelta(delta) for delta in deltas]
            expected[name] = value + method.function(merged, [1, 1], **options).dense()
    model.set_dare_adapter("m")
    assert_near(model, expected)
    # The same one level further in, and from a directory.
    model.add_weighted_adapter(["m"], [0.5], "half", combination_type="linear", lambda_=2.0)
    model.set_dare_adapter("half")
    assert_near(model, expected)
    model.save_dare_adapter(tmp_path / "saved", "m")
    prefix = "" if order[0] == "bare" else "bert."
    assert f"{prefix}encoder.layer.0.attention.self.query.weight" in Adapter.open(
        tmp_path / "saved"
    )
    model.load_dare_adapter(tmp_path / "saved")
    assert_near(model, expected)
    model.disable_dare_adapters()
    assert all_bytes(model) == before


@pytest.mark.parametrize("kind", SOME)
def test_a_head_that_the_model_ties_never_replaces_its_embedding(
    make_pack: PackMaker, tmp_path: Path, kind: str
):
    def untie(model: PreTrainedModel) -> None:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())

    config = small_llama()
    config.tie_word_embeddings = True
    kinds = {"a": EXACT, "b": EXACT}
    pack = make_pack(
        "combine-untied", config=config, dtype=torch.float32, kinds=kinds, change=untie
    )
    model = pack.live()
    before, base = all_bytes(model), read_checkpoint(pack.base)
    own = {name: dense(Adapter.open(path)) for name, path in pack.adapters.items()}
    name = "model.embed_tokens.weight"
    paths = list(pack.adapters.values())
    with pytest.warns(UnusedParametersWarning, match="lm_head"):
        model.load_dare_adapter(paths, "m", combination_type=kind, **SOME[kind])
    live = model.model.embed_tokens.weight
    far = max(float(own[who][name].abs().max()) for who in "ab") * 2
    assert float((live - base[name]).abs().max()) <= far * 1.01
    made = dare_adapters.combine(
        paths, tmp_path / "out", combination_type=kind, bits=32, progress=False, **SOME[kind]
    )
    if kind != "ties":  # whose threshold is of all parameters, and here of one fewer
        torch.testing.assert_close(live, base[name] + made[name].dense(), rtol=0, atol=1e-7)
    other = pack.live()
    with pytest.warns(UnusedParametersWarning, match="lm_head"):
        other.load_dare_adapter(made)
    torch.testing.assert_close(
        other.model.embed_tokens.weight, base[name] + made[name].dense(), rtol=0, atol=1e-7
    )
    model.disable_dare_adapters()
    assert all_bytes(model) == before
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["linear", "ties", "karcher"])
def test_a_head_and_added_tokens_are_the_first_ones(make_pack: PackMaker, kind: str):
    pack = grown_pack(make_pack, tied=True)
    model = loaded(pack)
    before = all_bytes(model)
    options = METHODS[kind]
    model.add_weighted_adapter(["b", "a"], [1, 1], "m", combination_type=kind, **options)
    model.set_dare_adapter("m")
    added = read_checkpoint(pack.finetuned["b"])["model.embed_tokens.weight"][97:]
    assert torch.equal(model.model.embed_tokens.weight[97:], added)
    assert model.config.vocab_size == 102
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.disable_dare_adapters()
    assert model.config.vocab_size == 97
    assert all_bytes(model) == before


def test_what_the_model_lacks_is_left_out_and_told(pack: Pack):
    model = pack.live()
    del model.model.layers[0]
    before = all_bytes(model)
    paths = [pack.adapters[name] for name in "ab"]
    for kind in ("ties", "slerp"):
        how = {"combination_type": kind, **METHODS[kind]}
        with pytest.raises(dare_adapters.errors.ArchitectureMismatchError, match=r"layers\.0\."):
            model.load_dare_adapter(paths, kind, **how)
        with pytest.warns(UnusedParametersWarning, match=r"9 parameters.*layers\.0\."):
            model.load_dare_adapter(paths, kind, strict=False, **how)
        assert all_bytes(model) != before
        model.disable_dare_adapters()
        assert all_bytes(model) == before


# --- LoRA


@pytest.fixture
def lora(pack: Pack, tmp_path: Path) -> tuple[Path, Tensors]:
    """A LoRA that PEFT saved, and the weights that PEFT makes of it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    tuned = peft.get_peft_model(pack.live(), config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    tuned.save_pretrained(tmp_path / "lora")
    merged = tuned.merge_and_unload()
    return tmp_path / "lora", {n: p.detach().clone() for n, p in merged.named_parameters()}


def test_a_loras_directory_loads_like_an_adapter(pack: Pack, lora: tuple[Path, Tensors]):
    path, merged = lora
    model = pack.live()
    before = all_bytes(model)
    assert model.load_dare_adapter(path) == "lora"
    assert_near(model, merged)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all_bytes(duplicate) == all_bytes(model)
        duplicate.disable_dare_adapters()
        assert all_bytes(duplicate) == before
    model.disable_dare_adapters()
    assert all_bytes(model) == before


@pytest.mark.parametrize("kind", ["linear", "ties", "slerp", "karcher"])
@pytest.mark.parametrize("order", ["dare first", "lora first"])
def test_a_lora_and_an_adapter_are_combined(
    pack: Pack, lora: tuple[Path, Tensors], tmp_path: Path, kind: str, order: str
):
    path, merged = lora
    base = read_checkpoint(pack.base)
    own = [
        dense(Adapter.open(pack.adapters["b"])),
        {name: value - base[name] for name, value in merged.items()},
    ]
    model, names = pack.live(), ["dare", "lora"]
    before = all_bytes(model)
    model.load_dare_adapter(pack.adapters["b"], "dare", activate=False)
    model.load_dare_adapter(path, activate=False)
    if order == "lora first":
        own, names = own[::-1], names[::-1]
    method, options = get_method(kind), METHODS[kind]
    expected = {}
    for name, start in base.items():
        deltas = [part[name] for part in own]
        if method.on_parameters:
            expected[name] = method.function([start + d for d in deltas], [1, 1], **options)
        else:
            values = [dare_adapters.delta.DenseDelta(delta) for delta in deltas]
            expected[name] = start + method.function(values, [1, 1], **options).dense()
    model.add_weighted_adapter(names, [1, 1], "m", combination_type=kind, **options)
    model.set_dare_adapter("m")
    for name, value in expected.items():
        near = (model.get_parameter(name) - value).abs() <= 1e-6
        assert float(near.float().mean()) > 0.999, name  # but for draws in an election
    model.save_dare_adapter(tmp_path / "saved", "m")
    again = pack.live()
    again.load_dare_adapter(tmp_path / "saved")
    for name, parameter in model.named_parameters():
        error = (again.get_parameter(name) - parameter).norm()
        assert error.item() <= 0.005 * (parameter - base[name]).norm().item() + 1e-6
    model.disable_dare_adapters()
    assert all_bytes(model) == before


# --- memory and copies


@contextmanager
def new_tensors() -> Iterator[Callable[[], int]]:
    """Tells the bytes of tensors that were made inside the block and still are there."""
    gc.collect()
    gc.freeze()  # what is there already is not listed any more

    def total() -> int:
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor):
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    try:
        yield total
    finally:
        gc.unfreeze()


def changes(deltas: Tensors) -> int:
    return sum(int((delta != 0).sum()) for delta in deltas.values())


@pytest.mark.parametrize("kind", METHODS)
def test_what_is_kept_is_what_restores_the_base_and_nothing_more(pack: Pack, kind: str):
    model = loaded(pack)
    weights, options = WEIGHTS[kind], METHODS[kind]
    model.add_weighted_adapter(["a", "b"], weights, "m", combination_type=kind, **options)
    touched = changes(reference(pack, "ab", [1, 1], "linear", {}))
    changed = changes(reference(pack, "ab", weights, kind, options))
    patch = model._dare_live_adapters.patch
    with new_tensors() as total:
        model.set_dare_adapter("m")
        assert patch.nbytes // 2 <= total() <= patch.nbytes + 4096
    if kind in PARAMETER_METHODS:
        assert patch.nbytes <= nbytes(model)
    else:  # an original and a position, of what an adapter changes
        assert 4 * changed <= patch.nbytes <= 8 * touched * 1.02
    with new_tensors() as total:
        model.disable_dare_adapters()
        assert total() <= 4096
    assert patch.nbytes == 0


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("kind", METHODS)
def test_a_copy_with_an_active_combination_lives_on_its_own(
    pack: Pack, kind: str, duplicate: Callable[[PreTrainedModel], PreTrainedModel]
):
    model = loaded(pack)
    base = all_bytes(model)
    options = METHODS[kind]
    model.add_weighted_adapter(["a", "b"], WEIGHTS[kind], "m", combination_type=kind, **options)
    model.add_weighted_adapter(["m", "c"], [1.0, 0.5], "n", combination_type="ties", density=0.9)
    model.set_dare_adapter("m")
    other = duplicate(model)
    active = all_bytes(model)
    assert all_bytes(other) == active
    assert other.active_dare_adapters == ["m"]
    other.disable_dare_adapters()
    assert all_bytes(other) == base
    for name in ("n", "m"):
        other.set_dare_adapter(name)
    assert all_bytes(other) == active
    other.delete_dare_adapter("m")
    assert all_bytes(other) == base
    assert all_bytes(model) == active
    model.disable_dare_adapters()
    assert all_bytes(model) == base


def test_a_pickle_with_a_combination_is_not_much_larger_than_weights_and_originals(pack: Pack):
    model = loaded(pack)
    model.add_weighted_adapter(["a", "b"], [1, 1], "m", combination_type="slerp", t=0.5)
    model.set_dare_adapter("m")
    assert len(pickle.dumps(model)) < 2 * nbytes(model) + 100_000


# --- failures


@pytest.fixture
def brittle() -> Iterator[list[str]]:
    """A method that fails at the third parameter, for the length of a test."""
    registry.method_names()
    before, seen = dict(registry._methods), []

    @parameter_method("brittle")
    def brittle(
        parameters: Sequence[torch.Tensor], weights: Sequence[float], *, name: str
    ) -> torch.Tensor:
        seen.append(name)
        if len(seen) == 3:
            raise MemoryError(f"at {name}")
        return parameters[0]

    yield seen
    registry._methods.clear()
    registry._methods.update(before)


@pytest.mark.parametrize("active", [{}, {"c": 0.5}, {"m": 1.0}, {"m": 1.0, "a": -1.0}], ids=str)
def test_a_failed_activation_leaves_what_was_active(
    pack: Pack, brittle: list[str], active: dict[str, float]
):
    model = loaded(pack)
    base = all_bytes(model)
    model.add_weighted_adapter(["a", "b"], [1, 1], "m", combination_type="slerp", t=0.5)
    model.add_weighted_adapter(["a", "b"], [1, 1], "broken", combination_type="brittle")
    model.set_dare_adapter(active)
    before = all_bytes(model)
    with pytest.raises(MemoryError):
        model.set_dare_adapter({"broken": 1.0, "c": 1.0})
    assert len(brittle) >= 3
    assert model.active_dare_adapters == list(active)
    assert all_bytes(model) == before
    brittle.clear()
    paths = [pack.adapters["a"], pack.adapters["b"]]
    with pytest.raises(MemoryError):
        model.load_dare_adapter(paths, "new", combination_type="brittle")
    assert "new" not in model.dare_adapters
    assert model.active_dare_adapters == list(active)
    assert all_bytes(model) == before
    model.set_dare_adapter("broken")  # this time it works
    model.disable_dare_adapters()
    assert all_bytes(model) == base


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combination_type": "slerp", "t": "half"}, "t is 'half'"),
        ({"combination_type": "karcher", "max_iter": 0.5}, "max_iter is 0.5"),
        ({"combination_type": "model_stock", "filter_wise": 1}, "filter_wise is 1"),
    ],
)
def test_an_option_that_is_only_seen_when_it_is_computed_leaves_what_was_active(
    pack: Pack, options: dict[str, Any], message: str
):
    model = loaded(pack)
    model.set_dare_adapter({"c": 0.5})
    before = all_bytes(model)
    with pytest.raises(CombinationError, match=message):
        model.load_dare_adapter([pack.adapters["a"], pack.adapters["b"]], "new", **options)
    assert model.dare_adapters == ["a", "b", "c"]
    assert model.active_dare_adapters == ["c"]
    assert all_bytes(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combination_type": "dare_tie"}, "'dare_tie'; there are .*dare_ties"),
        ({"combination_type": "linear", "density": 0.5}, "linear has no option density"),
        ({"combination_type": "ties"}, "density is needed"),
        ({"combination_type": "ties", "density": 1.5}, "density is 1.5"),
        ({"combination_type": "ties", "density": [0.5] * 3}, "3 values for 2 adapters"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"}, "'x'; there"),
        ({"combination_type": "dare_linear", "density": 0.3, "mask": "blocked"}, "blocked mask"),
        ({"combination_type": "breadcrumbs", "density": 0.5, "gamma": 2}, "gamma is 2"),
        ({"combination_type": "sce", "select_topk": -1}, "select_topk is -1"),
        ({"combination_type": "nearswap"}, "nearswap needs t"),
        ({"mask": "random"}, "mask is 'random'"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"prune": "dare"}, "belong together"),
        ({"prune": "dare", "drop_rate": "x"}, "drop_rate is 'x'"),
        ({"normalize": True, "weights": [1.0, -1.0]}, "sum to zero"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_changes(
    pack: Pack, options: dict[str, Any], message: str
):
    model = loaded(pack)
    model.set_dare_adapter({"c": 0.5})
    before = all_bytes(model)
    options = dict(options)
    weights, paths = options.pop("weights", [1.0, 1.0]), [pack.adapters["a"], pack.adapters["b"]]
    with pytest.raises(CombinationError, match=message):
        model.add_weighted_adapter(["a", "b"], weights, "m", **options)
    with pytest.raises(CombinationError, match=message):
        model.load_dare_adapter(paths, "m", weight=weights, **options)
    assert model.dare_adapters == ["a", "b", "c"]
    assert model.active_dare_adapters == ["c"]
    assert all_bytes(model) == before


def test_unknown_options_are_refused_before_anything_is_opened(pack: Pack, tmp_path: Path):
    model = pack.live()
    for how in ({"combination_type": "tie"}, {"lamda": 1.0}, {"combination_type": "nearswap"}):
        with pytest.raises(CombinationError):
            model.load_dare_adapter([tmp_path / "nowhere"] * 2, "m", **how)
    with pytest.raises(AdapterNotFoundError):
        model.load_dare_adapter([tmp_path / "nowhere"] * 2, "m", combination_type="average")


def test_a_taken_name_and_an_unknown_one_are_refused(pack: Pack):
    model = loaded(pack)
    with pytest.raises(AdapterExistsError):
        model.add_weighted_adapter(["a", "b"], [1, 1], "c", combination_type="slerp")
    with pytest.raises(AdapterNotFoundError, match="no adapter 'z'"):
        model.add_weighted_adapter(["a", "z"], [1, 1], "m", combination_type="slerp")
    with pytest.raises(ValueError, match="1 weights for 2"):
        model.add_weighted_adapter(["a", "b"], [1], "m", combination_type="slerp")
    for weight in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            model.add_weighted_adapter(["a", "b"], [1, weight], "m", combination_type="slerp")
    assert model.dare_adapters == ["a", "b", "c"]


def test_adapters_of_different_bases_are_refused(make_pack: PackMaker, pack: Pack):
    # The same architecture and sizes, other weights.
    config = small_llama()
    config.initializer_range = 0.5
    other = make_pack("combine-elsewhere", config=config, dtype=torch.float32, kinds={"z": EXACT})
    model = loaded(pack)
    before = all_bytes(model)
    sources = [pack.adapters["a"], other.adapters["z"]]
    for kind in ("linear", "ties", "slerp"):
        how = {"combination_type": kind, **METHODS[kind]}
        with pytest.raises(BaseMismatchError):
            model.load_dare_adapter(sources, "m", **how)
        assert all_bytes(model) == before
        # Whoever knows better says so.
        assert model.load_dare_adapter(sources, kind, check_base=False, **how) == kind
        model.disable_dare_adapters()
    model.load_dare_adapter(other.adapters["z"], "z", check_base=False, activate=False)
    with pytest.raises(BaseMismatchError, match="different bases"):
        model.add_weighted_adapter(["a", "z"], [1, 1], "m", combination_type="ties", density=0.5)
    assert "m" not in model.dare_adapters
    assert all_bytes(model) == before


# --- from a mix


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
