"""The main job: extract, load, use, unload; and that it agrees with the exported checkpoint."""

from __future__ import annotations

import pytest
import torch

import dare_adapters
from tests.conftest import FamilyMaker, tiny_llama


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights as they are, without going through state_dict and its warning."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_live_model_equals_exported_checkpoint_bit_for_bit(
    make_family: FamilyMaker, tmp_path, tied, dtype
):
    family = make_family(config=tiny_llama(tie_word_embeddings=tied), dtype=dtype)
    dare_adapters.extract(family.base, family.finetuned, tmp_path / "adapter", progress=False)
    dare_adapters.export(family.base, tmp_path / "adapter", tmp_path / "full", progress=False)
    live = family.live()
    before = state(live)
    live.load_dare_adapter(tmp_path / "adapter", "a")
    exported = family.model_class.from_pretrained(tmp_path / "full", dtype="auto").eval()
    for name, value in state(exported).items():
        assert torch.equal(value, state(live)[name]), name
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(live(tokens).logits, exported(tokens).logits)
    live.disable_dare_adapters()
    for name, value in before.items():
        assert torch.equal(value, state(live)[name]), name


def test_nothing_dropped_and_nothing_rounded_gives_the_fine_tune_back(
    make_family: FamilyMaker, tmp_path
):
    family = make_family(dtype=torch.bfloat16)
    dare_adapters.extract(
        family.base, family.finetuned, tmp_path / "adapter", drop_rate=0.0, bits=32, progress=False
    )
    live = family.live()
    live.load_dare_adapter(tmp_path / "adapter")
    finetuned = family.model_class.from_pretrained(family.finetuned, dtype="auto")
    for name, value in state(finetuned).items():
        assert torch.equal(value, state(live)[name]), name
