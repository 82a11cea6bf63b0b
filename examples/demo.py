"""The main job, shown: two full fine-tunes become adapters over one live base.

    python examples/demo.py [--out DIR] [--count 200] [--seeds 3]

Every number is an evaluation made as this runs, on prompts that no training saw. The models are
the tiny family beside this file (1.2 million parameters each; `train_tiny_family.py` made them).
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import sys
import time
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import dare_adapters

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from train_tiny_family import exact_match, examples_of  # noqa: E402 (a script's neighbour)

FAMILY = HERE / "tiny_family"
SKILLS = ("reverse", "sort")
DROP_RATES = (0.0, 0.5, 0.75, 0.8, 0.9, 0.95, 0.99)
MIX_WEIGHT = 0.7
COLOURS = {"reverse": "#4477AA", "sort": "#EE6677"}
console = Console()


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of every bit of a model's weights."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def megabytes(directory: Path) -> float:
    """Size of a directory's tensors and config."""
    files = [*directory.glob("*.safetensors"), *directory.glob("*config.json")]
    return sum(file.stat().st_size for file in files) / 1e6


class Demo:
    """One live base, its tokenizer, and what is measured on it."""

    def __init__(self, out: Path, count: int, seeds: int) -> None:
        self.out, self.count, self.seeds = out, count, seeds
        self.model = AutoModelForCausalLM.from_pretrained(FAMILY / "base", dtype="auto").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(FAMILY / "base")
        self.before = fingerprint(self.model)

    def score(self, skill: str) -> float:
        """Exact match on held-out prompts."""
        return exact_match(self.model, self.tokenizer, skill, count=self.count)

    def extract(self) -> None:
        """Both fine-tunes to adapters, their sizes beside the full checkpoints."""
        table = Table(title="1. Extract: sizes", title_justify="left")
        for column in ("fine-tune", "full checkpoint", "adapter, 4 bit", "adapter, 1 bit"):
            table.add_column(column, justify="left" if column == "fine-tune" else "right")
        for skill in SKILLS:
            sizes = []
            for bits in (4, 1):
                adapter = self.out / f"{skill}-{bits}bit"
                dare_adapters.extract(
                    FAMILY / "base", FAMILY / skill, adapter, bits=bits, progress=False
                )
                sizes.append(megabytes(adapter))
            full = megabytes(FAMILY / skill)
            cells = [f"{size * 1000:.0f} kB, {full / size:.0f}x" for size in sizes]
            table.add_row(skill, f"{full * 1000:.0f} kB", *cells)
        console.print(table)

    def use(self) -> None:
        """The base fails; each adapter brings its skill; the sum of both brings both."""
        for skill in SKILLS:
            self.model.load_dare_adapter(self.out / f"{skill}-4bit", skill, activate=False)
        table = Table(title="2. Load: exact match on held-out prompts", title_justify="left")
        for column in ("live model", *SKILLS, "example", "answer"):
            table.add_column(column)
        states: list[tuple[str, dict[str, float]]] = [("base", {})]
        states += [(f"base + {skill}", {skill: 1.0}) for skill in SKILLS]
        both = dict.fromkeys(SKILLS, MIX_WEIGHT)
        states.append((f"base + {MIX_WEIGHT} reverse + {MIX_WEIGHT} sort", both))
        prompts = {skill: next(examples_of(skill, 1))[0] for skill in SKILLS}
        for name, active in states:
            self.model.set_dare_adapter(active)
            shown = "sort" if "sort" in active else "reverse"
            table.add_row(
                name,
                *(f"{self.score(skill):.3f}" for skill in SKILLS),
                prompts[shown].splitlines()[0],
                self.answer(prompts[shown]),
            )
        console.print(table)
        self.model.disable_dare_adapters()

    def answer(self, prompt: str) -> str:
        """What the live model says."""
        tokens = self.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            said = self.model.generate(**tokens, max_new_tokens=8, do_sample=False)
        new = said[0, tokens["input_ids"].shape[1] :]
        return self.tokenizer.decode(new, skip_special_tokens=True).strip()

    def sweep(self) -> dict[tuple[str, str], list[list[float]]]:
        """Exact match for each method, skill and drop rate, over mask seeds."""
        found: dict[tuple[str, str], list[list[float]]] = {}
        cells = [(m, s, p) for m in ("dare", "drop_only") for s in SKILLS for p in DROP_RATES]
        for method, skill, rate in track(cells, "3. Drop rates", console=console, transient=True):
            scores = []
            for seed in range(self.seeds if rate else 1):
                adapter = dare_adapters.extract(
                    FAMILY / "base",
                    FAMILY / skill,
                    self.out / "sweep",
                    drop_rate=rate,
                    method=method,
                    seed=seed,
                    overwrite=True,
                    progress=False,
                )
                self.model.load_dare_adapter(adapter, "swept")
                scores.append(self.score(skill))
                self.model.delete_dare_adapter("swept")
            found.setdefault((method, skill), []).append(scores)
        shutil.rmtree(self.out / "sweep")
        return found

    def show_sweep(self, found: dict[tuple[str, str], list[list[float]]]) -> None:
        """The sweep as a table and as a plot."""
        title = f"3. Drop rate against exact match (4 bit, mean of {self.seeds} masks)"
        table = Table("method", "skill", *(str(p) for p in DROP_RATES), title=title)
        table.title_justify = "left"
        for (method, skill), rows in found.items():
            name = "DARE" if method == "dare" else "drop only"
            table.add_row(name, skill, *(f"{statistics.mean(scores):.3f}" for scores in rows))
        console.print(table)
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        places = range(len(DROP_RATES))
        for (method, skill), rows in found.items():
            dare = method == "dare"
            axes.plot(
                places,
                [statistics.mean(scores) for scores in rows],
                marker="o" if dare else "x",
                linestyle="-" if dare else "--",
                color=COLOURS[skill],
                label=f"{skill}, {'DARE' if dare else 'drop only, no rescaling'}",
            )
        axes.set_xticks(places, [str(p) for p in DROP_RATES])
        axes.set_xlabel("drop rate p")
        axes.set_ylabel("exact match")
        axes.set_ylim(-0.03, 1.03)
        axes.legend()
        figure.savefig(self.out / "drop_rates.png", dpi=150)
        pyplot.close(figure)
        console.print(f"   plot: {self.out / 'drop_rates.png'}")

    def restored(self) -> None:
        """Whether the base is the base again, to the bit."""
        for name in list(self.model.dare_adapters):
            self.model.delete_dare_adapter(name)
        after = fingerprint(self.model)
        if after != self.before:
            raise SystemExit(f"the base changed: {self.before} before, {after} after")
        console.print(f"4. Base restored bit for bit: SHA-256 {after}… before and after")


def main() -> None:
    """Run all four parts."""
    parser = argparse.ArgumentParser(description="Two fine-tunes, one base, two adapters.")
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--count", type=int, default=200, help="prompts for each score")
    parser.add_argument("--seeds", type=int, default=3, help="masks for each drop rate")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shutil.rmtree(options.out, ignore_errors=True)
    start = time.perf_counter()
    demo = Demo(options.out, options.count, options.seeds)
    demo.extract()
    demo.use()
    demo.show_sweep(demo.sweep())
    demo.restored()
    console.print(f"   took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
