"""Sparse fine-tuning beside PEFT's LoRA with as many trained numbers: memory and time of a step.

    python benchmarks/sparse_training.py [--rounds 3] [--steps 5] [--device cpu] [--json FILE]

A Llama of 47 million parameters in float32, every linear layer of its blocks trained: the survivors
of a mask at p = 0.99, a LoRA whose rank gives the nearest number, and all weights. AdamW, 4 rows of
128 tokens, with and without gradient checkpointing. Memory is what a step takes at its peak beyond
model, adapter and the optimiser's state (Linux: resident memory). Every measurement is a process of
its own; rounds take all of them in turn, and the medians are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DROP_RATE, ROWS, TOKENS = 0.99, 4, 128
METHODS = ("dare", "lora", "full")


def build(method: str, checkpointing: bool, device: str) -> Any:
    """The model with what trains."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from dare_adapters import DareConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    blocks = r".*(_proj)"
    if method == "dare":
        recipe = DareConfig(drop_rate=DROP_RATE, target_modules=blocks, train_vectors=False)
        model = get_peft_model(model, recipe)
    if method == "lora":
        linear = [one for one in model.modules() if isinstance(one, torch.nn.Linear)][:-1]
        weights = sum(one.weight.numel() for one in linear)
        widths = sum(one.in_features + one.out_features for one in linear)
        rank = round(weights * (1 - DROP_RATE) / widths)
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=blocks))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.to(device).train()


def measure(method: str, checkpointing: bool, steps: int, device: str) -> dict[str, float]:
    """Seconds of a step (median), peak bytes of one beyond what stays, numbers that train."""
    import torch

    model = build(method, checkpointing, device)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(8192, (ROWS, TOKENS), device=device)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    before = _memory(device, reset=True)
    step()
    peak = _memory(device) - before
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    numbers = sum(one.numel() for one in trained)
    return {"seconds": statistics.median(seconds), "bytes": peak, "numbers": numbers}


def _memory(device: str, reset: bool = False) -> int:
    """Bytes: those in use now, from which the peak is counted anew (`reset`), or the peak since."""
    import torch

    if device != "cpu":
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    field = "VmRSS" if reset else "VmHWM"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "CHECKPOINTING"))
    options = parser.parse_args()
    if options.one:
        method, checkpointing = options.one
        found = measure(method, checkpointing == "1", options.steps, options.device)
        print(json.dumps(found))
        return
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    cases = [(method, checkpointing) for checkpointing in "01" for method in METHODS]
    # Memory that is given back at once is not counted as in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    measured: dict[str, list[dict[str, float]]] = {}
    for method, checkpointing in track(cases * options.rounds, "training"):
        command = [sys.executable, __file__, "--one", method, checkpointing]
        command += ["--steps", str(options.steps), "--device", options.device]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        line = json.loads(done.stdout.splitlines()[-1])
        measured.setdefault(f"{method} {checkpointing}", []).append(line)
    medians = {
        case: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for case, runs in measured.items()
    }
    table = Table("what trains", "checkpointing", "numbers", "seconds", "x LoRA", "MB", "x LoRA")
    for case, found in medians.items():
        method, checkpointing = case.split()
        lora = medians[f"lora {checkpointing}"]
        table.add_row(
            method,
            "yes" if checkpointing == "1" else "no",
            f"{found['numbers']:,.0f}",
            f"{found['seconds']:.3f}",
            f"{found['seconds'] / lora['seconds']:.2f}",
            f"{found['bytes'] / 1e6:.0f}",
            f"{found['bytes'] / lora['bytes']:.2f}",
        )
    Console().print(table)
    if options.json is not None:
        about = {"machine": platform.processor() or platform.machine(), "threads": 1}
        options.json.write_text(json.dumps({**about, "medians": medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()
