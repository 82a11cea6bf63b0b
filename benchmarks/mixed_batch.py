"""One batch under eight adapters, beside PEFT's LoRA.

    python benchmarks/mixed_batch.py [--repeats 7] [--tokens 16 64] [--json FILE]

A Llama of 46 million parameters in float32 with eight fine-tunes of every parameter. A batch of 32
rows, four for each adapter, in one forward pass: with DARE adapters at p = 0.9 and 4 bits
(`PeftModel`, `adapter_names`), with LoRA adapters of rank 64 on every linear layer, and with the
base alone. Each round measures all three in turn. Every row is compared with the model whose
weights its adapter was merged into.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import dare_adapters

CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=5,
    num_attention_heads=12,
    num_key_value_heads=12,
    tie_word_embeddings=False,
    pad_token_id=0,
)
ADAPTERS, ROWS, RANK = 8, 32, 64
SPREAD = 0.002


def make_family(work: Path) -> list[Path]:
    """A base and eight adapters of fine-tunes in which every parameter moved."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    model.save_pretrained(work / "base")
    base = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = []
    for number in range(ADAPTERS):
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(base[name] + SPREAD * torch.randn(value.shape))
        model.save_pretrained(work / "finetuned")
        adapters.append(work / f"adapter-{number}")
        dare_adapters.extract(work / "base", work / "finetuned", adapters[-1], progress=False)
    return adapters


def with_dare(work: Path, adapters: list[Path]) -> PeftModel:
    """The base as a `PeftModel` that holds all of them."""
    model = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(work / "base"), adapters[0], adapter_name="task0"
    )
    for number, path in enumerate(adapters[1:], 1):
        model.load_adapter(path, adapter_name=f"task{number}")
    return model.eval()


def with_lora(work: Path) -> PeftModel:
    """The base with as many LoRA adapters, none of whose matrices is zero."""
    config = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    base = LlamaForCausalLM.from_pretrained(work / "base")
    model = get_peft_model(base, config, adapter_name="task0")
    for number in range(1, ADAPTERS):
        model.add_adapter(f"task{number}", config)
    return model.eval()


def largest_error(
    model: PeftModel, work: Path, adapters: list[Path], tokens: torch.Tensor, names: list[str]
) -> float:
    """The largest difference of a logit from the merged model's, over the largest logit."""
    found = model(tokens, adapter_names=names).logits
    live, worst = LlamaForCausalLM.from_pretrained(work / "base").eval(), 0.0
    for number, path in enumerate(adapters):
        rows = [row for row, name in enumerate(names) if name == f"task{number}"]
        live.load_dare_adapter(path, f"task{number}")
        expected = live(tokens[rows]).logits
        live.delete_dare_adapter(f"task{number}")
        worst = max(worst, float((found[rows] - expected).abs().max() / expected.abs().max()))
    return worst


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(work: Path, lengths: list[int], repeats: int) -> dict[str, Any]:
    """All measurements; medians of ratios of one round."""
    adapters = make_family(work)
    dare, lora = with_dare(work, adapters), with_lora(work)
    base = LlamaForCausalLM.from_pretrained(work / "base").eval()
    names = [f"task{row % ADAPTERS}" for row in range(ROWS)]
    stored = [path / "adapter_model.safetensors" for path in adapters]
    results: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "adapters": ADAPTERS,
        "rows": ROWS,
        "lora_rank": RANK,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "repeats": repeats,
        "adapter_bytes": sum(file.stat().st_size for file in stored) / ADAPTERS,
        "lora_bytes": 4
        * sum(p.numel() for name, p in lora.named_parameters() if ".task0." in name),
        "tokens": {},
    }
    for length in lengths:
        tokens = torch.randint(1, CONFIG.vocab_size, (ROWS, length))
        rounds: dict[str, list[float]] = {"dare": [], "lora": [], "base": []}
        runs: dict[str, Callable[[], object]] = {
            "dare": lambda t=tokens: dare(t, adapter_names=names),  # type: ignore[misc]
            "lora": lambda t=tokens: lora(t, adapter_names=names),  # type: ignore[misc]
            "base": lambda t=tokens: base(t),  # type: ignore[misc]
        }
        for run in runs.values():
            run()
        for _ in range(repeats):
            for who, run in runs.items():
                rounds[who].append(seconds(run))
        results["tokens"][length] = {
            "error": largest_error(dare, work, adapters, tokens, names),
            "times_lora": _spread(rounds["dare"], rounds["lora"]),
            "times_base": _spread(rounds["dare"], rounds["base"]),
            "lora_times_base": _spread(rounds["lora"], rounds["base"]),
        }
    return results


def _spread(ours: list[float], theirs: list[float]) -> dict[str, float]:
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def show(results: dict[str, Any]) -> None:
    """The results as a table."""
    table = Table("tokens a row", "error", "DARE / LoRA", "DARE / base", "LoRA / base")
    for length, found in results["tokens"].items():
        ratios = [found[key] for key in ("times_lora", "times_base", "lora_times_base")]
        cells = [f"{own['median']:.2f} ({own['min']:.2f} … {own['max']:.2f})" for own in ratios]
        table.add_row(str(length), f"{found['error']:.1e}", *cells)
    Console().print(table)
    Console().print(
        f"an adapter: {results['adapter_bytes'] / 1e6:.2f} MB, "
        f"LoRA of rank {RANK}: {results['lora_bytes'] / 1e6:.2f} MB"
    )


def main() -> None:
    """Measure, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        results = measure(Path(temporary), options.tokens, options.repeats)
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
