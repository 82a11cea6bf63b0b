"""Directories combined to a directory: every method, its numbers, its size, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from transformers import BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import dare_adapters
from dare_adapters.adapter import Adapter
from dare_adapters.checkpoint import open_checkpoint
from dare_adapters.cli import app
from dare_adapters.combine.combination import Combination
from dare_adapters.combine.registry import get_method, method_names
from dare_adapters.combine.sparsify import RandomMasks
from dare_adapters.delta import Delta, DenseDelta, NewParameter
from dare_adapters.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    ArchitectureMismatchError,
    BaseMismatchError,
    CheckpointMismatchError,
    CombinationError,
)
from dare_adapters.statistics import open_statistics, write_statistics
from dare_adapters.statistics.file import StatisticsInfo
from tests.combine.sources import kept_at_random, mask_seed
from tests.conftest import Pack, PackMaker, read_checkpoint, tiny_llama
from tests.hf.packs import task_pack
from tests.reference import decode_adapter
from tests.test_live import bert_config
from tests.test_patch import EXACT, grown_pack

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Options = dict[str, Any]

DELTA_METHODS: dict[str, Options] = {
    "linear": {},
    "task_arithmetic": {"lambda_": 0.5},
    "cat": {"normalize": True},
    "average": {},
    "magnitude_prune": {"density": 0.3},
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.3, "rescale": "l1"},
    "breadcrumbs": {"density": 0.6, "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.05},
    "della": {"density": 0.5, "epsilon": 0.2},
    "della_linear": {"density": 0.5},
    "sce": {"select_topk": 0.4},
}
PARAMETER_METHODS: dict[str, Options] = {
    "slerp": {"t": 0.3},
    "nuslerp": {},
    "multislerp": {},
    "karcher": {},
    "model_stock": {},
    "nearswap": {"t": 0.001},
    "arcee_fusion": {},
    "ram": {},
    "ramplus_tl": {},
    "widen": {},
}
STATISTICS_METHODS: dict[str, Options] = {"fisher": {}, "regmean": {"reduce_non_diagonal": 0.9}}
METHODS = {**DELTA_METHODS, **PARAMETER_METHODS}
# Some formulas have no weights.
WEIGHTS = {**dict.fromkeys(DELTA_METHODS, (0.75, 0.5)), **dict.fromkeys(PARAMETER_METHODS, (1, 1))}
# What keeps every entry.
IDENTITIES: dict[str, Options] = {
    **{name: {"density": 1.0} if "density" in o else {} for name, o in DELTA_METHODS.items()},
    "sce": {},
}


def small_llama() -> LlamaConfig:
    """Grouped queries, and widths that are no multiples of a block."""
    return tiny_llama(vocab_size=53, hidden_size=40, intermediate_size=68, num_hidden_layers=1)


@pytest.fixture
def pack(make_pack: PackMaker) -> Pack:
    """Three supports, three widths, over a float32 base."""
    return make_pack("combine", config=small_llama(), dtype=torch.float32)


@pytest.fixture
def seeded(make_pack: PackMaker) -> Pack:
    """Two with one seed, two with another drop rate and seeds of their own."""
    one = {"drop_rate": 0.9, "bits": 4, "seed": 7}
    other = {"drop_rate": 0.95, "bits": 4}
    kinds = {"a": one, "b": one, "c": other, "d": other}
    return make_pack("combine-seeded", config=small_llama(), dtype=torch.float32, kinds=kinds)


@pytest.fixture
def exact(make_pack: PackMaker) -> Pack:
    """Survivors as they were, from half of all entries to one in a hundred: no two are equal."""
    rates = {"a": 0.5, "b": 0.3, "c": 0.9, "d": 0.99}
    kinds = {name: {"drop_rate": rate, "bits": 32} for name, rate in rates.items()}
    return make_pack("combine-exact", config=small_llama(), dtype=torch.float32, kinds=kinds)


def combined(pack: Pack, names: Sequence[str], out: Path, *args: Any, **options: Any) -> Adapter:
    found = dare_adapters.combine(
        [pack.adapters[name] for name in names], out, *args, progress=False, **options
    )
    assert isinstance(found, Adapter)
    return found


def opened(pack: Pack, names: Sequence[str]) -> list[Adapter]:
    return [Adapter.open(pack.adapters[name]) for name in names]


def dense_reference(
    pack: Pack, names: Sequence[str], weights: Sequence[float], kind: str, options: Options
) -> dict[str, torch.Tensor]:
    """The method's formula on whole tensors, decoded from the files by the published rules."""
    method, base = get_method(kind), read_checkpoint(pack.base)
    parts = [decoded(pack.adapters[name]) for name in names]
    seeds = [mask_seed(0, Adapter.open(pack.adapters[name]).config.sha256) for name in names]
    found = {}
    for name, start in base.items():
        zero = torch.zeros(start.shape)
        own = [part[name].clone() if name in part else zero.clone() for part in parts]
        given: Options = {"name": name} if "name" in method.given else {}
        if method.on_parameters:
            if "base" in method.given:
                given["base"] = start.float()
            merged = method.function(
                [start.float() + delta for delta in own], weights, **options, **given
            )
            found[name] = merged - start.float()
        else:
            if "masks" in method.given:
                given["masks"] = RandomMasks(name, seeds)
            deltas = [DenseDelta(delta) for delta in own]
            found[name] = method.function(deltas, weights, **options, **given).dense()
    return found


@cache
def decoded(directory: Path) -> dict[str, torch.Tensor]:
    """Every delta of an adapter that nobody changes, read by the published rules, float32."""
    return {n: torch.from_numpy(v).float() for n, v in decode_adapter(directory).items()}


def dense(adapter: Mapping[str, Delta | NewParameter]) -> dict[str, torch.Tensor]:
    return {
        name: value.dense() for name in adapter if isinstance(value := adapter[name], Delta)
    }  # fmt: skip


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def test_every_method_is_tried_here():
    assert {*METHODS, *STATISTICS_METHODS} == set(method_names())
    for name in (*PARAMETER_METHODS, *STATISTICS_METHODS):
        assert get_method(name).on_parameters


# --- the numbers


@pytest.mark.parametrize("kind", METHODS)
def test_at_32_bits_what_is_stored_is_the_combination_exactly(
    pack: Pack, tmp_path: Path, kind: str
):
    weights, options = WEIGHTS[kind], METHODS[kind]
    written = combined(
        pack, "ab", tmp_path / "out", weights, combination_type=kind, bits=32, **options
    )
    base = open_checkpoint(pack.base).__getitem__
    exact = Combination(opened(pack, "ab"), weights, kind, options, base=base)
    found = dense(Adapter.open(tmp_path / "out", verify=True))
    assert list(found) == list(exact) == list(written)
    assert all(torch.equal(found[name], exact[name].dense()) for name in exact)
    for name, expected in dense_reference(pack, "ab", weights, kind, options).items():
        room = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=room + 2e-8)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {}),
        ("magnitude_prune", {"density": 0.3}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.4, "majority_sign_method": "frequency"}),
    ],
)
def test_the_numbers_are_those_of_peft(exact: Pack, tmp_path: Path, kind: str, options: Options):
    weights = [0.75, -0.5, 1.5]
    combined(exact, "abc", tmp_path / "out", weights, combination_type=kind, bits=32, **options)
    written = decoded(tmp_path / "out")
    parts = [decoded(exact.adapters[name]) for name in "abc"]
    function = merge_utils.task_arithmetic if kind == "linear" else getattr(merge_utils, kind)
    for name, found in written.items():
        expected = function([part[name] for part in parts], torch.tensor(weights), **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_what_is_dropped_at_random_follows_the_published_masks(pack: Pack, tmp_path: Path):
    how = {"combination_type": "dare_linear", "density": 0.25, "bits": 32}
    written = combined(pack, "ab", tmp_path / "out", seed=5, mask="bernoulli", **how)
    parts = [decoded(pack.adapters[name]) for name in "ab"]
    seeds = [mask_seed(5, adapter.config.sha256) for adapter in opened(pack, "ab")]
    name = "model.layers.0.mlp.down_proj.weight"
    rows, columns = parts[0][name].shape
    expected = torch.zeros(rows * columns, dtype=torch.float64)
    for part, seed in zip(parts, seeds, strict=True):
        kept = kept_at_random(seed, name, rows, columns, 0.25, "bernoulli")
        expected += part[name].reshape(-1).double() * torch.from_numpy(kept) * 4
    torch.testing.assert_close(
        written[name].dense().reshape(-1), expected.float(), rtol=1e-6, atol=1e-9
    )
    assert not torch.equal(combined(pack, "ab", tmp_path / "two", **how)[name].dense(), expected)


def test_pruning_comes_before_the_method(pack: Pack, tmp_path: Path):
    how = {"prune": "magnitude", "drop_rate": 0.75}
    written = combined(pack, "ab", tmp_path / "out", bits=32, **how)
    exact = Combination(opened(pack, "ab"), [1, 1], **how)
    for name, delta in dense(written).items():
        assert torch.equal(delta, exact[name].dense())
        assert int((delta != 0).sum()) <= math.ceil(delta.numel() / 2) + 1


@pytest.mark.parametrize("bits", [None, 16, 8, 4, 2, 1])
def test_the_error_of_rounding_is_reported_as_it_is(seeded: Pack, tmp_path: Path, bits: int | None):
    written = combined(seeded, "acd", tmp_path / "out", [1.0, -0.5, 2.0], bits=bits)
    exact = Combination(opened(seeded, "acd"), [1.0, -0.5, 2.0])
    wrong, all_of = {}, {}
    for name, delta in dense(written).items():
        group = name.replace(".0.", ".*.")
        expected = exact[name].dense().double()
        wrong[group] = wrong.get(group, 0.0) + float((delta - expected).square().sum())
        all_of[group] = all_of.get(group, 0.0) + float(expected.square().sum())
    assert wrong.keys() == written.config.fidelity.keys()
    for group, measured in written.config.fidelity.items():
        assert measured["rounding_error"] == pytest.approx(wrong[group] / all_of[group], 1e-2, 1e-9)
        assert measured["drop_error"] == 0
    worst = max(group["rounding_error"] for group in written.config.fidelity.values())
    assert worst < {16: 1e-5, 8: 1e-4, None: 0.02, 4: 0.02, 2: 0.5, 1: 2.0}[bits]


# --- bits


def test_by_default_each_parameter_has_the_bits_of_its_finest_input(
    make_pack: PackMaker, tmp_path: Path
):
    kinds = {
        "four": {"drop_rate": 0.9, "bits": 4},
        "eight": {"drop_rate": 0.9, "bits": 8},
        "full": {"drop_rate": 0.9, "bits": 32},
        "whole": {"drop_rate": 0.9, "bits": 4, "exclude": ["*mlp*"]},
    }
    pack = make_pack("combine-bits", config=small_llama(), dtype=torch.float32, kinds=kinds)
    query, mlp = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
    norm = "model.norm.weight"

    def stored(names: Sequence[str], **options: Any) -> tuple[object, ...]:
        made = combined(pack, names, tmp_path / "out", overwrite=True, **options)
        entries = made.config.parameters
        assert entries[norm].kind == "dense"
        return made.config.bits, *((entries[n].bits or entries[n].dtype) for n in (query, mlp))

    assert stored(["four"], weights=[0.5]) == (4, 4, 4)
    assert stored(["four", "eight"]) == (8, 8, 8)
    assert stored(["four", "eight", "full"]) == (32, 32, 32)
    # What was pruned stays pruned, at 32 bits too; what an input kept whole stays whole.
    assert stored(["four", "whole"]) == (4, 4, "F32")
    assert stored(["full", "whole"], bits=2) == (2, 2, "F32")


def test_pruned_entries_of_32_bits_stay_pruned(exact: Pack, tmp_path: Path):
    sizes = [adapter.nbytes for adapter in opened(exact, "cd")]
    for bits in (None, 4):
        written = combined(exact, "cd", tmp_path / f"out-{bits}", bits=bits)
        assert written.nbytes < 1.2 * sum(sizes)
        assert {e.bits for e in written.config.parameters.values()} == {bits or 32, None}


@pytest.mark.parametrize("bits", [3, 0, -4, 64, "4", 4.5])
def test_bits_that_are_none_are_refused_before_the_work(pack: Pack, tmp_path: Path, bits: object):
    with pytest.raises(CombinationError, match="32, 16, 8, 4, 2, 1"):
        combined(pack, "ab", tmp_path / "out", bits=bits)
    assert not (tmp_path / "out").exists()


# --- the size


def parts_of(adapter: Adapter) -> dict[str, set[str]]:
    """For each kind of tensor in the file the parameters that have it."""
    found: dict[str, set[str]] = {}
    for name, entry in adapter.config.parameters.items():
        for key in entry.tensors(name):
            found.setdefault(key.rpartition("_")[2], set()).add(name)
    return found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {}),
        ("average", {}),
        ("ties", {"density": 1.0}),
        ("dare_linear", {"density": 1.0}),
        ("dare_ties", {"density": 1.0}),
    ],
)
def test_adapters_of_one_seed_make_one_of_the_same_size(
    seeded: Pack, tmp_path: Path, kind: str, options: Options
):
    written = combined(
        seeded, "ab", tmp_path / "out", [0.5, 0.25], combination_type=kind, **options
    )
    first = Adapter.open(seeded.adapters["a"])
    assert written.config.seed == first.config.seed == 7
    assert parts_of(written) == parts_of(first)
    assert (tmp_path / "out" / TENSORS).stat().st_size == (first.path / TENSORS).stat().st_size
    for name, entry in written.config.parameters.items():
        own = first.config.parameters[name]
        assert (entry.kind, entry.mask, entry.block) == (own.kind, own.mask, own.block)
    exact = Combination(opened(seeded, "ab"), [0.5, 0.25], kind, options)
    again = Adapter.open(tmp_path / "out")
    for name, delta in dense(again).items():
        expected = exact[name].dense()
        assert torch.equal(delta != 0, expected != 0) or bool((expected[delta != 0] != 0).all())
        assert float((delta - expected).norm() / expected.norm()) < 0.15


def test_one_seed_says_nothing_where_blocks_or_masks_differ(make_pack: PackMaker, tmp_path: Path):
    kinds = {
        "a": {"drop_rate": 0.9, "bits": 8, "seed": 7},
        "b": {"drop_rate": 0.8, "bits": 8, "seed": 7},
        "c": {"drop_rate": 0.9, "bits": 8, "seed": 7, "mask": "bernoulli"},
    }
    pack = make_pack("combine-one-seed", config=small_llama(), dtype=torch.float32, kinds=kinds)
    for names in ("ab", "ac", "cc"):
        written = combined(pack, names, tmp_path / names, bits=32)
        exact = Combination(opened(pack, names), [1, 1])
        assert all(torch.equal(d, exact[name].dense()) for name, d in dense(written).items())
        masks = {entry.mask for entry in written.config.parameters.values()}
        assert masks <= {"bitmap", "gaps", None}


def alternatives(values: torch.Tensor, columns: int, bits: int) -> dict[str, int]:
    """Bytes that a parameter takes in each encoding, by the published rules."""
    kept = (values.reshape(-1, columns) != 0).tolist()
    rows = len(kept)
    stored = sum(math.ceil(sum(row) * bits / 8) for row in kept)
    gaps, skipped = 0, 0
    for entry in (entry for row in kept for entry in row):
        if entry:
            gaps += 1 + skipped // 255
        skipped = 0 if entry else skipped + 1
    found = {"bitmap": stored + rows * math.ceil(columns / 8), "gaps": stored + gaps}
    if bits > 1 or all(all(row) for row in kept):  # one bit has no code for zero
        found["blocked"] = rows * math.ceil(columns * bits / 8)
    return found


@pytest.mark.parametrize("bits", [32, 16, 8, 4, 2, 1])
@pytest.mark.parametrize("names", ["cd", "ac", "abcd"])
def test_positions_of_several_seeds_are_stored_and_nothing_else_would_be_smaller(
    exact: Pack, tmp_path: Path, bits: int, names: str
):
    written = combined(exact, names, tmp_path / "out", bits=bits)
    made = Combination(opened(exact, names), [1] * len(names))
    again = Adapter.open(tmp_path / "out")
    for name, entry in again.config.parameters.items():
        if entry.kind != "sparse":
            continue
        expected = made[name].dense()
        sizes = alternatives(expected, expected.shape[-1], bits)
        tensors = entry.tensors(name)
        nbytes = sum(
            math.prod(shape) * {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}[dtype]
            for key, (dtype, shape) in tensors.items()
            if not key.endswith("_scales")
        )
        assert nbytes == sizes[entry.mask]
        assert nbytes <= min(sizes.values())
        assert not bool((again[name].dense()[expected == 0]).any())
    assert written.nbytes == again.nbytes


# --- one adapter, any order, any number of threads


@pytest.mark.parametrize("kind", IDENTITIES)
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_one_adapter_of_which_all_is_kept_is_copied_byte_for_byte(
    pack: Pack, tmp_path: Path, kind: str, name: str
):
    combined(pack, name, tmp_path / "out", combination_type=kind, **IDENTITIES[kind])
    assert files(tmp_path / "out") == files(pack.adapters[name])


def test_one_adapter_is_not_copied_where_anything_is_to_change(pack: Pack, tmp_path: Path):
    before = files(pack.adapters["a"])
    for number, changes in enumerate(
        [
            {"weights": [0.5]},
            {"lambda_": 2.0},
            {"bits": 8},
            {"bits": 4},
            {"prune": "magnitude", "drop_rate": 0.5},
            {"combination_type": "ties", "density": 0.01},
        ]
    ):
        written = combined(pack, "a", tmp_path / str(number), **changes)
        assert written.config.method == "combined"
        assert files(tmp_path / str(number))[CONFIG] != before[CONFIG]


@pytest.mark.parametrize("kind", ["karcher", "multislerp", "widen", "ram"])
def test_one_adapter_of_a_method_on_parameters_is_itself_but_for_rounding(
    pack: Pack, tmp_path: Path, kind: str
):
    written = combined(pack, "c", tmp_path / "out", combination_type=kind, bits=32)
    own = dense(Adapter.open(pack.adapters["c"]))
    for name, delta in dense(written).items():
        kept = delta != 0 if kind == "ram" else slice(None)  # it leaves out what hardly changed
        torch.testing.assert_close(delta[kept], own[name][kept], rtol=0, atol=2e-7)


SYMMETRIC = [kind for kind in METHODS if kind not in ("slerp", "nearswap", "arcee_fusion")]


@pytest.mark.parametrize("kind", SYMMETRIC)
def test_neither_order_nor_threads_change_a_byte(pack: Pack, tmp_path: Path, kind: str):
    made = set()
    for number, (names, workers) in enumerate([("ab", 1), ("ba", 1), ("ab", 5), ("ba", 3)]):
        out = tmp_path / str(number)
        options = METHODS[kind]
        combined(pack, names, out, combination_type=kind, workers=workers, **options)
        made.add((out / TENSORS).read_bytes())
    assert len(made) == 1


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_ties", "karcher"])
def test_of_three_adapters_order_changes_no_more_than_rounding(
    pack: Pack, tmp_path: Path, kind: str
):
    found = []
    for names, weights in (("abc", [1.0, 0.5, 0.25]), ("cab", [0.25, 1.0, 0.5])):
        how = {"combination_type": kind, "bits": 32, **METHODS[kind]}
        found.append(dense(combined(pack, names, tmp_path / names, weights, **how)))
    for name, one in found[0].items():
        torch.testing.assert_close(one, found[1][name], rtol=1e-5, atol=1e-8)


# --- heads, tokens, files


def test_a_new_head_is_the_first_ones_and_the_task_model_loads(
    make_pack: PackMaker, tmp_path: Path
):
    pack = task_pack(make_pack)
    for names in ("ab", "ba"):
        written = combined(pack, names, tmp_path / names)
        own, other = (read_checkpoint(pack.finetuned[name]) for name in names)
        heads = {name: written[name].value for name in written if written.is_new(name)}
        assert set(heads) == {"classifier.weight", "classifier.bias"}
        assert all(torch.equal(value, own[name]) for name, value in heads.items())
        assert not torch.equal(heads["classifier.weight"], other["classifier.weight"])
        full = dare_adapters.export(pack.base, written, tmp_path / f"{names}-full", progress=False)
        model = BertForSequenceClassification.from_pretrained(full, dtype="auto")
        assert model.config.num_labels == 3
        assert torch.equal(model.classifier.weight, own["classifier.weight"])
        live = BertForSequenceClassification.from_pretrained(pack.base, num_labels=3, dtype="auto")
        live.load_dare_adapter(written)
        for name, value in model.state_dict().items():
            assert torch.equal(dict(live.named_parameters())[name], value)


@pytest.mark.parametrize("tied", [True, False])
def test_added_rows_are_the_first_ones(make_pack: PackMaker, tmp_path: Path, tied: bool):
    pack = grown_pack(make_pack, tied)
    written = combined(pack, "ba", tmp_path / "out", bits=32)
    embedding = written["model.embed_tokens.weight"]
    own = read_checkpoint(pack.finetuned["b"])["model.embed_tokens.weight"]
    assert torch.equal(embedding.added_rows, own[97:])
    full = dare_adapters.export(pack.base, written, tmp_path / "full", progress=False)
    model = LlamaForCausalLM.from_pretrained(full, dtype="auto")
    assert model.config.vocab_size == len(model.get_output_embeddings().weight) == 102
    assert torch.equal(model.get_input_embeddings().weight[97:], own[97:])


def test_rows_are_added_even_where_no_other_entry_changes(make_pack: PackMaker, tmp_path: Path):
    pack = grown_pack(make_pack, False)
    written = combined(pack, "a", tmp_path / "out", [0.0])
    again = Adapter.open(tmp_path / "out")
    assert set(again) == set(written) == {"model.embed_tokens.weight", "lm_head.weight"}
    own = read_checkpoint(pack.finetuned["a"])
    for name in again:
        assert torch.equal(again[name].added_rows, own[name][97:])
        assert not bool(again[name].dense().any())


def test_weights_of_zero_make_an_adapter_of_nothing(pack: Pack, tmp_path: Path):
    written = combined(pack, "ab", tmp_path / "out", [0.0, 0.0])
    assert len(Adapter.open(tmp_path / "out")) == len(written) == 0
    model = pack.live()
    model.load_dare_adapter(tmp_path / "out")
    assert all(
        torch.equal(dict(model.named_parameters())[name], value)
        for name, value in read_checkpoint(pack.base).items()
    )


def test_the_tokenizer_is_the_first_adapters_whole(pack: Pack, tmp_path: Path):
    for name in "ab":
        shutil.copytree(pack.adapters[name], tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(f'{{"of": "{name}"}}')
    (tmp_path / "a" / "tokenizer_config.json").write_text("{}")
    for names in ("ab", "ba"):
        paths = [tmp_path / name for name in names]
        dare_adapters.combine(paths, tmp_path / names, progress=False)
        assert (tmp_path / names / "tokenizer.json").read_text() == f'{{"of": "{names[0]}"}}'
        assert (tmp_path / names / "tokenizer_config.json").exists() == (names == "ab")


def test_the_config_tells_of_what_it_was_made(pack: Pack, tmp_path: Path):
    written = combined(
        pack, "ab", tmp_path / "out", [1.0, -2.0], combination_type="ties", density=0.5, seed=3
    )
    told = json.loads((written.path / CONFIG).read_text())["finetuned_model"]["combination"]
    assert told["combination_type"] == "ties"
    assert (told["options"], told["seed"]) == ({"density": 0.5}, 3)
    assert [(entry["weight"], entry["sha256"]) for entry in told["adapters"]] == [
        (weight, adapter.config.sha256)
        for weight, adapter in zip([1.0, -2.0], opened(pack, "ab"), strict=True)
    ]
    config = written.config
    assert config.base_model_name_or_path == str(pack.base)
    assert config.witness == Adapter.open(pack.adapters["a"]).config.witness
    assert config.base_parameter_count == sum(
        v.numel() for v in read_checkpoint(pack.base).values()
    )


# --- statistics and bases


def with_statistics(pack: Pack, root: Path, kind: str) -> list[Path]:
    """Copies of adapters a and b with made-up statistics beside them."""
    found = []
    for number, name in enumerate("ab"):
        directory = root / name
        shutil.copytree(pack.adapters[name], directory)
        adapter, generator = Adapter.open(directory), torch.Generator().manual_seed(number)
        tensors = {}
        for parameter, value in read_checkpoint(pack.base).items():
            if kind == "fisher":
                tensors[parameter] = torch.rand(value.shape, generator=generator)
            elif value.dim() == 2 and "embed" not in parameter:
                inputs = torch.randn(200, value.shape[1], generator=generator)
                tensors[parameter] = inputs.T @ inputs / 200
        info = StatisticsInfo(kind, adapter.config.sha256, 200, "made up")
        write_statistics(directory, info, tensors)
        found.append(directory)
    return found


@pytest.mark.parametrize(("kind", "of"), [("fisher", "fisher"), ("regmean", "gram")])
def test_statistics_are_those_in_the_directories(pack: Pack, tmp_path: Path, kind: str, of: str):
    paths = with_statistics(pack, tmp_path, of)
    options = STATISTICS_METHODS[kind]
    how = {"combination_type": kind, "bits": 32, "progress": False, **options}
    written = dare_adapters.combine(paths, tmp_path / "out", [2.0, 1.0], base=pack.base, **how)
    statistics = [open_statistics(path, of) for path in paths]
    base, parts = read_checkpoint(pack.base), [decoded(pack.adapters[name]) for name in "ab"]
    for name, start in base.items():
        tuned = [start + part[name] for part in parts]
        own = [s.get(name) for s in statistics]
        if kind == "fisher":
            trusts = [w * (s.double() + 1e-6) for w, s in zip((2.0, 1.0), own, strict=True)]
            merged = sum(t * p for t, p in zip(trusts, tuned, strict=True)) / sum(trusts)
        else:
            merged = get_method(kind).function(tuned, [2.0, 1.0], statistics=own, **options)
        found = written[name].dense() if name in written else torch.zeros(start.shape)
        torch.testing.assert_close(found, (merged - start).float(), rtol=0, atol=1e-7)
    given = dare_adapters.combine(
        paths, tmp_path / "given", [2.0, 1.0], base=pack.base, statistics=statistics, **how
    )
    assert given.config.sha256 == written.config.sha256


def test_missing_statistics_are_named_with_what_makes_them(pack: Pack, tmp_path: Path):
    paths = with_statistics(pack, tmp_path, "fisher")
    (paths[1] / "fisher.safetensors").unlink()
    with pytest.raises(AdapterNotFoundError, match=r"b/fisher\.safetensors.*dare-adapters stats"):
        dare_adapters.combine(paths, tmp_path / "out", combination_type="fisher")
    with pytest.raises(CombinationError, match="1 statistics for 2 adapters"):
        dare_adapters.combine(paths, tmp_path / "out", combination_type="fisher", statistics=[{}])
    assert not (tmp_path / "out").exists()


def without_a_base(pack: Pack, name: str, out: Path) -> Path:
    shutil.copytree(pack.adapters[name], out)
    raw = json.loads((out / CONFIG).read_text())
    raw["base_model_name_or_path"] = None
    (out / CONFIG).write_text(json.dumps(raw))
    return out


def test_methods_on_parameters_take_the_base_that_the_first_adapter_names(
    pack: Pack, tmp_path: Path
):
    named = combined(pack, "ab", tmp_path / "named", combination_type="slerp", t=0.5)
    paths = [without_a_base(pack, name, tmp_path / name) for name in "ab"]
    with pytest.raises(CombinationError, match=r"slerp.*whole parameters.*pass base="):
        dare_adapters.combine(paths, tmp_path / "out", combination_type="slerp", t=0.5)
    given = dare_adapters.combine(
        paths, tmp_path / "out", combination_type="slerp", t=0.5, base=pack.base, progress=False
    )
    assert given.config.sha256 == named.config.sha256
    # Methods on deltas ask for none, and look at none.
    dare_adapters.combine(paths, tmp_path / "sum", base=tmp_path / "nowhere", progress=False)


def test_a_base_of_another_kind_is_refused(pack: Pack, tmp_path: Path):
    settings = {**small_llama().to_dict(), "intermediate_size": 70}
    wide = LlamaForCausalLM(LlamaConfig(**settings))
    wide.save_pretrained(tmp_path / "wide")
    BertModel(bert_config()).save_pretrained(tmp_path / "bert")
    how = {"combination_type": "slerp"}
    with pytest.raises(ArchitectureMismatchError, match=r"\[40, 70\].*\[40, 68\]"):
        combined(pack, "ab", tmp_path / "out", base=tmp_path / "wide", **how)
    with pytest.raises(CheckpointMismatchError, match=r"bert has no \S+.*pass the base="):
        combined(pack, "ab", tmp_path / "out", base=tmp_path / "bert", **how)
    assert sorted(os.listdir(tmp_path)) == ["bert", "wide"]


@pytest.mark.parametrize("outer", [{}, {"combination_type": "ties", "density": 0.5}])
def test_a_method_on_parameters_inside_another_has_its_base(
    pack: Pack, tmp_path: Path, outer: Options
):
    inner = Combination(opened(pack, "ab"), [1, 1], "slerp", {"t": 0.5})
    third = Adapter.open(pack.adapters["c"])
    written = dare_adapters.combine(
        [inner, third], tmp_path / "out", [1.0, 0.5], bits=32, progress=False, **outer
    )
    based = Combination(opened(pack, "ab"), [1, 1], "slerp", {"t": 0.5})
    based.base = open_checkpoint(pack.base).__getitem__
    kind = outer.get("combination_type", "linear")
    options = {name: v for name, v in outer.items() if name != "combination_type"}
    exact = Combination([based, third], [1.0, 0.5], kind, options)
    for name in exact:
        assert torch.equal(written[name].dense(), exact[name].dense())


# --- refused


def test_adapters_of_different_bases_are_refused(pack: Pack, make_pack: PackMaker, tmp_path: Path):
    kinds = {"a": {"drop_rate": 0.9}}
    other = make_pack("combine-other", config=tiny_llama(vocab_size=98), kinds=kinds)
    for how in ({}, {"as_mix": True}, {"combination_type": "karcher"}):
        with pytest.raises(BaseMismatchError, match=r"different bases.*sampled parameters differ"):
            dare_adapters.combine(
                [pack.adapters["a"], other.adapters["a"]], tmp_path / "out", progress=False, **how
            )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"weights": [1.0, float("inf")]}, "finite"),
        ({"weights": [True, 1.0]}, "finite"),
        ({"combination_type": "dare_tie"}, r"'dare_tie'; there are .*dare_ties"),
        ({"lamda": 1.0}, "linear has no option lamda"),
        ({"combination_type": "nearswap"}, "nearswap needs t"),
        ({"combination_type": "ties"}, "density is needed"),
        ({"combination_type": "ties", "density": 1.5}, "density is 1.5"),
        ({"combination_type": "ties", "density": [0.5]}, "density has 1 values for 2"),
        ({"combination_type": "slerp", "t": "half"}, "t is 'half'"),
        ({"mask": "random"}, "mask is 'random'"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"prune": "dare"}, "belong together"),
        ({"prune": "dare", "drop_rate": "0.5"}, "drop_rate is '0.5'"),
        ({"combination_type": "dare_linear", "density": 0.3, "mask": "blocked"}, "blocked mask"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_written(
    pack: Pack, tmp_path: Path, changes: Options, message: str
):
    with pytest.raises(CombinationError, match=message):
        combined(pack, "ab", tmp_path / "out", **changes)
    assert os.listdir(tmp_path) == []


def test_an_empty_list_and_what_is_no_adapter_are_refused(pack: Pack, tmp_path: Path):
    with pytest.raises(CombinationError, match="no adapter"):
        dare_adapters.combine([], tmp_path / "out")
    for path in (tmp_path, tmp_path / "nowhere", pack.base):
        with pytest.raises(AdapterNotFoundError):
            dare_adapters.combine([pack.adapters["a"], path], tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_what_exists_is_overwritten_only_if_asked(pack: Pack, tmp_path: Path):
    shutil.copytree(pack.adapters["a"], tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(AdapterExistsError, match="overwrite"):
        combined(pack, "ab", tmp_path / "out")
    assert files(tmp_path / "out") == before
    # An input may be where the result goes.
    expected = combined(pack, "ab", tmp_path / "other", [0.5, 2.0]).config.sha256
    paths = [tmp_path / "out", pack.adapters["b"]]
    made = dare_adapters.combine(
        paths, tmp_path / "out", [0.5, 2.0], overwrite=True, progress=False
    )
    assert made.config.sha256 == expected
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


# --- what was written is an adapter like any other


@pytest.mark.parametrize("kind", ["linear", "dare_ties", "karcher"])
def test_what_was_written_passes_every_command(pack: Pack, tmp_path: Path, kind: str):
    written = combined(pack, "abc", tmp_path / "out", combination_type=kind, **METHODS[kind])

    def run(*arguments: object) -> dict[str, Any]:
        done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    told = run("verify", written.path, "--base", pack.base)
    assert (told["valid"], told["parameters"]) == (True, len(written))
    assert run("inspect", written.path)["summary"]["method"] == "combined"
    run("export", pack.base, written.path, tmp_path / "full")
    exported, deltas = read_checkpoint(tmp_path / "full"), decoded(written.path)
    for name, value in read_checkpoint(pack.base).items():
        torch.testing.assert_close(exported[name], value + deltas[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", METHODS)
def test_the_written_adapter_and_the_live_combination_give_the_same_weights(
    pack: Pack, tmp_path: Path, kind: str
):
    weights, options = WEIGHTS[kind], METHODS[kind]
    written = combined(
        pack, "ab", tmp_path / "out", weights, combination_type=kind, bits=32, **options
    )
    live, loaded = pack.live(), pack.live()
    for name in "ab":
        live.load_dare_adapter(pack.adapters[name], name, activate=False)
    live.add_weighted_adapter(["a", "b"], weights, "mix", combination_type=kind, **options)
    live.set_dare_adapter("mix")
    loaded.load_dare_adapter(written)
    other = dict(loaded.named_parameters())
    for name, parameter in live.named_parameters():
        torch.testing.assert_close(parameter, other[name], rtol=0, atol=1e-7)


# --- names


def test_a_bare_encoders_adapter_and_a_task_models_are_of_one_model(tmp_path: Path):
    torch.manual_seed(0)
    whole = BertForSequenceClassification(bert_config(num_labels=3)).float()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(std=0.02)
    whole.save_pretrained(tmp_path / "task-base")
    whole.bert.save_pretrained(tmp_path / "bare-base")
    paths = {}
    for kind, cls in (("bare", BertModel), ("task", BertForSequenceClassification)):
        tuned = cls.from_pretrained(tmp_path / f"{kind}-base", dtype=torch.float32)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.002)
        tuned.save_pretrained(tmp_path / f"{kind}-tuned")
        paths[kind] = tmp_path / kind
        dare_adapters.extract(
            tmp_path / f"{kind}-base", tmp_path / f"{kind}-tuned", paths[kind], progress=False,
            **EXACT,
        )  # fmt: skip
    bare, task = (dense(Adapter.open(paths[kind])) for kind in ("bare", "task"))
    for order in (("task", "bare"), ("bare", "task")):
        out = tmp_path / "-".join(order)
        written = dare_adapters.combine([paths[k] for k in order], out, bits=32, progress=False)
        prefix = "bert." if order[0] == "task" else ""
        assert set(written) == {
            *(f"{prefix}{name}" for name in bare), "classifier.weight", "classifier.bias"
        }  # fmt: skip
        for name, delta in bare.items():
            summed = (delta + task[f"bert.{name}"], task[f"bert.{name}"] + delta)
            assert any(torch.equal(written[prefix + name].dense(), total) for total in summed)
        live = BertForSequenceClassification.from_pretrained(
            tmp_path / "task-base", dtype=torch.float32
        )
        live.load_dare_adapter(out)  # its witness still is the base's
        kind: Callable[[str], torch.Tensor] = dict(live.named_parameters()).__getitem__
        start = dict(whole.named_parameters())
        for name, delta in task.items():
            total = start[name] + delta + bare.get(name.removeprefix("bert."), 0.0)
            torch.testing.assert_close(kind(name), total, rtol=0, atol=1e-7)
