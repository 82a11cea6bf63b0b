"""One directory, the same bytes, through every loader: the same answers as patched in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from dare_adapters.errors import AdapterFormatError, ArchitectureMismatchError
from tests.conftest import Pack, PackMaker, all_bytes
from tests.tuner.architectures import ARCHITECTURES, Architecture, logits

FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, make_pack: PackMaker) -> tuple[Architecture, Pack]:
    architecture = ARCHITECTURES[request.param]
    return architecture, architecture.pack(make_pack, request.param)


_answers: dict[tuple[Path, str | None], torch.Tensor] = {}


def patched(architecture: Architecture, pack: Pack, kind: str | None) -> torch.Tensor:
    """The answers of `load_dare_adapter`, which is compared with exports elsewhere; of None, the
    base's. Computed once a session.
    """
    key = pack.base, kind
    if key not in _answers:
        model = pack.live()
        if kind is not None:
            model.load_dare_adapter(pack.adapters[kind])
        _answers[key] = logits(model, architecture.inputs())
    return _answers[key]


ROUTES: dict[str, Callable[[Pack, Path], torch.nn.Module]] = {
    "PeftModel": lambda pack, path: PeftModel.from_pretrained(pack.live(), path),
    "low_cpu_mem_usage": lambda pack, path: PeftModel.from_pretrained(
        pack.live(), path, low_cpu_mem_usage=True
    ),
    "from_pretrained": lambda pack, path: pack.model_class.from_pretrained(path),
}


@pytest.mark.parametrize("kind", ["a", "b", "c"])
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gives_the_bits_of_patching_in_place(
    case: tuple[Architecture, Pack], route: str, kind: str
) -> None:
    architecture, pack = case
    model = ROUTES[route](pack, pack.adapters[kind])
    expected = patched(architecture, pack, kind)
    assert torch.equal(logits(model, architecture.inputs()), expected)
    assert not torch.equal(expected, patched(architecture, pack, None))


def test_load_adapter_of_transformers_misses_and_refuses_no_tensor(
    case: tuple[Architecture, Pack],
) -> None:
    architecture, pack = case
    model = pack.live()
    report = model.load_adapter(str(pack.adapters["a"]), adapter_name="math")
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert not report.mismatched_keys
    assert torch.equal(logits(model, architecture.inputs()), patched(architecture, pack, "a"))


@pytest.mark.parametrize("kind", ["a", "b", "c"])
def test_what_peft_saves_again_are_the_same_bytes(
    case: tuple[Architecture, Pack], kind: str, tmp_path: Path
) -> None:
    _, pack = case
    PeftModel.from_pretrained(pack.live(), pack.adapters[kind]).save_pretrained(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (pack.adapters[kind] / name).read_bytes(), name


def test_what_transformers_saves_again_are_the_same_bytes(
    case: tuple[Architecture, Pack], tmp_path: Path
) -> None:
    _, pack = case
    model = pack.live()
    model.load_adapter(str(pack.adapters["a"]))
    model.save_pretrained(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (pack.adapters["a"] / name).read_bytes(), name


def test_merging_and_unmerging_restore_every_bit(case: tuple[Architecture, Pack]) -> None:
    architecture, pack = case
    model = PeftModel.from_pretrained(pack.live(), pack.adapters["a"], adapter_name="a")
    model.load_adapter(pack.adapters["b"], "b")
    before = all_bytes(model)
    for name in ("a", "b"):
        model.set_adapter(name)
        model.merge_adapter()
        expected = patched(architecture, pack, name)
        assert torch.equal(logits(model, architecture.inputs()), expected), name
        model.unmerge_adapter()
        assert all_bytes(model) == before
    merged = model.merge_and_unload(safe_merge=True)
    assert torch.equal(logits(merged, architecture.inputs()), patched(architecture, pack, "b"))
    assert type(merged) is type(pack.live())
    assert all_bytes(merged).keys() == all_bytes(pack.live()).keys()


def test_a_disabled_adapter_leaves_the_base(case: tuple[Architecture, Pack]) -> None:
    architecture, pack = case
    model = PeftModel.from_pretrained(pack.live(), pack.adapters["a"])
    with model.disable_adapter():
        found = logits(model, architecture.inputs())
    assert torch.equal(found, patched(architecture, pack, None))


def test_automatic_classes_find_the_base_that_the_adapter_names(make_pack: PackMaker) -> None:
    architecture = ARCHITECTURES["llama"]
    pack = architecture.pack(make_pack, "llama")
    expected = patched(architecture, pack, "a")
    for loader in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        model = loader.from_pretrained(str(pack.adapters["a"]))
        assert torch.equal(logits(model, architecture.inputs()), expected)


def test_the_base_keeps_its_name_in_the_checkpoint_beside_adapters(make_pack: PackMaker) -> None:
    """transformers forgets how experts were fused once an adapter is loaded."""
    architecture = ARCHITECTURES["mixtral"]
    pack = architecture.pack(make_pack, "mixtral")
    model = pack.live()
    model.load_adapter(str(pack.adapters["a"]), adapter_name="first")
    model.load_adapter(str(pack.adapters["b"]), adapter_name="second")
    assert torch.equal(logits(model, architecture.inputs()), patched(architecture, pack, "b"))


def test_an_edited_config_is_refused(make_pack: PackMaker, tmp_path: Path) -> None:
    pack = ARCHITECTURES["llama"].pack(make_pack, "llama")
    config = json.loads((pack.adapters["a"] / FILES[0]).read_text())
    config["seed"] += 1
    (tmp_path / FILES[0]).write_text(json.dumps(config))
    (tmp_path / FILES[1]).write_bytes((pack.adapters["a"] / FILES[1]).read_bytes())
    with pytest.raises(AdapterFormatError, match="digest"):
        PeftModel.from_pretrained(pack.live(), tmp_path)


def test_an_adapter_of_another_architecture_is_refused_by_name(make_pack: PackMaker) -> None:
    pack = ARCHITECTURES["llama"].pack(make_pack, "llama")
    other = ARCHITECTURES["gpt2"].pack(make_pack, "gpt2")
    with pytest.raises(ArchitectureMismatchError, match=r"GPT2LMHeadModel does not have: model\."):
        PeftModel.from_pretrained(other.live(), pack.adapters["a"])
