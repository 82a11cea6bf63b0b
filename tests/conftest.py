"""Small models, made from scratch: a base and a full fine-tune of it, as checkpoints on disk."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import dare_adapters
from tests.checkpoints import write_checkpoint
from tests.golden.make_golden import golden_checkpoints

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_finish() -> None:
    """Whatever was imported stays: no search for garbage need go through its million objects."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Family:
    """Directories of a base and of a fine-tune in which every parameter changed."""

    base: Path
    finetuned: Path
    model_class: type[PreTrainedModel]

    def live(self, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
        """The base as a live model."""
        return self.model_class.from_pretrained(self.base, dtype=dtype).eval()


FamilyMaker = Callable[..., Family]


@pytest.fixture
def make_family(tmp_path: Path) -> FamilyMaker:
    """Builds a family of any architecture; every parameter moves by N(0, spread)."""

    def make(
        model_class: type[PreTrainedModel] = LlamaForCausalLM,
        config: object | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        spread: float = 0.002,
        seed: int = 0,
        max_shard_size: str = "5GB",
        name: str = "family",
    ) -> Family:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        model = model_class(config or tiny_llama()).to(dtype)
        base, finetuned = tmp_path / name / "base", tmp_path / name / "finetuned"
        model.save_pretrained(base, max_shard_size=max_shard_size)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * spread
                parameter.copy_((parameter.float() + noise).to(dtype))
        model.save_pretrained(finetuned, max_shard_size=max_shard_size)
        return Family(base, finetuned, model_class)

    return make


def tiny_llama(**changes: object) -> LlamaConfig:
    """A Llama with grouped queries whose widths are no multiples of the default block."""
    settings = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 136,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**settings, **changes})


@pytest.fixture
def golden_pair(tmp_path: Path) -> tuple[Path, Path]:
    """Base and fine-tune of the golden adapters."""
    base, finetuned = golden_checkpoints()
    return (
        write_checkpoint(tmp_path / "base", base),
        write_checkpoint(tmp_path / "finetuned", finetuned),
    )


@dataclass(frozen=True)
class Pack:
    """A base and adapters of several fine-tunes of it."""

    base: Path
    finetuned: dict[str, Path]
    adapters: dict[str, Path]
    model_class: type[PreTrainedModel]

    def live(self, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
        """The base as a live model."""
        return self.model_class.from_pretrained(self.base, dtype=dtype).eval()

    def loaded(self) -> PreTrainedModel:
        """The same with every adapter loaded under its name, none active."""
        model = self.live()
        for name, path in self.adapters.items():
            model.load_dare_adapter(path, name, activate=False)
        return model


PackMaker = Callable[..., Pack]

# Three kinds of support, three widths, three drop rates.
ADAPTER_KINDS: dict[str, dict[str, object]] = {
    "a": {"drop_rate": 0.9, "bits": 4},
    "b": {"drop_rate": 0.5, "bits": 16, "mask": "bernoulli"},
    "c": {"drop_rate": 0.75, "bits": 8, "method": "magnitude"},
}


@pytest.fixture(scope="session")
def make_pack(tmp_path_factory: pytest.TempPathFactory) -> PackMaker:
    """Builds packs; a name stands for the same files all session long, so nothing may write there.

    `finetuned_from` loads the base for fine-tuning (default: the class it was saved with), and
    `change` alters that model before its parameters move.
    """
    made: dict[str, Pack] = {}

    def make(
        name: str,
        model_class: type[PreTrainedModel] = LlamaForCausalLM,
        config: object | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        kinds: dict[str, dict[str, object]] | None = None,
        spread: float = 0.002,
        max_shard_size: str = "5GB",
        finetuned_class: type[PreTrainedModel] | None = None,
        change: Callable[[PreTrainedModel], object] | None = None,
        **loading: object,
    ) -> Pack:
        if name in made:
            return made[name]
        root = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        model = model_class(config or tiny_llama()).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases would be all ones and zeros
                parameter.add_(torch.randn(parameter.shape).to(dtype) * 0.02)
        model.save_pretrained(root / "base", max_shard_size=max_shard_size)
        finetuned, adapters = {}, {}
        for number, (kind, settings) in enumerate((kinds or ADAPTER_KINDS).items(), 1):
            generator = torch.Generator().manual_seed(number)
            own = (finetuned_class or model_class).from_pretrained(
                root / "base", dtype=dtype, **loading
            )
            if change is not None:
                change(own)
            with torch.no_grad():
                for parameter in own.parameters():
                    noise = torch.randn(parameter.shape, generator=generator) * spread
                    parameter.copy_((parameter.float() + noise).to(dtype))
            finetuned[kind], adapters[kind] = root / f"finetuned-{kind}", root / kind
            own.save_pretrained(finetuned[kind], max_shard_size=max_shard_size)
            dare_adapters.extract(
                root / "base",
                finetuned[kind],
                adapters[kind],
                on_large_delta="ignore",
                progress=False,
                **settings,
            )
        made[name] = Pack(root / "base", finetuned, adapters, finetuned_class or model_class)
        return made[name]

    return make


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """Every bit of a tensor, in the order of its entries: unlike ==, tells -0.0 from 0.0."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def all_bytes(model: torch.nn.Module) -> dict[str, bytes]:
    """Every bit of every parameter and buffer, without going through state_dict's warning."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: raw_bytes(tensor) for name, tensor in named}


def read_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint directory."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found.update(load_file(file))
    return found
