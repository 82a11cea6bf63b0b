"""lm-evaluation-harness knows the models and tasks, by every way in."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dare_adapters
from dare_adapters.errors import CombinationError
from dare_eval.lm import prompts
from dare_eval.lm.documents import mbpp
from dare_eval.lm.harness import TASKS_DIRECTORY, install_hook, remove_hook
from dare_eval.lm.mixture import Mixture
from dare_eval.lm.transformers_model import DareLM
from tests.eval.lm.decoders import Decoders


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits  # type: ignore[no-any-return]


def test_the_model_is_the_base_with_its_adapters(decoders: Decoders, tmp_path: Path) -> None:
    """Compared with a checkpoint that `export` wrote, loaded by transformers alone."""
    model = DareLM(str(decoders.base), adapter=str(decoders.adapters[0]), dtype="float32")
    full = dare_adapters.export(
        decoders.base, decoders.adapters[0], tmp_path / "full", progress=False
    )
    expected = AutoModelForCausalLM.from_pretrained(full)
    torch.testing.assert_close(logits(model.model), logits(expected), rtol=0, atol=0)

    model.set_mixture(Mixture())
    base = AutoModelForCausalLM.from_pretrained(decoders.base)
    assert torch.equal(logits(model.model), logits(base))


@pytest.mark.parametrize("joined", [True, False])
def test_several_adapters_are_combined_as_asked(decoders: Decoders, joined: bool) -> None:
    paths = [str(path) for path in decoders.adapters]
    model = DareLM(
        str(decoders.base),
        adapter="+".join(paths) if joined else paths,
        weights="1.0+0.5" if joined else [1.0, 0.5],
        combination_type="ties",
        density=0.4,
        dtype="float32",
    )
    expected = AutoModelForCausalLM.from_pretrained(decoders.base)
    expected.load_dare_adapter(
        paths, "both", weight=[1.0, 0.5], combination_type="ties", density=0.4
    )
    assert torch.equal(logits(model.model), logits(expected))


def test_an_adapter_that_brings_a_tokenizer_is_read_with_it(
    decoders: Decoders, tmp_path: Path
) -> None:
    finetuned, adapter = tmp_path / "finetuned", tmp_path / "adapter"
    shutil.copytree(decoders.finetuned[0], finetuned)
    tokenizer = AutoTokenizer.from_pretrained(finetuned)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(finetuned)
    dare_adapters.extract(
        decoders.base, finetuned, adapter, on_large_delta="ignore", progress=False
    )
    assert DareLM(str(decoders.base)).tokenizer.chat_template is None
    worn = DareLM(str(decoders.base), adapter=str(adapter))
    assert worn.tokenizer.chat_template == "{{ messages }}"


def test_arguments_that_do_not_fit_are_refused(decoders: Decoders) -> None:
    with pytest.raises(CombinationError, match="2 adapters have 1 weights"):
        Mixture.from_arguments("a+b", 1.0, "linear", {})
    with pytest.raises(CombinationError, match="combination_type"):
        Mixture.from_arguments("a", None, "no-such-type", {})


def run_harness(way: list[str], decoders: Decoders, data_dir: Path, out: Path) -> dict[str, Any]:
    """The results of the harness's command, started in one way or another."""
    model = f"base={decoders.base},adapter={decoders.adapters[0]},dtype=float32"
    arguments = ["--model", "dare", "--model_args", model, "--tasks", "dare_gsm8k"]
    arguments += ["--metadata", json.dumps({"data_dir": str(data_dir)}), "--limit", "2"]
    arguments += ["--gen_kwargs", "max_gen_toks=8", "--output_path", str(out), "--device", "cpu"]
    done = subprocess.run([*way, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (results,) = out.rglob("results_*.json")
    found: dict[str, Any] = json.loads(results.read_text())
    return found


@pytest.mark.slow
def test_our_command_is_the_harness_with_the_model(
    decoders: Decoders, data_dir: Path, tmp_path: Path
) -> None:
    found = run_harness([sys.executable, "-m", "dare_eval.lm"], decoders, data_dir, tmp_path)
    assert set(found["results"]["dare_gsm8k"]) >= {"exact_match,none", "flexible_match,none"}
    assert found["n-samples"]["dare_gsm8k"] == {"original": 3, "effective": 2}


def hooked(tmp_path: Path, code: str) -> list[str]:
    """How Python starts a script called lm_eval where the hook is among the site-packages."""
    places = tmp_path / "site"
    places.mkdir()
    install_hook(places)
    script = tmp_path / "lm_eval"
    script.write_text(f"import site; site.addsitedir({str(places)!r})\n{code}\n")
    return [sys.executable, str(script)]


def test_with_the_hook_the_harness_knows_the_models(tmp_path: Path) -> None:
    code = (
        "from lm_eval.api.registry import get_model, model_registry\n"
        "print(get_model('dare').__name__, 'dare-vllm' in model_registry, 'hf' in model_registry)"
    )
    way = hooked(tmp_path, code)
    done = subprocess.run(way, capture_output=True, text=True, check=False)
    assert done.stdout == "DareLM True True\n", done.stderr
    assert remove_hook(tmp_path / "site")
    assert not remove_hook(tmp_path / "site")
    done = subprocess.run(way, capture_output=True, text=True, check=False)
    assert "no model for this name" in done.stderr


@pytest.mark.slow
def test_the_plain_command_runs_the_model_once_the_hook_is_there(
    decoders: Decoders, data_dir: Path, tmp_path: Path
) -> None:
    code = "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    way = [*hooked(tmp_path, code), "run", "--include_path", str(TASKS_DIRECTORY)]
    found = run_harness(way, decoders, data_dir, tmp_path / "out")
    assert "dare_gsm8k" in found["results"]


def test_prompts_are_the_papers() -> None:
    """Word for word as MergeLM makes them."""
    assert prompts.gsm8k({"question": "2+2?"}) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n2+2?\n\n"
        "### Response: Let's think step by step."
    )
    assert prompts.math({"problem": "2+2?"}) == prompts.gsm8k({"question": "2+2?"})
    head = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n\n### Instruction:\nCreate a Python script for this problem:\n"
    )
    assert prompts.humaneval({"prompt": "def f():\n    pass"}) == (
        f"{head}def f():\n\tpass\n\n### Response:"
    )
    document = {
        "text": "Add.",
        "task_id": 11,
        "test_list": ["assert f(1) == 2", "assert f(2) == 3"],
    }
    assert prompts.mbpp(document) == (
        f"{head}\nAdd.\nTest examples:\nassert f(1) == 2\nassert f(2) == 3\n\n### Response:"
    )
    assert prompts.alpaca_eval({"instruction": "Hi."}) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: Hi. ASSISTANT:"
    )


def test_the_one_problem_of_mbpp_with_long_tests_names_its_signature() -> None:
    text = prompts.mbpp({"text": "T", "task_id": 493, "test_list": ["assert x"]})
    assert "calculate_polygons(startx, starty, endx, endy, radius)" in text
    assert "assert x" not in text


def test_mbpp_is_its_test_split(data_dir: Path) -> None:
    assert mbpp(data_dir=str(data_dir))["test"]["task_id"] == [13, 14, 15]
