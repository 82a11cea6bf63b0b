"""Adapters by request in a real vLLM: tokens per second, and bytes of each.

    .venv-vllm/bin/python benchmarks/vllm_per_request.py [--rounds 5] [--json FILE]

The Llama of benchmarks/vllm_serving.py, 55 million parameters in bfloat16, with four fine-tunes of
every parameter as adapters at p = 0.9 and 4 bits, and four LoRAs of rank 64 of every projection.
Batches of 16 requests, prompts of 16 tokens, 16 new tokens each, on the CPU; the four adapters
have four requests each. One engine without LoRA tells what the base and a merged adapter do, one
with LoRA the rest; each kind in turn, round after round.
"""

from __future__ import annotations

import argparse
import gc
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
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from vllm_serving import CONFIG, SETTINGS, SPREAD, Family, start  # sets vLLM's environment first

ADAPTERS = 4
RANK = 64
BATCH, PROMPT, NEW = 16, 16, 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_lora(base: Path, out: Path, seed: int) -> int:
    """A LoRA of every projection; bytes of its tensors."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    tensors = {}
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in PROJECTIONS:
            rows, columns = parameter.shape
            for factor, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
                values = torch.randn(shape, generator=generator) * SPREAD
                tensors[f"base_model.model.{layer}.lora_{factor}.weight"] = values.bfloat16()
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": PROJECTIONS}
    (out / "adapter_config.json").write_text(json.dumps({**config, "bias": "none"}))
    return sum(tensor.nbytes for tensor in tensors.values())


def generate(llm: Any, requests: list[Any]) -> float:
    """New tokens per second of one batch."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, CONFIG.vocab_size, (BATCH, PROMPT), generator=generator).tolist()
    begin = time.perf_counter()
    llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        sampling,
        lora_request=requests,
        use_tqdm=False,
    )
    seconds = time.perf_counter() - begin
    llm.reset_prefix_cache()
    return BATCH * NEW / seconds


def measure_merged(family: Family, rounds: int) -> dict[str, list[float]]:
    """The base, and one adapter made part of it, in an engine without LoRA."""
    from dare_vllm import set_mixture

    llm = start(family.base)
    found: dict[str, list[float]] = {"base": [], "one merged adapter": []}
    for number in tqdm(range(rounds + 1), desc="base, merged"):
        for name, mixture in (("base", []), ("one merged adapter", [str(family.adapters[0])])):
            set_mixture(llm, mixture)
            speed = generate(llm, [None] * BATCH)
            if number:  # the first round warms up
                found[name].append(speed)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return found


def measure_requests(
    family: Family, loras: list[Path], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Requests of the base, of adapters and of LoRAs, in an engine with LoRA; what is held."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    from dare_vllm.per_request.residency import DIRECTORY, read_residencies

    settings = {key: value for key, value in SETTINGS.items() if key != "load_format"}
    llm = LLM(
        str(family.base),
        **settings,
        enable_lora=True,
        max_loras=ADAPTERS,
        max_cpu_loras=4 * ADAPTERS,
        max_lora_rank=RANK,
    )
    paths = [*family.adapters, *loras]
    made = [LoRARequest(path.name, 1 + n, str(path)) for n, path in enumerate(paths)]
    dare, low_rank = made[:ADAPTERS], made[ADAPTERS:]
    share = BATCH // ADAPTERS
    kinds: dict[str, Callable[[], list[Any]]] = {
        "base, LoRA enabled": lambda: [None] * BATCH,
        "one DARE adapter": lambda: [dare[0]] * BATCH,
        "four DARE adapters": lambda: [one for one in dare for _ in range(share)],
        "one LoRA": lambda: [low_rank[0]] * BATCH,
        "four LoRAs": lambda: [one for one in low_rank for _ in range(share)],
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for number in tqdm(range(rounds + 1), desc="by request"):
        for name, requests in kinds.items():
            for request in {id(one): one for one in requests() if one is not None}.values():
                llm.llm_engine.add_lora(request)  # into its slot, before the clock starts
            speed = generate(llm, requests())
            if number:
                found[name].append(speed)
    (held,) = read_residencies(os.environ[DIRECTORY])
    residency = {
        "bytes_of_a_dare_adapter": statistics.median(held.adapters.values()),
        "load_seconds": held.load_seconds / held.loads,
        "slot_swap_seconds": held.swap_seconds / held.swaps,
    }
    return found, residency


def show(results: dict[str, Any]) -> None:
    """The table."""
    table = Table("16 requests", "new tokens per second: median (min … max)", "of the base's")
    base = results["tokens_per_second"]["base"]["median"]
    for name, own in results["tokens_per_second"].items():
        spread = f"{own['median']:.0f} ({own['min']:.0f} … {own['max']:.0f})"
        table.add_row(name, spread, f"{own['median'] / base:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"held for each adapter: DARE {results['bytes_of_a_dare_adapter'] / 1e6:.1f} MB (every "
        f"parameter), LoRA {results['bytes_of_a_lora'] / 1e6:.1f} MB, a full copy "
        f"{results['bytes_of_a_full_model'] / 1e6:.0f} MB; load {results['load_seconds']:.2f} s, "
        f"into a slot {results['slot_swap_seconds'] * 1e3:.1f} ms"
    )


def main() -> None:
    """Measure, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    import vllm

    import dare_vllm

    dare_vllm.register()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        family = Family(work, ADAPTERS)
        loras = [work / f"lora-{number}" for number in range(ADAPTERS)]
        lora_bytes = [write_lora(family.base, path, n) for n, path in enumerate(loras)]
        merged = measure_merged(family, options.rounds)
        requests, held = measure_requests(family, loras, options.rounds)
        results = {
            "parameters": family.parameters,
            "batch": BATCH,
            "prompt_tokens": PROMPT,
            "new_tokens": NEW,
            "lora_rank": RANK,
            "rounds": options.rounds,
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "vllm": vllm.__version__,
            "tokens_per_second": {
                name: {"median": statistics.median(own), "min": min(own), "max": max(own)}
                for name, own in {**merged, **requests}.items()
            },
            "bytes_of_a_lora": statistics.median(lora_bytes),
            "bytes_of_a_full_model": 2 * family.parameters,
            "bytes_of_an_adapter_on_disk": family.adapter_bytes,
            **held,
        }
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
