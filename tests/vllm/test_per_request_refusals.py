"""What cannot be served is refused when it is loaded, by name, and the engine goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dare_adapters.config import CONFIG_NAME
from tests.conftest import Pack
from tests.vllm.bad_adapters import BAD_ADAPTERS
from tests.vllm.dense_models import merged_densely
from tests.vllm.engines import PROMPTS, Engine, assert_says_the_same
from tests.vllm.loras import write_lora
from tests.vllm.requests import request_for
from tests.vllm.test_per_request import SETTINGS

pytest.importorskip("vllm", reason="needs the environment of make test-vllm")
pytestmark = pytest.mark.vllm

Starter = Callable[..., Engine]


@pytest.fixture(scope="module")
def engine(pack: Pack, start_engine: Starter) -> Engine:
    """The engine that the other tests of requests use too."""
    return start_engine(pack.base, **SETTINGS)


@pytest.mark.parametrize("kind", list(BAD_ADAPTERS))
def test_a_bad_adapter_is_refused_by_name_and_the_engine_goes_on(
    kind: str, pack: Pack, engine: Engine, tmp_path: Path
) -> None:
    make, reason = BAD_ADAPTERS[kind]
    bad = request_for(make(pack, tmp_path), "bad")
    held = engine.llm.llm_engine.list_loras()
    with pytest.raises(Exception, match=r"adapter 'bad' cannot be served") as loading:
        engine.llm.llm_engine.add_lora(bad)
    assert reason in str(loading.value)
    with pytest.raises(Exception, match=r"adapter 'bad' cannot be served"):
        engine.greedy([PROMPTS[0]], lora_request=[bad])  # before any step
    assert engine.llm.llm_engine.list_loras() == held
    good = request_for(pack.adapters["a"])
    assert_says_the_same(
        engine.greedy(lora_request=[good] * len(PROMPTS)), merged_densely(pack, {"a": 1.0})
    )
    assert_says_the_same(engine.greedy(), pack.live(torch.float32))


def test_a_parameter_that_the_model_does_not_have_is_named(
    pack: Pack, engine: Engine, tmp_path: Path
) -> None:
    import dare_adapters

    deeper = pack.live(torch.float32)
    deeper.config.num_hidden_layers = 3
    torch.manual_seed(1)
    model = pack.model_class(deeper.config)
    model.load_state_dict(deeper.state_dict(), strict=False)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path / "finetuned")
    dare_adapters.extract(
        tmp_path / "base",
        tmp_path / "finetuned",
        tmp_path / "adapter",
        on_large_delta="ignore",
        progress=False,
    )
    with pytest.raises(Exception, match=r"model\.layers\.2\..*no such layer"):
        engine.llm.llm_engine.add_lora(request_for(tmp_path / "adapter"))


def test_a_mix_may_not_hold_a_lora(pack: Pack, engine: Engine, tmp_path: Path) -> None:
    from dare_vllm.per_request import mix_path

    lora = write_lora(pack.live(torch.float32), tmp_path / "lora")
    path = mix_path([(str(pack.adapters["a"]), 0.5), (str(lora), 0.5)])
    with pytest.raises(Exception, match="mixes are of DARE adapters"):
        engine.llm.llm_engine.add_lora(request_for(path))


@pytest.mark.parametrize("text", ["[]", "[[1, 2, 3]]", '[["a", NaN]]', "{", '[["a", "x"]]'])
def test_a_path_that_describes_no_mix_is_refused(text: str, engine: Engine) -> None:
    with pytest.raises(Exception, match="describes no mix"):
        engine.llm.llm_engine.add_lora(request_for("dare-mix:" + text))


def test_an_adapter_without_a_witness_is_refused(
    pack: Pack, engine: Engine, tmp_path: Path
) -> None:
    import shutil

    copy = Path(shutil.copytree(pack.adapters["a"], tmp_path / "adapter"))
    config = json.loads((copy / CONFIG_NAME).read_text())
    assert config["witness"]
    config["witness"] = {}
    (copy / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(Exception, match=r"witness|digest"):
        engine.llm.llm_engine.add_lora(request_for(copy))


def test_a_lora_of_experts_is_refused_on_a_cpu(
    packs: Callable[[str], Pack], start_engine: Starter, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    moe = packs("mixtral")
    engine = start_engine(moe.base, **SETTINGS)
    lora = write_lora(moe.live(torch.float32), tmp_path / "lora")
    file = lora / "adapter_model.safetensors"
    tensors = load_file(file)
    for matrix, (rows, columns) in {"w1": (96, 128), "w2": (128, 96), "w3": (96, 128)}.items():
        for expert in range(4):
            stem = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{matrix}"
            tensors[f"{stem}.lora_A.weight"] = torch.ones(4, columns)
            tensors[f"{stem}.lora_B.weight"] = torch.ones(rows, 4)
    save_file(tensors, file)
    with pytest.raises(Exception, match="LoRA of experts"):
        engine.llm.llm_engine.add_lora(request_for(lora))


def test_a_compiled_model_cannot_serve_adapters_and_says_what_to_set() -> None:
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, VllmConfig

    from dare_vllm.per_request.engine_check import engine_obstacles

    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    assert engine_obstacles(config) == ""
    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    assert "--enforce-eager" in engine_obstacles(config)
    config.compilation_config.mode = CompilationMode.NONE
    config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    assert "--enforce-eager" in engine_obstacles(config)
