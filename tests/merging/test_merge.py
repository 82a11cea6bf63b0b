"""A recipe's checkpoint is what plain loops over whole tensors make of it, or it is not there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import dare_adapters
from dare_adapters.errors import (
    AdapterExistsError,
    CheckpointError,
    DareError,
    RecipeError,
)
from tests.conftest import Pack, PackMaker, raw_bytes, read_checkpoint, tiny_llama

Tensors = Mapping[str, torch.Tensor]


@pytest.fixture
def pack(make_pack: PackMaker) -> Pack:
    return make_pack("plain")


@pytest.fixture
def fine(make_pack: PackMaker) -> Pack:
    """In float32, where differences are not lost in rounding."""
    return make_pack("fine", dtype=torch.float32)


def recipe(pack: Pack, method: str, models: Mapping[Path, float], **more: Any) -> dict[str, Any]:
    based = {} if method == "linear" else {"base_model": str(pack.base)}
    own = {key: more.pop(key) for key in ("density", "epsilon") if key in more}
    return {
        "merge_method": method,
        **based,
        "models": [
            {"model": str(path), "parameters": {"weight": weight, **own}}
            for path, weight in models.items()
        ],
        **more,
    }


def merged(tmp_path: Path, made: Mapping[str, Any], name: str = "out", **how: Any) -> Tensors:
    return read_checkpoint(dare_adapters.merge(made, tmp_path / name, progress=False, **how))


def both(pack: Pack) -> dict[Path, float]:
    return {pack.finetuned["a"]: 0.7, pack.finetuned["b"]: -0.4}


@pytest.mark.parametrize("name", ["plain", "fine"])
def test_task_arithmetic_is_the_base_plus_weighted_deltas_rounded_once(
    make_pack: PackMaker, tmp_path: Path, name: str
):
    dtype = torch.float32 if name == "fine" else torch.bfloat16
    pack = make_pack(name, dtype=dtype)
    found = merged(tmp_path, recipe(pack, "task_arithmetic", both(pack)))
    base = read_checkpoint(pack.base)
    tuned = [(read_checkpoint(path), weight) for path, weight in both(pack).items()]
    assert found.keys() == base.keys()
    for key, value in base.items():
        change = sum((own[key].double() - value.double()) * weight for own, weight in tuned)
        exact = value.double() + change
        assert found[key].dtype == dtype
        half_a_step = exact.abs() * (2**-8 if dtype == torch.bfloat16 else 2**-22) + 1e-7
        assert bool(((found[key].double() - exact).abs() <= half_a_step).all()), key


def test_a_merge_loads_as_the_model_it_is_of(pack: Pack, tmp_path: Path):
    tensors = merged(tmp_path, recipe(pack, "linear", both(pack), parameters={"normalize": False}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


def test_dare_keeps_a_share_of_each_delta_and_its_l1_norm(fine: Pack, tmp_path: Path):
    model = fine.finetuned["a"]
    found = merged(tmp_path, recipe(fine, "dare_linear", {model: 1.0}, density=0.25))
    base, tuned = read_checkpoint(fine.base), read_checkpoint(model)
    for name, value in base.items():
        delta, kept = (tuned[name] - value).double(), (found[name] - value).double()
        share = float((kept != 0).double().mean())
        assert abs(share - 0.25) < 4 * (0.25 * 0.75 / kept.numel()) ** 0.5 + 1e-9, name
        # mergekit's rescale, up to the rounding of base plus delta.
        torch.testing.assert_close(kept.abs().sum(), delta.abs().sum(), rtol=1e-3, atol=0)
        factors = (kept / delta)[kept != 0]
        middle = float(factors.median())
        assert float((factors / middle - 1).abs().median()) < 1e-3, name


def test_over_seeds_dare_is_unbiased(fine: Pack, tmp_path: Path):
    model, name = fine.finetuned["a"], "model.layers.0.mlp.up_proj.weight"
    base, tuned = read_checkpoint(fine.base)[name], read_checkpoint(model)[name]
    total = torch.zeros(base.shape, dtype=torch.float64)
    for seed in range(40):
        made = recipe(fine, "dare_linear", {model: 1.0}, density=0.5)
        total += (merged(tmp_path, made, f"out-{seed}", seed=seed)[name] - base).double()
    delta = (tuned - base).double()
    correlation = float((total * delta).sum() / 40 / (delta * delta).sum())
    assert abs(correlation - 1) < 0.02
    error = float((total / 40 - delta).square().sum() / delta.square().sum())
    assert 0.5 / 40 < error < 2 / 40  # one draw's is 1: (1 - p) / p at a half


@pytest.mark.parametrize("method", ["dare_ties", "della", "ties", "breadcrumbs_ties"])
def test_neither_threads_nor_the_place_in_the_list_change_a_bit(
    fine: Pack, tmp_path: Path, method: str
):
    models = both(fine)
    options: dict[str, Any] = {"density": 0.4}
    if method == "della":
        options["epsilon"] = 0.1
    one = merged(tmp_path, recipe(fine, method, models, **options), "one", workers=1)
    turned = dict(reversed(models.items()))
    two = merged(tmp_path, recipe(fine, method, turned, **options), "two", workers=3)
    for name, tensor in one.items():
        # Sums of two terms do not depend on their order; nor may the masks.
        assert raw_bytes(tensor) == raw_bytes(two[name]), name


def test_an_adapter_stands_for_its_base_with_it_attached(pack: Pack, tmp_path: Path):
    exported = dare_adapters.export(
        pack.base, pack.adapters["b"], tmp_path / "exported", progress=False
    )
    of_adapter = recipe(pack, "task_arithmetic", {pack.adapters["b"]: 1.0})
    assert {n: raw_bytes(t) for n, t in merged(tmp_path, of_adapter).items()} == {
        n: raw_bytes(t) for n, t in read_checkpoint(Path(exported)).items()
    }


def test_as_an_adapter_it_gives_the_live_base_the_merge(fine: Pack, tmp_path: Path):
    made = recipe(fine, "ties", both(fine), density=0.5)
    tensors = merged(tmp_path, made)
    dare_adapters.merge(made, tmp_path / "adapter", as_adapter=True, bits=16, progress=False)
    model = fine.live()
    model.load_dare_adapter(tmp_path / "adapter")
    base = read_checkpoint(fine.base)
    for name, tensor in model.named_parameters():
        error = (tensor.detach() - tensors[name]).norm() / (tensors[name] - base[name]).norm()
        assert float(error) < 0.01, name


def test_out_dtype_is_what_is_written(fine: Pack, tmp_path: Path):
    made = recipe(fine, "task_arithmetic", both(fine), out_dtype="bfloat16")
    exact = merged(tmp_path, recipe(fine, "task_arithmetic", both(fine)), "exact")
    for name, tensor in merged(tmp_path, made).items():
        assert raw_bytes(tensor) == raw_bytes(exact[name].bfloat16()), name


def test_an_unknown_method_is_named_before_a_model_is_opened(tmp_path: Path):
    made = {"merge_method": "evolve", "models": [{"model": "nobody/nowhere"}]}
    with pytest.raises(RecipeError, match="evolve"):
        dare_adapters.merge(made, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def damaged(pack: Pack, out: Path, change: Any) -> Path:
    """A fine-tune with one thing wrong."""
    model = pack.model_class.from_pretrained(pack.finetuned["a"])
    model.save_pretrained(out)
    tensors = dict(read_checkpoint(out))
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(GATE), GATE),
        (lambda tensors: tensors.update({GATE: torch.zeros(3, 64)}), GATE),
        (lambda tensors: tensors[NORM].fill_(float("nan")), NORM),
        (lambda tensors: tensors[GATE][5].fill_(float("inf")), GATE),
        (lambda tensors: tensors[HEAD][-1, -1:].fill_(float("nan")), HEAD),
        (lambda tensors: tensors[EMBED][3, 1:2].fill_(float("nan")), EMBED),
    ],
    ids=["missing", "shape", "nan", "infinity", "nan in the head", "nan in the embedding"],
)
@pytest.mark.parametrize("as_adapter", [False, True])
@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_what_does_not_fit_is_named_and_nothing_is_left(
    pack: Pack, tmp_path: Path, change: Any, said: str, method: str, as_adapter: bool
):
    models = {pack.finetuned["b"]: 1.0, damaged(pack, tmp_path / "damaged", change): 1.0}
    with pytest.raises(DareError, match=said.replace(".", r"\.")):
        dare_adapters.merge(
            recipe(pack, method, models, density=0.5), tmp_path / "out", as_adapter=as_adapter
        )
    assert os.listdir(tmp_path) == ["damaged"]


@pytest.mark.parametrize("which", ["base", "fine-tune"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "della"])
def test_a_number_that_is_none_is_named_with_its_model_and_place(
    pack: Pack, tmp_path: Path, which: str, method: str
):
    bad = tmp_path / "broken"
    shutil.copytree(pack.base if which == "base" else pack.finetuned["a"], bad)
    tensors = {name: tensor.clone() for name, tensor in read_checkpoint(bad).items()}
    tensors[GATE][5, 3] = float("-inf")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    models = {pack.finetuned["b"]: 1.0, pack.finetuned["a"] if which == "base" else bad: 0.5}
    own = {"della": {"epsilon": 0.05, "density": 0.1}, "task_arithmetic": {}}
    made = recipe(pack, method, models, **own.get(method, {"density": 0.1}))
    if which == "base":
        made["base_model"] = str(bad)
    place = 5 * tensors[GATE].shape[1] + 3
    with pytest.raises(CheckpointError, match=rf"broken: {GATE} holds -inf at entry {place}"):
        dare_adapters.merge(made, tmp_path / "out", progress=False)
    assert os.listdir(tmp_path) == ["broken"]


def test_another_architecture_is_refused(pack: Pack, tmp_path: Path):
    other = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4))
    other.save_pretrained(tmp_path / "other")
    models = {pack.finetuned["b"]: 1.0, tmp_path / "other": 1.0}
    message = r"other lacks what .*: model\.layers\.0\.input_layernorm\.weight, .* architectures"
    with pytest.raises(RecipeError, match=message):
        dare_adapters.merge(recipe(pack, "ties", models), tmp_path / "out", progress=False)
    assert os.listdir(tmp_path) == ["other"]


def test_what_exists_is_kept_unless_it_is_to_be_overwritten(pack: Pack, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    made = recipe(pack, "linear", both(pack))
    with pytest.raises(AdapterExistsError):
        dare_adapters.merge(made, tmp_path / "out", progress=False)
    assert os.listdir(tmp_path / "out") == ["mine"]
    dare_adapters.merge(made, tmp_path / "out", overwrite=True, progress=False)
    assert (tmp_path / "out" / "model.safetensors").is_file()


SLOW_MERGE = """
import sys, time
import dare_adapters
from dare_adapters.streamed_file import StreamedFile

write = StreamedFile.write
def slowly(self, data):
    write(self, data)
    time.sleep(0.1)
StreamedFile.write = slowly
dare_adapters.merge(sys.argv[1], sys.argv[2], progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
def test_a_killed_merge_leaves_nothing_that_loads(make_pack: PackMaker, tmp_path: Path):
    import yaml

    pack = make_pack("plain", config=tiny_llama())
    file, out = tmp_path / "recipe.yml", tmp_path / "merges" / "out"
    file.write_text(yaml.safe_dump(recipe(pack, "ties", both(pack))))
    process = subprocess.Popen([sys.executable, "-c", SLOW_MERGE, str(file), str(out)])
    try:
        deadline = time.monotonic() + 60
        while not list(out.parent.glob(".out.partial-*/*.safetensors")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)
    finally:
        process.kill()
        process.wait()
    assert not out.exists()
    (left,) = out.parent.iterdir()
    for place in (out, left):
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(place)
        with pytest.raises(DareError):
            dare_adapters.merge(recipe(pack, "ties", {place: 1.0}), tmp_path / "second")
    dare_adapters.merge(file, out, progress=False)
    assert os.listdir(out.parent) == ["out"]
    AutoModelForCausalLM.from_pretrained(out)
