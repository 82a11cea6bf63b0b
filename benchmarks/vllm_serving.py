"""Adapters in a real vLLM: what a change of the mixture costs.

    .venv-vllm/bin/python benchmarks/vllm_serving.py [--parts swap] [--repeats 7] [--json FILE]

A Llama of 55 million parameters in bfloat16 with fine-tunes of every parameter, as adapters at
p = 0.9 and 4 bits.

swap: an engine goes back and forth between two adapters by each route, beside what would be done
without: vLLM's own reload of a full checkpoint in the running engine, and a new process with
another engine. Each round measures all in turn, but for the new processes, which come first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import dare_adapters

CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=6,
    num_attention_heads=12,
    num_key_value_heads=12,
    tie_word_embeddings=False,
    pad_token_id=0,
)
SPREAD = 0.002
PROMPT = {"prompt_token_ids": [1, 5, 9, 33]}
# Settings of every engine here.
SETTINGS = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_batched_tokens": 512,
    "skip_tokenizer_init": True,
    "load_format": "dare",
}


class Family:
    """A base and adapters of fine-tunes in which every parameter moved.

    Attributes:
        base: its directory.
        adapters: theirs.
        full: the checkpoints that they make with the base.
    """

    def __init__(self, work: Path, count: int) -> None:
        torch.manual_seed(0)
        model = LlamaForCausalLM(CONFIG).to(torch.bfloat16)
        self.base = work / "base"
        model.save_pretrained(self.base)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        before = {name: value.clone() for name, value in model.state_dict().items()}
        self.adapters, self.full = [], []
        for number in range(count):
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    moved = before[name].float() + SPREAD * torch.randn(value.shape)
                    value.copy_(moved.to(torch.bfloat16))
            model.save_pretrained(work / "finetuned")
            adapter, full = work / f"adapter-{number}", work / f"full-{number}"
            dare_adapters.extract(self.base, work / "finetuned", adapter, progress=False)
            dare_adapters.export(self.base, adapter, full, progress=False)
            self.adapters.append(adapter)
            self.full.append(full)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of one adapter's tensors."""
        return (self.adapters[0] / "adapter_model.safetensors").stat().st_size


def start(base: Path, **extra: Any) -> Any:
    """An engine of the base with these settings of the loader; it has answered once."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(base), **SETTINGS, model_loader_extra_config=extra)
    parameters = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    llm.generate([PROMPT], parameters, use_tqdm=False)
    return llm


def measure_swap(family: Family, repeats: int) -> dict[str, Any]:
    """Seconds of a swap by each way; medians, and ratios of one round."""
    from dare_vllm import set_mixture

    restarts = [_new_process(family, number % 2) for number in range(min(repeats, 3))]
    llm = start(family.base, plain_weights=True)
    paths = [str(path) for path in family.adapters[:2]]
    for route in ("reload", "sparse"):  # the first sparse swap compares every weight
        set_mixture(llm, [paths[1]], route=route)
    whole: dict[str, list[float]] = {"reload": [], "sparse": []}
    paused: dict[str, list[float]] = {"reload": [], "sparse": []}
    written: dict[str, int] = {}
    for _ in range(repeats):
        for (route, totals), path in zip(whole.items(), paths, strict=True):  # there and back
            done = set_mixture(llm, [path], route=route)
            totals.append(done["total_seconds"])
            paused[route].append(done["seconds"])
            written[route] = done["entries"]
    # Last, because vLLM then takes the full checkpoint for the base.
    plain = {"load_config": {"load_format": "auto", "model_loader_extra_config": {}}}
    llm.collective_rpc("update_config", args=(plain,))
    full = []
    for number in range(repeats):
        start_time = time.perf_counter()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(family.full[number % 2])})
        llm.reset_prefix_cache()
        full.append(time.perf_counter() - start_time)
    seconds = {
        "new process": restarts,
        "full checkpoint reloaded by vLLM": full,
        "swap, reload route": whole["reload"],
        "… of it without requests": paused["reload"],
        "swap, sparse route": whole["sparse"],
        "… of it without requests (sparse)": paused["sparse"],
    }
    return {
        "seconds": {name: _spread(times) for name, times in seconds.items()},
        "entries_written": written,
        "restart_over_reload": statistics.median(restarts) / statistics.median(whole["reload"]),
        "restart_over_sparse": statistics.median(restarts) / statistics.median(whole["sparse"]),
    }


def _new_process(family: Family, number: int) -> float:
    """Seconds until an engine with one adapter, in a new process, has answered once."""
    start_time = time.perf_counter()
    subprocess.run(
        [sys.executable, __file__, "--serve", family.base, family.adapters[number]], check=True
    )
    return time.perf_counter() - start_time


def _spread(times: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def show_swap(found: dict[str, Any]) -> None:
    """The swap's part as a table."""
    table = Table("swap", "seconds: median (min … max)")
    for name, own in found["seconds"].items():
        table.add_row(name, f"{own['median']:.2f} ({own['min']:.2f} … {own['max']:.2f})")
    console = Console()
    console.print(table)
    console.print(
        f"a new process takes {found['restart_over_reload']:.0f} times the reload route's time, "
        f"{found['restart_over_sparse']:.0f} times the sparse one's"
    )


# Name -> what measures it, how many adapters it needs, and what shows it.
PARTS: dict[str, tuple[Callable[[Family, int], dict[str, Any]], int, Callable[..., None]]] = {
    "swap": (measure_swap, 2, show_swap),
}


def main() -> None:
    """Measure, print tables, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--serve", nargs=2, metavar=("BASE", "ADAPTER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.serve:
        start(Path(options.serve[0]), adapters=[options.serve[1]])
        return
    with tempfile.TemporaryDirectory() as temporary:
        family = Family(Path(temporary), max(PARTS[part][1] for part in options.parts))
        import vllm

        results: dict[str, Any] = {
            "parameters": family.parameters,
            "adapter_bytes": family.adapter_bytes,
            "cores": len(os.sched_getaffinity(0)),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "vllm": vllm.__version__,
            "repeats": options.repeats,
        }
        for part in options.parts:
            measure, _, show = PARTS[part]
            results[part] = measure(family, options.repeats)
            show(results[part])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
