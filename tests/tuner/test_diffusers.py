"""Models of diffusers: full fine-tunes as adapters, and adapters that train, in PEFT's layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

import dare_adapters
from dare_adapters import DareConfig
from dare_adapters.errors import CheckpointError, UnsupportedParameterError
from dare_adapters.tuner.state import DareState
from tests.conftest import all_bytes

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

BLOCKS = {"layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
CROSS = {"cross_attention_dim": 16, "attention_head_dim": 4}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Denoiser:
    """A model class, its tiny settings, and what a forward takes for three images.

    `by_row` says whether it can answer each row under an adapter of its own.
    """

    name: str
    settings: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    by_row: bool = True

    def live(self) -> nn.Module:
        """The same random weights each time; norms are no ones and biases no zeros."""
        torch.manual_seed(0)
        model = getattr(diffusers, self.name)(**self.settings).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02)
        return model


STEPS = torch.tensor([1, 20, 300])
DENOISERS = {
    "unet": Denoiser(
        "UNet2DConditionModel",
        {
            "sample_size": 8, "in_channels": 4, "out_channels": 4, **BLOCKS, **CROSS,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        lambda: {
            "sample": noise(3, 4, 8, 8), "timestep": STEPS,
            "encoder_hidden_states": noise(3, 5, 16),
        },
    ),
    "video unet": Denoiser(
        "UNet3DConditionModel",
        {
            "sample_size": 8, **BLOCKS, **CROSS,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        lambda: {
            "sample": noise(3, 4, 2, 8, 8), "timestep": STEPS,
            "encoder_hidden_states": noise(3, 5, 16),
        },
        by_row=False,  # its frames are rows to the convolutions
    ),
    "dit": Denoiser(
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2,
            "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 4,
        },
        lambda: {
            "hidden_states": noise(3, 4, 8, 8), "timestep": STEPS,
            "class_labels": torch.tensor([1, 2, 3]),
        },
    ),
    "pixart": Denoiser(
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2,
            "out_channels": 4, "sample_size": 8, "patch_size": 2, "cross_attention_dim": 16,
            "caption_channels": 16, "norm_num_groups": 4, "num_embeds_ada_norm": 10,
        },
        lambda: {
            "hidden_states": noise(3, 4, 8, 8), "timestep": STEPS,
            "encoder_hidden_states": noise(3, 5, 16),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        by_row=False,  # a table of the whole model
    ),
    "sd3": Denoiser(
        "SD3Transformer2DModel",
        {
            "sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4,
            "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
            "caption_projection_dim": 16, "joint_attention_dim": 16, "pooled_projection_dim": 16,
        },
        lambda: {
            "hidden_states": noise(3, 4, 8, 8), "timestep": STEPS,
            "encoder_hidden_states": noise(3, 6, 16), "pooled_projections": noise(3, 16),
        },
    ),
    "flux": Denoiser(
        "FluxTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1,
            "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
            "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
        },
        lambda: {
            "hidden_states": noise(3, 16, 4), "encoder_hidden_states": noise(3, 6, 32),
            "pooled_projections": noise(3, 32), "timestep": STEPS / 1000,
            "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3), "guidance": torch.ones(3),
        },
    ),
    "vae": Denoiser(
        "AutoencoderKL",
        {
            "block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        lambda: {"sample": noise(3, 3, 16, 16)},
    ),
}  # fmt: skip


@pytest.fixture(params=DENOISERS)
def denoiser(request: pytest.FixtureRequest) -> Denoiser:
    return DENOISERS[request.param]


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Denoiser], Path]:
    """Base, fine-tune of every parameter, and adapter of a model, as directories in one."""
    made: dict[str, Path] = {}

    def make(denoiser: Denoiser) -> Path:
        if denoiser.name in made:
            return made[denoiser.name]
        root = tmp_path_factory.mktemp(denoiser.name)
        model = denoiser.live()
        model.save_pretrained(root / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02)
        model.save_pretrained(root / "finetuned")
        dare_adapters.extract(
            root / "base", root / "finetuned", root / "adapter", drop_rate=0.5,
            on_large_delta="ignore", progress=False,
        )  # fmt: skip
        dare_adapters.export(root / "base", root / "adapter", root / "full", progress=False)
        made[denoiser.name] = root
        return root

    return make


@torch.no_grad()
def answers(model: nn.Module, denoiser: Denoiser, **more: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**denoiser.inputs(), **more).sample
    return found


def recipe(seed: int) -> DareConfig:
    return DareConfig(drop_rate=0.5, init_weights=False, seed=seed)


def test_an_extracted_adapter_answers_as_the_model_that_it_is_exported_to(
    denoiser: Denoiser, directories: Callable[[Denoiser], Path]
) -> None:
    root = directories(denoiser)
    full = getattr(diffusers, denoiser.name).from_pretrained(root / "full")
    expected = answers(full, denoiser)
    base = denoiser.live()
    assert (expected - answers(base, denoiser)).abs().max() > 1e-2
    model = PeftModel.from_pretrained(base, root / "adapter")
    # Not to the bit: a convolution in three dimensions is none even for one model twice.
    assert torch.allclose(answers(model, denoiser), expected, atol=1e-5)
    assert all_bytes(model.merge_and_unload()) == all_bytes(full)


def test_a_merge_is_a_directory_of_diffusers(
    directories: Callable[[Denoiser], Path], tmp_path: Path
) -> None:
    """Half of a fine-tune's delta, by recipe."""
    denoiser = DENOISERS["unet"]
    root = directories(denoiser)
    (tmp_path / "recipe.yml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {root / 'base'}\nmodels:\n"
        f"  - model: {root / 'finetuned'}\n    parameters: {{weight: 0.5}}\n"
    )
    dare_adapters.merge(tmp_path / "recipe.yml", tmp_path / "merged", progress=False)
    kind = getattr(diffusers, denoiser.name)
    merged = kind.from_pretrained(tmp_path / "merged").state_dict()
    base = kind.from_pretrained(root / "base").state_dict()
    finetuned = kind.from_pretrained(root / "finetuned").state_dict()
    assert merged.keys() == base.keys()
    for name, value in base.items():
        assert torch.equal(merged[name], (finetuned[name] - value) * 0.5 + value), name


def test_an_adapter_that_drops_nothing_is_the_fine_tune(
    directories: Callable[[Denoiser], Path], tmp_path: Path
) -> None:
    denoiser = DENOISERS["unet"]
    root = directories(denoiser)
    dare_adapters.extract(
        root / "base", root / "finetuned", tmp_path / "adapter", drop_rate=0, bits=32,
        on_large_delta="ignore", progress=False,
    )  # fmt: skip
    dare_adapters.export(root / "base", tmp_path / "adapter", tmp_path / "full", progress=False)
    kind = getattr(diffusers, denoiser.name)
    expected = answers(kind.from_pretrained(root / "finetuned"), denoiser)
    found = answers(kind.from_pretrained(tmp_path / "full"), denoiser)
    assert torch.allclose(found, expected, atol=1e-5)


def test_automatic_classes_find_the_base_in_diffusers(
    directories: Callable[[Denoiser], Path],
) -> None:
    denoiser = DENOISERS["unet"]
    root = directories(denoiser)
    model = AutoPeftModel.from_pretrained(str(root / "adapter"))
    assert type(model.get_base_model()).__name__ == denoiser.name
    kind = getattr(diffusers, denoiser.name)
    expected = answers(kind.from_pretrained(root / "full"), denoiser)
    assert torch.equal(answers(model, denoiser), expected)


def test_adapters_train_merge_and_leave_every_bit(denoiser: Denoiser, tmp_path: Path) -> None:
    base = denoiser.live()
    before, plain = all_bytes(base), answers(base, denoiser)
    model = get_peft_model(base, recipe(1)).train()
    model(**denoiser.inputs()).sample.square().mean().backward()
    trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    assert trained
    assert all(".dare_" in name and one.grad is not None for name, one in trained)
    torch.optim.SGD([one for _, one in trained], lr=1e-3).step()
    moved = answers(model, denoiser)
    assert (moved - plain).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(denoiser.live(), tmp_path)
    assert torch.allclose(answers(again, denoiser), moved, atol=1e-5)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(answers(model, denoiser), moved, atol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.allclose(answers(model, denoiser), plain, atol=1e-5)
    assert all_bytes(model.unload()) == before


def test_each_row_answers_under_its_adapter_or_is_refused_by_name(denoiser: Denoiser) -> None:
    names = ["first", "__base__", "second"]
    model = get_peft_model(denoiser.live(), recipe(1), "first")
    model.add_adapter("second", recipe(2))
    if not denoiser.by_row:
        with pytest.raises((UnsupportedParameterError, ValueError), match="rows of one adapter"):
            answers(model, denoiser, adapter_names=names)
        return
    alone = {"__base__": answers(denoiser.live(), denoiser)}
    for name in ("first", "second"):
        model.set_adapter(name)
        alone[name] = answers(model, denoiser)
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    assert torch.allclose(answers(model, denoiser, adapter_names=names), expected, atol=1e-5)
    assert (alone["first"] - alone["second"]).abs().max() > 1e-2


def test_gradient_checkpointing_changes_no_gradient() -> None:
    denoiser = DENOISERS["unet"]
    model = get_peft_model(denoiser.live(), recipe(1)).train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**denoiser.inputs()).sample.square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    model.get_base_model().enable_gradient_checkpointing()
    for name, found in gradients().items():
        assert torch.allclose(found, plain[name], atol=1e-6), name


@pytest.mark.parametrize("inject", ["diffusers", "peft"])
def test_the_methods_of_diffusers_models_serve_it(
    inject: str, directories: Callable[[Denoiser], Path]
) -> None:
    """`add_adapter`, `fuse_lora`, which fuses layers of any method, and the rest of its mixin."""
    denoiser = DENOISERS["unet"]
    root, model = directories(denoiser), denoiser.live()
    plain = answers(model, denoiser)
    expected = answers(getattr(diffusers, denoiser.name).from_pretrained(root / "full"), denoiser)
    config = DareConfig.from_pretrained(root / "adapter", inference_mode=True)
    if inject == "peft":
        inject_adapter_in_model(config, model, "a")
    else:
        model.add_adapter(config, "a")
    stored = load_file(root / "adapter" / "adapter_model.safetensors")
    assert not set_peft_model_state_dict(model, stored, "a").unexpected_keys
    assert torch.equal(answers(model, denoiser), expected)
    assert get_peft_model_state_dict(model, adapter_name="a").keys() == {
        key.removeprefix("base_model.model.") for key in stored
    }
    if inject == "peft":
        return
    model.disable_adapters()
    assert torch.equal(answers(model, denoiser), plain)
    model.enable_adapters()
    model.fuse_lora()
    assert all(layer.merged for layer in model.modules() if isinstance(layer, DareState))
    assert torch.equal(answers(model, denoiser), expected)
    model.unfuse_lora()
    model.set_adapters(["a"])
    assert torch.equal(answers(model, denoiser), expected)
    with pytest.raises(ValueError, match=r"'a' at the weight 0\.5.*dare_adapters\.combine"):
        model.set_adapters(["a"], [0.5])
    model.delete_adapters("a")
    assert torch.equal(answers(model, denoiser), plain)


def test_a_pipeline_is_refused_with_what_to_take_instead(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(CheckpointError, match=r"pipeline of several models.*the folder of each"):
        dare_adapters.extract(tmp_path, tmp_path, tmp_path / "out", progress=False)
