"""Two full fine-tunes of a Llama of half a billion parameters merged, beside mergekit.

    python benchmarks/merge_against_mergekit.py --mergekit ENV/bin/mergekit-yaml [--work DIR]
        [--methods METHOD …]

The models are those of `llama_half_billion.py`. Each merge runs in a process of its own, imports
included, the two programs in turn, round by round; figures are medians, and ratios of one round.
Then the same merges from two adapters, and on a live model, in this process, beside the floor:
copying the base's file as merges write theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from llama_half_billion import make_family
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import dare_adapters
from dare_adapters.streamed_file import StreamedFile

DENSITY, WEIGHTS = 0.1, (1.0, 0.6)
# Method -> its own parameters, and how many times as fast as mergekit it is asked to be.
METHODS: dict[str, tuple[dict[str, float], float]] = {
    "linear": ({}, 1),
    "dare_linear": ({"density": DENSITY}, 6),
    "dare_ties": ({"density": DENSITY}, 6),
    "ties": ({"density": DENSITY}, 10),
    "della": ({"density": DENSITY, "epsilon": 0.05}, 5),
}


@dataclass(frozen=True)
class Run:
    """Seconds of wall clock and of all cores, and the largest resident memory in GB."""

    wall: float
    cpu: float
    resident: float


def run(command: list[str], environment: dict[str, str]) -> Run:
    """One program, to its end, with nothing left to write of the one before."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{complaint.decode()[-2000:]}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9)


def write_recipe(file: Path, method: str, base: Path, models: list[Path]) -> None:
    """The recipe that both programs run."""
    parameters = METHODS[method][0]
    recipe: dict[str, Any] = {
        "merge_method": method,
        "dtype": "bfloat16",
        "models": [
            {"model": str(model), "parameters": {"weight": weight, **parameters}}
            for model, weight in zip(models, WEIGHTS, strict=True)
        ],
    }
    if method != "linear":
        recipe["base_model"] = str(base)
    file.write_text(yaml.safe_dump(recipe))


def timed(work: Any) -> tuple[float, float]:
    """Seconds of wall clock and of all cores of one call."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def measure(
    work: Path, mergekit: Path | None, repeats: int, methods: Sequence[str] = tuple(METHODS)
) -> dict[str, Any]:
    """All measurements."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as maker:
        base, first, second = maker.submit(make_family, work).result()
    models = [first.absolute(), second.absolute()]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    # Installed packages have their bytecode; a checkout may write its own.
    quiet.pop("PYTHONDONTWRITEBYTECODE", None)
    ours = [str(Path(sys.executable).with_name("dare-adapters")), "merge"]
    results: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "repeats": repeats,
        "merges": {},
    }
    for method in methods:
        recipe, out = work / f"{method}.yml", work / "merged"
        write_recipe(recipe, method, base.absolute(), models)
        rounds = []
        for _ in range(repeats):
            both = {"ours": run([*ours, str(recipe), str(out), "--force"], quiet)}
            if mergekit is not None:
                shutil.rmtree(out, ignore_errors=True)
                both["mergekit"] = run([str(mergekit), str(recipe), str(out), "--quiet"], quiet)
            rounds.append(both)
            shutil.rmtree(out, ignore_errors=True)
        results["merges"][method] = _summary(rounds)
        show_progress(method, results["merges"][method])
    results["from_adapters"] = from_adapters(work, base, [first, second], repeats, methods)
    return results


def _summary(rounds: list[dict[str, Run]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for who in rounds[0]:
        runs = [asdict(one[who]) for one in rounds]
        summary[who] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    if "mergekit" in summary:
        for key in ("wall", "cpu", "resident"):
            ratios = [getattr(one["mergekit"], key) / getattr(one["ours"], key) for one in rounds]
            summary[f"times_{key}"] = {
                "median": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
            }
    return summary


def from_adapters(
    work: Path, base: Path, models: list[Path], repeats: int, methods: Sequence[str]
) -> dict[str, Any]:
    """The same merges of two adapters, as a checkpoint, in this process, and on a live model."""
    adapters = [work / "adapter-1-4bit", work / "adapter-2-4bit"]
    for model, adapter in zip(models, adapters, strict=True):
        if not adapter.exists():
            dare_adapters.extract(base, model, adapter, progress=False)
    live = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for parameter in live.parameters():
        parameter.data = parameter.data.clone()
    names = ["first", "second"]
    for name, adapter in zip(names, adapters, strict=True):
        live.load_dare_adapter(adapter, name, activate=False)
    results: dict[str, Any] = {}
    for method in methods:
        parameters = METHODS[method][0]
        recipe, out = work / f"{method}-adapters.yml", work / "merged"
        checkpoints = work / f"{method}.yml"
        if method == "linear":
            continue  # of parameters, not of deltas
        write_recipe(recipe, method, base.absolute(), [path.absolute() for path in adapters])
        rounds = []
        for _ in range(repeats):
            floor = timed(partial(_copy, base, work / "copied"))
            full = timed(partial(_merge, checkpoints, out))
            small = timed(partial(_merge, recipe, out))

            def mix(own: str = method, options: dict[str, float] = parameters) -> None:
                live.add_weighted_adapter(names, list(WEIGHTS), "mix", own, **options)
                live.set_dare_adapter("mix")

            alive = timed(mix)
            live.delete_dare_adapter("mix")
            rounds.append(
                {
                    "times_from_checkpoints": full[0] / small[0],
                    "times_from_checkpoints_cpu": full[1] / small[1],
                    "of_floor": small[0] / floor[0],
                    "seconds": small[0],
                    "cpu": small[1],
                    "checkpoints_seconds": full[0],
                    "checkpoints_cpu": full[1],
                    "floor_seconds": floor[0],
                    "floor_cpu": floor[1],
                    "live_seconds": alive[0],
                    "live_cpu": alive[1],
                }
            )
        results[method] = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    return results


def _copy(base: Path, out: Path) -> None:
    """The floor of a merge over a base: its bytes read, written and brought to the disk."""
    for file in sorted(base.glob("*.safetensors")):
        out.unlink(missing_ok=True)
        with file.open("rb") as source, StreamedFile(out, file.stat().st_size) as target:
            while block := source.read(1 << 22):
                target.write(block)
        with out.open("rb") as written:
            os.fsync(written.fileno())
    out.unlink(missing_ok=True)


def _merge(recipe: Path, out: Path) -> None:
    dare_adapters.merge(recipe, out, overwrite=True, progress=False)


def show_progress(method: str, summary: dict[str, Any]) -> None:
    """One line a method, as it is done."""
    Console(stderr=True).print(method, summary)


def show(results: dict[str, Any]) -> None:
    """The results as tables, each beside what was asked of it."""
    table = Table("merge to a checkpoint", "wall s", "cpu s", "GB", "times as fast: wall, cpu")
    for method, summary in results["merges"].items():
        for who in ("ours", "mergekit"):
            if who not in summary:
                continue
            own, faster = summary[who], ""
            if who == "ours" and "times_wall" in summary:
                asked = METHODS[method][1]
                wall, cpu = summary["times_wall"]["median"], summary["times_cpu"]["median"]
                less = summary["times_resident"]["median"]
                faster = f"{wall:.1f}, {cpu:.1f} (asked {asked:g}); memory 1/{less:.1f} (1/2)"
            table.add_row(
                f"{method}, {who}",
                f"{own['wall']:.1f}",
                f"{own['cpu']:.1f}",
                f"{own['resident']:.2f}",
                faster,
            )
    Console().print(table)
    table = Table(
        "from two adapters",
        "wall, cpu s",
        "from checkpoints",
        "times as fast: wall, cpu",
        "floor",
        "times the floor",
        "live",
    )
    for method, found in results["from_adapters"].items():
        wall, cpu = found["times_from_checkpoints"], found["times_from_checkpoints_cpu"]
        table.add_row(
            method,
            _both(found, "seconds", "cpu"),
            _both(found, "checkpoints_seconds", "checkpoints_cpu"),
            f"{wall:.1f}, {cpu:.1f} (asked 3)",
            _both(found, "floor_seconds", "floor_cpu"),
            f"{found['of_floor']:.1f}",
            f"{_both(found, 'live_seconds', 'live_cpu')} (asked < 3)",
        )
    Console().print(table)


def _both(found: dict[str, float], wall: str, cpu: str) -> str:
    return f"{found[wall]:.2f}, {found[cpu]:.2f}"


def main() -> None:
    """Measure, print tables, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of an environment of its own")
    parser.add_argument("--work", type=Path, help="keep the models here (default: a temporary)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path, help="write the results here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = measure(
            options.work or Path(temporary), options.mergekit, options.repeats, options.methods
        )
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
